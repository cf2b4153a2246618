//! `pglobby doctor`: a house in order is called so, and every planted violation is found, named, and mended where that
//! is safe.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use pglobby::control_path::{
    admin::tenants,
    doctor::{Finding, examine},
    onboarding::{
        adopt::{AdoptTenant, adopt},
        create::{CreateTenant, create},
        rotate::rotate,
    },
    secrets::key_rotation,
};
use serde_json::Value;
use support::{
    Cluster,
    admin::{Admin, Master, StopAfter, tenant},
    client::in_time,
    installation::Installation,
};

async fn findings(admin: &Admin) -> Vec<Finding> {
    examine(&admin.actor, &[], false).await.unwrap().findings
}

async fn assert_in_order(admin: &Admin, when: &str) {
    let report = examine(&admin.actor, &[], false).await.unwrap();
    assert!(report.ok && report.findings.is_empty(), "{when}: {:#?}", report.findings);
}

/// By default everybody may make large objects, and an adopted database is not only the tenant's: so much is told in a house
/// that is in order otherwise.
const LARGE_OBJECTS: &str = "reader_makes_large_objects";

/// Tenants acme and globex, one adopted, one with odd letters, one suspended.
async fn ordinary_house(master: Master) -> Admin {
    let admin = Admin::on(Cluster::build(), master).await;
    for name in ["acme", "globex", r#"a"b'c.d"#] {
        create(&admin.actor, &tenant(name)).await.unwrap();
    }
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE old_owner").await;
    if master == Master::Createrole {
        superuser.run("GRANT old_owner TO modest WITH ADMIN OPTION").await;
    }
    superuser.run("CREATE DATABASE initech OWNER old_owner").await;
    admin.superuser("initech").await.run("CREATE TABLE t (a int); ALTER TABLE t OWNER TO old_owner").await;
    let wanted = AdoptTenant { name: "initech".to_owned(), ..AdoptTenant::default() };
    adopt(&admin.actor, &wanted).await.unwrap();
    tenants::suspend(&admin.actor, "globex", None, tenants::SuspendSessions::EndNow).await.unwrap();
    admin
}

#[tokio::test]
async fn a_house_in_order_is_called_so() {
    for master in [Master::Superuser, Master::Createrole] {
        let admin = ordinary_house(master).await;

        let report = examine(&admin.actor, &[], false).await.unwrap();

        let (large_objects, others): (Vec<_>, Vec<_>) =
            report.findings.iter().partition(|finding| finding.check == LARGE_OBJECTS);
        assert!(others.is_empty(), "{master:?}: {others:#?}");
        let told: Vec<_> = large_objects.iter().filter_map(|finding| finding.tenant.as_deref()).collect();
        match master {
            Master::Superuser => assert_eq!(told, ["initech"]),
            Master::Createrole => assert!(told.is_empty(), "no role there can mend it"),
        }
        assert_eq!((report.tenants, report.hosts), (4, 1));
    }
}

/// Database and statement of the superuser; what must be found, of whom; whether --fix mends it; what mends it otherwise.
struct Planted {
    database: &'static str,
    sql: &'static str,
    check: &'static str,
    says: &'static str,
    undo: Option<&'static str>,
}

const fn fixed(
    database: &'static str,
    sql: &'static str,
    check: &'static str,
    says: &'static str,
) -> Planted {
    Planted { database, sql, check, says, undo: None }
}

const fn left(
    database: &'static str,
    sql: &'static str,
    check: &'static str,
    says: &'static str,
    undo: &'static str,
) -> Planted {
    Planted { database, sql, check, says, undo: Some(undo) }
}

