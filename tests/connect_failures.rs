//! Servers that cannot be opened: how often it is tried, what clients are told meanwhile, and that they are served at the first
//! try when it is over. Attempts are counted where they arrive.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use futures_util::future::join_all;
use support::{
    Client, Cluster, Forwarder, Proxy,
    client::{in_time, in_words, sqlstate},
    console::show,
    forwarder,
    proxy::{Builder, login_of, password_of},
};

const TENANTS: usize = 12;
const CLIENTS: usize = 20;
/// Errors that each client gets, one after another.
const ROUNDS: usize = 5;
/// Attempts that one failure after another costs, with room for those that began beside the first (`max_connecting_servers`).
const FEW: usize = 2 * ROUNDS + 16;

const TRUSTED: &str = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
const REJECTED: &str =
    "local all all trust\nhost all master 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 reject\n";

/// What becomes of the tenant's database.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Renamed,
    Rejected,
    Down,
    /// Connections are taken, and nothing is ever said.
    Silent,
}

/// The tenant `acme` on a host behind a forwarder, which counts.
struct Failing {
    proxy: Proxy,
    host: Cluster,
    forwarder: Forwarder,
    database: String,
}

impl Failing {
    async fn start(builder: Builder) -> Self {
        let host = Cluster::build().hba(TRUSTED).start();
        let forwarder = Forwarder::to(host.port()).await;
        let proxy = builder.start().await;
        proxy.add_host_at("failing", forwarder.port);
        let mut failing = Self { proxy, host, forwarder, database: String::new() };
        failing.database = failing.add_tenant("acme");
        failing
    }

    /// Returns its database.
    fn add_tenant(&self, name: &str) -> String {
        self.proxy.command(&["tenant", "create", name, "--host", "failing"]);
        self.proxy.create_login(&login_of(name), &password_of(name), &["--tenant", name]);
        let shown = self.proxy.json(&["tenant", "show", name, "--json"]);
        shown["database"].as_str().unwrap().to_owned()
    }

    /// A client of each of [`TENANTS`] tenants, `acme` the first of them.
    async fn neighbours(&self) -> Vec<Client> {
        let others: Vec<String> = (1..TENANTS).map(|number| format!("tenant{number}")).collect();
        others.iter().for_each(|name| drop(self.add_tenant(name)));
        let names = std::iter::once("acme").chain(others.iter().map(String::as_str));
        join_all(names.map(async |name| self.proxy.client(name).connect().await)).await
    }

    async fn end_servers(&self) {
        let ended = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity \
            WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        self.host.client("postgres").await.ask(ended).await;
    }

    /// What each client reads, [`ROUNDS`] times one after another; returns how many attempts that has cost.
    async fn all_are_told(&self, clients: &[Client], fault: Fault, state: &str, words: &str) -> usize {
        let before = self.forwarder.connections();
        let told = clients.iter().map(async |client| {
            for _ in 0..ROUNDS {
                let error = client.try_run("SELECT 1").await.expect_err("no server");
                let said = in_words(&error);
                assert_eq!(sqlstate(&error), state, "{fault:?}: {said}");
                assert!(said.contains(words) && !said.contains("elsewhere"), "{fault:?}: {said}");
            }
        });
        join_all(told).await;
        self.forwarder.connections() - before
    }

    /// Waits until so many clients wait for servers; returns how many servers are being opened then.
    async fn opening_while_waiting(&self, clients: i64) -> i64 {
        let console = self.proxy.console().await;
        loop {
            let pools = show(&console, "POOLS").await;
            let sum =
                |column: &str| -> i64 { pools.iter().map(|pool| pool[column].parse::<i64>().unwrap()).sum() };
            if sum("cl_waiting") == clients {
                return sum("sv_login");
            }
            tokio::task::yield_now().await;
        }
    }

    /// From here on no server is open, and none that was being opened will be lent.
    async fn begin(&mut self, fault: Fault) {
        if matches!(fault, Fault::Rejected) {
            self.rules(REJECTED).await;
        }
        self.proxy.console().await.run("RECONNECT").await;
        self.end_servers().await;
        match fault {
            Fault::Rejected => {}
            Fault::Renamed => self.rename(&self.database, "elsewhere").await,
            Fault::Down => self.host.stop(),
            Fault::Silent => self.forwarder.set(forwarder::Fault::Stall),
        }
    }

