//! A simulation of a fleet: the cores of many nodes, the central tables, a network that loses and delays messages,
//! processes that are killed, stopped, cut off and added, clocks that run apart or stand still. Test only.
//!
//! At each step the leases of a host are within its limit, and no node opens a server that is not leased to it, but in
//! place of one that it had when its lease ran out. When the faults end, each node soon has its part.
//!
//! A seed decides everything. `PGLOBBY_FLEET_SEEDS` runs more of them, `PGLOBBY_FLEET_FIRST` begins with another one.

mod central;
mod node;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time::Instant;

use self::{
    central::{Answer, Central, Statement},
    node::{Life, Node},
};
use super::allocation::{Demand, allocate};
use crate::data_path::lock::locked;

const HOSTS: [&str; 2] = ["east", "west"];

/// Seeds that the tests run.
const SEEDS: u64 = 200;
/// Faults happen for so long.
const FAULTY: Duration = Duration::from_secs(90);
/// Then, so long after the last fault, all must be well.
const CALM: Duration = Duration::from_secs(25);
/// A node gives up a statement after this time.
const ANSWER_WITHIN: Duration = Duration::from_millis(1500);
const TICK: Duration = Duration::from_secs(1);
const PACE: Duration = Duration::from_millis(20);

#[test]
fn the_leases_of_a_fleet_stay_within_the_budget_whatever_happens() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let count = number("PGLOBBY_FLEET_SEEDS").unwrap_or(SEEDS);
    let first = number("PGLOBBY_FLEET_FIRST").unwrap_or(1);
    let (next, violations) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let run_some = || {
        while locked(&violations).is_empty() {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                break;
            }
            if let Err(violation) = World::new(seed).run() {
                locked(&violations).push(format!("seed {seed}: {violation}"));
            }
        }
    };
    thread::scope(|threads| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            threads.spawn(run_some);
        }
    });
    let violations = locked(&violations).join("\n\n");
    assert!(
        violations.is_empty(),
        "{violations}\nrepeat with PGLOBBY_FLEET_SEEDS=1 PGLOBBY_FLEET_FIRST=SEED"
    );
}

#[derive(Debug)]
enum Event {
    Tick(usize),
    /// Renew, for a reason other than the time.
    Wake(usize),
    Arrives {
        node: usize,
        request: u64,
        statement: Statement,
    },
    Answers {
        node: usize,
        request: u64,
        answer: Answer,
    },
    GiveUp {
        node: usize,
        request: u64,
    },
    Comes {
        node: usize,
        host: usize,
    },
    Wants {
        node: usize,
    },
    Fault,
}

