//! The life of tenants and logins in SQL, on the console: the same work as the command line's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{Proxy, console::show};

#[tokio::test]
async fn a_tenants_life_in_sql() {
    let proxy = Proxy::build().start().await;
    let console = proxy.console().await;
    console.run("CREATE TENANT acme").await;
    console.run("CREATE LOGIN alice TENANT acme PASSWORD 'it''s secret'").await;
    let mut alice = proxy.caller("alice", "it's secret", "acme").connect().await;
    alice.run("CREATE TABLE t (x int); INSERT INTO t VALUES (7)").await;

    console.run("ALTER TENANT acme SET pool_size = 3, weight = 2, statement_timeout = '30s'").await;
    let tenants = show(&console, "TENANTS").await;
    assert_eq!((tenants[0]["pool_size"].as_str(), tenants[0]["statement_timeout"].as_str()), ("3", "30s"));
    assert_eq!(tenants[0]["weight"], "2");
    console.run("ROTATE TENANT acme").await;
    assert_eq!(alice.ask("SELECT x FROM t").await, "7");
    console.run("SUSPEND TENANT acme REASON 'unpaid'").await;
    let again = proxy.caller("alice", "it's secret", "acme");
    assert_eq!(again.refusal().await, "57P03", "who is answered finds it done");
    alice.closed().await;
    console.run("RESUME TENANT acme").await;
    assert_eq!(again.ask("SELECT x FROM t").await, "7");
    console.run("RENAME TENANT acme TO \"My Shop\"").await;
    assert_eq!(show(&console, "TENANTS").await[0]["name"], "My Shop");
    assert_eq!(console.refusal_of("CREATE TENANT \"My Shop\"").await, "42710");
    assert_eq!(console.refusal_of("ROTATE TENANT acme").await, "42704");
    assert_eq!(console.refusal_of("MOVE TENANT \"My Shop\" TO HOST default").await, "55000");
    console.run("DROP TENANT \"My Shop\"").await;
    assert_eq!(show(&console, "TENANTS").await[0]["status"], "dropped");

    proxy.cluster.create_database("globex", support::cluster::MASTER, "").await;
    console.run("ADOPT TENANT globex; CREATE LOGIN bob TENANT globex PASSWORD 'b'").await;
    assert_eq!(
        proxy.caller("bob", "b", "globex").connect().await.ask("SELECT current_database()").await,
        "globex"
    );
    let central = proxy.cluster.client("central").await;
    let actors = "SELECT string_agg(DISTINCT actor, ' ') FROM pglobby.audit_log WHERE action LIKE 'tenant.%'";
    let actors = central.ask(actors).await;
    assert!(actors.contains("login:console_admin"), "{actors}");
}

#[tokio::test]
async fn a_password_that_is_made_is_shown_once_in_both_protocols_and_logged_in_none() {
    let proxy = Proxy::with_tenant("acme").config("log.level", "\"debug\"").start().await;
    let console = proxy.console().await;
    // Extended: the driver prepares, describes, and is told of a row before there is one.
    let row = console.query_one("CREATE LOGIN bob TENANT acme READ ONLY", &[]).await.unwrap();
    let password: String = row.get("password");
    assert_eq!((row.get::<_, &str>("tenant"), row.get::<_, &str>("access")), ("acme", "read_only"));
    assert_eq!(proxy.caller("bob", &password, "acme").connect().await.ask("SELECT 1").await, "1");
    let again: String = console.query_one("ALTER LOGIN bob PASSWORD", &[]).await.unwrap().get("password");
    assert_ne!(again, password);
    // Prepared once and executed once: one password each time.
    let prepared = console.prepare("ALTER LOGIN bob PASSWORD").await.unwrap();
    let first: String = console.query_one(&prepared, &[]).await.unwrap().get("password");
    let second: String = console.query_one(&prepared, &[]).await.unwrap().get("password");
    assert_ne!(first, second);
    let simple = console.ask_all("ALTER LOGIN bob PASSWORD").await;
    let fourth = simple[0][4].clone().unwrap();
    assert_eq!(proxy.caller("bob", &fourth, "acme").connect().await.ask("SELECT 1").await, "1");
    assert_eq!(console.execute("ALTER LOGIN bob PASSWORD 'hunter2'", &[]).await.unwrap(), 0);
    assert_eq!(console.refusal_of("ALTER LOGIN bob PASSWORT 'hunter2'").await, "42601");
    assert_eq!(proxy.caller("bob", "hunter2", "acme").connect().await.ask("SELECT 1").await, "1");
    let log = proxy.log();
    for password in [&password, &again, &first, &second, &fourth, "hunter2"] {
        assert!(!log.contains(password), "a password is in the log");
    }
}

