//! `tenant move` by logical replication: clients work while the copy is made, and are held for its last moment only;
//! whatever dies on the way, no slot, publication, subscription or role stays behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use pglobby::control_path::{
    admin::actor::{Actor, AdminError, Progress},
    doctor::examine,
    onboarding::{
        adopt::{AdoptTenant, adopt},
        create::create,
        drop::{DropDatabase, drop_tenant},
        move_tenant::{MoveTenant, Moved, move_tenant},
    },
};
use support::{
    Client, Cluster, Proxy,
    admin::{Admin, Master, StopAfter, tenant},
    client::in_time,
    cluster::{Builder, MASTER},
};

/// A cluster that can be moved from without a dump.
fn logical() -> Builder {
    Cluster::build().setting("wal_level", "logical")
}

/// A second cluster, registered as host `west`, to which replication can go: 16 or newer. Its administrator is a superuser.
async fn west(central: &Client) -> Cluster {
    west_on(Cluster::postgres_18(), central).await
}

async fn west_on(cluster: Builder, central: &Client) -> Cluster {
    let hba = "host all master 127.0.0.1/32 trust\nlocal all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";
    let west = cluster.hba(hba).setting("wal_retrieve_retry_interval", "100ms").start();
    let sql = format!(
        "INSERT INTO pglobby.hosts (name, address, port, admin_user, accepts_tenants)
         VALUES ('west', '127.0.0.1', {}, '{MASTER}', false)",
        west.port()
    );
    central.run(&sql).await;
    west
}

async fn move_to(operator: &Actor, host: &str) -> Result<Moved, AdminError> {
    let to = MoveTenant { host: host.to_owned(), patience: Duration::from_secs(20), keep_source: false };
    move_tenant(operator, "acme", &to).await
}

/// Databases, roles, and everything that replicates.
async fn inventory(cluster: &Cluster) -> String {
    let sql = r"SELECT coalesce(string_agg(name, ' ' ORDER BY name), '') FROM (
        SELECT datname AS name FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1', 'central')
        UNION ALL SELECT rolname || CASE WHEN rolcanlogin THEN '' ELSE ' (locked)' END FROM pg_roles
                  WHERE rolname ~ '_r[wo]$' OR rolname LIKE 'pglobby\_%'
        UNION ALL SELECT 'slot ' || slot_name FROM pg_replication_slots
        UNION ALL SELECT 'subscription ' || subname FROM pg_subscription) AS all_names";
    cluster.client("postgres").await.ask(sql).await
}

/// The owner of an adopted database, as which the tenant's sessions act, comes along.
#[tokio::test]
async fn an_adopted_database_follows_with_its_owner() {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let west = west(&admin.superuser("central").await).await;
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE app").await.run("CREATE DATABASE shop OWNER app").await;
    let inside = admin.superuser("shop").await;
    inside.run("SET ROLE app; CREATE TABLE items (id serial PRIMARY KEY, name text)").await;
    inside.run("INSERT INTO items (name) VALUES ('chair'), ('table')").await;
    inside.leave().await;
    let wanted =
        AdoptTenant { name: "acme".to_owned(), database: Some("shop".to_owned()), ..AdoptTenant::default() };
    adopt(&admin.actor, &wanted).await.unwrap();
    superuser.run("ALTER ROLE acme_rw SET role = app").await;

    let moved = move_to(&admin.actor, "west").await.unwrap();

    assert_eq!((moved.copied_by.as_str(), moved.dumped_because), ("replication", None));
    let inside = west.client("shop").await;
    let owner = "SELECT relowner::regrole || ' ' || datdba::regrole FROM pg_class, pg_database
        WHERE relname = 'items' AND datname = 'shop'";
    assert_eq!(inside.ask(owner).await, "app app");
    assert_eq!(inside.ask("SELECT count(*) || ' ' || nextval('items_id_seq') FROM items").await, "2 3");
    let session = "SELECT setconfig::text FROM pg_db_role_setting WHERE setrole = 'acme_rw'::regrole";
    assert_eq!(inside.ask(session).await, "{role=app}");
    assert!(examine(&admin.actor, &[], false).await.unwrap().ok);
    inside.leave().await;
    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    assert_eq!(inventory(&west).await, "");
}

const PUBLICATIONS: &str = "SELECT count(*) FROM pg_publication";

