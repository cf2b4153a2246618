//! What is measured, and the bar for it.

use std::time::Duration;

use crate::{
    Plan, cold,
    ddl::{Ddl, What},
    fleet::{self, Fleet},
    pgbench::{Pgbench, SELECT_1, Script},
    sample::{Metric, Outcome},
    stand::{Layout, Pooler, Stand},
    streams::Stream,
};

pub struct Scenario {
    pub name: &'static str,
    pub title: &'static str,
    pub layout: Layout,
    pub load: Load,
    pub bars: &'static [Bar],
}

pub enum Load {
    Pgbench(Pgbench),
    Stream(Stream),
    Fleet(Fleet),
    /// This much is asked of one tenant by many, while another asks now and then: its latencies.
    Neighbour(Pgbench),
    /// This is asked of each of two tenants, at the same time.
    TwoTenants(Pgbench),
    /// A tenant's first query. `known`: it was used before, its pool is gone.
    Cold {
        known: bool,
    },
    /// What a tenant leaves behind in memory when its pool is gone.
    Used,
    Ddl(Ddl),
}

/// What pglobby should reach. PgBouncer is the newest that is measured.
#[derive(Debug, Clone, Copy)]
pub enum Bar {
    /// Times PgBouncer's, in the same scenario.
    AtMost(Metric, f64),
    /// Times PgBouncer's.
    AtLeast(Metric, f64),
    /// Times pglobby's own in another scenario.
    AtMostOfOwn(Metric, f64, &'static str),
    /// Times the direct connection's.
    AtLeastDirect(Metric, f64),
    /// Times the direct connection's.
    AtMostDirect(Metric, f64),
    /// As a number.
    Below(Metric, f64),
    /// Beyond the direct connection's.
    BeyondDirect(Metric, f64),
}

use Metric::{Cpu, Memory, P50, P99, Throughput};

/// This much of PgBouncer's CPU, and its throughput.
macro_rules! bars {
    ($cpu:literal) => {
        &[Bar::AtMost(Cpu, $cpu), Bar::AtLeast(Throughput, 1.0)]
    };
}

const MUCH: &[Bar] = bars!(1.0);
const BULK: &[Bar] = &[Bar::AtLeast(Throughput, 1.0), Bar::Below(Metric::Peak, 1024.0)];

const fn pgbench(name: &'static str, title: &'static str, load: Pgbench, bars: &'static [Bar]) -> Scenario {
    Scenario { name, title, layout: Layout::Usual, load: Load::Pgbench(load), bars }
}

const fn fleet(name: &'static str, title: &'static str, fleet: Fleet, bars: &'static [Bar]) -> Scenario {
    Scenario { name, title, layout: Layout::Usual, load: Load::Fleet(fleet), bars }
}

const fn stream(name: &'static str, title: &'static str, stream: Stream) -> Scenario {
    Scenario { name, title, layout: Layout::Usual, load: Load::Stream(stream), bars: BULK }
}

const fn cold(name: &'static str, title: &'static str, load: Load, bars: &'static [Bar]) -> Scenario {
    Scenario { name, title, layout: Layout::ShortPools, load, bars }
}

/// Without a function that may leave something in the session, and with one.
const fn ddl(name: &'static str, title: &'static str, what: What, dynamic: bool) -> Scenario {
    let bars: &[Bar] = match what {
        What::Restore => &[Bar::AtMostDirect(P50, 1.5)],
        _ => &[Bar::AtLeastDirect(Throughput, 0.67)],
    };
    Scenario { name, title, layout: Layout::Usual, load: Load::Ddl(Ddl { what, dynamic }), bars }
}

const SIMPLE: Pgbench = Pgbench::SIMPLE;
const EXTENDED: Pgbench = Pgbench { mode: "extended", ..SIMPLE };
const PREPARED: Pgbench = Pgbench { mode: "prepared", ..SIMPLE };
const ONE: Pgbench = Pgbench { script: SELECT_1, ..SIMPLE };
const SERVICE: Pgbench = Pgbench { service: true, ..SIMPLE };
const TPC_B: Pgbench = Pgbench { script: Script::TpcB, ..SIMPLE };
const TPC_B_PREPARED: Pgbench = Pgbench { script: Script::TpcB, ..PREPARED };

/// In this order.
pub const SCENARIOS: &[Scenario] = &[
    pgbench("select_1_16", "SELECT 1, simple, 16 clients", ONE, bars!(0.95)),
    pgbench("select_1_64", "SELECT 1, simple, 64 clients", ONE.clients(64), bars!(0.82)),
    pgbench("simple_1", "pgbench -S -M simple, 1 client", SIMPLE.clients(1), bars!(0.93)),
    pgbench("simple_16", "pgbench -S -M simple, 16 clients", SIMPLE, bars!(0.96)),
    pgbench("simple_64", "pgbench -S -M simple, 64 clients", SIMPLE.clients(64), bars!(0.82)),
    pgbench("simple_256", "pgbench -S -M simple, 256 clients", SIMPLE.clients(256), bars!(0.9)),
    pgbench("service_16", "pgbench -S -M simple, 16 clients with a service login", SERVICE, bars!(0.96)),
    pgbench(
        "service_64",
        "pgbench -S -M simple, 64 clients with a service login",
        SERVICE.clients(64),
        bars!(0.82),
    ),
    pgbench("extended_1", "pgbench -S -M extended, 1 client", EXTENDED.clients(1), bars!(1.0)),
    pgbench("extended_16", "pgbench -S -M extended, 16 clients", EXTENDED, bars!(0.92)),
    pgbench("extended_64", "pgbench -S -M extended, 64 clients", EXTENDED.clients(64), bars!(0.84)),
    pgbench("extended_256", "pgbench -S -M extended, 256 clients", EXTENDED.clients(256), bars!(0.9)),
    pgbench("prepared_1", "pgbench -S -M prepared, 1 client", PREPARED.clients(1), bars!(0.85)),
    pgbench("prepared_16", "pgbench -S -M prepared, 16 clients", PREPARED, bars!(0.68)),
    pgbench("prepared_64", "pgbench -S -M prepared, 64 clients", PREPARED.clients(64), bars!(0.6)),
    pgbench("prepared_256", "pgbench -S -M prepared, 256 clients", PREPARED.clients(256), bars!(0.9)),
    pgbench("tpcb_16", "pgbench TPC-B-like, simple, 16 clients", TPC_B, bars!(1.0)),
    pgbench("tpcb_prepared_16", "pgbench TPC-B-like, prepared, 16 clients", TPC_B_PREPARED, bars!(0.78)),
    pgbench(
        "connect_16",
        "pgbench -S -C: a login for each transaction, 16 clients",
        Pgbench { connect: true, ..SIMPLE },
        &[Bar::AtLeast(Throughput, 1.0)],
    ),
    pgbench(
        "result_1mb_rows",
        "a result of 1 MB in 10,000 rows, 16 clients",
        Pgbench { script: Script::Sql("SELECT repeat('x', 94) FROM generate_series(1, 10000);\n"), ..SIMPLE },
        bars!(0.26),
    ),
    pgbench(
        "result_1mb",
        "a result of 1 MB in one value, 16 clients",
        Pgbench { script: Script::Sql("SELECT repeat('x', 1048576);\n"), ..SIMPLE },
        bars!(0.35),
    ),
    stream("result_200mb", "a result of 200 MB, for each MB", Stream::Result),
    stream("copy_out", "COPY TO STDOUT of 200 MB, for each MB", Stream::CopyOut),
    stream("copy_in", "COPY FROM STDIN of 200 MB, for each MB", Stream::CopyIn),
    fleet("login", "SCRAM login, one query and close, 16 at a time", Fleet::Logins, MUCH),
    fleet("idle", "10,000 idle clients, for each", Fleet::Idle { tls: false }, &[Bar::Below(Memory, 2.0)]),
    fleet(
        "idle_tls",
        "10,000 idle clients with TLS, for each",
        Fleet::Idle { tls: true },
        &[Bar::Below(Memory, 24.0)],
    ),
    fleet("tenants_1", "SELECT 1 of 1 tenant, 16 at a time", Fleet::Tenants(1), MUCH),
    fleet("tenants_100", "SELECT 1 of 100 tenants in turn, 16 at a time", Fleet::Tenants(100), MUCH),
    fleet(
        "tenants_1000",
        "SELECT 1 of 1,000 tenants in turn, 16 at a time",
        Fleet::Tenants(1000),
        &[Bar::AtMostOfOwn(Cpu, 1.35, "tenants_1"), Bar::AtLeast(Throughput, 1.0)],
    ),
    Scenario {
        name: "neighbour_waiting",
        title: "a quiet tenant; 64 clients of another hold its 20 servers with pg_sleep",
        layout: Layout::OneWorker,
        load: Load::Neighbour(Pgbench {
            clients: 64,
            script: Script::Sql("SELECT pg_sleep(0.005);\n"),
            ..SIMPLE
        }),
        bars: &[Bar::AtMost(P99, 1.0)],
    },
    Scenario {
        name: "neighbour_busy",
        title: "a quiet tenant; 64 clients of another ask as fast as they can",
        layout: Layout::OneWorker,
        load: Load::Neighbour(ONE.clients(64)),
        bars: &[Bar::AtMost(P99, 1.0)],
    },
    pgbench(
        "tls_16",
        "pgbench -S -M simple, 16 clients with TLS",
        Pgbench { tls: true, ..SIMPLE },
        &[Bar::AtLeast(Throughput, 1.0)],
    ),
    Scenario {
        name: "unix_16",
        title: "pgbench -S -M simple, 16 clients, servers behind a Unix socket",
        layout: Layout::UnixServers,
        load: Load::Pgbench(SIMPLE),
        bars: MUCH,
    },
    Scenario {
        name: "unix_both_16",
        title: "pgbench -S -M simple, 16 clients, Unix sockets on both sides",
        layout: Layout::UnixEverywhere,
        load: Load::Pgbench(SIMPLE),
        bars: MUCH,
    },
    Scenario {
        name: "workers_1_tenant",
        title: "two workers; SELECT 1 of one tenant, 32 clients",
        layout: Layout::TwoWorkers,
        load: Load::Pgbench(ONE.clients(32)),
        bars: MUCH,
    },
    Scenario {
        name: "workers_2_tenants",
        title: "two workers; SELECT 1 of two tenants, 16 clients each",
        layout: Layout::TwoWorkers,
        load: Load::TwoTenants(ONE),
        bars: MUCH,
    },
    cold(
        "cold_known",
        "connect and first query of a tenant whose pool is gone",
        Load::Cold { known: true },
        &[Bar::BeyondDirect(P50, 1000.0)],
    ),
    cold(
        "cold_unknown",
        "connect and first query of a tenant never seen",
        Load::Cold { known: false },
        // As above, and two round trips to the central database, with half a millisecond for each.
        &[Bar::BeyondDirect(P50, 2000.0)],
    ),
    ddl("ddl_table", "CREATE TABLE", What::CreateTable, false),
    ddl("ddl_table_dynamic", "CREATE TABLE; one function has dynamic SQL", What::CreateTable, true),
    ddl("ddl_alter", "ALTER TABLE", What::AlterTable, false),
    ddl("ddl_alter_dynamic", "ALTER TABLE; one function has dynamic SQL", What::AlterTable, true),
    ddl("ddl_view", "CREATE VIEW", What::CreateView, false),
    ddl("ddl_view_dynamic", "CREATE VIEW; one function has dynamic SQL", What::CreateView, true),
    ddl("ddl_as", "CREATE TABLE AS", What::CreateTableAs, false),
    ddl("ddl_as_dynamic", "CREATE TABLE AS; one function has dynamic SQL", What::CreateTableAs, true),
    ddl("ddl_function", "CREATE FUNCTION", What::CreateFunction, false),
    ddl("ddl_function_dynamic", "CREATE FUNCTION; another has dynamic SQL", What::CreateFunction, true),
    ddl("ddl_domain", "CREATE DOMAIN", What::CreateDomain, false),
    ddl("ddl_domain_dynamic", "CREATE DOMAIN; one function has dynamic SQL", What::CreateDomain, true),
    ddl("ddl_restore", "psql restores 150 tables and views, 50 functions", What::Restore, false),
    ddl("ddl_restore_dynamic", "the same; one function has dynamic SQL", What::Restore, true),
    cold(
        "used_tenants",
        "memory for each tenant used once, its pool gone",
        Load::Used,
        &[Bar::Below(Memory, 4.0)],
    ),
];

impl Load {
    pub async fn run(&self, stand: &mut Stand, pooler: Pooler, plan: &Plan, round: usize) -> Outcome {
        match self {
            Self::Pgbench(load) => load.run(stand, &stand.target(pooler), plan).await,
            Self::Stream(stream) => stream.run(&stand.target(pooler), plan).await,
            Self::Fleet(fleet) => fleet.run(stand, pooler, plan).await,
            Self::Neighbour(noise) => neighbour(noise, stand, pooler, plan).await,
            Self::TwoTenants(load) => {
                let target = stand.target(pooler);
                load.run_at(stand, &[target.at("noisy"), target.at("other")], plan).await
            }
            Self::Cold { known } => cold::first_query(stand, pooler, *known, plan, round).await,
            Self::Used => fleet::used_tenants(stand, pooler, plan).await,
            Self::Ddl(ddl) => ddl.run(stand, pooler).await,
        }
    }

