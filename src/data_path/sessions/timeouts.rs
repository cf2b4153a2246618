//! Ends sessions that exceed a timeout (query, transaction, idle in transaction, idle) and sessions whose
//! login has expired.
//!
//! There is no timer per message. Each session stores its activity and its start on the coarse clock, and one
//! task checks all sessions when one of them can first exceed a limit, and sleeps if none is set.
//! `idle_session_timeout` is a session's own setting; while it has a server, the server applies it.

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
use tokio::time::Instant;

/// The shortest time between two checks; a timeout is exact to this plus the resolution of the coarse clock.
const WALK_EVERY: Duration = Duration::from_millis(250);

/// The longest time until a login's end is compared with the wall clock again, which may be set.
const CLOCK_LOOK_EVERY: Duration = Duration::from_secs(60);

/// Ends sessions that exceed a limit. Never returns.
pub async fn watch(sessions: Arc<Sessions>, config: Arc<ArcSwap<Config>>, workers: Vec<Arc<Worker>>) {
    let Some(worker) = workers.first() else { return };
    loop {
        let now = SystemTime::now();
        sessions.end_expired(now);
        worker.clock.tick();
        let next = sessions.end_overdue(worker.clock.now_ms(), &config.load().timeouts);
        let walked = Instant::now();
        let changed = sessions.limits_changed.notified();
        match soonest(next, sessions.until_first_end(now)) {
            Some(next) => drop(tokio::time::timeout(next.max(WALK_EVERY), changed).await),
            None => changed.await,
        }
        tokio::time::sleep_until(walked + WALK_EVERY).await;
    }
}

fn soonest(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}

impl Sessions {
    /// Ends the sessions that exceed a limit. Returns after which time another one can; `None`: not before a
    /// limit is set.
    fn end_overdue(&self, now_ms: u32, limits: &Timeouts) -> Option<Duration> {
        // What a session begins after this check exceeds no limit sooner than the shortest one.
        let all = [limits.query, limits.transaction, limits.idle_transaction, limits.client_idle];
        let mut next = all.into_iter().flatten().min();
        // Sessions that set one during the check, or have one, set it again.
        let own = self.has_idle_timeouts.swap(false, Ordering::AcqRel);
        if next.is_none() && !own {
            return None;
        }
        for session in self.all() {
            let timing = Timing::of(&session);
            if let Some((left, setting, sqlstate)) = remaining(&timing, now_ms, limits) {
                if left.is_zero() && timing.doing != Activity::Waiting {
                    session.end(ClientError::TimedOut { setting, sqlstate });
                    continue;
                }
                next = soonest(next, Some(left));
            }
            if let Some(limit) = session.idle_session_timeout() {
                self.has_idle_timeouts.store(true, Ordering::Release);
                let left = idle_session_left(&timing, now_ms, limit);
                if left.is_zero() {
                    session.end_if_idle(ClientError::AsPostgres {
                        sqlstate: "57P05",
                        message: "terminating connection due to idle-session timeout".to_owned(),
                    });
                }
                next = soonest(next, Some(left));
            }
        }
        next
    }

    /// Sets when a session's login expires.
    pub fn set_valid_until(&self, session: &SessionHandle, moment: Option<SystemTime>) {
        session.valid_until.store(millis(moment), Ordering::Relaxed);
        self.note_end(millis(moment));
    }

    /// A session's login expires at `end_ms`: none does before the earliest of these.
    pub(super) fn note_end(&self, end_ms: u64) {
        if self.first_end.fetch_min(end_ms, Ordering::AcqRel) > end_ms {
            self.limits_changed.notify_one();
        }
    }

    /// The time until a login expires, as far as the watch may sleep; `None`: none expires.
    fn until_first_end(&self, now: SystemTime) -> Option<Duration> {
        let end = Some(self.first_end.load(Ordering::Acquire)).filter(|end| *end < u64::MAX)?;
        Some(Duration::from_millis(end.saturating_sub(millis(Some(now)))).min(CLOCK_LOOK_EVERY))
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

/// A limit that applies to what a session does: the time that is left, the name of its setting, SQLSTATE.
type Remaining = (Duration, &'static str, &'static str);

/// The limit that a session exceeds first by what it does now; `None`: no limit applies. That of a session that
/// waits for a server applies when it has one.
fn remaining(session: &Timing, now_ms: u32, limits: &Timeouts) -> Option<Remaining> {
    let of = |limit: Option<Duration>, since_ms: u32, setting, sqlstate| {
        limit.map(|limit| (limit.saturating_sub(passed(since_ms, now_ms)), setting, sqlstate))
    };
    let transaction = || of(limits.transaction, session.began_ms, "transaction_timeout", "25P04");
    let (first, second) = match session.doing {
        Activity::Idle | Activity::Pinned => {
            (of(limits.client_idle, session.since_ms, "client_idle_timeout", "57P05"), None)
        }
        Activity::Waiting | Activity::Active => {
            (of(limits.query, session.asked_ms, "query_timeout", "57014"), transaction())
        }
        Activity::InTransaction => {
            let idle = of(limits.idle_transaction, session.since_ms, "idle_transaction_timeout", "25P03");
            (idle, transaction())
        }
    };
    first.into_iter().chain(second).min_by_key(|(left, ..)| *left)
}

/// For how long a session may still be idle without a server, as PostgreSQL counts it: never less than its
/// limit, though the clock was behind when the session became idle.
fn idle_session_left(session: &Timing, now_ms: u32, limit: Duration) -> Duration {
    match session.doing {
        Activity::Idle => (limit + TICK).saturating_sub(passed(session.since_ms, now_ms)),
        _ => limit,
    }
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
        let remaining = remaining(&Timing { doing, since_ms, asked_ms, began_ms }, now_ms, &limits);
        let applies = doing != Activity::Waiting;
        remaining.filter(|(left, ..)| applies && left.is_zero()).map(|(_, setting, _)| setting)
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
            idle_session_left(&session, now_ms, Duration::from_millis(300)).is_zero()
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