/// Keys of all kinds, a partitioned table, an identity, sequences that were and were not used, names that need quotes.
const CONTENT: &str = r#"
    CREATE SCHEMA "odd Schema"; CREATE TYPE mood AS ENUM ('ok', 'low');
    CREATE TABLE log (id serial PRIMARY KEY, who int, at timestamptz DEFAULT now(), mood mood DEFAULT 'ok');
    CREATE TABLE balance (who int PRIMARY KEY, amount int NOT NULL, twice int GENERATED ALWAYS AS (amount * 2) STORED);
    CREATE TABLE full_identity (a text, b int); ALTER TABLE full_identity REPLICA IDENTITY FULL;
    CREATE TABLE parts (id bigint GENERATED ALWAYS AS IDENTITY, day date, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
    CREATE TABLE parts_old PARTITION OF parts FOR VALUES FROM (MINVALUE) TO ('2026-01-01');
    CREATE TABLE parts_new PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO (MAXVALUE);
    CREATE TABLE "odd Schema"."it's" (id int PRIMARY KEY, secret text);
    ALTER TABLE "odd Schema"."it's" ENABLE ROW LEVEL SECURITY; ALTER TABLE "odd Schema"."it's" FORCE ROW LEVEL SECURITY;
    CREATE SEQUENCE "odd Schema"."unused" START 7; CREATE SEQUENCE rewound; SELECT setval('rewound', 40, false);
    CREATE FUNCTION loud() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''fired twice''; END';
    INSERT INTO full_identity VALUES ('a', 1), ('b', 2);
    INSERT INTO parts (day) VALUES ('2025-05-05'), ('2026-05-05');
    CREATE VIEW seen AS SELECT * FROM log"#;

#[tokio::test]
async fn everything_follows_and_nothing_stays_behind() {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let west = west(&admin.superuser("central").await).await;
    let made = create(&admin.actor, &tenant("acme")).await.unwrap();
    admin.login(&made.username, "acme").await.unwrap().run(CONTENT).await;
    let superuser = admin.superuser("acme").await;
    superuser.run(r#"INSERT INTO "odd Schema"."it's" VALUES (1, 'hidden by a policy')"#).await;
    superuser.run("INSERT INTO log (who) SELECT 1 FROM generate_series(1, 1000)").await;
    superuser.run("CREATE TRIGGER loud BEFORE INSERT ON log EXECUTE FUNCTION loud()").await;
    superuser.run("ALTER DATABASE acme SET work_mem = '5MB'").await;
    superuser.leave().await;
    let before = inventory(&admin.installation.cluster).await;

    let moved = move_to(&admin.actor, "west").await.unwrap();

    assert_eq!((moved.copied_by.as_str(), moved.dumped_because), ("replication", None));
    assert_eq!(inventory(&admin.installation.cluster).await, "");
    assert_eq!(inventory(&west).await, before);
    let inside = west.client("acme").await;
    let told = [
        ("SELECT count(*) || ' ' || max(id) FROM log", "1000 1000"),
        ("SELECT nextval('log_id_seq')", "1001"),
        (r#"SELECT nextval('"odd Schema".unused')"#, "7"),
        ("SELECT nextval('rewound')", "40"),
        ("SELECT string_agg(a || b, ',' ORDER BY b) FROM full_identity", "a1,b2"),
        (
            "SELECT string_agg(tableoid::regclass::text || id, ',' ORDER BY id) FROM parts",
            "parts_old1,parts_new2",
        ),
        (r#"SELECT secret FROM "odd Schema"."it's""#, "hidden by a policy"),
        ("SHOW work_mem", "5MB"),
        (PUBLICATIONS, "0"),
        (
            "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
          WHERE nspname IN ('public', 'odd Schema') AND pg_get_userbyid(relowner) <> 'acme_rw'",
            "0",
        ),
    ];
    for (sql, answer) in told {
        assert_eq!(inside.ask(sql).await, answer, "{sql}");
    }
    inside.leave().await;
    let report = examine(&admin.actor, &[], false).await.unwrap();
    assert!(report.ok, "{:#?}", report.findings);

    let forced = r#"SELECT relrowsecurity AND relforcerowsecurity FROM pg_class WHERE relname = 'it''s'"#;
    assert_eq!(
        west.client("acme").await.ask(forced).await,
        "t",
        "a policy binds its table's owner as before"
    );

    let back = move_to(&admin.actor, "default").await.expect_err("older").to_string();
    assert!(back.contains("goes upwards only"), "{back}");
}

/// Before 16 a subscription's workers have the rights of whoever made it, and that is not the tenant.
#[tokio::test]
async fn to_a_host_that_is_too_old_to_leave_it_to_the_tenants_role_it_is_dumped() {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let west = west_on(logical(), &admin.superuser("central").await).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    admin
        .superuser("acme")
        .await
        .run("SET ROLE acme_rw; CREATE TABLE t (a int PRIMARY KEY); INSERT INTO t VALUES (3)")
        .await;

    let moved = move_to(&admin.actor, "west").await.unwrap();

    let why = moved.dumped_because.unwrap_or_default();
    assert!(why.contains("cannot be left to the tenant's own role (16 and newer)"), "{why}");
    assert_eq!(west.client("acme").await.ask("SELECT a FROM t").await, "3");
}

#[tokio::test]
async fn killed_before_anything_was_copied_moving_again_arrives_once() {
    arrives_once_after(&["begun", "roles", "database"]).await;
}

#[tokio::test]
async fn killed_before_any_row_was_copied_moving_again_arrives_once() {
    arrives_once_after(&["schema", "following", "owned"]).await;
}

#[tokio::test]
async fn killed_while_it_is_copied_moving_again_arrives_once() {
    arrives_once_after(&["published", "subscribed", "synced", "fenced"]).await;
}

#[tokio::test]
async fn killed_while_clients_are_held_moving_again_arrives_once() {
    arrives_once_after(&["quiet", "caught up", "copied", "switched"]).await;
}

async fn arrives_once_after(steps: &[&str]) {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let west = west(&admin.superuser("central").await).await;
    let content =
        "CREATE TABLE t (a int PRIMARY KEY); INSERT INTO t VALUES (42); ALTER TABLE t OWNER TO acme_rw";
    for step in steps {
        create(&admin.actor, &tenant("acme")).await.unwrap();
        admin.superuser("acme").await.run(content).await;
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(move_to(&dying, "west").await) }).await;

        let moved = move_to(&admin.another_actor(), "west").await.unwrap();

        assert_eq!(
            (moved.host.as_str(), moved.copied_by.as_str()),
            ("west", "replication"),
            "killed after {step}: {:?}",
            moved.dumped_because
        );
        let inside = west.client("acme").await;
        assert_eq!(inside.ask("SELECT a FROM t").await, "42", "killed after {step}");
        assert_eq!(inside.ask(PUBLICATIONS).await, "0", "killed after {step}");
        assert_eq!(inventory(&west).await, "acme acme_ro acme_rw", "killed after {step}");
        assert_eq!(inventory(&admin.installation.cluster).await, "", "killed after {step}");
        inside.leave().await;
        let central = admin.superuser("central").await;
        let open = "SELECT (SELECT count(*) FROM pglobby.operations WHERE status IN ('running', 'failed'))
                         + (SELECT count(*) FROM pglobby.tenants WHERE fenced)";
        assert_eq!(central.ask(open).await, "0", "killed after {step}");
        drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    }
}

/// The record is all that the next command has: it takes back what replicates, and the tenant goes.
#[tokio::test]
async fn a_tenant_whose_move_died_is_dropped_with_all_that_replicated_it() {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let west = west(&admin.superuser("central").await).await;
    for step in ["published", "subscribed", "caught up"] {
        create(&admin.actor, &tenant("acme")).await.unwrap();
        admin.superuser("acme").await.run("SET ROLE acme_rw; CREATE TABLE t (a int PRIMARY KEY)").await;
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(move_to(&dying, "west").await) }).await;

        drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();

        assert_eq!(
            inventory(&admin.installation.cluster).await + &inventory(&west).await,
            "",
            "killed after {step}"
        );
    }
}

