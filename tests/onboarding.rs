//! `tenant create` and `tenant drop`: what is made, who may do what in it, and what is left when something dies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::sync::Arc;

use pglobby::control_path::{
    admin::{actor::AdminError, tenants},
    onboarding::{
        create::{CreateTenant, create},
        drop::{DropDatabase, drop_tenant},
        schema_files::{self, SchemaFile},
    },
};
use support::{
    Cluster, Proxy,
    admin::{Admin, Master, Steps, StopAfter, tenant},
    client::sqlstate,
    proxy::{login_of, password_of},
};

fn schema(sql: &str) -> Vec<SchemaFile> {
    vec![SchemaFile::of_text("schema.sql", sql)]
}

/// Everything that matters of a tenant's two roles, whoever made them.
async fn the_whole_promise(admin: &Admin, name: &str) {
    let wanted = CreateTenant {
        schema: schema(
            "CREATE TABLE early (id serial PRIMARY KEY); CREATE SCHEMA hr; CREATE TABLE hr.pay (e int)",
        ),
        ..tenant(name)
    };
    let made = create(&admin.actor, &wanted).await.unwrap();
    create(&admin.actor, &tenant("neighbour")).await.unwrap();
    let row = tenants::show(&admin.actor, name).await.unwrap();
    assert_eq!((made.status.as_str(), made.database.as_str()), ("active", name));
    let reader = row.ro_username.unwrap();

    // The tenant's own role does as it likes in its database.
    let own = admin.login(&made.username, name).await.unwrap();
    own.run("INSERT INTO early DEFAULT VALUES; CREATE TEMP TABLE scratch (a int); DROP TABLE scratch").await;
    own.run("CREATE TABLE late (a int); CREATE SEQUENCE numbers; CREATE SCHEMA newer; CREATE TABLE newer.t (a int)").await;
    own.run(
        "CREATE FUNCTION sneak() RETURNS void LANGUAGE sql SECURITY DEFINER AS 'INSERT INTO late VALUES (1)'",
    )
    .await;
    let foreign = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
        WHERE nspname IN ('public', 'hr', 'newer') AND pg_get_userbyid(relowner) <> current_user";
    assert_eq!(own.ask(foreign).await, "0");

    // The read-only role sees all of it, earlier and later, and can change none.
    let reading = admin.login(&reader, name).await.unwrap();
    for table in ["early", "late", "hr.pay", "newer.t", "numbers"] {
        reading.run(&format!("SELECT * FROM {table}")).await;
    }
    let sneaking = reading.try_run("SELECT sneak()").await.expect_err("read-only by default");
    assert_eq!(sqlstate(&sneaking), "25006");
    reading.run("SET default_transaction_read_only = off").await;
    for sql in [
        "INSERT INTO early DEFAULT VALUES",
        "UPDATE late SET a = 1",
        "DELETE FROM hr.pay",
        "TRUNCATE newer.t",
        "SELECT nextval('numbers')",
        "SELECT setval('numbers', 7)",
        "SELECT * FROM late FOR UPDATE",
        "CREATE TABLE mine (a int)",
        "CREATE TABLE hr.mine (a int)",
        "CREATE TEMP TABLE mine (a int)",
        "CREATE SCHEMA mine",
        "SET ROLE postgres",
    ] {
        let refused = reading.try_run(sql).await.expect_err(sql);
        assert!(["42501", "22023"].contains(&sqlstate(&refused).as_str()), "{sql}: {refused:?}");
    }
    let escape = format!("SET ROLE \"{}\"", made.username.replace('"', "\"\""));
    assert_eq!(sqlstate(&reading.try_run(&escape).await.expect_err("no member")), "42501");

    // Nobody enters what is not theirs.
    for role in [&made.username, &reader] {
        for database in ["central", "neighbour"] {
            let refused = admin.login(role, database).await.err().expect(database);
            assert_eq!(sqlstate(&refused), "42501", "{role} in {database}");
        }
    }
    admin.superuser("postgres").await.run("CREATE ROLE passer_by LOGIN").await;
    assert_eq!(sqlstate(&admin.login("passer_by", name).await.err().expect("closed")), "42501");
    let powers = format!(
        "SELECT count(*) FROM pg_roles WHERE rolname IN ({}, {}) AND NOT (rolsuper OR rolcreatedb OR rolcreaterole
            OR rolreplication OR rolbypassrls)",
        postgres_protocol::escape::escape_literal(&made.username),
        postgres_protocol::escape::escape_literal(&reader)
    );
    assert_eq!(admin.superuser("postgres").await.ask(&powers).await, "2");
}

