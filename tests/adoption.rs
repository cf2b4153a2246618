//! Databases that were not made empty: cloned from a template, or adopted with everything in them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use pglobby::control_path::{
    admin::{actor::AdminError, tenants},
    onboarding::{
        adopt::{AdoptTenant, adopt, complete_grants},
        create::{CreateTenant, create},
        drop::{DropDatabase, drop_tenant},
    },
};
use support::{
    Client, Cluster,
    admin::{Admin, Master, StopAfter, tenant},
    client::sqlstate,
};

/// One of everything that has an owner and that an application may have in its template.
const ONE_OF_EVERYTHING: &str = r#"
    CREATE SCHEMA "App's";
    CREATE TABLE customers (id serial PRIMARY KEY, other int GENERATED ALWAYS AS IDENTITY, name text);
    CREATE TABLE "App's".orders (at date) PARTITION BY RANGE (at);
    CREATE TABLE "App's".orders_1 PARTITION OF "App's".orders FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
    CREATE VIEW names AS SELECT name FROM customers;
    CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM customers;
    CREATE SEQUENCE free_standing;
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TYPE pair AS (a int, b int);
    CREATE TYPE span AS RANGE (subtype = int);
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql AS 'SELECT $1 * 2';
    CREATE PROCEDURE nothing() LANGUAGE sql AS 'SELECT 1';
    CREATE AGGREGATE total (int) (SFUNC = int4pl, STYPE = int, INITCOND = '0');
    CREATE OPERATOR ### (LEFTARG = int, RIGHTARG = int, FUNCTION = int4pl);
    CREATE COLLATION sorted (LOCALE = 'C');
    CREATE TEXT SEARCH DICTIONARY words (TEMPLATE = simple);
    CREATE TEXT SEARCH CONFIGURATION plain (COPY = simple);
    CREATE STATISTICS estimated ON id, name FROM customers;
    CREATE PUBLICATION published FOR TABLE customers;
    SELECT lo_create(4711);
    INSERT INTO customers (name) VALUES ('ann');
"#;

/// What only a superuser may make.
const ONE_OF_A_SUPERUSERS: &str = "
    CREATE OPERATOR FAMILY family USING btree;
    CREATE OPERATOR CLASS class FOR TYPE int USING btree AS OPERATOR 1 <, FUNCTION 1 btint4cmp(int, int);
    CREATE FOREIGN DATA WRAPPER wrapper; CREATE SERVER server FOREIGN DATA WRAPPER wrapper";

/// Whatever in this database belongs to somebody other than `owner` or the bootstrap superuser.
async fn foreign_owned(client: &Client, owner: &str) -> String {
    let sql = format!(
        "SELECT coalesce(string_agg(pg_describe_object(classid, objid, 0), ', '), '') FROM pg_shdepend
         WHERE deptype = 'o' AND classid <> 'pg_default_acl'::regclass AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND pg_get_userbyid(refobjid) <> '{owner}'"
    );
    client.ask(&sql).await
}

