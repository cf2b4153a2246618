//! `/metrics`: reads every counter and gauge on request. The data path only counts.
//!
//! Labels are bounded: the first `metrics_tenants_max` tenants keep a label of their own for the life of
//! the process; all others share `other`. A tenant never changes its label, so no counter falls.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeCounterValue, EncodeLabelSet, NoLabelSet, text::encode},
    metrics::MetricType,
    registry::Registry,
};

use super::process_metrics::Process;
use crate::control_path::directory::CentralDirectory;
use crate::data_path::{
    pool::{
        host_budget::HostUsage,
        stats::{BUCKET_BOUNDS_US, Histogram, PoolStats},
    },
    proxy::Proxy,
    session_state::pins::Pins,
    sessions::registry::{Activity, SessionHandle},
    worker::Worker,
};

/// The registry behind `/metrics`.
pub struct Exposition {
    registry: Registry,
}

impl Exposition {
    /// Of this proxy.
    pub fn new(proxy: Arc<Proxy>, directory: Arc<CentralDirectory>) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Collector { proxy, directory, named: Mutex::default() }));
        Self { registry }
    }

    /// The metrics as OpenMetrics text.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

struct Collector {
    proxy: Arc<Proxy>,
    directory: Arc<CentralDirectory>,
    /// Labels of tenants that have one of their own, as [`escaped`] writes them.
    named: Mutex<HashMap<i64, String>>,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").finish_non_exhaustive()
    }
}

const OTHER: &str = "other";

#[derive(Default)]
struct Sum {
    counters: [u64; COUNTERS.len()],
    times: [Times; HISTOGRAMS.len()],
    sessions: [u64; SESSION_STATES.len()],
    waiting: u64,
    memory: u64,
    servers: [u64; SERVER_STATES.len()],
}

#[derive(Default)]
struct Times {
    buckets: [u64; BUCKET_BOUNDS_US.len()],
    sum_seconds: f64,
}

type Counter = (&'static str, &'static str, fn(&PoolStats) -> &AtomicU64);

const COUNTERS: [Counter; 15] = [
    ("logins", "Logins that led to a session", |stats| &stats.logins),
    ("server_assignments", "Times a server was lent to a session", |stats| &stats.assignments),
    ("transactions", "Transactions finished", |stats| &stats.transactions),
    ("queries", "Queries finished; a batch up to Sync counts as one", |stats| &stats.queries),
    ("received_bytes", "Bytes from clients", |stats| &stats.bytes_received),
    ("sent_bytes", "Bytes to clients", |stats| &stats.bytes_sent),
    ("errors", "Errors of servers sent to clients", |stats| &stats.errors),
    ("servers_opened", "Server connections opened", |stats| &stats.servers_opened),
    ("server_failures", "Server connections that could not be opened", |stats| &stats.connect_failures),
    ("desyncs", "Servers closed because of a protocol error; above zero is a defect", |stats| &stats.desyncs),
    ("pinned", "Leases that outlasted their transaction", |stats| &stats.pinned),
    ("client_parses", "Named statements that clients prepared", |stats| &stats.client_parses),
    ("server_parses", "Named statements that were prepared on servers", |stats| &stats.server_parses),
    ("binds", "Named statements that clients bound", |stats| &stats.binds),
    ("waits_timed_out", "Waits for a server that ended without one, at query_wait_timeout", |stats| {
        &stats.waits_timed_out
    }),
];

type TimeMeasure = (&'static str, &'static str, fn(&PoolStats) -> &Histogram);

const HISTOGRAMS: [TimeMeasure; 3] = [
    ("query_seconds", "Time from a request to its end", |stats| &stats.query_time),
    ("transaction_seconds", "Time a transaction held a server", |stats| &stats.transaction_time),
    ("wait_seconds", "Time waiting for a server, without waits that found one idle", |stats| {
        &stats.wait_time
    }),
];

const SESSION_STATES: [&str; 5] = ["idle", "waiting", "active", "in_transaction", "pinned"];
const SERVER_STATES: [&str; 3] = ["used", "idle", "opening"];

impl prometheus_client::collector::Collector for Collector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sums = self.sums();
        for (at, (name, help, _)) in COUNTERS.iter().enumerate() {
            let values = sums.iter().map(|(tenant, sum)| ([("tenant", tenant.as_str())], sum.counters[at]));
            counters(&mut encoder, name, help, values)?;
        }
        for (at, (name, help, _)) in HISTOGRAMS.iter().enumerate() {
            histograms(&mut encoder, name, help, sums.iter().map(|(tenant, sum)| (tenant, &sum.times[at])))?;
        }
        let sessions = sums.iter().flat_map(|(tenant, sum)| {
            let states = SESSION_STATES.iter().zip(sum.sessions);
            states.map(|(state, count)| ([("tenant", tenant.as_str()), ("state", *state)], count))
        });
        gauges(&mut encoder, "sessions", "Sessions by state", sessions)?;
        let waiting = sums.iter().map(|(tenant, sum)| ([("tenant", tenant.as_str())], sum.waiting));
        gauges(&mut encoder, "waiting", "Sessions that wait for a server, logins included", waiting)?;
        let servers = sums.iter().flat_map(|(tenant, sum)| {
            let states = SERVER_STATES.iter().zip(sum.servers);
            states.map(|(state, count)| ([("tenant", tenant.as_str()), ("state", *state)], count))
        });
        gauges(&mut encoder, "servers", "Server connections", servers)?;
        let memory = sums.iter().map(|(tenant, sum)| ([("tenant", tenant.as_str())], sum.memory));
        gauges(&mut encoder, "memory_bytes", "Bytes of memory kept for clients", memory)?;
        self.whole_process(&mut encoder)
    }
}

