//! What a node changes about its lease on one host.
//!
//! A node changes its own row only. It takes what is free up to its part, and hands back what is above its part as soon
//! as another node lacks something. `granted` falls only as servers close, so that the sum of all `granted` is never
//! less than what is open.
//!
//! Pure.

use super::allocation::{Demand, allocate, floor};

/// A row of `pglobby.node_leases`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseRow {
    pub node: i64,
    /// Servers that the node may have.
    pub granted: u32,
    /// What it wants.
    pub demand: Demand,
}

/// What a node uses of a host now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Servers, open or being opened.
    pub open: u32,
    pub demand: Demand,
}

/// One host's leases, as read at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRows {
    /// `hosts.max_connections`.
    pub limit: u32,
    /// `host_leases.version`.
    pub version: i64,
    /// Of all nodes, those that are gone included, in order of the nodes' numbers.
    pub leases: Vec<LeaseRow>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Servers that the node may have from now on, and until the change is made. `None`: its row is missing. It may open
    /// none, and what is open stays until the change has shown what it may have.
    pub servers: Option<u32>,
    /// Servers that it may have once the change is made.
    pub servers_then: u32,
    /// The node's row as it is to be; `None`: as it is.
    pub row: Option<LeaseRow>,
    /// Other nodes are to look at their leases: this one lacks something, or has handed something back.
    pub tell: bool,
}

impl HostRows {
    /// Decides for the node `own`. `is_gone` says which nodes do not live: they get no part, but what was granted to them is
    /// not free before their rows are removed.
    pub fn decide(&self, own: i64, usage: &Usage, is_gone: impl Fn(i64) -> bool) -> Decision {
        let row = self.leases.iter().find(|row| row.node == own);
        let granted = row.map_or(0, |row| row.granted);
        let of_others = self.leases.iter().filter(|row| row.node != own).map(|row| row.granted);
        let others = of_others.fold(0_u32, u32::saturating_add);
        let parts = self.parts(own, usage, is_gone);
        let others_lack = parts.iter().any(|part| part.row.node != own && part.is_lacking());
        let (part, least) = parts
            .iter()
            .find(|part| part.row.node == own)
            .map_or((self.limit, 0), |own| (own.part, own.least));
        let is_over = granted.saturating_add(others) > self.limit;
        let wished = if others_lack || is_over { part } else { part.max(granted) };
        let free = self.limit.saturating_sub(others);
        let then = wished.max(usage.open.min(granted)).min(free.max(granted));
        let is_short = parts.iter().any(|part| part.row.demand.wanted > part.row.granted);
        let demand = demand_to_tell(row, usage, is_short);
        let new = LeaseRow { node: own, granted: then, demand };
        let changed = row.is_none_or(|row| *row != new);
        Decision {
            servers: row.map(|row| row.granted.min(wished)),
            servers_then: then.min(wished),
            row: changed.then_some(new),
            tell: then < least || then < granted,
        }
    }

    /// The nodes that have a part of the host, in order of their numbers.
    fn parts(&self, own: i64, usage: &Usage, is_gone: impl Fn(i64) -> bool) -> Vec<Part> {
        let living = self.leases.iter().filter(|row| row.node != own && !is_gone(row.node));
        let mut rows: Vec<LeaseRow> = living.copied().collect();
        let granted = self.leases.iter().find(|row| row.node == own).map_or(0, |row| row.granted);
        let at = rows.partition_point(|row| row.node < own);
        rows.insert(at, LeaseRow { node: own, granted, demand: usage.demand });
        let demands: Vec<Demand> = rows.iter().map(|row| row.demand).collect();
        let floor = floor(self.limit, rows.len());
        let parts = rows.into_iter().zip(allocate(self.limit, &demands));
        parts.map(|(row, part)| Part { row, part, least: row.demand.wanted.max(floor).min(part) }).collect()
    }
}

/// While every node has what it wants, small changes are not worth a write.
fn demand_to_tell(row: Option<&LeaseRow>, usage: &Usage, is_short: bool) -> Demand {
    let Some(row) = row.filter(|_| !is_short) else { return usage.demand };
    let near = |told: u32, now: u32| told.abs_diff(now) <= 1 + told / 4;
    let Demand { wanted, weight } = row.demand;
    let is_near = near(wanted, usage.demand.wanted) && near(weight, usage.demand.weight);
    if is_near { row.demand } else { usage.demand }
}

