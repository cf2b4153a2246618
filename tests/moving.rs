//! `tenant move`: to another host under the feet of clients that wait a moment, whatever dies on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use pglobby::control_path::{
    admin::{
        actor::{Actor, AdminError},
        tenants,
    },
    doctor::examine,
    onboarding::{
        adopt::{AdoptTenant, adopt},
        create::{CreateTenant, create},
        drop::{DropDatabase, drop_tenant},
        move_tenant::{MoveTenant, Moved, move_tenant},
        ownership::Ownership,
        rotate::rotate,
    },
};
use support::{
    Client, Cluster, Proxy,
    admin::{Admin, StopAfter, tenant},
    client::in_time,
};

/// A second cluster, registered as host `west`: its administrator is no superuser.
async fn west(central: &support::Client) -> Cluster {
    let hba = "host all onboarder 127.0.0.1/32 trust\nlocal all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";
    let west = Cluster::build().hba(hba).start();
    west.client("postgres").await.run("CREATE ROLE onboarder LOGIN CREATEDB CREATEROLE").await;
    let sql = format!(
        "INSERT INTO pglobby.hosts (name, address, port, admin_user, accepts_tenants)
         VALUES ('west', '127.0.0.1', {}, 'onboarder', false)",
        west.port()
    );
    central.run(&sql).await;
    west
}

fn to(host: &str) -> MoveTenant {
    MoveTenant { host: host.to_owned(), patience: Duration::from_secs(20), keep_source: false }
}

async fn move_to(operator: &Actor, host: &str) -> Result<Moved, AdminError> {
    move_tenant(operator, "acme", &to(host)).await
}

/// Databases and roles of a cluster that are not the system's.
async fn inventory(cluster: &Cluster) -> String {
    let sql = "SELECT string_agg(name, ' ' ORDER BY name) FROM (
        SELECT datname AS name FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1', 'central')
        UNION ALL SELECT rolname || CASE WHEN rolcanlogin THEN '' ELSE ' (locked)' END FROM pg_roles
                  WHERE rolname ~ '_r[wo]$') AS all_names";
    cluster.client("postgres").await.ask(sql).await
}

const CONTENT: &str = "
    CREATE SCHEMA hr; CREATE TYPE hr.mood AS ENUM ('ok');
    CREATE TABLE hr.pay (id serial PRIMARY KEY, who text, mood hr.mood DEFAULT 'ok');
    INSERT INTO hr.pay (who) VALUES ('müller'), ('o''neil'), (NULL);
    CREATE VIEW payed AS SELECT who FROM hr.pay; CREATE EXTENSION IF NOT EXISTS pg_trgm;
    CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'";

#[tokio::test]
async fn everything_arrives_belongs_to_the_tenant_and_nothing_stays_behind() {
    let admin = Admin::new().await;
    let west = west(&admin.superuser("central").await).await;
    let made = create(&admin.actor, &tenant("acme")).await.unwrap();
    admin.login(&made.username, "acme").await.unwrap().run(CONTENT).await;
    let superuser = admin.superuser("postgres").await;
    superuser
        .run("ALTER DATABASE acme SET search_path = hr, public; ALTER DATABASE acme SET work_mem = '5MB'")
        .await;
    superuser.run("ALTER ROLE acme_ro IN DATABASE acme SET application_name = 'it''s blue'").await;
    let before = inventory(&admin.installation.cluster).await;
    assert_eq!(before, "acme acme_ro acme_rw");

    let moved = move_to(&admin.actor, "west").await.unwrap();

    assert_eq!((moved.from.as_str(), moved.host.as_str(), moved.source_dropped), ("default", "west", true));
    assert_eq!(inventory(&admin.installation.cluster).await, "");
    assert_eq!(inventory(&west).await, before);
    let inside = west.client("acme").await;
    assert_eq!(
        inside.ask("SELECT string_agg(coalesce(who, '-'), ',' ORDER BY id) FROM hr.pay").await,
        "müller,o'neil,-"
    );
    assert_eq!(inside.ask("SELECT nextval('hr.pay_id_seq')").await, "4");
    let foreign = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
        WHERE nspname IN ('public', 'hr') AND pg_get_userbyid(relowner) <> 'acme_rw'";
    assert_eq!(inside.ask(foreign).await, "0");
    assert_eq!(inside.ask("SHOW search_path").await, "hr, public");
    assert_eq!(inside.ask("SHOW work_mem").await, "5MB");
    let colour = "SELECT setconfig[1] FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole
                  WHERE rolname = 'acme_ro' AND setdatabase <> 0";
    assert_eq!(inside.ask(colour).await, "application_name=it's blue");
    let report = examine(&admin.actor, &[], false).await.unwrap();
    // It tells of the role's own setting, which was there before.
    assert!(report.findings.iter().all(|finding| finding.check == "role_settings"), "{:#?}", report.findings);
    assert_eq!(tenants::show(&admin.actor, "acme").await.unwrap().host, "west");

    inside.leave().await; // a superuser's session, which west's administrator may not end
    move_to(&admin.actor, "default").await.unwrap();
    assert_eq!(inventory(&admin.installation.cluster).await, before);
    assert_eq!(inventory(&west).await, "");
}