const VIOLATIONS: &[Planted] = &[
    fixed("postgres", "GRANT CONNECT ON DATABASE acme TO PUBLIC", "database_open", "CONNECT"),
    fixed("postgres", "GRANT TEMP ON DATABASE acme TO PUBLIC", "database_open", "TEMPORARY"),
    fixed("postgres", "GRANT CONNECT ON DATABASE central TO PUBLIC", "central_open", "central"),
    fixed("central", "GRANT USAGE ON SCHEMA pglobby TO PUBLIC", "central_open", "schema pglobby"),
    fixed("postgres", "GRANT CONNECT ON DATABASE central TO acme_rw", "foreign_grant", "acme_rw"),
    fixed("postgres", "GRANT CONNECT ON DATABASE globex TO acme_ro", "foreign_grant", "globex"),
    fixed("postgres", "ALTER ROLE acme_rw SUPERUSER", "role_power", "SUPERUSER"),
    fixed("postgres", "ALTER ROLE acme_rw BYPASSRLS CREATEDB", "role_power", "CREATEDB, BYPASSRLS"),
    fixed("postgres", "ALTER ROLE acme_ro CREATEROLE REPLICATION", "role_power", "CREATEROLE, REPLICATION"),
    fixed("postgres", "GRANT pg_read_all_data TO acme_ro", "role_membership", "pg_read_all_data"),
    fixed("postgres", "GRANT globex_rw TO acme_rw", "role_membership", "globex_rw"),
    fixed("postgres", "GRANT acme_rw TO acme_ro", "role_membership", "acme_rw"),
    left(
        "postgres",
        "CREATE ROLE ladder; GRANT pg_write_server_files TO ladder; GRANT ladder TO acme_rw",
        "role_membership",
        "ladder",
        "DROP ROLE IF EXISTS ladder",
    ),
    left(
        "central",
        "CREATE SCHEMA theirs AUTHORIZATION acme_rw",
        "owns_elsewhere",
        "central",
        "DROP SCHEMA theirs",
    ),
    left(
        "postgres",
        "CREATE DATABASE extra OWNER acme_rw",
        "owns_elsewhere",
        "database extra",
        "DROP DATABASE extra",
    ),
    left(
        "globex",
        "CREATE TABLE lent (a int); GRANT SELECT ON lent TO acme_ro",
        "foreign_grant",
        "1 objects in database globex",
        "DROP TABLE lent",
    ),
    left(
        "acme",
        "CREATE TABLE r (a int); ALTER TABLE r OWNER TO acme_ro",
        "reader_owns",
        "acme_ro",
        "DROP TABLE r",
    ),
    left(
        "acme",
        "CREATE TABLE w (a int); GRANT INSERT ON w TO PUBLIC",
        "reader_writes",
        "may write to public.w",
        "DROP TABLE w",
    ),
    left(
        "acme",
        "GRANT CREATE ON SCHEMA public TO PUBLIC",
        "reader_writes",
        "schema public",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    ),
    fixed("template1", "GRANT CREATE ON SCHEMA public TO PUBLIC", "template_unclean", "template1"),
    fixed("postgres", "ALTER DATABASE central IS_TEMPLATE true", "template_unclean", "central"),
    left(
        "template1",
        "CREATE TABLE forgotten (a int)",
        "template_unclean",
        "public.forgotten",
        "DROP TABLE forgotten",
    ),
    fixed(
        "postgres",
        "ALTER ROLE acme_rw PASSWORD 'somebody else knows it'",
        "login_fails",
        "password authentication",
    ),
    left(
        "postgres",
        "ALTER DATABASE acme RENAME TO moved_by_hand",
        "database_missing",
        "acme",
        "ALTER DATABASE moved_by_hand RENAME TO acme",
    ),
    left(
        "postgres",
        "ALTER ROLE acme_ro RENAME TO gone",
        "role_missing",
        "acme_ro",
        "ALTER ROLE gone RENAME TO acme_ro",
    ),
];

