//! The unnamed statement, which follows its client from server to server as named ones do.

use super::{
    client_messages::ClientMessages,
    pending_replies::{Origin, Request},
};
use crate::data_path::session_state::{pins::Pins, state_query::StateChecks};

impl ClientMessages<'_, '_> {
    /// Asks for what changes the unnamed statement.
    #[inline(always)]
    pub(super) fn ask_unnamed(&mut self, asked: Request) -> bool {
        if self.server.replies.pins().contains(Pins::UNSTORED_UNNAMED) {
            self.server.checks.add(StateChecks::UNSTORED_UNNAMED);
        }
        let may_be_skipped = self.server.replies.is_working();
        let goes = self.server.replies.track(asked, Origin::Client);
        if goes {
            self.statements.begin_unnamed_change(may_be_skipped);
        }
        goes
    }

    /// A simple query ends the unnamed statement.
    pub(super) fn end_unnamed(&mut self) {
        if self.server.replies.pins().contains(Pins::UNSTORED_UNNAMED) {
            self.server.checks.add(StateChecks::UNSTORED_UNNAMED);
        }
        self.statements.begin_unnamed_change(self.server.replies.is_working());
        self.statements.forget_unnamed();
        self.server.statements.set_unnamed(0);
    }

    /// A request that uses it goes to the server.
    pub(super) fn with_unnamed(&mut self, asked: Request, bytes: &[u8]) {
        if !self.server.statements.has_unnamed_of(self.statements) {
            self.bring_unnamed();
        }
        self.ask(asked);
        self.out.pass(bytes);
    }

    /// The server has another unnamed statement than the client's, or none.
    #[cold]
    fn bring_unnamed(&mut self) {
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.ensure_unnamed(self.statements, self.out.build());
    }
}
