//! A tenant that means harm, and an operator with a superuser's rights who does what operators do: nothing that the
//! tenant has defined ever runs as anybody but the tenant.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{sync::Arc, time::Duration};

use pglobby::control_path::{
    admin::{
        actor::{Actor, AdminError},
        run_on_tenants::{TenantSelection, run_on_tenants},
        tenants,
    },
    doctor::examine,
    onboarding::{
        adopt::{AdoptTenant, adopt, complete_grants},
        create::{CreateTenant, create},
        drop::{DropDatabase, drop_tenant},
        move_tenant::{MoveTenant, Moved, move_tenant},
        rename::rename,
        rotate::rotate,
        schema_files::SchemaFile,
    },
};
use support::{
    Client, Cluster,
    admin::{Admin, Master, Steps, tenant},
    client::sqlstate,
    cluster::Builder,
    hostile::{self, assert_harmless, lay, sprung},
};

const OURS: [&str; 4] = ["acme_rw", "acme_ro", "globex_rw", "globex_ro"];

/// A second host, `west`, with `admin` (made with `rights`) as its administrator.
async fn west(cluster: Builder, central: &Client, admin: &str, rights: &str) -> Cluster {
    let hba = format!(
        "host all {admin} 127.0.0.1/32 trust\nlocal all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n"
    );
    let west = cluster.hba(&hba).setting("wal_retrieve_retry_interval", "100ms").start();
    if !rights.is_empty() {
        west.client("postgres").await.run(&format!("CREATE ROLE {admin} LOGIN {rights}")).await;
    }
    let sql = format!(
        "INSERT INTO pglobby.hosts (name, address, port, admin_user, accepts_tenants)
         VALUES ('west', '127.0.0.1', {}, '{admin}', false)",
        west.port()
    );
    central.run(&sql).await;
    west
}

/// Tenant acme, with every trap laid. Its role's password is the test's meanwhile, and pglobby's again afterwards.
async fn hostile_acme(admin: &Admin) {
    let made = create(&admin.actor, &tenant("acme")).await.unwrap();
    let own = admin.login(&made.username, "acme").await.unwrap();
    lay(&own, "acme", "acme_rw").await;
    own.leave().await;
    rotate(&admin.actor, "acme").await.unwrap();
    // Which has put some of them right.
    admin.superuser("postgres").await.run(&hostile::settings("acme", "acme_rw")).await;
}

async fn move_to_west(operator: &Actor) -> Result<Moved, AdminError> {
    let to = MoveTenant { host: "west".to_owned(), patience: Duration::from_secs(20), keep_source: false };
    move_tenant(operator, "acme", &to).await
}

async fn asked(admin: &Admin, sql: &str) -> bool {
    let outcomes = run_on_tenants(&admin.actor, sql, &TenantSelection::All, 2, |_| {}, |_| {}).await.unwrap();
    outcomes.iter().all(|outcome| outcome.ok)
}

