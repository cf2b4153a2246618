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

/// A node is ready as long as a login can succeed there.
#[tokio::test]
async fn a_node_without_its_central_database_is_ready_if_a_login_is_cached() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    has_value(&proxy, "pglobby_central_reachable", 1.0).await;
    proxy.cluster.stop();
    has_value(&proxy, "pglobby_central_reachable", 0.0).await;
    let words = "the central database is down and no login is cached\n".to_owned();
    assert_eq!(proxy.http_get("/readyz").await, (503, words));
    assert_eq!(proxy.http_get("/healthz").await.0, 200);

    proxy.cluster.start_again();
    has_value(&proxy, "pglobby_central_reachable", 1.0).await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    proxy.cluster.stop();
    has_value(&proxy, "pglobby_central_reachable", 0.0).await;
    let words = "ready: the central database does not answer; cached logins are admitted\n".to_owned();
    assert_eq!(proxy.http_get("/readyz").await, (200, words));
}

/// Asks until the node says so about itself.
async fn says(proxy: &Proxy, status: u16, words: &str) {
    let begun = Instant::now();
    loop {
        let answer = proxy.http_get("/readyz").await;
        if answer.0 == status && answer.1.contains(words) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "/readyz never said {status} {words}, but {answer:?}");
        tokio::task::yield_now().await;
    }
}

/// Keys are rotated elsewhere, and this node's file does not follow: nobody could log in.
#[tokio::test]
async fn a_node_whose_key_ring_lacks_the_key_that_seals_is_not_ready_until_it_has_it() {
    let proxy = Proxy::with_tenant("acme").start().await;
    says(&proxy, 200, "ready").await;
    let ring = proxy.folder().join("keyring.toml");
    let (before, aside) = (std::fs::read(&ring).unwrap(), proxy.folder().join("aside.toml"));
    // The node sees the old file, another inode each time.
    let elsewhere = proxy.folder().join("elsewhere.toml");
    std::fs::copy(&ring, &elsewhere).unwrap();
    let mut other = std::fs::read_to_string(proxy.config_file()).unwrap();
    other = other.replace("keyring.toml", "elsewhere.toml");
    std::fs::write(proxy.folder().join("other.toml"), other).unwrap();
    let rotated = support::proxy::pglobby()
        .args(["key", "rotate", "--config"])
        .arg(proxy.folder().join("other.toml"))
        .output()
        .unwrap();
    assert!(rotated.status.success(), "{}", String::from_utf8_lossy(&rotated.stderr));
    assert_eq!(std::fs::read(&ring).unwrap(), before, "this node's ring is the old one");
    says(&proxy, 503, "the key ring lacks key").await;
    std::fs::copy(&elsewhere, &aside).unwrap();
    std::fs::rename(&aside, &ring).unwrap();
    says(&proxy, 200, "ready").await;

    // Another node's ring by its names, or one that was damaged: the names are right, and no password opens.
    let right = std::fs::read_to_string(&ring).unwrap();
    let other = |value: &str| if value.starts_with('A') { "B" } else { "A" }.to_owned() + &value[1..];
    let damaged = right.lines().map(|line| match line.split_once("\" = \"") {
        Some((name, value)) => format!("{name}\" = \"{}\n", other(value)),
        None => format!("{line}\n"),
    });
    for (text, status, words) in
        [(damaged.collect::<String>(), 503, "opens none of the tenants' passwords"), (right, 200, "ready")]
    {
        std::fs::copy(&ring, &aside).unwrap(); // With its mode.
        std::fs::write(&aside, text).unwrap();
        std::fs::rename(&aside, &ring).unwrap();
        says(&proxy, status, words).await;
    }
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

/// Many more than there are places for say nothing at all.
#[tokio::test]
async fn a_probe_is_answered_however_many_connections_are_silent() {
    let proxy = Proxy::build().config("http.max_connections", "8").config("http.header_timeout", "\"1h\"");
    let proxy = proxy.start().await;
    let mut silent = Vec::new();
    for round in 0..3 {
        for number in 0..8 {
            let mut stream = TcpStream::connect(("127.0.0.1", proxy.http_port())).await.unwrap();
            // Some have begun to speak, some have been served already.
            match number % 3 {
                0 => {}
                1 => stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: loc").await.unwrap(),
                _ => stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap(),
            }
            silent.push(stream);
        }
        for path in ["/healthz", "/readyz", "/metrics"] {
            assert_eq!(proxy.http_get(path).await.0, 200, "{path} in round {round}");
        }
    }
    // The one that was silent for longest had to go.
    let mut rest = Vec::new();
    let _ = in_time("the end of the first", silent[0].read_to_end(&mut rest)).await;
}

/// Somebody who asks for a long page and reads nothing of it holds nobody up.
#[tokio::test]
async fn a_probe_is_answered_while_others_do_not_read_their_answers() {
    let proxy = Proxy::build().config("http.max_connections", "3").config("http.header_timeout", "\"1h\"");
    let proxy = proxy.start().await;
    let mut deaf = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.http_port())).await.unwrap();
        let asked = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(2000);
        stream.set_nodelay(true).unwrap();
        // As much as the other side takes.
        let writing = tokio::time::timeout(std::time::Duration::from_millis(200), stream.write_all(&asked));
        let _ = writing.await;
        deaf.push(stream);
    }
    assert_eq!(proxy.http_get("/healthz").await.0, 200);
}

