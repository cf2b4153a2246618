//! Ends sessions that exceed a timeout (query, transaction, idle in transaction, idle) and sessions whose
//! login has expired.
//!
//! There is no timer per message. Each session stores its activity and its start on the coarse clock, and one
//! task checks all sessions at an interval: for timeouts only if one is set, for logins only when one has
//! expired. `idle_session_timeout` is a session's own setting; while it has a server, the server applies it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use super::registry::{Activity, SessionHandle, Sessions};
use crate::{
    config::{Config, Timeouts},
    data_path::worker::{TICK, Worker},
    error::ClientError,
};
use arc_swap::ArcSwap;

/// The interval of the checks; a timeout is exact to this plus the resolution of the coarse clock.
const WALK_EVERY: Duration = Duration::from_millis(250);

/// Ends sessions that exceed a limit. Never returns.
pub async fn watch(sessions: Arc<Sessions>, config: Arc<ArcSwap<Config>>, workers: Vec<Arc<Worker>>) {
    let mut interval = tokio::time::interval(WALK_EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        sessions.end_expired(SystemTime::now());
        let config = config.load();
        let limits = &config.timeouts;
        let any = [limits.query, limits.transaction, limits.idle_transaction, limits.client_idle];
        // Sessions that set one during the check, or have one, set it again.
        let own = sessions.has_idle_timeouts.swap(false, Ordering::AcqRel);
        let is_any = own || any.iter().any(Option::is_some);
        let (Some(worker), true) = (workers.first(), is_any) else { continue };
        let now_ms = worker.clock.now_ms();
        for session in sessions.all() {
            let timing = Timing::of(&session);
            if let Some(client_error) = overdue(&timing, now_ms, limits) {
                session.end(client_error);
            } else if let Some(limit) = session.idle_session_timeout() {
                sessions.has_idle_timeouts.store(true, Ordering::Release);
                if is_idle_session(&timing, now_ms, limit) {
                    session.end_if_idle(ClientError::AsPostgres {
                        sqlstate: "57P05",
                        message: "terminating connection due to idle-session timeout".to_owned(),
                    });
                }
            }
        }
    }
}

impl Sessions {
    /// Sets when a session's login expires.
    pub fn set_valid_until(&self, session: &SessionHandle, moment: Option<SystemTime>) {
        session.valid_until.store(millis(moment), Ordering::Relaxed);
        self.first_end.fetch_min(millis(moment), Ordering::AcqRel);
    }

    /// Ends the sessions whose login has expired. Checks them only when one may have.
    pub fn end_expired(&self, now: SystemTime) {
        let now = millis(Some(now));
        if now < self.first_end.load(Ordering::Acquire) {
            return;
        }
        // Sessions that are registered during the check lower it again.
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

/// A session's activity and its times, in milliseconds of the coarse clock.
#[derive(Debug, Clone, Copy)]
struct Timing {
    doing: Activity,
    since_ms: u32,
    asked_ms: u32,
    began_ms: u32,
}

impl Timing {
    fn of(session: &SessionHandle) -> Self {
        let (doing, since_ms) = session.doing();
        Self { doing, since_ms, asked_ms: session.asked_ms(), began_ms: session.began_ms() }
    }
}

/// The error for a session that exceeds a limit; `None` if it exceeds none.
fn overdue(session: &Timing, now_ms: u32, limits: &Timeouts) -> Option<ClientError> {
    let over =
        |since_ms: u32, limit: Option<Duration>| limit.is_some_and(|limit| passed(since_ms, now_ms) >= limit);
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

/// Whether a session without a server has been idle for this long, as PostgreSQL counts it: never less,
/// though the clock was behind when the session became idle.
fn is_idle_session(session: &Timing, now_ms: u32, limit: Duration) -> bool {
    session.doing == Activity::Idle && passed(session.since_ms, now_ms) >= limit + TICK
}

fn passed(since_ms: u32, now_ms: u32) -> Duration {
    // The clock wraps. A time ahead of it was stored after the clock was read.
    let passed = now_ms.wrapping_sub(since_ms).cast_signed().max(0).cast_unsigned();
    Duration::from_millis(passed.into())
}

/// Milliseconds since 1970; `u64::MAX` (never) for `None`.
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
        match overdue(&Timing { doing, since_ms, asked_ms, began_ms }, now_ms, &limits) {
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
    fn a_session_of_its_own_timeout_ends_only_while_it_is_idle() {
        let is_over = |doing, now_ms| {
            let session = Timing { doing, since_ms: 50, asked_ms: 0, began_ms: 0 };
            is_idle_session(&session, now_ms, Duration::from_millis(300))
        };
        assert!(!is_over(Activity::Idle, 449) && is_over(Activity::Idle, 450));
        let others = [Activity::Waiting, Activity::Active, Activity::InTransaction, Activity::Pinned];
        assert!(!others.into_iter().any(|doing| is_over(doing, 1000)));
    }

    #[test]
    fn a_clock_that_wraps_or_was_read_too_early_ends_no_session() {
        assert_eq!(setting(Activity::Active, 0, u32::MAX - 2, u32::MAX - 2, 3), None);
        assert_eq!(setting(Activity::Active, 0, 105, 105, 100), None);
        assert_eq!(setting(Activity::Active, 0, u32::MAX - 8, u32::MAX - 8, 3), Some("query_timeout"));
    }
}
