//! What waits for one client, counted: what it was slow to take, and what it sent that no server has got.
//!
//! One read's worth is there before anybody counts it; nothing more is read then until it is gone. Where there is no memory for
//! it, a request is refused, and a client that does not take what it is sent is ended.

use super::{farewell::End, relay::Relay};
use crate::error::{Limit, Refusal};

/// Nobody is ended, and nothing refused, for a little that waits.
const ENDURED: usize = 16 * 1024;

/// Nor for what a read of its server has brought: there are not many servers.
const ENDURED_IN_TRANSACTION: usize = 128 * 1024;

impl Relay {
    /// Counts so many bytes; whether the client must be ended for them.
    #[cold]
    pub(super) fn is_too_much(&mut self, bytes: usize) -> bool {
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
    pub(super) fn no_room_to_wait(&mut self) -> Option<Refusal> {
        let bytes = self.inbox.capacity() + self.unsent.allocated();
        let memory = &self.side.rules().memory;
        let limit = self.buffers.try_set(memory, bytes).err().filter(|_| bytes > ENDURED)?;
        Some(self.side.rules().too_much(limit))
    }

    /// How a client ends that does not take what it is sent.
    #[cold]
    pub(super) fn takes_nothing(&self) -> End {
        let memory = &self.side.rules().memory;
        let limit = memory.admits(0).err().unwrap_or(Limit::Tenant);
        let max = memory.max_of(limit).unwrap_or(0);
        End::Refused(Refusal::TooMuchUnsent { limit, max }.into())
    }
}