struct World {
    seed: u64,
    random: StdRng,
    now: Duration,
    base: Instant,
    central: Central,
    /// It answers nothing until then.
    outage_until: Duration,
    nodes: Vec<Node>,
    events: BTreeMap<u64, Event>,
    due: BinaryHeap<Reverse<(Duration, u64)>>,
    last_event: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let limits = [random.random_range(1..30), random.random_range(4..12)];
        let mut world = Self {
            seed,
            random,
            now: Duration::ZERO,
            base: Instant::now(),
            central: Central::new(limits),
            outage_until: Duration::ZERO,
            nodes: Vec::new(),
            events: BTreeMap::new(),
            due: BinaryHeap::new(),
            last_event: 0,
        };
        let nodes = world.random.random_range(1..7);
        (0..nodes).for_each(|_| world.start());
        world.after(Duration::from_secs(3), Event::Fault);
        world
    }

    fn after(&mut self, time: Duration, event: Event) {
        self.last_event += 1;
        self.events.insert(self.last_event, event);
        self.due.push(Reverse((self.now + time, self.last_event)));
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.random.random_range(from..to))
    }

    fn is_calm(&self) -> bool {
        self.now >= FAULTY
    }

    fn start(&mut self) {
        let node = self.nodes.len();
        let rate = self.random.random_range(0.92..1.08);
        self.nodes.push(Node::new(self.now, self.base, rate));
        self.after(Duration::ZERO, Event::Tick(node));
        self.after(Duration::ZERO, Event::Wants { node });
        (0..HOSTS.len()).for_each(|host| self.after(PACE, Event::Comes { node, host }));
    }

    fn run(mut self) -> Result<(), String> {
        while let Some(Reverse((at, number))) = self.due.pop() {
            if at > FAULTY + CALM {
                break;
            }
            self.now = self.now.max(at);
            let Some(event) = self.events.remove(&number) else { continue };
            self.step(event).map_err(|violation| format!("at {:?}: {violation}", self.now))?;
            self.check().map_err(|violation| format!("at {:?}: {violation}", self.now))?;
        }
        self.in_the_end()
    }

    fn check(&mut self) -> Result<(), String> {
        self.central.check()?;
        for node in self.nodes.iter_mut().filter(|node| node.is_alive()) {
            node.check(self.now, &self.central)?;
        }
        Ok(())
    }

    fn step(&mut self, event: Event) -> Result<(), String> {
        let node = match &event {
            Event::Arrives { .. } | Event::Fault => None,
            Event::Tick(node) | Event::Wake(node) | Event::Wants { node } => Some(*node),
            Event::Answers { node, .. } | Event::GiveUp { node, .. } | Event::Comes { node, .. } => {
                Some(*node)
            }
        };
        if let Some(node) = node {
            match self.nodes[node].life {
                Life::Dead => return Ok(()),
                Life::Stopped { until } if until > self.now => {
                    self.after(until - self.now, event);
                    return Ok(());
                }
                _ => self.nodes[node].life = Life::Runs,
            }
        }
        match event {
            Event::Tick(node) => {
                self.renew(node);
                self.after(TICK, Event::Tick(node));
            }
            Event::Wake(node) => self.renew(node),
            Event::Arrives { node, request, statement } => self.arrives(node, request, &statement),
            Event::Answers { node, request, answer } => self.answers(node, request, answer)?,
            Event::GiveUp { node, request } if self.nodes[node].request == request => {
                self.nodes[node].give_up()
            }
            Event::GiveUp { .. } => {}
            Event::Comes { node, host } => {
                if self.nodes[node].give_back(host, self.now) {
                    self.wake(node);
                }
                self.adapt(node)?;
                let is_slow = !self.is_calm() && self.random.random_bool(0.05);
                let next = if is_slow { self.ms(2000, 9000) } else { self.ms(5, 300) };
                self.after(next, Event::Comes { node, host });
            }
            Event::Wants { node } => {
                if !self.is_calm() {
                    let host = self.random.random_range(0..HOSTS.len());
                    self.nodes[node].hosts[host].wanted = self.random.random_range(0..15);
                    let next = self.ms(100, 8000);
                    self.after(next, Event::Wants { node });
                }
                self.adapt(node)?;
            }
            Event::Fault => self.fault(),
        }
        Ok(())
    }

    fn wake(&mut self, node: usize) {
        self.after(PACE, Event::Wake(node));
    }

    fn adapt(&mut self, node: usize) -> Result<(), String> {
        let mut is_short = false;
        for host in 0..HOSTS.len() {
            is_short |= self.nodes[node].adapt(host, self.now, &self.central)?;
        }
        // As the program: not at each wish.
        if is_short && self.random.random_bool(0.1) {
            self.wake(node);
        }
        Ok(())
    }

    fn renew(&mut self, node: usize) {
        if let Some(statement) = self.nodes[node].renew(self.now) {
            self.send(node, statement);
        }
    }

    fn send(&mut self, node: usize, statement: Statement) {
        let request = self.nodes[node].request;
        self.after(ANSWER_WITHIN, Event::GiveUp { node, request });
        if !self.is_lost(node) {
            let delay = self.delay(node);
            self.after(delay, Event::Arrives { node, request, statement });
        }
    }

    fn is_lost(&mut self, node: usize) -> bool {
        self.nodes[node].is_cut_off || (!self.is_calm() && self.random.random_bool(0.02))
    }

    /// Sometimes longer than the node waits.
    fn delay(&mut self, node: usize) -> Duration {
        if self.nodes[node].is_slow && self.random.random_bool(0.4) {
            return self.ms(200, 4000);
        }
        match self.random.random_range(0..100) {
            0 if !self.is_calm() => self.ms(1000, 4000),
            1..10 if !self.is_calm() => self.ms(20, 1000),
            _ => self.ms(0, 8),
        }
    }

    fn arrives(&mut self, node: usize, request: u64, statement: &Statement) {
        if self.now < self.outage_until {
            return;
        }
        let (answer, told) = self.central.run(statement);
        self.tell(node, &told);
        if !self.is_lost(node) {
            let delay = self.delay(node);
            self.after(delay, Event::Answers { node, request, answer });
        }
    }

    fn tell(&mut self, from: usize, told: &[String]) {
        if told.is_empty() {
            return;
        }
        for node in (0..self.nodes.len()).filter(|node| *node != from) {
            if !self.is_lost(node) {
                let delay = self.delay(node);
                self.after(delay, Event::Wake(node));
            }
        }
    }

    fn answers(&mut self, node: usize, request: u64, answer: Answer) -> Result<(), String> {
        if self.nodes[node].request != request || !self.nodes[node].is_waiting {
            return Ok(());
        }
        let (next, again) = self.nodes[node].answered(answer, self.now);
        let told = self.nodes[node].told();
        if !told.is_empty() && !self.nodes[node].is_cut_off && self.now >= self.outage_until {
            self.tell(node, &told);
        }
        if let Some(statement) = next {
            self.send(node, statement);
        }
        if again {
            self.wake(node);
        }
        self.adapt(node)
    }

    fn fault(&mut self) {
        if self.is_calm() {
            self.outage_until = Duration::ZERO;
            self.nodes.iter_mut().for_each(|node| (node.is_cut_off, node.is_slow) = (false, false));
            return;
        }
        let node = self.random.random_range(0..self.nodes.len());
        let is_alive = self.nodes[node].is_alive();
        match self.random.random_range(0..15) {
            0 if is_alive => self.kill(node),
            1 if is_alive => {
                let id = self.nodes[node].id;
                self.kill(node);
                id.into_iter().for_each(|id| self.central.remove_node(id));
            }
            2 | 3 if self.nodes.iter().filter(|node| node.is_alive()).count() < 8 => self.start(),
            4 | 5 if is_alive => {
                let until = (self.now + self.ms(100, 15_000)).min(FAULTY);
                let suspended = self.random.random_bool(0.3);
                self.nodes[node].stop(self.now, until, suspended);
            }
            6 | 7 => self.nodes[node].is_cut_off = true,
            12..14 => self.nodes[node].is_slow = true,
            14 => self.nodes.iter_mut().for_each(|node| node.is_slow = false),
            8 | 9 => self.nodes.iter_mut().for_each(|node| node.is_cut_off = false),
            10 => self.outage_until = (self.now + self.ms(500, 20_000)).min(FAULTY),
            _ => {
                let (host, limit) = (self.random.random_range(0..2), self.random.random_range(0..30));
                self.central.set_limit(host, limit);
            }
        }
        let next = self.ms(200, 6000).min(FAULTY.saturating_sub(self.now) + PACE);
        self.after(next, Event::Fault);
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node].life = Life::Dead;
        self.nodes[node].hosts.iter_mut().for_each(|host| host.open = 0);
    }

    /// The faults are over: each node has its part, and no place is left free while a node wants it.
    fn in_the_end(mut self) -> Result<(), String> {
        let mut living: Vec<&Node> = self.nodes.iter().filter(|node| node.is_alive()).collect();
        living.sort_by_key(|node| node.id);
        for (at, name) in HOSTS.iter().enumerate() {
            let limit = self.central.hosts[at].limit;
            let demand = |node: &&Node| Demand { wanted: node.hosts[at].wanted, weight: 1 };
            let demands: Vec<_> = living.iter().map(demand).collect();
            let parts = allocate(limit, &demands);
            let open: Vec<u32> = living.iter().map(|node| node.hosts[at].open).collect();
            let has_less = |((open, part), demand): ((&u32, &u32), &Demand)| *open < demand.wanted.min(*part);
            let all = open.iter().zip(&parts).zip(&demands);
            if all.clone().any(has_less) || open.iter().sum::<u32>() > limit {
                let rows = &self.central.hosts[at];
                return Err(format!(
                    "{name}: {open:?} are open of {parts:?}, {demands:?}\n{rows:?}\n{living:#?}"
                ));
            }
        }
        self.central.check().map_err(|violation| format!("{} in the end: {violation}", self.seed))
    }
}
