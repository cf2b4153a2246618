//! A node's leases on all hosts: from what it has read to what it may have, what it changes, and what it must not
//! believe yet.
//!
//! Pure: times are those of this node's monotonic clock.

use std::{collections::HashMap, time::Duration};

use super::{
    lease_decision::{HostRows, LeaseRow, Usage},
    presence::{News, Presence},
};

/// How long a lease is valid from the moment on at which its last renewal was sent. Shorter than
/// [`GONE_AFTER`](super::presence::GONE_AFTER).
pub const VALID_FOR: Duration = Duration::from_secs(4);
/// While a node lacks something, it says so again after this time.
const TELL_AGAIN: Duration = Duration::from_millis(250);

/// What one renewal has read, at one moment after the node's beat.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Number and beat of each node.
    pub beats: Vec<(i64, i64)>,
    /// Hosts with a budget, among those that the node uses.
    pub hosts: Vec<(String, HostRows)>,
}

/// A change of the node's row on one host. It is made only if the host still has this limit, and its leases this version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub host: String,
    pub limit: u32,
    pub version: i64,
    pub row: LeaseRow,
    /// Servers that the node may have once it is made.
    pub servers_then: u32,
    /// Tell the other nodes.
    pub tell: bool,
    /// An earlier change of the same version has had no answer.
    in_doubt: bool,
}

/// A node's lease on one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub host: String,
    /// See [`Decision::servers`](super::lease_decision::Decision::servers).
    pub servers: Option<u32>,
    /// What its row says. If it is more, the rest is handed back as servers end.
    pub granted: u32,
}

/// What follows from a renewal.
#[derive(Debug, Default)]
pub struct Plan {
    pub news: Vec<News>,
    /// No other node lives.
    pub is_alone: bool,
    /// What the node may have from now on.
    pub leases: Vec<Held>,
    pub changes: Vec<Change>,
    /// Hosts, with the versions read, whose rows of gone nodes are to be removed.
    pub removals: Vec<(String, i64)>,
    /// Gone nodes and their last beats.
    pub gone: Vec<(i64, i64)>,
    /// Hosts about which the others are to be told although nothing changes.
    pub tell: Vec<String>,
}

impl Plan {
    /// `open` servers were counted on `host` after what the node may have there was lowered: none was opened beyond that since.
    /// The row must cover those that were opened between the first count and then.
    pub fn cover(&mut self, host: &str, open: u32) {
        let granted = self.leases.iter().find(|held| held.host == host).map_or(0, |held| held.granted);
        for change in self.changes.iter_mut().filter(|change| change.host == host) {
            change.row.granted = change.row.granted.max(open.min(granted));
        }
    }
}

/// What a node knows of the leases.
#[derive(Debug, Default)]
pub struct LeaseKeeper {
    presence: Presence,
    doubts: HashMap<String, Doubt>,
    /// When the others were last told what this node lacks.
    told: HashMap<String, Duration>,
}

/// A change without an answer: it may have been made, or be made later.
#[derive(Debug)]
struct Doubt {
    /// It can be made only while the host's leases have this version.
    version: i64,
    /// What the node may have in either case.
    servers: u32,
}

impl LeaseKeeper {
    /// Decides what to do for the node `own` after it has read the table. The question was sent at `asked` and answered at
    /// `answered`.
    pub fn read(
        &mut self,
        own: i64,
        (asked, answered): (Duration, Duration),
        snapshot: &Snapshot,
        usage: impl Fn(&str) -> Usage,
    ) -> Plan {
        let news = self.presence.read(asked, answered, &snapshot.beats);
        let is_alone = self.presence.is_alone(own);
        let gone = self.presence.gone().collect();
        let mut plan = Plan { news, is_alone, gone, ..Plan::default() };
        for (host, rows) in &snapshot.hosts {
            self.decide(own, answered, (host, rows), &usage(host), &mut plan);
        }
        plan
    }

