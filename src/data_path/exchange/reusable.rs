//! Whether a server may serve another session: nothing is owed, open or left, and every message in either direction was whole.

use super::server_side::ServerSide;
use crate::data_path::session_state::pins::Pins;

impl ServerSide {
    /// Everything that was passed to it was whole: what comes next is read as a message, and not as the rest of one.
    #[inline]
    pub fn has_whole_messages(&self) -> bool {
        !self.half_passed
    }

    /// No message is under way in either direction.
    #[inline]
    pub fn is_between_messages(&self) -> bool {
        self.has_whole_messages() && self.framer.at_boundary()
    }

    /// Another session may have it as it is.
    pub fn is_reusable(&self) -> bool {
        self.replies.is_over()
            && self.is_between_messages()
            && self.replies.pins().is_empty()
            && self.checks.is_empty()
            && self.notifications.channels.is_none()
    }

    /// What its session has left can be undone by statements of ours.
    pub fn is_cleanable(&self) -> bool {
        let keeps = Pins::LOAD | Pins::FUNCTION_STATE | Pins::DBLINK;
        let Self { replies, .. } = self;
        self.is_between_messages()
            && !replies.is_working()
            && !replies.is_unsynced()
            && !replies.pins().intersects(keeps)
    }
}
