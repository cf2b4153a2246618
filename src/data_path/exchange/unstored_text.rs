//! Texts that are too long to read or to keep: the server is asked for their effects, as far as it can tell.

use super::{client_messages::ClientMessages, pending_replies::Request};
use crate::{
    data_path::session_state::{pins::Pins, side_effects::SideEffects, state_query::StateChecks},
    error::ClientError,
};

impl ClientMessages<'_, '_> {
    #[cold]
    pub(super) fn record_unread_text(&mut self) {
        self.record(&SideEffects::of_unstored_text(), false);
    }

    /// Whether a statement that the proxy does not know may be one that was too long to keep.
    pub(super) fn may_be_unstored(&self) -> bool {
        self.server.replies.pins().contains(Pins::UNSTORED)
    }

    /// An unnamed statement that is too long to keep. It pins the server until it has run or is replaced, or
    /// until another session waits for a server.
    #[cold]
    pub(super) fn set_unnamed_unstored(&mut self, serial: u64) {
        self.statements.set_unnamed_unstored(serial);
        self.server.checks.add(StateChecks::UNSTORED_UNNAMED);
    }

    /// Sends the Parse of a statement that is too long to keep, with the client's own name. It pins the
    /// server until the session has no such statement.
    pub(super) fn parse_unstored(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        let replies = &mut self.server.replies;
        replies.set_pins(replies.pins() | Pins::UNSTORED);
        self.record_unread_text();
        self.track(Request::ParseAsIs);
        self.out.pass(bytes);
        Ok(())
    }
}