#[tokio::test]
async fn a_superuser_makes_tenants_as_promised() {
    the_whole_promise(&Admin::new().await, "acme").await;
}

#[tokio::test]
async fn a_master_that_is_no_superuser_makes_them_just_so() {
    the_whole_promise(&Admin::on(Cluster::build(), Master::Createrole).await, "acme").await;
}

/// PostgreSQL 16 took from CREATEROLE the right to act for every role.
#[tokio::test]
async fn a_master_that_is_no_superuser_makes_them_just_so_on_18() {
    the_whole_promise(&Admin::on(Cluster::postgres_18(), Master::Createrole).await, "acme").await;
}

#[tokio::test]
async fn odd_names_are_only_names() {
    let admin = Admin::new().await;
    the_whole_promise(&admin, r#"a"b'c.d; DROP ROLE x --\ 日本"#).await;
    let longest = "x".repeat(63);
    let made = create(&admin.actor, &tenant(&longest)).await.unwrap();
    assert_eq!(made.database, longest);
    drop_tenant(&admin.actor, r#"a"b'c.d; DROP ROLE x --\ 日本"#, DropDatabase::IfOurs, None).await.unwrap();
    drop_tenant(&admin.actor, &longest, DropDatabase::IfOurs, None).await.unwrap();
}

#[tokio::test]
async fn no_password_is_in_the_servers_log() {
    let admin = Admin::on(Cluster::build().setting("log_statement", "ddl"), Master::Superuser).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();

    let log = admin.installation.cluster.log_tail();
    assert!(log.contains("CREATE ROLE"), "the log tells of statements: {log}");
    for line in log.lines().filter(|line| line.contains("PASSWORD '")) {
        assert!(line.contains("PASSWORD 'SCRAM-SHA-256$"), "{line}");
    }
}

#[tokio::test]
async fn a_schema_file_that_fails_is_told_by_line_and_leaves_nothing() {
    let admin = Admin::new().await;
    let before = admin.remains().await;
    let wanted = CreateTenant { schema: schema("CREATE TABLE t (a int);\nCREATE TABL x;"), ..tenant("acme") };

    let error = create(&admin.actor, &wanted).await.expect_err("a typo").to_string();

    assert!(error.contains("schema.sql:2:8"), "{error}");
    assert_eq!(admin.remains().await, before);
    create(&admin.actor, &tenant("acme")).await.unwrap();
}

/// What pg_dump writes today, and what one transaction cannot do.
const DUMP: &str = r"
\restrict kQ8sV

SET statement_timeout = 0;
SELECT pg_catalog.set_config('search_path', '', false);
CREATE TYPE public.mood AS ENUM ('good');
CREATE TABLE public.notes (id int, note text, mood public.mood);
COPY public.notes (id, note, mood) FROM stdin;
1	a;b	good
2	\N	\N
\.

ALTER TYPE public.mood ADD VALUE 'bad';
INSERT INTO public.notes VALUES (3, 'it''s', 'bad');
CREATE INDEX CONCURRENTLY by_note ON public.notes (note);
VACUUM public.notes;

\unrestrict kQ8sV
";

fn file_of(folder: &tempfile::TempDir, name: &str, sql: &str) -> Vec<SchemaFile> {
    let path = folder.path().join(name);
    std::fs::write(&path, sql).unwrap();
    schema_files::read(&[path]).unwrap()
}

#[tokio::test]
async fn a_dump_is_a_schema_file_with_psql_and_without() {
    let admin = Admin::new().await;
    let folder = tempfile::tempdir().unwrap();
    // psql reads no text; the file shows that it is psql, by its commands.
    let with_psql = file_of(&folder, "with psql.sql", &format!("\\set three 3\n{DUMP}\nSELECT :three;\n"));
    for (name, files) in [("by_psql", with_psql), ("by_us", vec![SchemaFile::of_text("dump.sql", DUMP)])] {
        let made = create(&admin.actor, &CreateTenant { schema: files, ..tenant(name) }).await.unwrap();
        let inside = admin.superuser(&made.database).await;
        let notes = "SELECT string_agg(concat_ws(' ', id, note, mood), ', ' ORDER BY id) FROM notes";
        assert_eq!(inside.ask(notes).await, "1 a;b good, 2, 3 it's bad");
        let valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_note'::regclass";
        assert_eq!(inside.ask(valid).await, "t");
        let owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'notes'";
        assert_eq!(inside.ask(owner).await, made.username);
    }
}

#[tokio::test]
async fn whatever_runs_a_schema_file_says_where_it_fails() {
    let admin = Admin::new().await;
    let before = admin.remains().await;
    let folder = tempfile::tempdir().unwrap();
    for (sql, place, words) in [
        (
            "CREATE TABLE t (a int);\nCREATE TABL x;\nSELECT 1;\n",
            ":2:8: ",
            "syntax error at or near \"TABL\" (SQLSTATE 42601)",
        ),
        ("SELECT 1;\n\nSELECT 1,\n       nam\nFROM pg_class\nWHERE true;\n", ":4:8: ", "(SQLSTATE 42703)"),
        ("CREATE TABLE t (a int UNIQUE);\nINSERT INTO t VALUES (7), (7);\n", ":2", "t_a_key"),
        ("CREATE TABLE t (a int);\nCOPY t FROM stdin;\n1\nx\n\\.\n", "", "(SQLSTATE 22P02)"),
        ("SELECT 1;\n\\frobnicate\n", ":2", "\\frobnicate"),
    ] {
        let files = [file_of(&folder, "schema.sql", sql), vec![SchemaFile::of_text("schema.sql", sql)]];
        for schema in files {
            let wanted = CreateTenant { schema, ..tenant("acme") };
            let error = create(&admin.actor, &wanted).await.expect_err(sql).to_string();
            assert!(error.contains(&format!("schema.sql{place}")) && error.contains(words), "{error}");
            assert!(!error.contains("(7)"), "no rows: {error}");
        }
    }
    assert_eq!(admin.remains().await, before);
}

/// A text may have come over the network; a file is the operator's, as for psql.
#[tokio::test]
async fn a_text_runs_no_command_on_this_machine() {
    let admin = Admin::new().await;
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let sql = format!("SELECT 1;\n\\! touch '{}'\n", trace.display());

    let wanted = CreateTenant { schema: vec![SchemaFile::of_text("text", &*sql)], ..tenant("acme") };
    let error = create(&admin.actor, &wanted).await.expect_err("a command").to_string();

    assert!(error.contains(r"text:2:1: \! is a command of psql's"), "{error}");
    assert!(!trace.exists());
    create(&admin.actor, &CreateTenant { schema: file_of(&folder, "s.sql", &sql), ..tenant("acme") })
        .await
        .unwrap();
    assert!(trace.exists());
}

/// Runs one of PostgreSQL's own clients as the login of `tenant`, through the proxy.
fn tool(proxy: &Proxy, tenant: &str, name: &str, arguments: &[&str]) -> String {
    let mut command = std::process::Command::new(name);
    command.env("PGHOST", "127.0.0.1").env("PGPORT", proxy.port().to_string()).env("PGDATABASE", tenant);
    command.env("PGUSER", login_of(tenant)).env("PGPASSWORD", password_of(tenant));
    let output = command.args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("error"), "{name} {arguments:?}: {said}");
    said
}

/// The administrator's default privileges were in it once, which only the administrator may restore.
#[tokio::test]
async fn a_tenants_own_dump_is_restored_by_the_tenant() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    proxy.create_login("reader", "known", &["--tenant", "globex", "--read-only"]);
    let old = proxy.client("acme").connect().await;
    old.run("CREATE SCHEMA hr; CREATE TABLE hr.pay (id serial PRIMARY KEY, e int); INSERT INTO hr.pay (e) VALUES (7)").await;
    old.run("CREATE VIEW seen AS SELECT e FROM hr.pay; SELECT lo_create(4711)").await;
    old.leave().await;
    let folder = tempfile::tempdir().unwrap();
    let (archive, text) = (folder.path().join("acme.dump"), folder.path().join("acme.sql"));
    let (archive, text) = (archive.to_str().unwrap(), text.to_str().unwrap());
    tool(&proxy, "acme", "pg_dump", &["--format=custom", "--file", archive]);
    tool(&proxy, "acme", "pg_dump", &["--no-owner", "--no-privileges", "--file", text]);

    tool(
        &proxy,
        "acme",
        "pg_restore",
        &["--clean", "--if-exists", "--exit-on-error", "--dbname", "acme", archive],
    );
    let others = ["--no-owner", "--no-privileges", "--exit-on-error", "--dbname", "globex", archive];
    tool(&proxy, "globex", "pg_restore", &others);
    let made = proxy.json(&["tenant", "create", "initech", "--schema", text, "--json"]);

    assert_eq!(made["status"], "active");
    assert_eq!(proxy.behind("initech").await.ask("SELECT e FROM seen").await, "7");
    assert_eq!(proxy.client("acme").ask("SELECT e FROM seen").await, "7");
    assert_eq!(proxy.caller("reader", "known", "globex").ask("SELECT e FROM hr.pay").await, "7");
    let found = proxy.json(&["doctor", "--json"]);
    assert_eq!(found["findings"], serde_json::json!([]));
}