#[tokio::test]
async fn killed_before_clients_are_held_moving_again_arrives_once() {
    arrives_once_after(&["begun", "roles", "database", "schema", "fenced"]).await;
}

/// Its tables were of roles that no other host knows.
#[tokio::test]
async fn an_adopted_database_moves_once_all_of_it_is_the_tenants() {
    let admin = Admin::new().await;
    let west = west(&admin.superuser("central").await).await;
    admin.superuser("postgres").await.run("CREATE DATABASE shop").await;
    admin.superuser("shop").await.run("CREATE TABLE t AS SELECT 42 AS a").await;
    let wanted =
        AdoptTenant { name: "acme".to_owned(), database: Some("shop".to_owned()), ..AdoptTenant::default() };
    adopt(&admin.actor, &wanted).await.unwrap();
    let refused = move_to(&admin.actor, "west").await.expect_err("others own it").to_string();
    assert!(refused.contains("\"master\"") && refused.contains("--ownership transfer"), "{refused}");
    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    let transferred = AdoptTenant { ownership: Some(Ownership::Transfer), ..wanted };
    adopt(&admin.actor, &transferred).await.unwrap();

    move_to(&admin.actor, "west").await.unwrap();

    assert_eq!(
        west.client("shop").await.ask("SELECT a || ' ' || current_database() FROM t").await,
        "42 shop"
    );
    assert_eq!(inventory(&west).await, "acme_ro acme_rw shop");
    assert_eq!(inventory(&admin.installation.cluster).await, "");
    let dropped = drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    assert!(dropped.database_dropped, "pglobby made it there");
}

/// Owner and right to log in of what is called `app`, `web` or `shop`.
async fn owners(cluster: &Cluster) -> String {
    let sql = "SELECT coalesce(string_agg(name, ' ' ORDER BY name), '') FROM (
        SELECT rolname || CASE WHEN rolcanlogin THEN '' ELSE ' (locked)' END AS name FROM pg_roles WHERE rolname IN ('app', 'web')
        UNION ALL SELECT datname || ' of ' || pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'shop') AS all_names";
    cluster.client("postgres").await.ask(sql).await
}

/// A database of role `app`, as which the application logs in today.
async fn shop_of_app(cluster: &Cluster) {
    let superuser = cluster.client("postgres").await;
    superuser.run("CREATE ROLE app LOGIN PASSWORD 'of old'; CREATE ROLE web LOGIN PASSWORD 'as ever'").await;
    superuser.run("CREATE DATABASE shop OWNER app").await;
    let inside = cluster.client("shop").await;
    inside.run("SET ROLE app; CREATE TABLE items (id serial PRIMARY KEY, name text)").await;
    inside.run("CREATE SCHEMA old CREATE TABLE logs (a int); CREATE TYPE mood AS ENUM ('good')").await;
    inside.run("INSERT INTO items (name) VALUES ('chair'); CREATE EXTENSION pg_trgm SCHEMA old").await;
    inside.leave().await;
}

