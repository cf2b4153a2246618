//! Sessions that take too long: queries, transactions, idleness inside and outside of transactions; and those whose login is
//! over by now.
//!
//! Nothing is armed per message. Every session notes what it is doing and since when, on the coarse clock; one task walks
//! them now and then: for limits only where one is set, for logins only when the first of them is over.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use super::registry::{Activity, SessionHandle, Sessions};
use crate::{
    config::{Config, Timeouts},
    data_path::worker::Worker,
    error::ClientError,
};
use arc_swap::ArcSwap;

/// How often the sessions are walked: a limit is kept to within this and the clock's own coarseness.
const WALK_EVERY: Duration = Duration::from_millis(250);

/// Ends sessions that are over a limit, for ever.
pub async fn watch(sessions: Arc<Sessions>, config: Arc<ArcSwap<Config>>, workers: Vec<Arc<Worker>>) {
    let mut interval = tokio::time::interval(WALK_EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        sessions.end_expired(SystemTime::now());
        let config = config.load();
        let limits = &config.timeouts;
        let any = [limits.query, limits.transaction, limits.idle_transaction, limits.client_idle];
        let (Some(worker), true) = (workers.first(), any.iter().any(Option::is_some)) else { continue };
        let now_ms = worker.clock.now_ms();
        for session in sessions.all() {
            if let Some(client_error) = overdue(&Standing::of(&session), now_ms, limits) {
                session.end(client_error);
            }
        }
    }
}

impl Sessions {
    /// Takes down until when a session's login is good.
    pub fn set_valid_until(&self, session: &SessionHandle, moment: Option<SystemTime>) {
        session.valid_until.store(millis(moment), Ordering::Relaxed);
        self.first_end.fetch_min(millis(moment), Ordering::AcqRel);
    }

    /// Ends those whose login is over. Walks them only when one may be.
    pub fn end_expired(&self, now: SystemTime) {
        let now = millis(Some(now));
        if now < self.first_end.load(Ordering::Acquire) {
            return;
        }
        // Whoever comes while we walk counts from here on.
        self.first_end.swap(u64::MAX, Ordering::AcqRel);
        let expired = ClientError::Ended("the login is no longer valid".into());
        for session in self.all() {
            let end = session.valid_until.load(Ordering::Relaxed);
            if now >= end {
                session.end(expired.clone());
            } else {
                self.first_end.fetch_min(end, Ordering::AcqRel);
            }
        }
    }
}

/// What a session is doing, and since when, in milliseconds of the coarse clock.
#[derive(Debug, Clone, Copy)]
struct Standing {
    doing: Activity,
    since_ms: u32,
    asked_ms: u32,
    began_ms: u32,
}

impl Standing {
    fn of(session: &SessionHandle) -> Self {
        let (doing, since_ms) = session.doing();
        Self { doing, since_ms, asked_ms: session.asked_ms(), began_ms: session.began_ms() }
    }
}

/// The limit that a session is over, if any.
fn overdue(session: &Standing, now_ms: u32, limits: &Timeouts) -> Option<ClientError> {
    let over = |since_ms: u32, limit: Option<Duration>| {
        // The clock wraps; what lies ahead of it was noted since it was read.
        let passed = now_ms.wrapping_sub(since_ms).cast_signed().max(0).cast_unsigned();
        limit.is_some_and(|limit| Duration::from_millis(passed.into()) >= limit)
    };
    let client_error = |setting, sqlstate| Some(ClientError::TimedOut { setting, sqlstate });
    match session.doing {
        Activity::Idle | Activity::Pinned if over(session.since_ms, limits.client_idle) => {
            client_error("client_idle_timeout", "57P05")
        }
        Activity::Active if over(session.asked_ms, limits.query) => client_error("query_timeout", "57014"),
        Activity::InTransaction if over(session.since_ms, limits.idle_transaction) => {
            client_error("idle_transaction_timeout", "25P03")
        }
        Activity::Active | Activity::InTransaction if over(session.began_ms, limits.transaction) => {
            client_error("transaction_timeout", "25P04")
        }
        _ => None,
    }
}

/// Milliseconds since 1970; without a moment, never.
pub(in crate::data_path) fn millis(moment: Option<SystemTime>) -> u64 {
    let since = moment.map(|moment| moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    since.and_then(|since| u64::try_from(since.as_millis()).ok()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(
        doing: Activity,
        since_ms: u32,
        asked_ms: u32,
        began_ms: u32,
        now_ms: u32,
    ) -> Option<&'static str> {
        let mut limits =
            crate::config::Config::read("[central]\nurl = \"postgres://m@h/c\"", None, &|_| None)
                .unwrap()
                .timeouts;
        limits.query = Some(Duration::from_millis(10));
        limits.transaction = Some(Duration::from_millis(40));
        limits.idle_transaction = Some(Duration::from_millis(20));
        limits.client_idle = Some(Duration::from_millis(30));
        match overdue(&Standing { doing, since_ms, asked_ms, began_ms }, now_ms, &limits) {
            Some(ClientError::TimedOut { setting, .. }) => Some(setting),
            None => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_limit_is_kept_for_what_it_limits() {
        assert_eq!(setting(Activity::Active, 0, 90, 90, 99), None);
        assert_eq!(setting(Activity::Active, 0, 90, 90, 100), Some("query_timeout"));
        assert_eq!(setting(Activity::Active, 0, 95, 60, 100), Some("transaction_timeout"));
        assert_eq!(setting(Activity::InTransaction, 81, 0, 61, 100), None);
        assert_eq!(setting(Activity::InTransaction, 80, 0, 61, 100), Some("idle_transaction_timeout"));
        assert_eq!(setting(Activity::InTransaction, 99, 0, 60, 100), Some("transaction_timeout"));
        assert_eq!(setting(Activity::Idle, 71, 0, 0, 100), None);
        assert_eq!(setting(Activity::Idle, 70, 0, 0, 100), Some("client_idle_timeout"));
        assert_eq!(setting(Activity::Pinned, 70, 0, 0, 100), Some("client_idle_timeout"));
        assert_eq!(setting(Activity::Waiting, 0, 0, 0, 1000), None);
    }

    #[test]
    fn a_clock_that_wraps_or_was_read_too_early_ends_nobody() {
        assert_eq!(setting(Activity::Active, 0, u32::MAX - 2, u32::MAX - 2, 3), None);
        assert_eq!(setting(Activity::Active, 0, 105, 105, 100), None);
        assert_eq!(setting(Activity::Active, 0, u32::MAX - 8, u32::MAX - 8, 3), Some("query_timeout"));
    }
}
