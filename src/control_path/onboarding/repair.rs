//! Repairs a tenant's roles and database when a host refuses them, or when new sessions start with settings
//! that pglobby did not give the role: new passwords, and all attributes as pglobby made them. So a
//! tenant's function that changed the roles keeps clients out only for as long as a repair takes.
//!
//! There is one attempt at a time for each tenant. A few may succeed without a pause; later ones follow
//! after growing pauses. A tenant that changes its roles again and again causes few repairs, and only its
//! own passwords change.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{role_attributes, rotate::rotate_in_trouble};
use crate::{
    control_path::{
        admin::actor::{Actor, AdminContext, AdminError},
        central::causes,
    },
    data_path::{
        pool::RoleRepair,
        server::{IdentityTrouble, TroubleKind},
        tenant::Tenant,
    },
    metrics::Metrics,
};

/// Number of successful repairs before pauses begin. A repair is short, and a developer who fixes a
/// function tries again soon.
const AT_ONCE: u32 = 5;
/// Pause between two attempts for one tenant after the first failure.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
/// Longest pause.
const PAUSE_LAST: Duration = Duration::from_secs(600);
/// After this time without trouble, pauses start again at [`PAUSE_FIRST`].
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

#[derive(Debug)]
struct TenantRepairs {
    /// A running attempt; the channel closes at its end.
    running: Option<watch::Receiver<()>>,
    next: Instant,
    pause: Duration,
    /// Number of successful repairs.
    repaired: u32,
}

#[derive(Debug, Default)]
struct RepairLimits(HashMap<i64, TenantRepairs>);

/// The answer to a pool that asks for a repair.
#[derive(Debug)]
enum Decision {
    /// It makes the attempt. Dropping the sender ends the attempt for others that wait.
    Begins(watch::Sender<()>),
    /// One is under way.
    UnderWay(watch::Receiver<()>),
    /// No attempt now.
    None,
}

impl RepairLimits {
    /// Starts an attempt if one may start now. It runs until [`Self::end`].
    fn begin(&mut self, tenant: i64, now: Instant) -> Decision {
        self.0.retain(|_, turn| {
            turn.running.is_some() || now.saturating_duration_since(turn.next) < FORGOTTEN_AFTER
        });
        let first = TenantRepairs { running: None, next: now, pause: Duration::ZERO, repaired: 0 };
        let turn = self.0.entry(tenant).or_insert(first);
        if let Some(running) = &turn.running {
            return Decision::UnderWay(running.clone());
        }
        if now < turn.next {
            return Decision::None;
        }
        let (over, running) = watch::channel(());
        turn.running = Some(running);
        turn.pause = (turn.pause * 2).clamp(PAUSE_FIRST, PAUSE_LAST);
        Decision::Begins(over)
    }

    fn end(&mut self, tenant: i64, repaired: bool, now: Instant) {
        if let Some(turn) = self.0.get_mut(&tenant) {
            turn.repaired += u32::from(repaired);
            if repaired && turn.repaired < AT_ONCE {
                turn.pause = Duration::ZERO;
            }
            (turn.running, turn.next) = (None, now + turn.pause);
        }
    }
}

/// The function that pools call when a host refuses them. The repair runs in a task of its own.
pub fn mending(context: AdminContext, metrics: Arc<Metrics>) -> RoleRepair {
    let turns: Arc<Mutex<RepairLimits>> = Arc::default();
    let runtime = tokio::runtime::Handle::current();
    Arc::new(move |tenant, trouble| {
        let chance = locked(&turns).begin(tenant.id, Instant::now());
        let wait = |mut over: watch::Receiver<()>| async move {
            drop(over.changed().await);
            true
        };
        let over = match chance {
            Decision::None => return Box::pin(std::future::ready(false)),
            Decision::UnderWay(over) => return Box::pin(wait(over)),
            Decision::Begins(over) => over,
        };
        let (actor, metrics, turns) = (context.actor("pglobby"), metrics.clone(), turns.clone());
        let running = over.subscribe();
        runtime.spawn(async move {
            let repaired = repair(&actor, &tenant, &trouble).await;
            let is_mended = matches!(repaired, Ok(true));
            log_repair(&tenant, &trouble, &metrics, repaired);
            locked(&turns).end(tenant.id, is_mended, Instant::now());
            drop(over);
        });
        Box::pin(wait(running))
    })
}

