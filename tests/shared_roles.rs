//! The two roles that all logins of a tenant share on its host: who reads cannot write, what a tenant's own code has done to
//! them is found and undone, and nobody gets past a suspension.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use pglobby::control_path::{
    admin::tenants::{self, SuspendSessions},
    doctor::examine,
    onboarding::{
        create::create,
        drop::{DropDatabase, drop_tenant},
        role_attributes::follow_status,
        rotate::rotate,
    },
};
use support::{
    Client, Cluster, Proxy,
    admin::{Admin, Master, tenant},
    client::{in_time, sqlstate},
};

/// `sql` runs where no text is read.
fn hidden(sql: &str) -> String {
    format!("DO $do$ BEGIN EXECUTE $x${sql}$x$; END $do$")
}

/// Whatever a reader SETs, the role has no right to write.
#[tokio::test]
async fn a_reader_writes_nothing_whatever_it_sets() {
    let proxy = Proxy::with_tenant("acme").start().await;
    proxy.create_login("reader", "secret", &["--tenant", "acme", "--read-only"]);
    let owner = proxy.client("acme").connect().await;
    owner
        .run(
            "CREATE TABLE t (a int, b text); INSERT INTO t VALUES (1, 'x'); CREATE SEQUENCE s; CREATE SCHEMA hr;
             CREATE TABLE hr.pay (a int); CREATE VIEW v AS SELECT * FROM t; CREATE MATERIALIZED VIEW m AS SELECT * FROM t;
             CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'INSERT INTO t VALUES (2)'; SELECT lo_create(4711)",
        )
        .await;
    let reader = proxy.caller("reader", "secret", "acme").connect().await;
    reader.run("SET default_transaction_read_only = off").await;
    assert_eq!(reader.ask("SELECT count(*) FROM t").await, "1");
    assert_eq!(reader.ask("SELECT count(*) FROM hr.pay").await, "0", "what was made later can be read");
    for sql in [
        "INSERT INTO t VALUES (2)",
        "UPDATE t SET a = 2",
        "DELETE FROM v",
        "TRUNCATE t",
        "COPY t FROM STDIN",
        "SELECT * FROM t FOR UPDATE",
        "REFRESH MATERIALIZED VIEW m",
        "SELECT nextval('s')",
        "SELECT setval('s', 7)",
        "SELECT f()",
        "SELECT lo_create(0)",
        "SELECT lo_creat(-1)",
        "SELECT lo_from_bytea(0, 'x')",
        "SELECT lo_put(4711, 0, 'x')",
        "SELECT lo_unlink(4711)",
        "SELECT lo_open(4711, 131072)",
        "CREATE TABLE public.mine (a int)",
        "CREATE TABLE hr.mine (a int)",
        "CREATE TEMP TABLE mine (a int)",
        "CREATE SCHEMA mine",
        "CREATE FUNCTION public.g() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "SELECT 1 INTO TEMP mine",
    ] {
        let code = reader.refusal_of(sql).await;
        assert!(["42501", "42809"].contains(&code.as_str()), "{sql}: {code}");
        // By code that nobody reads, too.
        if !sql.starts_with("COPY") {
            let code = reader.refusal_of(&hidden(sql)).await;
            assert!(["42501", "42809", "0A000"].contains(&code.as_str()), "{sql}: {code}");
        }
    }
    owner.run("INSERT INTO t VALUES (3); SELECT lo_put(4711, 0, 'ours'), lo_create(0)").await;
    assert_eq!(reader.ask("SELECT count(*) FROM t").await, "2");
}

async fn settled(superuser: &Client) -> String {
    superuser
        .ask(
            "SELECT string_agg(concat_ws(' ', rolname, rolcanlogin, rolconnlimit, rolvaliduntil, (SELECT array_agg(setconfig)
                FROM pg_db_role_setting WHERE setrole = r.oid)), ', ' ORDER BY rolname) FROM pg_roles r WHERE rolname ~ '^acme_'",
        )
        .await
}

