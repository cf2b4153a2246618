//! Prepares statements on the server that a client holds: closes what there is no room for, and puts in a Parse for what is
//! missing. Pure: bytes in, bytes out.

use std::sync::Arc;

use super::{
    parse_under::ParseContext,
    pending_replies::{Origin, ReplyTracker, Request},
    server_side::ServerSide,
};
use crate::{
    data_path::{
        prepared::{
            ClientStatements, OnServer, ServerStatements, Statement, StatementName,
            parse_settings::ParseSettings,
            row_description::has_fixed_meaning,
            sql_prepare_effects::{PrepareEffect, PrepareEffects},
        },
        session_state::Settings,
    },
    wire::{
        frame::cstr,
        message::{append, append_cstr, bind, close_statement, execute},
        outgoing::Outgoing,
    },
};

/// A server's statements, the replies that it owes, and where texts are parsed.
pub(super) struct Preparer<'s> {
    pub statements: &'s mut ServerStatements,
    pub replies: &'s mut ReplyTracker,
    pub context: ParseContext<'s>,
}

impl ServerSide {
    /// What it takes to prepare something. `under`: the session's own settings, as they were when the transaction began.
    #[inline]
    pub(super) fn preparer<'s>(
        &'s mut self,
        under: &'s Arc<ParseSettings>,
        startup: &'s Settings,
    ) -> Preparer<'s> {
        let Self { statements, replies, applied, checks, .. } = self;
        let here = ParseContext::new(under, startup, applied, checks, replies);
        Preparer { statements, replies: replies, context: here }
    }
}

impl Preparer<'_> {
    /// Makes the next Parse of `statement` a real one: what the server has of that name is closed first.
    pub fn make_room_for(&mut self, statement: &Arc<Statement>, out: &mut Vec<u8>) {
        self.close(statement.id, out);
        self.make_room([statement], out);
    }

    /// Closes what has not been used for longest, so that with those to come there are not too many.
    pub fn make_room<'m>(&mut self, more: impl IntoIterator<Item = &'m Arc<Statement>>, out: &mut Vec<u8>) {
        let (mut count, mut bytes) = (0, 0);
        for statement in more {
            (count, bytes) = (count + 1, bytes + statement.body().len());
            self.free_name_of(statement, out);
        }
        while let Some(id) = self.statements.to_evict(count, bytes) {
            if !self.close(id, out) {
                return;
            }
        }
    }

    /// One that its client had by this name before, and that may or may not be there.
    fn free_name_of(&mut self, statement: &Statement, out: &mut Vec<u8>) {
        if !self.statements.has_client_names() || !statement.has_client_name() {
            return;
        }
        let same_name =
            |known: &&Arc<Statement>| known.server_name() == statement.server_name() && !known.is(statement);
        let before = self.statements.all().find(same_name).map(|before| before.id);
        if let Some(id) = before {
            self.close(id, out);
        }
    }

    /// Takes a statement from the server; `false` if it has none of that number, or skips to a Sync and keeps it.
    pub fn close(&mut self, id: u64, out: &mut Vec<u8>) -> bool {
        let Some(statement) = self.statements.get(id).cloned() else { return false };
        let naming = StatementName { client_name: None, statement: statement.clone() };
        let goes = self.replies.track(Request::Close(Some(Box::new(naming))), Origin::Prepare);
        if goes {
            close_statement(statement.server_name(), out);
            self.statements.remove(&statement);
        }
        goes
    }

    /// Puts in what is missing so that the server knows `statement`.
    pub fn ensure(&mut self, statement: &Arc<Statement>, out: &mut Outgoing<'_>) {
        if self.statements.find(statement, self.replies.batch()) == OnServer::Missing {
            self.prepare(statement, Origin::Prepare, out.build());
        }
    }

    /// The same in front of a simple query, in a batch of its own: a Parse that failed without a Sync behind it would make
    /// the server skip the query and wait for ever. If it fails, the query's EXECUTE says so.
    #[cold]
    pub fn ensure_for_query(&mut self, statement: &Arc<Statement>, out: &mut Outgoing<'_>) {
        if !self.statements.has(statement) && self.prepare(statement, Origin::TryPrepare, out.build()) {
            let _ = self.replies.track(Request::Sync, Origin::Proxy);
            append(out.build(), b'S', |_| {});
        }
    }

    /// Prepares `statement` anew, whether the server knows it or not.
    #[cold]
    pub fn prepare(&mut self, statement: &Arc<Statement>, origin: Origin, out: &mut Vec<u8>) -> bool {
        self.prepare_as(statement, None, origin, out)
    }

    /// The same; `client_name`: the client has prepared it by that name just now, and takes the shape that it has.
    #[cold]
    pub fn prepare_as(
        &mut self,
        statement: &Arc<Statement>,
        client_name: Option<&[u8]>,
        origin: Origin,
        out: &mut Vec<u8>,
    ) -> bool {
        self.make_room_for(statement, out);
        let Self { statements, replies, context: here } = self;
        let parses = |replies: &mut ReplyTracker, out: &mut Vec<u8>| {
            if statement.in_sql {
                return prepare_in_sql(statements, statement, origin, replies, out);
            }
            let naming = StatementName { client_name: None, statement: statement.clone() };
            let goes = replies.track(Request::Parse(Some(Box::new(naming))), origin);
            if goes {
                statements.queued(statement, replies.batch());
                parse(statement.server_name(), statement.body(), out);
                describe_parsed(statement, client_name, origin, replies, out);
            }
            goes
        };
        here.parse_under(&statement.parsed_under, statement.has_fixed_meaning, origin, replies, out, parses)
    }

    /// Makes the server's unnamed statement the client's own, where it is not: nobody may ever bind another client's.
    #[cold]
    pub fn ensure_unnamed(&mut self, client: &ClientStatements, out: &mut Vec<u8>) {
        let Self { statements, replies, context: here } = self;
        let Some((serial, body, parsed_under)) = client.stored_unnamed() else {
            if replies.track(Request::CloseUnnamed, Origin::Prepare) {
                statements.set_unnamed(0);
                append(out, b'C', |out| out.extend_from_slice(b"S\0"));
            }
            return;
        };
        let mut parses = |replies: &mut ReplyTracker, out: &mut Vec<u8>| {
            let goes = replies.track(Request::Parse(None), Origin::Prepare);
            if goes {
                statements.set_unnamed(serial);
                parse(b"", body, out);
            }
            goes
        };
        let sql = cstr(&mut { body }).unwrap_or_default();
        match parsed_under {
            Some(under) => {
                here.parse_under(under, has_fixed_meaning(sql), Origin::Prepare, replies, out, parses)
            }
            None => parses(replies, out),
        };
    }
}

