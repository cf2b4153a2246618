//! The console's PAUSE (a tenant's pools lend no server), DISABLE (no new sessions) and RECONNECT (new
//! servers for old ones). They hold on this node, until RESUME, ENABLE or the end of the process.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use super::{Pool, TenantPools};
use crate::{data_path::lock::locked, error::ClientError};

/// One tenant, by id; `None`: all tenants.
pub type TenantScope = Option<i64>;

/// The tenants that administrators have paused or disabled, one by one, so there are few.
#[derive(Debug, Default)]
pub struct Pauses(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    all_paused: bool,
    paused: HashSet<i64>,
    /// Of `paused`, those that move to another host.
    moving: HashSet<i64>,
    disabled: HashSet<i64>,
}

impl Pauses {
    /// Whether a tenant's pools lend no server.
    pub fn is_paused(&self, tenant: i64) -> bool {
        let state = locked(&self.0);
        state.all_paused || state.paused.contains(&tenant)
    }

    /// Whether a tenant's pools lend no server because it moves to another host.
    pub fn is_moving(&self, tenant: i64) -> bool {
        locked(&self.0).moving.contains(&tenant)
    }

    /// Whether no pool lends a server.
    pub fn all_paused(&self) -> bool {
        locked(&self.0).all_paused
    }

    /// Whether a tenant takes no new session.
    pub fn is_disabled(&self, tenant: i64) -> bool {
        locked(&self.0).disabled.contains(&tenant)
    }

    /// Ids of the tenants that were paused or disabled by name.
    pub fn named(&self) -> Vec<i64> {
        let state = locked(&self.0);
        state.paused.union(&state.disabled).copied().collect()
    }

    /// Takes no new session, or takes them again.
    pub fn set_disabled(&self, tenant: i64, disabled: bool) {
        let mut state = locked(&self.0);
        match disabled {
            true => state.disabled.insert(tenant),
            false => state.disabled.remove(&tenant),
        };
    }

    fn set_paused(&self, scope: TenantScope, paused: bool) {
        let mut state = locked(&self.0);
        match (scope, paused) {
            (None, true) => state.all_paused = true,
            (None, false) => {
                state.all_paused = false;
                state.paused.clear();
                state.moving.clear();
            }
            (Some(tenant), true) => drop(state.paused.insert(tenant)),
            (Some(tenant), false) => {
                state.paused.remove(&tenant);
                state.moving.remove(&tenant);
            }
        }
    }
}

impl TenantPools {
    /// Lends no server any more: idle ones are closed now, lent ones when they come back. Sessions wait.
    /// Those that LISTEN are ended, because they would miss notifications.
    pub fn pause(&self, scope: TenantScope) {
        self.pauses.set_paused(scope, true);
        for pool in self.in_scope(scope) {
            pool.queue.set_paused(true);
            pool.listener.end(ClientError::ListenerPaused);
        }
    }

    /// The same while a tenant moves: sessions that wait too long read why.
    pub fn pause_for_move(&self, tenant: i64) {
        locked(&self.pauses.0).moving.insert(tenant);
        self.pause(Some(tenant));
    }

    /// Lends servers again.
    pub fn resume(&self, scope: TenantScope) {
        self.pauses.set_paused(scope, false);
        for pool in self.in_scope(scope) {
            pool.queue.set_paused(self.pauses.is_paused(pool.tenant.id));
            pool.open_wanted_soon();
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
