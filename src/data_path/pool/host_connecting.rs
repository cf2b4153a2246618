//! The servers that are being opened on a host, by all of its pools: who may begin is decided by `connect_turns.rs`; here a turn is
//! handed over, and a failure of the host's is told to all who wait on that host.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tracing::info;

use super::{
    Pool,
    connect_backoff::TOLD_WITHIN,
    connect_turns::{ConnectTurns, Ended},
};
use crate::error::ClientError;

/// How often somebody who waits for a turn of its own looks whether a pause is over.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// One host's.
#[derive(Debug)]
pub struct HostConnects {
    name: String,
    state: Mutex<State>,
    pools: Mutex<Vec<Weak<Pool>>>,
}

#[derive(Debug)]
struct State {
    turns: ConnectTurns<Waiter>,
    /// Somebody hands out turns, and goes on with those that become free meanwhile.
    hands_out: bool,
}

/// Who waits for a turn.
#[derive(Debug)]
enum Waiter {
    /// A pool, for whichever session of its comes first.
    Pool(Weak<Pool>),
    /// A server for one purpose.
    One(oneshot::Sender<Result<Turn, ClientError>>),
}

impl Waiter {
    /// Whether it has a use for a turn; if not, it waits no more.
    fn wants(&self) -> bool {
        match self {
            Self::Pool(pool) => pool.upgrade().is_some_and(|pool| {
                let wants = pool.wants_more();
                pool.connector.set_awaits_turn(wants);
                wants
            }),
            Self::One(sender) => !sender.is_closed(),
        }
    }

    /// Its turn has come.
    fn waits_no_more(&self) {
        if let Self::Pool(pool) = self
            && let Some(pool) = pool.upgrade()
        {
            pool.connector.set_awaits_turn(false);
        }
    }
}

/// The right to open one server. Dropped without an outcome, nothing is learnt of the host.
#[derive(Debug)]
pub struct Turn {
    host: Arc<HostConnects>,
    number: u64,
}

impl HostConnects {
    /// Nothing is known of it yet.
    pub fn new(name: &str, most: usize, longest_pause: Duration) -> Self {
        let state = State { turns: ConnectTurns::new(most, longest_pause), hands_out: false };
        Self { name: name.to_owned(), state: Mutex::new(state), pools: Mutex::default() }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration may have changed.
    pub fn set_limits(&self, most: usize, longest_pause: Duration) {
        self.locked().turns.set_limits(most, longest_pause);
    }

    /// Forgets what has failed before.
    pub fn forget(&self) {
        self.locked().turns.forget();
    }

    /// A pool of this host, which is told what fails there.
    pub fn register(&self, pool: &Arc<Pool>) {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|known| known.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Whether its last attempt failed.
    pub fn is_failing(&self) -> bool {
        self.locked().turns.backoff().is_failing()
    }

    /// Why the host's last attempt since then failed, if none has succeeded after it.
    pub fn reason_since(&self, since: Instant) -> Option<ClientError> {
        self.locked().turns.backoff().reason_since(since)
    }

    /// What sessions are told at once, because the next attempt is too far away to wait for.
    pub fn told_at_once(&self, now: Instant) -> Option<ClientError> {
        self.locked().turns.backoff().told_at_once(now)
    }

    /// What sessions are told that have waited for [`TOLD_WITHIN`]: the host failed, and has been silent since for as long.
    pub fn silent(&self, now: Instant) -> Option<ClientError> {
        self.locked().turns.silent(now).cloned()
    }

    /// A turn for `pool`. `None`: the pool waits for it now, and [`Pool::open_by`] gets it.
    pub fn take(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Turn> {
        {
            let mut state = self.locked();
            if !pool.connector.set_awaits_turn(true) {
                state.turns.join(pool.tenant.id, Waiter::Pool(Arc::downgrade(pool)));
            }
        }
        self.hand_out(Some(pool))
    }

    /// A turn for one server of `tenant`'s, as soon as it comes.
    ///
    /// # Errors
    /// Why the host cannot be reached, if an attempt fails meanwhile or the next one is too far away.
    pub async fn wait(self: &Arc<Self>, tenant: i64) -> Result<Turn, ClientError> {
        let came = Instant::now();
        let (sender, mut turn) = oneshot::channel();
        self.locked().turns.join(tenant, Waiter::One(sender));
        loop {
            self.hand_out(None);
            if let Ok(got) = tokio::time::timeout(LOOK_EVERY, &mut turn).await {
                return got.unwrap_or(Err(ClientError::AdminShutdown));
            }
            let now = Instant::now();
            let silent = || self.silent(now).filter(|_| now.saturating_duration_since(came) >= TOLD_WITHIN);
            if let Some(reason) = self.told_at_once(now).or_else(silent) {
                return Err(reason);
            }
        }
    }

    /// Hands turns to those who may begin now; one for `here` is returned.
    fn hand_out(self: &Arc<Self>, here: Option<&Arc<Pool>>) -> Option<Turn> {
        let mut own = None;
        if std::mem::replace(&mut self.locked().hands_out, true) {
            return None;
        }
        while let Some((turn, waiter)) = self.next() {
            match waiter {
                Waiter::One(sender) => drop(sender.send(Ok(turn))),
                Waiter::Pool(pool) => {
                    let Some(pool) = pool.upgrade() else { continue };
                    match here {
                        Some(here) if own.is_none() && Arc::ptr_eq(here, &pool) => own = Some(turn),
                        _ => {
                            let worker = pool.worker.clone();
                            worker.spawn(async move { pool.open_by(turn) });
                        }
                    }
                }
            }
        }
        own
    }

    /// The next who may begin; `None`: nobody, and nobody hands out turns any more.
    fn next(self: &Arc<Self>) -> Option<(Turn, Waiter)> {
        let mut state = self.locked();
        let next = state.turns.next(Instant::now(), Waiter::wants);
        state.hands_out = next.is_some();
        let (number, waiter) = next?;
        waiter.waits_no_more();
        Some((Turn { host: self.clone(), number }, waiter))
    }

    /// Tells all who wait on this host, in whichever pool.
    fn tell(&self, reason: &ClientError) {
        let ones = self.locked().turns.take_out(|waiter| matches!(waiter, Waiter::One(_)));
        for one in ones {
            if let Waiter::One(sender) = one {
                let _ = sender.send(Err(reason.clone()));
            }
        }
        let pools: Vec<_> = {
            let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
            pools.iter().filter_map(Weak::upgrade).collect()
        };
        for pool in pools.iter().filter(|pool| pool.waiting() > 0) {
            pool.refuse_waiting(reason);
        }
    }
}

impl Turn {
    /// The host has asked for a proof of identity.
    pub fn answered(&self) {
        let was_failing = self.host.locked().turns.answered(self.number);
        if was_failing {
            info!(host = self.host.name, "the host answers again");
        }
        self.host.hand_out(None);
    }

    /// Whether it has.
    pub fn is_answered(&self) -> bool {
        self.host.locked().turns.is_answered(self.number)
    }

    /// A server was opened, or refused for the tenant's own sake.
    pub fn succeeded(self) {
        self.answered();
        self.ended(Ended::Answered);
    }

    /// The host failed: all who wait there are told. Returns whether it is worth a line in the log.
    pub fn failed(self, reason: &ClientError) -> bool {
        let is_news = self.ended(Ended::Failed(reason));
        self.host.tell(reason);
        is_news
    }

    fn ended(&self, how: Ended<'_>) -> bool {
        self.host.locked().turns.ended(self.number, how, Instant::now(), rand::random())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.ended(Ended::Unknown);
        self.host.hand_out(None);
    }
}
