//! Metrics and health, as Prometheus and a load balancer ask for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::time::Instant;

use rustix::process::Signal;
use support::{
    Client, Proxy,
    client::{PATIENCE, in_time},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Asks until a metric has this value: counters follow what happens without holding it up.
async fn has_value(proxy: &Proxy, metric: &str, value: f64) {
    let begun = Instant::now();
    while proxy.metric(metric).await != value {
        assert!(begun.elapsed() < PATIENCE, "{metric} is {}, not {value}", proxy.metric(metric).await);
    }
}

#[tokio::test]
async fn a_node_that_serves_is_alive_and_ready() {
    let proxy = Proxy::build().start().await;
    assert_eq!(proxy.http_get("/healthz").await, (200, "alive\n".to_owned()));
    assert_eq!(proxy.http_get("/readyz").await, (200, "ready\n".to_owned()));
    assert_eq!(proxy.http_get("/nothing").await.0, 404);
}

/// Two clients that dawdle, one in the middle of a request and one behind an answer, held all the places there are.
#[tokio::test]
async fn a_connection_that_says_nothing_loses_its_place() {
    let short = ("http.header_timeout", "\"300ms\"");
    let proxy = Proxy::build().config("http.max_connections", "2").config(short.0, short.1).start().await;
    let connect = || TcpStream::connect(("127.0.0.1", proxy.http_port()));
    let (mut half, mut idle) = (connect().await.unwrap(), connect().await.unwrap());
    half.write_all(b"GET /healthz HTTP/1.1\r\nHost: loc").await.unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut answer = [0; 12];
    idle.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");

    assert_eq!(proxy.http_get("/healthz").await, (200, "alive\n".to_owned()));

    for mut dawdler in [half, idle] {
        let mut rest = Vec::new();
        in_time("the end of a dawdler", dawdler.read_to_end(&mut rest)).await.unwrap();
    }
}

#[tokio::test]
async fn a_node_that_drains_is_alive_and_not_ready() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let client = proxy.client("acme").connect().await;
    client.run("BEGIN").await;
    proxy.signal(Signal::TERM);
    proxy.logged("draining").await;
    assert_eq!(proxy.http_get("/readyz").await, (503, "draining\n".to_owned()));
    assert_eq!(proxy.http_get("/healthz").await.0, 200);
    assert_eq!(proxy.metric("pglobby_draining").await, 1.0);
    client.run("COMMIT").await;
    assert!(proxy.ended().await.success());
}

