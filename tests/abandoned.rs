//! A node finishes or undoes commands that are killed; no operator has to repeat them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    fs,
    process::{Child, Stdio},
    sync::Arc,
    time::Duration,
};

use pglobby::{
    control_path::{
        admin::actor::{Actor, AdminContext},
        onboarding::{
            abandoned::watch,
            create::create,
            drop::{DropDatabase, drop_tenant},
            move_tenant::{MoveTenant, move_tenant},
            rotate::rotate,
        },
    },
    metrics::Metrics,
};
use support::{
    Cluster, Proxy,
    admin::{Admin, StopAfter, tenant},
    client::{in_time, sqlstate},
    proxy::pglobby,
};

fn begin(proxy: &Proxy, arguments: &[&str]) -> Child {
    let mut command = pglobby();
    command.args(arguments).arg("--config").arg(proxy.config_file());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

const OPEN: &str = "SELECT count(*) FROM pglobby.operations WHERE status IN ('running', 'failed')";
/// What the newest operation has become, and by whose entry in the audit log.
const ENDED: &str = "SELECT concat_ws(' ', o.kind, o.status,
        (SELECT string_agg(a.actor || ' ' || (a.detail ->> 'outcome'), ', ') FROM pglobby.audit_log a
         WHERE a.action = 'operation.adopted' AND (a.detail ->> 'operation')::int8 = o.id))
    FROM pglobby.operations o ORDER BY o.id DESC LIMIT 1";