impl Collector {
    /// Sums by label.
    fn sums(&self) -> BTreeMap<String, Sum> {
        let mut sums: BTreeMap<String, Sum> = BTreeMap::new();
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = self.proxy.config.load().limits.metrics_tenants_max;
        let mut done = self.proxy.pools.totals();
        done.sort_by_key(|done| done.tenant_id);
        for done in &done {
            if named.len() < limit {
                named.entry(done.tenant_id).or_insert_with(|| escaped(&done.tenant));
            }
            sums.entry(label(&named, done.tenant_id).to_owned()).or_default().add_stats(&done.stats);
        }
        for pool in self.proxy.pools.all().iter().chain(&self.proxy.pools.retired()) {
            let sum = sums.entry(label(&named, pool.tenant.id).to_owned()).or_default();
            let (live, idle, opening) = (pool.live(), pool.idle(), pool.opening());
            for (count, more) in
                sum.servers.iter_mut().zip([live.saturating_sub(idle + opening), idle, opening])
            {
                *count += more as u64;
            }
            sum.waiting += pool.waiting() as u64;
        }
        for (tenant, account) in self.proxy.pools.accounts.tenants() {
            sums.entry(label(&named, tenant).to_owned()).or_default().memory += account.used() as u64;
        }
        for session in self.proxy.sessions.all() {
            let Some(tenant_access) = session.tenant_access() else { continue };
            let sum = sums.entry(label(&named, tenant_access.tenant.id).to_owned()).or_default();
            sum.add_session(&session);
        }
        sums
    }

    fn whole_process(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let proxy = &self.proxy;
        let refused = proxy.metrics.logins_refused().map(|(reason, count)| ([("reason", reason)], count));
        counters(encoder, "logins_refused", "Clients that got no session", refused)?;
        let repairs = proxy.metrics.role_repairs().into_iter();
        let repairs = repairs.map(|(outcome, count)| ([("outcome", outcome)], count));
        counters(encoder, "roles_mended", "Repairs of tenants' roles, by outcome", repairs)?;
        let adopted =
            proxy.metrics.operations_adopted().map(|(outcome, count)| ([("outcome", outcome)], count));
        let help = "Attempts to end operations whose process was gone, by outcome";
        counters(encoder, "operations_adopted", help, adopted)?;
        let delayed = [([("reason", "failures")], proxy.metrics.logins_delayed())].into_iter();
        counters(encoder, "logins_delayed", "Logins delayed because of earlier failures", delayed)?;
        let sessions = proxy.sessions.all();
        let pinned = Pins::named().map(|(pin, reason)| {
            let count = sessions.iter().filter(|session| session.pins().contains(pin)).count();
            ([("reason", reason)], count as u64)
        });
        gauges(encoder, "pins", "Pinned sessions by reason", pinned)?;
        self.hosts(encoder)?;
        self.workers(encoder)?;
        let (limits, accounts) = (&proxy.connection_limits, &proxy.pools.accounts);
        for (name, help, value) in [
            ("clients", "Client connections, before and after login", limits.count() as u64),
            ("clients_max", "max_client_conn", proxy.config.load().limits.max_client_conn as u64),
            ("clients_logging_in", "Client connections before login", limits.unauthenticated() as u64),
            ("pools", "Pools of server connections", proxy.pools.all().len() as u64),
            ("memory_kept_bytes", "Bytes of memory kept for all clients", accounts.process.used() as u64),
            ("memory_max_bytes", "max_memory", accounts.process.max() as u64),
            (
                "prepared_bytes",
                "Bytes of memory kept for prepared statements",
                accounts.statements.used() as u64,
            ),
            (
                "central_reachable",
                "1 while changes of the central database are received",
                proxy.metrics.central_reachable().into(),
            ),
            ("draining", "1 while the process drains", limits.is_closed().into()),
            (
                "uptime_seconds",
                "Seconds since the process started",
                proxy.sessions.started.elapsed().as_secs(),
            ),
        ] {
            gauge(encoder, &format!("pglobby_{name}"), help, value)?;
        }
        if let Some(age) = self.directory.snapshot().age() {
            let help =
                "Age of the snapshot from which logins are admitted while the central database is away";
            gauge(encoder, "pglobby_directory_snapshot_age_seconds", help, age.as_secs())?;
        }
        let process = Process::now();
        for (name, help, value) in [
            ("process_open_fds", "Open file descriptors", process.descriptors),
            ("process_max_fds", "Limit of open file descriptors", process.descriptors_max),
            ("process_resident_memory_bytes", "Resident memory in bytes", process.resident_bytes),
            ("process_virtual_memory_bytes", "Virtual memory in bytes", process.virtual_bytes),
        ] {
            if let Some(value) = value {
                gauge(encoder, name, help, value)?;
            }
        }
        Ok(())
    }
}

