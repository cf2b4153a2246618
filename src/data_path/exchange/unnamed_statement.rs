//! The unnamed statement moves with its client from server to server, like named ones.

use super::{
    client_messages::ClientMessages,
    pending_replies::{Origin, Request},
};
use crate::data_path::session_state::{pins::Pins, state_query::StateChecks};

impl ClientMessages<'_, '_> {
    /// Tracks a request that replaces or closes the unnamed statement. `false`: the server skips it.
    #[inline(always)]
    pub(super) fn track_unnamed(&mut self, request: Request) -> bool {
        if self.server.replies.pins().contains(Pins::UNSTORED_UNNAMED) {
            self.server.checks.add(StateChecks::UNSTORED_UNNAMED);
        }
        let may_be_skipped = self.server.replies.is_working();
        let is_sent = self.server.replies.track(request, Origin::Client);
        if is_sent {
            self.statements.begin_unnamed_change(may_be_skipped);
        }
        is_sent
    }

    /// A simple query removes the unnamed statement.
    pub(super) fn end_unnamed(&mut self) {
        if self.server.replies.pins().contains(Pins::UNSTORED_UNNAMED) {
            self.server.checks.add(StateChecks::UNSTORED_UNNAMED);
        }
        self.statements.begin_unnamed_change(self.server.replies.is_working());
        self.statements.forget_unnamed();
        self.server.statements.set_unnamed(0);
    }

    /// Sends a request that uses the unnamed statement.
    pub(super) fn with_unnamed(&mut self, request: Request, bytes: &[u8]) {
        if !self.server.statements.has_unnamed_of(self.statements) {
            let mut preparer = self.server.preparer(self.under, self.startup);
            preparer.ensure_unnamed(self.statements, self.out.build());
        }
        self.track(request);
        self.out.pass(bytes);
    }
}
