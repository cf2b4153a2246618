//! Slows down password guessing: the answer to a login is delayed by the number of recent failures from its
//! address and of its name.
//!
//! The logins of an address are answered one after another, with growing pauses. A login that cannot be
//! answered within `failed_login_delay_max` is refused, with a right or a wrong password. A right password is
//! answered at once if the same login has succeeded from the same address before, and within a second if
//! nothing has failed from its address or some login has succeeded there. So a guesser cannot lock out other
//! addresses. An unknown name is delayed like any other.
//!
//! Pure: the time is an argument. Names are stored as hashes, so that a long name takes no memory.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::Mutex,
    time::{Duration, Instant},
};

use super::connection_limits::ClientNetwork;
use crate::{config::FailedLoginRules, data_path::lock::locked};

/// The pause after the first failure beyond `failed_logins_free`; each further failure doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest delay of a right password from an address without suspicion.
const MODEST: Duration = Duration::from_secs(1);

/// The result of a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Right,
    /// The password is wrong, there is no such login, or it may not be used.
    Wrong,
    /// The central database did not answer.
    Unknown,
}

/// How a login is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delay {
    /// The time until the answer.
    pub wait: Duration,
    /// The login is refused, with a right or a wrong password.
    pub is_refused: bool,
    /// The failure is logged.
    pub is_logged: bool,
}

/// Recent failures and successes.
#[derive(Debug, Default)]
pub struct FailedLogins {
    hasher: RandomState,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    origins: Recent<PerNetwork>,
    logins: Recent<u32>,
    succeeded: Recent<()>,
    /// The second in which log lines are counted, and their count.
    logged: Option<(Instant, u32)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct PerNetwork {
    failures: u32,
    /// When the next answer may be sent.
    next_at: Option<Instant>,
    has_succeeded: bool,
}

/// A map that forgets. An entry is found for at least one period after its last change and is gone after two.
/// The map has at most twice its limit of entries. No entry needs a timer or a search.
#[derive(Debug)]
struct Recent<V> {
    fresh: HashMap<u64, V>,
    older: HashMap<u64, V>,
    turned_at: Option<Instant>,
}

impl<V> Default for Recent<V> {
    fn default() -> Self {
        Self { fresh: HashMap::new(), older: HashMap::new(), turned_at: None }
    }
}

impl<V: Copy> Recent<V> {
    fn turn(&mut self, now: Instant, period: Duration) {
        let since = *self.turned_at.get_or_insert(now);
        let age = now.saturating_duration_since(since);
        if age >= period {
            self.older = std::mem::take(&mut self.fresh);
            if age >= period.saturating_mul(2) {
                self.older = HashMap::new();
            }
            self.turned_at = Some(now);
        }
    }

    fn get(&self, key: u64) -> Option<V> {
        self.fresh.get(&key).or_else(|| self.older.get(&key)).copied()
    }

