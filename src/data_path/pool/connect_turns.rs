//! Whose turn it is to open a server on a host. All pools of a host share `max_connecting_servers`, and the pauses after a failure
//! that is the host's: while it is down, one of them tries, and the others read what it has found.
//!
//! Tenants take turns in the order in which they came. A tenant takes three at most for each one that it leaves free, so that
//! there is one for the next tenant at once, however long the logins of the first take.
//!
//! Pure: who waits is a `W`, a tenant is a number, the time and the jitter come in as arguments.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::connect_backoff::{Attempt, ConnectBackoff, TOLD_WITHIN};
use crate::error::ClientError;

/// One tenant's attempts for each one that is left free.
const FOR_EACH_FREE: usize = 3;

/// One host's.
#[derive(Debug)]
pub struct ConnectTurns<W> {
    most: usize,
    longest_pause: Duration,
    backoff: ConnectBackoff,
    under_way: Vec<UnderWay>,
    waiting: VecDeque<(i64, W)>,
    next_number: u64,
}

#[derive(Debug)]
struct UnderWay {
    number: u64,
    tenant: i64,
    began: Instant,
    attempt: Attempt,
    answered: bool,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy)]
pub enum Ended<'a> {
    /// A server was opened, or refused for the tenant's own sake.
    Answered,
    /// The host failed.
    Failed(&'a ClientError),
    /// Nobody knows: it was given up.
    Unknown,
}

impl<W> ConnectTurns<W> {
    /// Up to `most` attempts at a time; pauses for up to `longest_pause` after failures.
    pub fn new(most: usize, longest_pause: Duration) -> Self {
        let backoff = ConnectBackoff::new(most, longest_pause);
        let (under_way, waiting) = (Vec::new(), VecDeque::new());
        Self { most, longest_pause, backoff, under_way, waiting, next_number: 0 }
    }

    /// The configuration has changed. What failed before is forgotten if it has.
    pub fn set_limits(&mut self, most: usize, longest_pause: Duration) {
        if (self.most, self.longest_pause) != (most, longest_pause) {
            (self.most, self.longest_pause) = (most, longest_pause);
            self.forget();
        }
    }

    /// Forgets what has failed before.
    pub fn forget(&mut self) {
        self.backoff = ConnectBackoff::new(self.most, self.longest_pause);
    }

    /// What failures have led to.
    pub fn backoff(&self) -> &ConnectBackoff {
        &self.backoff
    }

    /// Waits for its turn, behind those who have come before.
    pub fn join(&mut self, tenant: i64, waiter: W) {
        self.waiting.push_back((tenant, waiter));
    }

    /// Who may begin now, with the number of its attempt; who does not `want` to any more is forgotten.
    pub fn next(&mut self, now: Instant, want: impl Fn(&W) -> bool) -> Option<(u64, W)> {
        let free = self.backoff.at_a_time(now).saturating_sub(self.under_way.len());
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
        self.under_way.iter().filter(|attempt| attempt.tenant == tenant).count()
    }

