//! Attempts to open servers on a host, by all of its pools. `connect_turns.rs` decides which pool may begin;
//! here it gets its turn, and a failure of the host ends the waits of all sessions on that host, unless they are
//! held until it is back.

use std::{
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::info;

use super::{
    Pool,
    connect_backoff::{ConnectBackoff, ERROR_WITHIN, FailedAttempt},
    connect_turns::{ConnectTurns, Outcome},
};
use crate::{
    data_path::{lock::locked, server::AddressRoles, tenant::Host},
    error::ClientError,
};

/// How often [`HostConnecting::wait`] looks whether a pause is over.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// One host's attempts.
#[derive(Debug)]
pub struct HostConnecting {
    name: String,
    /// Which of its addresses is the primary. Shared by its pools.
    pub roles: AddressRoles,
    state: Mutex<State>,
    pools: Mutex<Vec<Weak<Pool>>>,
}

#[derive(Debug)]
struct State {
    turns: ConnectTurns<Waiter>,
    /// A thread is handing out turns, and goes on with those that become free meanwhile.
    hands_out: bool,
}

/// What waits for a turn.
#[derive(Debug)]
enum Waiter {
    Pool(Weak<Pool>),
    /// The caller of [`HostConnecting::wait`].
    Caller(oneshot::Sender<Result<Turn, ClientError>>),
}

impl Waiter {
    /// Whether it still needs a turn; if not, it is removed.
    fn wants(&self) -> bool {
        match self {
            Self::Pool(pool) => pool.upgrade().is_some_and(|pool| {
                let wants = pool.wants_more();
                pool.connector.set_awaits_turn(wants);
                wants
            }),
            Self::Caller(sender) => !sender.is_closed(),
        }
    }

    /// It is getting a turn.
    fn gets_turn(&self) {
        if let Self::Pool(pool) = self
            && let Some(pool) = pool.upgrade()
        {
            pool.connector.set_awaits_turn(false);
        }
    }
}

/// The right to open one server. Dropped without an outcome, it says nothing about the host.
#[derive(Debug)]
pub struct Turn {
    host: Arc<HostConnecting>,
    number: u64,
}

impl HostConnecting {
    /// A host without known failures.
    pub fn new(host: &Host, attempts_max: usize, pause_max: Duration) -> Self {
        let state = State { turns: ConnectTurns::new(attempts_max, pause_max), hands_out: false };
        Self {
            name: host.name.clone(),
            roles: AddressRoles::new(&host.name, &host.addresses),
            state: Mutex::new(state),
            pools: Mutex::default(),
        }
    }

    /// Applies the configuration.
    pub fn set_limits(&self, attempts_max: usize, pause_max: Duration) {
        locked(&self.state).turns.set_limits(attempts_max, pause_max);
    }

    pub fn forget(&self) {
        locked(&self.state).turns.forget();
    }

    /// Adds a pool of this host: when the host fails, its waits end.
    pub fn register(&self, pool: &Arc<Pool>) {
        let mut pools = locked(&self.pools);
        pools.retain(|known| known.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Reads the host's failures.
    pub fn backoff<T>(&self, read: impl FnOnce(&ConnectBackoff) -> T) -> T {
        read(locked(&self.state).turns.backoff())
    }

    /// Whether sessions wait for the host to be back.
    pub fn is_holding(&self) -> bool {
        self.backoff(ConnectBackoff::holds)
    }

    /// The error for sessions that have waited for [`ERROR_WITHIN`]: the host has failed, and the attempt
    /// under way has had no answer for as long.
    pub fn silent(&self, now: Instant) -> Option<ClientError> {
        locked(&self.state).turns.silent(now).cloned()
    }

    /// A turn for `pool`. `None`: the pool waits for it, and [`Pool::open_by`] gets it.
    pub fn take(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Turn> {
        {
            let mut state = locked(&self.state);
            if !pool.connector.set_awaits_turn(true) {
                state.turns.join(pool.tenant.id, Waiter::Pool(Arc::downgrade(pool)));
            }
        }
        self.hand_out(Some(pool))
    }

    /// Waits for a turn for one server of `tenant`. The error says why the host cannot be reached: an
    /// attempt has failed meanwhile, or the next one is too far away.
    pub async fn wait(self: &Arc<Self>, tenant: i64) -> Result<Turn, ClientError> {
        let asked_at = Instant::now();
        let (sender, mut turn) = oneshot::channel();
        locked(&self.state).turns.join(tenant, Waiter::Caller(sender));
        loop {
            self.hand_out(None);
            if let Ok(got) = tokio::time::timeout(LOOK_EVERY, &mut turn).await {
                return got.unwrap_or(Err(ClientError::AdminShutdown));
            }
            let now = Instant::now();
            let silent =
                || self.silent(now).filter(|_| now.saturating_duration_since(asked_at) >= ERROR_WITHIN);
            if let Some(reason) = self.backoff(|host| host.error_at_once(now)).or_else(silent) {
                return Err(reason);
            }
        }
    }

    /// Hands turns to all that may begin now; one for `here` is returned.
    fn hand_out(self: &Arc<Self>, here: Option<&Arc<Pool>>) -> Option<Turn> {
        let mut own = None;
        if std::mem::replace(&mut locked(&self.state).hands_out, true) {
            return None;
        }
        while let Some((turn, waiter)) = self.next() {
            match waiter {
                Waiter::Caller(sender) => drop(sender.send(Ok(turn))),
                Waiter::Pool(pool) => {
                    let Some(pool) = pool.upgrade() else { continue };
                    match here {
                        Some(here) if own.is_none() && Arc::ptr_eq(here, &pool) => own = Some(turn),
                        _ => {
                            let home = pool.placement.home();
                            home.spawn(async move { pool.open_by(turn) });
                        }
                    }
                }
            }
        }
        own
    }

    /// The next that may begin; `None`: none, and this thread stops handing out turns.
    fn next(self: &Arc<Self>) -> Option<(Turn, Waiter)> {
        let mut state = locked(&self.state);
        let next = state.turns.next(Instant::now(), Waiter::wants);
        state.hands_out = next.is_some();
        let (number, waiter) = next?;
        waiter.gets_turn();
        Some((Turn { host: self.clone(), number }, waiter))
    }

    /// Ends all waits on this host, in all pools; sessions that are held go on waiting.
    fn end_waits(&self, FailedAttempt { reason, holds }: &FailedAttempt) {
        let callers = locked(&self.state).turns.take_out(|waiter| matches!(waiter, Waiter::Caller(_)));
        for caller in callers {
            if let Waiter::Caller(sender) = caller {
                let _ = sender.send(Err(reason.clone()));
            }
        }
        if *holds {
            return;
        }
        let pools: Vec<_> = {
            let pools = locked(&self.pools);
            pools.iter().filter_map(Weak::upgrade).collect()
        };
        for pool in pools.iter().filter(|pool| pool.waiting() > 0) {
            pool.refuse_waiting(reason);
        }
    }
}

impl Turn {
    /// The server has asked for authentication: the host is up.
    pub fn answered(&self) {
        let was_failing = locked(&self.host.state).turns.answered(self.number);
        if was_failing {
            info!(host = self.host.name, "host answers again");
        }
        self.host.hand_out(None);
    }

    /// Whether the server has asked for authentication.
    pub fn is_answered(&self) -> bool {
        locked(&self.host.state).turns.is_answered(self.number)
    }

    /// A server was opened, or the attempt failed for a reason of the tenant's own.
    pub fn succeeded(self) {
        self.answered();
        self.ended(Outcome::Answered);
    }

    /// The host failed: ends all waits there. Returns whether it is to be logged as a warning.
    pub fn failed(self, failed: &FailedAttempt) -> bool {
        let is_news = self.ended(Outcome::Failed(failed));
        self.host.end_waits(failed);
        is_news
    }

    fn ended(&self, how: Outcome<'_>) -> bool {
        locked(&self.host.state).turns.ended(self.number, how, Instant::now(), rand::random())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.ended(Outcome::Unknown);
        self.host.hand_out(None);
    }
}
