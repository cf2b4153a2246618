//! A tenant's role or database that is not as it was made, because a host refuses it or because new sessions begin with settings
//! that pglobby did not give the role, is put right by this node, by itself: new passwords, and everything as it was made. What a
//! tenant's function may have done to the roles that its logins share keeps nobody out for longer than that takes.
//!
//! One attempt at a time for a tenant; a few that succeed at once, and each later one after a longer pause: a tenant that does it
//! again and again rotates nothing but its own passwords, and seldom.

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
        pool::Mending,
        server::{IdentityTrouble, TroubleKind},
        tenant::Tenant,
    },
    metrics::Metrics,
};

/// So many that have put something right are followed by no pause: one is short, and whoever finds a fault in a function changes
/// it and tries again.
const AT_ONCE: u32 = 5;
/// Between two attempts for one tenant: at first, at most, and after how long without trouble it begins anew.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
const PAUSE_LAST: Duration = Duration::from_secs(600);
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// When a tenant's next attempt may be.
#[derive(Debug)]
struct Turn {
    /// Of an attempt that is under way: closed when it is over.
    under_way: Option<watch::Receiver<()>>,
    next: Instant,
    pause: Duration,
    /// How many have put something right.
    mended: u32,
}

/// Attempts by tenant.
#[derive(Debug, Default)]
struct Turns(HashMap<i64, Turn>);

/// What a pool that asks for an attempt gets.
#[derive(Debug)]
enum Chance {
    /// It is to make one; dropping this ends it for those who wait.
    Begins(watch::Sender<()>),
    /// One is under way.
    UnderWay(watch::Receiver<()>),
    /// It is not the tenant's turn.
    None,
}

impl Turns {
    /// Whether an attempt may begin now; it is then under way until [`Self::end`].
    fn begin(&mut self, tenant: i64, now: Instant) -> Chance {
        self.0.retain(|_, turn| {
            turn.under_way.is_some() || now.saturating_duration_since(turn.next) < FORGOTTEN_AFTER
        });
        let first = Turn { under_way: None, next: now, pause: Duration::ZERO, mended: 0 };
        let turn = self.0.entry(tenant).or_insert(first);
        if let Some(under_way) = &turn.under_way {
            return Chance::UnderWay(under_way.clone());
        }
        if now < turn.next {
            return Chance::None;
        }
        let (over, under_way) = watch::channel(());
        turn.under_way = Some(under_way);
        turn.pause = (turn.pause * 2).clamp(PAUSE_FIRST, PAUSE_LAST);
        Chance::Begins(over)
    }

    fn end(&mut self, tenant: i64, mended: bool, now: Instant) {
        if let Some(turn) = self.0.get_mut(&tenant) {
            turn.mended += u32::from(mended);
            if mended && turn.mended < AT_ONCE {
                turn.pause = Duration::ZERO;
            }
            (turn.under_way, turn.next) = (None, now + turn.pause);
        }
    }
}

/// What pools call where a host refuses them. The work goes on in a task of this node's own, whoever waits for it.
pub fn mending(context: AdminContext, metrics: Arc<Metrics>) -> Mending {
    let turns: Arc<Mutex<Turns>> = Arc::default();
    let runtime = tokio::runtime::Handle::current();
    Arc::new(move |tenant, trouble| {
        let chance = locked(&turns).begin(tenant.id, Instant::now());
        let wait = |mut over: watch::Receiver<()>| async move {
            drop(over.changed().await);
            true
        };
        let over = match chance {
            Chance::None => return Box::pin(std::future::ready(false)),
            Chance::UnderWay(over) => return Box::pin(wait(over)),
            Chance::Begins(over) => over,
        };
        let (actor, metrics, turns) = (context.actor("pglobby"), metrics.clone(), turns.clone());
        let under_way = over.subscribe();
        runtime.spawn(async move {
            let mended = mend(&actor, &tenant, &trouble).await;
            let is_mended = matches!(mended, Ok(true));
            tell(&tenant, &trouble, &metrics, mended);
            locked(&turns).end(tenant.id, is_mended, Instant::now());
            drop(over);
        });
        Box::pin(wait(under_way))
    })
}

fn locked(turns: &Mutex<Turns>) -> MutexGuard<'_, Turns> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tell(tenant: &Tenant, trouble: &IdentityTrouble, metrics: &Metrics, mended: Result<bool, AdminError>) {
    let name = &tenant.name;
    match mended {
        Ok(true) => {
            metrics.roles_mended(true);
            let event = match trouble.is_silent() {
                true => "roles were put right: their settings were not those that pglobby gives them",
                false => "roles were put right after their host had refused them",
            };
            info!(tenant = name, reason = %trouble.said, "{event}");
        }
        Ok(false) => {}
        // It need not be the roles at all.
        Err(error) if trouble.kind == TroubleKind::Suspected => {
            debug!(tenant = name, side = "server", error = %causes(&error), "cannot look at a tenant's roles");
        }
        Err(error) => {
            metrics.roles_mended(false);
            warn!(tenant = name, side = "server", error = %causes(&error), "roles that are not as they were made could not be put right");
        }
    }
}

/// `false`: there was nothing to do, or somebody else has done it.
async fn mend(actor: &Actor, tenant: &Tenant, trouble: &IdentityTrouble) -> Result<bool, AdminError> {
    match rotate_in_trouble(actor, &tenant.name, tenant.generation, trouble).await {
        Ok(true) => {}
        // Who works on the tenant leaves its roles as they must be.
        Ok(false) | Err(AdminError::Busy { .. }) => return Ok(false),
        Err(error) => return Err(error),
    }
    // It may have been suspended meanwhile, by somebody who did not wait for this.
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
        let (mut turns, mut now) = (Turns::default(), Instant::now());
        let begins = |turns: &mut Turns, tenant, now| match turns.begin(tenant, now) {
            Chance::Begins(over) => Some(over),
            _ => None,
        };
        let mut pause = PAUSE_FIRST;
        for _ in 0..12 {
            let over = begins(&mut turns, 1, now).expect("its turn");
            let Chance::UnderWay(waits) = turns.begin(1, now + FORGOTTEN_AFTER * 2) else {
                panic!("a second")
            };
            assert!(begins(&mut turns, 2, now).is_some(), "others have their own turn");
            turns.0.remove(&2);
            turns.end(1, false, now);
            drop(over);
            assert!(waits.has_changed().is_err(), "who waits is told");
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
        let (mut turns, mut now) = (Turns::default(), Instant::now());
        let begins = |turns: &mut Turns, now| matches!(turns.begin(1, now), Chance::Begins(_));
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
