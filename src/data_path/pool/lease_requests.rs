//! What the pools want of the leases: the control path waits for it and looks at the leases sooner than it would.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Notify;

use super::host_lease::HostLease;
use crate::data_path::lock::locked;

/// Shared by the budgets of all hosts.
#[derive(Debug)]
pub struct LeaseRequests {
    of_new_hosts: Mutex<HostLease>,
    is_short: AtomicBool,
    has_returned: AtomicBool,
    wake: Notify,
}

/// Why to look at the leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseRequest {
    /// A pool wants a server that is within the host's budget, but not within this node's lease.
    Short,
    /// A server has ended, and what it took is to be handed back.
    Returned,
}

impl Default for LeaseRequests {
    fn default() -> Self {
        Self {
            of_new_hosts: Mutex::new(HostLease::Whole),
            is_short: AtomicBool::default(),
            has_returned: AtomicBool::default(),
            wake: Notify::new(),
        }
    }
}

impl LeaseRequests {
    /// The lease on a host that is used for the first time.
    pub fn of_new_host(&self) -> HostLease {
        *locked(&self.of_new_hosts)
    }

    /// From now on new hosts have this lease.
    pub fn set_of_new_hosts(&self, lease: HostLease) {
        *locked(&self.of_new_hosts) = lease;
    }

    /// [`LeaseRequest::Short`].
    pub fn short(&self) {
        self.is_short.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// [`LeaseRequest::Returned`].
    pub fn returned(&self) {
        self.has_returned.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// The next reason to look at the leases; several of the same kind count as one. Cancel-safe.
    pub async fn next(&self) -> LeaseRequest {
        loop {
            if self.has_returned.swap(false, Ordering::AcqRel) {
                return LeaseRequest::Returned;
            }
            if self.is_short.swap(false, Ordering::AcqRel) {
                return LeaseRequest::Short;
            }
            self.wake.notified().await;
        }
    }
}
