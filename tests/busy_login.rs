//! A login does not hang on a pool whose servers are all busy, and is told no wrong value for that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::collections::HashMap;

use support::{
    Cluster, Proxy, Wire,
    cluster::{MASTER, MASTER_PASSWORD},
    proxy::{login_of, password_of},
    wire::{Message, PROTOCOL_3_0, rows},
};

/// A pool of one server, which a client's transaction holds; and a wait that fails the test rather than being waited for.
async fn busy() -> (Proxy, Wire) {
    let proxy = Proxy::with_tenant("acme").pool_size(1).config("query_wait_timeout", "\"1h\"").start().await;
    let mut holder = proxy.wire("acme").await;
    holder.query("BEGIN").await;
    (proxy, holder)
}

async fn start(
    port: u16,
    login: (&str, &str, &str),
    parameters: &[(&str, &str)],
) -> Result<(Wire, Vec<Message>), Message> {
    let (user, password, database) = login;
    let mut wire = Wire::open(port).await;
    let startup = [&[("user", user), ("database", database)], parameters].concat();
    wire.startup(PROTOCOL_3_0, &startup).await;
    wire.authenticate(password).await.map(|seen| (wire, seen))
}

async fn start_at_acme(proxy: &Proxy, parameters: &[(&str, &str)]) -> Result<Wire, Message> {
    let (user, password) = (login_of("acme"), password_of("acme"));
    start(proxy.port(), (&user, &password, "acme"), parameters).await.map(|(wire, _)| wire)
}

/// What a client is told, but for what says who it is.
fn told(wire: &Wire) -> HashMap<String, String> {
    let mut told = wire.parameters.clone();
    told.retain(|name, _| !["session_authorization", "is_superuser"].contains(&&**name));
    told
}

#[tokio::test]
async fn a_login_with_an_application_name_of_its_own_waits_for_no_server() {
    let (proxy, mut holder) = busy().await;
    for name in ["billing", "café", ""] {
        let mut wire = start_at_acme(&proxy, &[("application_name", name)]).await.unwrap();
        let known = wire.parameters["application_name"].clone();
        holder.query("COMMIT").await;
        assert_eq!(rows(&wire.query("SHOW application_name").await)[0][0].as_deref(), Some(&*known));
        assert_eq!(wire.parameters["application_name"], known);
        holder.query("BEGIN").await;
    }
}

/// Whatever the rules say is what PostgreSQL itself says.
#[tokio::test]
async fn what_a_login_is_told_without_a_server_is_what_postgresql_tells() {
    let cluster = Cluster::build().setting("DateStyle", "SQL, DMY").start();
    let proxy = Proxy::with_tenant("acme").cluster(cluster).pool_size(1).start().await;
    let mut holder = proxy.wire("acme").await;
    holder.query("BEGIN").await;
    let opened = proxy.metric("pglobby_servers_opened_total{tenant=\"acme\"}").await;
    for parameters in [
        &[][..],
        &[("application_name", "psql")],
        &[("application_name", "naïve \t app")],
        &[
            ("client_encoding", "utf-8"),
            ("DateStyle", "ISO"),
            ("TimeZone", "UTC"),
            ("extra_float_digits", "2"),
        ],
        &[("client_encoding", "LATIN1"), ("datestyle", "german")],
        &[("client_encoding", "UNICODE"), ("datestyle", "mdy")],
        &[("DateStyle", "postgres, YMD"), ("IntervalStyle", "SQL_standard")],
        &[("timezone", "gmt"), ("standard_conforming_strings", "off")],
        &[("options", "-c search_path=shop,public -c statement_timeout=5000")],
    ] {
        let ours = start_at_acme(&proxy, parameters).await.unwrap();
        let direct =
            start(proxy.cluster.port(), (MASTER, MASTER_PASSWORD, "central"), parameters).await.unwrap().0;
        assert_eq!(told(&ours), told(&direct), "{parameters:?}");
    }
    let now = proxy.metric("pglobby_servers_opened_total{tenant=\"acme\"}").await;
    assert_eq!(now, opened, "a server was opened");
}

/// What nobody but PostgreSQL can judge is judged by it, on a server that is opened for that alone.
#[tokio::test]
async fn a_login_with_parameters_that_only_a_server_can_judge_waits_for_none_that_others_have() {
    let (proxy, mut holder) = busy().await;
    let refused = start_at_acme(&proxy, &[("work_mem", "a lot")]).await.map(|_| ()).expect_err("refused");
    assert_eq!(refused.sqlstate(), "22023");
    let mut wires = Vec::new();
    for parameters in
        [[("work_mem", "5MB"), ("TimeZone", "Europe/Berlin")], [("work_mem", "5MB"), ("TimeZone", "utc")]]
    {
        wires.push(start_at_acme(&proxy, &parameters).await.unwrap());
    }
    holder.query("COMMIT").await;
    for (wire, zone) in wires.iter_mut().zip(["Europe/Berlin", "UTC"]) {
        assert_eq!(wire.parameters["TimeZone"], zone);
        let has = rows(&wire.query("SELECT current_setting('work_mem'), current_setting('TimeZone')").await);
        assert_eq!(has, [[Some("5MB".to_owned()), Some(zone.to_owned())]]);
    }
    let servers = proxy.cluster.client("postgres").await;
    let count = "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE '%acme%'";
    while servers.ask(count).await != "1" {
        tokio::task::yield_now().await;
    }
}