/// A machine that starts: the proxy is there first.
#[tokio::test]
async fn serve_waits_for_a_central_database_that_comes_late_and_not_for_ever() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    assert!(proxy.stop_with(Signal::TERM).await.success());
    proxy.cluster.stop();
    proxy.set_config("central_start_timeout", "\"300ms\"");
    let output = proxy.command_with(&["serve"], "");
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        words.contains("waiting for the central database") && words.contains("Connection refused"),
        "{words}"
    );

    proxy.set_config("central_start_timeout", "\"1h\"");
    proxy.start_while(|cluster| cluster.start_again(), "waiting for the central database").await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

/// `deploy/pglobby.service` never gives up, and its waits fit those of the configuration.
#[test]
fn the_systemd_unit_is_sound_and_starts_again_for_ever() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/pglobby.service");
    let unit = std::fs::read_to_string(&path).unwrap();
    let mut section = "";
    let mut lines = Vec::new();
    for line in unit.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix('[') {
            Some(name) => section = name.trim_end_matches(']'),
            None => lines.push((section, line.split_once('=').unwrap_or_else(|| panic!("{line}")))),
        }
    }
    for wanted in [
        ("Unit", ("StartLimitIntervalSec", "0")),
        ("Service", ("Type", "notify")),
        ("Service", ("Restart", "on-failure")),
        ("Service", ("RestartSec", "1")),
        ("Service", ("TimeoutStartSec", "90")),
        ("Service", ("TimeoutStopSec", "45")),
    ] {
        assert!(lines.contains(&wanted), "{wanted:?} is not in {lines:?}");
    }
    let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    assert!(std::fs::read_to_string(docs).unwrap().contains("(../deploy/pglobby.service)"));
    // Where systemd is there, it reads the unit itself; that the program is not installed is no fault of the unit's.
    let verified = std::process::Command::new("systemd-analyze").arg("verify").arg(&path).output();
    if let Ok(verified) = verified {
        let said = String::from_utf8_lossy(&verified.stderr).into_owned();
        let ours =
            said.lines().filter(|line| line.contains("pglobby.service:") && !line.contains("not executable"));
        assert_eq!(ours.count(), 0, "{said}");
    }
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

#[tokio::test]
async fn a_wait_that_reaches_its_limit_is_counted() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("query_wait_timeout", "\"300ms\"").start().await;
    let (mut holder, mut waiter) = (proxy.wire("acme").await, proxy.wire("acme").await);
    holder.query("BEGIN").await;
    waiter.query("SELECT 1").await;
    has_value(&proxy, "pglobby_waits_timed_out_total{tenant=\"acme\"}", 1.0).await;
}