/// Runs SQL in the tenant's database when a step is done, and remembers what was told.
struct Meddler {
    step: &'static str,
    sql: &'static str,
    client: Client,
    done: AtomicBool,
}

#[async_trait]
impl Progress for Meddler {
    async fn step(&self, _: &str, step: &str) {
        if step == self.step && !self.done.swap(true, Ordering::Relaxed) {
            self.client.run(self.sql).await;
        }
    }
}

/// Replication carries rows only: a table made meanwhile would be missing, a column rewritten would keep its old values.
#[tokio::test]
async fn a_schema_that_changes_meanwhile_is_dumped_instead() {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let west = west(&admin.superuser("central").await).await;
    let changes = [
        ("CREATE TABLE late (a int); INSERT INTO late VALUES (1)", "SELECT a FROM late", "1"),
        (
            "ALTER TABLE t ALTER b TYPE text USING (b + 1); ALTER TABLE t ALTER b TYPE int USING b::int",
            "SELECT b FROM t",
            "2",
        ),
        (
            "DROP TABLE t; CREATE TABLE t (a int PRIMARY KEY, b int); INSERT INTO t VALUES (5, 6)",
            "SELECT b FROM t",
            "6",
        ),
    ];
    for (change, question, answer) in changes {
        create(&admin.actor, &tenant("acme")).await.unwrap();
        admin
            .superuser("acme")
            .await
            .run("SET ROLE acme_rw; CREATE TABLE t (a int PRIMARY KEY, b int); INSERT INTO t VALUES (1, 1)")
            .await;
        let mut operator = admin.another_actor();
        let client = admin.superuser("acme").await;
        operator.progress =
            Some(Arc::new(Meddler { step: "synced", sql: change, client, done: AtomicBool::new(false) }));

        let moved = move_to(&operator, "west").await.unwrap();

        assert!(moved.dumped_because.unwrap().contains("schema was changed"), "{change}");
        assert_eq!(west.client("acme").await.ask(question).await, answer, "{change}");
        assert_eq!(inventory(&west).await, "acme acme_ro acme_rw", "{change}");
        assert_eq!(inventory(&admin.installation.cluster).await, "", "{change}");
        drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    }
}