/// Its sessions began as the owner, and on the other host they owned nothing that they had made.
#[tokio::test]
async fn an_adopted_tenant_acts_as_its_owner_on_every_host() {
    let proxy = Proxy::build().start().await;
    let west = west(&proxy.cluster.client("central").await).await;
    shop_of_app(&proxy.cluster).await;
    let adopted = proxy.json(&["tenant", "adopt", "acme", "--database", "shop", "--json"]);
    assert_eq!(adopted["member_of"], serde_json::json!(["app"]));
    let superuser = proxy.cluster.client("postgres").await;
    superuser.run("ALTER ROLE acme_rw SET role = app; CREATE ROLE idle; GRANT idle TO acme_rw").await;
    proxy.create_login("ann", "secret", &["--tenant", "acme"]);
    proxy.create_login("reader", "secret", &["--tenant", "acme", "--read-only"]);
    let ann = || proxy.caller("ann", "secret", "acme");
    ann().run("CREATE TABLE ours (a int); SET ROLE NONE; CREATE TABLE own (a int)").then_leave().await;
    // An application that logs in as the owner, past pglobby, would change what is copied.
    let mut direct = proxy.cluster.config("shop");
    direct.user("app").password("of old");
    let direct = Client::connect(&direct).await.unwrap();
    direct.run("BEGIN; INSERT INTO items (name) VALUES ('late')").await;
    let moving = ["tenant", "move", "acme", "--host", "west", "--json"];
    let refused = proxy.command_with(&[&moving[..], &["--patience", "300ms"]].concat(), "");
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        refused.contains("1 sessions of the tenant") && refused.contains("stays where it is"),
        "{refused}"
    );
    assert_eq!(owners(&proxy.cluster).await, "app shop of app web");
    assert_eq!(owners(&west).await, "");
    direct.run("COMMIT").await;
    direct.leave().await;

    let moved = proxy.json(&moving);

    assert_eq!(moved["host"], "west");
    assert_eq!(owners(&west).await, "app (locked) shop of app");
    assert_eq!(owners(&proxy.cluster).await, "app web");
    let whose =
        "SELECT string_agg(relname || ' of ' || relowner::regrole, ', ' ORDER BY relname) FROM pg_class
        WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'old'::regnamespace)";
    assert_eq!(
        west.client("shop").await.ask(whose).await,
        "items of app, logs of app, ours of app, own of acme_rw"
    );
    let client = ann().connect().await;
    assert_eq!(client.ask("SELECT current_user || ' ' || session_user").await, "app acme_rw");
    client.run("ALTER TABLE items ADD price int; INSERT INTO items (name) VALUES ('table')").await;
    client
        .run(
            "ALTER TABLE ours ADD b int; DROP SCHEMA old CASCADE; CREATE SCHEMA fresh CREATE TABLE t (a int)",
        )
        .await;
    client.run("ALTER TYPE mood ADD VALUE 'bad'; CREATE TABLE later (a int)").await;
    client.run("SET ROLE idle; SET ROLE NONE; ALTER TABLE own ADD b int; ALTER TABLE later ADD b int").await;
    let reader = proxy.caller("reader", "secret", "acme").connect().await;
    assert_eq!(reader.ask("SELECT count(*) FROM items").await, "3");
    reader.run("SELECT * FROM later; SELECT * FROM fresh.t; SELECT * FROM own").await;
    let doctor = proxy.command_with(&["doctor"], "");
    assert!(doctor.status.success(), "{}", String::from_utf8_lossy(&doctor.stdout));

    // Back again: the old owner has its name there still.
    let back = ["tenant", "move", "acme", "--host", "default", "--json"];
    let refused = proxy.command_with(&back, "");
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        refused.contains("\"app\"") && refused.contains("exists on host \"default\" already"),
        "{refused}"
    );
    assert_eq!(client.ask("SELECT count(*) FROM items").await, "3");
    superuser.run("DROP ROLE app").await;
    proxy.json(&back);
    assert_eq!(owners(&west).await, "");
    assert_eq!(owners(&proxy.cluster).await, "app (locked) shop of app web");
    client.run("RESET ROLE; ALTER TABLE items DROP price").await;
    assert_eq!(client.ask("SELECT current_user").await, "app");
    drop((client, reader));
    proxy.command(&["tenant", "drop", "acme", "--yes"]);
    assert_eq!(owners(&proxy.cluster).await, "web");
    let left = "SELECT count(*) FROM pg_roles WHERE rolname ~ '^(acme|app)'";
    assert_eq!(superuser.ask(left).await, "0");
}

