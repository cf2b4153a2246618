//! Which pool may open a server on a host next. All pools of a host share `max_connecting_servers`, and the
//! pauses after a failure of the host: while it is down, one pool tries, and the others use the result.
//!
//! Tenants get turns in the order in which they asked. A tenant gets at most three for each one that it
//! leaves free, so that the next tenant gets one at once, however long the logins of the first take.
//!
//! Pure: `W` waits for a turn, a tenant is a number; the time and the jitter are arguments.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use super::connect_backoff::{Attempt, ConnectBackoff, ERROR_WITHIN, FailedAttempt};
use crate::error::ClientError;

/// A tenant's attempts for each one that is left free.
const FOR_EACH_FREE: usize = 3;

/// One host's turns.
#[derive(Debug)]
pub struct ConnectTurns<W> {
    attempts_max: usize,
    pause_max: Duration,
    backoff: ConnectBackoff,
    running: Vec<Running>,
    waiting: VecDeque<(i64, W)>,
    next_number: u64,
}

#[derive(Debug)]
struct Running {
    number: u64,
    tenant: i64,
    began: Instant,
    attempt: Attempt,
    answered: bool,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy)]
pub enum Outcome<'a> {
    /// A server was opened, or the attempt failed for a reason of the tenant's own.
    Answered,
    /// The host failed.
    Failed(&'a FailedAttempt),
    /// The attempt was abandoned.
    Unknown,
}

impl<W> ConnectTurns<W> {
    /// Allows `attempts_max` attempts at a time; pauses for up to `pause_max` after failures.
    pub fn new(attempts_max: usize, pause_max: Duration) -> Self {
        let backoff = ConnectBackoff::new(attempts_max, pause_max);
        let (running, waiting) = (Vec::new(), VecDeque::new());
        Self { attempts_max, pause_max, backoff, running, waiting, next_number: 0 }
    }

    /// Applies the configuration. A change forgets earlier failures.
    pub fn set_limits(&mut self, attempts_max: usize, pause_max: Duration) {
        if (self.attempts_max, self.pause_max) != (attempts_max, pause_max) {
            (self.attempts_max, self.pause_max) = (attempts_max, pause_max);
            self.forget();
        }
    }

    pub fn forget(&mut self) {
        self.backoff = ConnectBackoff::new(self.attempts_max, self.pause_max);
    }

    pub fn backoff(&self) -> &ConnectBackoff {
        &self.backoff
    }

    /// Enters the queue.
    pub fn join(&mut self, tenant: i64, waiter: W) {
        self.waiting.push_back((tenant, waiter));
    }

    /// The next that may begin now, with the number of its attempt. Removes those that `want` none any more.
    pub fn next(&mut self, now: Instant, want: impl Fn(&W) -> bool) -> Option<(u64, W)> {
        let free = self.backoff.at_a_time(now).saturating_sub(self.running.len());
        let mut at = 0;
        while free > 0
            && let Some((tenant, waiter)) = self.waiting.get(at)
        {
            let tenant = *tenant;
            if !want(waiter) {
                self.waiting.remove(at);
            } else if self.held(tenant) >= free.saturating_mul(FOR_EACH_FREE) {
                at += 1;
            } else {
                let (_, waiter) = self.waiting.remove(at)?;
                return Some((self.begin(tenant, now), waiter));
            }
        }
        None
    }

    fn held(&self, tenant: i64) -> usize {
        self.running.iter().filter(|attempt| attempt.tenant == tenant).count()
    }

