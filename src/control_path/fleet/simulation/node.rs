//! One node: the core, a clock of its own, and servers that it opens and closes as its leases allow.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    HOSTS,
    central::{Answer, Central, Statement},
};
use crate::{
    control_path::fleet::{
        allocation::Demand,
        lease_decision::Usage,
        lease_keeper::{LeaseKeeper, Plan, VALID_FOR},
    },
    data_path::pool::host_lease::HostLease,
};

#[derive(Debug)]
pub struct Node {
    pub id: Option<i64>,
    keeper: LeaseKeeper,
    clock: Clock,
    pub life: Life,
    /// Its messages get lost, in both directions.
    pub is_cut_off: bool,
    /// They arrive late.
    pub is_slow: bool,
    pub hosts: Vec<OnHost>,
    /// The number of the request under way; later answers to others are dropped.
    pub request: u64,
    pub is_waiting: bool,
    /// Look again when the request is answered.
    again: bool,
    asked: Duration,
    /// The machine was suspended since then.
    asked_before_suspension: bool,
    plan: Plan,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    Runs,
    /// Until that time of the simulation.
    Stopped {
        until: Duration,
    },
    Dead,
}

/// What a node has on one host.
#[derive(Debug)]
pub struct OnHost {
    lease: HostLease,
    pub wanted: u32,
    pub open: u32,
    /// The lease did not say how many: no other node lived.
    is_alone: bool,
    /// The machine was suspended since the last answer, and its clock with it: the lease seems valid.
    is_dazed: bool,
    /// Its lease had run out or was lost, and it has more open than it has got since.
    recovers: bool,
}

#[derive(Debug)]
struct Clock {
    base: Instant,
    /// Time of the simulation at which it shows zero.
    zero: Duration,
    rate: f64,
    lost: Duration,
}

impl Clock {
    fn at(&self, now: Duration) -> Duration {
        now.saturating_sub(self.zero).mul_f64(self.rate).saturating_sub(self.lost)
    }
}

impl Node {
    pub fn new(now: Duration, base: Instant, rate: f64) -> Self {
        let host = || OnHost {
            lease: HostLease::NOTHING_YET,
            wanted: 0,
            open: 0,
            is_alone: false,
            is_dazed: false,
            recovers: false,
        };
        Self {
            id: None,
            keeper: LeaseKeeper::default(),
            clock: Clock { base, zero: now, rate, lost: Duration::ZERO },
            life: Life::Runs,
            is_cut_off: false,
            is_slow: false,
            hosts: HOSTS.iter().map(|_| host()).collect(),
            request: 0,
            is_waiting: false,
            again: false,
            asked: Duration::ZERO,
            asked_before_suspension: false,
            plan: Plan::default(),
        }
    }

    pub fn is_alive(&self) -> bool {
        self.life != Life::Dead
    }

    /// SIGSTOP; `suspended`: the whole machine, with its clock.
    pub fn stop(&mut self, now: Duration, until: Duration, suspended: bool) {
        self.life = Life::Stopped { until };
        if suspended {
            self.clock.lost += (until - now).mul_f64(self.clock.rate);
            self.asked_before_suspension = true;
            self.hosts.iter_mut().for_each(|host| host.is_dazed = true);
        }
    }

    /// The next renewal begins; `None`: one is under way.
    pub fn renew(&mut self, now: Duration) -> Option<Statement> {
        if self.is_waiting {
            self.again = true;
            return None;
        }
        self.again = false;
        self.asked = self.clock.at(now);
        self.asked_before_suspension = false;
        Some(self.send(self.id.map_or(Statement::Register, |id| Statement::Renew { id })))
    }

    fn send(&mut self, statement: Statement) -> Statement {
        self.request += 1;
        self.is_waiting = true;
        statement
    }

    /// No answer in time: the connection is given up.
    pub fn give_up(&mut self) {
        self.is_waiting = false;
    }

