//! Whether a server may be given to another session: no reply is pending, no transaction is open, and no
//! message is incomplete.

use super::server_side::ServerSide;
use crate::data_path::session_state::pins::Pins;

impl ServerSide {
    /// Whether all messages to the server were whole, so that it reads the next bytes as a message.
    #[inline]
    pub fn has_whole_messages(&self) -> bool {
        !self.half_passed
    }

    /// The server gets no more bytes of this session, and none of another.
    #[cold]
    pub fn input_ended(&mut self) {
        self.half_passed = true;
    }

    /// Whether no message is incomplete in either direction.
    #[inline]
    pub fn is_between_messages(&self) -> bool {
        self.has_whole_messages() && self.framer.at_boundary()
    }

    /// Whether another session may use it as it is.
    pub fn is_reusable(&self) -> bool {
        self.replies.is_over()
            && self.is_between_messages()
            && self.replies.pins().is_empty()
            && self.checks.is_empty()
            && self.notifications.channels.is_none()
    }

    /// Whether a reset can remove what the session has left.
    pub fn is_cleanable(&self) -> bool {
        let keeps = Pins::LOAD | Pins::FUNCTION_STATE | Pins::DBLINK;
        let Self { replies, .. } = self;
        self.is_between_messages()
            && !replies.is_working()
            && !replies.is_unsynced()
            && !replies.pins().intersects(keeps)
    }
}
