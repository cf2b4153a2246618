//! Bytes of prepared text, of the process and of each pool: where there is too much, who has more than an equal share is
//! refused, and nobody else.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Of all statements in this process.
static BYTES: AtomicUsize = AtomicUsize::new(0);

/// Shares that are not empty.
static HOLDERS: AtomicUsize = AtomicUsize::new(0);

/// What the statements of one pool weigh, in bytes of text.
#[derive(Debug, Default)]
pub struct Share(AtomicUsize);

impl Share {
    /// Whether it may grow by `bytes` where the process may have `max`: while all shares together stay below that, or this
    /// one below an equal part of it.
    pub fn may_grow(&self, bytes: usize, max: usize) -> bool {
        let fair = max / HOLDERS.load(Ordering::Relaxed).max(1);
        BYTES.load(Ordering::Relaxed).saturating_add(bytes) <= max
            || self.0.load(Ordering::Relaxed).saturating_add(bytes) <= fair
    }
}

/// Bytes that are counted for as long as this lives.
#[derive(Debug)]
pub struct Weight {
    share: Arc<Share>,
    bytes: usize,
}

impl Weight {
    /// Adds to a share.
    pub fn new(share: &Arc<Share>, bytes: usize) -> Self {
        BYTES.fetch_add(bytes, Ordering::Relaxed);
        if bytes > 0 && share.0.fetch_add(bytes, Ordering::Relaxed) == 0 {
            HOLDERS.fetch_add(1, Ordering::Relaxed);
        }
        Self { share: share.clone(), bytes }
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        BYTES.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.bytes > 0 && self.share.0.fetch_sub(self.bytes, Ordering::Relaxed) == self.bytes {
            HOLDERS.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