/// An employee's function changes the shared password; nobody is kept out for longer than it takes to make another.
#[tokio::test]
async fn a_shared_password_that_was_changed_by_code_is_made_anew_once() {
    for mode in ["transaction", "session"] {
        let proxy = Proxy::with_tenant("acme").pool_mode(mode).start().await;
        proxy.create_login("reader", "secret", &["--tenant", "acme", "--read-only"]);
        let reader = proxy.caller("reader", "secret", "acme");
        let culprit = reader.connect().await;
        culprit.run("SET default_transaction_read_only = off").await;
        culprit.run(&hidden("ALTER ROLE CURRENT_USER PASSWORD 'known to one'")).await;
        culprit.leave().await;
        proxy.console().await.run("RECONNECT").await;
        // Many at once: whoever waits gets a server that was opened with the new password.
        let waiting: Vec<_> = (0..6)
            .map(|_| {
                let reader = reader.clone();
                tokio::spawn(async move { reader.ask("SELECT 1").await })
            })
            .collect();
        for answer in waiting {
            assert_eq!(in_time("an answer", answer).await.unwrap(), "1");
        }
        let mut config = proxy.cluster.config("acme");
        config.user("acme_ro").password("known to one");
        assert!(Client::connect(&config).await.is_err(), "the culprit's password is nobody's");
        let central = proxy.cluster.client("central").await;
        let audited = "SELECT string_agg(action || ' ' || actor, ', ' ORDER BY id) FROM pglobby.audit_log WHERE actor = 'pglobby'";
        proxy.logged("tenant roles repaired").await;
        assert_eq!(central.ask(audited).await, "tenant.rotate pglobby, tenant.roles_mended pglobby", "once");
        assert_eq!(proxy.metric(r#"pglobby_roles_mended_total{outcome="mended"}"#).await, 1.0);
        assert!(!proxy.log().contains("known to one"));
    }
}

/// What a tenant's code can do to its own roles and its database, each alone: the next connection has it undone.
#[tokio::test]
async fn what_keeps_everybody_out_is_undone_at_the_next_connection() {
    for (whose, sql) in [
        ("acme_user", "ALTER ROLE CURRENT_USER SET local_preload_libraries = 'nosuch'"),
        ("acme_user", "ALTER DATABASE acme CONNECTION LIMIT 0"),
        ("acme_user", "ALTER DATABASE acme CONNECTION LIMIT 1"),
        ("acme_user", "ALTER DATABASE acme SET local_preload_libraries = 'nosuch'"),
        ("reader", "DROP OWNED BY CURRENT_USER"),
        ("superuser", "ALTER ROLE acme_ro NOLOGIN; ALTER ROLE acme_rw NOLOGIN"),
        ("superuser", "ALTER ROLE acme_ro CONNECTION LIMIT 0; ALTER ROLE acme_rw VALID UNTIL 'yesterday'"),
    ] {
        let proxy = Proxy::with_tenant("acme").start().await;
        proxy.create_login("reader", "secret", &["--tenant", "acme", "--read-only"]);
        let (owner, reader) = (proxy.client("acme"), proxy.caller("reader", "secret", "acme"));
        owner.connect().await.run("CREATE TABLE t (a int)").await;
        let superuser = proxy.cluster.client("postgres").await;
        let before = settled(&superuser).await;
        match whose {
            "superuser" => drop(superuser.run(sql).await),
            "reader" => {
                let reader = reader.connect().await;
                reader.run("SET default_transaction_read_only = off").await;
                reader.run(&hidden(sql)).await;
            }
            _ => drop(owner.connect().await.run(&hidden(sql)).await),
        }
        proxy.console().await.run("RECONNECT").await;
        for caller in [&reader, &owner] {
            assert_eq!(caller.ask("SELECT count(*) FROM t").await, "0", "{sql}");
        }
        let after = settled(&superuser).await;
        assert_eq!(after.replace(" infinity", ""), before.replace(" infinity", ""), "{sql}");
    }
}

/// Settings that a tenant's code puts on the shared role let everybody in, and would spoil every session that begins from then on.
#[tokio::test]
async fn settings_that_code_puts_on_a_shared_role_are_undone_before_the_next_session_begins() {
    for (mode, who, sql) in [
        ("transaction", "acme_user", "ALTER ROLE CURRENT_USER SET statement_timeout = 1"),
        ("session", "acme_user", "ALTER ROLE CURRENT_USER SET statement_timeout = 1"),
        ("transaction", "reader", "ALTER ROLE CURRENT_USER SET statement_timeout = 1"),
        ("transaction", "acme_user", "ALTER ROLE CURRENT_USER IN DATABASE acme SET search_path = nowhere"),
        ("session", "reader", "ALTER ROLE CURRENT_USER RESET ALL"),
    ] {
        let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(2).start().await;
        proxy.create_login("reader", "secret", &["--tenant", "acme", "--read-only"]);
        let owner = proxy.client("acme");
        let caller = if who == "reader" { proxy.caller("reader", "secret", "acme") } else { owner.clone() };
        owner.connect().await.run("CREATE TABLE t (a int)").await;
        let superuser = proxy.cluster.client("postgres").await;
        let before = settled(&superuser).await;
        let culprit = caller.connect().await;
        culprit.run("SET default_transaction_read_only = off").await;
        culprit.run(&hidden(sql)).await;
        for _ in 0..2 {
            let found = caller
                .ask(
                    "SELECT concat_ws(' ', current_setting('statement_timeout'), current_setting('search_path'),
                        current_setting('default_transaction_read_only'), (SELECT count(*) FROM t))",
                )
                .await;
            let reads = if who == "reader" { "on" } else { "off" };
            assert_eq!(found, format!("0 \"$user\", public {reads} 0"), "{mode} {who} {sql}");
        }
        let after = settled(&superuser).await;
        assert_eq!(after.replace(" infinity", ""), before, "{mode} {who} {sql}");
        // Who was there before goes on.
        assert_eq!(culprit.ask("SELECT count(*) FROM t").await, "0");
        proxy.logged("their settings differed").await;
        let central = proxy.cluster.client("central").await;
        let audited = "SELECT string_agg(action || ' ' || coalesce(detail->>'because', ''), ', ' ORDER BY id) \
                       FROM pglobby.audit_log WHERE actor = 'pglobby'";
        let audited = central.ask(audited).await;
        assert!(audited.starts_with("tenant.rotate , tenant.roles_mended role \"acme_r"), "{audited}");
        assert_eq!(audited.matches("tenant.roles_mended").count(), 1, "once");
        assert_eq!(proxy.metric(r#"pglobby_roles_mended_total{outcome="mended"}"#).await, 1.0);
    }
}

/// Who tries one thing after the other is a nuisance, and no reason to leave the others what has been set.
#[tokio::test]
async fn what_code_does_to_a_shared_role_is_undone_again_when_it_does_it_again() {
    let proxy = Proxy::with_tenant("acme").start().await;
    for (parameter, value, kept) in [
        ("statement_timeout", "1", "0"),
        ("work_mem", "'64kB'", "4MB"),
        ("search_path", "nowhere", "\"$user\", public"),
        ("default_transaction_read_only", "on", "off"),
    ] {
        let culprit = proxy.client("acme").connect().await;
        culprit.run(&hidden(&format!("ALTER ROLE CURRENT_USER SET {parameter} = {value}"))).await;
        assert_eq!(proxy.client("acme").ask(&format!("SHOW {parameter}")).await, kept);
    }
    assert_eq!(proxy.metric(r#"pglobby_roles_mended_total{outcome="mended"}"#).await, 4.0);
}

/// Where no server is idle, the first one that is opened begins with what was set, and may break before it says so.
#[tokio::test]
async fn settings_of_a_shared_role_are_undone_though_servers_break_as_they_begin() {
    for parameter in ["statement_timeout", "idle_session_timeout", "lock_timeout"] {
        let proxy = Proxy::with_tenant("acme").start().await;
        let superuser = proxy.cluster.client("postgres").await;
        proxy
            .client("acme")
            .connect()
            .await
            .run(&hidden(&format!("ALTER ROLE CURRENT_USER SET {parameter} = 1")))
            .await;
        proxy.console().await.run("RECONNECT").await;
        let waiting: Vec<_> = (0..6)
            .map(|_| {
                let owner = proxy.client("acme");
                let sql = format!("SELECT current_setting('{parameter}')");
                tokio::spawn(async move { owner.ask(&sql).await })
            })
            .collect();
        for answer in waiting {
            assert_eq!(in_time("an answer", answer).await.unwrap(), "0", "{parameter}");
        }
        let left = "SELECT count(*) FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole AND rolname = 'acme_rw'";
        assert_eq!(superuser.ask(left).await, "0");
        assert_eq!(proxy.metric(r#"pglobby_roles_mended_total{outcome="mended"}"#).await, 1.0);
    }
}

/// Settings of a role that pglobby did not make are its owner's: every session finds them.
#[tokio::test]
async fn settings_of_a_role_that_is_not_ours_are_left_alone_without_a_word() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let superuser = proxy.cluster.client("postgres").await;
    superuser.run("COMMENT ON ROLE acme_rw IS 'mine'; ALTER ROLE acme_rw SET work_mem = '8MB'").await;
    for _ in 0..3 {
        assert_eq!(proxy.client("acme").ask("SHOW work_mem").await, "8MB");
    }
    assert_eq!(proxy.metric(r#"pglobby_roles_mended_total{outcome="failed"}"#).await, 0.0);
    assert!(!proxy.log().contains("cannot repair a tenant's roles"));
}

/// What cannot be put right is told to whoever waits, in the server's words, and is not tried again and again.
#[tokio::test]
async fn roles_that_are_not_ours_are_left_alone_and_everybody_is_told() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let superuser = proxy.cluster.client("postgres").await;
    superuser.run("COMMENT ON ROLE acme_rw IS 'mine'; ALTER ROLE acme_rw PASSWORD 'mine'").await;
    for _ in 0..3 {
        let error = proxy.client("acme").try_connect().await.err().expect("refused");
        assert_eq!(sqlstate(&error), "08006");
    }
    proxy.logged("cannot repair a tenant's roles").await;
    assert_eq!(proxy.metric(r#"pglobby_roles_mended_total{outcome="failed"}"#).await, 1.0);
    assert_eq!(proxy.metric(r#"pglobby_roles_mended_total{outcome="mended"}"#).await, 0.0);
}

#[tokio::test]
async fn a_rotation_undoes_whatever_was_done_to_the_roles() {
    for master in [Master::Superuser, Master::Createrole] {
        let admin = Admin::on(Cluster::build(), master).await;
        create(&admin.actor, &tenant("acme")).await.unwrap();
        let superuser = admin.superuser("postgres").await;
        for sql in [
            "ALTER ROLE acme_rw SET local_preload_libraries = 'nosuch'",
            "ALTER ROLE acme_ro IN DATABASE acme SET local_preload_libraries = 'nosuch'",
            "ALTER ROLE acme_rw SET statement_timeout = '1ms'; ALTER ROLE acme_ro RESET ALL",
            "ALTER DATABASE acme SET local_preload_libraries = 'nosuch'",
            "ALTER ROLE acme_rw NOLOGIN CONNECTION LIMIT 0 VALID UNTIL 'yesterday'",
            "ALTER DATABASE acme CONNECTION LIMIT 0",
            "ALTER DATABASE acme CONNECTION LIMIT 1; ALTER DATABASE acme IS_TEMPLATE true",
            "REVOKE ALL ON DATABASE acme FROM acme_rw, acme_ro",
            "ALTER DATABASE acme SET statement_timeout = 1",
            "ALTER DATABASE acme SET idle_session_timeout = '500us'",
            "ALTER DATABASE acme SET idle_session_timeout = '0.02s'",
            "ALTER DATABASE acme SET idle_in_transaction_session_timeout = '99 ms'",
        ] {
            superuser.run(sql).await;
            rotate(&admin.actor, "acme").await.unwrap_or_else(|error| panic!("{sql}: {error}"));
            let findings = examine(&admin.actor, &[], false).await.unwrap().findings;
            let wrong: Vec<_> =
                findings.iter().filter(|finding| finding.check != "reader_makes_large_objects").collect();
            assert!(wrong.is_empty(), "{master:?} {sql}: {wrong:#?}");
        }
        let inside = admin.superuser("acme").await;
        for who in ["acme_rw", "acme_ro"] {
            inside.run(&format!("DROP OWNED BY {who}")).await;
            rotate(&admin.actor, "acme").await.unwrap();
            inside
                .run("SET ROLE acme_rw; DROP TABLE IF EXISTS t; CREATE TABLE t (id serial); RESET ROLE")
                .await;
            let reads = "SELECT has_table_privilege('acme_ro', 't', 'SELECT')";
            assert_eq!(inside.ask(reads).await, "t", "{who}");
        }
        inside.leave().await;
        let set = "SELECT count(*) FROM pg_db_role_setting WHERE setrole = 0";
        assert_eq!(superuser.ask(set).await, "0");
        // Timeouts that sessions can live with are the owner's affair.
        for value in ["100", "'0.1s'", "'1min'", "0"] {
            superuser.run(&format!("ALTER DATABASE acme SET idle_session_timeout = {value}")).await;
            rotate(&admin.actor, "acme").await.unwrap();
            assert_eq!(superuser.ask(set).await, "1", "{value}");
        }
    }
}

/// A template cannot be dropped, and whoever owns a database may call it one.
#[tokio::test]
async fn a_database_that_its_tenant_calls_a_template_is_dropped_all_the_same() {
    for master in [Master::Superuser, Master::Createrole] {
        let admin = Admin::on(Cluster::build(), master).await;
        let before = admin.remains().await;
        let made = create(&admin.actor, &tenant("acme")).await.unwrap();
        let owner = admin.login(&made.username, &made.database).await.unwrap();
        owner.run("ALTER DATABASE acme IS_TEMPLATE true").await;
        owner.leave().await;
        drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
        assert_eq!(
            admin.remains().await.replace("acme dropped", "").trim_end(),
            before.trim_end(),
            "{master:?}"
        );
    }
}

async fn may_log_in(superuser: &Client) -> String {
    superuser
        .ask("SELECT string_agg(rolcanlogin::text, ' ' ORDER BY rolname) FROM pg_roles WHERE rolname ~ '^acme_'")
        .await
}

/// Who knows the password of a role gets no further than anybody else while the tenant is suspended.
#[tokio::test]
async fn a_suspension_keeps_the_roles_out_through_whatever_is_done_to_the_tenant() {
    let admin = Admin::new().await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let superuser = admin.superuser("postgres").await;
    assert_eq!(may_log_in(&superuser).await, "true true");
    tenants::suspend(&admin.actor, "acme", None, SuspendSessions::EndNow).await.unwrap();
    assert_eq!(may_log_in(&superuser).await, "false false");
    rotate(&admin.actor, "acme").await.unwrap();
    assert_eq!(may_log_in(&superuser).await, "false false", "rotated");
    pglobby::control_path::onboarding::rename::rename(&admin.actor, "acme", "acme2").await.unwrap();
    assert_eq!(may_log_in(&superuser).await, "false false", "renamed");
    assert!(examine(&admin.actor, &[], false).await.unwrap().ok);
    superuser.run("ALTER ROLE acme_ro LOGIN").await;
    let report = examine(&admin.actor, &[], true).await.unwrap();
    assert!(report.ok && report.fixed[0].check == "role_changed", "{report:#?}");
    assert_eq!(may_log_in(&superuser).await, "false false", "the doctor has seen it");
    tenants::resume(&admin.actor, "acme2").await.unwrap();
    assert_eq!(may_log_in(&superuser).await, "true true");
    // By plain SQL the row alone changes; the doctor, or whoever follows the status, does the rest.
    admin.superuser("central").await.run("UPDATE pglobby.tenants SET status = 'suspended'").await;
    follow_status(&admin.actor, "acme2").await;
    assert_eq!(may_log_in(&superuser).await, "false false");
}

#[tokio::test]
async fn a_tenant_is_suspended_and_resumed_though_its_host_is_down() {
    let mut host = Cluster::start();
    let proxy = Proxy::with_tenant("beta").start().await;
    proxy.add_host("other", &host);
    proxy.command(&["tenant", "create", "acme", "--host", "other"]);
    proxy.create_login("acme_user", "acme-secret", &["--tenant", "acme"]);
    host.stop();
    let output = proxy.command_with(&["tenant", "suspend", "acme"], "");
    assert!(output.status.success());
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("log in directly"), "{told}");
    assert_eq!(proxy.client("acme").refusal().await, "57P03");
    host.start_again();
    assert_eq!(may_log_in(&host.client("postgres").await).await, "true true", "nobody could tell it");
    proxy.command_with(&["doctor", "--fix"], "");
    assert_eq!(may_log_in(&host.client("postgres").await).await, "false false");
    host.stop();
    assert!(proxy.command_with(&["tenant", "resume", "acme"], "").status.success());
    host.start_again();
    // The first connection finds the roles shut, and has them opened.
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    assert_eq!(may_log_in(&host.client("postgres").await).await, "true true");
}