/// The role that the operator chose was left alone by a move, which therefore was refused.
#[tokio::test]
async fn a_role_that_was_chosen_moves_with_its_name_password_and_settings() {
    let admin = Admin::new().await;
    let west = west(&admin.superuser("central").await).await;
    shop_of_app(&admin.installation.cluster).await;
    let superuser = admin.superuser("postgres").await;
    superuser.run("ALTER ROLE web SET search_path = old, public; ALTER ROLE web CONNECTION LIMIT 40").await;
    let wanted = AdoptTenant {
        name: "acme".to_owned(),
        database: Some("shop".to_owned()),
        username: Some("web".to_owned()),
        password: Some("as ever".to_owned().into()),
        ..AdoptTenant::default()
    };
    adopt(&admin.actor, &wanted).await.unwrap();
    let as_ever = async |cluster: &Cluster| {
        let mut config = cluster.config("shop");
        config.user("web").password("as ever");
        Client::connect(&config).await.unwrap()
    };
    let own = as_ever(&admin.installation.cluster).await;
    own.run("CREATE TABLE ours (a int)").await;
    own.leave().await;
    west.client("postgres").await.run("CREATE ROLE web").await;

    let refused = move_to(&admin.actor, "west").await.expect_err("the name is taken");

    assert!(matches!(&refused, AdminError::Exists(why) if why.contains("\"web\"")), "{refused}");
    let operations = "SELECT count(*) FROM pglobby.operations WHERE kind = 'move'";
    assert_eq!(admin.superuser("central").await.ask(operations).await, "0", "before anything is changed");
    west.client("postgres").await.run("DROP ROLE web").await;
    for step in ["schema", "quiet"] {
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(move_to(&dying, "west").await) }).await;
        let locked =
            if step == "quiet" { "app (locked) shop of app web (locked)" } else { "app shop of app web" };
        assert_eq!(owners(&admin.installation.cluster).await, locked, "killed after {step}");
    }
    move_to(&admin.actor, "west").await.unwrap();

    assert_eq!(owners(&west).await, "app (locked) shop of app web");
    assert_eq!(owners(&admin.installation.cluster).await, "app web", "left alone");
    let members = "SELECT count(*) FROM pg_auth_members WHERE member = 'web'::regrole";
    assert_eq!(superuser.ask(members).await, "0");
    let own = as_ever(&west).await;
    assert_eq!(own.ask("SHOW search_path").await, "old, public");
    assert_eq!(own.ask("SELECT rolconnlimit FROM pg_roles WHERE rolname = 'web'").await, "40");
    own.run("ALTER TABLE items ADD b int; DROP TABLE logs; ALTER TABLE ours ADD b int").await;
    own.leave().await;
    let report = examine(&admin.actor, &[], false).await.unwrap();
    assert!(report.ok, "{:#?}", report.findings);
    rotate(&admin.actor, "acme").await.unwrap();
    tenants::suspend(&admin.actor, "acme", None, tenants::SuspendSessions::EndNow).await.unwrap();
    assert_eq!(owners(&west).await, "app (locked) shop of app web (locked)", "pglobby made it here");
    tenants::resume(&admin.actor, "acme").await.unwrap();
    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    assert_eq!((owners(&west).await, inventory(&west).await), (String::new(), String::new()));
}

