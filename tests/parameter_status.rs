//! What a client believes of its session (ParameterStatus) and what the server that answers it does agree, whatever happens to
//! the host's configuration, to the host, and to the servers of the pool.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Cluster, Proxy, Wire,
    wire::{Message, rows},
};

/// Changes the host's configuration, which servers that are open read anew when they are spoken to.
async fn configure(proxy: &Proxy, setting: &str) {
    let master = proxy.cluster.client("postgres").await;
    master.run(&format!("ALTER SYSTEM SET {setting}")).await;
    proxy.cluster.reload().await;
}

/// A parameter as the server has it now, and as the client had been told when that answer came.
async fn has_and_believes(wire: &mut Wire, parameter: &str) -> (String, String) {
    let mut believed = wire.parameters.get(parameter).cloned().unwrap_or_default();
    let answers = wire.query(&format!("SHOW {parameter}")).await;
    for answer in answers.iter().take_while(|answer| answer.tag != b'D') {
        if let Some((name, value)) = reported(answer).filter(|(name, _)| name == parameter) {
            assert_eq!(name, parameter);
            believed = value;
        }
    }
    (rows(&answers)[0][0].clone().unwrap(), believed)
}

fn reported(message: &Message) -> Option<(String, String)> {
    let mut texts =
        message.body.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned());
    if message.tag == b'S' { texts.next().zip(texts.next()) } else { None }
}

/// Opens both servers of a pool of two, and leaves them idle.
async fn open_both(one: &mut Wire, other: &mut Wire) {
    for sql in ["BEGIN", "COMMIT"] {
        one.query(sql).await;
        other.query(sql).await;
    }
}

#[tokio::test]
async fn a_login_after_a_reload_is_told_what_servers_report_now() {
    for mode in ["transaction", "session"] {
        let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(1).start().await;
        let mut before = proxy.wire("acme").await;
        assert_eq!(before.parameters["DateStyle"], "ISO, MDY");
        before.query("SELECT 1").await;
        drop(before);
        configure(&proxy, "DateStyle = 'SQL, DMY'").await;
        configure(&proxy, "default_transaction_read_only = on").await;
        for _ in 0..2 {
            let mut after = proxy.wire("acme").await;
            assert_eq!(after.parameters["DateStyle"], "SQL, DMY", "{mode}");
            assert_eq!(after.parameters["default_transaction_read_only"], "on", "{mode}");
            assert_eq!(
                rows(&after.query("SELECT '2026-02-01'::date").await)[0][0].as_deref(),
                Some("01/02/2026")
            );
        }
    }
}

#[tokio::test]
async fn a_login_with_startup_parameters_of_its_own_is_told_the_new_values_of_the_others() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let client = proxy.client("acme").options("-c work_mem=5MB -c DateStyle=German");
    client.ask("SELECT 1").await;
    configure(&proxy, "IntervalStyle = 'iso_8601'").await;
    assert_eq!(client.connect().await.ask("SELECT interval '1 day', '2026-02-01'::date").await, "P1D");
    let mut wire = Wire::open(proxy.port()).await;
    let user = support::proxy::login_of("acme");
    let startup =
        [("user", &*user), ("database", "acme"), ("options", "-c work_mem=5MB -c DateStyle=German")];
    wire.startup(support::wire::PROTOCOL_3_0, &startup).await;
    wire.authenticate(&support::proxy::password_of("acme")).await.unwrap();
    assert_eq!(wire.parameters["IntervalStyle"], "iso_8601");
    assert_eq!(wire.parameters["DateStyle"], "German, DMY");
}

/// Two servers read the new configuration at different times: each when it is spoken to. The session that has been told of it by
/// one must not get the other's answer in another style than it believes.
#[tokio::test]
async fn a_session_that_meets_a_server_of_another_configuration_is_told_before_its_answer() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (mut one, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    open_both(&mut one, &mut other).await;
    configure(&proxy, "DateStyle = 'German, DMY'").await;
    // PostgreSQL itself tells a session of a reload behind the first answer that follows it.
    one.query("SELECT 1").await;
    assert_eq!(one.parameters["DateStyle"], "German, DMY");
    other.query("BEGIN").await;
    for _ in 0..2 {
        assert_eq!(
            has_and_believes(&mut one, "DateStyle").await,
            ("German, DMY".into(), "German, DMY".into())
        );
    }
    other.query("COMMIT").await;
    assert_eq!(has_and_believes(&mut other, "DateStyle").await, ("German, DMY".into(), "German, DMY".into()));
}

