//! `tenant rotate`: new passwords under the feet of clients that notice nothing, whatever dies on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use pglobby::control_path::{
    onboarding::{create::create, drop::DropDatabase, drop::drop_tenant, rotate::rotate},
    seal::Place,
    tenants,
};
use secrecy::SecretString;
use support::{
    Cluster, Proxy,
    client::in_time,
    desk::{Desk, Master, Steps, StopAfter, tenant},
};

/// The passwords in the tenant's row let in, as both roles.
async fn assert_row_lets_in(desk: &Desk, name: &str) {
    for (role, column) in [("username", "sealed_password"), ("ro_username", "sealed_ro_password")] {
        let central = desk.superuser("central").await;
        let sql = format!("SELECT id, {role}, {column}, database FROM pglobby.tenants WHERE name = $1");
        let row = central.query_one(&sql, &[&name]).await.unwrap();
        let id = row.get::<_, i64>(0).to_string();
        let place = Place { table: "tenants", row: &id, column };
        let password: SecretString = desk.operator.keyring.open(&place, row.get(2)).unwrap();
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(desk.lobby.cluster.port()).user(row.get::<_, String>(1));
        config.dbname(row.get::<_, String>(3)).password(secrecy::ExposeSecret::expose_secret(&password));
        support::Client::connect(&config).await.unwrap();
    }
}

async fn verifiers(desk: &Desk) -> String {
    let sql =
        "SELECT string_agg(rolpassword, ' ' ORDER BY rolname) FROM pg_authid WHERE rolname LIKE 'acme%'";
    desk.superuser("postgres").await.ask(sql).await
}

#[tokio::test]
async fn both_roles_get_other_passwords_and_the_row_knows_them() {
    for master in [Master::Superuser, Master::Modest] {
        let desk = Desk::on(Cluster::build(), master).await;
        create(&desk.operator, &tenant("acme")).await.unwrap();
        let before = verifiers(&desk).await;
        let mut operator = desk.another_operator();
        let steps = Arc::new(Steps::default());
        operator.progress = Some(steps.clone());

        let rotated = rotate(&operator, "acme").await.unwrap();

        assert_eq!(rotated.roles, ["acme_rw", "acme_ro"]);
        assert_eq!(steps.all(), ["begun", "prepared", "roles", "stored", "rotated"]);
        let after = verifiers(&desk).await;
        assert!(before.split(' ').zip(after.split(' ')).all(|(old, new)| old != new));
        assert_row_lets_in(&desk, "acme").await;
        let central = desk.superuser("central").await;
        assert_eq!(central.ask("SELECT generation FROM pglobby.tenants").await, "3");
        let actions =
            "SELECT string_agg(action, ' ' ORDER BY id) FROM pglobby.audit_log WHERE tenant = 'acme'";
        assert_eq!(central.ask(actions).await, "tenant.create tenant.rotate");
    }
}

#[tokio::test]
async fn killed_after_any_step_rotating_again_mends_everything() {
    let desk = Desk::new().await;
    create(&desk.operator, &tenant("acme")).await.unwrap();
    let before = desk.remains().await;
    for step in ["begun", "prepared", "roles", "stored", "rotated"] {
        let mut dying = desk.another_operator();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(rotate(&dying, "acme").await) }).await;

        rotate(&desk.another_operator(), "acme").await.unwrap();

        assert_row_lets_in(&desk, "acme").await;
        assert_eq!(desk.remains().await, before, "killed after {step}");
    }
}

#[tokio::test]
async fn a_tenant_whose_rotation_died_can_be_dropped() {
    let desk = Desk::new().await;
    let before = desk.remains().await;
    create(&desk.operator, &tenant("acme")).await.unwrap();
    let mut dying = desk.another_operator();
    let killer = StopAfter::step("roles");
    dying.progress = Some(killer.clone());
    killer.kill(async { drop(rotate(&dying, "acme").await) }).await;

    drop_tenant(&desk.operator, "acme", DropDatabase::IfOurs).await.unwrap();

    desk.superuser("central").await.run("DELETE FROM pglobby.tenants").await;
    assert_eq!(desk.remains().await, before);
}

#[tokio::test]
async fn passwords_that_do_not_let_in_are_taken_back() {
    let desk = Desk::new().await;
    create(&desk.operator, &tenant("acme")).await.unwrap();
    let superuser = desk.superuser("postgres").await;
    superuser.run("ALTER ROLE acme_rw CONNECTION LIMIT 0").await;

    let error = rotate(&desk.operator, "acme").await.expect_err("nobody gets in").to_string();

    assert!(
        error.contains("too many connections") && error.contains("old passwords are in use again"),
        "{error}"
    );
    superuser.run("ALTER ROLE acme_rw CONNECTION LIMIT -1").await;
    assert_row_lets_in(&desk, "acme").await;
    let operations = "SELECT status FROM pglobby.operations WHERE kind = 'rotate'";
    assert_eq!(desk.superuser("central").await.ask(operations).await, "undone");
}

#[tokio::test]
async fn who_has_no_passwords_or_foreign_roles_is_not_rotated() {
    let desk = Desk::new().await;
    assert!(rotate(&desk.operator, "acme").await.expect_err("nobody").to_string().contains("no tenant"));
    create(&desk.operator, &tenant("acme")).await.unwrap();
    tenants::suspend(&desk.operator, "acme", None).await.unwrap();
    assert_eq!(rotate(&desk.operator, "acme").await.unwrap().status, "suspended");
    let before = verifiers(&desk).await;
    desk.superuser("postgres").await.run("COMMENT ON ROLE acme_ro IS 'mine'").await;

    let error = rotate(&desk.operator, "acme").await.expect_err("not ours").to_string();

    assert!(error.contains("acme_ro") && error.contains("not made by pglobby"), "{error}");
    assert_eq!(verifiers(&desk).await, before);
}

/// Five rotations while four clients ask and one sits in a transaction: the same sessions go on, through servers that
/// were logged in with one password after the other.
#[tokio::test(flavor = "multi_thread")]
async fn clients_notice_nothing_of_a_rotation() {
    let proxy = Proxy::with_tenant("acme").pool_size(3).start().await;
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::new(AtomicU32::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (caller, stop, asked) = (proxy.client("acme"), stop.clone(), asked.clone());
        clients.spawn(async move {
            let client = caller.connect().await;
            while !stop.load(Ordering::Relaxed) {
                client.run("BEGIN").await.run("SELECT 1").await.run("COMMIT").await;
                asked.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let patient = proxy.client("acme").connect().await;
    patient.run("BEGIN; CREATE TABLE kept (a int)").await;
    let transaction_pid = patient.server_pid().await;
    let first_pid = proxy.client("acme").ask("SELECT pg_backend_pid()").await;

    for _ in 0..5 {
        let before = asked.load(Ordering::Relaxed);
        let rotated = proxy.json(&["tenant", "rotate", "acme", "--json"]);
        assert_eq!(rotated["roles"][0], "acme_rw");
        let progress = async {
            while asked.load(Ordering::Relaxed) < before + 20 {
                tokio::task::yield_now().await;
            }
        };
        in_time("clients go on", progress).await;
    }

    assert_eq!(patient.server_pid().await, transaction_pid);
    patient.run("COMMIT").await;
    assert_ne!(patient.server_pid().await, transaction_pid, "its server was closed when it came back");
    let live = "SELECT count(*) FROM pg_stat_activity WHERE pid = ";
    let superuser = proxy.behind("acme").await;
    let gone = async { while superuser.ask(&format!("{live}{first_pid}")).await != "0" {} };
    in_time("servers of the old password are closed", gone).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
}
