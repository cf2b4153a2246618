//! `tenant rotate`: new passwords under the feet of clients that notice nothing, whatever dies on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use async_trait::async_trait;
use pglobby::control_path::{
    admin::{
        actor::{Actor, AdminError, Progress},
        tenants,
    },
    central::Central,
    onboarding::{
        create::create,
        drop::{DropDatabase, drop_tenant},
        rotate::{RotatedTenant, rotate},
    },
    secrets::{key_rotation, keyring_reload::ReloadableKeyring, seal::SecretLocation},
};
use secrecy::SecretString;
use support::{
    Cluster, Proxy,
    admin::{Admin, Master, Steps, StopAfter, tenant},
    client::in_time,
};
use tokio::task::JoinHandle;

/// The passwords in the tenant's row let in, as both roles.
async fn assert_row_lets_in(admin: &Admin, name: &str) {
    for (role, column) in [("username", "sealed_password"), ("ro_username", "sealed_ro_password")] {
        let central = admin.superuser("central").await;
        let sql = format!("SELECT id, {role}, {column}, database FROM pglobby.tenants WHERE name = $1");
        let row = central.query_one(&sql, &[&name]).await.unwrap();
        let id = row.get::<_, i64>(0).to_string();
        let place = SecretLocation { table: "tenants", row: &id, column };
        let password: SecretString = admin.actor.keyring.open(&place, row.get(2)).unwrap();
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(admin.installation.cluster.port()).user(row.get::<_, String>(1));
        config.dbname(row.get::<_, String>(3)).password(secrecy::ExposeSecret::expose_secret(&password));
        support::Client::connect(&config).await.unwrap();
    }
}

async fn verifiers(admin: &Admin) -> String {
    let sql =
        "SELECT string_agg(rolpassword, ' ' ORDER BY rolname) FROM pg_authid WHERE rolname LIKE 'acme%'";
    admin.superuser("postgres").await.ask(sql).await
}

#[tokio::test]
async fn both_roles_get_other_passwords_and_the_row_knows_them() {
    for master in [Master::Superuser, Master::Createrole] {
        let admin = Admin::on(Cluster::build(), master).await;
        create(&admin.actor, &tenant("acme")).await.unwrap();
        let before = verifiers(&admin).await;
        let mut operator = admin.another_actor();
        let steps = Arc::new(Steps::default());
        operator.progress = Some(steps.clone());

        let rotated = rotate(&operator, "acme").await.unwrap();

        assert_eq!(rotated.roles, ["acme_rw", "acme_ro"]);
        assert_eq!(steps.all(), ["begun", "prepared", "roles", "stored", "rotated"]);
        let after = verifiers(&admin).await;
        assert!(before.split(' ').zip(after.split(' ')).all(|(old, new)| old != new));
        assert_row_lets_in(&admin, "acme").await;
        let central = admin.superuser("central").await;
        assert_eq!(central.ask("SELECT generation FROM pglobby.tenants").await, "3");
        let actions =
            "SELECT string_agg(action, ' ' ORDER BY id) FROM pglobby.audit_log WHERE tenant = 'acme'";
        assert_eq!(central.ask(actions).await, "tenant.create tenant.rotate");
    }
}

#[tokio::test]
async fn killed_after_any_step_rotating_again_mends_everything() {
    let admin = Admin::new().await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let before = admin.remains().await;
    for step in ["begun", "prepared", "roles", "stored", "rotated"] {
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(rotate(&dying, "acme").await) }).await;

        rotate(&admin.another_actor(), "acme").await.unwrap();

        assert_row_lets_in(&admin, "acme").await;
        assert_eq!(admin.remains().await, before, "killed after {step}");
    }
}

#[tokio::test]
async fn a_tenant_whose_rotation_died_can_be_dropped() {
    let admin = Admin::new().await;
    let before = admin.remains().await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let mut dying = admin.another_actor();
    let killer = StopAfter::step("roles");
    dying.progress = Some(killer.clone());
    killer.kill(async { drop(rotate(&dying, "acme").await) }).await;

    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();

    admin.superuser("central").await.run("DELETE FROM pglobby.tenants").await;
    assert_eq!(admin.remains().await, before);
}

