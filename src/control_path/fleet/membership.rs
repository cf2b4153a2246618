//! Keeps this node's rows up to date: its beat, and its leases. Once a second, and sooner when a pool is short of
//! servers, when a server has ended that is to be handed back, or when another node says so.
//!
//! It has a connection of its own: nothing else delays a beat.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};
use tokio_postgres::Client;
use tracing::{info, warn};

use super::{
    Fleet,
    allocation::Demand,
    lease_decision::Usage,
    lease_keeper::{LeaseKeeper, Plan, VALID_FOR},
    lease_rows, nodes,
    peak::Peak,
    presence::News,
    registration::Inserted,
};
use crate::{
    control_path::{
        central::{Central, causes},
        rhythm,
    },
    data_path::{
        lock::locked,
        pool::{TenantPools, host_budget::HostBudget, host_lease::HostLease, lease_requests::LeaseRequest},
    },
};

/// Interval of renewals, if nothing happens. After an earlier one, half as long or half as long again.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// The shortest time between two renewals.
const PACE: Duration = Duration::from_millis(20);
/// The longest time between two renewals while pools are short and nothing is to be had.
const SHORT_PACE_MAX: Duration = Duration::from_millis(500);
/// Without an answer for so long, the connection is replaced.
const ANSWER_WITHIN: Duration = Duration::from_millis(1500);
/// How often rows of nodes that are gone for long are removed.
const FORGET_EVERY: Duration = Duration::from_secs(60);
/// How often a schema without these tables is looked at again.
const OLDER_SCHEMA_PAUSE: Duration = Duration::from_secs(10);

/// Renews until it is dropped. `told` wakes it when another node has changed its leases.
pub async fn keep(central: Central, fleet: Arc<Fleet>, pools: Arc<TenantPools>, told: Arc<Notify>) {
    let mut membership = Membership::new(central, fleet, pools);
    loop {
        let renewed = membership.renew().await;
        let more = membership.note(&renewed);
        membership.pause(&told, more).await;
    }
}

struct Membership {
    central: Central,
    fleet: Arc<Fleet>,
    pools: Arc<TenantPools>,
    client: Option<Client>,
    keeper: LeaseKeeper,
    peaks: HashMap<String, Peak>,
    names: BTreeMap<i64, String>,
    started: Instant,
    /// When the last renewal was sent that had an answer.
    renewed: Instant,
    is_alone: bool,
    is_lost: bool,
    has_run_out: bool,
    forgotten: Instant,
    short_pace: Duration,
}

/// What a renewal has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Renewed {
    /// `again`: there is more to do at once.
    Done { again: bool, has_more: bool },
    /// The central schema has no leases.
    OlderSchema,
}

impl Membership {
    fn new(central: Central, fleet: Arc<Fleet>, pools: Arc<TenantPools>) -> Self {
        let now = Instant::now();
        // Of a node that has begun without the central database: what its snapshot says.
        let begun_with = pools.lease_requests.of_new_host();
        let is_alone = fleet.is_alone.load(Ordering::Relaxed);
        Self {
            central,
            fleet,
            pools,
            client: None,
            keeper: LeaseKeeper::default(),
            peaks: HashMap::new(),
            names: BTreeMap::new(),
            started: now,
            renewed: now,
            is_alone,
            is_lost: false,
            // Nothing runs out of a share.
            has_run_out: matches!(begun_with, HostLease::Share { .. }),
            forgotten: now,
            short_pace: PACE,
        }
    }

    /// Waits until it is time for the next renewal.
    async fn pause(&mut self, told: &Notify, renewed: Option<Renewed>) {
        let begun = Instant::now();
        let longest = match renewed {
            Some(Renewed::OlderSchema) => OLDER_SCHEMA_PAUSE,
            Some(Renewed::Done { again: true, .. }) => PACE.mul_f64(0.5 + rand::random::<f64>()),
            _ => rhythm::next(begun + RENEW_EVERY / 2) - begun,
        };
        if let Some(Renewed::Done { has_more: true, .. }) = renewed {
            self.short_pace = PACE;
        }
        let (mut until, mut was_short) = (begun + longest, false);
        let requests = self.pools.lease_requests.clone();
        loop {
            tokio::select! {
                () = sleep_until(until) => return,
                () = told.notified(), if self.client.is_some() => until = until.min(begun + PACE),
                request = requests.next(), if self.client.is_some() => match request {
                    LeaseRequest::Returned => until = until.min(begun + PACE),
                    LeaseRequest::Short if was_short => {}
                    LeaseRequest::Short => {
                        was_short = true;
                        until = until.min(begun + self.short_pace);
                        self.short_pace = (self.short_pace * 2).min(SHORT_PACE_MAX);
                    }
                },
            }
            if until == begun + PACE {
                sleep_until(until).await;
                return;
            }
        }
    }

