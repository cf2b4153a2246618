//! The central database: made by `pglobby init`, looked at by `pglobby check`, and what its schema promises.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{fs, process::Output};

use pglobby::{
    control_path::{
        central::{Central, CentralError},
        check::{self, Check},
        init::{InitError, InitReport, init},
        migrations::{self, MigrationError, SchemaState},
        secrets::{keyring::Keyring, seal::SecretLocation},
    },
    data_path::{
        directory::Directory as _,
        tenant::{DirectoryChange, TenantStatus},
    },
};
use secrecy::ExposeSecret;
use serde_json::Value;
use support::{Client, Cluster, Installation, Proxy, certificates::Authority, cluster::MASTER_PASSWORD};

#[tokio::test]
async fn init_makes_everything_once_and_then_changes_nothing() {
    let installation = Installation::new();
    let config = installation.config("");

    let first = init(&config).await.unwrap();
    let ring = fs::read_to_string(installation.folder.path().join("keyring.toml")).unwrap();
    let second = init(&config).await.unwrap();

    assert!(
        first.database_created && first.closed_to_public && first.keyring_created && first.host_registered
    );
    assert_eq!(first.migrations_applied, migrations::ALL.iter().map(|step| step.name).collect::<Vec<_>>());
    let unchanged = InitReport {
        database_created: false,
        closed_to_public: false,
        migrations_applied: vec![],
        keyring_created: false,
        host_registered: false,
        ..first
    };
    assert_eq!(second, unchanged);
    assert_eq!(fs::read_to_string(installation.folder.path().join("keyring.toml")).unwrap(), ring);

    let client = installation.central().await;
    let place = SecretLocation { table: "hosts", row: "default", column: "sealed_admin_password" };
    let row =
        client.query_one("SELECT sealed_admin_password, admin_user FROM pglobby.hosts", &[]).await.unwrap();
    let opened = Keyring::load(&config).unwrap().open(&place, row.get(0)).unwrap();
    assert_eq!(opened.expose_secret(), MASTER_PASSWORD);
    assert_eq!(row.get::<_, &str>(1), "master");
}

/// A host without a budget, or with one that was not compared with its server, refused one tenant after another with 53300.
#[tokio::test]
async fn a_host_gets_a_budget_that_its_server_allows() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let small = Cluster::postgres_18()
        .setting("max_connections", "20")
        .setting("superuser_reserved_connections", "4")
        .setting("reserved_connections", "2")
        .start();
    let other = small.client("postgres").await;
    proxy.add_host("small", &small);
    let budget = |proxy: &Proxy, host: usize| {
        proxy.json(&["host", "list", "--json"])[host]["max_connections"].as_i64()
    };
    // 20, without 6 reserved, without a spare of 3, without the other session.
    assert_eq!(budget(&proxy, 1), Some(10));
    assert!((70..=88).contains(&budget(&proxy, 0).unwrap()), "{:?}", budget(&proxy, 0));
    let checked = |proxy: &Proxy| {
        let output = proxy.command_with(&["check"], "");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (passed, told) = checked(&proxy);
    assert!(passed && told.contains("budget of host small: 10 for all nodes; the server has 14"), "{told}");
    assert_eq!(proxy.json(&["host", "set", "small", "max_connections=14", "--json"])["max_connections"], 14);
    assert!(proxy.command_with(&["doctor"], "").status.success());

    let said = proxy.command(&["host", "set", "small", "max_connections=15"]);

    assert!(said.contains("is 15") && said.contains("pglobby host set small max_connections=10"), "{said}");
    let (passed, told) = checked(&proxy);
    assert!(!passed && told.contains("15 for all nodes, but the server has 14"), "{told}");
    proxy.command(&["tenant", "create", "globex", "--host", "small"]);
    let doctor = proxy.command_with(&["doctor"], "");
    let found = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(!doctor.status.success() && found.contains("budget_too_high"), "{found}");
    proxy.kill_9();
    proxy.start_again().await;
    proxy.logged("budget of the host above what its PostgreSQL has for tenants").await;
    proxy.kill_9();
    proxy.command(&["host", "set", "small", "max_connections="]);
    let (passed, told) = checked(&proxy);
    assert!(passed && told.contains("To set one: pglobby host set small max_connections="), "{told}");
    proxy.start_again().await;
    proxy.logged("host without a budget").await;
    let log = proxy.log();
    let line = log.lines().find(|line| line.contains("host without a budget")).unwrap();
    for field in
        ["small", "server", "max_connections=20", "reserved=6", "pglobby host set small max_connections="]
    {
        assert!(line.contains(field), "{line}");
    }
    let warnings =
        log.lines().filter(|line| line.contains("WARN") && line.contains("max_connections")).count();
    assert_eq!(warnings, 2, "{log}");
    other.leave().await;
}

