//! Limits how often a login may change its own password.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::data_path::lock::locked;

/// Changes that a login may make at once; after that, one in each interval. Each change writes a row of the
/// audit log and a message to all nodes. The number leaves room for mistakes and scripts.
pub const AT_ONCE: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(60);

/// The recent password changes at this node.
#[derive(Debug, Default)]
pub struct PasswordPace {
    /// By `logins.id`: when all changes so far would be over if one were made in each interval.
    busy_until: Mutex<HashMap<i64, Instant>>,
}

impl PasswordPace {
    /// Counts an attempt to change the password. The error is the time until the next attempt is allowed;
    /// this one is not counted.
    pub fn begin(&self, login: i64, now: Instant) -> Result<(), Duration> {
        let mut all = locked(&self.busy_until);
        // Entries without effect are removed when the map would have to grow.
        if all.len() == all.capacity() {
            all.retain(|_, until| *until > now);
        }
        let until = all.get(&login).map_or(now, |until| (*until).max(now));
        let wait = until.saturating_duration_since(now).saturating_sub(INTERVAL * (AT_ONCE - 1));
        if !wait.is_zero() {
            return Err(wait);
        }
        all.insert(login, until + INTERVAL);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_changes_its_password_some_times_at_once_and_then_at_a_pace() {
        let (pace, mut now) = (PasswordPace::default(), Instant::now());
        for _ in 0..AT_ONCE {
            assert_eq!(pace.begin(1, now), Ok(()));
        }
        assert_eq!(pace.begin(1, now), Err(INTERVAL));
        assert_eq!(pace.begin(2, now), Ok(()), "others have a pace of their own");
        now += INTERVAL / 4;
        assert_eq!(pace.begin(1, now), Err(INTERVAL * 3 / 4), "a refusal costs nothing");
        now += INTERVAL * 3 / 4;
        assert_eq!(pace.begin(1, now), Ok(()));
        assert_eq!(pace.begin(1, now), Err(INTERVAL));
        now += INTERVAL * AT_ONCE;
        for _ in 0..AT_ONCE {
            assert_eq!(pace.begin(1, now), Ok(()));
        }
        assert_eq!(pace.begin(1, now), Err(INTERVAL));
    }

    #[test]
    fn what_is_over_is_not_kept() {
        let (pace, mut now) = (PasswordPace::default(), Instant::now());
        for login in 0..10_000 {
            pace.begin(login, now).unwrap();
            now += INTERVAL;
        }
        assert!(pace.busy_until.lock().unwrap().len() < 100);
    }
}
