//! Counts the bytes that wait for one client: unsent replies, messages that no server has got, and messages
//! that its server has not taken.
//!
//! Up to one read is buffered before it is counted; nothing more is read until it is gone. When memory runs
//! out, requests are refused, and a client that does not read its replies is disconnected.

use super::{Relay, session_end::SessionEnd};
use crate::error::{ClientError, Limit};

/// Up to this, bytes are not counted: nearly every request that waits for a server is shorter.
const UNCOUNTED: usize = 1024;

/// Up to this, no client is disconnected and no request refused.
const ENDURED: usize = 16 * 1024;

/// The same for a client that holds a server: room for one read of the server. Servers are few.
const ENDURED_IN_TRANSACTION: usize = 128 * 1024;

impl Relay {
    /// Counts the buffers. Returns whether the client must be disconnected for them.
    #[inline]
    pub(super) fn is_buffering_too_much(&mut self) -> bool {
        let server = self.server.as_ref().map_or(0, |server| server.unsent.allocated());
        let bytes = self.session.unsent.allocated()
            + self.held_reply.capacity()
            + self.session.inbox.capacity()
            + self.session.side.uncounted_bytes()
            + server;
        let counted = if bytes <= UNCOUNTED { 0 } else { bytes };
        counted != self.buffers.bytes() && self.is_too_much(counted)
    }

    /// Counts so many bytes. Returns whether the client must be disconnected for them.
    #[cold]
    fn is_too_much(&mut self, bytes: usize) -> bool {
        let memory = &self.session.side.rules().memory;
        let endured = if self.server.is_some() { ENDURED_IN_TRANSACTION } else { ENDURED };
        let full = self.buffers.try_set(memory, bytes).is_err();
        if full {
            self.buffers.set(memory, bytes);
        }
        full && self.session.unsent.allocated() + self.held_reply.capacity() > endured
    }

    /// The same for a request that waits for a server. Returns the error that the request gets.
    #[cold]
    pub(super) fn no_room_to_wait(&mut self) -> Option<ClientError> {
        let bytes = self.session.inbox.capacity() + self.session.unsent.allocated();
        if bytes <= UNCOUNTED {
            return None;
        }
        let memory = &self.session.side.rules().memory;
        let limit = self.buffers.try_set(memory, bytes).err().filter(|_| bytes > ENDURED)?;
        Some(self.session.side.rules().too_much(limit))
    }

    /// The end of a session whose client does not read its replies.
    #[cold]
    pub(super) fn unread_end(&self) -> SessionEnd {
        let memory = &self.session.side.rules().memory;
        let limit = memory.admits(0).err().unwrap_or(Limit::Tenant);
        let max = memory.max_of(limit).unwrap_or(0);
        SessionEnd::Refused(ClientError::UnsentLimit { limit, max }.into())
    }
}