#[tokio::test]
async fn what_replication_would_lose_is_dumped_and_the_reason_is_told() {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let west = west(&admin.superuser("central").await).await;
    let reasons = [
        ("CREATE TABLE t (a int)", "table public.t has no primary key"),
        ("CREATE UNLOGGED TABLE t (a int PRIMARY KEY)", "table public.t is unlogged"),
        ("CREATE MATERIALIZED VIEW m AS SELECT 1 AS a", "public.m is a materialized view"),
        ("SELECT lo_create(77)", "it has large objects"),
        ("CREATE PUBLICATION theirs", "it takes part in replication already"),
    ];
    for (content, why) in reasons {
        create(&admin.actor, &tenant("acme")).await.unwrap();
        admin.superuser("acme").await.run(content).await;

        let moved = move_to(&admin.actor, "west").await.unwrap();

        let told = moved.dumped_because.unwrap_or_default();
        assert!(told.contains(why), "{content}: {told}");
        assert_eq!(inventory(&west).await, "acme acme_ro acme_rw", "{content}");
        drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    }
}

/// The new host cannot log in at the old one: found out by trying, and nothing of the try is left.
#[tokio::test]
async fn a_subscription_that_cannot_connect_is_dumped_instead() {
    let hba = "local all all scram-sha-256\nhost all master 127.0.0.1/32 scram-sha-256\n\
               host all acme_rw 127.0.0.1/32 scram-sha-256\nhost all acme_ro 127.0.0.1/32 scram-sha-256\n";
    let admin = Admin::on(logical().hba(hba), Master::Superuser).await;
    let west = west(&admin.superuser("central").await).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    admin
        .superuser("acme")
        .await
        .run("SET ROLE acme_rw; CREATE TABLE t (a int PRIMARY KEY); INSERT INTO t VALUES (3)")
        .await;

    let moved = move_to(&admin.actor, "west").await.unwrap();

    assert!(moved.dumped_because.unwrap().contains("could not connect to the publisher"));
    assert_eq!(west.client("acme").await.ask("SELECT a FROM t").await, "3");
    assert_eq!(inventory(&admin.installation.cluster).await, "");
}

/// A transaction that was prepared is a promise that no copy carries.
#[tokio::test]
async fn a_prepared_transaction_keeps_the_tenant_where_it_is() {
    let admin = Admin::on(logical().setting("max_prepared_transactions", "2"), Master::Superuser).await;
    let _west = west(&admin.superuser("central").await).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let inside = admin.superuser("acme").await;
    inside
        .run("CREATE TABLE t (a int); BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'promise'")
        .await;
    let impatient =
        MoveTenant { host: "west".into(), patience: Duration::from_millis(200), keep_source: false };

    let error = move_tenant(&admin.actor, "acme", &impatient).await.expect_err("promised").to_string();

    assert!(error.contains("prepared transaction"), "{error}");
    inside.run("COMMIT PREPARED 'promise'").await;
    assert_eq!(inside.ask("SELECT count(*) FROM t").await, "1");
}