fn locked(turns: &Mutex<RepairLimits>) -> MutexGuard<'_, RepairLimits> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

fn log_repair(
    tenant: &Tenant,
    trouble: &IdentityTrouble,
    metrics: &Metrics,
    repaired: Result<bool, AdminError>,
) {
    let name = &tenant.name;
    match repaired {
        Ok(true) => {
            metrics.roles_repaired(true);
            let event = match trouble.is_silent() {
                true => "tenant roles repaired: their settings differed",
                false => "tenant roles repaired: the host refused them",
            };
            info!(tenant = name, reason = %trouble.said, "{event}");
        }
        Ok(false) => {}
        // The cause may be something else than the roles.
        Err(error) if trouble.kind == TroubleKind::Suspected => {
            debug!(tenant = name, side = "server", error = %causes(&error), "cannot check a tenant's roles");
        }
        Err(error) => {
            metrics.roles_repaired(false);
            warn!(tenant = name, side = "server", error = %causes(&error), "cannot repair a tenant's roles");
        }
    }
}

/// `false`: nothing to repair, or another run has repaired it.
async fn repair(actor: &Actor, tenant: &Tenant, trouble: &IdentityTrouble) -> Result<bool, AdminError> {
    match rotate_in_trouble(actor, &tenant.name, tenant.generation, trouble).await {
        Ok(true) => {}
        // Another command on the tenant leaves its roles as they must be.
        Ok(false) | Err(AdminError::Busy { .. }) => return Ok(false),
        Err(error) => return Err(error),
    }
    // It may have been suspended meanwhile by a command that did not wait for the lock.
    role_attributes::follow_status(actor, &tenant.name).await;
    let client = actor.central.client().await?;
    let detail = json!({ "because": trouble.said });
    actor.audit(&**client, "tenant.roles_mended", Some(&tenant.name), &detail).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_for_a_tenant_come_one_at_a_time_and_ever_more_seldom() {
        let (mut turns, mut now) = (RepairLimits::default(), Instant::now());
        let begins = |turns: &mut RepairLimits, tenant, now| match turns.begin(tenant, now) {
            Decision::Begins(over) => Some(over),
            _ => None,
        };
        let mut pause = PAUSE_FIRST;
        for _ in 0..12 {
            let over = begins(&mut turns, 1, now).expect("its turn");
            let Decision::UnderWay(waits) = turns.begin(1, now + FORGOTTEN_AFTER * 2) else {
                panic!("a second")
            };
            assert!(begins(&mut turns, 2, now).is_some(), "others have their own turn");
            turns.0.remove(&2);
            turns.end(1, false, now);
            drop(over);
            assert!(waits.has_changed().is_err(), "waiters are notified");
            assert!(begins(&mut turns, 1, now + pause - Duration::from_millis(1)).is_none());
            now += pause;
            pause = (pause * 2).min(PAUSE_LAST);
        }
        assert!(begins(&mut turns, 1, now).is_some() && pause == PAUSE_LAST);
        turns.end(1, false, now);
        assert!(begins(&mut turns, 1, now + PAUSE_LAST + FORGOTTEN_AFTER).is_some());
        assert_eq!(turns.0[&1].pause, PAUSE_FIRST, "long ago is forgotten");
    }

    #[test]
    fn a_few_that_put_something_right_are_followed_by_no_pause() {
        let (mut turns, mut now) = (RepairLimits::default(), Instant::now());
        let begins = |turns: &mut RepairLimits, now| matches!(turns.begin(1, now), Decision::Begins(_));
        for _ in 0..AT_ONCE {
            assert!(begins(&mut turns, now));
            turns.end(1, true, now);
        }
        for pause in [PAUSE_FIRST, PAUSE_FIRST * 2] {
            assert!(!begins(&mut turns, now + pause - Duration::from_millis(1)));
            now += pause;
            assert!(begins(&mut turns, now));
            turns.end(1, true, now);
        }
        now += PAUSE_LAST + FORGOTTEN_AFTER;
        assert!(begins(&mut turns, now));
        turns.end(1, true, now);
        assert!(begins(&mut turns, now), "long ago is forgotten");
    }
}