/// A schema file once ran on the administrator's connection under SET ROLE; RESET ROLE was all it needed.
#[tokio::test]
async fn a_schema_file_has_no_more_rights_than_its_tenant() {
    let admin = Admin::new().await;
    let sql = "RESET ROLE; RESET SESSION AUTHORIZATION; CREATE ROLE intruder SUPERUSER";
    let wanted = CreateTenant { schema: schema(sql), ..tenant("acme") };

    let error = create(&admin.actor, &wanted).await.expect_err("no rights");

    assert!(error.to_string().contains("42501"), "{error}");
}

#[tokio::test]
async fn what_was_there_before_is_never_taken_nor_touched() {
    let admin = Admin::new().await;
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE acme_rw; CREATE ROLE globex_ro").await;
    superuser.run("CREATE DATABASE initech").await;

    let acme = create(&admin.actor, &tenant("acme")).await.unwrap();
    let globex = create(&admin.actor, &tenant("globex")).await.unwrap();
    let initech = create(&admin.actor, &tenant("initech")).await.expect_err("is there");

    assert_eq!((acme.username.as_str(), globex.username.as_str()), ("acme_2_rw", "globex_2_rw"));
    assert!(matches!(&initech, AdminError::Exists(words) if words.contains("adopt")), "{initech}");
    assert_eq!(superuser.ask("SELECT count(*) FROM pg_database WHERE datname = 'initech'").await, "1");
    for name in ["acme", "globex"] {
        drop_tenant(&admin.actor, name, DropDatabase::IfOurs, None).await.unwrap();
    }
    let left = superuser
        .ask("SELECT string_agg(rolname, ' ' ORDER BY rolname) FROM pg_roles WHERE rolname ~ '_r[wo]$'");
    assert_eq!(left.await, "acme_rw globex_ro");
}