async fn a_life_among_traps(cluster: Builder, final_dump: bool) {
    let admin = Admin::on(cluster, Master::Superuser).await;
    let cluster = &admin.installation.cluster;
    hostile_acme(&admin).await;
    assert!(!sprung(cluster).is_empty(), "they work");
    assert_harmless(cluster, &OURS, "rotate").await;

    // Its database as a template, and its statements as a schema file.
    let file = SchemaFile::of_text("hostile.sql", hostile::TRAPS);
    let copy = CreateTenant { template: Some("acme".to_owned()), ..tenant("globex") };
    create(&admin.actor, &copy).await.unwrap();
    assert_harmless(cluster, &OURS, "create --template").await;
    let other = CreateTenant { schema: vec![file], ..tenant("other") };
    create(&admin.actor, &other).await.unwrap();
    let ours = [&OURS[..], &["other_rw", "other_ro"]].concat();
    assert_harmless(cluster, &ours, "create --schema").await;

    let sql = "BEGIN READ WRITE; INSERT INTO public.trapped VALUES (4); SELECT * FROM public.seen; COMMIT";
    assert!(asked(&admin, sql).await);
    assert_harmless(cluster, &ours, "run").await;
    examine(&admin.actor, &[], true).await.unwrap();
    assert_harmless(cluster, &ours, "doctor --fix").await;
    tenants::suspend(&admin.actor, "acme", None, tenants::SuspendSessions::EndNow).await.unwrap();
    tenants::resume(&admin.actor, "acme").await.unwrap();
    rename(&admin.actor, "acme", "acme2").await.unwrap();
    assert_harmless(cluster, &ours, "rename").await;
    let folder = tempfile::tempdir().unwrap();
    let file = final_dump.then(|| folder.path().join("acme.dump"));
    drop_tenant(&admin.actor, "acme2", DropDatabase::IfOurs, file.as_deref()).await.unwrap();
    drop_tenant(&admin.actor, "globex", DropDatabase::IfOurs, None).await.unwrap();
    assert_harmless(cluster, &ours, "drop --final-dump").await;
}

#[tokio::test]
async fn whatever_an_operator_does_nothing_of_the_tenants_runs_as_anybody_else() {
    a_life_among_traps(Cluster::build(), std::env::var("PGLOBBY_TEST_POSTGRES").is_err()).await;
}

#[tokio::test]
async fn whatever_an_operator_does_nothing_of_the_tenants_runs_as_anybody_else_on_18() {
    a_life_among_traps(Cluster::postgres_18(), false).await;
}

/// The restore evaluates checks, domains, generated columns, indexes and materialized views.
#[tokio::test]
async fn moved_by_a_dump_nothing_of_the_tenants_runs_as_anybody_else() {
    let admin = Admin::new().await;
    let west = west(Cluster::build(), &admin.superuser("central").await, "master", "").await;
    hostile_acme(&admin).await;
    let own = admin.login("acme_rw", "acme").await.unwrap();
    own.run("SET default_transaction_read_only = off").await.run(hostile::TRAPS_FOR_A_DUMP).await;
    own.leave().await;

    let moved = move_to_west(&admin.actor).await.unwrap();

    assert_eq!(moved.copied_by, "dump");
    let there = sprung(&west);
    for what in [
        "check",
        "domain",
        "generated",
        "index",
        "partial index",
        "partition",
        "materialized view",
        "statistics",
    ] {
        assert!(
            there.iter().any(|trap| trap.starts_with(&format!("{what} "))),
            "{what} is evaluated: {there:?}"
        );
    }
    assert_harmless(&west, &OURS, "move").await;
    assert_harmless(&admin.installation.cluster, &OURS, "move").await;
    let inside = west.client("postgres").await;
    let owners = "SELECT rolsuper FROM pg_roles WHERE rolname = 'acme_rw'";
    assert_eq!(inside.ask(owners).await, "f");
    // What looked like a list of schemas is one still.
    let kept = "SELECT count(*) FROM pg_db_role_setting, unnest(setconfig) s
                WHERE s LIKE 'search_path=%;ALTER/**/ROLE/**/acme_rw/**/SUPERUSER;--%'";
    assert_eq!(inside.ask(kept).await, "1");
}

/// The subscription's workers evaluate what rows meet, and they are the tenant's role.
#[tokio::test]
async fn moved_by_replication_nothing_of_the_tenants_runs_as_anybody_else() {
    let admin = Admin::on(Cluster::build().setting("wal_level", "logical"), Master::Superuser).await;
    let west = west(Cluster::postgres_18(), &admin.superuser("central").await, "master", "").await;
    hostile_acme(&admin).await;
    // The role that replicates would be somebody else from its first moment, and the move a dump.
    let superuser = admin.superuser("postgres").await;
    superuser.run("ALTER DATABASE acme RESET role; ALTER DATABASE acme RESET session_authorization").await;

    let moved = move_to_west(&admin.actor).await.unwrap();

    assert_eq!((moved.copied_by.as_str(), moved.dumped_because), ("replication", None));
    let there = sprung(&west);
    for what in ["check", "domain", "generated", "index"] {
        assert!(
            there.iter().any(|trap| trap.starts_with(&format!("{what} "))),
            "{what} is evaluated: {there:?}"
        );
    }
    assert_harmless(&west, &OURS, "move").await;
    assert_harmless(&admin.installation.cluster, &OURS, "move").await;
}