#[tokio::test]
async fn an_owner_that_cannot_be_carried_is_named_before_anything_is_made() {
    let admin = Admin::new().await;
    let west = west(&admin.superuser("central").await).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE strong CREATEDB; GRANT strong TO acme_rw; CREATE ROLE far CREATEROLE; GRANT far TO acme_rw").await;
    superuser.run("ALTER ROLE acme_rw SET role = strong").await;

    let refused = move_to(&admin.actor, "west").await.expect_err("it may make databases").to_string();

    assert!(
        refused.contains("\"strong\"") && refused.contains("superuser or may make databases"),
        "{refused}"
    );
    assert_eq!(inventory(&west).await, "");
    superuser.run("ALTER ROLE strong NOCREATEDB").await;
    // The other membership gives it nothing in its database.
    move_to(&admin.actor, "west").await.unwrap();
    let session = "SELECT setconfig::text FROM pg_db_role_setting WHERE setrole = 'acme_rw'::regrole";
    assert_eq!(west.client("postgres").await.ask(session).await, "{role=strong}");
    let far = "SELECT count(*) FROM pg_roles WHERE rolname = 'far'";
    assert_eq!(west.client("postgres").await.ask(far).await, "0");
}

#[tokio::test]
async fn killed_while_clients_are_held_moving_again_arrives_once() {
    arrives_once_after(&["quiet", "copied", "owned", "verified", "switched"]).await;
}

async fn arrives_once_after(steps: &[&str]) {
    let admin = Admin::new().await;
    let west = west(&admin.superuser("central").await).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    admin
        .superuser("acme")
        .await
        .run("CREATE TABLE t AS SELECT 42 AS a; ALTER TABLE t OWNER TO acme_rw")
        .await;
    let mut here = false;
    for step in steps {
        let (target, other) = if here { ("default", &west) } else { ("west", &admin.installation.cluster) };
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(move_to(&dying, target).await) }).await;
        let rotated = rotate(&admin.actor, "acme").await.expect_err("first things first").to_string();
        assert!(rotated.contains("tenant move acme"), "{rotated}");

        let moved = move_to(&admin.another_actor(), target).await.unwrap();

        here = !here;
        assert_eq!(moved.host, target, "killed after {step}");
        let cluster = if target == "west" { &west } else { &admin.installation.cluster };
        assert_eq!(cluster.client("acme").await.ask("SELECT a FROM t").await, "42", "killed after {step}");
        assert_eq!(inventory(cluster).await, "acme acme_ro acme_rw", "killed after {step}");
        assert_eq!(inventory(other).await, "", "killed after {step}");
        let open = "SELECT count(*) FROM pglobby.operations WHERE status IN ('running', 'failed')";
        let fenced = "SELECT count(*) FROM pglobby.tenants WHERE fenced";
        let central = admin.superuser("central").await;
        assert_eq!((central.ask(open).await, central.ask(fenced).await), ("0".into(), "0".into()));
        assert!(examine(&admin.actor, &[], false).await.unwrap().ok, "killed after {step}");
    }
}