#[tokio::test]
async fn killed_after_any_step_creating_starts_again_and_leaves_nothing_over() {
    for master in [Master::Superuser, Master::Createrole] {
        let admin = Admin::on(Cluster::build(), master).await;
        let before = admin.remains().await;
        let wanted = CreateTenant { schema: schema("CREATE TABLE t (a int)"), ..tenant("acme") };
        for step in
            ["begun", "roles", "database", "closed", "owned", "granted", "schema 1", "verified", "active"]
        {
            let mut dying = admin.another_actor();
            let killer = StopAfter::step(step);
            dying.progress = Some(killer.clone());
            killer.kill(async { drop(create(&dying, &wanted).await) }).await;

            let again = create(&admin.another_actor(), &wanted).await;

            match step {
                "active" => assert!(matches!(again, Err(AdminError::Exists(_))), "{again:?}"),
                _ => assert_eq!(again.unwrap().username, "acme_rw", "killed after {step}"),
            }
            drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
            admin
                .superuser("central")
                .await
                .run("DELETE FROM pglobby.tenants WHERE status = 'dropped'")
                .await;
            assert_eq!(admin.remains().await, before, "killed after {step}");
        }
    }
}

#[tokio::test]
async fn a_tenant_that_died_while_being_made_can_be_dropped_instead() {
    let admin = Admin::new().await;
    let before = admin.remains().await;
    let mut dying = admin.another_actor();
    let killer = StopAfter::step("granted");
    dying.progress = Some(killer.clone());
    killer.kill(async { drop(create(&dying, &tenant("acme")).await) }).await;

    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();

    assert_eq!(admin.remains().await, before);
}

