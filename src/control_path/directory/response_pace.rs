//! Delays answers to clients that are not authenticated yet, as if every name had to be looked up.
//! Otherwise a cached name would be answered faster, and the time would tell which names exist.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Shortest delay. Timers have millisecond resolution, and a look-up on a good network takes less.
const SHORTEST: Duration = Duration::from_millis(2);
/// Longest delay, also while the central database is slow.
const LONGEST: Duration = Duration::from_millis(50);
const LATEST: usize = 16;

/// The second longest of the latest look-ups. The longest may include connecting, and would delay every
/// login while there are few look-ups.
#[derive(Debug, Default)]
pub struct ResponsePace {
    latest: Mutex<Latest>,
    usual_micros: AtomicU64,
}

#[derive(Debug, Default)]
struct Latest {
    times: [Duration; LATEST],
    next: usize,
}

impl ResponsePace {
    /// Records the duration of a look-up.
    pub fn took(&self, time: Duration) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let next = latest.next;
        latest.times[next] = time.min(LONGEST);
        latest.next = (next + 1) % LATEST;
        let mut times = latest.times;
        times.sort_unstable();
        self.usual_micros.store(u64::try_from(times[LATEST - 2].as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// When to answer a client whose look-ups began at `begun`.
    pub fn answer_at(&self, begun: Instant) -> Instant {
        let usual = Duration::from_micros(self.usual_micros.load(Relaxed));
        begun + (usual + usual / 2).clamp(SHORTEST, LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_waits_for_as_long_as_look_ups_take_and_never_for_long() {
        let (pace, begun) = (ResponsePace::default(), Instant::now());
        let wait = |pace: &ResponsePace| pace.answer_at(begun) - begun;
        assert_eq!(wait(&pace), SHORTEST);
        pace.took(Duration::from_millis(10));
        assert_eq!(
            wait(&pace),
            SHORTEST,
            "one slow answer, such as one that opened a connection, delays no login"
        );
        pace.took(Duration::from_millis(10));
        assert_eq!(wait(&pace), Duration::from_millis(15));
        for _ in 1..LATEST - 1 {
            pace.took(Duration::from_micros(300));
            assert_eq!(wait(&pace), Duration::from_millis(15), "quick answers change little");
        }
        pace.took(Duration::from_micros(300));
        assert_eq!(wait(&pace), SHORTEST);
        pace.took(Duration::from_secs(5));
        pace.took(Duration::from_secs(5));
        assert_eq!(wait(&pace), LONGEST);
    }
}
