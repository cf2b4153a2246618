//! Prepares statements on the server of a lease: closes others to stay within the limits, and sends the Parse
//! of missing ones. Pure: bytes in, bytes out.

use std::sync::Arc;

use super::{
    parse_under::ParseContext,
    pending_replies::{Origin, ReplyTracker, Request},
    server_side::ServerSide,
};
use crate::{
    data_path::{
        prepared::{
            ClientStatements, OnServer, ServerStatements, Statement,
            client_statements::UnnamedStatement,
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

/// A server's statements and pending replies, and the settings under which it parses.
pub(super) struct Preparer<'s> {
    pub statements: &'s mut ServerStatements,
    pub replies: &'s mut ReplyTracker,
    pub context: ParseContext<'s>,
    /// What was used at this time of the statements' clock or later is not closed to make room: the client's message
    /// needs it.
    kept_since: u64,
}

impl ServerSide {
    /// What prepares a statement. `under` are the session's settings at the beginning of the transaction.
    #[inline]
    pub(super) fn preparer<'s>(
        &'s mut self,
        under: &'s Arc<ParseSettings>,
        startup: &'s Settings,
    ) -> Preparer<'s> {
        let Self { statements, replies, applied, checks, role, .. } = self;
        let context = ParseContext::new(under, startup, applied, checks, role, replies);
        Preparer::new(statements, replies, context)
    }
}

impl<'s> Preparer<'s> {
    /// All statements may be closed to make room.
    pub fn new(
        statements: &'s mut ServerStatements,
        replies: &'s mut ReplyTracker,
        context: ParseContext<'s>,
    ) -> Self {
        Self { statements, replies, context, kept_since: u64::MAX }
    }

    /// The same client's message needs the statement that was used last, too.
    pub fn keeping_last(self) -> Self {
        Self { kept_since: self.statements.clock(), ..self }
    }

    /// The client's message needs all of these.
    pub fn keeping<'k>(self, needed: impl IntoIterator<Item = &'k Arc<Statement>>) -> Self {
        let kept_since = self.statements.clock() + 1;
        for statement in needed {
            self.statements.find(statement, self.replies.batch());
        }
        Self { kept_since, ..self }
    }
}

