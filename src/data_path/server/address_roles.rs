//! Which of a host's addresses is its primary, which are standbys, which do not answer.
//!
//! There is one [`AddressRoles`] per host and process, in its [`HostConnecting`](crate::data_path::pool), shared by
//! all pools. What it knows comes from the connections that are opened: after login a server says itself whether
//! it is in recovery. A host of one address has no roles: it is dialled, and nothing is asked.
//!
//! ```text
//!                 ┌── says it accepts writes ──▶ Primary ──┐
//! Unknown ────────┼── says it is in recovery ──▶ Standby ──┼──▶ any other, when the next connection tells so
//!                 └── does not answer, starts ─▶ Silent ───┘
//! ```
//!
//! - *Which address for reading and writing?* [`AddressRoles::order`]: the one last known as primary first, those
//!   that do not answer last. The dialling (`dial.rs`) goes through them until one says that it accepts writes.
//! - *Which address for reading only?* Those whose role is [`AddressRole::Standby`] in [`AddressRoles::all`], and the
//!   primary, which is first in the order.
//! - *Is this server's address still the primary?* As long as [`AddressRoles::changes`] is what it was when the
//!   server was opened. A pool compares it before it lends a server, and closes those of an older primary.
//!
//! Two servers that both accept writes (a partition, with the old primary still reachable) cannot be told apart
//! here: the one that was found last counts. To fence the old one is the task of what promotes the new one.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use tracing::info;

use crate::data_path::{host_address::HostAddress, lock::locked};

/// What is known of one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressRole {
    /// It accepts writes.
    Primary,
    /// Nothing is known yet.
    Unknown,
    /// It is in recovery: it answers queries and accepts no writes.
    Standby,
    /// It did not answer, or takes no connections for now.
    Silent,
}

/// The roles of one host's addresses.
#[derive(Debug)]
pub struct AddressRoles {
    host: String,
    addresses: Box<[HostAddress]>,
    known: Mutex<Known>,
    /// How often another address has become the primary. Written under the lock of `known`.
    changes: AtomicU64,
}

impl AddressRoles {
    /// Nothing is known of these addresses yet. `host` is for the log.
    pub fn new(host: &str, addresses: &[HostAddress]) -> Self {
        Self {
            host: host.to_owned(),
            addresses: addresses.into(),
            known: Mutex::new(Known::new(addresses.len())),
            changes: AtomicU64::new(0),
        }
    }

    /// The addresses and their roles, in the order in which the host has them.
    pub fn all(&self) -> Vec<(HostAddress, AddressRole)> {
        self.addresses.iter().cloned().zip(locked(&self.known).roles.iter().copied()).collect()
    }

    /// Numbers of the addresses in the order in which the primary is looked for, each with what is known of it.
    pub fn order(&self) -> Vec<(usize, AddressRole)> {
        locked(&self.known).order()
    }

    /// How often another address has become the primary. A server that was opened before the last time is no
    /// primary's, or one of an older primary.
    #[inline]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// An address has shown its role. Returns [`AddressRoles::changes`] with this one counted.
    pub fn found(&self, at: usize, role: AddressRole) -> u64 {
        let mut known = locked(&self.known);
        if let Some(before) = known.found(at, role) {
            self.changes.fetch_add(1, Ordering::Relaxed);
            let name = |at: usize| self.addresses.get(at).map(HostAddress::to_string);
            info!(
                host = self.host,
                from = name(before),
                to = name(at),
                "another address of the host is its primary"
            );
        }
        self.changes()
    }
}

/// Pure: which address has which role.
#[derive(Debug)]
struct Known {
    roles: Vec<AddressRole>,
    /// The last that was the primary.
    primary: Option<usize>,
}

impl Known {
    fn new(addresses: usize) -> Self {
        Self { roles: vec![AddressRole::Unknown; addresses], primary: None }
    }

    fn order(&self) -> Vec<(usize, AddressRole)> {
        let mut order: Vec<_> = self.roles.iter().copied().enumerate().collect();
        order.sort_by_key(|(_, role)| *role);
        order
    }

    /// Returns the last primary, if it was another one.
    fn found(&mut self, at: usize, role: AddressRole) -> Option<usize> {
        *self.roles.get_mut(at)? = role;
        if role != AddressRole::Primary {
            return None;
        }
        // There is one primary; of the one before, nothing is known any more.
        for (other, role) in self.roles.iter_mut().enumerate() {
            if other != at && *role == AddressRole::Primary {
                *role = AddressRole::Unknown;
            }
        }
        self.primary.replace(at).filter(|before| *before != at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{AddressRole::*, *};

    fn numbers(known: &Known) -> Vec<usize> {
        known.order().into_iter().map(|(at, _)| at).collect()
    }

    #[test]
    fn the_last_primary_comes_first_and_those_that_do_not_answer_last() {
        let mut known = Known::new(3);
        assert_eq!(numbers(&known), [0, 1, 2]);
        assert_eq!(known.found(0, Silent), None);
        assert_eq!(known.found(1, Standby), None);
        assert_eq!(known.found(2, Primary), None, "the first one is no change");
        assert_eq!(numbers(&known), [2, 1, 0]);
        // It fails over to the standby; the old one comes back as the new one's standby.
        assert_eq!(known.found(2, Silent), None);
        assert_eq!(known.found(1, Primary), Some(2));
        assert_eq!(known.found(2, Standby), None);
        assert_eq!(numbers(&known), [1, 2, 0]);
        assert_eq!(known.found(1, Primary), None);
    }

    proptest! {
        /// In any sequence: every address is tried once, one at most is the primary, it is tried first, and a change is
        /// counted exactly where another address than the last primary becomes one.
        #[test]
        fn there_is_one_primary(found in prop::collection::vec((0..4usize, 0..3u8), 0..60)) {
            let mut known = Known::new(4);
            let mut primary = None;
            for (at, role) in found {
                let role = [Primary, Standby, Silent][usize::from(role)];
                let changed = known.found(at, role);
                let expected = primary.filter(|before| role == Primary && *before != at);
                prop_assert_eq!(changed, expected);
                if role == Primary {
                    primary = Some(at);
                    prop_assert_eq!(numbers(&known)[0], at);
                }
                let mut all = numbers(&known);
                all.sort_unstable();
                prop_assert_eq!(all, [0, 1, 2, 3]);
                prop_assert!(known.roles.iter().filter(|role| **role == Primary).count() <= 1);
            }
        }
    }
}