/// What a tenant's code can do to its own roles and its database.
const CHANGED_BEHIND_OUR_BACK: &[Planted] = &[
    fixed("postgres", "ALTER ROLE acme_ro NOLOGIN", "role_changed", "may not log in"),
    fixed("postgres", "ALTER ROLE acme_rw CONNECTION LIMIT 0", "role_changed", "no more than 0 connections"),
    fixed("postgres", "ALTER ROLE acme_rw VALID UNTIL '2020-01-01'", "role_changed", "a password that ends"),
    fixed(
        "postgres",
        "ALTER ROLE acme_rw SET local_preload_libraries = 'nosuch'",
        "role_settings",
        "acme_rw",
    ),
    fixed(
        "acme",
        "ALTER ROLE acme_ro IN DATABASE acme SET statement_timeout = 1",
        "role_settings",
        "acme_ro",
    ),
    fixed("acme", "ALTER ROLE acme_ro RESET ALL", "role_settings", "not read-only by default"),
    fixed("postgres", "ALTER DATABASE acme CONNECTION LIMIT 0", "database_changed", "takes no connections"),
    fixed("postgres", "ALTER DATABASE acme CONNECTION LIMIT 3", "database_changed", "no more than 3"),
    fixed("postgres", "ALTER DATABASE acme IS_TEMPLATE true", "database_changed", "is a template"),
    fixed(
        "postgres",
        "ALTER DATABASE acme ALLOW_CONNECTIONS false",
        "database_changed",
        "takes no connections",
    ),
    fixed("postgres", "ALTER DATABASE acme SET role = 'acme_ro'", "database_changed", "sets role"),
    fixed("acme", "GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC", LARGE_OBJECTS, "lo_create"),
    fixed("acme", "DROP OWNED BY acme_ro", "database_changed", "acme_ro may not connect"),
    fixed(
        "acme",
        "SET ROLE acme_rw; DROP OWNED BY CURRENT_USER; CREATE TABLE public.after_reset (id serial)",
        "reader_misses",
        "table public.after_reset",
    ),
    // A migration by hand, as the administrator.
    fixed("acme", "CREATE TABLE by_hand (id serial)", "not_given", "public.by_hand of role master"),
    // As an earlier pglobby made them.
    fixed(
        "acme",
        "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO acme_ro; ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO acme_rw",
        "default_privileges",
        "master",
    ),
    left(
        "acme",
        "REVOKE EXECUTE ON FUNCTION pg_lock_status() FROM PUBLIC",
        "catalogs_hidden",
        "may not read pg_lock_status",
        "GRANT EXECUTE ON FUNCTION pg_lock_status() TO PUBLIC",
    ),
    left(
        "acme",
        "CREATE TABLE w (a int); GRANT UPDATE (a) ON w TO acme_ro",
        "reader_writes",
        "may write to public.w",
        "DROP TABLE w",
    ),
    left(
        "acme",
        "SELECT lo_create(4711); GRANT UPDATE ON LARGE OBJECT 4711 TO PUBLIC",
        "reader_writes",
        "large object 4711",
        "SELECT lo_unlink(4711)",
    ),
];

#[tokio::test]
async fn every_planted_violation_is_found_and_mended_where_that_is_safe() {
    all_are_found(VIOLATIONS).await;
}

#[tokio::test]
async fn whatever_was_changed_about_a_tenants_roles_is_found_and_mended() {
    all_are_found(CHANGED_BEHIND_OUR_BACK).await;
}

async fn all_are_found(planted: &[Planted]) {
    let admin = Admin::new().await;
    for name in ["acme", "globex"] {
        create(&admin.actor, &tenant(name)).await.unwrap();
    }
    assert_in_order(&admin, "at first").await;
    for Planted { database, sql, check, says, undo } in planted {
        admin.superuser(database).await.run(sql).await;

        let found = findings(&admin).await;

        let hit = found.iter().find(|finding| finding.check == *check && finding.detail.contains(says));
        let hit = hit.unwrap_or_else(|| panic!("{sql}: {found:#?}"));
        assert!(!hit.mend.is_empty(), "{sql}");
        let report = examine(&admin.actor, &[], true).await.unwrap();
        if let Some(undo) = undo {
            admin.superuser(database).await.run(undo).await;
            // A password that was renewed with its role out of reach is renewed again.
            examine(&admin.actor, &[], true).await.unwrap();
        } else {
            assert!(report.ok, "{sql}: {:#?}", report.findings);
            assert!(report.fixed.iter().any(|finding| finding.check == *check), "{sql}: {:#?}", report.fixed);
        }
        assert_in_order(&admin, sql).await;
    }
    let audited = "SELECT count(*) > 7 FROM pglobby.audit_log WHERE action = 'doctor.fix'";
    assert_eq!(admin.superuser("central").await.ask(audited).await, "t");
}

