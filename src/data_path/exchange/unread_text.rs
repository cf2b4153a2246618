//! Texts that are too long to read, and what else nobody reads: what it leaves the server is asked, as far as it can tell.

use super::{client_messages::ClientMessages, pending_replies::Request};
use crate::{
    data_path::session_state::{pins::Pins, side_effects::SideEffects, state_query::StateChecks},
    error::ClientError,
};

impl ClientMessages<'_, '_> {
    /// Something is done that nobody has read.
    #[cold]
    pub(super) fn note_unread(&mut self) {
        self.note(&SideEffects::of_unstored_text(), false);
    }

    /// Whether a statement that the client has, and we do not know of, may be one that was too long to keep.
    pub(super) fn may_be_unread(&self) -> bool {
        self.server.replies.pins().contains(Pins::UNSTORED)
    }

    /// An unnamed statement that is too long to keep: the server stays with this client until it has run, until there is another, or
    /// until somebody waits.
    #[cold]
    pub(super) fn unnamed_unread(&mut self, serial: u64) {
        self.statements.set_unnamed_unstored(serial);
        self.server.checks.add(StateChecks::UNSTORED_UNNAMED);
    }

    /// A statement that is too long to keep: the server gets it as the client calls it, and stays with this client until it has no
    /// such statement any more.
    pub(super) fn parse_under_its_own_name(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        let replies = &mut self.server.replies;
        replies.set_pins(replies.pins() | Pins::UNSTORED);
        self.note_unread();
        self.ask(Request::ParseAsIs);
        self.out.pass(bytes);
        Ok(())
    }
}
