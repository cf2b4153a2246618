//! Databases that were not made empty: cloned from a template, or adopted with everything in them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use pglobby::control_path::{
    admin::{actor::AdminError, tenants},
    doctor::examine,
    onboarding::{
        adopt::{AdoptTenant, adopt, complete_grants},
        create::{CreateTenant, create},
        drop::{DropDatabase, drop_tenant},
        ownership::Ownership,
        rotate::rotate,
    },
};
use support::{
    Client, Cluster, Proxy,
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
    // Since 16 an administrator that is no superuser needs more than a membership of its own to grant one.
    let acts_as_owner = !made.member_of.clone().unwrap().is_empty();
    assert_eq!(acts_as_owner, made.notes.unwrap().is_empty());
    match acts_as_owner {
        true => assert_eq!(made.member_of.unwrap(), ["app", "batch"]),
        false => {
            assert_eq!(sqlstate(&own.try_run("SELECT * FROM invoices").await.expect_err("pending")), "42501");
        }
    }

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
    if acts_as_owner {
        own.run("ALTER TABLE invoices ADD note text; CREATE INDEX ON invoices (note); DROP TABLE later_app")
            .await;
        own.run("SET ROLE app; CREATE TABLE later_app (id serial); RESET ROLE").await;
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
    old.run("CREATE VIEW of_masters AS SELECT 1 AS a; ALTER DATABASE acme_production SET role = app").await;
    let owners = owners(&old).await;
    let settings = "SELECT setconfig::text FROM pg_db_role_setting WHERE setdatabase <> 0";
    let set = old.ask(settings).await;
    for ownership in [None, Some(Ownership::Transfer)] {
        let wanted = AdoptTenant { ownership, ..adopt_acme() };
        for step in ["begun", "roles", "closed", "owned", "verified"] {
            let mut dying = admin.another_actor();
            let killer = StopAfter::step(step);
            dying.progress = Some(killer.clone());
            killer.kill(async { drop(adopt(&dying, &wanted).await) }).await;

            drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await.unwrap();

            let after = admin.remains().await;
            assert_eq!(in_any_order(&after), in_any_order(&before), "killed after {step}");
            assert_eq!(self::owners(&old).await, owners, "killed after {step}");
            assert_eq!(old.ask(settings).await, set, "killed after {step}");
        }
    }
    let made = adopt(&admin.actor, &adopt_acme()).await.unwrap();
    assert!(made.notes.unwrap().join("").contains("ALTER DATABASE acme_production SET role TO 'app'"));
}

/// Tables, sequences, views and schemas with their owners.
async fn owners(inside: &Client) -> String {
    inside
        .ask(
            "SELECT string_agg(what, ', ' ORDER BY what) FROM (
                SELECT format('%s %s', oid::regclass, relowner::regrole) FROM pg_class
                WHERE oid >= 16384 AND relkind IN ('r', 'v', 'S')
                UNION ALL SELECT format('%s %s', nspname, nspowner::regrole) FROM pg_namespace WHERE nspname !~ '^pg_') AS o (what)",
        )
        .await
}

fn adoption_of(name: &str, database: &str) -> AdoptTenant {
    AdoptTenant { name: name.to_owned(), database: Some(database.to_owned()), ..AdoptTenant::default() }
}

async fn doctor(admin: &Admin) -> Vec<(String, String)> {
    let findings = examine(&admin.actor, &[], false).await.unwrap().findings;
    let told = findings.into_iter().filter(|finding| finding.check != "reader_makes_large_objects");
    told.map(|finding| (finding.check, finding.detail)).collect()
}

async fn complete(admin: &Admin) {
    let ids = admin
        .superuser("central")
        .await
        .ask_all("SELECT id::text FROM pglobby.tenants WHERE grants_pending")
        .await;
    for id in ids.into_iter().flatten().flatten() {
        complete_grants(&admin.actor, id.parse().unwrap()).await.unwrap();
    }
}