    fn begin(&mut self, tenant: i64, now: Instant) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        let attempt = self.backoff.begin();
        self.under_way.push(UnderWay { number, tenant, began: now, attempt, answered: false });
        number
    }

    /// The host has asked for a proof of identity: it is up, whatever becomes of this attempt. Returns whether it was failing.
    pub fn answered(&mut self, number: u64) -> bool {
        let attempt = self.under_way.iter_mut().find(|attempt| attempt.number == number);
        let Some(attempt) = attempt.filter(|attempt| !attempt.answered) else { return false };
        attempt.answered = true;
        let was_failing = self.backoff.is_failing();
        self.backoff.answered();
        was_failing
    }

    /// Whether the host has asked for a proof of identity.
    pub fn is_answered(&self, number: u64) -> bool {
        self.under_way.iter().any(|attempt| attempt.number == number && attempt.answered)
    }

    /// An attempt has ended. Returns whether that is worth a line in the log.
    pub fn ended(&mut self, number: u64, how: Ended<'_>, now: Instant, jitter: f64) -> bool {
        let Some(at) = self.under_way.iter().position(|attempt| attempt.number == number) else {
            return false;
        };
        let attempt = self.under_way.swap_remove(at);
        match how {
            Ended::Answered => {
                self.backoff.succeeded();
                false
            }
            Ended::Failed(reason) => self.backoff.failed(attempt.attempt, reason, now, jitter),
            Ended::Unknown => false,
        }
    }

    /// Those who wait and are `such`; they wait no more.
    pub fn take_out(&mut self, such: impl Fn(&W) -> bool) -> Vec<W> {
        let (taken, left): (VecDeque<_>, _) = self.waiting.drain(..).partition(|(_, waiter)| such(waiter));
        self.waiting = left;
        taken.into_iter().map(|(_, waiter)| waiter).collect()
    }

    /// What sessions are told that have waited for [`TOLD_WITHIN`]: the host fails, and the attempt that is under way has had no
    /// answer for as long.
    pub fn silent(&self, now: Instant) -> Option<&ClientError> {
        let silent = |attempt: &UnderWay| {
            !attempt.answered && now.saturating_duration_since(attempt.began) > TOLD_WITHIN
        };
        self.backoff.reason().filter(|_| self.under_way.iter().any(silent))
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
        for most in 1..=3 {
            let mut turns = ConnectTurns::new(most, LONGEST);
            (0..9).for_each(|_| turns.join(1, 1));
            assert_eq!(all_that_may(&mut turns, now).len(), most);
        }
    }

    #[test]
    fn a_host_that_is_down_is_tried_by_one_and_goes_on_with_all_when_it_answers() {
        let tenants: Vec<i64> = (0..100).collect();
        let (mut turns, mut now) = (turns(&tenants), Instant::now());
        let begun = all_that_may(&mut turns, now);
        assert_eq!(begun.len(), 16);
        for (number, tenant) in begun {
            turns.ended(number, Ended::Failed(&gone()), now, 1.0);
            turns.join(tenant, tenant);
        }
        let mut attempts = 0;
        for _ in 0..40 {
            now += Duration::from_millis(100);
            for (number, tenant) in all_that_may(&mut turns, now) {
                turns.ended(number, Ended::Failed(&gone()), now, 1.0);
                turns.join(tenant, tenant);
                attempts += 1;
            }
        }
        assert!((4..=8).contains(&attempts), "{attempts} attempts in 4 s");
        now += LONGEST;
        // Up again: the first answer, no matter what comes of it, lets two begin, and so on.
        let mut served = 0;
        while served < 100 {
            let begun = all_that_may(&mut turns, now);
            assert!(!begun.is_empty());
            for (number, _) in begun {
                turns.answered(number);
                turns.ended(number, Ended::Answered, now, 1.0);
                served += 1;
            }
        }
        assert!(!turns.backoff().is_failing());
    }

    #[test]
    fn who_waits_for_a_silent_host_is_told_what_was_found_before() {
        let (mut turns, now) = (turns(&[1, 2, 3]), Instant::now());
        let first = all_that_may(&mut turns, now);
        assert_eq!(turns.silent(now + TOLD_WITHIN * 3), None, "nothing is known yet");
        for (number, _) in first {
            turns.ended(number, Ended::Failed(&gone()), now, 0.0);
        }
        turns.join(4, 4);
        let now = now + LONGEST;
        let (number, _) = turns.next(now, |_| true).unwrap();
        assert_eq!(turns.silent(now + TOLD_WITHIN), None);
        assert_eq!(turns.silent(now + TOLD_WITHIN * 2), Some(&gone()));
        // It asks for a password: however long the rest takes, it is not the host.
        assert!(turns.answered(number) && turns.is_answered(number));
        assert_eq!(turns.silent(now + TOLD_WITHIN * 2), None);
        // But a failure of the host's behind that makes the pause grow as before.
        turns.ended(number, Ended::Failed(&gone()), now, 1.0);
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
        /// Whatever happens: never more than the limit, one at a time while the host fails, no two tenants overtake each other
        /// where both may begin, and where nothing is under way and no pause lasts, the first who waits begins.
        #[test]
        fn turns_are_bounded_and_nobody_is_left_behind(steps in prop::collection::vec(steps(), 1..300)) {
            let (mut turns, mut now) = (turns(&[]), Instant::now());
            let (mut begun, mut order) = (Vec::<(u64, i64)>::new(), Vec::new());
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
                            Step::Open(_) => Ended::Answered,
                            Step::Fail(_) => Ended::Failed(&ClientError::ServerLost),
                            _ => Ended::Unknown,
                        };
                        turns.ended(number, how, now, 0.5);
                        prop_assert!(turns.backoff().pause(now) <= LONGEST);
                    }
                }
            }
        }
    }
}