    fn set(&mut self, key: u64, value: V, most: usize) {
        if self.fresh.len() >= most && !self.fresh.contains_key(&key) {
            self.older = std::mem::take(&mut self.fresh);
        }
        self.fresh.insert(key, value);
    }
}

impl FailedLogins {
    /// Records the result of a login and returns how to answer it.
    pub fn judge(
        &self,
        origin: ClientNetwork,
        login: &str,
        outcome: Outcome,
        now: Instant,
        rules: &FailedLoginRules,
    ) -> Delay {
        let keys = Keys {
            origin: self.hasher.hash_one(origin),
            login: self.hasher.hash_one(login),
            pair: self.hasher.hash_one((origin, login)),
        };
        locked(&self.state).judge(keys, outcome, now, rules)
    }
}

struct Keys {
    origin: u64,
    login: u64,
    pair: u64,
}

impl State {
    fn judge(&mut self, keys: Keys, outcome: Outcome, now: Instant, rules: &FailedLoginRules) -> Delay {
        self.origins.turn(now, rules.remembered);
        self.logins.turn(now, rules.remembered);
        self.succeeded.turn(now, rules.success_remembered);
        let mut origin = self.origins.get(keys.origin).unwrap_or_default();
        let mut of_login = self.logins.get(keys.login).unwrap_or_default();
        let is_known = self.succeeded.get(keys.pair).is_some();
        let is_guessers = origin.failures > 0 && !origin.has_succeeded;
        let is_right = outcome == Outcome::Right;

        // A right password is treated as a wrong one until it may be reported, so that the time does not give
        // it away.
        let failures = origin.failures.saturating_add(1);
        let pause = match outcome {
            Outcome::Unknown => rules.pause(failures).max(FIRST_PAUSE),
            _ => rules.pause(failures),
        };
        let begins_at = origin.next_at.filter(|_| !pause.is_zero()).map_or(now, |next| next.max(now));
        let answer_at = begins_at + pause;
        let modest = rules.pause(of_login.saturating_add(1)).min(MODEST).min(rules.delay_max);
        let wait = answer_at.saturating_duration_since(now).max(modest);
        let is_late = wait > rules.delay_max;
        let wait = wait.min(rules.delay_max);

        if is_right && (is_known || !is_guessers) {
            self.succeeded.set(keys.pair, (), rules.tracked_max);
            origin.has_succeeded = true;
            self.origins.set(keys.origin, origin, rules.tracked_max);
            let wait = if is_known { Duration::ZERO } else { wait.min(modest) };
            return Delay { wait, is_refused: false, is_logged: false };
        }
        // Retries while the central database is unavailable need not be guesses: they are delayed but not
        // counted.
        if outcome == Outcome::Unknown {
            origin.next_at = Some(answer_at.min(now + MODEST));
            self.origins.set(keys.origin, origin, rules.tracked_max);
            return Delay { wait: wait.min(MODEST), is_refused: false, is_logged: false };
        }
        if !is_late {
            origin.next_at = Some(answer_at);
        }
        if is_right && !is_late {
            self.succeeded.set(keys.pair, (), rules.tracked_max);
            origin.has_succeeded = true;
        } else {
            origin.failures = failures;
            of_login = of_login.saturating_add(1);
            self.logins.set(keys.login, of_login, rules.tracked_max);
        }
        self.origins.set(keys.origin, origin, rules.tracked_max);
        let is_logged = !is_late && !is_right && self.may_log(now, rules);
        Delay { wait, is_refused: is_late, is_logged }
    }