    async fn renew(&mut self) -> Result<Renewed, String> {
        let client = match self.client.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => self.connect().await?,
        };
        let renewed = timeout(ANSWER_WITHIN, self.renew_with(&client)).await;
        let renewed = renewed.map_err(|_| format!("no answer within {ANSWER_WITHIN:?}"))?;
        // After an error or without an answer, the connection is not used again.
        let renewed = renewed.map_err(|error| causes(&error))?;
        self.client = Some(client);
        Ok(renewed)
    }

    async fn connect(&self) -> Result<Client, String> {
        let database = self.central.database();
        let client = self.central.connect_to(database).await.map_err(|error| error.to_string())?;
        // A statement that waits for a lock must not be made long after this node has given it up.
        let limit = format!("SET statement_timeout = {}", ANSWER_WITHIN.as_millis());
        let limited = timeout(self.central.timeout(), client.batch_execute(&limit)).await;
        limited
            .map_err(|_| "no answer within central_timeout".to_owned())?
            .map_err(|error| causes(&error))?;
        Ok(client)
    }

    async fn renew_with(&mut self, client: &Client) -> Result<Renewed, tokio_postgres::Error> {
        let Some(own) = self.fleet.registration.id() else {
            let inserted = self.fleet.registration.insert(client).await?;
            if inserted == Inserted::OlderSchema {
                self.pools.lease_requests.set_of_new_hosts(HostLease::Whole);
                self.budgets().iter().for_each(|(_, budget)| budget.set_lease(HostLease::Whole, false));
                return Ok(Renewed::OlderSchema);
            }
            return Ok(Renewed::Done { again: true, has_more: false });
        };
        let budgets = self.budgets();
        let hosts: Vec<String> = budgets.keys().cloned().collect();
        let sent = Instant::now();
        // In this order, as two transactions: what was removed because of an older beat is seen as missing.
        let (is_there, read) =
            tokio::join!(biased; self.fleet.registration.beat(client), lease_rows::read(client, &hosts));
        let read = read?;
        if !is_there? {
            budgets.values().for_each(|budget| budget.run_out_lease());
            return Ok(Renewed::Done { again: true, has_more: false });
        }
        let answered = Instant::now();
        let usage: HashMap<String, Usage> =
            budgets.iter().map(|(host, budget)| (host.clone(), self.usage(host, budget, sent))).collect();
        let times = (sent - self.started, answered - self.started);
        let nothing = Usage { open: 0, demand: Demand { wanted: 0, weight: 0 } };
        let plan =
            self.keeper.read(own, times, &read.snapshot, |host| usage.get(host).copied().unwrap_or(nothing));
        self.is_alone = plan.is_alone;
        self.fleet.is_alone.store(plan.is_alone, Ordering::Relaxed);
        locked(&self.fleet.gone).clone_from(&plan.gone);
        self.renewed = sent;
        if !read.names.keys().eq(self.names.keys()) {
            self.fleet.peers.set(&nodes::known(client).await?);
        }
        self.log_news(&plan, own, read.names);
        let limited: Vec<&String> = read.snapshot.hosts.iter().map(|(host, _)| host).collect();
        for (host, budget) in &budgets {
            // Without a limit there is nothing to share.
            if !limited.contains(&host) && !read.new_hosts.contains(host) {
                budget.set_lease(HostLease::Whole, false);
            }
        }
        self.pools.lease_requests.set_of_new_hosts(HostLease::NOTHING_YET);
        self.carry_out(client, own, plan, &budgets, &read.new_hosts).await
    }

    async fn carry_out(
        &mut self,
        client: &Client,
        own: i64,
        mut plan: Plan,
        budgets: &BTreeMap<String, Arc<HostBudget>>,
        new_hosts: &[String],
    ) -> Result<Renewed, tokio_postgres::Error> {
        let until = (!plan.is_alone).then(|| self.renewed + VALID_FOR);
        let lease = |servers: u32| HostLease::Part { servers: servers as usize, until };
        for held in plan.leases.clone() {
            let Some(budget) = budgets.get(&held.host) else { continue };
            match held.servers {
                Some(servers) => budget.set_lease(lease(servers), held.granted > servers),
                None => budget.run_out_lease(),
            }
            plan.cover(&held.host, number(budget.live()));
        }
        let mut again = !new_hosts.is_empty();
        let mut has_more = false;
        if !plan.changes.is_empty() {
            self.keeper.sending(&plan);
            let made = lease_rows::change(client, own, &plan.changes).await?;
            again |= made.len() < plan.changes.len();
            for held in self.keeper.made(&plan.changes, &made) {
                let Some(budget) = budgets.get(&held.host) else { continue };
                let Some(servers) = held.servers else { continue };
                has_more |= budget.leased().is_some_and(|leased| leased < servers as usize);
                budget.set_lease(lease(servers), held.granted > servers);
            }
        }
        if !plan.removals.is_empty() {
            lease_rows::remove(client, own, &plan.removals, &plan.gone).await?;
            again = true;
        }
        if !plan.tell.is_empty() {
            lease_rows::tell(client, own, &plan.tell).await?;
        }
        if !new_hosts.is_empty() {
            lease_rows::add_hosts(client, new_hosts).await?;
        }
        if !plan.gone.is_empty() && self.forgotten.elapsed() >= FORGET_EVERY {
            self.forgotten = Instant::now();
            lease_rows::forget(client, &plan.gone).await?;
        }
        Ok(Renewed::Done { again, has_more })
    }

    fn budgets(&self) -> BTreeMap<String, Arc<HostBudget>> {
        self.pools.budgets().into_iter().collect()
    }

    fn usage(&mut self, host: &str, budget: &HostBudget, now: Instant) -> Usage {
        let usage = budget.usage();
        let peak = self.peaks.entry(host.to_owned()).or_default();
        let wanted = peak.with(number(usage.wanted), now - self.started);
        let weight = u32::try_from(usage.weight).unwrap_or(u32::MAX);
        Usage { open: number(usage.open), demand: Demand { wanted, weight } }
    }

    fn log_news(&mut self, plan: &Plan, own: i64, names: BTreeMap<i64, String>) {
        for news in &plan.news {
            let (News::Joined(id) | News::Gone(id) | News::Left(id)) = *news;
            if id == own {
                continue;
            }
            let node = names.get(&id).or_else(|| self.names.get(&id)).map_or("", String::as_str);
            match news {
                News::Joined(_) => info!(node, id, "another node has joined"),
                News::Gone(_) => warn!(node, id, "another node is gone: it does not beat"),
                News::Left(_) => info!(node, id, "another node has left"),
            }
        }
        self.names = names;
    }

    /// Logs what changes in the contact to the central database. Returns the result, if there was one.
    fn note(&mut self, renewed: &Result<Renewed, String>) -> Option<Renewed> {
        match renewed {
            Ok(renewed) => {
                if std::mem::take(&mut self.is_lost) {
                    info!(side = "central", "leases are renewed again");
                }
                self.has_run_out = false;
                Some(*renewed)
            }
            Err(cause) => {
                self.client = None;
                if !std::mem::replace(&mut self.is_lost, true) {
                    warn!(side = "central", cause, "cannot renew leases; retrying");
                }
                if self.renewed.elapsed() > VALID_FOR && !std::mem::replace(&mut self.has_run_out, true) {
                    self.out_of_contact();
                }
                None
            }
        }
    }

    /// The leases have run out, unless this was the only node.
    fn out_of_contact(&self) {
        if !self.is_alone {
            warn!(
                side = "central",
                "leases have run out: this node keeps its servers and opens no more, or one on a host where it has none"
            );
            self.pools.lease_requests.set_of_new_hosts(HostLease::OUT_OF_CONTACT);
            self.budgets().values().for_each(|budget| budget.lose_contact());
            return;
        }
        info!(side = "central", "leases are kept: no other node was there");
        self.pools.lease_requests.set_of_new_hosts(HostLease::Whole);
        for budget in self.budgets().values() {
            budget.set_lease_if_none(HostLease::Whole);
        }
    }
}

fn number(servers: usize) -> u32 {
    u32::try_from(servers).unwrap_or(u32::MAX)
}
