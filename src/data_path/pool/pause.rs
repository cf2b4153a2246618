//! What an administrator stops for a while: a tenant's pools lend no server (PAUSE), take in no new session (DISABLE),
//! or open new servers instead of the old ones (RECONNECT). It holds on this node, until it ends or is told otherwise.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{Pool, TenantPools};
use crate::error::ClientError;

/// Whom an administrator means: one tenant, by id, or all of them.
pub type Whom = Option<i64>;

/// Who is stopped. Tenants are named by administrators one by one, so there are few.
#[derive(Debug, Default)]
pub struct Halts(Mutex<Halted>);

#[derive(Debug, Default)]
struct Halted {
    all_paused: bool,
    paused: HashSet<i64>,
    disabled: HashSet<i64>,
}

impl Halts {
    fn locked(&self) -> MutexGuard<'_, Halted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a tenant's pools lend nothing now.
    pub fn is_paused(&self, tenant: i64) -> bool {
        let halted = self.locked();
        halted.all_paused || halted.paused.contains(&tenant)
    }

    /// Whether everybody's pools lend nothing now.
    pub fn all_paused(&self) -> bool {
        self.locked().all_paused
    }

    /// Whether a tenant takes in no new session.
    pub fn is_disabled(&self, tenant: i64) -> bool {
        self.locked().disabled.contains(&tenant)
    }

    /// Tenants, by id, that were stopped by name.
    pub fn named(&self) -> Vec<i64> {
        let halted = self.locked();
        halted.paused.union(&halted.disabled).copied().collect()
    }

    /// Lets no new session in, or again.
    pub fn set_disabled(&self, tenant: i64, disabled: bool) {
        let mut halted = self.locked();
        match disabled {
            true => halted.disabled.insert(tenant),
            false => halted.disabled.remove(&tenant),
        };
    }

    fn set_paused(&self, whom: Whom, paused: bool) {
        let mut halted = self.locked();
        match (whom, paused) {
            (None, true) => halted.all_paused = true,
            (None, false) => {
                halted.all_paused = false;
                halted.paused.clear();
            }
            (Some(tenant), true) => drop(halted.paused.insert(tenant)),
            (Some(tenant), false) => drop(halted.paused.remove(&tenant)),
        }
    }
}

impl TenantPools {
    /// Lends no server any more: idle ones are closed now, lent ones when they come back. Sessions wait;
    /// those that listen are ended, because nobody listens for them meanwhile.
    pub fn pause(&self, whom: Whom) {
        self.halts.set_paused(whom, true);
        for pool in self.of_whom(whom) {
            pool.queue.set_paused(true);
            pool.listener.end(ClientError::ListenerPaused);
        }
    }

    /// Lends servers again.
    pub fn resume(&self, whom: Whom) {
        self.halts.set_paused(whom, false);
        for pool in self.of_whom(whom) {
            pool.queue.set_paused(self.halts.is_paused(pool.tenant.id));
            pool.open_wanted_soon();
        }
    }

    /// Replaces pools by new ones: sessions get new servers from their next transaction on. What has failed before is forgotten.
    pub async fn reconnect(&self, whom: Whom) {
        for pool in self.of_whom(whom) {
            pool.connector.forget_failures();
            self.replace(&pool, pool.tenant.clone()).await;
        }
    }

    /// Servers open or being opened, those of retired pools included.
    pub fn live(&self, whom: Whom) -> usize {
        self.of_whom(whom).iter().chain(&self.leaving(whom)).map(|pool| pool.live()).sum()
    }

    /// Retired pools that still have servers on loan.
    pub fn leaving(&self, whom: Whom) -> Vec<Arc<Pool>> {
        self.retired().into_iter().filter(|pool| is_meant(whom, pool)).collect()
    }

    fn of_whom(&self, whom: Whom) -> Vec<Arc<Pool>> {
        self.all().into_iter().filter(|pool| is_meant(whom, pool)).collect()
    }
}

fn is_meant(whom: Whom, pool: &Pool) -> bool {
    whom.is_none_or(|tenant| pool.tenant.id == tenant)
}