/// Behind a Parse: what shape has the statement now?
pub(super) fn describe_parsed(
    statement: &Arc<Statement>,
    client_name: Option<&[u8]>,
    origin: Origin,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) {
    let naming = StatementName { client_name: client_name.map(Into::into), statement: statement.clone() };
    if statement.is_description_checked && replies.track(Request::DescribeParsed(Box::new(naming)), origin) {
        append(out, b'D', |out| {
            out.push(b'S');
            append_cstr(out, statement.server_name());
        });
    }
}

/// Runs the PREPARE that made it. That takes the server's unnamed statement.
#[cold]
fn prepare_in_sql(
    statements: &mut ServerStatements,
    statement: &Arc<Statement>,
    origin: Origin,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) -> bool {
    let naming = StatementName { client_name: None, statement: statement.clone() };
    let prepare_effects =
        PrepareEffects { effects: [PrepareEffect::Prepares(naming)].into(), ..PrepareEffects::default() };
    let goes = replies.track(Request::Parse(None), origin);
    if goes {
        statements.set_unnamed_unknown();
        let _ = replies.track(Request::Bind, origin);
        let _ = replies.track(Request::Execute(Some(Box::new(prepare_effects))), origin);
        statements.queued(statement, replies.batch());
        parse(b"", statement.body(), out);
        bind(b"", &[], out);
        execute(out);
    }
    goes
}

fn parse(name: &[u8], body: &[u8], out: &mut Vec<u8>) {
    append(out, b'P', |out| {
        append_cstr(out, name);
        out.extend_from_slice(body);
    });
}