    /// What it sends next. The second value: it renews again at once.
    pub fn answered(&mut self, answer: Answer, now: Duration) -> (Option<Statement>, bool) {
        self.is_waiting = false;
        match answer {
            Answer::Registered(id) => {
                self.id = Some(id);
                return (None, true);
            }
            Answer::Rows(None) => {
                self.id = None;
                return (None, true);
            }
            Answer::Rows(Some(snapshot)) => {
                let Some(own) = self.id else { return (None, true) };
                let usage = |name: &str| self.hosts[position(name)].usage();
                let times = (self.asked, self.clock.at(now));
                self.plan = self.keeper.read(own, times, &snapshot, usage);
                let is_dazed = self.asked_before_suspension;
                self.hosts.iter_mut().for_each(|host| host.is_dazed &= is_dazed);
                for held in self.plan.leases.clone() {
                    self.set_lease(&held.host, held.servers);
                }
                if !self.plan.changes.is_empty() {
                    self.keeper.sending(&self.plan);
                    let changes = self.plan.changes.clone();
                    return (Some(self.send(Statement::Change { id: own, changes })), false);
                }
            }
            Answer::Made(made) => {
                let all = made.len() == self.plan.changes.len();
                for held in self.keeper.made(&self.plan.changes, &made) {
                    self.set_lease(&held.host, held.servers);
                }
                self.again |= !all;
            }
            Answer::Removed => return (None, true),
        }
        let removals = std::mem::take(&mut self.plan.removals);
        if !removals.is_empty() {
            let gone = self.plan.gone.clone();
            return (Some(self.send(Statement::Remove { removals, gone })), false);
        }
        (None, self.again)
    }

    pub fn told(&mut self) -> Vec<String> {
        std::mem::take(&mut self.plan.tell)
    }

    fn set_lease(&mut self, name: &str, servers: Option<u32>) {
        let host = &mut self.hosts[position(name)];
        let until = (!self.plan.is_alone).then(|| self.clock.base + self.asked + VALID_FOR);
        match servers {
            Some(servers) => host.lease = HostLease::Part { servers: servers as usize, until },
            None => host.lease.run_out(host.open as usize),
        }
        host.is_alone = self.plan.is_alone;
    }

    /// Opens and closes servers as far as wishes and the lease go. Returns whether one more is wanted than the lease covers.
    pub fn adapt(&mut self, at: usize, now: Duration, central: &Central) -> Result<bool, String> {
        let time = self.clock.base + self.clock.at(now);
        let granted = central.granted(self.id, at);
        let host = &mut self.hosts[at];
        loop {
            let servers =
                u32::try_from(host.lease.servers(usize::MAX, host.open as usize, time)).unwrap_or(u32::MAX);
            if host.open < host.wanted && host.open < servers {
                let replaces =
                    matches!(host.lease, HostLease::RunOut { servers } if (host.open as usize) < servers);
                if host.open >= granted && !replaces && !host.is_alone && !host.is_dazed {
                    return Err(format!("opened a server that is not leased, {granted} are: {host:?}"));
                }
                host.open += 1;
            } else if host.open > servers && host.open > host.wanted {
                host.open -= 1;
            } else {
                return Ok(host.open < host.wanted);
            }
        }
    }

    /// A node whose lease is valid has no more open than its row says.
    pub fn check(&mut self, now: Duration, central: &Central) -> Result<(), String> {
        let time = self.clock.base + self.clock.at(now);
        for (at, host) in self.hosts.iter_mut().enumerate() {
            let granted = central.granted(self.id, at);
            let has_run_out = match host.lease {
                HostLease::Part { until, .. } => until.is_some_and(|until| time > until),
                HostLease::RunOut { .. } | HostLease::Share { .. } => true,
                HostLease::Whole => false,
            };
            let is_excused = host.is_alone || host.is_dazed || has_run_out;
            host.recovers = host.open > granted && (host.recovers || is_excused);
            if host.open > granted && !host.recovers {
                return Err(format!("more servers are open than the {granted} that are leased: {host:?}"));
            }
        }
        Ok(())
    }

    /// A busy server comes back: it is closed if there are too many. Returns whether it was.
    pub fn give_back(&mut self, at: usize, now: Duration) -> bool {
        let time = self.clock.base + self.clock.at(now);
        let host = &mut self.hosts[at];
        let closes = host.open as usize > host.lease.servers(usize::MAX, host.open as usize, time);
        host.open -= u32::from(closes);
        closes
    }
}

impl OnHost {
    fn usage(&self) -> Usage {
        Usage { open: self.open, demand: Demand { wanted: self.wanted, weight: 1 } }
    }
}

pub fn position(name: &str) -> usize {
    HOSTS.iter().position(|host| *host == name).unwrap()
}