    fn decide(
        &mut self,
        own: i64,
        now: Duration,
        (host, rows): (&String, &HostRows),
        usage: &Usage,
        plan: &mut Plan,
    ) {
        let decision = rows.decide(own, usage, |node| self.presence.is_gone(node));
        let doubt = self.doubts.get(host).filter(|doubt| doubt.version == rows.version);
        let (mut servers, mut row, in_doubt) = (decision.servers, decision.row, doubt.is_some());
        if let Some(doubt) = doubt {
            servers = servers.map(|servers| servers.min(doubt.servers));
            // Any change makes another version, and ends the doubt.
            row = row.or_else(|| rows.leases.iter().find(|row| row.node == own).copied());
        } else {
            self.doubts.remove(host);
        }
        let granted = rows.leases.iter().find(|row| row.node == own).map_or(0, |row| row.granted);
        plan.leases.push(Held { host: host.clone(), servers, granted });
        let has_gone = |row: &LeaseRow| row.node != own && self.presence.is_gone(row.node);
        if rows.leases.iter().any(has_gone) {
            plan.removals.push((host.clone(), rows.version));
            return;
        }
        let gives = row.is_some_and(|row| row.granted < granted);
        let tell = decision.tell && (gives || self.may_tell(host, now));
        match row {
            Some(row) => {
                let servers_then = decision.servers_then.min(row.granted);
                let (host, limit, version) = (host.clone(), rows.limit, rows.version);
                plan.changes.push(Change { host, limit, version, row, servers_then, tell, in_doubt });
            }
            None if tell => plan.tell.push(host.clone()),
            None => {}
        }
    }

    fn may_tell(&mut self, host: &str, now: Duration) -> bool {
        let may = self.told.get(host).is_none_or(|told| now.saturating_sub(*told) >= TELL_AGAIN);
        if may {
            self.told.insert(host.to_owned(), now);
        }
        may
    }

    /// The changes of `plan` are about to be sent: until there is an answer, the node may have only what it may have
    /// with and without them.
    pub fn sending(&mut self, plan: &Plan) {
        for change in &plan.changes {
            let held = plan.leases.iter().find(|held| held.host == change.host);
            let servers = held.and_then(|held| held.servers).unwrap_or(0);
            let doubt = Doubt { version: change.version, servers };
            self.doubts.entry(change.host.clone()).or_insert(doubt);
        }
    }

    /// The answer to the changes: the hosts where they were made. Returns what the node may have there.
    pub fn made(&mut self, changes: &[Change], hosts: &[String]) -> Vec<Held> {
        // A change that was not made says nothing of an earlier one.
        for change in changes.iter().filter(|change| hosts.contains(&change.host) || !change.in_doubt) {
            self.doubts.remove(&change.host);
        }
        let made = changes.iter().filter(|change| hosts.contains(&change.host));
        let held = |change: &Change| Held {
            host: change.host.clone(),
            servers: Some(change.servers_then),
            granted: change.row.granted,
        };
        made.map(held).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_path::fleet::allocation::Demand;

    fn row(node: i64, granted: u32, wanted: u32) -> LeaseRow {
        LeaseRow { node, granted, demand: Demand { wanted, weight: 1 } }
    }

    fn read(keeper: &mut LeaseKeeper, version: i64, leases: &[LeaseRow], open: u32) -> Plan {
        let rows = HostRows { limit: 6, version, leases: leases.to_vec() };
        let snapshot =
            Snapshot { beats: vec![(1, version), (2, version)], hosts: vec![("east".to_owned(), rows)] };
        let usage = Usage { open, demand: Demand { wanted: 6, weight: 1 } };
        keeper.read(1, (Duration::ZERO, Duration::ZERO), &snapshot, |_| usage)
    }

    /// A server that was opened while the node decided to hand it back was covered by no lease.
    #[test]
    fn what_was_opened_while_the_node_decided_stays_covered() {
        let mut keeper = LeaseKeeper::default();
        let mut plan = read(&mut keeper, 1, &[row(1, 6, 6), row(2, 0, 6)], 4);
        assert_eq!((plan.leases[0].servers, plan.changes[0].row.granted), (Some(3), 4));
        plan.cover("east", 5);
        assert_eq!((plan.changes[0].row.granted, plan.changes[0].servers_then), (5, 3));
        plan.cover("east", 9);
        assert_eq!(plan.changes[0].row.granted, 6);
    }

    #[test]
    fn a_change_without_an_answer_is_believed_only_as_far_as_it_does_no_harm() {
        let mut keeper = LeaseKeeper::default();
        let hands_back = read(&mut keeper, 7, &[row(1, 6, 6), row(2, 0, 6)], 0);
        assert_eq!(hands_back.changes[0].row.granted, 3);
        keeper.sending(&hands_back);
        // The other node wants nothing any more, so all six could be kept, if the change did not come after all.
        let doubts = read(&mut keeper, 7, &[row(1, 6, 6), row(2, 0, 0)], 0);
        assert_eq!(doubts.leases[0].servers, Some(3));
        keeper.sending(&doubts);
        // A change that was not made says nothing of the earlier one.
        assert!(keeper.made(&doubts.changes, &[]).is_empty());
        assert_eq!(read(&mut keeper, 7, &[row(1, 6, 6), row(2, 2, 0)], 0).leases[0].servers, Some(3));
        assert_eq!(read(&mut keeper, 8, &[row(1, 4, 6), row(2, 2, 0)], 0).leases[0].servers, Some(4));
    }
}