#[tokio::test]
async fn metrics_count_what_a_tenant_does() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let client = proxy.client("acme").connect().await;
    client.run("BEGIN").await;
    assert_eq!(proxy.metric(r#"pglobby_servers{tenant="acme",state="used"}"#).await, 1.0);
    has_value(&proxy, r#"pglobby_sessions{tenant="acme",state="in_transaction"}"#, 1.0).await;
    client.run("SELECT pg_sleep(0.002)").await;
    client.run("COMMIT").await;
    has_value(&proxy, r#"pglobby_transactions_total{tenant="acme"}"#, 1.0).await;
    has_value(&proxy, r#"pglobby_queries_total{tenant="acme"}"#, 3.0).await;
    has_value(&proxy, r#"pglobby_query_seconds_count{tenant="acme"}"#, 3.0).await;
    has_value(&proxy, r#"pglobby_sessions{tenant="acme",state="idle"}"#, 1.0).await;
    has_value(&proxy, r#"pglobby_servers{tenant="acme",state="idle"}"#, 1.0).await;
    assert_eq!(proxy.metric(r#"pglobby_logins_total{tenant="acme"}"#).await, 1.0);
    assert_eq!(proxy.metric(r#"pglobby_transaction_seconds_bucket{le="+Inf",tenant="acme"}"#).await, 1.0);
    assert!(proxy.metric(r#"pglobby_query_seconds_sum{tenant="acme"}"#).await >= 0.002);
    assert_eq!(proxy.metric("pglobby_clients").await, 1.0);
    assert!(proxy.metric("process_open_fds").await > 5.0);
    assert!(proxy.metric("process_resident_memory_bytes").await > 1e6);
    assert_eq!(proxy.metric(r#"pglobby_desyncs_total{tenant="acme"}"#).await, 0.0);
}

#[tokio::test]
async fn a_pin_is_counted_under_its_reason() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let client = proxy.client("acme").connect().await;
    client.run("SELECT pg_advisory_lock(1)").await;
    has_value(&proxy, r#"pglobby_pins{reason="advisory_lock"}"#, 1.0).await;
    assert_eq!(proxy.metric(r#"pglobby_pins{reason="temporary_object"}"#).await, 0.0);
}

#[tokio::test]
async fn refused_logins_are_counted_by_reason() {
    let proxy = Proxy::with_tenant("acme").start().await;
    assert_eq!(proxy.caller("nobody", "x", "acme").refusal().await, "28P01");
    assert_eq!(proxy.metric(r#"pglobby_logins_refused_total{reason="password"}"#).await, 1.0);
    assert_eq!(proxy.metric(r#"pglobby_logins_refused_total{reason="pool_busy"}"#).await, 0.0);
}

#[tokio::test]
async fn tenants_beyond_the_limit_are_summed_up() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").and_tenant("initech");
    let proxy = proxy.config("metrics_tenants_max", "1").start().await;
    let sessions: [Client; 3] = [
        proxy.client("globex").connect().await,
        proxy.client("acme").connect().await,
        proxy.client("initech").connect().await,
    ];
    has_value(&proxy, r#"pglobby_logins_total{tenant="acme"}"#, 1.0).await;
    has_value(&proxy, r#"pglobby_logins_total{tenant="other"}"#, 2.0).await;
    let (_, text) = proxy.http_get("/metrics").await;
    assert!(!text.contains("initech") && !text.contains("globex"), "{text}");
    for session in sessions {
        session.leave().await;
    }
}

#[tokio::test]
async fn losing_the_central_database_is_seen_and_leaves_the_node_ready() {
    let mut proxy = Proxy::build().start().await;
    has_value(&proxy, "pglobby_central_reachable", 1.0).await;
    proxy.cluster.stop();
    has_value(&proxy, "pglobby_central_reachable", 0.0).await;
    assert_eq!(proxy.http_get("/readyz").await.0, 200);
}

#[tokio::test]
async fn http_can_be_switched_off_and_an_address_in_use_is_said() {
    let mut proxy = Proxy::build().config("http.listen", "\"off\"").start().await;
    assert!(proxy.stop_with(Signal::TERM).await.success());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.set_config("http.listen", &format!("\"{}\"", taken.local_addr().unwrap()));
    let output = proxy.command_with(&["serve"], "");
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(words.contains("for HTTP") && words.contains("in use"), "{words}");
}

/// At `debug` and `trace`, tokio-postgres would log the texts and parameters of our own statements.
#[tokio::test]
async fn no_filter_of_logs_lets_a_verifier_or_a_statement_of_ours_through() {
    let proxy = Proxy::with_tenant("acme");
    let filter = "trace,tokio_postgres=trace,tokio_postgres::query=trace";
    let proxy =
        proxy.config("log.level", &format!("{filter:?}")).environment("RUST_LOG", filter).start().await;
    let api = proxy.api("operator");
    let body = serde_json::json!({ "name": "bob", "tenant": "acme", "password": "bobs-secret" });
    api.post("/v1/logins", body).await.with(201);
    api.post("/v1/tenants/acme/rotate?wait=60s", serde_json::json!({})).await.with(200);
    assert_eq!(proxy.caller("bob", "bobs-secret", "acme").ask("SELECT 1").await, "1");
    let command = proxy.command_with(&["login", "set-password", "bob", "--password-stdin"], "other-secret\n");
    let central = proxy.cluster.client("central").await;
    let verifier = central.ask("SELECT verifier FROM pglobby.logins WHERE name = 'bob'").await;
    let said = proxy.log() + &String::from_utf8(command.stderr).unwrap();
    assert!(said.contains("TRACE pglobby") || said.contains("DEBUG pglobby"), "ours are there: {said}");
    for secret in
        ["SCRAM-SHA-256$", &verifier, "bobs-secret", "other-secret", "INSERT INTO pglobby", "tokio_postgres"]
    {
        assert!(!said.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn a_tenant_with_an_odd_name_leaves_the_page_readable() {
    let odd = "a\"b\\c";
    let proxy = Proxy::with_tenant(odd).and_tenant("plain").start().await;
    // A line end in a name: only by plain SQL.
    let rename = "UPDATE pglobby.tenants SET name = E'a\\nb' WHERE name = 'plain'";
    proxy.cluster.client("central").await.run(rename).await;
    assert_eq!(proxy.client(odd).ask("SELECT 1").await, "1");
    assert_eq!(proxy.caller("plain_user", "plain-secret", "a\nb").ask("SELECT 1").await, "1");
    has_value(&proxy, r#"pglobby_logins_total{tenant="a\"b\\c"}"#, 1.0).await;
    has_value(&proxy, r#"pglobby_logins_total{tenant="a\nb"}"#, 1.0).await;
    let (_, page) = proxy.http_get("/metrics").await;
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let labels = name.split_once('{').map_or("", |(_, labels)| labels.strip_suffix('}').unwrap());
        let unquoted: String = labels.replace("\\\\", "").replace("\\\"", "").split('"').step_by(2).collect();
        assert!(unquoted.chars().all(|c| c.is_ascii_alphanumeric() || "_=,".contains(c)), "{line}");
    }
}