/// The tenant stayed dead on every node until a person repeated the command, and clients read that the pool was busy.
#[tokio::test]
async fn a_move_that_is_killed_while_clients_wait_is_undone_by_a_node() {
    let proxy = Proxy::with_tenant("acme").config("query_wait_timeout", "\"500ms\"").start().await;
    let west = Cluster::start();
    proxy.add_host("west", &west);
    proxy.client("acme").run("CREATE TABLE t AS SELECT 42 AS a").then_leave().await;
    let (busy, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    // Its transaction keeps the move where clients wait.
    busy.run("BEGIN; INSERT INTO t VALUES (43)").await;
    let central = proxy.cluster.client("central").await;
    let mut moving = begin(&proxy, &["tenant", "move", "acme", "--host", "west"]);
    proxy.logged("tenant paused for move").await;
    let told = other.try_run("SELECT 1").await.expect_err("it is fenced");
    assert_eq!(sqlstate(&told), "57P03");
    let message = told.as_db_error().unwrap().message();
    assert!(message.contains("\"acme\" is being moved to another host"), "{message}");

    moving.kill().unwrap();
    moving.wait().unwrap();

    in_time("a node", async { while other.try_run("SELECT 1").await.is_err() {} }).await;
    busy.run("COMMIT").await;
    assert_eq!(other.ask("SELECT count(*) FROM t").await, "2");
    proxy.logged("adopted operation ended").await;
    assert_eq!(central.ask(ENDED).await, "move undone pglobby undone");
    assert_eq!(proxy.metric(r#"pglobby_operations_adopted_total{outcome="undone"}"#).await, 1.0);
    let left = "SELECT count(*) FROM pg_roles WHERE rolname ~ '^acme'";
    assert_eq!(west.client("postgres").await.ask(left).await, "0");
    let moved = proxy.json(&["tenant", "move", "acme", "--host", "west", "--json"]);
    assert_eq!(moved["host"], "west");
    assert_eq!(other.ask("SELECT count(*) FROM t").await, "2");
}

#[tokio::test]
async fn a_create_that_is_killed_is_undone_by_a_node() {
    let proxy = Proxy::with_tenant("acme").start().await;
    proxy.create_login("api", "a good password", &["--service", "--all-tenants"]);
    let file = proxy.folder().join("slow.sql");
    fs::write(&file, "CREATE TABLE t (a int); SELECT pg_sleep(3600);").unwrap();
    let central = proxy.cluster.client("central").await;
    let mut creating = begin(&proxy, &["tenant", "create", "globex", "--schema", file.to_str().unwrap()]);
    let sleeps =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(3600)%' AND datname = 'globex'";
    in_time("the schema", async { while central.ask(sleeps).await == "0" {} }).await;
    assert_eq!(proxy.caller("api", "a good password", "globex").refusal().await, "57P03");

    creating.kill().unwrap();
    creating.wait().unwrap();

    in_time("a node", async { while central.ask(OPEN).await != "0" {} }).await;
    proxy.logged("adopted operation ended").await;
    let left = "SELECT (SELECT count(*) FROM pg_roles WHERE rolname ~ '^globex') || ' '
        || (SELECT count(*) FROM pg_database WHERE datname = 'globex') || ' '
        || (SELECT count(*) FROM pglobby.tenants WHERE name = 'globex')";
    assert_eq!(central.ask(left).await, "0 0 0");
    assert_eq!(proxy.metric(r#"pglobby_operations_adopted_total{outcome="undone"}"#).await, 1.0);
    assert_eq!(proxy.caller("api", "a good password", "globex").refusal().await, "3D000");
    proxy.command(&["tenant", "create", "globex"]);
}

/// What nodes run, without the rest of them.
fn node(admin: &Admin) -> (Arc<Metrics>, tokio::task::JoinHandle<()>) {
    let Actor { central, keyring, .. } = admin.another_actor();
    let (context, metrics) =
        (AdminContext { central, keyring, barrier: Arc::default() }, Arc::<Metrics>::default());
    (metrics.clone(), tokio::spawn(watch(context, metrics)))
}

async fn kill_after(admin: &Admin, step: &str, work: impl AsyncFnOnce(Actor)) {
    let mut dying = admin.another_actor();
    let killer = StopAfter::step(step);
    dying.progress = Some(killer.clone());
    killer.kill(work(dying)).await;
}

#[tokio::test]
async fn one_of_two_nodes_ends_each_operation_as_its_command_would() {
    let admin = Admin::new().await;
    let west = Cluster::build().trust().start();
    let central = admin.superuser("central").await;
    let sql = format!(
        "INSERT INTO pglobby.hosts (name, address, port, admin_user, accepts_tenants)
         VALUES ('west', '127.0.0.1', {}, '{}', false)",
        west.port(),
        support::cluster::MASTER
    );
    central.run(&sql).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let nodes = [node(&admin), node(&admin)];
    let adopted = || {
        nodes
            .iter()
            .flat_map(|(metrics, _)| metrics.operations_adopted())
            .map(|(_, count)| count)
            .sum::<u64>()
    };
    let to_west =
        MoveTenant { host: "west".to_owned(), patience: Duration::from_secs(20), keep_source: false };
    let ended = async |number: u64, what: &str| {
        in_time(what, async {
            while adopted() != number {
                tokio::task::yield_now().await
            }
        })
        .await;
        assert_eq!(central.ask(ENDED).await, what);
        assert_eq!(central.ask(OPEN).await, "0");
    };

    kill_after(&admin, "copied", async |actor| drop(move_tenant(&actor, "acme", &to_west).await)).await;
    ended(1, "move undone pglobby undone").await;
    kill_after(&admin, "switched", async |actor| drop(move_tenant(&actor, "acme", &to_west).await)).await;
    ended(2, "move done pglobby finished").await;
    assert_eq!(central.ask("SELECT host FROM pglobby.tenants").await, "west");
    kill_after(&admin, "roles", async |actor| drop(rotate(&actor, "acme").await)).await;
    // By a rotation of its own.
    ended(3, "rotate done").await;
    kill_after(&admin, "ended", async |actor| {
        drop(drop_tenant(&actor, "acme", DropDatabase::IfOurs, None).await);
    })
    .await;
    ended(4, "drop done pglobby finished").await;
    assert_eq!(central.ask("SELECT status FROM pglobby.tenants").await, "dropped");
    let left = "SELECT count(*) FROM pg_roles WHERE rolname ~ '^acme'";
    assert_eq!(west.client("postgres").await.ask(left).await, "0");
    nodes.iter().for_each(|(_, task)| task.abort());
}

/// The last dump is for the operator's machine: nothing is dropped before it is there.
#[tokio::test]
async fn a_drop_with_a_last_dump_waits_for_its_operator() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let central = proxy.cluster.client("central").await;
    central
        .run(
            "INSERT INTO pglobby.operations (kind, tenant_id, arguments, actor)
             SELECT 'drop', id, '{\"database\": \"acme\", \"drop_database\": true, \"final_dump\": \"/nowhere/acme.dump\"}', 'os:ann'
             FROM pglobby.tenants; UPDATE pglobby.tenants SET status = 'dropping'",
        )
        .await;
    proxy.logged("operation without its process is left to a person").await;
    assert_eq!(central.ask("SELECT count(*) FROM pg_database WHERE datname = 'acme'").await, "1");
    assert_eq!(central.ask(OPEN).await, "1");
}

/// An operation that cannot be ended is tried again, and the log says when.
#[tokio::test]
async fn a_node_that_cannot_end_an_operation_logs_it_and_waits() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let mut west = Cluster::start();
    proxy.add_host("west", &west);
    west.stop();
    let central = proxy.cluster.client("central").await;
    central
        .run(
            "INSERT INTO pglobby.operations (kind, tenant_id, arguments, actor)
             SELECT 'move', id, '{\"host\": \"west\", \"mark\": \"pglobby: move acme 1\"}', 'os:ann' FROM pglobby.tenants;
             UPDATE pglobby.tenants SET fenced = true",
        )
        .await;

    proxy.logged("cannot end an adopted operation").await;

    assert!(proxy.log().contains("retry_s=10"), "{}", proxy.log());
    assert_eq!(proxy.metric(r#"pglobby_operations_adopted_total{outcome="failed"}"#).await, 1.0);
    // The old host serves, whatever is left on the other.
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}