#[tokio::test]
async fn after_init_no_other_role_may_enter_the_central_database() {
    let installation = Installation::initialised().await;
    installation.cluster.create_database("elsewhere", "tenant_role", "secret").await;

    let mut config = installation.cluster.config("central");
    config.user("tenant_role").password("secret");
    let refused = Client::connect(&config).await.err().expect("CONNECT is revoked");

    assert_eq!(support::client::sqlstate(&refused), "42501");
}

#[tokio::test]
async fn two_inits_at_a_time_do_the_work_once() {
    let installation = Installation::new();
    let config = installation.config("");

    let (one, other) = tokio::join!(init(&config), init(&config));

    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one.migrations_applied.len() + other.migrations_applied.len(), migrations::ALL.len());
    assert!(one.keyring_created ^ other.keyring_created);
    assert!(one.host_registered ^ other.host_registered);
}

#[tokio::test]
async fn a_master_that_may_not_create_databases_or_roles_is_refused_in_words() {
    let installation = Installation::new();
    let master = installation.cluster.client("postgres").await;
    master.run("CREATE ROLE weak LOGIN CREATEDB PASSWORD 'weak'").await;
    let url = format!("postgres://weak:weak@127.0.0.1:{}/central", installation.cluster.port());
    let config = installation.config_with_url("", &url);

    let error = init(&config).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "the master login \"weak\" lacks CREATEROLE; run as a superuser: ALTER ROLE \"weak\" CREATEROLE"
    );
    assert_eq!(master.ask("SELECT count(*) FROM pg_database WHERE datname = 'central'").await, "0");

    master.run("ALTER ROLE weak CREATEROLE").await;
    assert!(init(&config).await.unwrap().database_created, "no superuser is needed");
}

#[tokio::test]
async fn a_schema_newer_than_the_binary_is_refused_and_left_alone() {
    let installation = Installation::initialised().await;
    let config = installation.config("");
    installation.central().await.run("INSERT INTO pglobby.migrations VALUES (999, 'future')").await;

    let error = init(&config).await.unwrap_err();
    assert!(matches!(error, InitError::Migration(MigrationError::Newer { found: 999 })), "{error}");

    let client = Central::open(&config).unwrap().connect_to("central").await.unwrap();
    assert_eq!(
        migrations::state(&client).await.unwrap(),
        SchemaState::Newer { found: 999, compatible_from: None }
    );
    assert!(migrations::require_usable(&client).await.is_err());
}

#[tokio::test]
async fn a_lost_key_ring_is_not_replaced_by_one_that_opens_nothing() {
    let installation = Installation::initialised().await;
    fs::remove_file(installation.folder.path().join("keyring.toml")).unwrap();

    let error = init(&installation.config("")).await.unwrap_err();

    assert!(matches!(error, InitError::KeyringLost { .. }), "{error}");
    assert!(!installation.folder.path().join("keyring.toml").exists());
}

/// As after a failover: the first server is gone, and the second takes no writes.
#[tokio::test]
async fn of_several_central_servers_the_one_that_takes_writes_is_used() {
    let installation = Installation::initialised().await;
    let replica = Cluster::build().setting("default_transaction_read_only", "on").start();
    let all = format!("127.0.0.1:1,127.0.0.1:{},127.0.0.1:", replica.port());
    let url = installation.cluster.url("central").replace("127.0.0.1:", &all);
    let url = format!("{url}?target_session_attrs=read-write");
    let central = Central::open(&installation.config_with_url("", &url)).unwrap();
    let row = central.client().await.unwrap().query_one("SELECT pg_catalog.inet_server_port()", &[]).await;
    assert_eq!(row.unwrap().get::<_, i32>(0), i32::from(installation.cluster.port()));
}

