//! PAUSE (a tenant's pools lend no server), DISABLE (no new sessions) and RECONNECT (new servers for old ones).
//!
//! A pause has one of three sources: a command to this node, a command to all nodes (a row in the central
//! database), or a move of the tenant to another host. A tenant is served when none of them holds it, and the
//! end of one does not end another.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use super::{Pool, TenantPools};
use crate::{data_path::lock::locked, error::ClientError};

/// One tenant, by id; `None`: all tenants.
pub type TenantScope = Option<i64>;

/// What one source has paused and disabled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PauseSet {
    /// All tenants are paused.
    pub all_paused: bool,
    /// Ids of the tenants that are paused by name.
    pub paused: HashSet<i64>,
    /// Ids of the tenants that take no new session.
    pub disabled: HashSet<i64>,
}

impl PauseSet {
    fn pauses(&self, tenant: i64) -> bool {
        self.all_paused || self.paused.contains(&tenant)
    }

    fn set_paused(&mut self, scope: TenantScope, paused: bool) {
        match (scope, paused) {
            (None, true) => self.all_paused = true,
            (None, false) => {
                self.all_paused = false;
                self.paused.clear();
            }
            (Some(tenant), true) => drop(self.paused.insert(tenant)),
            (Some(tenant), false) => drop(self.paused.remove(&tenant)),
        }
    }

    fn set_disabled(&mut self, tenant: i64, disabled: bool) {
        match disabled {
            true => self.disabled.insert(tenant),
            false => self.disabled.remove(&tenant),
        };
    }
}

/// The pauses of all sources. Tenants are paused and disabled one by one, so there are few.
#[derive(Debug, Default)]
pub struct Pauses(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By commands to this node. They end with the process.
    own: PauseSet,
    /// By commands to all nodes, as the central database had them last.
    fleet: PauseSet,
    /// Tenants that move to another host.
    moving: HashSet<i64>,
}

impl Pauses {
    /// Whether a tenant's pools lend no server.
    pub fn is_paused(&self, tenant: i64) -> bool {
        let state = locked(&self.0);
        state.own.pauses(tenant) || state.fleet.pauses(tenant) || state.moving.contains(&tenant)
    }

    /// Whether a tenant's pools lend no server because it moves to another host.
    pub fn is_moving(&self, tenant: i64) -> bool {
        locked(&self.0).moving.contains(&tenant)
    }

    /// Whether no pool lends a server.
    pub fn all_paused(&self) -> bool {
        let state = locked(&self.0);
        state.own.all_paused || state.fleet.all_paused
    }

    /// Whether a command to all nodes has paused the tenant, or all tenants.
    pub fn is_paused_in_fleet(&self, scope: TenantScope) -> bool {
        let state = locked(&self.0);
        scope.map_or(state.fleet.all_paused, |tenant| state.fleet.pauses(tenant))
    }

    /// Whether a command to all nodes has disabled the tenant.
    pub fn is_disabled_in_fleet(&self, tenant: i64) -> bool {
        locked(&self.0).fleet.disabled.contains(&tenant)
    }

    /// Whether a tenant takes no new session.
    pub fn is_disabled(&self, tenant: i64) -> bool {
        let state = locked(&self.0);
        state.own.disabled.contains(&tenant) || state.fleet.disabled.contains(&tenant)
    }

    /// Ids of the tenants that are paused or disabled by name, or move.
    pub fn named(&self) -> HashSet<i64> {
        let State { own, fleet, moving } = &*locked(&self.0);
        let named = [&own.paused, &own.disabled, &fleet.paused, &fleet.disabled, moving];
        named.into_iter().flatten().copied().collect()
    }

    /// Takes no new session on this node, or takes them again.
    pub fn set_disabled(&self, tenant: i64, disabled: bool) {
        locked(&self.0).own.set_disabled(tenant, disabled);
    }

    /// Takes new sessions, until the central database is read again.
    pub fn enable_for_now(&self, tenant: i64) {
        let mut state = locked(&self.0);
        state.own.set_disabled(tenant, false);
        state.fleet.set_disabled(tenant, false);
    }
}

impl TenantPools {
    /// Lends no server any more, on this node: idle ones are closed now, lent ones when they come back. Sessions
    /// wait. Those that LISTEN are ended, because they would miss notifications.
    pub fn pause(&self, scope: TenantScope) {
        locked(&self.pauses.0).own.set_paused(scope, true);
        self.apply_pauses(scope);
    }

