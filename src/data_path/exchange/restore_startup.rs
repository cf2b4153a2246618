//! A session that has reset what its startup packet asked for finds that again in its next request.
//!
//! When its transaction is over it is put right with the reply (`after_transaction.rs`). Where the transaction goes on, or the next request is on
//! its way already, the question here goes in front of that: it sets those parameters that are not set any more.

use super::{
    client_messages::ClientMessages,
    parse_under::once,
    pending_replies::{Origin, ReplyTracker, Request},
    server_side::ServerSide,
};
use crate::{
    data_path::session_state::{
        Settings,
        resets::{PendingRestore, Reset, Resets, forbids_restore},
        side_effects::SideEffects,
        state_query::StateChecks,
    },
    wire::{
        frame::{FrameError, HEADER_BYTES, cstr},
        message::{append, array_literal},
    },
};

/// Sets $1 to $2, where they have been reset; $3: for the transaction only. Where RESET has failed, or been undone, nothing is
/// changed. A parameter that PostgreSQL does not list is empty then.
const AGAIN: &[u8] = b"SELECT pg_catalog.set_config(n, v, l) FROM ROWS FROM (pg_catalog.unnest($1::text[]), \
        pg_catalog.unnest($2::text[]), pg_catalog.unnest($3::boolean[])) AS given (n, v, l) \
      WHERE coalesce((SELECT source <> 'session' FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) = n), \
        coalesce(pg_catalog.current_setting(n, true), '') = '')";

/// The same of the role, as a server is given it at first: it ends where it would refuse.
const ROLE_AGAIN: &[u8] = b"SELECT CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1::text \
        AND pg_catalog.pg_has_role(session_user, oid, 'MEMBER')) THEN pg_catalog.set_config('role', $1, $2::boolean) \
      ELSE pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())::text END \
      WHERE pg_catalog.current_setting('role') = 'none'";

impl ServerSide {
    /// A text has been noted that runs in a simple query, or where this portal does: it may reset what was given at `startup`.
    #[inline]
    pub(super) fn note_resets(
        &mut self,
        side_effects: &SideEffects,
        startup: &Settings,
        portal: Option<&[u8]>,
    ) {
        if let Some(resets) = &side_effects.resets {
            self.takes_back(resets, startup, portal);
        }
    }

    #[cold]
    fn takes_back(&mut self, resets: &Resets, startup: &Settings, portal: Option<&[u8]>) {
        let mut pending = self.checks.pending.take().unwrap_or_default();
        pending.record(resets, startup, portal);
        self.checks.pending = Some(pending).filter(|pending| !pending.is_empty());
    }
}

impl ClientMessages<'_, '_> {
    /// Something has been reset, or is when a portal runs; and this message comes.
    #[cold]
    pub(super) fn startup_again(&mut self, tag: u8, bytes: &[u8]) {
        let Some(mut pending) = self.server.checks.pending.take() else { return };
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if !self.does_without(tag, body, &mut pending) {
            self.set_again(&mut pending);
        }
        if tag == b'E' {
            pending.portal_runs(cstr(&mut { body }).unwrap_or_default());
        }
        self.server.checks.pending = Some(pending).filter(|pending| !pending.is_empty());
    }

    /// Whether the server can do without when it has this message.
    fn does_without(&mut self, tag: u8, mut body: &[u8], pending: &mut PendingRestore) -> bool {
        let replies = &self.server.replies;
        let refuses = replies.is_settled() && replies.status() == b'E';
        if refuses || replies.is_skipping() || replies.takes_copy_data() {
            return true;
        }
        match tag {
            b'F' => false,
            b'Q' => {
                pending.portal_bound(b"");
                Self::passes(cstr(&mut body), pending)
            }
            b'P' => {
                let _ = cstr(&mut body);
                Self::passes(cstr(&mut body), pending)
            }
            b'B' => {
                let portal = cstr(&mut body).unwrap_or_default();
                pending.portal_bound(portal);
                let passes = Self::passes(Ok(self.text_of(cstr(&mut body).unwrap_or_default())), pending);
                if passes {
                    pending.skip_portal = Some(portal.into());
                }
                passes
            }
            b'D' => {
                body.first() != Some(&b'S') || {
                    let name = cstr(&mut body.get(1..).unwrap_or_default()).unwrap_or_default();
                    forbids_restore(self.text_of(name))
                }
            }
            b'E' => pending.skip_portal.as_deref() == cstr(&mut body).ok(),
            _ => true,
        }
    }

    /// Whether a text does without. If it undoes what has been set again in this batch, that is due once more.
    fn passes(text: Result<&[u8], FrameError>, pending: &mut PendingRestore) -> bool {
        let passes = forbids_restore(text.unwrap_or_default());
        if passes {
            pending.repeat_restore();
        }
        passes
    }

    /// The text of a statement that is prepared.
    fn text_of(&self, name: &[u8]) -> &[u8] {
        let body = match name {
            b"" => self.statements.unnamed_body(),
            name => self.statements.get(name).map(|statement| statement.body()),
        };
        cstr(&mut body.unwrap_or_default()).unwrap_or_default()
    }

    /// Sets again what is due. What the server has is asked for, then, when the transaction is over.
    fn set_again(&mut self, pending: &mut PendingRestore) {
        let replies = &mut self.server.replies;
        let apart = !replies.is_unsynced();
        let due = pending.take_due(apart);
        if due.is_empty() {
            return;
        }
        let origin = if apart { Origin::TryPrepare } else { Origin::Prepare };
        if due.iter().any(|reset| !reset.local) {
            self.server.checks.add(StateChecks::ANY_SETTING);
        }
        set(&due, self.startup, origin, &mut self.server.replies, self.out.build());
        if apart {
            let _ = self.server.replies.track(Request::Sync, Origin::Proxy);
            append(self.out.build(), b'S', |_| {});
        }
    }
}

/// The encoding is that of the other values: it comes first. A role may set less than the login: it comes last.
fn set(due: &[Reset], startup: &Settings, origin: Origin, replies: &mut ReplyTracker, out: &mut Vec<u8>) {
    let is_encoding = |reset: &&Reset| *reset.name == *"client_encoding";
    let is_role = |reset: &&Reset| *reset.name == *"role";
    let encoding: Vec<&Reset> = due.iter().filter(is_encoding).collect();
    let others: Vec<&Reset> = due.iter().filter(|reset| !is_encoding(reset) && !is_role(reset)).collect();
    let value = |reset: &Reset| startup.get(&reset.name).unwrap_or_default();
    let local = |reset: &Reset| if reset.local { "t" } else { "f" };
    for resets in [encoding, others].iter().filter(|resets| !resets.is_empty()) {
        let names = array_literal(resets.iter().map(|reset| &*reset.name));
        let values = array_literal(resets.iter().map(|reset| value(reset)));
        let locals = array_literal(resets.iter().map(|reset| local(reset)));
        once(AGAIN, &[&names, &values, &locals], Request::Execute(None), origin, replies, out);
    }
    for role in due.iter().filter(is_role) {
        once(ROLE_AGAIN, &[value(role), local(role)], Request::Execute(None), origin, replies, out);
    }
}