impl Collector {
    /// How busy the worker threads are, and with what.
    fn workers(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (workers, pools) = (&self.proxy.workers, &self.proxy.pools);
        let labels = |worker: &Worker| [("worker", worker.index.to_string())];
        let busy = workers.iter().map(|worker| (labels(worker), worker.busy().as_secs_f64()));
        counters(encoder, "worker_busy_seconds", "Time in which a worker thread had work", busy)?;
        let placed = workers.iter().map(|worker| (labels(worker), worker.pools() as u64));
        gauges(encoder, "worker_pools", "Pools that a worker thread serves", placed)?;
        let sessions = workers.iter().map(|worker| (labels(worker), worker.sessions() as u64));
        gauges(encoder, "worker_sessions", "Sessions that a worker thread serves", sessions)?;
        let moves = [([("reason", "load")], pools.moves())].into_iter();
        counters(encoder, "pool_moves", "Times that a pool changed its worker threads", moves)
    }

    /// What this node uses of each host's budget.
    fn hosts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let hosts: Vec<(String, Option<usize>, HostUsage)> = (self.proxy.pools.budgets().into_iter())
            .map(|(host, budget)| (escaped(&host), budget.leased(), budget.usage()))
            .collect();
        let labels = |host: &str| [("host", host.to_owned())];
        let leased = hosts.iter().filter_map(|(host, leased, _)| Some((labels(host), (*leased)? as u64)));
        let help = "Servers that this node may have of a host's budget";
        gauges(encoder, "host_leased", help, leased)?;
        let open = hosts.iter().map(|(host, _, usage)| (labels(host), usage.open as u64));
        gauges(encoder, "host_servers", "Servers of this node on a host", open)?;
        let wanted = hosts.iter().map(|(host, _, usage)| (labels(host), usage.wanted as u64));
        gauges(encoder, "host_wanted", "Servers that this node's sessions could use on a host", wanted)?;
        let used = self.proxy.pools.hosts();
        let changes = used.iter().map(|(host, of)| (labels(&escaped(host)), of.roles.changes()));
        let help = "Times that this node has found another address of a host to be its primary";
        counters(encoder, "host_primary_changes", help, changes)?;
        let holding = used.iter().map(|(host, of)| (labels(&escaped(host)), u64::from(of.is_holding())));
        gauges(encoder, "host_away", "Whether clients are held because no server of a host is there", holding)
    }
}

impl Sum {
    fn add_stats(&mut self, stats: &PoolStats) {
        for (count, (_, _, read)) in self.counters.iter_mut().zip(&COUNTERS) {
            *count += read(stats).load(Relaxed);
        }
        for (times, (_, _, histogram)) in self.times.iter_mut().zip(&HISTOGRAMS) {
            let histogram = histogram(stats);
            for (count, more) in times.buckets.iter_mut().zip(histogram.counts()) {
                *count += more;
            }
            times.sum_seconds += histogram.sum().as_secs_f64();
        }
    }

    fn add_session(&mut self, session: &SessionHandle) {
        let state = match session.doing().0 {
            Activity::Idle => 0,
            Activity::Waiting => 1,
            Activity::Active => 2,
            Activity::InTransaction => 3,
            Activity::Pinned => 4,
        };
        if let Some(count) = self.sessions.get_mut(state) {
            *count += 1;
        }
    }
}

/// A label value with escapes, which prometheus-client does not add.
fn escaped(name: &str) -> String {
    name.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

fn label(named: &HashMap<i64, String>, tenant: i64) -> &str {
    named.get(&tenant).map_or(OTHER, String::as_str)
}

fn counters<L: EncodeLabelSet, V: EncodeCounterValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, V)>,
) -> fmt::Result {
    let name = format!("pglobby_{name}");
    let mut metric = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}

fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let name = format!("pglobby_{name}");
    let mut metric = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        metric.encode_family(&labels)?.encode_gauge(&as_gauge(value))?;
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&as_gauge(value))
}

fn histograms<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (&'a String, &'a Times)>,
) -> fmt::Result {
    let name = format!("pglobby_{name}");
    let mut metric = encoder.encode_descriptor(&name, help, None, MetricType::Histogram)?;
    for (tenant, times) in values {
        let bound = |us: u64| if us == u64::MAX { f64::MAX } else { us as f64 / 1e6 };
        let buckets: Vec<(f64, u64)> =
            BUCKET_BOUNDS_US.iter().zip(times.buckets).map(|(us, count)| (bound(*us), count)).collect();
        let count = times.buckets.iter().sum();
        metric.encode_family(&[("tenant", tenant.as_str())])?.encode_histogram::<NoLabelSet>(
            times.sum_seconds,
            count,
            &buckets,
            None,
        )?;
    }
    Ok(())
}

fn as_gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