#[tokio::test]
async fn killed_after_any_step_dropping_goes_on() {
    let admin = Admin::new().await;
    let before = admin.remains().await;
    for step in ["fenced", "ended", "found", "database", "roles", "dropped"] {
        create(&admin.actor, &tenant("acme")).await.unwrap();
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(drop_tenant(&dying, "acme", DropDatabase::IfOurs, None).await) }).await;
        if step != "dropped" {
            assert_eq!(tenants::show(&admin.actor, "acme").await.unwrap().status, "dropping");
            let refused = create(&admin.actor, &tenant("acme")).await.expect_err("not yet");
            assert!(refused.to_string().contains("tenant drop"), "{refused}");
            drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
        }
        assert_eq!(tenants::show(&admin.actor, "acme").await.unwrap().status, "dropped");
        admin.superuser("central").await.run("DELETE FROM pglobby.tenants").await;
        assert_eq!(admin.remains().await, before, "killed after {step}");
    }
}

#[tokio::test]
async fn dropping_ends_sessions_and_spares_a_database_made_by_that_name_since() {
    let admin = Admin::new().await;
    let made = create(&admin.actor, &tenant("acme")).await.unwrap();
    let session = admin.login(&made.username, "acme").await.unwrap();
    let mut dying = admin.another_actor();
    let killer = StopAfter::step("database");
    dying.progress = Some(killer.clone());
    killer.kill(async { drop(drop_tenant(&dying, "acme", DropDatabase::IfOurs, None).await) }).await;
    assert!(session.try_run("SELECT 1").await.is_err(), "the session has ended");
    admin.superuser("postgres").await.run("CREATE DATABASE acme").await;

    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();

    admin.superuser("acme").await.run("SELECT 1").await;
}

/// DROP DATABASE WITH (FORCE) refuses where it may not end a session, instead of waiting a moment for it to leave.
#[tokio::test]
async fn a_lesser_master_waits_for_a_superusers_session_to_leave() {
    let admin = Admin::on(Cluster::build(), Master::Createrole).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let monitoring = admin.superuser("acme").await;
    let (operator, observer) = (admin.another_actor(), admin.superuser("postgres").await);
    let dropping =
        tokio::spawn(async move { drop_tenant(&operator, "acme", DropDatabase::IfOurs, None).await });
    let waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE query = 'DROP DATABASE \"acme\"' AND state = 'active'";
    while observer.ask(waiting).await == "f" {}

    drop(monitoring);

    assert!(dropping.await.unwrap().unwrap().database_dropped);
}