/// Of a superuser, as databases often are: no role is made a member of that.
#[tokio::test]
async fn a_superusers_database_is_given_to_its_tenant_where_that_is_asked() {
    let admin = Admin::new().await;
    admin.superuser("postgres").await.run("CREATE DATABASE shop").await;
    let inside = admin.superuser("shop").await;
    inside.run("CREATE TABLE items (id serial PRIMARY KEY, name text); CREATE SCHEMA old CREATE TABLE logs (a int)").await;
    inside
        .run(
            "CREATE FUNCTION two() RETURNS int LANGUAGE sql AS 'SELECT 2'; CREATE TYPE mood AS ENUM ('good')",
        )
        .await;
    let before = owners(&inside).await;

    let kept = adopt(&admin.actor, &adoption_of("shop", "shop")).await.unwrap();

    assert_eq!((kept.member_of.unwrap(), kept.transferred), (vec![], Some(0)));
    let notes = kept.notes.unwrap().join("");
    assert!(
        notes.contains("\"master\"")
            && notes.contains("administrator")
            && notes.contains("--ownership transfer"),
        "{notes}"
    );
    assert_eq!(owners(&inside).await, before);
    complete(&admin).await;
    let own = admin.login("shop_rw", "shop").await.unwrap();
    own.run("INSERT INTO items (name) VALUES ('a')").await;
    assert_eq!(
        sqlstate(&own.try_run("ALTER TABLE items ADD b int").await.expect_err("not the owner")),
        "42501"
    );
    own.leave().await;
    rotate(&admin.actor, "shop").await.unwrap();
    let [(check, detail)] = &doctor(&admin).await[..] else { panic!("one finding") };
    assert!(check == "not_owned" && detail.contains("2 tables of role master"), "{check}: {detail}");
    drop_tenant(&admin.actor, "shop", DropDatabase::IfOurs, None).await.unwrap();

    let asked = AdoptTenant { ownership: Some(Ownership::Transfer), ..adoption_of("shop", "shop") };
    let made = adopt(&admin.actor, &asked).await.unwrap();

    // Two tables, a schema, public, a function, a type; the sequence follows its table.
    assert_eq!((made.transferred, made.notes.unwrap()), (Some(6), vec![]));
    assert_eq!(made.ro_username.as_deref(), Some("shop_ro"));
    complete(&admin).await;
    let own = admin.login("shop_rw", "shop").await.unwrap();
    own.run("ALTER TABLE items ADD b int; DROP TABLE old.logs; ALTER TYPE mood ADD VALUE 'bad'").await;
    own.run("DROP SCHEMA old CASCADE; CREATE SCHEMA fresh CREATE TABLE t (a int)").await;
    let reading = admin.login("shop_ro", "shop").await.unwrap();
    reading.run("SELECT * FROM items; SELECT * FROM fresh.t").await;
    own.leave().await;
    rotate(&admin.actor, "shop").await.unwrap();
    assert_eq!(doctor(&admin).await, []);
    assert_eq!(
        inside.ask("SELECT count(*) FROM pg_default_acl WHERE defaclrole = 'master'::regrole").await,
        "0"
    );

    // The database is not the tenant's, whatever is in it.
    drop_tenant(&admin.actor, "shop", DropDatabase::IfOurs, None).await.unwrap();
    assert_eq!(inside.ask("SELECT count(*) FROM items").await, "1");
}

#[tokio::test]
async fn rows_only_is_a_choice_and_the_doctor_respects_it() {
    let admin = Admin::new().await;
    old_database(&admin, Master::Superuser).await;
    let wanted = AdoptTenant { ownership: Some(Ownership::None), ..adopt_acme() };
    let made = adopt(&admin.actor, &wanted).await.unwrap();
    assert_eq!(made.member_of.unwrap(), Vec::<String>::new());
    assert!(made.notes.unwrap().join("").contains("belong to role \"app\""));
    complete(&admin).await;
    let own = admin.login(&made.username, "acme_production").await.unwrap();
    own.run("INSERT INTO invoices (amount) VALUES (7)").await;
    assert_eq!(sqlstate(&own.try_run("DROP TABLE invoices").await.expect_err("rows only")), "42501");
    own.leave().await;
    rotate(&admin.actor, "acme").await.unwrap();
    assert_eq!(doctor(&admin).await, []);
}

/// The application connects as it always did.
#[tokio::test]
async fn an_applications_own_role_becomes_its_tenants_and_outlives_it() {
    let admin = Admin::new().await;
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE app; CREATE ROLE web LOGIN PASSWORD 'as ever'").await;
    superuser
        .run("CREATE DATABASE shop OWNER app")
        .await
        .run("ALTER ROLE web SET search_path = old, public")
        .await;
    let inside = admin.superuser("shop").await;
    inside.run("SET ROLE app; CREATE SCHEMA old CREATE TABLE logs (a int); CREATE TABLE items (a int)").await;
    let as_ever = || async {
        let mut config = admin.installation.cluster.config("shop");
        config.user("web").password("as ever");
        Client::connect(&config).await
    };
    let wanted = AdoptTenant {
        username: Some("web".to_owned()),
        password: Some("as ever".to_owned().into()),
        ..adoption_of("shop", "shop")
    };

    let made = adopt(&admin.actor, &wanted).await.unwrap();

    assert_eq!((made.username.as_str(), made.ro_username.as_deref()), ("web", Some("shop_ro")));
    assert_eq!(made.member_of.unwrap(), ["app"]);
    complete(&admin).await;
    let own = as_ever().await.unwrap();
    own.run("ALTER TABLE items ADD b int; INSERT INTO logs VALUES (1); CREATE TABLE ours (a int)").await;
    own.leave().await;
    let settings = "SELECT setconfig::text FROM pg_db_role_setting WHERE setrole = 'web'::regrole";
    let before = superuser.ask(settings).await;
    assert_eq!(doctor(&admin).await, []);
    admin.login("shop_ro", "shop").await.unwrap().run("SELECT * FROM items; SELECT * FROM old.ours").await;
    tenants::suspend(&admin.actor, "shop", None, tenants::SuspendSessions::EndNow).await.unwrap();
    as_ever().await.unwrap().leave().await;
    tenants::resume(&admin.actor, "shop").await.unwrap();
    rotate(&admin.actor, "shop").await.unwrap();
    assert_eq!(sqlstate(&as_ever().await.err().expect("another password")), "28P01");
    assert_eq!(superuser.ask(settings).await, before);
    assert_eq!(doctor(&admin).await, []);

    drop_tenant(&admin.actor, "shop", DropDatabase::IfOurs, None).await.unwrap();

    let own = admin.login("web", "shop").await.unwrap();
    assert_eq!(own.ask("SELECT count(*) FROM logs").await, "1");
    assert_eq!(
        superuser.ask("SELECT count(*) FROM pg_auth_members WHERE member = 'web'::regrole").await,
        "0"
    );
    assert_eq!(superuser.ask("SELECT count(*) FROM pg_roles WHERE rolname ~ '^shop'").await, "0");
}