    /// Memory varies little and takes long.
    pub fn rounds_max(&self) -> usize {
        match self {
            Self::Fleet(Fleet::Idle { .. }) | Self::Used => 2,
            Self::Fleet(Fleet::Tenants(_)) | Self::Cold { .. } => 3,
            _ => usize::MAX,
        }
    }

    /// How often a noisy run is repeated at most.
    pub fn repeats_max(&self) -> usize {
        match self {
            // Its tenants are known afterwards.
            Self::Cold { known: false } => 0,
            _ => 3,
        }
    }
}

/// The quiet tenant's run begins and ends within the noise.
const NOISE_AROUND: Duration = Duration::from_secs(20);

async fn neighbour(noise: &Pgbench, stand: &Stand, pooler: Pooler, plan: &Plan) -> Outcome {
    let target = stand.target(pooler);
    let mut noise = noise.start(stand, &target.at("noisy"), plan.window + NOISE_AROUND)?;
    noise.warmed_up().await;
    let quiet = Pgbench { clients: 1, script: SELECT_1, rate: Some(500), ..Pgbench::SIMPLE };
    let outcome = quiet.run(stand, &target.at("quiet"), plan).await;
    if !noise.is_running() {
        noise.finish()?;
        return Err("the noise ended too early".to_owned());
    }
    Ok(outcome?.into_iter().filter(|(metric, _)| matches!(metric, P50 | P99 | Metric::Others)).collect())
}