#[tokio::test]
async fn a_logins_life_in_sql() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let console = proxy.console().await;
    console.run("CREATE LOGIN shop SERVICE TENANTS acme PASSWORD 's'").await;
    assert_eq!(proxy.caller("shop", "s", "globex").refusal().await, "3D000");
    console.run("GRANT TENANT globex TO shop READ ONLY").await;
    let mut client = proxy.caller("shop", "s", "globex").connect().await;
    assert_eq!(client.refusal_of("CREATE TABLE t (x int)").await, "25006");
    console.run("REVOKE TENANT globex FROM shop").await;
    client.closed().await;
    for (off, on) in [
        ("ALTER LOGIN shop DISABLE", "ALTER LOGIN shop ENABLE"),
        ("ALTER LOGIN shop VALID UNTIL '2020-01-01'", "ALTER LOGIN shop VALID UNTIL INFINITY"),
        ("ALTER LOGIN shop FROM '10.0.0.0/8'", "ALTER LOGIN shop FROM ANYWHERE"),
    ] {
        let acme = proxy.caller("shop", "s", "acme");
        let mut client = acme.connect().await;
        console.run(off).await;
        assert_eq!(acme.refusal().await, "28P01", "{off}: who is answered finds it done");
        client.closed().await;
        console.run(on).await;
    }
    console.run("DROP LOGIN shop").await;
    assert_eq!(console.refusal_of("DROP LOGIN shop").await, "42704");
    assert!(show(&console, "HELP").await.iter().any(|row| row["command"].starts_with("CREATE LOGIN")));
}

#[tokio::test]
async fn who_may_only_show_gives_no_orders_and_who_is_dismissed_is_gone() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    console.run("CREATE LOGIN auditor ADMIN READ ONLY PASSWORD 'a'").await;
    let mut auditor = proxy.caller("auditor", "a", "pglobby").connect().await;
    assert_eq!(show(&auditor, "TENANTS").await.len(), 1);
    for order in ["CREATE TENANT globex", "DROP TENANT acme", "ALTER LOGIN auditor READ WRITE"] {
        assert_eq!(auditor.refusal_of(order).await, "42501", "{order}");
    }
    console.run("ALTER LOGIN auditor READ WRITE").await;
    auditor.run("SUSPEND TENANT acme").await;
    console.run("ALTER LOGIN auditor PASSWORD 'other'").await;
    assert!(auditor.try_run("SHOW TENANTS").await.is_err());
    auditor.closed().await;
}

/// The version before made a schema without weights. A node of this version serves on it until `pglobby init` runs.
#[tokio::test]
async fn a_schema_without_weights_serves_and_says_what_is_missing() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let central = proxy.cluster.client("central").await;
    central.run("ALTER TABLE pglobby.tenants DROP COLUMN weight").await;
    let client = proxy.client("acme").connect().await;
    assert_eq!(client.ask("SELECT current_database()").await, "acme");
    let console = proxy.console().await;
    assert_eq!(show(&console, "TENANTS").await[0]["weight"], "1");
    let refused = console.try_run("ALTER TENANT acme SET weight = 3").await.unwrap_err();
    let refused = refused.as_db_error().unwrap();
    assert_eq!(refused.code().code(), "55000");
    assert!(refused.message().contains("run `pglobby init`"), "{refused}");
}

