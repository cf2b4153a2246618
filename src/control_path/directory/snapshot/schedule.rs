//! When to write the next snapshot: soon after a change, and from time to time, so that its age tells how long the
//! central database has been away. A large directory is read less often.
//!
//! Pure: the time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// After a change, for others that come with it.
const SETTLE: Duration = Duration::from_millis(250);
/// From the beginning of one to that of the next, at least…
const PACE: Duration = Duration::from_secs(2);
/// …and so many times what the last one took.
const REST: u32 = 5;
/// After a failure.
const RETRY: Duration = Duration::from_secs(2);
/// If nothing changes, so many are written in the time that one may be used.
const IN_MAX_AGE: u32 = 24;

/// What has been written, and what has changed since.
#[derive(Debug)]
pub struct Schedule {
    /// The longest time from one to the next.
    every: Duration,
    changed: Option<Instant>,
    begun: Option<Instant>,
    took: Duration,
    failed: Option<Instant>,
    started: Instant,
}

impl Schedule {
    /// Nothing is written yet. `max_age`: how long a snapshot may be used.
    pub fn new(max_age: Duration, now: Instant) -> Self {
        let every = (max_age / IN_MAX_AGE).max(PACE);
        Self { every, changed: None, begun: None, took: Duration::ZERO, failed: None, started: now }
    }

    /// The directory has changed.
    pub fn changed(&mut self, now: Instant) {
        self.changed.get_or_insert(now);
    }

    /// One was written. Its reading had `begun` then; what has changed later is not in it.
    pub fn written(&mut self, begun: Instant, now: Instant, changed_later: bool) {
        (self.begun, self.took, self.failed) = (Some(begun), now - begun, None);
        self.changed = changed_later.then_some(now);
    }

    /// One could not be written.
    pub fn failed(&mut self, now: Instant) {
        self.failed = Some(now);
    }

    /// When to write the next one.
    pub fn next(&self) -> Instant {
        let regular = self.begun.map_or(self.started, |begun| begun + self.every);
        let wanted = self.changed.map_or(regular, |changed| regular.min(changed + SETTLE));
        let paced = self.begun.map(|begun| begun + PACE.max(self.took * REST));
        let retry = self.failed.map(|failed| failed + RETRY);
        [paced, retry].into_iter().flatten().fold(wanted, Instant::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn the_first_is_written_at_once_and_one_each_hour_of_a_day() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DAY, start);
        assert_eq!(schedule.next(), start);
        schedule.written(start, start, false);
        assert_eq!(schedule.next(), start + Duration::from_secs(3600));
    }

    #[test]
    fn changes_are_written_soon_and_many_of_them_together() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DAY, start);
        schedule.written(start, start, false);
        let later = start + Duration::from_secs(60);
        for step in 0..10 {
            schedule.changed(later + Duration::from_millis(step));
        }
        assert_eq!(schedule.next(), later + SETTLE);
        schedule.written(later + SETTLE, later + SETTLE, true);
        assert_eq!(schedule.next(), later + SETTLE + PACE);
    }

    #[test]
    fn a_directory_that_takes_long_to_read_is_read_less_often() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DAY, start);
        schedule.written(start, start + Duration::from_secs(6), true);
        assert_eq!(schedule.next(), start + Duration::from_secs(30));
    }

    #[test]
    fn a_failure_is_repeated_after_a_pause() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DAY, start);
        schedule.failed(start + PACE);
        assert_eq!(schedule.next(), start + PACE + RETRY);
        schedule.written(start + PACE + RETRY, start + PACE + RETRY, false);
        assert_eq!(schedule.next(), start + PACE + RETRY + DAY / IN_MAX_AGE);
    }
}