/// Whatever was changed about a role before is undone by a rotation; this comes after that.
struct LimitAfterwards(support::Client);

#[async_trait]
impl Progress for LimitAfterwards {
    async fn step(&self, _: &str, step: &str) {
        if step == "stored" {
            self.0.run("ALTER ROLE acme_rw CONNECTION LIMIT 0").await;
        }
    }
}

#[tokio::test]
async fn passwords_that_do_not_let_in_are_taken_back() {
    let admin = Admin::new().await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let mut operator = admin.another_actor();
    operator.progress = Some(Arc::new(LimitAfterwards(admin.superuser("postgres").await)));

    let error = rotate(&operator, "acme").await.expect_err("nobody gets in").to_string();

    assert!(
        error.contains("too many connections") && error.contains("old passwords are in use again"),
        "{error}"
    );
    assert_row_lets_in(&admin, "acme").await;
    let operations = "SELECT status FROM pglobby.operations WHERE kind = 'rotate'";
    assert_eq!(admin.superuser("central").await.ask(operations).await, "undone");
}

/// What was open on the host stayed open then, and undoing waited for it for ever.
#[tokio::test]
async fn a_central_database_that_refuses_the_new_passwords_keeps_the_old_ones() {
    let admin = Admin::new().await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let before = verifiers(&admin).await;
    let central = admin.superuser("central").await;
    central.run("ALTER TABLE pglobby.operations ADD CONSTRAINT refused CHECK (step <> 'stored')").await;

    let rotated = in_time("a refusal", rotate(&admin.actor, "acme")).await;

    let error = rotated.expect_err("refused").to_string();
    assert!(error.contains("old passwords are in use again"), "{error}");
    assert_row_lets_in(&admin, "acme").await;
    central.run("ALTER TABLE pglobby.operations DROP CONSTRAINT refused").await;
    rotate(&admin.actor, "acme").await.unwrap();
    assert_ne!(verifiers(&admin).await, before);
}