#[tokio::test]
async fn a_session_that_meets_a_server_started_under_another_configuration_is_told_before_its_answer() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (mut one, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    one.query("BEGIN").await;
    configure(&proxy, "standard_conforming_strings = off").await;
    // A new server; the old one is in a transaction.
    let name = "standard_conforming_strings";
    assert_eq!(has_and_believes(&mut other, name).await, ("off".into(), "off".into()));
    one.query("COMMIT").await;
    for wire in [&mut one, &mut other] {
        let (has, believes) = has_and_believes(wire, name).await;
        assert_eq!((&*has, &*believes), ("off", "off"));
    }
}

/// What others have set, and what a reload has changed beneath it, comes to light when it is reset.
#[tokio::test]
async fn a_reset_leads_to_the_hosts_new_value_and_what_was_set_stays() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut one, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    one.query("SET TimeZone = 'Asia/Tokyo'").await;
    configure(&proxy, "TimeZone = 'America/Lima'").await;
    assert_eq!(has_and_believes(&mut one, "TimeZone").await, ("Asia/Tokyo".into(), "Asia/Tokyo".into()));
    assert_eq!(
        has_and_believes(&mut other, "TimeZone").await,
        ("America/Lima".into(), "America/Lima".into())
    );
    one.query("RESET TimeZone").await;
    assert_eq!(one.parameters["TimeZone"], "America/Lima");
    assert_eq!(proxy.wire("acme").await.parameters["TimeZone"], "America/Lima");
    // It is not the session's own: the next reload changes it again.
    configure(&proxy, "TimeZone = 'Asia/Baku'").await;
    other.query("SELECT 1").await;
    assert_eq!(has_and_believes(&mut other, "TimeZone").await, ("Asia/Baku".into(), "Asia/Baku".into()));
    assert_eq!(has_and_believes(&mut one, "TimeZone").await, ("Asia/Baku".into(), "Asia/Baku".into()));
}

#[tokio::test]
async fn a_host_that_was_restarted_under_another_configuration_is_believed() {
    for mode in ["transaction", "session"] {
        let mut proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(2).start().await;
        let mut old = proxy.wire("acme").await;
        let master = proxy.cluster.client("postgres").await;
        master.run("ALTER SYSTEM SET IntervalStyle = 'sql_standard'").await;
        proxy.cluster.restart();
        assert_eq!(proxy.wire("acme").await.parameters["IntervalStyle"], "sql_standard", "{mode}");
        if mode == "transaction" {
            let style = has_and_believes(&mut old, "IntervalStyle").await;
            assert_eq!(style, ("sql_standard".into(), "sql_standard".into()));
        }
    }
}

/// Drivers choose a host by `in_hot_standby`: one that was promoted is a primary to the next login, and to a session that is open
/// from its next answer on.
#[tokio::test]
async fn a_promoted_standby_is_a_primary_to_the_next_login() {
    for mode in ["transaction", "session"] {
        let mut standby = Cluster::start();
        let proxy = Proxy::build().pool_mode(mode).start().await;
        proxy.add_host("second", &standby);
        proxy.command(&["tenant", "create", "acme", "--host", "second"]);
        proxy.create_login("alice", "alice secret", &["--tenant", "acme"]);
        standby.stop();
        std::fs::write(standby.data().join("standby.signal"), "").unwrap();
        standby.start_again();
        let login = async || Wire::login(proxy.port(), "alice", "alice secret", "acme").await;
        let mut open = login().await;
        assert_eq!(open.parameters["in_hot_standby"], "on", "{mode}");
        open.query("SELECT 1").await;
        let mut left = login().await;
        left.query("SELECT 1").await;
        drop(left);
        assert_eq!(standby.client("postgres").await.ask("SELECT pg_promote()").await, "t");
        assert_eq!(login().await.parameters["in_hot_standby"], "off", "{mode}");
        open.query("SELECT 1").await;
        assert_eq!(open.parameters["in_hot_standby"], "off", "{mode}");
        assert_eq!(login().await.parameters["in_hot_standby"], "off", "{mode}");
    }
}
