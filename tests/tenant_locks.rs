//! A tenant that keeps locks on what an operator must change: its role, its database, something that it has granted to a
//! neighbour, the subscription of its move. Every command comes to its end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::time::Duration;

use pglobby::control_path::{
    admin::tenants,
    onboarding::{
        create::create,
        drop::{DropDatabase, drop_tenant},
        move_tenant::{MoveTenant, move_tenant},
        rotate::rotate,
    },
};
use support::{
    Client, Cluster,
    admin::{Admin, Master, tenant},
    cluster::Builder,
};

/// As a code block says it, where the text alone would be refused at the proxy.
const LOCKS_ITS_ROLE: &str = "BEGIN; DO $$BEGIN EXECUTE 'ALTER ROLE acme_rw PASSWORD NULL'; END$$";

fn preparing(version: Builder) -> Builder {
    version.setting("max_prepared_transactions", "5")
}

/// Tenant acme, and its role, logged in.
async fn acme(admin: &Admin) -> Client {
    create(&admin.actor, &tenant("acme")).await.unwrap();
    admin.login("acme_rw", "acme").await.unwrap()
}

/// The transaction of `sql` stays open without a session.
async fn prepare(admin: &Admin, name: &str, sql: &str) {
    let own = admin.login("acme_rw", "acme").await.unwrap();
    own.run(&format!("{sql}; PREPARE TRANSACTION '{name}'")).await;
    own.leave().await;
}

async fn prepared(admin: &Admin) -> String {
    admin.superuser("postgres").await.ask("SELECT count(*) FROM pg_prepared_xacts").await
}

async fn a_role_that_its_tenant_has_locked(master: Master) {
    let admin = Admin::on(preparing(Cluster::build()), master).await;
    let own = acme(&admin).await;
    own.run(LOCKS_ITS_ROLE).await;

    rotate(&admin.actor, "acme").await.unwrap();

    own.try_run("SELECT 1").await.expect_err("its session has ended");
    prepare(&admin, "acme", LOCKS_ITS_ROLE).await;
    rotate(&admin.actor, "acme").await.unwrap();
    assert_eq!(prepared(&admin).await, "0");
    prepare(&admin, "acme", LOCKS_ITS_ROLE).await;
    tenants::suspend(&admin.actor, "acme", None, tenants::SuspendSessions::EndNow).await.unwrap();
    assert_eq!(prepared(&admin).await, "0");
    let locked = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'acme%' AND NOT rolcanlogin";
    assert_eq!(admin.superuser("postgres").await.ask(locked).await, "2", "suspended on its host, too");
}

#[tokio::test]
async fn a_role_that_its_tenant_has_locked_is_rotated_and_suspended_all_the_same() {
    a_role_that_its_tenant_has_locked(Master::Superuser).await;
}

#[tokio::test]
async fn a_role_that_its_tenant_has_locked_is_rotated_and_suspended_without_a_superuser() {
    a_role_that_its_tenant_has_locked(Master::Createrole).await;
}

#[tokio::test]
async fn a_tenant_with_prepared_transactions_is_dropped_with_a_last_copy() {
    let admin = Admin::on(preparing(Cluster::build()), Master::Createrole).await;
    let own = acme(&admin).await;
    own.run("CREATE TABLE orders (id int)").await;
    own.leave().await;
    prepare(&admin, "a \\ \"table\"", "BEGIN; LOCK TABLE orders").await;
    let limit = "BEGIN; DO $$BEGIN EXECUTE 'ALTER DATABASE acme CONNECTION LIMIT 5'; END$$";
    prepare(&admin, "a database", limit).await;
    prepare(&admin, "a role", LOCKS_ITS_ROLE).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("acme.dump");
    let file = std::env::var("PGLOBBY_TEST_POSTGRES").is_err().then_some(file.as_path());

    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, file).await.unwrap();

    assert_eq!(prepared(&admin).await, "0");
    assert!(!admin.remains().await.contains("acme_rw"));
}

/// Whoever grants something to a neighbour's role has it in the records of that role.
#[tokio::test]
async fn a_neighbour_cannot_keep_a_tenant_from_being_dropped() {
    let admin = Admin::on(preparing(Cluster::build()), Master::Createrole).await;
    let own = acme(&admin).await;
    create(&admin.actor, &tenant("globex")).await.unwrap();
    own.run("CREATE TABLE a (id int); CREATE TABLE b (id int); GRANT SELECT ON a, b TO globex_rw").await;
    own.run("BEGIN; ALTER TABLE a ADD more int").await;
    prepare(&admin, "b", "BEGIN; ALTER TABLE b ADD more int").await;
    // Nor by letting no connection in but a superuser's.
    let limit = "DO $$BEGIN EXECUTE 'ALTER DATABASE acme CONNECTION LIMIT 0'; END$$";
    admin.login("acme_rw", "acme").await.unwrap().run(limit).await;

    drop_tenant(&admin.actor, "globex", DropDatabase::IfOurs, None).await.unwrap();

    assert!(!admin.remains().await.contains("globex_rw"));
}