#[tokio::test]
async fn who_has_no_passwords_or_foreign_roles_is_not_rotated() {
    let admin = Admin::new().await;
    assert!(
        rotate(&admin.actor, "acme").await.expect_err("there is no tenant").to_string().contains("no tenant")
    );
    create(&admin.actor, &tenant("acme")).await.unwrap();
    tenants::suspend(&admin.actor, "acme", None, tenants::SuspendSessions::EndNow).await.unwrap();
    assert_eq!(rotate(&admin.actor, "acme").await.unwrap().status, "suspended");
    let before = verifiers(&admin).await;
    admin.superuser("postgres").await.run("COMMENT ON ROLE acme_ro IS 'mine'").await;

    let error = rotate(&admin.actor, "acme").await.expect_err("not ours").to_string();

    assert!(error.contains("acme_ro") && error.contains("not made by pglobby"), "{error}");
    assert_eq!(verifiers(&admin).await, before);
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

/// Holds work up after one step until it may go on.
#[derive(Default)]
struct HoldAt {
    step: &'static str,
    reached: tokio::sync::Notify,
    go_on: tokio::sync::Notify,
}

#[async_trait]
impl Progress for HoldAt {
    async fn step(&self, _: &str, step: &str) {
        if step == self.step {
            self.reached.notify_one();
            self.go_on.notified().await;
        }
    }
}

/// A rotation of acme's that is held where the host has the new passwords and the row has not.
async fn between_the_two_commits(
    proxy: &Proxy,
) -> (Arc<HoldAt>, JoinHandle<Result<RotatedTenant, AdminError>>) {
    let config = pglobby::config::Config::load(Some(&proxy.config_file())).unwrap();
    let keyring = Arc::new(ReloadableKeyring::load(&config).unwrap());
    let mut operator = Actor::new(Central::open(&config).unwrap(), keyring, "test");
    let hold = Arc::new(HoldAt { step: "roles", ..HoldAt::default() });
    operator.progress = Some(hold.clone());
    let rotating = tokio::spawn(async move { rotate(&operator, "acme").await });
    in_time("the host has the new passwords", hold.reached.notified()).await;
    (hold, rotating)
}

/// An operator kept the key ring of its first moment: a tenant that was long in the making was sealed with a key that had been
/// retired meanwhile, and nobody could open it any more; other work ended with a key that it did not know.
#[tokio::test]
async fn keys_may_be_rotated_and_retired_while_a_tenant_is_made() {
    let admin = Admin::new().await;
    let mut operator = admin.another_actor();
    let hold = Arc::new(HoldAt { step: "owned", ..HoldAt::default() });
    operator.progress = Some(hold.clone());
    let making = tokio::spawn(async move { create(&operator, &tenant("acme")).await });
    in_time("a tenant in the making", hold.reached.notified()).await;
    let rotated = key_rotation::rotate(&admin.another_actor(), &admin.config, true).await.unwrap();
    assert_eq!(rotated.retired.len(), 1);
    hold.go_on.notify_one();
    making.await.unwrap().unwrap();
    assert_row_lets_in(&admin, "acme").await;
    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
}

/// The host's passwords change a moment before the row's. Servers opened in between with the old ones were refused, and
/// where the tenant had no other, its clients heard of it. Now the pool waits for the row and goes on with what it says.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_opened_between_the_two_commits_is_nobodys_failure() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let holder = proxy.client("acme").connect().await;
    holder.run("BEGIN").await.run("SELECT 1").await;
    let (hold, rotating) = between_the_two_commits(&proxy).await;

    let (known, unknown) = (proxy.client("acme"), proxy.client("acme").options("-c work_mem=3MB"));
    let known = tokio::spawn(async move { known.ask("SELECT 'known'").await });
    // With parameters that nobody had before, so that the login itself needs a server.
    let unknown = tokio::spawn(async move { unknown.ask("SHOW work_mem").await });
    proxy.logged("cannot open a server").await;
    hold.go_on.notify_one();

    assert_eq!(in_time("served", known).await.unwrap(), "known");
    assert_eq!(in_time("served", unknown).await.unwrap(), "3MB");
    rotating.await.unwrap().unwrap();
    holder.run("COMMIT").await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

/// The connection that listens was refused in the same moment, and the client kept a server for LISTEN from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_listen_between_the_two_commits_keeps_no_server() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let listener = proxy.client("acme").connect().await;
    listener.run("SELECT 1").await;
    let (hold, rotating) = between_the_two_commits(&proxy).await;

    let listening = tokio::spawn(async move {
        listener.run("LISTEN news").await;
        listener
    });
    proxy.logged("cannot open a server").await;
    hold.go_on.notify_one();

    let listener = in_time("listening", listening).await.unwrap();
    rotating.await.unwrap().unwrap();
    assert!(proxy.console().await.ask_all("SHOW PINS").await.is_empty());
    assert_eq!(listener.ask("SELECT count(*) FROM pg_listening_channels()").await, "1");
}

/// Passwords sealed with a key that the running proxy had not read made it refuse every login until a HUP.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_proxy_finds_new_sealing_keys_by_itself() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let client = proxy.client("acme").connect().await;
    for _ in 0..3 {
        client.run("SELECT 1").await;
        let rotated = proxy.json(&["key", "rotate", "--retire", "--json"]);
        assert_eq!(rotated["resealed"], 5, "four of tenants, one of the host");
        // One that is known, and (the first time) one whose row was never read.
        for tenant in ["acme", "globex"] {
            assert_eq!(proxy.client(tenant).ask("SELECT current_database()").await, tenant);
        }
    }
    // Whoever seals has the newest key, too: what the console makes does not depend on a retired one.
    proxy.console().await.run("CREATE TENANT initech").await;
    let keys = proxy.json(&["key", "list", "--json"]);
    assert_eq!((keys.as_array().unwrap().len(), &keys[0]["sealed"]), (1, &7.into()));
    assert!(!proxy.log().contains("not in the key ring"), "{}", proxy.log());
}