#[tokio::test]
async fn a_role_that_reaches_further_than_its_database_is_no_tenants() {
    let admin = Admin::new().await;
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE app LOGIN; CREATE ROLE powers LOGIN CREATEROLE; CREATE ROLE child LOGIN; GRANT powers TO child").await;
    superuser.run("CREATE ROLE asleep; CREATE ROLE posing LOGIN; ALTER ROLE posing SET role = asleep; CREATE ROLE reads LOGIN; GRANT pg_read_all_data TO reads").await;
    superuser.run("CREATE DATABASE one OWNER app").await.run("CREATE DATABASE two OWNER app").await;
    superuser.run("GRANT CONNECT ON DATABASE one TO PUBLIC").await;
    admin.superuser("one").await.run("SET ROLE app; CREATE TABLE t (a int)").await;
    create(&admin.actor, &tenant("globex")).await.unwrap();
    let before = admin.remains().await;
    for (role, words) in [
        ("master", "administrator"),
        ("powers", "superuser or may make"),
        ("child", "acts as powers"),
        ("reads", "pg_read_all_data"),
        ("globex_rw", "tenant \"globex\""),
        ("asleep", "may not log in"),
        ("posing", "ALTER ROLE … SET role"),
        ("nobody", "no such role"),
        ("app", "owns database two as well"),
    ] {
        let wanted = AdoptTenant { username: Some(role.to_owned()), ..adoption_of("one", "one") };
        let refused = adopt(&admin.actor, &wanted).await.expect_err(role).to_string();
        assert!(refused.contains(words), "{role}: {refused}");
    }
    let wanted = AdoptTenant { ownership: Some(Ownership::Membership), ..adoption_of("one", "one") };
    let refused = adopt(&admin.actor, &wanted).await.expect_err("asked for").to_string();
    assert!(refused.contains("owns database two as well"), "{refused}");
    assert_eq!(in_any_order(&admin.remains().await), in_any_order(&before));
    let made = adopt(&admin.actor, &adoption_of("one", "one")).await.unwrap();
    assert_eq!(made.member_of.unwrap(), Vec::<String>::new());
    assert!(made.notes.unwrap().join("").contains("owns database two as well"));

    // A membership that somebody else granted would let one tenant into the other's database.
    superuser.run("GRANT app TO one_rw").await;
    let refused = adopt(&admin.actor, &adoption_of("two", "two")).await.expect_err("shared").to_string();
    assert!(refused.contains("one_rw acts as app"), "{refused}");
}

#[tokio::test]
async fn the_command_line_the_api_and_the_console_adopt_alike() {
    let proxy = Proxy::build().start().await;
    let superuser = proxy.cluster.client("postgres").await;
    for name in ["cli", "api", "console"] {
        superuser.run(&format!("CREATE ROLE {name}_app LOGIN PASSWORD 'pw'")).await;
        superuser.run(&format!("CREATE DATABASE {name}")).await;
        proxy.cluster.client(name).await.run("CREATE TABLE t (a int)").await;
    }
    let options = ["--username", "cli_app", "--password-stdin", "--ownership", "transfer"];
    let command = [&["tenant", "adopt", "cli"][..], &options].concat();
    let output = proxy.command_with(&command, "pw\n");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("role cli_app") && said.contains("owner of 2 objects"), "{said}{output:?}");
    let body = serde_json::json!({
        "name": "api", "adopt": true, "username": "api_app", "password": "pw", "ownership": "transfer"
    });
    let made = proxy.api("operator").post("/v1/tenants?wait=60s", body).await.with(201);
    assert_eq!((&made["username"], &made["transferred"]), (&"api_app".into(), &2.into()), "{made}");
    assert_eq!(made.get("password"), None);
    let console = proxy.console().await;
    let adopt = "ADOPT TENANT console USERNAME console_app OWNERSHIP TRANSFER PASSWORD 'pw'";
    console.run(adopt).await;

    for name in ["cli", "api", "console"] {
        let shown = proxy.json(&["tenant", "show", name, "--json"]);
        assert_eq!(shown["username"], format!("{name}_app"));
        proxy.create_login(&format!("{name}_login"), "known", &["--tenant", name]);
        let client = proxy.caller(&format!("{name}_login"), "known", name).connect().await;
        client.run("ALTER TABLE t ADD b int").await;
    }
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