struct Part {
    row: LeaseRow,
    part: u32,
    /// With less than this, the node lacks something.
    least: u32,
}

impl Part {
    fn is_lacking(&self) -> bool {
        self.row.granted < self.least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(node: i64, granted: u32, wanted: u32) -> LeaseRow {
        LeaseRow { node, granted, demand: Demand { wanted, weight: 1 } }
    }

    fn usage(open: u32, wanted: u32) -> Usage {
        Usage { open, demand: Demand { wanted, weight: 1 } }
    }

    fn rows(limit: u32, leases: &[LeaseRow]) -> HostRows {
        HostRows { limit, version: 1, leases: leases.to_vec() }
    }

    #[test]
    fn a_node_alone_takes_the_whole_budget() {
        let decision = rows(6, &[]).decide(1, &usage(0, 1), |_| false);
        assert_eq!(
            decision,
            Decision { servers: None, servers_then: 6, row: Some(row(1, 6, 1)), tell: false }
        );
        let decision = rows(6, &[row(1, 6, 1)]).decide(1, &usage(1, 2), |_| false);
        assert_eq!(decision, Decision { servers: Some(6), servers_then: 6, row: None, tell: false });
    }

    #[test]
    fn a_node_that_is_added_asks_and_gets_its_part_as_servers_close() {
        let first = row(1, 6, 6);
        let asks = rows(6, &[first]).decide(2, &usage(0, 6), |_| false);
        assert_eq!(asks, Decision { servers: None, servers_then: 0, row: Some(row(2, 0, 6)), tell: true });
        let both = [first, row(2, 0, 6)];
        // All six are busy: it may keep them, and opens no other one.
        let keeps = rows(6, &both).decide(1, &usage(6, 6), |_| false);
        assert_eq!(keeps, Decision { servers: Some(3), servers_then: 3, row: None, tell: false });
        let gives = rows(6, &both).decide(1, &usage(4, 6), |_| false);
        assert_eq!(
            gives,
            Decision { servers: Some(3), servers_then: 3, row: Some(row(1, 4, 6)), tell: true }
        );
        let takes = rows(6, &[row(1, 4, 6), row(2, 0, 6)]).decide(2, &usage(0, 6), |_| false);
        assert_eq!(
            takes,
            Decision { servers: Some(0), servers_then: 2, row: Some(row(2, 2, 6)), tell: true }
        );
    }

    #[test]
    fn what_a_node_has_beyond_its_part_is_its_own_until_another_one_lacks_something() {
        let keeps = rows(6, &[row(1, 5, 1), row(2, 1, 1)]).decide(1, &usage(1, 1), |_| false);
        assert_eq!(keeps.row, None);
        let gives = rows(6, &[row(1, 5, 1), row(2, 1, 2)]).decide(1, &usage(1, 1), |_| false);
        assert_eq!((gives.row, gives.tell), (Some(row(1, 3, 1)), true));
    }

    #[test]
    fn what_a_gone_node_had_is_free_when_its_row_is_removed() {
        let gone = |node| node == 2;
        let waits = rows(6, &[row(1, 3, 6), row(2, 3, 6)]).decide(1, &usage(3, 6), gone);
        assert_eq!((waits.servers_then, waits.tell), (3, true));
        let takes = rows(6, &[row(1, 3, 6)]).decide(1, &usage(3, 6), gone);
        assert_eq!((takes.servers, takes.servers_then), (Some(3), 6));
    }

    #[test]
    fn a_node_that_was_taken_for_gone_closes_what_its_new_lease_does_not_cover() {
        let back = rows(6, &[row(2, 6, 6)]).decide(1, &usage(4, 4), |_| false);
        assert_eq!((back.servers, back.servers_then, back.row), (None, 0, Some(row(1, 0, 4))));
        let gets = rows(6, &[row(1, 0, 4), row(2, 3, 6)]).decide(1, &usage(0, 4), |_| false);
        assert_eq!(gets.servers_then, 3);
    }

    #[test]
    fn a_lowered_limit_lets_no_lease_grow() {
        let lower = rows(4, &[row(1, 3, 3), row(2, 3, 3)]);
        let shrinks = lower.decide(1, &usage(3, 3), |_| false);
        assert_eq!((shrinks.servers, shrinks.row), (Some(2), None));
        assert_eq!(lower.decide(1, &usage(2, 3), |_| false).row, Some(row(1, 2, 3)));
    }
}