#[tokio::test]
async fn an_adopted_database_full_of_traps_is_opened_and_given_back_and_none_runs_as_anybody_else() {
    let admin = Admin::new().await;
    let cluster = &admin.installation.cluster;
    admin
        .superuser("postgres")
        .await
        .run("CREATE ROLE app LOGIN")
        .await
        .run("CREATE DATABASE acme OWNER app")
        .await;
    let app = admin.login("app", "acme").await.unwrap();
    lay(&app, "acme", "app").await;
    app.leave().await;
    let ours = ["app", "acme_rw", "acme_ro"];

    adopt(&admin.actor, &AdoptTenant { name: "acme".to_owned(), ..AdoptTenant::default() }).await.unwrap();
    let central = admin.superuser("central").await;
    let id = central.ask("SELECT id FROM pglobby.tenants").await.parse().unwrap();
    complete_grants(&admin.actor, id).await.unwrap();
    assert_harmless(cluster, &ours, "adopt").await;
    assert!(asked(&admin, "BEGIN READ WRITE; CREATE TABLE public.late (a int); COMMIT").await);
    examine(&admin.actor, &[], true).await.unwrap();
    rotate(&admin.actor, "acme").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("acme.dump");
    let file = std::env::var("PGLOBBY_TEST_POSTGRES").is_err().then_some(file.as_path());
    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, file).await.unwrap();
    assert_harmless(cluster, &ours, "drop").await;
}

/// An index's expression runs as the owner of its table whenever PostgreSQL looks at it; so what a tenant leaves behind is
/// not given to somebody with powers.
#[tokio::test]
async fn what_a_tenant_leaves_behind_is_never_a_superusers() {
    let admin = Admin::new().await;
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE DATABASE acme").await;
    adopt(&admin.actor, &AdoptTenant { name: "acme".to_owned(), ..AdoptTenant::default() }).await.unwrap();
    let central = admin.superuser("central").await;
    let id = central.ask("SELECT id FROM pglobby.tenants").await.parse().unwrap();
    complete_grants(&admin.actor, id).await.unwrap();
    admin.login("acme_rw", "acme").await.unwrap().run(hostile::TRAPS).await;
    // And one that hides its database from who drops it.
    create(&admin.actor, &tenant("globex")).await.unwrap();
    admin.login("globex_rw", "globex").await.unwrap().run(hostile::TRAPS).await;
    superuser.run("ALTER DATABASE globex RENAME TO hidden").await;

    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    drop_tenant(&admin.actor, "globex", DropDatabase::IfOurs, None).await.unwrap();

    for (database, role) in [("acme", "acme_rw"), ("hidden", "globex_rw")] {
        let inside = admin.superuser(database).await;
        inside.run("ANALYZE; REINDEX TABLE public.trapped").await;
        let owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'trapped'";
        assert_eq!(inside.ask(owner).await, role);
        let locked = format!("SELECT rolcanlogin FROM pg_roles WHERE rolname = '{role}'");
        assert_eq!(inside.ask(&locked).await, "f");
    }
    for trap in sprung(&admin.installation.cluster) {
        assert!(trap.contains("user=acme_rw ") || trap.contains("user=globex_rw "), "{trap}");
    }
    assert_eq!(superuser.ask("SELECT count(*) FROM pg_roles WHERE rolname LIKE '%_ro'").await, "0");
}