/// What the command line prints as JSON is a row here, and a driver that asks for the columns beforehand is told them.
#[tokio::test]
async fn every_order_answers_a_row() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let row = console.query_one("CREATE TENANT globex", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>("name"), row.get::<_, &str>("status")), ("globex", "active"));
    let row = console
        .query_one("ALTER TENANT globex SET pool_size = 4, allow_from = '10.0.0.0/8, 127.0.0.1'", &[])
        .await;
    let row = row.unwrap();
    assert_eq!((row.get::<_, i64>("pool_size"), row.get::<_, Option<&str>>("pool_mode")), (4, None));
    assert_eq!(row.get::<_, &str>("allow_from"), "10.0.0.0/8, 127.0.0.1/32");
    let row = console
        .query_one("CREATE LOGIN shop SERVICE TENANTS acme, globex PASSWORD 'given'", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, Option<&str>>("password"), None, "who gave it knows it");
    let row = console.query_one("REVOKE TENANT acme FROM shop", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>("tenants"), "read_write globex");
    let row = console.query_one("DROP LOGIN shop", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>("status"), "dropped");
    let row = console.query_one("DROP TENANT globex", &[]).await.unwrap();
    assert!(row.get::<_, bool>("database_dropped"));
}

/// Long work in SQL, to its good end: the same sessions, elsewhere; then nobody.
#[tokio::test]
async fn a_tenant_is_moved_and_dropped_in_sql() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let west = support::Cluster::start();
    let console = proxy.console().await;
    proxy.add_host("west", &west);
    let mut alice = proxy.client("acme").connect().await;
    alice.run("CREATE TABLE t (x int); INSERT INTO t VALUES (7)").await;

    let row = console.query_one("MOVE TENANT acme TO HOST west", &[]).await.unwrap();

    assert_eq!((row.get::<_, &str>("from"), row.get::<_, &str>("host")), ("default", "west"));
    assert_eq!(row.get::<_, &str>("dumped_because"), "wal_level is replica");
    assert_eq!(alice.ask("SELECT x FROM t").await, "7");
    assert_eq!(west.client("acme").await.ask("SELECT x FROM t").await, "7");
    console.run("DROP TENANT acme").await;
    assert_eq!(proxy.client("acme").refusal().await, "3D000", "she is told that her tenant is gone");
    alice.closed().await;
    let left = "SELECT count(*) FROM pg_database WHERE datname = 'acme'";
    assert_eq!(west.client("postgres").await.ask(left).await, "0");
}

/// What ROLLBACK does not bring back is never done by the way.
#[tokio::test]
async fn a_tenant_is_dropped_by_a_statement_of_its_own_or_not_at_all() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    for text in [
        "CREATE TENANT x; DROP TENANT acme",
        "DROP TENANT acme; SHOW VERSION",
        "BEGIN; DROP TENANT acme; ROLLBACK",
        "SELECT 1; drop tenant \"acme\" with database",
    ] {
        assert_eq!(console.refusal_of(text).await, "25001", "{text}");
    }
    console.run("BEGIN").await;
    assert_eq!(console.refusal_of("DROP TENANT acme").await, "25001");
    let prepared = console.prepare("DROP TENANT acme").await.unwrap();
    assert_eq!(console.query(&prepared, &[]).await.unwrap_err().code().unwrap().code(), "25001");
    console.run("ROLLBACK").await;
    let tenants = proxy.json(&["tenant", "list", "--json"]);
    assert_eq!(tenants.as_array().unwrap().len(), 1, "nothing of the texts was done: {tenants}");
    console.run("CREATE TENANT x; CREATE LOGIN y TENANT x").await;
    console.run("DROP TENANT acme").await;
    assert_eq!(proxy.json(&["tenant", "list", "--json"]).as_array().unwrap().len(), 1);
}