#[tokio::test]
async fn of_two_operators_at_once_one_makes_the_tenant_and_the_other_hears_of_it() {
    let admin = Admin::new().await;
    let (one, two) = (admin.another_actor(), admin.another_actor());
    let wanted = tenant("acme");

    let (first, second) = tokio::join!(create(&one, &wanted), create(&two, &wanted));

    let (made, refused) = if first.is_ok() { (first, second) } else { (second, first) };
    assert_eq!(made.unwrap().username, "acme_rw");
    assert!(matches!(refused, Err(AdminError::Exists(_))), "{refused:?}");
    let databases = "SELECT count(*) FROM pg_database WHERE datname = 'acme'";
    assert_eq!(admin.superuser("postgres").await.ask(databases).await, "1");
}

#[tokio::test]
async fn eight_at_once_from_a_template_that_somebody_looks_at() {
    let admin = Admin::new().await;
    admin.superuser("postgres").await.run("CREATE DATABASE app_template").await;
    let onlooker = admin.superuser("app_template").await;
    onlooker.run("CREATE TABLE t (a int); INSERT INTO t VALUES (42)").await;
    let mut making = tokio::task::JoinSet::new();
    for number in 0..8 {
        let operator = admin.another_actor();
        let wanted =
            CreateTenant { template: Some("app_template".to_owned()), ..tenant(&format!("t{number}")) };
        making.spawn(async move { create(&operator, &wanted).await });
    }
    // The server has waited for the onlooker in vain at least once: then it is time to leave.
    let waiting =
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE 'CREATE DATABASE%' AND state = 'active'";
    let observer = admin.superuser("postgres").await;
    while observer.ask(waiting).await == "f" {}
    drop(onlooker);

    for made in making.join_all().await {
        let made = made.unwrap();
        let own = admin.login(&made.username, &made.database).await.unwrap();
        assert_eq!(own.ask("SELECT a FROM t").await, "42");
    }
}

#[tokio::test]
async fn the_steps_of_a_tenant_are_recorded_and_audited() {
    let admin = Admin::new().await;
    let mut operator = admin.another_actor();
    let steps = Arc::new(Steps::default());
    operator.progress = Some(steps.clone());
    create(&operator, &tenant("acme")).await.unwrap();
    drop_tenant(&operator, "acme", DropDatabase::IfOurs, None).await.unwrap();

    let created = ["begun", "roles", "database", "closed", "owned", "granted", "verified", "active"];
    let dropped = ["fenced", "ended", "found", "database", "roles", "dropped"];
    assert_eq!(steps.all(), [&created[..], &dropped[..]].concat());
    let central = admin.superuser("central").await;
    let actions = "SELECT string_agg(actor || ' ' || action, ', ' ORDER BY id) FROM pglobby.audit_log WHERE tenant = 'acme'";
    assert_eq!(central.ask(actions).await, "test tenant.create, test tenant.drop, test tenant.dropped");
    let tombstone = "SELECT status || ' ' || (sealed_password IS NULL AND sealed_ro_password IS NULL) FROM pglobby.tenants";
    assert_eq!(central.ask(tombstone).await, "dropped true");
}

#[tokio::test]
async fn a_host_that_is_down_is_named_and_nothing_is_half_made() {
    let admin = Admin::new().await;
    let insert = "INSERT INTO pglobby.hosts (name, address, port, admin_user) VALUES ('west', '127.0.0.1', 1, 'postgres')";
    admin.superuser("central").await.run(insert).await;
    let before = admin.remains().await;
    let wanted = CreateTenant { host: Some("west".to_owned()), ..tenant("acme") };

    let error = create(&admin.actor, &wanted).await.expect_err("down").to_string();

    assert!(error.contains("west") && error.contains("127.0.0.1:1"), "{error}");
    assert_eq!(admin.remains().await, before);
}