/// Only a superuser makes event triggers; but whoever owns their function can replace it, and it runs as whoever causes
/// the event.
#[tokio::test]
async fn an_event_triggers_function_stays_its_superusers_when_a_template_is_copied() {
    let admin = Admin::new().await;
    admin.superuser("postgres").await.run("CREATE DATABASE app_template").await;
    let watching = "CREATE FUNCTION watch() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
         CREATE EVENT TRIGGER watching ON ddl_command_end EXECUTE FUNCTION watch(); CREATE TABLE t (a int)";
    admin.superuser("app_template").await.run(watching).await;

    create(&admin.actor, &CreateTenant { template: Some("app_template".into()), ..tenant("acme") })
        .await
        .unwrap();

    let own = admin.login("acme_rw", "acme").await.unwrap();
    own.run("ALTER TABLE t ADD b int").await;
    let replaced = "CREATE OR REPLACE FUNCTION watch() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE LOG ''TRAP''; END'";
    assert_eq!(sqlstate(&own.try_run(replaced).await.expect_err("a superuser's")), "42501");
}

async fn event_triggers_of_others(cluster: Builder) -> (Result<(), AdminError>, Vec<String>) {
    let admin = Admin::on(cluster, Master::Superuser).await;
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE app LOGIN").await.run("CREATE DATABASE acme OWNER app").await;
    let app = admin.login("app", "acme").await.unwrap();
    let function = "CREATE FUNCTION watch() RETURNS event_trigger LANGUAGE plpgsql AS
                    'BEGIN PERFORM public.spring(''event trigger''); END'";
    app.run(hostile::TRAPS).await.run(function).await;
    let watching = "CREATE EVENT TRIGGER watching ON ddl_command_end EXECUTE FUNCTION watch()";
    admin.superuser("acme").await.run(watching).await;
    let adopted =
        adopt(&admin.actor, &AdoptTenant { name: "acme".to_owned(), ..AdoptTenant::default() }).await;
    let adopted = match adopted {
        Ok(_) => {
            let central = admin.superuser("central").await;
            let id = central.ask("SELECT id FROM pglobby.tenants").await.parse().unwrap();
            complete_grants(&admin.actor, id).await
        }
        Err(error) => Err(error),
    };
    let events =
        sprung(&admin.installation.cluster).into_iter().filter(|trap| trap.starts_with("event trigger"));
    (adopted, events.filter(|trap| !trap.contains("user=app")).collect())
}

#[tokio::test]
async fn where_an_event_triggers_function_is_somebody_elses_nothing_is_done() {
    let (adopted, events) = event_triggers_of_others(Cluster::build()).await;
    if std::env::var("PGLOBBY_TEST_POSTGRES").is_err() {
        let refused = adopted.expect_err("refused").to_string();
        assert!(refused.contains("watching (function of app)"), "{refused}");
    }
    assert_eq!(events, [""; 0]);
}

#[tokio::test]
async fn where_event_triggers_can_be_left_out_they_are_on_18() {
    let (adopted, events) = event_triggers_of_others(Cluster::postgres_18()).await;
    adopted.unwrap();
    assert_eq!(events, [""; 0]);
}

/// Found by trying, before anybody waits: the administrator makes an extension, and nothing else in the tenant's place.
#[tokio::test]
async fn what_the_tenants_role_cannot_make_is_told_before_clients_are_held() {
    let admin = Admin::new().await;
    let west = west(Cluster::build(), &admin.superuser("central").await, "master", "").await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let inside = admin.superuser("acme").await;
    inside.run("CREATE FUNCTION public.raw() RETURNS int LANGUAGE internal AS 'pg_backend_pid'").await;
    inside.leave().await;
    let steps = Arc::new(Steps::default());
    let mut operator = admin.another_actor();
    operator.progress = Some(steps.clone());

    let refused = move_to_west(&operator).await.expect_err("a superuser's").to_string();

    assert!(refused.contains("permission denied for language internal"), "{refused}");
    assert!(refused.contains("stays where it is"), "{refused}");
    assert!(!steps.all().contains(&"fenced".to_owned()), "{:?}", steps.all());
    assert_eq!(
        west.client("postgres").await.ask("SELECT count(*) FROM pg_roles WHERE rolname ~ 'acme'").await,
        "0"
    );
}

