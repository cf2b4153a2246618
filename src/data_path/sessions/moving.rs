//! Sessions that move from one process to the next: they keep their process number and cancel key.

use std::{
    sync::{Arc, atomic::Ordering},
    time::SystemTime,
};

use super::registry::{NODES, NewSession, Registered, Sessions};
use crate::data_path::lock::locked;

/// A session that has moved, and whose bytes this process passes on.
#[derive(Debug)]
pub struct Forwarded(Arc<Sessions>);

impl Drop for Forwarded {
    fn drop(&mut self) {
        self.0.forwarded.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Sessions {
    /// The sessions of a process that takes over from the one with the number `before`, and has another number.
    /// `process`: as for [`Self::of_process`].
    pub fn after(process: &str, before: Option<u32>) -> Self {
        let mut sessions = Self::of_process(process);
        while Some(sessions.node) == before {
            sessions.node = rand::random_range(NODES);
        }
        sessions
    }

    /// Registers a session that has come from another process, with the process number and cancel key that its
    /// client knows. `None`: a session that began here may have had that number.
    pub fn register_arrived(
        self: &Arc<Self>,
        new: NewSession,
        process_id: i32,
        secret: &[u8],
        connected_at: SystemTime,
    ) -> Option<Registered> {
        let mut registry = locked(&self.registry);
        if self.is_ours(process_id) || registry.by_process_id.contains_key(&process_id) {
            return None;
        }
        Some(self.insert(&mut registry, new, process_id, secret.into(), connected_at))
    }

    /// Counts a session whose bytes are passed on, as long as the result lives.
    pub fn forward(self: &Arc<Self>) -> Forwarded {
        self.forwarded.fetch_add(1, Ordering::AcqRel);
        Forwarded(self.clone())
    }

    /// Sessions whose bytes are passed on.
    pub fn forwarded(&self) -> usize {
        self.forwarded.load(Ordering::Acquire)
    }
}
