//! Sets startup parameters again that a session has reset.
//!
//! After a transaction the reply brings the settings up to date (`relay/after_transaction.rs`). If the
//! transaction continues, or the next request has already arrived, the queries here go before that request.

use super::{
    client_messages::ClientMessages,
    parse_under::once,
    pending_replies::{Origin, ReplyTracker, Request},
    server_side::ServerSide,
};
use crate::{
    data_path::session_state::{
        Settings,
        resets::{PendingRestore, Reset, Resets, RestorePlace, forbids_restore},
        server_role::{HiddenCatalogs, ServerRole},
        side_effects::SideEffects,
        state_query::StateChecks,
    },
    wire::{
        frame::{FrameError, HEADER_BYTES, cstr},
        message::array_literal,
    },
};

/// Sets each $1 that has been reset to $2, with $3 for this transaction only. A parameter whose RESET failed
/// or was rolled back is left alone. One that pg_settings does not list counts as reset if it is empty.
const RESTORE: &[u8] = b"SELECT pg_catalog.set_config(n, v, l) FROM ROWS FROM (pg_catalog.unnest($1::text[]), \
        pg_catalog.unnest($2::text[]), pg_catalog.unnest($3::boolean[])) AS given (n, v, l) \
      WHERE coalesce((SELECT source <> 'session' FROM pg_catalog.pg_show_all_settings() WHERE pg_catalog.lower(name) = n), \
        coalesce(pg_catalog.current_setting(n, true), '') = '')";

/// The same where pg_settings is hidden: each counts as reset.
const RESTORE_UNSEEN: &[u8] =
    b"SELECT pg_catalog.set_config(n, v, l) FROM ROWS FROM (pg_catalog.unnest($1::text[]), \
        pg_catalog.unnest($2::text[]), pg_catalog.unnest($3::boolean[])) AS given (n, v, l)";

/// The same for the role: $1 where the server has $3, that of its start. The server ends the session if it
/// rejects the role (`restore_settings.rs`); the client's transaction may go on, so `exit_on_error` ends here.
const RESTORE_ROLE: &[u8] = b"WITH before AS MATERIALIZED (SELECT pg_catalog.current_setting('exit_on_error') AS value) \
      SELECT pg_catalog.set_config('exit_on_error', 'on', true), pg_catalog.set_config('role', $1, $2::boolean), \
        pg_catalog.set_config('exit_on_error', before.value, true) FROM before \
      WHERE pg_catalog.current_setting('role') = $3";

impl ServerSide {
    /// Records which startup parameters a text resets: at once, or when its `portal` is executed.
    #[inline]
    pub(super) fn record_resets(
        &mut self,
        side_effects: &SideEffects,
        startup: &Settings,
        portal: Option<&[u8]>,
    ) {
        if let Some(resets) = &side_effects.resets {
            self.record_pending_restore(resets, startup, portal);
        }
    }

    #[cold]
    fn record_pending_restore(&mut self, resets: &Resets, startup: &Settings, portal: Option<&[u8]>) {
        let mut pending = self.checks.pending.take().unwrap_or_default();
        pending.record(resets, startup, portal);
        self.checks.pending = Some(pending).filter(|pending| !pending.is_empty());
    }
}

impl ClientMessages<'_, '_> {
    /// Restores startup parameters before this message, if it needs them.
    #[cold]
    pub(super) fn restore_startup(&mut self, tag: u8, bytes: &[u8]) {
        let Some(mut pending) = self.server.checks.pending.take() else { return };
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if !self.runs_without_restore(tag, body, &mut pending) {
            self.send_due_restore(&mut pending);
        }
        if tag == b'E' {
            pending.portal_runs(cstr(&mut { body }).unwrap_or_default());
        }
        self.server.checks.pending = Some(pending).filter(|pending| !pending.is_empty());
    }

    /// Whether the message runs correctly without the restore, or cannot run after one.
    fn runs_without_restore(&mut self, tag: u8, mut body: &[u8], pending: &mut PendingRestore) -> bool {
        let replies = &self.server.replies;
        let is_failed = replies.is_status_known() && replies.status() == b'E';
        let runs_nothing = is_failed || replies.is_skipping() || replies.takes_copy_data();
        // A failed transaction too may end with this text, which undoes an earlier restore.
        let runs = match tag {
            b'F' => false,
            b'Q' => {
                pending.portal_bound(b"");
                Self::text_runs_without_restore(cstr(&mut body), pending)
            }
            b'P' => {
                let _ = cstr(&mut body);
                Self::text_runs_without_restore(cstr(&mut body), pending)
            }
            b'B' => {
                let portal = cstr(&mut body).unwrap_or_default();
                pending.portal_bound(portal);
                let text = self.statements.text(cstr(&mut body).unwrap_or_default()).unwrap_or_default();
                let runs = Self::text_runs_without_restore(Ok(&text), pending);
                if runs {
                    pending.skip_portal = Some(portal.into());
                }
                runs
            }
            b'D' => {
                body.first() != Some(&b'S') || {
                    let name = cstr(&mut body.get(1..).unwrap_or_default()).unwrap_or_default();
                    forbids_restore(&self.statements.text(name).unwrap_or_default())
                }
            }
            b'E' => pending.skip_portal.as_deref() == cstr(&mut body).ok(),
            _ => true,
        };
        runs || runs_nothing
    }

    /// Whether the text must run without a restore before it. If it undoes an earlier restore, the restore is
    /// repeated.
    fn text_runs_without_restore(text: Result<&[u8], FrameError>, pending: &mut PendingRestore) -> bool {
        let runs = forbids_restore(text.unwrap_or_default());
        if runs {
            pending.repeat_restore();
        }
        runs
    }

    /// Sends the restore that is due. The after-transaction check then asks for the server's settings.
    fn send_due_restore(&mut self, pending: &mut PendingRestore) {
        let replies = &mut self.server.replies;
        let apart = replies.admits_own_batch();
        let due = pending.take_due(match apart {
            false => RestorePlace::ClientBatch,
            true if replies.is_status_known() && replies.status() == b'I' => RestorePlace::Transaction,
            true => RestorePlace::OwnBatch,
        });
        if due.is_empty() {
            return;
        }
        let origin = if apart { Origin::TryPrepare } else { Origin::Prepare };
        if due.iter().any(|reset| !reset.local) {
            self.server.checks.add(StateChecks::ANY_SETTING);
        }
        let ServerSide { replies, role, .. } = &mut *self.server;
        set(&due, self.startup, role, origin, replies, self.out.build());
        if apart {
            self.server.replies.end_own_batch(self.out.build());
        }
    }
}

/// The encoding comes first, because the other values are in it. The role comes last, because it may have
/// fewer rights than the login.
fn set(
    due: &[Reset],
    startup: &Settings,
    server: &ServerRole,
    origin: Origin,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) {
    let restore = if server.hides(HiddenCatalogs::SETTINGS) { RESTORE_UNSEEN } else { RESTORE };
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
        once(restore, &[&names, &values, &locals], Request::Execute(None), origin, replies, out);
    }
    for role in due.iter().filter(is_role) {
        let parameters = [value(role), local(role), &*server.start];
        once(RESTORE_ROLE, &parameters, Request::Execute(None), origin, replies, out);
    }
}