#[tokio::test]
async fn the_central_database_may_be_reached_over_tls_with_every_mode_and_a_socket() {
    let installation = Installation::on(Cluster::build().tls().start());
    let ca = installation.cluster.data().join("ca.crt");
    let (url, port) = (installation.cluster.url("central"), installation.cluster.port());
    init(
        &installation.config_with_url("", &format!("{url}?sslmode=verify-full&sslrootcert={}", ca.display())),
    )
    .await
    .unwrap();

    for (options, encrypted) in [
        ("sslmode=disable".to_owned(), "f"),
        ("sslmode=prefer".to_owned(), "t"),
        ("sslmode=require".to_owned(), "t"),
        // SCRAM-SHA-256-PLUS or nothing.
        ("sslmode=require&channel_binding=require".to_owned(), "t"),
        (format!("sslmode=verify-ca&sslrootcert={}", ca.display()), "t"),
        (format!("sslmode=verify-full&sslrootcert={}", ca.display()), "t"),
        (format!("host={}&port={port}&sslmode=require", installation.cluster.socket_folder().display()), "f"),
    ] {
        let url = match options.starts_with("host") {
            true => format!("postgres://master:{}@/central?{options}", MASTER_PASSWORD.replace(' ', "%20")),
            false => format!("{url}?{options}"),
        };
        let central = Central::open(&installation.config_with_url("", &url)).unwrap();
        let client = central.client().await.unwrap();
        let sql = "SELECT ssl::text, pg_catalog.current_setting('search_path') FROM pg_catalog.pg_stat_ssl
            WHERE pid = pg_catalog.pg_backend_pid()";
        let row = client.query_one(sql, &[]).await.unwrap();
        assert!(row.get::<_, &str>(0).starts_with(encrypted), "{options}");
        assert_eq!(row.get::<_, &str>(1), "pg_catalog");
    }

    // Signed by nobody this machine knows.
    let stranger = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    stranger.write_server_files(folder.path(), &["localhost"]);
    let ca = folder.path().join("ca.crt");
    let url = format!("{url}?sslmode=verify-full&sslrootcert={}", ca.display());
    let error = Central::open(&installation.config_with_url("", &url)).unwrap().client().await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
}

#[tokio::test]
async fn errors_of_the_central_database_say_what_and_why_without_the_password() {
    let mut installation = Installation::initialised().await;
    let config = installation.config("");
    let central = Central::open(&config).unwrap();

    let client = central.client().await.unwrap();
    let error = client.query_one("SELECT pglobby.missing()", &[]).await.unwrap_err();
    let error = CentralError::from(error).to_string();
    assert!(
        error.starts_with("central database: ERROR: function pglobby.missing() does not exist; HINT: "),
        "{error}"
    );
    drop(client);

    installation.cluster.stop();
    let error = Central::open(&config).unwrap().client().await.unwrap_err().to_string();
    assert!(error.contains("Connection refused") && error.contains("127.0.0.1"), "{error}");
    assert!(!error.contains("master of the lobby") && !error.contains("master%20of"), "{error}");
}