#[tokio::test]
async fn a_tenant_whose_move_died_can_be_dropped() {
    for step in ["copied", "switched"] {
        let admin = Admin::new().await;
        let west = west(&admin.superuser("central").await).await;
        create(&admin.actor, &tenant("acme")).await.unwrap();
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

/// A move that had died was to be settled first, which takes both hosts, and one of them was gone for good.
#[tokio::test]
async fn a_tenant_whose_move_died_with_its_host_can_be_dropped() {
    for step in ["copied", "switched"] {
        let admin = Admin::new().await;
        let mut west = west(&admin.superuser("central").await).await;
        create(&admin.actor, &tenant("acme")).await.unwrap();
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(move_to(&dying, "west").await) }).await;
        west.stop();

        let refused = drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap_err();
        drop_tenant(&admin.actor, "acme", DropDatabase::Left, None).await.unwrap();

        assert!(matches!(refused, AdminError::Refused(_) | AdminError::Connect { .. }), "{refused}");
        let central = admin.superuser("central").await;
        let open = "SELECT count(*) FROM pglobby.operations WHERE status IN ('running', 'failed')";
        assert_eq!(central.ask(open).await, "0", "killed after {step}");
        create(&admin.actor, &CreateTenant { database: Some("acme2".to_owned()), ..tenant("acme") })
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn what_cannot_be_copied_stays_where_it_is() {
    let admin = Admin::new().await;
    let west = west(&admin.superuser("central").await).await;
    let made = create(&admin.actor, &tenant("acme")).await.unwrap();
    for (host, says) in [("default", "on host \"default\" already"), ("wset", "did you mean \"west\"?")] {
        let error = move_to(&admin.actor, host).await.expect_err(host).to_string();
        assert!(error.contains(says), "{error}");
    }
    west.client("postgres").await.run("CREATE DATABASE acme").await;
    assert!(matches!(move_to(&admin.actor, "west").await, Err(AdminError::Exists(_))));
    west.client("postgres").await.run("DROP DATABASE acme").await;
    let session = admin.login(&made.username, "acme").await.unwrap();
    session.run("BEGIN; SELECT 1").await;
    let impatient = MoveTenant { patience: Duration::from_millis(200), ..to("west") };

    let error = move_tenant(&admin.actor, "acme", &impatient).await.expect_err("busy").to_string();

    assert!(error.contains("1 sessions of the tenant") && error.contains("stays where it is"), "{error}");
    session.run("SELECT 1; COMMIT").await;
    assert_eq!(inventory(&admin.installation.cluster).await, "acme acme_ro acme_rw");
    assert_eq!(inventory(&west).await, "");
    drop(session);
    move_to(&admin.actor, "west").await.unwrap();
}

/// Nobody gets past a suspension by a move: neither on the host that the tenant leaves nor on the one that it comes to, whatever
/// dies on the way.
#[tokio::test]
async fn a_suspended_tenant_moves_and_stays_suspended() {
    let proxy = Proxy::with_tenant("acme").start().await;
    proxy.create_login("reader", "secret", &["--tenant", "acme", "--read-only"]);
    let west = west(&proxy.cluster.client("central").await).await;
    proxy.client("acme").run("CREATE TABLE t AS SELECT 42 AS a").then_leave().await;
    proxy.command(&["tenant", "suspend", "acme", "--reason", "unpaid", "--now"]);

    let moved = proxy.json(&["tenant", "move", "acme", "--host", "west", "--json"]);

    assert_eq!((&moved["host"], &moved["copied_by"]), (&"west".into(), &"dump".into()));
    assert_eq!(inventory(&proxy.cluster).await, "");
    assert_eq!(inventory(&west).await, "acme acme_ro (locked) acme_rw (locked)");
    let shown = proxy.json(&["tenant", "show", "acme", "--json"]);
    assert_eq!((&shown["status"], &shown["status_reason"]), (&"suspended".into(), &"unpaid".into()));
    assert_eq!(proxy.client("acme").refusal().await, "57P03");
    assert!(proxy.command_with(&["doctor"], "").status.success());

    proxy.command(&["tenant", "resume", "acme"]);

    assert_eq!(inventory(&west).await, "acme acme_ro acme_rw");
    assert_eq!(proxy.client("acme").ask("SELECT a FROM t").await, "42");
    assert_eq!(proxy.caller("reader", "secret", "acme").ask("SELECT a FROM t").await, "42");
    proxy.client("acme").run("INSERT INTO t VALUES (43)").then_leave().await;
}

#[tokio::test]
async fn the_roles_of_a_suspended_tenant_are_locked_wherever_its_move_died() {
    let admin = Admin::new().await;
    let west = west(&admin.superuser("central").await).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    tenants::suspend(&admin.actor, "acme", None, tenants::SuspendSessions::EndNow).await.unwrap();
    let locked = "acme acme_ro (locked) acme_rw (locked)";
    for step in ["schema", "fenced", "quiet", "copied", "verified"] {
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(move_to(&dying, "west").await) }).await;
        assert_eq!(inventory(&admin.installation.cluster).await, locked, "killed after {step}");
        // It is put back before anything else is looked at.
        let stays = move_to(&admin.actor, "default").await.expect_err("it is there").to_string();
        assert!(stays.contains("already"), "{stays}");
        assert_eq!(inventory(&admin.installation.cluster).await, locked, "killed after {step}");
        assert_eq!(inventory(&west).await, "", "killed after {step}");
    }
    let mut dying = admin.another_actor();
    let killer = StopAfter::step("switched");
    dying.progress = Some(killer.clone());
    killer.kill(async { drop(move_to(&dying, "west").await) }).await;
    move_to(&admin.actor, "west").await.unwrap();
    assert_eq!(inventory(&admin.installation.cluster).await, "");
    assert_eq!(inventory(&west).await, locked);
    assert!(examine(&admin.actor, &[], false).await.unwrap().ok);
    tenants::resume(&admin.actor, "acme").await.unwrap();
    assert_eq!(inventory(&west).await, "acme acme_ro acme_rw");
}