/// A check of the tenant's, evaluated by the subscription's workers as the tenant's role, which owns the subscription.
async fn a_move_with(deed: &str) -> (Admin, Cluster) {
    let cluster = Cluster::build().setting("wal_level", "logical");
    let admin = Admin::on(cluster, Master::Superuser).await;
    let central = admin.superuser("central").await;
    let hba = "host all master 127.0.0.1/32 trust\nlocal all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";
    let west = Cluster::postgres_18().hba(hba).setting("wal_retrieve_retry_interval", "100ms").start();
    let host = format!(
        "INSERT INTO pglobby.hosts (name, address, port, admin_user, accepts_tenants)
         VALUES ('west', '127.0.0.1', {}, 'master', false)",
        west.port()
    );
    central.run(&host).await;
    let own = acme(&admin).await;
    let check = format!(
        "CREATE FUNCTION public.deed(id int) RETURNS bool LANGUAGE plpgsql AS $$
         DECLARE name text;
         BEGIN
             FOR name IN SELECT subname FROM pg_catalog.pg_subscription WHERE subname <> 'mine' LOOP
                 RAISE LOG 'DEED %', name;
                 {deed}
             END LOOP;
             RETURN true;
         END $$;
         CREATE TABLE public.orders (id int PRIMARY KEY CHECK (public.deed(id)));
         INSERT INTO public.orders VALUES (1)"
    );
    own.run(&check).await;
    own.leave().await;
    rotate(&admin.actor, "acme").await.unwrap();
    (admin, west)
}

/// Nothing that replicates is left: a slot that nobody reads fills the old host's disk.
async fn assert_moved(admin: &Admin, west: &Cluster) {
    assert!(west.log().contains("LOG:  DEED pglobby_"), "it was done");
    let (here, there) = (admin.superuser("postgres").await, west.client("postgres").await);
    assert_eq!(here.ask("SELECT count(*) FROM pg_replication_slots").await, "0");
    assert_eq!(there.ask("SELECT count(*) FROM pg_subscription").await, "0");
    for at in [&here, &there] {
        assert_eq!(at.ask(r"SELECT count(*) FROM pg_roles WHERE rolname LIKE 'pglobby\_%'").await, "0");
    }
    assert_eq!(west.client("acme").await.ask("SELECT count(*) FROM orders").await, "1");
}

async fn move_to_west(admin: &Admin) {
    let to = MoveTenant { host: "west".to_owned(), patience: Duration::from_secs(20), keep_source: false };
    move_tenant(&admin.actor, "acme", &to).await.unwrap();
}

#[tokio::test]
async fn a_subscription_that_its_tenant_renames_is_found_again() {
    let (admin, west) =
        a_move_with("EXECUTE pg_catalog.format('ALTER SUBSCRIPTION %I RENAME TO mine', name);").await;

    move_to_west(&admin).await;

    assert_moved(&admin, &west).await;
}

/// It also reads from a place that takes connections and never answers.
#[tokio::test]
async fn a_subscription_that_its_tenant_holds_on_to_is_ended_all_the_same() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let deed = format!(
        "EXECUTE pg_catalog.format('ALTER SUBSCRIPTION %I CONNECTION %L', name, 'host=127.0.0.1 port={port} password=x');
         EXECUTE pg_catalog.format('ALTER SUBSCRIPTION %I DISABLE', name);
         PERFORM pg_catalog.pg_sleep(1000000);"
    );
    let (admin, west) = a_move_with(&deed).await;
    // Whoever asks for the move has had enough.
    let to = MoveTenant { host: "west".to_owned(), patience: Duration::from_secs(20), keep_source: false };
    tokio::select! {
        moved = move_tenant(&admin.actor, "acme", &to) => panic!("{moved:?}"),
        () = done_there(&west) => {}
    }
    let replaced =
        "CREATE OR REPLACE FUNCTION public.deed(id int) RETURNS bool LANGUAGE sql AS 'SELECT true'";
    admin.superuser("acme").await.run(replaced).await;

    move_to_west(&admin).await;

    assert_moved(&admin, &west).await;
}

/// Of tables pg_dump knows itself how long it waits.
#[tokio::test]
async fn a_move_does_not_wait_for_ever_for_a_view_that_its_tenant_has_locked() {
    let (admin, west) = a_move_with("").await;
    let superuser = admin.superuser("acme").await;
    superuser.run("CREATE VIEW public.seen AS SELECT 1").await.run("BEGIN; DROP VIEW public.seen").await;
    let to = MoveTenant { host: "west".to_owned(), patience: Duration::from_secs(20), keep_source: false };

    let refused = move_tenant(&admin.actor, "acme", &to).await.unwrap_err().to_string();

    assert!(refused.contains("for a lock in database \"acme\""), "{refused}");
    assert!(refused.ends_with("stays where it is"), "{refused}");
    assert_eq!(
        west.client("postgres").await.ask("SELECT count(*) FROM pg_database WHERE datname = 'acme'").await,
        "0"
    );
    let dumps = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pglobby pg_dump %'";
    assert_eq!(admin.superuser("postgres").await.ask(dumps).await, "0");
    superuser.run("ROLLBACK").await;
    move_to_west(&admin).await;
}

async fn done_there(west: &Cluster) {
    while !west.log().contains("LOG:  DEED pglobby_") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
