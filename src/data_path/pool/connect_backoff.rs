//! How many servers may be opened at a time, and when. After a failure one server is opened at a time, after
//! a pause that doubles up to `server_login_retry`. Each success doubles how many may be opened at a time.
//!
//! A pool has one for failures of the tenant's own (database dropped, role locked out, CONNECTION LIMIT). A
//! host has one for failures that all of its pools share (`connect_turns.rs`).
//!
//! While the host is only away for a while ([`FailedAttempt::holds`]), sessions go on waiting.
//!
//! Pure: the time and the jitter are arguments.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::ClientError;

/// The pause after the first failure; each further failure doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
/// If the next attempt is later than this, a waiting session gets the last error at once.
pub const ERROR_WITHIN: Duration = Duration::from_secs(1);
/// The same error is logged as a warning again after this time.
const LOGGED_AGAIN: Duration = Duration::from_secs(10);

/// Failures of one tenant's or one host's attempts.
#[derive(Debug)]
pub struct ConnectBackoff {
    /// `max_connecting_servers`.
    attempts_max: usize,
    /// `server_login_retry`.
    pause_max: Duration,
    /// How many servers may be opened at a time.
    allowed: usize,
    /// Failures since the last success.
    failures: u32,
    last: Option<Failure>,
}

/// Why an attempt failed, for the sessions that wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedAttempt {
    /// What they read, now or when they have waited for too long.
    pub reason: ClientError,
    /// They go on waiting: the host restarts or fails over, and `hold_during_outage` is on.
    pub holds: bool,
}

impl FailedAttempt {
    /// Ends all waits.
    pub fn told_at_once(reason: ClientError) -> Self {
        Self { reason, holds: false }
    }
}

#[derive(Debug)]
struct Failure {
    reason: ClientError,
    holds: bool,
    at: Instant,
    /// When the next attempt may begin.
    next_at: Instant,
    logged_at: Instant,
}

/// An attempt that has begun.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    failures_before: u32,
}

impl ConnectBackoff {
    /// Allows `attempts_max` servers at a time; pauses for up to `pause_max` after failures.
    pub fn new(attempts_max: usize, pause_max: Duration) -> Self {
        Self { attempts_max, pause_max, allowed: attempts_max, failures: 0, last: None }
    }

    /// How many servers may be opened at a time; 0 during a pause.
    pub fn at_a_time(&self, now: Instant) -> usize {
        let pauses = self.last.as_ref().is_some_and(|last| now < last.next_at);
        if pauses { 0 } else { self.allowed }
    }

    /// The rest of the pause, or zero.
    pub fn pause(&self, now: Instant) -> Duration {
        self.last.as_ref().map_or(Duration::ZERO, |last| last.next_at.saturating_duration_since(now))
    }

    /// Whether the last attempt failed.
    pub fn is_failing(&self) -> bool {
        self.last.is_some()
    }

    pub fn begin(&self) -> Attempt {
        Attempt { failures_before: self.failures }
    }

    /// The server has asked for authentication: the pause is over, and more may be opened at a time. If the
    /// attempt fails after that, the next pause is longer all the same.
    pub fn answered(&mut self) {
        self.allowed = self.allowed.saturating_mul(2).min(self.attempts_max);
        self.last = None;
    }

    /// A server was opened.
    pub fn succeeded(&mut self) {
        self.answered();
        self.failures = 0;
    }

    /// An attempt failed. Attempts that began before another's failure do not count again. `jitter`, from 0
    /// to 1, spreads the pause. Returns whether to log a warning: for the first failure, another error, or
    /// the same after [`LOGGED_AGAIN`].
    pub fn failed(&mut self, attempt: Attempt, failed: &FailedAttempt, now: Instant, jitter: f64) -> bool {
        let FailedAttempt { reason, holds } = failed;
        self.allowed = 1;
        let known = self.last.take();
        let is_old = attempt.failures_before < self.failures;
        let next_at = match &known {
            Some(known) if is_old => known.next_at,
            _ => {
                let doubled = FIRST_PAUSE.saturating_mul(1 << self.failures.min(20));
                self.failures = self.failures.saturating_add(1);
                let pause = doubled.min(self.pause_max);
                now + pause / 2 + (pause / 2).mul_f64(jitter.clamp(0.0, 1.0))
            }
        };
        let quiet_since = known
            .filter(|known| {
                known.reason == *reason && now.saturating_duration_since(known.logged_at) < LOGGED_AGAIN
            })
            .map(|known| known.logged_at);
        let logged_at = quiet_since.unwrap_or(now);
        self.last = Some(Failure { reason: reason.clone(), holds: *holds, at: now, next_at, logged_at });
        quiet_since.is_none()
    }

    /// Why the last attempt failed, if none has succeeded after it and sessions need not wait for the next one.
    pub fn reason_unless_held(&self) -> Option<&ClientError> {
        self.last.as_ref().filter(|last| !last.holds).map(|last| &last.reason)
    }

    /// Whether sessions wait for a host that is away.
    pub fn holds(&self) -> bool {
        self.last.as_ref().is_some_and(|last| last.holds)
    }

    /// Why the last attempt after `since` failed, if none has succeeded after it.
    pub fn reason_since(&self, since: Instant) -> Option<ClientError> {
        self.last.as_ref().filter(|last| last.at >= since).map(|last| last.reason.clone())
    }

