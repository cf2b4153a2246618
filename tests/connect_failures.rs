//! Servers that cannot be opened: how often it is tried, what clients are told meanwhile, and that they are served at the first
//! try when it is over. Attempts are counted where they arrive.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use futures_util::future::join_all;
use support::{
    Client, Cluster, Forwarder, Proxy,
    client::{in_time, in_words, sqlstate},
    proxy::{Builder, login_of, password_of},
};

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
        proxy.command(&["tenant", "create", "acme", "--host", "failing"]);
        proxy.create_login(&login_of("acme"), &password_of("acme"), &["--tenant", "acme"]);
        let database =
            proxy.json(&["tenant", "show", "acme", "--json"])["database"].as_str().unwrap().to_owned();
        Self { proxy, host, forwarder, database }
    }

    async fn end_servers(&self) {
        let ended = format!(
            "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname = '{}'",
            self.database
        );
        self.host.client("postgres").await.ask(&ended).await;
    }

    async fn begin(&mut self, fault: Fault) {
        self.end_servers().await;
        match fault {
            Fault::Renamed => self.rename(&self.database, "elsewhere").await,
            Fault::Rejected => self.rules(REJECTED).await,
            Fault::Down => self.host.stop(),
        }
    }

    async fn end(&mut self, fault: Fault) {
        match fault {
            Fault::Renamed => self.rename("elsewhere", &self.database).await,
            Fault::Rejected => self.rules(TRUSTED).await,
            Fault::Down => self.host.start_again(),
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
    let mut failing = Failing::start(Proxy::build()).await;
    let clients = failing.clients().await;
    for (fault, state, words) in [
        (Fault::Renamed, "3D000", "does not exist"),
        (Fault::Rejected, "08006", "does not accept"),
        (Fault::Down, "08006", "could not connect"),
    ] {
        failing.begin(fault).await;
        let before = failing.forwarder.connections();
        let told = clients.iter().map(async |client| {
            for _ in 0..ROUNDS {
                let error = client.try_run("SELECT 1").await.expect_err("no server");
                let said = in_words(&error);
                assert_eq!(sqlstate(&error), state, "{fault:?}: {said}");
                assert!(said.contains(words) && !said.contains("elsewhere"), "{fault:?}: {said}");
            }
        });
        join_all(told).await;
        let attempts = failing.forwarder.connections() - before;
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
