//! The common rhythm of what a node does from time to time. A node at rest wakes once for all that is due in a
//! second, because a wake-up costs more than most of it.

use std::{sync::OnceLock, time::Duration};

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

const SECOND: Duration = Duration::from_secs(1);

/// The first common moment from `earliest` on, less than a second later. Nodes have different moments.
pub fn next(earliest: Instant) -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    first_from(*BASE.get_or_init(Instant::now), earliest)
}

fn first_from(base: Instant, earliest: Instant) -> Instant {
    let passed = earliest.saturating_duration_since(base);
    let into_second = Duration::from_nanos(passed.subsec_nanos().into());
    if into_second.is_zero() { base + passed } else { base + (passed - into_second + SECOND) }
}

/// Ticks at common moments, for the first time within a second. `period`: whole seconds. A tick that was missed
/// is left out.
pub fn every(period: Duration) -> Interval {
    let mut interval = interval_at(next(Instant::now()), period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
    interval
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_moments_are_a_second_apart() {
        let base = Instant::now();
        let ms = |ms| base + Duration::from_millis(ms);
        for (earliest, moment) in [(0, 0), (1, 1000), (999, 1000), (1000, 1000), (1001, 2000)] {
            assert_eq!(first_from(base, ms(earliest)), ms(moment), "{earliest}");
        }
    }
}
