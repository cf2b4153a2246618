//! Counts changes, and keeps for each changed thing the count at its last change.
//!
//! A cached row carries the count from the start of its look-up. Comparing the two tells in constant time
//! whether the row may still be used, also for a look-up that was running when the change came.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::data_path::tenant::{DirectoryChange, Login, LoginKind, Tenant, TenantStatus};

/// The count of changes, and the count at each thing's last change.
#[derive(Debug)]
pub struct ChangeCounts {
    counts: Mutex<Counts>,
    /// Maximum of things with a count of their own.
    entries_max: u64,
}

#[derive(Debug, Default)]
struct Counts {
    count: u64,
    /// Count at the last [`DirectoryChange::Everything`].
    everything: u64,
    /// Details of changes up to this count were dropped: every row older than it counts as changed.
    dropped_up_to: u64,
    changed: HashMap<DirectoryChange, u64>,
}

/// Whether a cached row may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// Nothing it depends on has changed.
    Unchanged,
    /// It may have changed while no notifications were received.
    Doubtful,
    /// It has not changed, but a row that it quotes has. It is read again, and used if that fails.
    Outdated,
    /// It has changed.
    Changed,
}

impl ChangeCounts {
    /// Keeps `entries_max` counts. Beyond that all are dropped, and every cached row counts as changed.
    pub fn new(entries_max: u64) -> Self {
        Self { counts: Mutex::default(), entries_max }
    }

    /// Counts a change.
    pub fn note(&self, change: &DirectoryChange) {
        let mut counts = self.counts();
        counts.count += 1;
        let count = counts.count;
        if *change == DirectoryChange::Everything {
            counts.everything = count;
            return;
        }
        if counts.changed.len() as u64 >= self.entries_max {
            counts.changed.clear();
            counts.dropped_up_to = count;
        }
        counts.changed.insert(change.clone(), count);
    }

    /// The present count; to be read before a look-up begins.
    pub fn count(&self) -> u64 {
        self.counts().count
    }

    /// The validity of a row whose look-up began at count `since`.
    pub fn validity(&self, since: u64, row: &impl DependsOn) -> Validity {
        let counts = self.counts();
        if counts.count <= since {
            return Validity::Unchanged;
        }
        let changed = |on: &DirectoryChange| counts.changed.get(on).is_some_and(|at| *at > since);
        if counts.dropped_up_to > since || row.depends_on_any(&changed) {
            return Validity::Changed;
        }
        if row.quotes_any(&changed) {
            return Validity::Outdated;
        }
        if counts.everything > since { Validity::Doubtful } else { Validity::Unchanged }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A record read from rows.
pub trait DependsOn {
    /// Whether `changed` is true for any of its rows.
    fn depends_on_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool;

    /// Whether `changed` is true for a row that it only quotes: what it says of that row may be outdated, and admits
    /// nothing by itself.
    fn quotes_any(&self, _changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        false
    }

    /// Whether a new row may take its name.
    fn frees_its_name(&self) -> bool {
        false
    }
}

impl DependsOn for Tenant {
    fn depends_on_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        changed(&DirectoryChange::Tenant(self.id)) || changed(&DirectoryChange::Host(self.host.name.clone()))
    }

    fn frees_its_name(&self) -> bool {
        self.status == TenantStatus::Dropped
    }
}

impl DependsOn for Login {
    fn depends_on_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        changed(&DirectoryChange::Login(self.id))
    }

    /// The tenant's name, for a client that names none, and which grants are for living tenants. A session enters a
    /// tenant by the tenant's own row, so a tenant that was closed stays closed for a login that does not know it.
    fn quotes_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        match &self.kind {
            LoginKind::Employee { tenant_id, .. } => changed(&DirectoryChange::Tenant(*tenant_id)),
            LoginKind::Service { granted, .. } => {
                granted.iter().any(|grant| changed(&DirectoryChange::Tenant(grant.tenant_id)))
            }
            LoginKind::Admin { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Row(i64);

    impl DependsOn for Row {
        fn depends_on_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
            changed(&DirectoryChange::Tenant(self.0))
        }
    }

    #[test]
    fn a_change_counts_for_rows_looked_up_before_it_only() {
        let changes = ChangeCounts::new(10);
        let before = changes.count();
        changes.note(&DirectoryChange::Tenant(1));
        changes.note(&DirectoryChange::Login(2));

        assert_eq!(changes.validity(before, &Row(1)), Validity::Changed);
        assert_eq!(changes.validity(before, &Row(2)), Validity::Unchanged);
        assert_eq!(changes.validity(changes.count(), &Row(1)), Validity::Unchanged);
    }

    #[test]
    fn a_login_is_outdated_by_its_tenant_and_changed_by_its_own_row() {
        let employee = LoginKind::Employee {
            tenant_id: 1,
            tenant_name: "acme".to_owned(),
            access: crate::data_path::tenant::Access::ReadWrite,
        };
        let login = Login::for_tests("alice", employee);
        let changes = ChangeCounts::new(10);
        let before = changes.count();
        changes.note(&DirectoryChange::Tenant(2));
        assert_eq!(changes.validity(before, &login), Validity::Unchanged);
        changes.note(&DirectoryChange::Tenant(1));
        changes.note(&DirectoryChange::Everything);
        assert_eq!(changes.validity(before, &login), Validity::Outdated);
        changes.note(&DirectoryChange::Login(login.id));
        assert_eq!(changes.validity(before, &login), Validity::Changed);
    }

    #[test]
    fn everything_is_a_doubt_and_a_known_change_stays_one() {
        let changes = ChangeCounts::new(10);
        let before = changes.count();
        changes.note(&DirectoryChange::Tenant(1));
        changes.note(&DirectoryChange::Everything);

        assert_eq!(changes.validity(before, &Row(1)), Validity::Changed);
        assert_eq!(changes.validity(before, &Row(2)), Validity::Doubtful);
    }

    #[test]
    fn a_full_ledger_forgets_nothing_but_the_details() {
        let changes = ChangeCounts::new(2);
        let before = changes.count();
        for id in 1..=5 {
            changes.note(&DirectoryChange::Tenant(id));
        }
        assert!(changes.counts().changed.len() <= 2);
        for id in 1..=6 {
            assert_eq!(changes.validity(before, &Row(id)), Validity::Changed);
        }
        assert_eq!(changes.validity(changes.count(), &Row(5)), Validity::Unchanged);
    }
}