/// Four clients write, change and delete all the while. What was acknowledged is there afterwards, once.
#[tokio::test(flavor = "multi_thread")]
async fn clients_hardly_wait_and_nothing_acknowledged_is_lost() {
    let proxy = Proxy::with_tenant("acme").cluster(logical().start()).pool_size(3).start().await;
    let west = west(&proxy.cluster.client("central").await).await;
    proxy.client("acme").run(CONTENT).then_leave().await;
    proxy
        .client("acme")
        .run("INSERT INTO balance SELECT g, 0 FROM generate_series(0, 3) g")
        .then_leave()
        .await;
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for who in 0..4_i32 {
        let (caller, stop, rounds) = (proxy.client("acme"), stop.clone(), rounds.clone());
        clients.spawn(async move {
            let client = caller.connect().await;
            let insert = client.prepare("INSERT INTO log (who) VALUES ($1) RETURNING id").await.unwrap();
            let raise =
                client.prepare("UPDATE balance SET amount = amount + 1 WHERE who = $1").await.unwrap();
            let mut kept = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let id: i32 = in_time("an insert", client.query_one(&insert, &[&who])).await.unwrap().get(0);
                in_time("an update", client.execute(&raise, &[&who])).await.unwrap();
                match id % 3 {
                    0 => drop(client.run(&format!("DELETE FROM log WHERE id = {id}")).await),
                    _ => kept.push(id),
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            (who, kept)
        });
    }
    let progress = async |more: i64| {
        let before = rounds.load(Ordering::Relaxed);
        let going = async {
            while rounds.load(Ordering::Relaxed) < before + more {
                tokio::task::yield_now().await;
            }
        };
        in_time("clients go on", going).await;
    };
    progress(20).await;

    let printed =
        tokio::task::block_in_place(|| proxy.json(&["tenant", "move", "acme", "--host", "west", "--json"]));

    assert_eq!(printed["copied_by"], "replication", "{printed}");
    progress(20).await;
    stop.store(true, Ordering::Relaxed);
    let (mut all, mut done) = (Vec::new(), 0);
    while let Some(ended) = clients.join_next().await {
        all.extend(ended.unwrap().1);
        done += 1;
    }
    assert_eq!(done, 4);
    all.sort_unstable();
    let inside = west.client("acme").await;
    let ids = inside.ask("SELECT string_agg(id::text, ',' ORDER BY id) FROM log").await;
    let expected: Vec<String> = all.iter().map(ToString::to_string).collect();
    assert_eq!(ids, expected.join(","), "nothing lost, nothing twice, nothing deleted came back");
    let sum = rounds.load(Ordering::Relaxed).to_string();
    assert_eq!(inside.ask("SELECT sum(amount) FROM balance").await, sum);
    assert_eq!(inside.ask("SELECT sum(twice) / 2 FROM balance").await, sum);
    assert_eq!(inventory(&proxy.cluster).await, "");
}

/// Whoever may subscribe there is enough.
#[tokio::test]
async fn a_master_that_is_no_superuser_there_moves_by_replication_too() {
    let admin = Admin::on(logical(), Master::Superuser).await;
    let hba = "host all onboarder 127.0.0.1/32 trust\nlocal all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";
    let west = Cluster::postgres_18().hba(hba).setting("wal_retrieve_retry_interval", "100ms").start();
    let superuser = west.client("postgres").await;
    superuser.run("CREATE ROLE onboarder LOGIN CREATEDB CREATEROLE IN ROLE pg_create_subscription").await;
    let host = format!(
        "INSERT INTO pglobby.hosts (name, address, port, admin_user, accepts_tenants)
         VALUES ('west', '127.0.0.1', {}, 'onboarder', false)",
        west.port()
    );
    admin.superuser("central").await.run(&host).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    admin
        .superuser("acme")
        .await
        .run("SET ROLE acme_rw; CREATE TABLE t (a int PRIMARY KEY); INSERT INTO t VALUES (3)")
        .await;

    let moved = move_to(&admin.actor, "west").await.unwrap();

    assert_eq!((moved.copied_by.as_str(), moved.dumped_because), ("replication", None));
    assert_eq!(west.client("acme").await.ask("SELECT a FROM t").await, "3");
    assert_eq!(inventory(&west).await, "acme acme_ro acme_rw");
    assert_eq!(inventory(&admin.installation.cluster).await, "");
}