    /// Ends what [`Self::pause`] did.
    pub fn resume(&self, scope: TenantScope) {
        locked(&self.pauses.0).own.set_paused(scope, false);
        self.apply_pauses(scope);
    }

    /// Lends servers, until the central database is read again: for RESUME while it does not answer.
    pub fn resume_for_now(&self, scope: TenantScope) {
        {
            let mut state = locked(&self.pauses.0);
            state.own.set_paused(scope, false);
            state.fleet.set_paused(scope, false);
        }
        self.apply_pauses(scope);
    }

    /// Takes over what commands to all nodes have paused and disabled.
    pub fn set_fleet_pauses(&self, fleet: PauseSet) {
        locked(&self.pauses.0).fleet = fleet;
        self.apply_pauses(None);
    }

    /// The same as a PAUSE while a tenant moves: sessions that wait too long read why.
    pub fn pause_for_move(&self, tenant: i64) {
        locked(&self.pauses.0).moving.insert(tenant);
        self.apply_pauses(Some(tenant));
    }

    /// The move has ended.
    pub fn resume_after_move(&self, tenant: i64) {
        locked(&self.pauses.0).moving.remove(&tenant);
        self.apply_pauses(Some(tenant));
    }

    fn apply_pauses(&self, scope: TenantScope) {
        for pool in self.in_scope(scope) {
            let is_paused = self.pauses.is_paused(pool.tenant.id);
            if is_paused == pool.is_paused() {
                continue;
            }
            pool.queue.set_paused(is_paused);
            match is_paused {
                true => pool.listener.end(ClientError::ListenerPaused),
                false => pool.open_wanted_soon(),
            }
        }
    }

    /// Replaces pools: sessions get new servers from the next transaction on. Forgets failures of hosts.
    pub async fn reconnect(&self, scope: TenantScope) {
        for pool in self.in_scope(scope) {
            pool.connector.host.forget();
            self.replace(&pool, pool.tenant.clone()).await;
        }
    }

    /// Servers open or being opened, those of retired pools included.
    pub fn live(&self, scope: TenantScope) -> usize {
        self.in_scope(scope).iter().chain(&self.leaving(scope)).map(|pool| pool.live()).sum()
    }

    /// Retired pools that still have servers on loan.
    pub fn leaving(&self, scope: TenantScope) -> Vec<Arc<Pool>> {
        self.retired().into_iter().filter(|pool| is_in_scope(scope, pool)).collect()
    }

    fn in_scope(&self, scope: TenantScope) -> Vec<Arc<Pool>> {
        self.all().into_iter().filter(|pool| is_in_scope(scope, pool)).collect()
    }
}

fn is_in_scope(scope: TenantScope, pool: &Pool) -> bool {
    scope.is_none_or(|tenant| pool.tenant.id == tenant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_one_pause_does_not_end_another() {
        let pauses = Pauses::default();
        let edit = |change: &dyn Fn(&mut State)| change(&mut locked(&pauses.0));
        edit(&|state| state.own.set_paused(Some(1), true));
        edit(&|state| state.fleet.set_paused(Some(1), true));
        edit(&|state| state.moving.extend([1]));
        assert!(pauses.is_paused(1) && !pauses.is_paused(2) && !pauses.all_paused());
        edit(&|state| state.own.set_paused(None, false));
        assert!(pauses.is_paused(1) && pauses.is_paused_in_fleet(Some(1)));
        edit(&|state| state.fleet = PauseSet::default());
        assert!(pauses.is_paused(1) && pauses.is_moving(1));
        edit(&|state| state.moving.clear());
        assert!(!pauses.is_paused(1));
        edit(&|state| state.fleet.all_paused = true);
        assert!(pauses.is_paused(2) && pauses.all_paused() && pauses.is_paused_in_fleet(None));
    }

    #[test]
    fn enable_for_now_holds_against_every_source() {
        let pauses = Pauses::default();
        pauses.set_disabled(1, true);
        locked(&pauses.0).fleet.set_disabled(1, true);
        pauses.set_disabled(1, false);
        assert!(pauses.is_disabled(1) && pauses.is_disabled_in_fleet(1));
        assert_eq!(pauses.named(), HashSet::from([1]));
        pauses.enable_for_now(1);
        assert!(!pauses.is_disabled(1) && pauses.named().is_empty());
    }
}
