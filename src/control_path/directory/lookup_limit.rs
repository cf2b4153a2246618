//! Limits queries to the central database: a bounded number of look-ups at a time. While the database is
//! down, a few attempts a second; all other look-ups fail at once with the same error.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rand::Rng as _;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Pause after a failure, less up to half of it: at most five attempts a second, which together with
/// `change_feed.rs` stays below ten.
const PAUSE: Duration = Duration::from_millis(400);
/// After this time an attempt no longer blocks the next one; its client may have left.
const TRY: Duration = Duration::from_millis(500);

/// ```text
/// Open ──failure──▶ Closed ──pause over, one may try──▶ Trying ──success──▶ Open
///                      ▲                                   │
///                      └──────────────failure──────────────┘
/// ```
#[derive(Debug)]
enum State {
    Open,
    Closed { until: Instant, cause: Arc<str> },
    Trying { until: Instant, cause: Arc<str> },
}

/// The limit, shared by all look-ups.
#[derive(Debug)]
pub struct LookupLimit {
    state: Mutex<State>,
    look_ups: Semaphore,
}

impl LookupLimit {
    /// Allows `look_ups_max` look-ups at a time.
    pub fn new(look_ups_max: usize) -> Self {
        Self { state: Mutex::new(State::Open), look_ups: Semaphore::new(look_ups_max) }
    }

    /// Waits for a permit, which is held until the look-up ends.
    ///
    /// # Errors
    /// The cause of the last failure, at once, during a pause.
    pub async fn acquire(&self) -> Result<SemaphorePermit<'_>, Arc<str>> {
        let permit = self.look_ups.acquire().await.map_err(|closed| closed.to_string())?;
        let now = Instant::now();
        let mut state = self.state();
        match &*state {
            State::Open => {}
            State::Closed { until, cause } | State::Trying { until, cause } => {
                if now < *until {
                    return Err(cause.clone());
                }
                *state = State::Trying { until: now + TRY, cause: cause.clone() };
            }
        }
        Ok(permit)
    }

    /// Whether the last look-up was answered.
    pub fn is_open(&self) -> bool {
        matches!(*self.state(), State::Open)
    }

    /// Records a successful look-up, or that the central database was reached in another way.
    pub fn succeeded(&self) {
        if !matches!(std::mem::replace(&mut *self.state(), State::Open), State::Open) {
            tracing::info!(side = "central", "look-ups of logins and tenants work again");
        }
    }

    /// Records a failed look-up.
    pub fn failed(&self, cause: Arc<str>) {
        let pause = rand::rng().random_range(PAUSE / 2..PAUSE);
        let closed = State::Closed { until: Instant::now() + pause, cause: cause.clone() };
        // Once for each outage, not for each attempt.
        if matches!(std::mem::replace(&mut *self.state(), closed), State::Open) {
            tracing::error!(side = "central", %cause, "cannot look up logins and tenants; cached ones are used");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn after_a_failure_one_tries_while_the_others_hear_its_cause() {
        let lookups = LookupLimit::new(4);
        assert!(lookups.acquire().await.is_ok());
        lookups.failed("down".into());
        assert_eq!(&*lookups.acquire().await.unwrap_err(), "down");

        *lookups.state() = State::Closed { until: Instant::now(), cause: "down".into() };
        assert!(lookups.acquire().await.is_ok(), "the one that tries");
        assert_eq!(&*lookups.acquire().await.unwrap_err(), "down");

        lookups.succeeded();
        assert!(lookups.acquire().await.is_ok());
    }

    #[tokio::test]
    async fn a_try_that_was_given_up_does_not_block_the_next() {
        let lookups = LookupLimit::new(4);
        *lookups.state() = State::Trying { until: Instant::now(), cause: "down".into() };
        assert!(lookups.acquire().await.is_ok());
    }
}