async fn everything_of_a_template(admin: &Admin, template_owner: &str) {
    let superuser = admin.superuser("postgres").await;
    superuser.run(&format!("CREATE DATABASE app_template OWNER {template_owner}; ")).await;
    let template = admin.superuser("app_template").await;
    template.run(&format!("SET ROLE {template_owner}")).await.run(ONE_OF_EVERYTHING).await;
    if template_owner == support::cluster::MASTER {
        template.run(ONE_OF_A_SUPERUSERS).await;
    }
    drop(template);
    let wanted = CreateTenant { template: Some("app_template".to_owned()), ..tenant("acme") };

    let made = create(&admin.actor, &wanted).await.unwrap();

    let inside = admin.superuser("acme").await;
    assert_eq!(foreign_owned(&inside, &made.username).await, "");
    // The bootstrap superuser's own are not in pg_shdepend: asked for one by one.
    let bootstrap = "SELECT coalesce(string_agg(relname::text, ' '), '') FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
        WHERE nspname IN ('public', 'App''s') AND relowner = 10";
    assert_eq!(inside.ask(bootstrap).await, "");
    let own = admin.login(&made.username, "acme").await.unwrap();
    own.run("ALTER TABLE customers ADD more int; INSERT INTO customers (name) VALUES ('bob')").await;
    own.run(r#"ALTER TYPE mood ADD VALUE 'so so'; DROP TABLE "App's".orders; DROP STATISTICS estimated"#)
        .await;
    let reader = tenants::show(&admin.actor, "acme").await.unwrap().ro_username.unwrap();
    let reading = admin.login(&reader, "acme").await.unwrap();
    assert_eq!(reading.ask("SELECT count(*) FROM names").await, "2");

    // The template is as it was, and can be used again.
    assert_eq!(foreign_owned(&admin.superuser("app_template").await, template_owner).await, "");
    create(&admin.actor, &CreateTenant { name: "globex".to_owned(), ..wanted }).await.unwrap();
}

#[tokio::test]
async fn everything_of_a_superusers_template_becomes_the_tenants() {
    everything_of_a_template(&Admin::new().await, "master").await;
}

#[tokio::test]
async fn everything_of_the_masters_template_becomes_the_tenants() {
    everything_of_a_template(&Admin::on(Cluster::build(), Master::Createrole).await, "modest").await;
}

#[tokio::test]
async fn everything_of_the_masters_template_becomes_the_tenants_on_18() {
    everything_of_a_template(&Admin::on(Cluster::postgres_18(), Master::Createrole).await, "modest").await;
}

/// As public was before PostgreSQL 15: the superuser's, and everybody may create in it.
#[tokio::test]
async fn a_template_in_which_everybody_may_create_is_refused_where_it_cannot_be_mended() {
    let admin = Admin::on(Cluster::build(), Master::Createrole).await;
    let template = admin.superuser("template1").await;
    template.run("ALTER SCHEMA public OWNER TO master; GRANT CREATE ON SCHEMA public TO PUBLIC").await;
    drop(template);
    let before = admin.remains().await;

    let refused = create(&admin.actor, &tenant("acme")).await.expect_err("writable").to_string();
    assert!(refused.contains("ALTER SCHEMA"), "{refused}");
    assert_eq!(admin.remains().await, before);

    admin.superuser("template1").await.run("ALTER SCHEMA public OWNER TO modest").await;
    let made = create(&admin.actor, &tenant("acme")).await.unwrap();
    admin.login(&made.username, "acme").await.unwrap().run("CREATE TABLE t (a int)").await;
    let reading = admin.login("acme_ro", "acme").await.unwrap();
    reading.run("SET default_transaction_read_only = off").await;
    assert_eq!(sqlstate(&reading.try_run("CREATE TABLE u (a int)").await.expect_err("no")), "42501");
}

/// A database that an application has used for years under a role of its own.
async fn old_database(admin: &Admin, master: Master) -> Client {
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE app LOGIN; CREATE ROLE batch").await;
    if master == Master::Createrole {
        superuser.run("GRANT app, batch TO modest").await;
    }
    superuser.run("CREATE DATABASE acme_production OWNER app").await;
    let inside = admin.superuser("acme_production").await;
    inside.run("SET ROLE app; CREATE TABLE invoices (id serial, amount int); CREATE SCHEMA archive").await;
    inside
        .run("CREATE TABLE archive.old (a int); INSERT INTO invoices (amount) VALUES (100); RESET ROLE")
        .await;
    inside
}

fn adopt_acme() -> AdoptTenant {
    AdoptTenant {
        name: "acme".to_owned(),
        database: Some("acme_production".to_owned()),
        owner: Some("batch".to_owned()),
        ..AdoptTenant::default()
    }
}

async fn adoption(admin: &Admin, master: Master) {
    let old = old_database(admin, master).await;

    let made = adopt(&admin.actor, &adopt_acme()).await.unwrap();
    assert_eq!((made.database.as_str(), made.status.as_str()), ("acme_production", "active"));
    assert_eq!(sqlstate(&admin.login("batch", "acme_production").await.err().expect("closed")), "28000");
    let own = admin.login(&made.username, "acme_production").await.unwrap();
    assert_eq!(sqlstate(&own.try_run("SELECT * FROM invoices").await.expect_err("pending")), "42501");

    // What the makers of the first pool do, several at a time.
    let id: i64 =
        admin.superuser("central").await.ask("SELECT id FROM pglobby.tenants").await.parse().unwrap();
    let (one, two) = (admin.another_actor(), admin.another_actor());
    let (first, second) = tokio::join!(complete_grants(&one, id), complete_grants(&two, id));
    first.unwrap();
    second.unwrap();
    assert!(!tenants::show(&admin.actor, "acme").await.unwrap().grants_pending);

    own.run("INSERT INTO invoices (amount) VALUES (7); DELETE FROM archive.old; CREATE TABLE ours (a int)")
        .await;
    for maker in ["app", "batch"] {
        old.run(&format!("GRANT CREATE ON SCHEMA public TO {maker}; SET ROLE {maker}")).await;
        old.run(&format!("CREATE TABLE later_{maker} (id serial); RESET ROLE")).await;
        own.run(&format!("INSERT INTO later_{maker} DEFAULT VALUES")).await;
    }
    let reading = admin.login("acme_ro", "acme_production").await.unwrap();
    for table in ["invoices", "archive.old", "later_app", "later_batch", "ours"] {
        reading.run(&format!("SELECT * FROM {table}")).await;
    }
    reading.run("SET default_transaction_read_only = off").await;
    for sql in [
        "DELETE FROM invoices",
        "INSERT INTO ours VALUES (1)",
        "CREATE TABLE archive.x (a int)",
        "CREATE TEMP TABLE x (a int)",
    ] {
        assert_eq!(sqlstate(&reading.try_run(sql).await.expect_err(sql)), "42501");
    }

    // The tenant goes; the data stays, what the tenant made included.
    let dropped = drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();
    assert!(!dropped.database_dropped);
    assert!(own.try_run("SELECT 1").await.is_err(), "its sessions have ended");
    let kept = admin.superuser("acme_production").await;
    assert_eq!(kept.ask("SELECT tableowner FROM pg_tables WHERE tablename = 'ours'").await, "app");
    assert_eq!(kept.ask("SELECT count(*) FROM invoices").await, "2");
    assert_eq!(kept.ask("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'acme%'").await, "0");
}

#[tokio::test]
async fn an_adopted_database_is_opened_to_its_tenant_and_outlives_it() {
    adoption(&Admin::new().await, Master::Superuser).await;
}

#[tokio::test]
async fn an_adopted_database_is_opened_by_a_master_that_is_no_superuser() {
    adoption(&Admin::on(Cluster::build(), Master::Createrole).await, Master::Createrole).await;
}

#[tokio::test]
async fn an_adopted_database_is_opened_by_a_master_that_is_no_superuser_on_18() {
    adoption(&Admin::on(Cluster::postgres_18(), Master::Createrole).await, Master::Createrole).await;
}

#[tokio::test]
async fn killed_after_any_step_adopting_gives_back_what_it_took() {
    let admin = Admin::new().await;
    let old = old_database(&admin, Master::Superuser).await;
    old.run("REVOKE TEMP ON DATABASE acme_production FROM PUBLIC").await;
    let before = admin.remains().await;
    for step in ["begun", "roles", "closed", "verified"] {
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        killer.kill(async { drop(adopt(&dying, &adopt_acme()).await) }).await;

        drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();

        let after = admin.remains().await;
        assert_eq!(in_any_order(&after), in_any_order(&before), "killed after {step}");
    }
    adopt(&admin.actor, &adopt_acme()).await.unwrap();
}

/// Privileges given back stand behind the others.
fn in_any_order(remains: &str) -> Vec<String> {
    remains
        .lines()
        .map(|line| {
            let mut letters: Vec<&str> = line.split(['{', '}', ',']).collect();
            letters.sort_unstable();
            letters.join(" ")
        })
        .collect()
}

#[tokio::test]
async fn what_cannot_be_adopted_says_why() {
    let admin = Admin::on(Cluster::build(), Master::Createrole).await;
    old_database(&admin, Master::Createrole).await.run("CREATE TABLE secret (a int)").await;
    admin.superuser("postgres").await.run("CREATE DATABASE theirs").await.run("REVOKE app FROM modest").await;
    let before = admin.remains().await;
    let named = |database: &str| AdoptTenant { database: Some(database.to_owned()), ..adopt_acme() };
    for (wanted, words) in [
        (named("nowhere"), "there is no database"),
        (named("theirs"), "no member of that role"),
        (named("acme_production"), "no member of that role"),
        (named("central"), "central database"),
        (named("template1"), "reserved"),
    ] {
        let refused = adopt(&admin.actor, &wanted).await.expect_err(words).to_string();
        assert!(refused.contains(words), "{refused}");
    }
    admin.superuser("postgres").await.run("GRANT app TO modest").await;
    let refused = adopt(&admin.actor, &adopt_acme()).await.expect_err("a superuser's table").to_string();
    assert!(refused.contains("public.secret of master"), "{refused}");
    admin.superuser("postgres").await.run("REVOKE app FROM modest").await;
    assert_eq!(admin.remains().await, before);
}

#[tokio::test]
async fn two_tenants_never_share_a_database() {
    let admin = Admin::new().await;
    old_database(&admin, Master::Superuser).await;
    adopt(&admin.actor, &adopt_acme()).await.unwrap();
    let wanted = AdoptTenant { name: "globex".to_owned(), ..adopt_acme() };

    let refused = adopt(&admin.actor, &wanted).await.expect_err("taken");

    assert!(matches!(&refused, AdminError::Exists(words) if words.contains("another tenant's")), "{refused}");
}