    /// The error for sessions where the next attempt is too far away to wait for it; none while they are held.
    pub fn error_at_once(&self, now: Instant) -> Option<ClientError> {
        let far = |last: &&Failure| !last.holds && last.next_at.saturating_duration_since(now) > ERROR_WITHIN;
        self.last.as_ref().filter(far).map(|last| last.reason.clone())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reason(words: &str) -> ClientError {
        ClientError::ServerUnreachable { sqlstate: None, reason: words.to_owned() }
    }

    fn failed(words: &str) -> FailedAttempt {
        FailedAttempt::told_at_once(reason(words))
    }

    #[test]
    fn after_a_failure_one_is_opened_at_a_time_and_each_success_doubles_it() {
        let (mut backoff, now) = (ConnectBackoff::new(16, Duration::from_secs(1)), Instant::now());
        assert_eq!(backoff.at_a_time(now), 16);
        let attempts = [backoff.begin(), backoff.begin()];
        backoff.failed(attempts[0], &failed("gone"), now, 1.0);
        // It began before the other failed: it does not double the pause.
        backoff.failed(attempts[1], &failed("gone"), now, 1.0);
        assert_eq!((backoff.at_a_time(now), backoff.pause(now)), (0, FIRST_PAUSE));
        let mut now = now + FIRST_PAUSE;
        for pause_ms in [50, 100, 200, 400, 800, 1000, 1000] {
            assert_eq!(backoff.at_a_time(now), 1);
            let attempt = backoff.begin();
            backoff.failed(attempt, &failed("gone"), now, 1.0);
            assert_eq!(backoff.pause(now), Duration::from_millis(pause_ms));
            now += backoff.pause(now);
        }
        for at_a_time in [2, 4, 8, 16, 16] {
            backoff.succeeded();
            assert_eq!(backoff.at_a_time(now), at_a_time);
        }
        assert!(!backoff.is_failing() && backoff.reason_since(now - Duration::from_secs(60)).is_none());
    }

    #[test]
    fn sessions_get_the_error_at_once_only_where_the_next_attempt_is_far_away() {
        let now = Instant::now();
        for (longest_s, told) in [(1, false), (60, true)] {
            let mut backoff = ConnectBackoff::new(16, Duration::from_secs(longest_s));
            for _ in 0..20 {
                let attempt = backoff.begin();
                backoff.failed(attempt, &failed("gone"), now, 0.5);
            }
            assert_eq!(backoff.error_at_once(now).is_some(), told);
            assert_eq!(backoff.error_at_once(now + Duration::from_secs(59)), None);
        }
    }

    #[test]
    fn sessions_that_are_held_get_the_error_only_when_they_have_waited_for_too_long() {
        let (mut backoff, now) = (ConnectBackoff::new(16, Duration::from_secs(60)), Instant::now());
        for _ in 0..20 {
            let attempt = backoff.begin();
            let away = FailedAttempt { reason: reason("away"), holds: true };
            backoff.failed(attempt, &away, now, 0.5);
        }
        assert!(backoff.holds() && backoff.error_at_once(now).is_none());
        assert_eq!((backoff.reason_unless_held(), backoff.reason_since(now)), (None, Some(reason("away"))));
        // Back, and the password is another one: that is told at once.
        let attempt = backoff.begin();
        backoff.failed(attempt, &failed("refused"), now, 0.5);
        assert!(!backoff.holds() && backoff.error_at_once(now) == Some(reason("refused")));
        backoff.succeeded();
        assert!(!backoff.holds());
    }

    #[test]
    fn an_error_is_logged_when_it_is_new_and_again_after_a_while() {
        let (mut backoff, now) = (ConnectBackoff::new(16, Duration::from_secs(1)), Instant::now());
        let mut fails = |words: &str, at| {
            let attempt = backoff.begin();
            backoff.failed(attempt, &failed(words), at, 0.0)
        };
        assert!(fails("gone", now) && !fails("gone", now));
        assert!(fails("refused", now) && !fails("refused", now + LOGGED_AGAIN / 2));
        assert!(fails("refused", now + LOGGED_AGAIN) && !fails("refused", now + LOGGED_AGAIN));
        assert_eq!(backoff.reason_since(now), Some(reason("refused")));
        assert_eq!(backoff.reason_since(now + LOGGED_AGAIN * 2), None);
    }

    proptest! {
        /// In any sequence: no pause is longer than the limit, and one attempt at a time follows a failure.
        #[test]
        fn pauses_are_bounded(steps in proptest::collection::vec((any::<bool>(), 0.0..1.0f64), 1..100)) {
            let longest = Duration::from_secs(1);
            let (mut backoff, now) = (ConnectBackoff::new(16, longest), Instant::now());
            let attempts = [backoff.begin(); 1];
            for (succeeds, jitter) in steps {
                if succeeds {
                    backoff.succeeded();
                    prop_assert!(backoff.at_a_time(now) >= 2);
                } else {
                    backoff.failed(attempts[0], &failed("gone"), now, jitter);
                    prop_assert!(backoff.pause(now) <= longest && backoff.pause(now) >= FIRST_PAUSE / 2);
                    prop_assert_eq!(backoff.at_a_time(now + longest), 1);
                }
            }
        }
    }
}