impl Preparer<'_> {
    /// Makes room for a Parse of `statement`: closes it if the server has it.
    pub fn make_room_for(&mut self, statement: &Arc<Statement>, out: &mut Vec<u8>) {
        self.close(statement.id, out);
        self.make_room([statement], out);
    }

    /// Closes the least recently used statements until those in `more` fit.
    pub fn make_room<'m>(&mut self, more: impl IntoIterator<Item = &'m Arc<Statement>>, out: &mut Vec<u8>) {
        let (mut count, mut bytes) = (0, 0);
        for statement in more {
            (count, bytes) = (count + 1, bytes + statement.length());
            self.free_name_of(statement, out);
        }
        if count == 0 {
            return;
        }
        while let Some(id) = self.statements.to_evict(count, bytes, self.kept_since) {
            if !self.close(id, out) {
                return;
            }
        }
    }

    /// Closes another statement of the same name. Only a statement with a client's name can have one.
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

    /// Closes a statement. `false`: the server does not have it, or skips the Close and keeps it.
    pub fn close(&mut self, id: u64, out: &mut Vec<u8>) -> bool {
        self.close_by(id, Origin::Prepare, out)
    }

    /// The same; `origin`: whether it is part of the client's batch.
    pub fn close_by(&mut self, id: u64, origin: Origin, out: &mut Vec<u8>) -> bool {
        let Some(statement) = self.statements.get(id).cloned() else { return false };
        let closed = Box::new(statement.named(None));
        let is_sent = self.replies.track(Request::Close(Some(closed)), origin);
        if is_sent {
            close_statement(statement.server_name(), out);
            self.statements.remove(&statement);
        }
        is_sent
    }

    /// Prepares `statement` if the server lacks it.
    pub fn ensure(&mut self, statement: &Arc<Statement>, out: &mut Outgoing<'_>) {
        if self.statements.find(statement, self.replies.batch()) == OnServer::Missing {
            self.prepare(statement, None, Origin::Prepare, out.build());
        }
    }

    /// The same before a simple query, in a batch of its own: after a failed Parse without a Sync the server
    /// would skip the query and wait for a Sync. If the Parse fails, the query's EXECUTE reports the error.
    #[cold]
    pub fn ensure_for_query(&mut self, statement: &Arc<Statement>, out: &mut Outgoing<'_>) {
        if !self.statements.has(statement) && self.prepare(statement, None, Origin::TryPrepare, out.build()) {
            self.replies.end_own_batch(out.build());
        }
    }

    /// Prepares `statement` even if the server has it. `false`: the server skips it. `client_name`: the client
    /// has just prepared it by this name, and gets the row description that it has now.
    #[cold]
    pub fn prepare(
        &mut self,
        statement: &Arc<Statement>,
        client_name: Option<&[u8]>,
        origin: Origin,
        out: &mut Vec<u8>,
    ) -> bool {
        self.make_room_for(statement, out);
        let Self { statements, replies, context, .. } = self;
        let parses = |replies: &mut ReplyTracker, out: &mut Vec<u8>| {
            if statement.in_sql {
                return prepare_in_sql(statements, statement, origin, replies, out);
            }
            let is_sent = replies.track(Request::Parse(Some(Box::new(statement.named(None)))), origin);
            if is_sent {
                statements.queued(statement, replies.batch());
                parse(statement.server_name(), &statement.body(), out);
                describe_parsed(statement, client_name, origin, replies, out);
            }
            is_sent
        };
        context.parse_under(
            &statement.parsed_under,
            statement.has_fixed_meaning,
            origin,
            replies,
            out,
            parses,
        )
    }

    /// Replaces the server's unnamed statement with the client's. A client must never bind another one's.
    #[cold]
    pub fn ensure_unnamed(&mut self, client: &ClientStatements, out: &mut Vec<u8>) {
        let Self { statements, replies, context, .. } = self;
        let Some(UnnamedStatement { serial, body, parsed_under, .. }) = client.stored_unnamed() else {
            if replies.track(Request::CloseUnnamed, Origin::Prepare) {
                statements.set_unnamed(0);
                append(out, b'C', |out| out.extend_from_slice(b"S\0"));
            }
            return;
        };
        let mut parses = |replies: &mut ReplyTracker, out: &mut Vec<u8>| {
            let is_sent = replies.track(Request::Parse(None), Origin::Prepare);
            if is_sent {
                statements.set_unnamed(*serial);
                parse(b"", body, out);
            }
            is_sent
        };
        let sql = cstr(&mut &**body).unwrap_or_default();
        match parsed_under {
            Some(under) => {
                context.parse_under(under, has_fixed_meaning(sql), Origin::Prepare, replies, out, parses)
            }
            None => parses(replies, out),
        };
    }
}

/// Requests the row description of a statement after its Parse.
pub(super) fn describe_parsed(
    statement: &Arc<Statement>,
    client_name: Option<&[u8]>,
    origin: Origin,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) {
    if statement.is_description_checked
        && replies.track(Request::DescribeParsed(Box::new(statement.named(client_name))), origin)
    {
        append(out, b'D', |out| {
            out.push(b'S');
            append_cstr(out, statement.server_name());
        });
    }
}

/// Runs the statement's SQL PREPARE, which replaces the server's unnamed statement.
#[cold]
fn prepare_in_sql(
    statements: &mut ServerStatements,
    statement: &Arc<Statement>,
    origin: Origin,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) -> bool {
    let prepare_effects = PrepareEffects {
        effects: [PrepareEffect::Prepares(statement.named(None))].into(),
        ..PrepareEffects::default()
    };
    let is_sent = replies.track(Request::Parse(None), origin);
    if is_sent {
        statements.set_unnamed_unknown();
        let _ = replies.track(Request::Bind, origin);
        let _ = replies.track(Request::Execute(Some(Box::new(prepare_effects))), origin);
        statements.queued(statement, replies.batch());
        parse(b"", &statement.body(), out);
        bind(b"", &[], out);
        execute(out);
    }
    is_sent
}

fn parse(name: &[u8], body: &[u8], out: &mut Vec<u8>) {
    append(out, b'P', |out| {
        append_cstr(out, name);
        out.extend_from_slice(body);
    });
}