    fn begin(&mut self, tenant: i64, now: Instant) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        let attempt = self.backoff.begin();
        self.running.push(Running { number, tenant, began: now, attempt, answered: false });
        number
    }

    /// The server has asked for authentication: the host is up. Returns whether it was failing.
    pub fn answered(&mut self, number: u64) -> bool {
        let attempt = self.running.iter_mut().find(|attempt| attempt.number == number);
        let Some(attempt) = attempt.filter(|attempt| !attempt.answered) else { return false };
        attempt.answered = true;
        let was_failing = self.backoff.is_failing();
        self.backoff.answered();
        was_failing
    }

    /// Whether the server has asked for authentication.
    pub fn is_answered(&self, number: u64) -> bool {
        self.running.iter().any(|attempt| attempt.number == number && attempt.answered)
    }

    /// An attempt has ended. Returns whether that is to be logged as a warning.
    pub fn ended(&mut self, number: u64, how: Outcome<'_>, now: Instant, jitter: f64) -> bool {
        let Some(at) = self.running.iter().position(|attempt| attempt.number == number) else {
            return false;
        };
        let attempt = self.running.swap_remove(at);
        match how {
            Outcome::Answered => {
                self.backoff.succeeded();
                false
            }
            Outcome::Failed(failed) => self.backoff.failed(attempt.attempt, failed, now, jitter),
            Outcome::Unknown => false,
        }
    }

    /// Removes and returns those in the queue for which `such` holds.
    pub fn take_out(&mut self, such: impl Fn(&W) -> bool) -> Vec<W> {
        let (taken, left): (VecDeque<_>, _) = self.waiting.drain(..).partition(|(_, waiter)| such(waiter));
        self.waiting = left;
        taken.into_iter().map(|(_, waiter)| waiter).collect()
    }

    /// The error for sessions that have waited for [`ERROR_WITHIN`] and are not held: the host fails, and the
    /// attempt under way has had no answer for as long.
    pub fn silent(&self, now: Instant) -> Option<&ClientError> {
        let silent = |attempt: &Running| {
            !attempt.answered && now.saturating_duration_since(attempt.began) > ERROR_WITHIN
        };
        self.backoff.reason_unless_held().filter(|_| self.running.iter().any(silent))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONGEST: Duration = Duration::from_secs(1);

    fn gone() -> ClientError {
        ClientError::ServerUnreachable { sqlstate: None, reason: "gone".to_owned() }
    }

    fn failed() -> FailedAttempt {
        FailedAttempt::told_at_once(gone())
    }

    fn turns(waiting: &[i64]) -> ConnectTurns<i64> {
        let mut turns = ConnectTurns::new(16, LONGEST);
        waiting.iter().for_each(|tenant| turns.join(*tenant, *tenant));
        turns
    }

    fn all_that_may(turns: &mut ConnectTurns<i64>, now: Instant) -> Vec<(u64, i64)> {
        std::iter::from_fn(|| turns.next(now, |_| true)).collect()
    }

    #[test]
    fn one_tenant_leaves_room_for_the_next() {
        let (mut turns, now) = (turns(&[1; 40]), Instant::now());
        assert_eq!(all_that_may(&mut turns, now).len(), 12);
        turns.join(2, 2);
        assert_eq!(turns.next(now, |_| true).map(|(_, tenant)| tenant), Some(2));
        for attempts_max in 1..=3 {
            let mut turns = ConnectTurns::new(attempts_max, LONGEST);
            (0..9).for_each(|_| turns.join(1, 1));
            assert_eq!(all_that_may(&mut turns, now).len(), attempts_max);
        }
    }

    #[test]
    fn a_host_that_is_down_is_tried_by_one_and_goes_on_with_all_when_it_answers() {
        let tenants: Vec<i64> = (0..100).collect();
        let (mut turns, mut now) = (turns(&tenants), Instant::now());
        let begun = all_that_may(&mut turns, now);
        assert_eq!(begun.len(), 16);
        for (number, tenant) in begun {
            turns.ended(number, Outcome::Failed(&failed()), now, 1.0);
            turns.join(tenant, tenant);
        }
        let mut attempts = 0;
        for _ in 0..40 {
            now += Duration::from_millis(100);
            for (number, tenant) in all_that_may(&mut turns, now) {
                turns.ended(number, Outcome::Failed(&failed()), now, 1.0);
                turns.join(tenant, tenant);
                attempts += 1;
            }
        }
        assert!((4..=8).contains(&attempts), "{attempts} attempts in 4 s");
        now += LONGEST;
        // Up again: the first answer lets two begin, and so on.
        let mut served = 0;
        while served < 100 {
            let begun = all_that_may(&mut turns, now);
            assert!(!begun.is_empty());
            for (number, _) in begun {
                turns.answered(number);
                turns.ended(number, Outcome::Answered, now, 1.0);
                served += 1;
            }
        }
        assert!(!turns.backoff().is_failing());
    }

    #[test]
    fn a_session_that_waits_for_a_silent_host_gets_the_last_error() {
        let (mut turns, now) = (turns(&[1, 2, 3]), Instant::now());
        let first = all_that_may(&mut turns, now);
        assert_eq!(turns.silent(now + ERROR_WITHIN * 3), None, "no failure is known yet");
        for (number, _) in first {
            turns.ended(number, Outcome::Failed(&failed()), now, 0.0);
        }
        turns.join(4, 4);
        let now = now + LONGEST;
        let (number, _) = turns.next(now, |_| true).unwrap();
        assert_eq!(turns.silent(now + ERROR_WITHIN), None);
        assert_eq!(turns.silent(now + ERROR_WITHIN * 2), Some(&gone()));
        // It asks for a password: a slow rest is not the host's failure.
        assert!(turns.answered(number) && turns.is_answered(number));
        assert_eq!(turns.silent(now + ERROR_WITHIN * 2), None);
        // A later failure of the host doubles the pause as before.
        turns.ended(number, Outcome::Failed(&failed()), now, 1.0);
        assert_eq!(turns.backoff().pause(now), Duration::from_millis(50));
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Join(i64),
        Next,
        Answer(usize),
        Open(usize),
        Fail(usize),
        GiveUp(usize),
        Pass(u64),
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..6i64).prop_map(Step::Join),
            4 => Just(Step::Next),
            1 => any::<usize>().prop_map(Step::Answer),
            1 => any::<usize>().prop_map(Step::Open),
            1 => any::<usize>().prop_map(Step::Fail),
            1 => any::<usize>().prop_map(Step::GiveUp),
            1 => (0..2000u64).prop_map(Step::Pass),
        ]
    }

    proptest! {
        /// In any sequence of events: never more attempts than the limit; one at a time while the host fails;
        /// no tenant overtakes another that may begin; without an attempt under way or a pause, the first in
        /// the queue begins.
        #[test]
        fn turns_are_bounded_and_nobody_is_left_behind(steps in prop::collection::vec(steps(), 1..300)) {
            let (mut turns, mut now) = (turns(&[]), Instant::now());
            let (mut begun, mut order) = (Vec::<(u64, i64)>::new(), Vec::new());
            let lost = FailedAttempt::told_at_once(ClientError::ServerLost);
            for step in steps {
                match step {
                    Step::Join(tenant) => {
                        turns.join(tenant, tenant);
                        order.push(tenant);
                    }
                    Step::Next => {
                        let room = turns.backoff().at_a_time(now);
                        let failing = turns.backoff().is_failing();
                        match turns.next(now, |_| true) {
                            Some((number, tenant)) => {
                                prop_assert!(begun.len() < room && room <= 16);
                                prop_assert!(!failing || begun.is_empty());
                                let at = order.iter().position(|waits| *waits == tenant).unwrap();
                                let overtaken = &order[..at];
                                prop_assert!(overtaken.iter().all(|waits| begun.iter().any(|b| b.1 == *waits)));
                                order.remove(at);
                                begun.push((number, tenant));
                            }
                            None => prop_assert!(order.is_empty() || room == 0 || !begun.is_empty()),
                        }
                    }
                    Step::Pass(ms) => now += Duration::from_millis(ms),
                    _ if begun.is_empty() => {}
                    Step::Answer(which) => {
                        turns.answered(begun[which % begun.len()].0);
                        prop_assert!(!turns.backoff().is_failing() || turns.is_answered(begun[which % begun.len()].0));
                    }
                    Step::Open(which) | Step::Fail(which) | Step::GiveUp(which) => {
                        let (number, _) = begun.swap_remove(which % begun.len());
                        let how = match step {
                            Step::Open(_) => Outcome::Answered,
                            Step::Fail(_) => Outcome::Failed(&lost),
                            _ => Outcome::Unknown,
                        };
                        turns.ended(number, how, now, 0.5);
                        prop_assert!(turns.backoff().pause(now) <= LONGEST);
                    }
                }
            }
        }
    }
}