    /// Whether another line may be logged in this second; the limit is for all addresses together.
    fn may_log(&mut self, now: Instant, rules: &FailedLoginRules) -> bool {
        let (since, lines) = match self.logged {
            Some((since, lines)) if now.saturating_duration_since(since) < Duration::from_secs(1) => {
                (since, lines)
            }
            _ => (now, 0),
        };
        self.logged = Some((since, lines.saturating_add(1)));
        lines < rules.logged_max
    }
}

impl FailedLoginRules {
    /// The pause after this number of failures.
    fn pause(&self, failures: u32) -> Duration {
        match failures.saturating_sub(self.free) {
            0 => Duration::ZERO,
            counted => FIRST_PAUSE.saturating_mul(1 << (counted - 1).min(20)).min(self.delay_max),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    const RULES: FailedLoginRules = FailedLoginRules {
        free: 3,
        delay_max: Duration::from_secs(5),
        remembered: Duration::from_secs(600),
        success_remembered: Duration::from_secs(86_400),
        tracked_max: 100,
        logged_max: 10,
    };

    fn at(last: u8) -> ClientNetwork {
        ClientNetwork::of(Some(IpAddr::from([10, 0, 0, last])))
    }

    fn of(is_right: bool) -> Outcome {
        if is_right { Outcome::Right } else { Outcome::Wrong }
    }

    fn waits(delay: Delay) -> Option<u128> {
        (!delay.is_refused).then_some(delay.wait.as_millis())
    }

    #[test]
    fn an_address_that_guesses_is_answered_ever_more_slowly_whether_it_guesses_right_or_wrong() {
        let (logins, now) = (FailedLogins::default(), Instant::now());
        let guess = |is_right, now| waits(logins.judge(at(1), "alice", of(is_right), now, &RULES));
        for wait in [0, 0, 0, 50, 150, 350, 750, 1550, 3150] {
            assert_eq!(guess(false, now), Some(wait));
        }
        // All at once: what would be told later than after five seconds is not told.
        assert_eq!((guess(false, now), guess(true, now), guess(false, now)), (None, None, None));
        // One after another: five seconds each, from then on.
        let later = now + Duration::from_secs(60);
        assert_eq!(guess(false, later), Some(5000));
        assert_eq!(guess(true, later + RULES.delay_max), Some(5000));
        // It has succeeded from there, with this login.
        assert_eq!(guess(true, later + RULES.delay_max), Some(0));
    }

    #[test]
    fn nobody_else_is_locked_out_while_somebody_guesses() {
        let (logins, now) = (FailedLogins::default(), Instant::now());
        let judge = |from, login, is_right| waits(logins.judge(at(from), login, of(is_right), now, &RULES));
        assert_eq!(judge(1, "alice", true), Some(0));
        for _ in 0..1000 {
            judge(1, "alice", false);
            judge(2, "alice", false);
        }
        // From where it has succeeded; from elsewhere; and with another login, from an address where one has
        // succeeded.
        assert_eq!(judge(1, "alice", true), Some(0));
        assert_eq!(judge(3, "alice", true), Some(1000));
        assert_eq!(judge(3, "alice", true), Some(0));
        assert!(judge(1, "bob", true) <= Some(1000));
        // Wrong ones wait also after another login of the address has succeeded.
        assert_eq!(judge(1, "alice", false), None);
    }

    #[test]
    fn an_outage_of_the_central_database_has_a_pace_and_leaves_nothing() {
        let (logins, now) = (FailedLogins::default(), Instant::now());
        let ask = |outcome| logins.judge(at(1), "alice", outcome, now, &RULES);
        let asked: Vec<_> = (0..100).map(|_| waits(ask(Outcome::Unknown)).unwrap()).collect();
        assert_eq!((asked[0], asked[1], asked[99]), (50, 100, 1000));
        assert_eq!(ask(Outcome::Right).wait, Duration::ZERO);
    }

    #[test]
    fn names_are_all_the_same() {
        let now = Instant::now();
        let course = |name: &str| {
            let logins = FailedLogins::default();
            (0..30).map(|_| logins.judge(at(1), name, Outcome::Wrong, now, &RULES)).collect::<Vec<_>>()
        };
        assert_eq!(course("alice"), course("no such name"));
    }

    #[test]
    fn failures_are_forgotten_and_lines_in_the_log_are_limited() {
        let (logins, now) = (FailedLogins::default(), Instant::now());
        let lines = (0..50)
            .filter(|of| logins.judge(at(*of), "alice", Outcome::Wrong, now, &RULES).is_logged)
            .count();
        assert_eq!(lines, 10);
        for _ in 0..10 {
            logins.judge(at(1), "alice", Outcome::Wrong, now, &RULES);
        }
        let much_later = now + RULES.remembered * 2;
        let delay = logins.judge(at(1), "alice", Outcome::Wrong, much_later, &RULES);
        assert_eq!(delay, Delay { wait: Duration::ZERO, is_refused: false, is_logged: true });
    }

    proptest! {
        /// Whatever comes: no wait is longer than the limit, and no table grows past twice its own.
        #[test]
        fn waits_and_tables_are_bounded(steps in proptest::collection::vec((0u8..250, 0u16..500, any::<bool>(), 0u64..3000), 1..600)) {
            let (logins, mut now) = (FailedLogins::default(), Instant::now());
            let rules = FailedLoginRules { tracked_max: 20, ..RULES };
            for (from, name, is_right, pause_ms) in steps {
                now += Duration::from_millis(pause_ms);
                let delay = logins.judge(at(from), &name.to_string(), of(is_right), now, &rules);
                prop_assert!(delay.wait <= rules.delay_max);
                let state = logins.state.lock().unwrap();
                for size in [
                    state.origins.fresh.len() + state.origins.older.len(),
                    state.logins.fresh.len() + state.logins.older.len(),
                    state.succeeded.fresh.len() + state.succeeded.older.len(),
                ] {
                    prop_assert!(size <= 40);
                }
            }
        }
    }
}