    async fn end(&mut self, fault: Fault) {
        match fault {
            Fault::Renamed => self.rename("elsewhere", &self.database).await,
            Fault::Rejected => self.rules(TRUSTED).await,
            Fault::Down => self.host.start_again(),
            Fault::Silent => self.forwarder.set(forwarder::Fault::None),
        }
    }

    async fn rename(&self, from: &str, to: &str) {
        let master = self.host.client("postgres").await;
        master.run(&format!("ALTER DATABASE \"{from}\" RENAME TO \"{to}\"")).await;
    }

    async fn rules(&self, hba: &str) {
        std::fs::write(self.host.data().join("pg_hba.conf"), hba).unwrap();
        self.host.reload().await;
    }

    async fn clients(&self) -> Vec<Client> {
        let caller = self.proxy.client("acme");
        join_all((0..CLIENTS).map(|_| caller.connect())).await
    }
}

/// There were 250 attempts a second, and clients that read after 15 s that the pool was busy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cannot_be_opened_is_tried_now_and_then_and_every_client_is_told_why() {
    let mut failing = Failing::start(Proxy::build().config("hold_during_outage", "false")).await;
    let clients = failing.clients().await;
    for (fault, state, words) in [
        (Fault::Renamed, "3D000", "does not exist"),
        (Fault::Rejected, "08006", "does not accept"),
        (Fault::Down, "08006", "could not connect"),
    ] {
        failing.begin(fault).await;
        let attempts = failing.all_are_told(&clients, fault, state, words).await;
        assert!((ROUNDS..=FEW).contains(&attempts), "{fault:?}: {attempts} attempts");

        failing.end(fault).await;
        // The first query of each succeeds, though a pause lasts.
        assert_eq!(
            join_all(clients.iter().map(|client| client.ask("SELECT 1"))).await,
            ["1"; CLIENTS],
            "{fault:?}"
        );
    }
}

/// Logins in session mode each made a connection of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_in_session_mode_do_not_storm_a_server_that_cannot_be_opened() {
    let mut failing = Failing::start(Proxy::build().pool_mode("session")).await;
    failing.begin(Fault::Rejected).await;
    let before = failing.forwarder.connections();
    for _ in 0..ROUNDS {
        let caller = failing.proxy.client("acme");
        let refused = join_all((0..CLIENTS).map(|_| caller.refusal())).await;
        assert_eq!(refused, ["08006"; CLIENTS]);
    }
    let attempts = failing.forwarder.connections() - before;
    assert!((ROUNDS..=FEW).contains(&attempts), "{attempts} attempts");
    failing.end(Fault::Rejected).await;
    for client in failing.clients().await {
        assert_eq!(client.ask("SELECT 1").await, "1");
    }
}

/// While one server works, the others' clients wait for it; in vain, they read why there is no second one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_in_vain_for_the_only_server_that_is_open_is_told_why_there_is_no_other() {
    let builder = Proxy::build().config("query_wait_timeout", "\"300ms\"");
    let mut failing = Failing::start(builder).await;
    let clients = failing.clients().await;
    failing.end_servers().await;
    clients[0].run("BEGIN; SELECT 1").await;
    failing.rules(REJECTED).await;
    let refused = in_time("a refusal", clients[1].try_run("SELECT 1")).await.expect_err("no server");
    assert!(
        in_words(&refused).contains("does not accept the tenant's credentials"),
        "{}",
        in_words(&refused)
    );
    // Who gets the server that comes back does not care.
    let waits = clients[2].ask("SELECT 1");
    let (answer, _) = tokio::join!(waits, clients[0].run("COMMIT"));
    assert_eq!(answer, "1");
    failing.end(Fault::Rejected).await;
}

/// An operator who chose a long pause: clients are told at once, and not when it is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_next_attempt_is_far_away_clients_are_told_the_last_reason_at_once() {
    let builder = Proxy::build().config("server_login_retry", "\"1h\"");
    let mut failing = Failing::start(builder).await;
    let clients = failing.clients().await;
    failing.begin(Fault::Rejected).await;
    let before = failing.forwarder.connections();
    // The pauses up to a second are waited for; behind them none is.
    for _ in 0..20 {
        assert_eq!(clients[0].refusal_of("SELECT 1").await, "08006");
    }
    let attempts = failing.forwarder.connections() - before;
    assert!((2..=16).contains(&attempts), "{attempts} attempts");
    // RECONNECT makes a new pool, which knows nothing of that.
    failing.end(Fault::Rejected).await;
    failing.proxy.console().await.run("RECONNECT").await;
    assert_eq!(clients[0].ask("SELECT 1").await, "1");
}

