//! The admin console, as operators, their dashboards and their drivers use it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    process::{Command, Output},
    time::Instant,
};

use rustix::process::Signal;
use support::{
    Client, Proxy,
    client::{PATIENCE, sqlstate},
    console::{Row, show, shown},
    proxy::{login_of, password_of},
};

async fn columns_of(console: &Client, what: &str) -> Vec<String> {
    let statement = console.prepare(&format!("SHOW {what}")).await.unwrap();
    statement.columns().iter().map(|column| column.name().to_owned()).collect()
}

fn psql(proxy: &Proxy, login: &str, password: &str, arguments: &[&str]) -> Output {
    let url = format!("postgres://{login}@127.0.0.1:{}/pglobby", proxy.port());
    Command::new("psql")
        .args(["-X", "-A", "-t", &url])
        .args(arguments)
        .env("PGPASSWORD", password)
        .output()
        .expect("psql is installed")
}

fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// pgbouncer_exporter and dashboards find columns by name, scripts by position.
#[tokio::test]
async fn pgbouncers_columns_come_first_and_in_its_order() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    for (what, columns) in [
        (
            "POOLS",
            "database user cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active \
             sv_active_cancel sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait maxwait_us pool_mode \
             load_balance_hosts",
        ),
        (
            "CLIENTS",
            "type user database replication state addr port local_addr local_port connect_time request_time wait \
             wait_us close_needed ptr link remote_pid tls application_name prepared_statements id",
        ),
        (
            "SERVERS",
            "type user database replication state addr port local_addr local_port connect_time request_time wait \
             wait_us close_needed ptr link remote_pid tls application_name prepared_statements id",
        ),
        (
            "STATS",
            "database total_server_assignment_count total_xact_count total_query_count total_received total_sent \
             total_xact_time total_query_time total_wait_time total_client_parse_count total_server_parse_count \
             total_bind_count total_client_login_count avg_server_assignment_count avg_xact_count avg_query_count \
             avg_recv avg_sent avg_xact_time avg_query_time avg_wait_time avg_client_parse_count \
             avg_server_parse_count avg_bind_count avg_client_login_count",
        ),
        (
            "STATS_TOTALS",
            "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time \
             wait_time client_parse_count server_parse_count bind_count client_login_count",
        ),
        (
            "STATS_AVERAGES",
            "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time \
             wait_time avg_client_parse_count avg_server_parse_count avg_bind_count avg_client_login_count",
        ),
        ("TOTALS", "name value"),
        (
            "DATABASES",
            "name host port database force_user pool_size min_pool_size reserve_pool_size server_lifetime pool_mode \
             load_balance_hosts max_connections current_connections max_client_connections \
             current_client_connections paused disabled",
        ),
        (
            "USERS",
            "name pool_size reserve_pool_size pool_mode max_user_connections current_connections \
             max_user_client_connections current_client_connections",
        ),
        ("LISTS", "list items"),
        ("CONFIG", "key value default changeable"),
        ("VERSION", "version"),
        ("STATE", "key value"),
        ("TENANTS", "name status"),
        ("LOGINS", "name kind tenant access"),
        ("HOSTS", "name address port"),
        ("PINS", "id database user"),
        ("HELP", "command meaning"),
    ] {
        let expected: Vec<&str> = columns.split_whitespace().collect();
        let found = columns_of(&console, what).await;
        assert!(found.len() >= expected.len() && found[..expected.len()] == expected, "{what}: {found:?}");
    }
}

#[tokio::test]
async fn a_transaction_is_seen_from_both_of_its_ends() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let mut caller = proxy.client("acme");
    caller.config.application_name("till");
    let client = caller.connect().await;
    client.run("BEGIN").await;
    let server_pid = client.server_pid().await;

    let clients = show(&console, "CLIENTS").await;
    let session = &clients[0];
    assert_eq!(session["user"], login_of("acme"));
    assert_eq!(session["database"], "acme");
    assert_eq!(session["state"], "active");
    assert_eq!(session["addr"], "127.0.0.1");
    assert_eq!(session["local_port"], proxy.port().to_string());
    assert_ne!(session["port"], "0");
    assert_eq!(session["application_name"], "till");
    assert_eq!(session["server_pid"], server_pid);
    assert!(session["connect_time"].ends_with(" UTC"), "{session:?}");

    let servers = show(&console, "SERVERS").await;
    let server = servers.iter().find(|server| server["remote_pid"] == server_pid).unwrap();
    assert_eq!(server["state"], "active");
    assert_eq!(server["database"], "acme");
    assert_eq!(server["link"], session["ptr"]);
    assert_eq!(session["link"], server["ptr"]);
    assert_eq!(server["application_name"], "till");

    let pools = show(&console, "POOLS").await;
    assert_eq!((pools[0]["cl_active"].as_str(), pools[0]["sv_active"].as_str()), ("1", "1"));

    client.run("COMMIT").await;
    shown(&console, "CLIENTS", "state", "idle").await;
    shown(&console, "SERVERS", "state", "idle").await;
    shown(&console, "POOLS", "sv_idle", "1").await;
    client.leave().await;
    shown(&console, "POOLS", "cl_active", "0").await;
    assert!(show(&console, "CLIENTS").await.is_empty());
}

