//! How soon a client that has proved nothing yet is answered: as late as if everything it named had to be looked up, also
//! where it is remembered. Otherwise the time would tell which names are in use.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Timers count milliseconds, and a look-up on a good network takes less.
const SHORTEST: Duration = Duration::from_millis(2);
/// While the central database is slow, what is remembered is not held up for longer than this.
const LONGEST: Duration = Duration::from_millis(50);

/// What look-ups have taken lately, rather more than less.
#[derive(Debug, Default)]
pub struct Pace {
    micros: AtomicU64,
}

impl Pace {
    /// A look-up took so long. A longer one counts at once, shorter ones bring it down by and by.
    pub fn took(&self, time: Duration) {
        let time = u64::try_from(time.min(LONGEST).as_micros()).unwrap_or(u64::MAX);
        let follow = |now: u64| Some(if time >= now { time } else { now - (now - time).div_ceil(16) });
        let _ = self.micros.fetch_update(Relaxed, Relaxed, follow);
    }

    /// When a client whose look-ups began at `begun` may be answered.
    pub fn answer_at(&self, begun: Instant) -> Instant {
        let usual = Duration::from_micros(self.micros.load(Relaxed));
        begun + (usual + usual / 2).clamp(SHORTEST, LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_waits_for_as_long_as_look_ups_take_and_never_for_long() {
        let (pace, begun) = (Pace::default(), Instant::now());
        let wait = |pace: &Pace| pace.answer_at(begun) - begun;
        assert_eq!(wait(&pace), SHORTEST);
        pace.took(Duration::from_millis(10));
        assert_eq!(wait(&pace), Duration::from_millis(15));
        pace.took(Duration::from_micros(300));
        assert!(wait(&pace) > Duration::from_millis(10), "one quick answer changes little");
        for _ in 0..200 {
            pace.took(Duration::from_micros(300));
        }
        assert_eq!(wait(&pace), SHORTEST);
        pace.took(Duration::from_secs(5));
        assert_eq!(wait(&pace), LONGEST);
    }
}