/// Each tenant's pool tried by itself: a thousand tenants made a thousand attempts a second on a host that was down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_tenants_of_a_host_that_is_down_share_one_attempt_and_its_outcome() {
    let builder =
        Proxy::build().config("server_connect_timeout", "\"2s\"").config("hold_during_outage", "false");
    let mut failing = Failing::start(builder).await;
    let clients = failing.neighbours().await;
    for (fault, words) in [(Fault::Down, "could not connect"), (Fault::Silent, "no answer within")] {
        failing.begin(fault).await;
        let attempts = failing.all_are_told(&clients, fault, "08006", words).await;
        // All at once, before anything is known of the host; then one for all.
        assert!((2..=TENANTS + ROUNDS * 2).contains(&attempts), "{fault:?}: {attempts} attempts");
        failing.end(fault).await;
        let answers = join_all(clients.iter().map(|client| client.ask("SELECT 1"))).await;
        assert_eq!(answers, ["1"; TENANTS], "{fault:?}");
    }
}

/// What is wrong with one tenant's database or role says nothing of its neighbours on the host.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenants_own_failure_does_not_slow_its_neighbours_down() {
    let builder = Proxy::build().config("server_login_retry", "\"1h\"");
    let mut failing = Failing::start(builder).await;
    failing.add_tenant("globex");
    let neighbour = failing.proxy.client("globex").connect().await;
    let client = failing.proxy.client("acme").connect().await;
    for fault in [Fault::Renamed, Fault::Rejected] {
        failing.begin(fault).await;
        let rejected = matches!(fault, Fault::Rejected);
        if rejected {
            let only = format!("host \"{}\" all 127.0.0.1/32 reject\n{TRUSTED}", failing.database);
            failing.rules(&only).await;
        }
        // The pauses up to a second are waited for; behind them there is none whose end is waited for.
        for _ in 0..12 {
            assert!(client.try_run("SELECT 1").await.is_err(), "{fault:?}");
        }
        // Its server was ended as well.
        assert_eq!(neighbour.ask("SELECT 1").await, "1", "{fault:?}");
        failing.end(fault).await;
        failing.proxy.console().await.run("RECONNECT").await;
        assert_eq!(client.ask("SELECT 1").await, "1", "{fault:?}");
    }
}

/// The limit was each pool's, so that a host with a thousand tenants had sixteen thousand logins at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn max_connecting_servers_is_the_hosts_over_all_tenants() {
    let builder = Proxy::build().config("max_connecting_servers", "2");
    let mut failing = Failing::start(builder).await;
    let clients = failing.neighbours().await;
    failing.begin(Fault::Silent).await;
    let before = failing.forwarder.connections();
    let asked = join_all(clients.iter().map(|client| client.ask("SELECT 1")));
    let stalled = async {
        let opening = in_time("all to wait", failing.opening_while_waiting(TENANTS as i64)).await;
        assert_eq!(opening, 2);
        assert_eq!(failing.forwarder.connections() - before, 2);
        failing.forwarder.set(forwarder::Fault::None);
    };
    let (answers, ()) = tokio::join!(asked, stalled);
    assert_eq!(answers, ["1"; TENANTS]);
}

/// Its logins hang behind the password (somebody has locked its catalogue), and many clients wait: another tenant's do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_whose_logins_hang_leaves_its_neighbours_a_turn() {
    let builder = Proxy::build().config("max_connecting_servers", "4");
    let failing = Failing::start(builder).await;
    failing.add_tenant("globex");
    let neighbour = failing.proxy.client("globex").connect().await;
    let clients = failing.clients().await;
    failing.end_servers().await;
    let locked = failing.host.client(&failing.database).await;
    locked.run("BEGIN; LOCK pg_catalog.pg_class").await;
    let asked = join_all(clients.iter().map(|client| client.ask("SELECT 1")));
    let others = async {
        let opening = in_time("all to wait", failing.opening_while_waiting(CLIENTS as i64)).await;
        assert_eq!(opening, 3);
        assert_eq!(neighbour.ask("SELECT 1").await, "1");
        locked.run("COMMIT").await;
    };
    let (answers, ()) = tokio::join!(asked, others);
    assert_eq!(answers, ["1"; CLIENTS]);
}