/// Clients read, write and use what they have prepared, all the while; one holds a transaction open at the beginning.
#[tokio::test(flavor = "multi_thread")]
async fn clients_wait_and_see_no_error() {
    let proxy = Proxy::with_tenant("acme").pool_size(3).start().await;
    let west = west(&proxy.cluster.client("central").await).await;
    proxy.client("acme").run("CREATE TABLE log (id serial, who int)").then_leave().await;
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for who in 0..4_i32 {
        let (caller, stop, written) = (proxy.client("acme"), stop.clone(), written.clone());
        clients.spawn(async move {
            let client = caller.connect().await;
            let insert = client.prepare("INSERT INTO log (who) VALUES ($1)").await.unwrap();
            while !stop.load(Ordering::Relaxed) {
                let inserted = in_time("an insert", client.execute(&insert, &[&who])).await;
                assert_eq!(inserted.unwrap(), 1);
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let mut listener = proxy.wire("acme").await;
    listener.query("LISTEN news").await;
    let patient = proxy.client("acme").connect().await;
    patient.run("SET application_name = 'patient'; BEGIN; INSERT INTO log (who) VALUES (99)").await;
    let progress = async |more: i64| {
        let before = written.load(Ordering::Relaxed);
        let going = async {
            while written.load(Ordering::Relaxed) < before + more {
                tokio::task::yield_now().await;
            }
        };
        in_time("clients go on", going).await;
    };
    progress(50).await;

    let moving = async {
        let fenced = "SELECT count(*) FROM pglobby.tenants WHERE fenced";
        let central = proxy.cluster.client("central").await;
        in_time("the fence", async { while central.ask(fenced).await != "1" {} }).await;
        patient.run("COMMIT").await;
    };
    let arguments = ["tenant", "move", "acme", "--host", "west", "--json"];
    let printed = std::thread::scope(|scope| {
        let command = scope.spawn(|| proxy.json(&arguments));
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(moving));
        command.join().unwrap()
    });

    assert_eq!(printed["host"], "west");
    progress(50).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    let count = (written.load(Ordering::Relaxed) + 1).to_string();
    assert_eq!(
        west.client("acme").await.ask("SELECT count(*) FROM log").await,
        count,
        "nothing lost, nothing twice"
    );
    // What is notified on one host is not heard on the other: whoever listens is told to do so again.
    let end = listener.until_end().await;
    assert!(end[0].field(b'M').unwrap().contains("LISTEN again"), "{end:?}");
    assert_eq!(patient.ask("SHOW application_name").await, "patient");
    assert_eq!(patient.ask("SELECT count(*) FROM log").await, count);
    assert_eq!(inventory(&proxy.cluster).await, "");
}
