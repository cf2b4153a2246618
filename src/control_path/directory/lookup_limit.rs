//! Who may ask the central database now: a bounded number of look-ups at a time, and while it is down a few tries a
//! second, whose failure answers everybody else at once.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rand::Rng as _;
use tokio::sync::{Semaphore, SemaphorePermit};

/// After a failure nobody asks for as long as this, less up to half of it: five tries a second at most, which leaves
/// room for those of `change_feed.rs` below ten.
const PAUSE: Duration = Duration::from_millis(400);
/// A try that has not ended after this (its client may have left) no longer keeps others from trying.
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

/// Shared by all look-ups.
#[derive(Debug)]
pub struct LookupLimit {
    state: Mutex<State>,
    look_ups: Semaphore,
}

impl LookupLimit {
    /// Lets `look_ups_max` ask at a time.
    pub fn new(look_ups_max: usize) -> Self {
        Self { state: Mutex::new(State::Open), look_ups: Semaphore::new(look_ups_max) }
    }

    /// Waits for a turn; the permit is to be held until the answer is there.
    ///
    /// # Errors
    /// The cause of the last failure, at once, while nobody may try.
    pub async fn pass(&self) -> Result<SemaphorePermit<'_>, Arc<str>> {
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

    /// Whether the last one who asked was answered.
    pub fn is_open(&self) -> bool {
        matches!(*self.state(), State::Open)
    }

    /// The central database answered.
    pub fn succeeded(&self) {
        if !matches!(std::mem::replace(&mut *self.state(), State::Open), State::Open) {
            tracing::info!("the central database answers again");
        }
    }

    /// It did not.
    pub fn failed(&self, cause: Arc<str>) {
        let pause = rand::rng().random_range(PAUSE / 2..PAUSE);
        let closed = State::Closed { until: Instant::now() + pause, cause: cause.clone() };
        // Once for each outage; the tries that follow are not news.
        if matches!(std::mem::replace(&mut *self.state(), closed), State::Open) {
            tracing::error!(%cause, "cannot look up logins and tenants; what is remembered is used meanwhile");
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
        assert!(lookups.pass().await.is_ok());
        lookups.failed("down".into());
        assert_eq!(&*lookups.pass().await.unwrap_err(), "down");

        *lookups.state() = State::Closed { until: Instant::now(), cause: "down".into() };
        assert!(lookups.pass().await.is_ok(), "the one that tries");
        assert_eq!(&*lookups.pass().await.unwrap_err(), "down");

        lookups.succeeded();
        assert!(lookups.pass().await.is_ok());
    }

    #[tokio::test]
    async fn a_try_that_was_given_up_does_not_block_the_next() {
        let lookups = LookupLimit::new(4);
        *lookups.state() = State::Trying { until: Instant::now(), cause: "down".into() };
        assert!(lookups.pass().await.is_ok());
    }
}