/// What a membership or PUBLIC allows is also tried with the tenant's own password.
#[tokio::test]
async fn doors_are_tried_not_only_looked_at() {
    let admin = Admin::new().await;
    for name in ["acme", "globex"] {
        create(&admin.actor, &tenant(name)).await.unwrap();
    }
    let superuser = admin.superuser("postgres").await;
    superuser.run("GRANT CONNECT ON DATABASE central, globex TO acme_rw").await;

    let found = findings(&admin).await;

    for (check, database) in [("enters_central", "central"), ("enters_neighbour", "globex")] {
        let hit = found.iter().find(|finding| finding.check == check).expect(check);
        assert!(hit.detail.contains("acme_rw") && hit.detail.contains(database), "{hit:?}");
        assert_eq!(hit.tenant.as_deref(), Some("acme"));
    }
}

#[tokio::test]
async fn a_credential_from_another_row_is_found_and_not_mended_unasked() {
    let admin = Admin::new().await;
    for name in ["acme", "globex"] {
        create(&admin.actor, &tenant(name)).await.unwrap();
    }
    let swap = "UPDATE pglobby.tenants SET sealed_password = (SELECT sealed_password FROM pglobby.tenants WHERE name = 'globex')
                WHERE name = 'acme'";
    admin.superuser("central").await.run(swap).await;

    let report = examine(&admin.actor, &[], true).await.unwrap();

    assert_eq!(report.findings.len(), 1, "{:#?}", report.findings);
    let finding = &report.findings[0];
    assert_eq!((finding.check.as_str(), finding.tenant.as_deref()), ("credential_sealed", Some("acme")));
    assert!(finding.detail.contains("sealed for another row") && finding.mend.contains("tenant rotate acme"));
    rotate(&admin.actor, "acme").await.unwrap();
    assert_in_order(&admin, "rotated").await;
}

/// The lock of the dead goes when its server notices.
async fn found_when_the_dead_are_noticed(admin: &Admin) -> Vec<Finding> {
    loop {
        let mut found = examine(&admin.another_actor(), &[], false).await.unwrap().findings;
        found.retain(|finding| finding.check != LARGE_OBJECTS);
        if !found.is_empty() {
            break found;
        }
    }
}

#[tokio::test]
async fn work_that_died_is_found_and_work_under_way_is_not() {
    let admin = Admin::new().await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let mut dying = admin.another_actor();
    let killer = StopAfter::step("granted");
    dying.progress = Some(killer.clone());
    let looking = async {
        killer.clone().kill(async { drop(create(&dying, &tenant("globex")).await) }).await;
    };
    looking.await;

    let found = in_time("the finding", found_when_the_dead_are_noticed(&admin)).await;

    assert_eq!(found.len(), 1, "{found:#?}");
    let finding = &found[0];
    assert_eq!((finding.check.as_str(), finding.tenant.as_deref()), ("unfinished_operation", Some("globex")));
    assert!(finding.mend.contains("tenant create globex again"), "{}", finding.mend);
    create(&admin.actor, &tenant("globex")).await.unwrap();
    assert_in_order(&admin, "made again").await;
    let busy =
        pglobby::control_path::onboarding::operation::TenantLock::take(&admin.actor, "acme").await.unwrap();
    let begun = "INSERT INTO pglobby.operations (kind, tenant_id) SELECT 'rotate', id FROM pglobby.tenants WHERE name = 'acme'";
    admin.superuser("central").await.run(begun).await;
    assert_in_order(&admin, "somebody is at it").await;
    drop(busy);
}

