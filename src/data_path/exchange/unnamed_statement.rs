//! The unnamed statement, which follows its client from server to server as named ones do.

use super::{
    client_messages::Requests,
    pending_replies::{Asked, Whose},
};
use crate::data_path::session_state::{pins::Pins, state_query::Doubts};

impl Requests<'_, '_> {
    /// Asks for what changes the unnamed statement.
    #[inline(always)]
    pub(super) fn ask_unnamed(&mut self, asked: Asked) -> bool {
        if self.server.lease.pins.contains(Pins::UNREAD_UNNAMED) {
            self.server.uncertain.doubt(Doubts::UNREAD);
        }
        let may_be_skipped = self.server.lease.is_working();
        let goes = self.server.lease.ask(asked, Whose::Client);
        if goes {
            self.statements.succeed_unnamed(may_be_skipped);
        }
        goes
    }

    /// A simple query ends the unnamed statement.
    pub(super) fn end_unnamed(&mut self) {
        if self.server.lease.pins.contains(Pins::UNREAD_UNNAMED) {
            self.server.uncertain.doubt(Doubts::UNREAD);
        }
        self.statements.succeed_unnamed(self.server.lease.is_working());
        self.statements.forget_unnamed();
        self.server.statements.set_unnamed(0);
    }

    /// A request that uses it goes to the server.
    pub(super) fn with_unnamed(&mut self, asked: Asked, bytes: &[u8]) {
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
        preparer.bring_unnamed(self.statements, self.out.build());
    }
}