// ---- the program ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_commands_print_json_and_exit_as_promised() {
    let installation = Installation::new();
    installation.config("");

    let before = installation.run(&["check", "--json"]);
    assert_eq!(before.status.code(), Some(1));
    assert_eq!(json(&before)["ok"], false);
    assert_eq!(stderr(&before).lines().count(), 1, "{}", stderr(&before));

    let made = installation.run(&["init", "--json"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    assert_eq!((&json(&made)["database_created"], &json(&made)["host"]), (&true.into(), &"default".into()));
    let again = installation.run(&["init"]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("host \"default\" is registered"));

    let after = installation.run(&["check", "--json"]);
    assert_eq!((after.status.code(), &json(&after)["ok"]), (Some(0), &true.into()), "{after:?}");

    assert_eq!(installation.run(&["check", "--nonsense"]).status.code(), Some(2));
    assert_eq!(installation.run(&["init", "nonsense"]).status.code(), Some(2));
    fs::write(installation.file(), "listen_prot = 1\n").unwrap();
    let refused = installation.run(&["init"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("did you mean listen_port?"), "{}", stderr(&refused));
    assert_eq!(stderr(&refused).lines().count(), 1);
}

#[tokio::test]
async fn check_names_everything_that_is_wrong_at_once() {
    let installation = Installation::initialised().await;
    let good = installation.add_tenant("good").await;
    installation.add_tenant("bad").await;
    let client = installation.central().await;
    // A blob from another tenant's row, and a host where nobody listens.
    client
        .run(&format!(
            "UPDATE pglobby.tenants SET sealed_password = (SELECT sealed_password FROM pglobby.tenants WHERE id = {good})
             WHERE name = 'bad';
             INSERT INTO pglobby.hosts (name, address, port, admin_user) VALUES ('gone', '127.0.0.1', 1, 'x');
             GRANT CONNECT ON DATABASE central TO PUBLIC"
        ))
        .await;

    // A certificate with another one's key.
    let authority = Authority::new();
    authority.write_server_files(installation.folder.path(), &["localhost"]);
    fs::write(installation.folder.path().join("other.key"), authority.certify(&["localhost"]).1).unwrap();

    let keys = "client_tls_cert_file = \"server.crt\"\nclient_tls_key_file = \"other.key\"";
    let checks = check::check(&installation.config(keys)).await;

    let failed: Vec<&Check> = checks.iter().filter(|check| !check.ok).collect();
    let names: Vec<&str> = failed.iter().map(|check| check.check.as_str()).collect();
    assert_eq!(
        names,
        ["TLS towards clients", "central database access", "tenants' credentials", "host gone"]
    );
    assert!(failed[2].detail.contains("tenant \"bad\"") && !failed[2].detail.contains("good"), "{failed:?}");
    assert!(failed[3].detail.contains("Connection refused"), "{failed:?}");
    assert!(checks.iter().any(|check| check.ok && check.check == "host default"), "{checks:?}");
}

// ---- schema ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn every_change_of_every_table_is_told_plain_sql_included() {
    let installation = Installation::initialised().await;
    let client = installation.central().await;
    let mut listener = installation.central().await;
    listener.run("LISTEN pglobby_changed").await;

    for (sql, expected) in [
        (
            "INSERT INTO pglobby.hosts (name, address, admin_user) VALUES ('my host', 'h', 'a')",
            &["host my host"][..],
        ),
        ("UPDATE pglobby.hosts SET name = 'other' WHERE name = 'my host'", &["host other", "host my host"]),
        ("DELETE FROM pglobby.hosts WHERE name = 'other'", &["host other"]),
        (
            "INSERT INTO pglobby.tenants (name, host, database, username) VALUES ('a', 'default', 'a', 'a')",
            &["tenant 1", "tenant_name a"],
        ),
        (
            "INSERT INTO pglobby.tenants (name, host, database, username) VALUES ('b', 'default', 'b', 'b')",
            &["tenant 2", "tenant_name b"],
        ),
        ("UPDATE pglobby.tenants SET status = 'dropping' WHERE name = 'a'", &["tenant 1"]),
        (
            "INSERT INTO pglobby.logins (name, kind, verifier) VALUES ('s', 'service', 'SCRAM-SHA-256$x')",
            &["login 1", "login_name s"],
        ),
        (
            "INSERT INTO pglobby.logins (name, kind, verifier, tenant_id) VALUES ('e', 'employee', 'SCRAM-SHA-256$x', 1)",
            &["login 2", "login_name e"],
        ),
        (
            "INSERT INTO pglobby.logins (name, kind, verifier) VALUES ('s2', 'service', 'SCRAM-SHA-256$x')",
            &["login 3", "login_name s2"],
        ),
        ("UPDATE pglobby.logins SET disabled_at = now() WHERE id = 2", &["login 2"]),
        ("UPDATE pglobby.logins SET name = 'f' WHERE id = 2", &["login 2", "login_name f"]),
        ("UPDATE pglobby.tenants SET name = 'c d' WHERE id = 2", &["tenant 2", "tenant_name c d"]),
        ("INSERT INTO pglobby.login_tenants VALUES (1, 2)", &["login 1"]),
        ("UPDATE pglobby.login_tenants SET access = 'read_only'", &["login 1"]),
        ("UPDATE pglobby.login_tenants SET login_id = 3", &["login 3", "login 1"]),
        ("DELETE FROM pglobby.login_tenants", &["login 3"]),
        ("DELETE FROM pglobby.tenants WHERE id = 1", &["tenant 1", "login 2"]),
        ("TRUNCATE pglobby.login_tenants", &["everything"]),
    ] {
        client.run(sql).await;
        for payload in expected {
            assert_eq!(listener.notification().await.payload(), *payload, "{sql}");
        }
    }
}

#[tokio::test]
async fn a_generation_counts_changes_of_what_servers_depend_on_and_no_others() {
    let installation = Installation::initialised().await;
    installation.add_tenant("acme").await;
    let client = installation.central().await;
    let generation = || client.ask("SELECT generation FROM pglobby.tenants");

    let before: i64 = generation().await.parse().unwrap();
    client.run("UPDATE pglobby.tenants SET pool_size = 3, status = 'suspended', name = 'acme2'").await;
    assert_eq!(generation().await.parse::<i64>().unwrap(), before);
    for (at, change) in ["database = 'x'", "username = 'x'", "ro_username = 'y'", "sealed_password = '\\x00'"]
        .iter()
        .enumerate()
    {
        client.run(&format!("UPDATE pglobby.tenants SET {change}")).await;
        assert_eq!(generation().await.parse::<i64>().unwrap(), before + 1 + at as i64, "{change}");
    }
    assert_eq!(client.ask("SELECT updated_at > created_at FROM pglobby.tenants").await, "t");
}

#[tokio::test]
async fn a_dropped_tenants_name_can_be_taken_again_and_a_living_ones_database_cannot() {
    let installation = Installation::initialised().await;
    let client = installation.central().await;
    let old = installation.add_tenant("acme").await;
    let insert = "INSERT INTO pglobby.tenants (name, host, database, username) VALUES";
    assert_eq!(client.refusal_of(&format!("{insert} ('acme', 'default', 'x', 'x')")).await, "23505");
    assert_eq!(client.refusal_of(&format!("{insert} ('other', 'default', 'acme', 'x')")).await, "23505");
    assert_eq!(
        client.refusal_of(&format!("{insert} ('other', 'default', 'x', 'acme_owner')")).await,
        "23505"
    );
    let active_without_password =
        format!("UPDATE pglobby.tenants SET sealed_password = NULL WHERE id = {old}");
    assert_eq!(client.refusal_of(&active_without_password).await, "23514");
    let config = installation.config("");
    let (directory, _) = installation.directory(&config);

    client
        .run(&format!(
            "UPDATE pglobby.tenants SET status = 'dropped', sealed_password = NULL WHERE id = {old}"
        ))
        .await;
    let tombstone = directory.tenant("acme").await.unwrap().unwrap();
    assert_eq!((tombstone.id, tombstone.status), (old, TenantStatus::Dropped));

    let new = installation.add_tenant("acme").await;
    directory.forget(&DirectoryChange::Tenant(old));
    let living = directory.tenant("acme").await.unwrap().unwrap();
    assert_eq!((living.id, living.status), (new, TenantStatus::Active));
    assert_eq!(directory.tenant_by_id(old).await.unwrap().unwrap().status, TenantStatus::Dropped);
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What no command writes, plain SQL cannot write either; what was there before does no harm and does not stop an upgrade.
#[tokio::test]
async fn absurd_values_are_refused_and_older_ones_are_harmless() {
    let installation = Installation::initialised().await;
    let acme = installation.add_tenant("acme").await;
    installation.add_login("alice", acme).await;
    let client = installation.central().await;
    for sql in [
        "UPDATE pglobby.hosts SET address = ''",
        "UPDATE pglobby.hosts SET max_connections = 2000000000",
        "UPDATE pglobby.hosts SET port = 0",
        "UPDATE pglobby.hosts SET admin_user = ''",
        "UPDATE pglobby.hosts SET tls_mode = 'perhaps'",
        "UPDATE pglobby.hosts SET tls_root_ca = ''",
        "UPDATE pglobby.tenants SET pool_size = 2000000000",
        "UPDATE pglobby.tenants SET pool_size = -1",
        "UPDATE pglobby.tenants SET min_pool_size = 2000000000",
        "UPDATE pglobby.tenants SET max_clients = 2000000000",
        "UPDATE pglobby.tenants SET statement_timeout = '-1 s'",
        "UPDATE pglobby.tenants SET statement_timeout = '300 days'",
        "UPDATE pglobby.tenants SET pool_mode = 'statement'",
        "UPDATE pglobby.tenants SET database = ''",
        "UPDATE pglobby.tenants SET username = ''",
        "UPDATE pglobby.tenants SET allow_from = '{NULL}'",
        "UPDATE pglobby.logins SET allow_from = '{NULL}'",
        "UPDATE pglobby.logins SET access = 'everything'",
    ] {
        assert_eq!(client.refusal_of(sql).await, "23514", "{sql}");
    }

    // As it was before: the same rows, and then the upgrade.
    let undo = "DELETE FROM pglobby.migrations WHERE number >= 3; DROP TABLE pglobby.secrets;
        DROP TABLE pglobby.node_answers, pglobby.node_requests, pglobby.pauses;
        DROP TABLE pglobby.node_leases, pglobby.host_leases, pglobby.nodes;
        DROP FUNCTION pglobby.tell_fleet();
        ALTER TABLE pglobby.migrations DROP COLUMN compatible_from;
        ALTER TABLE pglobby.tenants DROP COLUMN role_given, DROP COLUMN weight;
        ALTER TABLE pglobby.logins DROP COLUMN may_add_logins, DROP CONSTRAINT logins_allow_from_whole;
        ALTER TABLE pglobby.hosts DROP CONSTRAINT hosts_max_connections_limit, DROP CONSTRAINT hosts_address_given,
            DROP CONSTRAINT hosts_tls_root_ca_given, DROP CONSTRAINT hosts_admin_given, DROP COLUMN more_addresses;
        ALTER TABLE pglobby.tenants DROP CONSTRAINT tenants_pool_size_limit, DROP CONSTRAINT tenants_min_pool_size_limit,
            DROP CONSTRAINT tenants_max_clients_limit, DROP CONSTRAINT tenants_names_given,
            DROP CONSTRAINT tenants_allow_from_whole";
    client.run(undo).await;
    let absurd = "UPDATE pglobby.tenants SET pool_size = 2000000000, max_clients = 2000000000, min_pool_size = 2000000000;
        INSERT INTO pglobby.hosts (name, address, admin_user) VALUES ('nowhere', '', '')";
    client.run(absurd).await;
    let (directory, _) = installation.directory(&installation.config(""));
    let read = directory.tenant("acme").await.unwrap().unwrap();
    assert_eq!((read.pool_size, read.max_clients, read.weight), (Some(262_143), Some(1_000_000), 1));
    assert_eq!(
        init(&installation.config("")).await.unwrap().migrations_applied,
        ["names_and_limits", "given_roles", "fleet", "fleet_commands", "host_addresses"]
    );
    assert_eq!(client.ask("SELECT pool_size FROM pglobby.tenants").await, "262143");
    assert_eq!(
        client.refusal_of("UPDATE pglobby.hosts SET port = 5433 WHERE name = 'nowhere'").await,
        "23514"
    );
    client.run("UPDATE pglobby.hosts SET address = 'a', admin_user = 'b' WHERE name = 'nowhere'").await;
}