/// Before anything of the tenant's is there, the administrator makes the extensions that the tenant's role cannot.
#[tokio::test]
async fn extensions_that_take_a_superuser_are_made_in_the_empty_database() {
    let admin = Admin::new().await;
    let west = west(Cluster::build(), &admin.superuser("central").await, "master", "").await;
    let made = create(&admin.actor, &tenant("acme")).await.unwrap();
    let superuser = admin.superuser("acme").await;
    superuser.run("CREATE SCHEMA \"ext's\"; CREATE EXTENSION dblink SCHEMA \"ext's\"; CREATE EXTENSION postgres_fdw").await;
    superuser.run("GRANT USAGE ON FOREIGN DATA WRAPPER postgres_fdw TO acme_rw").await;
    superuser.leave().await;
    let own = admin.login(&made.username, "acme").await.unwrap();
    own.run("CREATE EXTENSION hstore; CREATE TABLE t (a hstore); INSERT INTO t VALUES ('a=>1')").await;
    own.run("CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw; CREATE FOREIGN TABLE f (a int) SERVER far")
        .await;
    own.leave().await;

    move_to_west(&admin.actor).await.unwrap();

    let inside = west.client("acme").await;
    let extensions = "SELECT string_agg(extname || ' ' || nspname || ' ' || extowner::regrole, ', ' ORDER BY extname)
                      FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname <> 'plpgsql'";
    assert_eq!(
        inside.ask(extensions).await,
        "dblink ext's master, hstore public acme_rw, postgres_fdw public master"
    );
    assert_eq!(inside.ask("SELECT a -> 'a' FROM t").await, "1");
    assert_eq!(
        inside.ask("SELECT nspowner::regrole FROM pg_namespace WHERE nspname = 'ext''s'").await,
        "acme_rw"
    );
}

/// A tenant's whole life takes CREATEDB and CREATEROLE, and nothing more, on both hosts.
#[tokio::test]
async fn a_master_that_is_no_superuser_leads_a_tenant_through_its_life() {
    let admin = Admin::on(Cluster::build(), Master::Createrole).await;
    let west =
        west(Cluster::build(), &admin.superuser("central").await, "onboarder", "CREATEDB CREATEROLE").await;
    hostile_acme(&admin).await;

    let refused = move_to_west(&admin.actor).await.expect_err("policies").to_string();
    assert!(refused.contains("policies of table public.guarded bind its owner, too"), "{refused}");
    let unforced = "BEGIN READ WRITE; ALTER TABLE public.guarded NO FORCE ROW LEVEL SECURITY; COMMIT";
    assert!(asked(&admin, unforced).await);
    create(&admin.actor, &CreateTenant { template: Some("acme".into()), ..tenant("globex") }).await.unwrap();
    drop_tenant(&admin.actor, "globex", DropDatabase::IfOurs, None).await.unwrap();
    let moved = move_to_west(&admin.actor).await.unwrap();
    assert_eq!(moved.copied_by, "dump");
    rotate(&admin.actor, "acme").await.unwrap();
    rename(&admin.actor, "acme", "acme2").await.unwrap();
    let report = examine(&admin.actor, &["acme2".to_owned()], true).await.unwrap();
    assert!(report.findings.iter().all(|finding| finding.tenant.is_none()), "{:#?}", report.findings);
    assert_harmless(&west, &OURS, "a life").await;
    assert_harmless(&admin.installation.cluster, &OURS, "a life").await;
    drop_tenant(&admin.actor, "acme2", DropDatabase::IfOurs, None).await.unwrap();
    assert_eq!(
        west.client("postgres").await.ask("SELECT count(*) FROM pg_roles WHERE rolname ~ 'acme'").await,
        "0"
    );
}
