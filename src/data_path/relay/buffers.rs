//! What waits for one client, counted: what it was slow to take, what it sent that no server has got, and what its server was slow to
//! take, to which all that is prepared may be added.
//!
//! A little is part of what any session takes. One read's worth is there before anybody counts it; nothing more is read then until it is gone. Where there is no memory for
//! it, a request is refused, and a client that does not take what it is sent is ended.

use super::{Relay, session_end::SessionEnd};
use crate::error::{ClientError, Limit};

/// So little is not counted: a request that waits for a server is shorter nearly always.
const UNCOUNTED: usize = 1024;

/// Nobody is ended, and nothing refused, for a little that waits.
const ENDURED: usize = 16 * 1024;

/// Nor for what a read of its server has brought: there are not many servers.
const ENDURED_IN_TRANSACTION: usize = 128 * 1024;

impl Relay {
    /// Counts what is buffered; whether the client must be ended for it.
    #[inline]
    pub(in crate::data_path) fn is_buffering_too_much(&mut self) -> bool {
        let server = self.server.as_ref().map_or(0, |server| server.unsent.allocated());
        let bytes = self.unsent.allocated() + self.held.capacity() + self.inbox.capacity() + server;
        let counted = if bytes <= UNCOUNTED { 0 } else { bytes };
        counted != self.buffers.bytes() && self.is_too_much(counted)
    }

    /// Counts so many bytes; whether the client must be ended for them.
    #[cold]
    fn is_too_much(&mut self, bytes: usize) -> bool {
        let memory = &self.side.rules().memory;
        let endured = if self.server.is_some() { ENDURED_IN_TRANSACTION } else { ENDURED };
        let full = self.buffers.try_set(memory, bytes).is_err();
        if full {
            self.buffers.set(memory, bytes);
        }
        full && self.unsent.allocated() + self.held.capacity() > endured
    }

    /// The same while a request waits for a server: what is said in place of an answer.
    #[cold]
    pub(in crate::data_path) fn no_room_to_wait(&mut self) -> Option<ClientError> {
        let bytes = self.inbox.capacity() + self.unsent.allocated();
        if bytes <= UNCOUNTED {
            return None;
        }
        let memory = &self.side.rules().memory;
        let limit = self.buffers.try_set(memory, bytes).err().filter(|_| bytes > ENDURED)?;
        Some(self.side.rules().too_much(limit))
    }

    /// How a client ends that does not take what it is sent.
    #[cold]
    pub(in crate::data_path) fn takes_nothing(&self) -> SessionEnd {
        let memory = &self.side.rules().memory;
        let limit = memory.admits(0).err().unwrap_or(Limit::Tenant);
        let max = memory.max_of(limit).unwrap_or(0);
        SessionEnd::Refused(ClientError::UnsentLimit { limit, max }.into())
    }
}