#[tokio::test]
async fn whoever_waits_for_a_server_is_seen_waiting() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let console = proxy.console().await;
    let (holder, waiter) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    holder.run("BEGIN").await;
    let (_, ()) = tokio::join!(waiter.run("SELECT 1"), async {
        shown(&console, "POOLS", "cl_waiting", "1").await;
        shown(&console, "CLIENTS", "state", "waiting").await;
        holder.run("COMMIT").await;
    });
    shown(&console, "POOLS", "cl_waiting", "0").await;
    let stats = show(&console, "STATS").await;
    assert_ne!(stats[0]["total_wait_time"], "0");
}

#[tokio::test]
async fn statistics_count_what_clients_did() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let client = proxy.client("acme").connect().await;
    client.run("BEGIN; SELECT 1").await;
    client.run("SELECT pg_sleep(0.01)").await;
    client.run("COMMIT").await;
    let statement = client.prepare("SELECT 42").await.unwrap();
    client.query(&statement, &[]).await.unwrap();
    client.query(&statement, &[]).await.unwrap();
    shown(&console, "STATS", "total_xact_count", "4").await;
    let stats = &show(&console, "STATS").await[0];
    let count = |column: &str| stats[column].parse::<u64>().unwrap();
    assert_eq!(stats["database"], "acme");
    assert_eq!(count("total_query_count"), 6, "three simple ones, Parse, two times Bind");
    assert_eq!(count("total_client_login_count"), 1);
    assert_eq!(count("total_server_assignment_count"), 4);
    assert_eq!(count("total_client_parse_count"), 1);
    assert_eq!(count("total_bind_count"), 2);
    assert!(count("total_server_parse_count") >= 1);
    assert!(count("total_query_time") >= 10_000, "{stats:?}");
    assert!(count("total_xact_time") >= count("total_query_time") - 5_000, "{stats:?}");
    assert!(count("total_received") > 50 && count("total_sent") > 50);
    let totals = show(&console, "TOTALS").await;
    assert_eq!(totals[1]["name"], "total_xact_count");
    assert_eq!(totals[1]["value"], "4");
}

/// Every transaction of a session that keeps its server counts, not only the first.
#[tokio::test]
async fn transactions_of_a_kept_server_are_counted() {
    let proxy = Proxy::with_tenant("acme").pool_mode("session").start().await;
    let console = proxy.console().await;
    let client = proxy.client("acme").connect().await;
    for _ in 0..3 {
        client.run("SELECT 1").await;
    }
    shown(&console, "STATS", "total_xact_count", "3").await;
}

#[tokio::test]
async fn a_pinned_session_is_shown_with_its_reason() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let client = proxy.client("acme").connect().await;
    client.run("CREATE TEMPORARY TABLE t ()").await;
    shown(&console, "PINS", "reasons", "temporary_object").await;
    let pins = show(&console, "PINS").await;
    assert_eq!(pins[0]["server_pid"], client.server_pid().await);
    client.leave().await;
    let begun = Instant::now();
    while !show(&console, "PINS").await.is_empty() {
        assert!(begun.elapsed() < PATIENCE);
    }
}

#[tokio::test]
async fn the_central_database_is_shown() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let console = proxy.console().await;
    let _present = proxy.client("acme").connect().await;
    let names = |rows: Vec<Row>| -> Vec<String> { rows.iter().map(|row| row["name"].clone()).collect() };
    assert_eq!(names(show(&console, "TENANTS").await), ["acme", "globex"]);
    assert_eq!(names(show(&console, "LOGINS").await), ["acme_user", "console_admin", "globex_user"]);
    assert_eq!(names(show(&console, "USERS").await), ["acme_user", "console_admin", "globex_user"]);
    assert_eq!(names(show(&console, "HOSTS").await), ["default"]);
    let databases = show(&console, "DATABASES").await;
    assert_eq!(
        (databases[0]["name"].as_str(), databases[0]["current_client_connections"].as_str()),
        ("acme", "1")
    );
    assert_eq!(databases[0]["port"], proxy.cluster.port().to_string());
    assert_eq!(databases[1]["current_connections"], "0");
    let lists = show(&console, "LISTS").await;
    let items = |list: &str| lists.iter().find(|row| row["list"] == list).unwrap()["items"].clone();
    assert_eq!((items("databases").as_str(), items("users").as_str()), ("2", "3"));
    assert_eq!(items("used_clients"), "2", "the client and this administrator");
    let config = show(&console, "CONFIG").await;
    let port = config.iter().find(|row| row["key"] == "listen_port").unwrap();
    assert_eq!((port["value"].as_str(), port["default"].as_str()), (&*proxy.port().to_string(), "6432"));
}

