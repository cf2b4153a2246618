//! How many servers a node wants, without the dips between two transactions: a server that is handed back for a moment
//! costs two connects.
//!
//! Pure: the time is an argument.

use std::time::Duration;

/// A number is remembered for one to two of these.
const WINDOW: Duration = Duration::from_millis(1500);

/// The highest number of late.
#[derive(Debug, Default)]
pub struct Peak {
    begun: Duration,
    now: u32,
    before: u32,
}

impl Peak {
    /// Adds a number and returns the highest one.
    pub fn with(&mut self, number: u32, at: Duration) -> u32 {
        let windows = at.saturating_sub(self.begun).div_duration_f64(WINDOW);
        if windows >= 1.0 {
            self.before = if windows < 2.0 { self.now } else { 0 };
            (self.begun, self.now) = (at, 0);
        }
        self.now = self.now.max(number);
        self.now.max(self.before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_falls_some_seconds_later() {
        let mut peak = Peak::default();
        let mut at = |ms: u64, number: u32| peak.with(number, Duration::from_millis(ms));
        assert_eq!([at(0, 3), at(500, 5), at(1000, 1)], [3, 5, 5]);
        assert_eq!([at(1600, 2), at(2500, 1)], [5, 5]);
        assert_eq!([at(3200, 1), at(9000, 0)], [2, 0]);
    }
}
