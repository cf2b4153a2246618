//! Limits how often a line of one cause is logged: one server that fails may be the cause of thousands.

use std::{sync::Mutex, time::Duration};

use tokio::time::Instant;

use crate::data_path::lock::locked;

/// The least time between two lines of one cause.
const INTERVAL: Duration = Duration::from_secs(5);

/// The last line of one cause, and how many were left out since.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<(Option<Instant>, u64)>);

impl LogLimit {
    /// Returns how many lines were left out before this one; `None`: this one is left out, too.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = locked(&self.0);
        let (last, suppressed) = &mut *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            *suppressed += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_follow_soon_are_counted_by_the_next() {
        let (limit, mut now) = (LogLimit::default(), Instant::now());
        assert_eq!(limit.admit(now), Some(0));
        assert_eq!(limit.admit(now), None);
        assert_eq!(limit.admit(now), None);
        now += INTERVAL;
        assert_eq!(limit.admit(now), Some(2));
        now += INTERVAL;
        assert_eq!(limit.admit(now), Some(0));
    }
}