#[tokio::test]
async fn psql_is_served_as_it_is_used() {
    let proxy = Proxy::build().start().await;
    proxy.create_login("boss", "secret", &["--admin"]);
    let said = |arguments: &[&str]| {
        let output = psql(&proxy, "boss", "secret", arguments);
        assert!(output.status.success(), "{arguments:?}: {}", words(&output.stderr));
        words(&output.stdout)
    };
    assert!(said(&["-c", "show version;"]).contains("pglobby"));
    assert_eq!(said(&["-c", "SELECT 1; SHOW server_encoding"]), "1\nUTF8");
    assert_eq!(said(&["-c", "/* ping */ select 1 -- ;"]), "1");
    assert_eq!(said(&["-c", ";"]), "");
    // pgbouncer's name for the console.
    let url = format!("postgres://boss@127.0.0.1:{}/pgbouncer", proxy.port());
    let output =
        Command::new("psql").args(["-XAtc", "SHOW LISTS", &url]).env("PGPASSWORD", "secret").output();
    assert!(words(&output.unwrap().stdout).contains("databases|0"));

    let output = psql(&proxy, "boss", "secret", &["-v", "VERBOSITY=verbose", "-c", "DROP DATABASE x"]);
    let error = words(&output.stderr);
    assert!(error.contains("42601") && error.contains("HINT:  SHOW HELP"), "{error}");
    let refused = psql(&proxy, "boss", "wrong", &["-c", "SHOW VERSION"]);
    assert!(words(&refused.stderr).contains("password authentication failed"), "{refused:?}");
}

/// tokio-postgres says everything with Parse, Bind and Execute, and wants binary values.
#[tokio::test]
async fn the_extended_protocol_is_spoken_in_binary() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let mut console = proxy.console().await;
    let client = proxy.client("acme").connect().await;
    client.run("SELECT 1").await;
    shown(&console, "STATS", "total_xact_count", "1").await;
    let row = console.query_one("SHOW STATS", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>("database"), "acme");
    assert_eq!(row.get::<_, i64>("total_xact_count"), 1);
    let row = console.query_one("SHOW POOLS", &[]).await.unwrap();
    assert_eq!(row.get::<_, i32>("cl_active"), 1);
    assert_eq!(row.get::<_, Option<String>>("load_balance_hosts"), None);
    assert!(console.query_one("SHOW HOSTS", &[]).await.unwrap().get::<_, bool>("accepts_tenants"));
    assert_eq!(console.query_one("SELECT 7", &[]).await.unwrap().get::<_, i32>(0), 7);
    assert_eq!(console.execute("SET application_name = 'me'", &[]).await.unwrap(), 0);

    // An error leaves the connection in order, and rows can be had in portions.
    assert_eq!(sqlstate(&console.query("SHOW NOTHING", &[]).await.unwrap_err()), "42601");
    assert_eq!(sqlstate(&console.query("SELECT * FROM pg_type", &[]).await.unwrap_err()), "0A000");
    let transaction = console.transaction().await.unwrap();
    let portal = transaction.bind("SHOW HELP", &[]).await.unwrap();
    assert_eq!(transaction.query_portal(&portal, 5).await.unwrap().len(), 5);
    assert!(transaction.query_portal(&portal, 0).await.unwrap().len() > 10);
    transaction.commit().await.unwrap();
}

#[tokio::test]
async fn a_read_only_administrator_may_only_show() {
    let proxy = Proxy::with_tenant("acme").start().await;
    proxy.create_login("watcher", "secret", &["--admin", "--read-only"]);
    let watcher = proxy.caller("watcher", "secret", "pglobby").connect().await;
    assert!(!show(&watcher, "CONFIG").await.is_empty());
    for action in ["RELOAD", "SHUTDOWN", "PAUSE", "KILL acme", "KILL_CLIENT 1", "DISABLE acme"] {
        assert_eq!(watcher.refusal_of(action).await, "42501", "{action}");
    }
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn others_do_not_enter_the_console() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let refusal = proxy.caller(&login_of("acme"), &password_of("acme"), "pglobby").refusal().await;
    assert_eq!(refusal, "3D000");
}

/// What a broken or hostile administrator's program sends ends its own connection at most.
#[tokio::test]
async fn malformed_messages_are_refused_and_the_console_goes_on() {
    let mut proxy = Proxy::build().start().await;
    proxy.create_login("boss", "secret", &["--admin"]);
    let bodies: [(u8, &[u8]); 9] = [
        (b'Q', b"SHOW VERSION"),
        (b'Q', b"\xff\0"),
        (b'P', b""),
        (b'P', b"name\0"),
        (b'B', b"\0\0\0\x05\0"),
        (b'B', b"\0\0\0\0\0\x01\xff\xff\xff\xff"),
        (b'D', b"X\0"),
        (b'E', b"\0\0"),
        (b'C', b""),
    ];
    for (tag, body) in bodies {
        let mut wire = support::Wire::login(proxy.port(), "boss", "secret", "pglobby").await;
        wire.send(tag, body).await;
        wire.send(b'S', b"").await;
        let answer = wire.until_ready().await;
        assert!(answer.iter().any(|message| message.tag == b'E'), "{} {body:?}: {answer:?}", tag as char);
    }
    assert!(words(&psql(&proxy, "boss", "secret", &["-c", "SELECT 1"]).stdout) == "1");
    assert!(!proxy.log().contains("panicked"));
    assert!(proxy.stop_with(Signal::TERM).await.success());
}