/// The template that tenants were made from is looked at, too, though nothing marks it as one.
#[tokio::test]
async fn templates_in_use_are_looked_at() {
    let admin = Admin::new().await;
    admin.superuser("postgres").await.run("CREATE DATABASE app_template").await;
    let wanted = CreateTenant { template: Some("app_template".to_owned()), ..tenant("acme") };
    create(&admin.actor, &wanted).await.unwrap();
    assert_in_order(&admin, "clean").await;
    admin
        .superuser("app_template")
        .await
        .run("CREATE SCHEMA open; GRANT CREATE ON SCHEMA open TO PUBLIC")
        .await;

    let found = findings(&admin).await;

    assert!(found.iter().any(|finding| finding.detail.contains("app_template")), "{found:#?}");
}

#[tokio::test]
async fn the_command_says_how_to_mend_and_exits_with_1_until_it_is() {
    let installation = Installation::initialised().await;
    for name in ["acme", "globex"] {
        assert!(installation.run(&["tenant", "create", name]).status.success());
    }
    assert!(installation.run(&["doctor"]).status.success());
    installation.cluster.client("postgres").await.run("GRANT CONNECT ON DATABASE acme TO PUBLIC").await;

    let found = installation.run(&["doctor"]);
    let json = installation.run(&["doctor", "--json"]);
    let spared = installation.run(&["doctor", "--tenants", "globex", "--json"]);
    let unknown = installation.run(&["doctor", "--tenants", "acne"]);
    let mended = installation.run(&["doctor", "--fix"]);

    assert_eq!(found.status.code(), Some(1));
    let words = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(words.contains("fix: REVOKE ALL ON DATABASE acme FROM PUBLIC"), "{words}");
    assert!(String::from_utf8_lossy(&found.stderr).contains("--fix"));
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (&report["ok"], &report["findings"][0]["check"]),
        (&Value::Bool(false), &"database_open".into())
    );
    assert_eq!((json.status.code(), &report["findings"][0]["fixable"]), (Some(1), &Value::Bool(true)));
    let report: Value = serde_json::from_slice(&spared.stdout).unwrap();
    let checks: Vec<&Value> =
        report["findings"].as_array().unwrap().iter().map(|each| &each["check"]).collect();
    assert_eq!(checks, ["enters_neighbour", "enters_neighbour"], "both of globex's roles get into acme");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("did you mean \"acme\"?"));
    assert!(mended.status.success());
    assert!(String::from_utf8_lossy(&mended.stdout).contains("no findings"));
}

/// Its record has no tenant, and so it was never named.
#[tokio::test]
async fn a_rotation_of_keys_that_died_is_named_with_what_finishes_it() {
    let admin = ordinary_house(Master::Superuser).await;
    let config = admin.installation.config("");
    let mut dying = admin.another_actor();
    let killer = StopAfter::step("credentials");
    dying.progress = Some(killer.clone());
    killer.kill(async { drop(key_rotation::rotate(&dying, &config, true).await) }).await;
    drop(dying);

    let found = in_time("the finding", found_when_the_dead_are_noticed(&admin)).await;

    assert_eq!((found.len(), found[0].check.as_str()), (1, "unfinished_operation"), "{found:#?}");
    assert!(found[0].mend.contains("pglobby key rotate"), "{found:#?}");
    let admin_now = admin.another_actor();
    key_rotation::rotate(&admin_now, &config, true).await.unwrap();
    let left = examine(&admin.another_actor(), &[], false).await.unwrap().findings;
    assert!(left.iter().all(|finding| finding.check == LARGE_OBJECTS), "{left:#?}");
}
