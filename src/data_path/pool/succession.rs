//! Replacing a pool: its sessions go on with the successor.

use std::sync::{
    Arc, Mutex, Weak,
    atomic::{AtomicBool, Ordering},
};

use super::{Pool, TenantPools};
use crate::data_path::lock::locked;

/// Whether a pool is retired, and its successor.
#[derive(Debug)]
pub(super) struct Succession {
    /// All pools of the process.
    pub pools: Weak<TenantPools>,
    pub retired: AtomicBool,
    pub last: Arc<Last>,
}

/// The last of the pools that have replaced each other, which all share this. They do not hold each other: a
/// session that is idle for days would keep every pool that its own was replaced by.
#[derive(Debug, Default)]
pub(super) struct Last(Mutex<Weak<Pool>>);

impl Pool {
    /// All pools of the process; `None` at its end.
    pub(super) fn all_pools(&self) -> Option<Arc<TenantPools>> {
        self.succession.pools.upgrade()
    }

    /// Whether it lends no server any more.
    #[inline]
    pub fn is_retired(&self) -> bool {
        self.succession.retired.load(Ordering::Acquire)
    }

    /// The pool to use from now on: this one or its successor; `None`: the tenant is closed.
    pub fn current(self: &Arc<Self>) -> Option<Arc<Self>> {
        if !self.is_retired() {
            return Some(self.clone());
        }
        let last = locked(&self.succession.last.0).upgrade();
        last.filter(|pool| !pool.is_retired())
    }

    /// Lends no server any more: idle ones are closed now, lent ones when they come back. Without a
    /// successor, the caller also ends the tenant's sessions, and the shared listener ends with them.
    pub fn retire(&self, successor: Option<Arc<Self>>) {
        if let Some(successor) = successor {
            self.listener.replaced_by(&successor);
            *locked(&self.succession.last.0) = Arc::downgrade(&successor);
        }
        self.succession.retired.store(true, Ordering::Release);
        self.queue.close();
    }
}
