//! The part of a host's budget that this node may use, among the nodes that share it.
//!
//! A lease is valid for some seconds after its renewal. When it has run out, the node keeps what is open and opens
//! nothing more, except in place of a server that has ended.
//!
//! Pure: the time is an argument.

use tokio::time::Instant;

/// A node's lease on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostLease {
    /// The whole budget: no other node shares it.
    Whole,
    /// So many servers, until that moment; `None`: for as long as it is not replaced.
    Part { servers: usize, until: Option<Instant> },
    /// No node can see what the others have, and so many share the budget: an equal part, and at least one server.
    Share { nodes: usize },
    /// It has run out. So many servers were open then.
    RunOut { servers: usize },
}

impl HostLease {
    /// Of a host whose budget is shared, before the node has a lease.
    pub const NOTHING_YET: Self = Self::Part { servers: 0, until: None };

    /// Of a host that a node without contact to the others uses for the first time.
    pub const OUT_OF_CONTACT: Self = Self::RunOut { servers: 1 };

    /// Servers that the node may have now, while it has `open`. `limit`: the host's budget.
    pub fn servers(&mut self, limit: usize, open: usize, now: Instant) -> usize {
        match *self {
            Self::Whole => usize::MAX,
            Self::Share { nodes } => (limit / nodes.max(1)).max(1),
            Self::Part { until: Some(until), .. } if now > until => {
                self.run_out(open);
                self.servers(limit, open, now)
            }
            Self::Part { servers, .. } | Self::RunOut { servers } => servers,
        }
    }

    /// It counts no longer: what is open stays.
    pub fn run_out(&mut self, open: usize) {
        let servers = match *self {
            Self::Whole | Self::Share { .. } => open,
            Self::Part { servers, .. } | Self::RunOut { servers } => servers.min(open),
        };
        *self = Self::RunOut { servers };
    }

    /// It has run out, and there is no contact to the others: what is open stays. A host on which nothing is open gets one
    /// server, so that its tenants are served.
    pub fn lose_contact(&mut self, open: usize) {
        self.run_out(open);
        if *self == (Self::RunOut { servers: 0 }) {
            *self = Self::OUT_OF_CONTACT;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LIMIT: usize = 10;

    #[test]
    fn a_share_is_an_equal_part_and_never_nothing() {
        let now = Instant::now();
        let share = |nodes| HostLease::Share { nodes }.servers(LIMIT, 0, now);
        assert_eq!([share(1), share(3), share(20)], [10, 3, 1]);
        assert_eq!(HostLease::Share { nodes: 2 }.servers(usize::MAX, 0, now), usize::MAX / 2);
    }

    #[test]
    fn a_lease_that_has_run_out_covers_what_is_open_and_nothing_more() {
        let begin = Instant::now();
        let until = begin + Duration::from_secs(4);
        let mut lease = HostLease::Part { servers: 5, until: Some(until) };
        assert_eq!(lease.servers(LIMIT, 3, until), 5);
        let later = until + Duration::from_millis(1);
        assert_eq!(lease.servers(LIMIT, 3, later), 3);
        assert_eq!(lease.servers(LIMIT, 2, later), 3, "one may be replaced");
        assert_eq!(lease, HostLease::RunOut { servers: 3 });
        let mut small = HostLease::Part { servers: 2, until: Some(until) };
        assert_eq!(small.servers(LIMIT, 3, later), 2);
    }

    #[test]
    fn without_contact_a_host_has_one_server_at_least() {
        let servers = |mut lease: HostLease, open| {
            lease.lose_contact(open);
            lease.servers(LIMIT, open, Instant::now())
        };
        assert_eq!(servers(HostLease::NOTHING_YET, 0), 1);
        assert_eq!(servers(HostLease::Part { servers: 5, until: None }, 0), 1);
        assert_eq!(servers(HostLease::RunOut { servers: 3 }, 3), 3);
    }

    #[test]
    fn a_lease_without_an_end_stays() {
        let far = Instant::now() + Duration::from_secs(100_000);
        assert_eq!(HostLease::Part { servers: 5, until: None }.servers(LIMIT, 1, far), 5);
        assert_eq!(HostLease::Whole.servers(LIMIT, 1, far), usize::MAX);
    }
}
