//! The central database: made by `pglobby init`, looked at by `pglobby check`, asked by the directory, heard by
//! notifications. Everything against a real PostgreSQL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use pglobby::{
    config::Config,
    control_path::{
        central::Central,
        check::{self, Check},
        directory::{Directory, DirectoryError},
        init::{InitError, InitReport, init},
        keyring::Keyring,
        migrations::{self, MigrationError, SchemaState},
        notifications,
        seal::Place,
    },
    data_path::tenant::{Access, Change, HostAddress, LoginKind, PoolMode, TenantStatus},
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use support::{
    Client, Cluster,
    client::{PATIENCE, in_time},
    cluster::MASTER_PASSWORD,
    proxy::pglobby,
};
use tempfile::TempDir;
use tokio::sync::mpsc;

const VERIFIER: &str = "SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:c2VydmVy";

/// A cluster and a configuration that points at it.
struct Lobby {
    cluster: Cluster,
    folder: TempDir,
}

impl Lobby {
    fn new() -> Self {
        Self::on(Cluster::start())
    }

    fn on(cluster: Cluster) -> Self {
        Self { cluster, folder: tempfile::tempdir().unwrap() }
    }

    async fn initialised() -> Self {
        let lobby = Self::new();
        init(&lobby.config("")).await.unwrap();
        lobby
    }

    /// `keys` are lines of TOML before the sections.
    fn config(&self, keys: &str) -> Config {
        self.config_with_url(keys, &self.cluster.url("central"))
    }

    fn config_with_url(&self, keys: &str, url: &str) -> Config {
        let text = format!("{keys}\n[central]\nurl = {url:?}\n[keys]\nfile = \"keyring.toml\"\n");
        fs::write(self.file(), &text).unwrap();
        Config::read(&text, Some(&self.file()), &|_| None).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("proxy.toml")
    }

    async fn central(&self) -> Client {
        self.cluster.client("central").await
    }

    fn directory(&self, config: &Config) -> (Arc<Directory>, Central) {
        let central = Central::open(config).unwrap();
        let keyring = Arc::new(ArcSwap::from_pointee(Keyring::load(config).unwrap()));
        (Directory::new(central.clone(), keyring, config), central)
    }

    /// A row as onboarding makes it; returns the tenant's id.
    async fn add_tenant(&self, name: &str) -> i64 {
        let client = self.central().await;
        let insert = format!(
            "INSERT INTO pglobby.tenants (name, host, database, username) VALUES ('{name}', 'default', '{name}', '{name}_owner')
             RETURNING id"
        );
        let id = client.ask(&insert).await;
        let keyring = Keyring::load(&self.config("")).unwrap();
        let place = Place { table: "tenants", row: &id, column: "sealed_password" };
        let blob = keyring.seal(&place, &SecretString::from(format!("{name}'s password"))).unwrap();
        let update = "UPDATE pglobby.tenants SET sealed_password = $1, status = 'active' WHERE id = $2";
        let id: i64 = id.parse().unwrap();
        client.execute(update, &[&blob, &id]).await.unwrap();
        id
    }

    async fn add_login(&self, name: &str, tenant_id: i64) -> i64 {
        let insert = format!(
            "INSERT INTO pglobby.logins (name, kind, tenant_id, verifier) VALUES ('{name}', 'employee', {tenant_id}, '{VERIFIER}')
             RETURNING id"
        );
        self.central().await.ask(&insert).await.parse().unwrap()
    }

    /// The real program.
    fn run(&self, arguments: &[&str]) -> Output {
        pglobby().args(arguments).arg("--config").arg(self.file()).output().unwrap()
    }
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

// ---- init -----------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn init_makes_everything_once_and_then_changes_nothing() {
    let lobby = Lobby::new();
    let config = lobby.config("");

    let first = init(&config).await.unwrap();
    let ring = fs::read_to_string(lobby.folder.path().join("keyring.toml")).unwrap();
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
    assert_eq!(fs::read_to_string(lobby.folder.path().join("keyring.toml")).unwrap(), ring);

    let client = lobby.central().await;
    let place = Place { table: "hosts", row: "default", column: "sealed_admin_password" };
    let row =
        client.query_one("SELECT sealed_admin_password, admin_user FROM pglobby.hosts", &[]).await.unwrap();
    let opened = Keyring::load(&config).unwrap().open(&place, row.get(0)).unwrap();
    assert_eq!(opened.expose_secret(), MASTER_PASSWORD);
    assert_eq!(row.get::<_, &str>(1), "master");
}

#[tokio::test]
async fn after_init_no_other_role_may_enter_the_central_database() {
    let lobby = Lobby::initialised().await;
    lobby.cluster.create_database("elsewhere", "tenant_role", "secret").await;

    let mut config = lobby.cluster.config("central");
    config.user("tenant_role").password("secret");
    let refused = Client::connect(&config).await.err().expect("CONNECT is revoked");

    assert_eq!(support::client::sqlstate(&refused), "42501");
}

#[tokio::test]
async fn two_inits_at_a_time_do_the_work_once() {
    let lobby = Lobby::new();
    let config = lobby.config("");

    let (one, other) = tokio::join!(init(&config), init(&config));

    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one.migrations_applied.len() + other.migrations_applied.len(), migrations::ALL.len());
    assert!(one.keyring_created ^ other.keyring_created);
    assert!(one.host_registered ^ other.host_registered);
}

#[tokio::test]
async fn a_master_that_may_not_create_databases_or_roles_is_refused_in_words() {
    let lobby = Lobby::new();
    let master = lobby.cluster.client("postgres").await;
    master.run("CREATE ROLE weak LOGIN CREATEDB PASSWORD 'weak'").await;
    let url = format!("postgres://weak:weak@127.0.0.1:{}/central", lobby.cluster.port());
    let config = lobby.config_with_url("", &url);

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
    let lobby = Lobby::initialised().await;
    let config = lobby.config("");
    lobby.central().await.run("INSERT INTO pglobby.migrations VALUES (999, 'future')").await;

    let error = init(&config).await.unwrap_err();
    assert!(matches!(error, InitError::Migration(MigrationError::Newer { found: 999 })), "{error}");

    let client = Central::open(&config).unwrap().connect_to("central").await.unwrap();
    assert_eq!(migrations::state(&client).await.unwrap(), SchemaState::Newer { found: 999 });
    assert!(migrations::require_current(&client).await.is_err());
}

#[tokio::test]
async fn a_lost_key_ring_is_not_replaced_by_one_that_opens_nothing() {
    let lobby = Lobby::initialised().await;
    fs::remove_file(lobby.folder.path().join("keyring.toml")).unwrap();

    let error = init(&lobby.config("")).await.unwrap_err();

    assert!(matches!(error, InitError::KeyringLost { .. }), "{error}");
    assert!(!lobby.folder.path().join("keyring.toml").exists());
}

#[tokio::test]
async fn the_central_database_may_be_reached_over_tls_with_every_mode_and_a_socket() {
    let lobby = Lobby::on(Cluster::build().tls().start());
    let ca = lobby.cluster.data().join("ca.crt");
    let (url, port) = (lobby.cluster.url("central"), lobby.cluster.port());
    init(&lobby.config_with_url("", &format!("{url}?sslmode=verify-full&sslrootcert={}", ca.display())))
        .await
        .unwrap();

    for (options, encrypted) in [
        ("sslmode=disable".to_owned(), "f"),
        ("sslmode=prefer".to_owned(), "t"),
        ("sslmode=require".to_owned(), "t"),
        (format!("sslmode=verify-ca&sslrootcert={}", ca.display()), "t"),
        (format!("sslmode=verify-full&sslrootcert={}", ca.display()), "t"),
        (format!("host={}&port={port}&sslmode=require", lobby.cluster.socket_folder().display()), "f"),
    ] {
        let url = match options.starts_with("host") {
            true => format!("postgres://master:{}@/central?{options}", MASTER_PASSWORD.replace(' ', "%20")),
            false => format!("{url}?{options}"),
        };
        let central = Central::open(&lobby.config_with_url("", &url)).unwrap();
        let client = central.client().await.unwrap();
        let sql = "SELECT ssl::text, pg_catalog.current_setting('search_path') FROM pg_catalog.pg_stat_ssl
            WHERE pid = pg_catalog.pg_backend_pid()";
        let row = client.query_one(sql, &[]).await.unwrap();
        assert!(row.get::<_, &str>(0).starts_with(encrypted), "{options}");
        assert_eq!(row.get::<_, &str>(1), "pg_catalog");
    }

    // Signed by nobody this machine knows.
    let stranger = support::certificates::Authority::new();
    let folder = tempfile::tempdir().unwrap();
    stranger.write_server_files(folder.path(), &["localhost"]);
    let ca = folder.path().join("ca.crt");
    let url = format!("{url}?sslmode=verify-full&sslrootcert={}", ca.display());
    let error = Central::open(&lobby.config_with_url("", &url)).unwrap().client().await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
}

#[tokio::test]
async fn errors_of_the_central_database_say_what_and_why_without_the_password() {
    let mut lobby = Lobby::initialised().await;
    let config = lobby.config("");
    let central = Central::open(&config).unwrap();

    let client = central.client().await.unwrap();
    let error = client.query_one("SELECT pglobby.missing()", &[]).await.unwrap_err();
    let error = pglobby::control_path::central::CentralError::from(error).to_string();
    assert!(error.contains("function pglobby.missing() does not exist"), "{error}");
    drop(client);

    lobby.cluster.stop();
    let error = Central::open(&config).unwrap().client().await.unwrap_err().to_string();
    assert!(error.contains("Connection refused") && error.contains("127.0.0.1"), "{error}");
    assert!(!error.contains("master of the lobby") && !error.contains("master%20of"), "{error}");
}

// ---- the program ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_commands_print_json_and_exit_as_promised() {
    let lobby = Lobby::new();
    lobby.config("");

    let before = lobby.run(&["check", "--json"]);
    assert_eq!(before.status.code(), Some(1));
    assert_eq!(json(&before)["ok"], false);
    assert_eq!(stderr(&before).lines().count(), 1, "{}", stderr(&before));

    let made = lobby.run(&["init", "--json"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    assert_eq!((&json(&made)["database_created"], &json(&made)["host"]), (&true.into(), &"default".into()));
    let again = lobby.run(&["init"]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("host \"default\" is registered"));

    let after = lobby.run(&["check", "--json"]);
    assert_eq!((after.status.code(), &json(&after)["ok"]), (Some(0), &true.into()), "{after:?}");

    assert_eq!(lobby.run(&["check", "--nonsense"]).status.code(), Some(2));
    assert_eq!(lobby.run(&["init", "nonsense"]).status.code(), Some(2));
    fs::write(lobby.file(), "listen_prot = 1\n").unwrap();
    let refused = lobby.run(&["init"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("did you mean listen_port?"), "{}", stderr(&refused));
    assert_eq!(stderr(&refused).lines().count(), 1);
}

#[tokio::test]
async fn check_names_everything_that_is_wrong_at_once() {
    let lobby = Lobby::initialised().await;
    let good = lobby.add_tenant("good").await;
    lobby.add_tenant("bad").await;
    let client = lobby.central().await;
    // A blob from another tenant's row, and a host where nobody listens.
    client
        .run(&format!(
            "UPDATE pglobby.tenants SET sealed_password = (SELECT sealed_password FROM pglobby.tenants WHERE id = {good})
             WHERE name = 'bad';
             INSERT INTO pglobby.hosts (name, address, port, admin_user) VALUES ('gone', '127.0.0.1', 1, 'x');
             GRANT CONNECT ON DATABASE central TO PUBLIC"
        ))
        .await;

    let checks =
        check::check(&lobby.config("client_tls_cert_file = \"no.pem\"\nclient_tls_key_file = \"no.key\""))
            .await;

    let failed: Vec<&Check> = checks.iter().filter(|check| !check.ok).collect();
    let names: Vec<&str> = failed.iter().map(|check| check.check.as_str()).collect();
    assert_eq!(
        names,
        [
            "client_tls_cert_file",
            "client_tls_key_file",
            "central database's doors",
            "tenants' credentials",
            "host gone"
        ]
    );
    assert!(failed[3].detail.contains("tenant \"bad\"") && !failed[3].detail.contains("good"), "{failed:?}");
    assert!(failed[4].detail.contains("Connection refused"), "{failed:?}");
    assert!(checks.iter().any(|check| check.ok && check.check == "host default"), "{checks:?}");
}

// ---- schema ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn every_change_of_every_table_is_told_plain_sql_included() {
    let lobby = Lobby::initialised().await;
    let client = lobby.central().await;
    let mut listener = lobby.central().await;
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
            &["tenant 1"],
        ),
        (
            "INSERT INTO pglobby.tenants (name, host, database, username) VALUES ('b', 'default', 'b', 'b')",
            &["tenant 2"],
        ),
        ("UPDATE pglobby.tenants SET status = 'dropping' WHERE name = 'a'", &["tenant 1"]),
        (
            "INSERT INTO pglobby.logins (name, kind, verifier) VALUES ('s', 'service', 'SCRAM-SHA-256$x')",
            &["login 1"],
        ),
        (
            "INSERT INTO pglobby.logins (name, kind, verifier, tenant_id) VALUES ('e', 'employee', 'SCRAM-SHA-256$x', 1)",
            &["login 2"],
        ),
        (
            "INSERT INTO pglobby.logins (name, kind, verifier) VALUES ('s2', 'service', 'SCRAM-SHA-256$x')",
            &["login 3"],
        ),
        ("UPDATE pglobby.logins SET disabled_at = now() WHERE id = 2", &["login 2"]),
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
    let lobby = Lobby::initialised().await;
    lobby.add_tenant("acme").await;
    let client = lobby.central().await;
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
    let lobby = Lobby::initialised().await;
    let client = lobby.central().await;
    let old = lobby.add_tenant("acme").await;
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
    let config = lobby.config("");
    let (directory, _) = lobby.directory(&config);

    client
        .run(&format!(
            "UPDATE pglobby.tenants SET status = 'dropped', sealed_password = NULL WHERE id = {old}"
        ))
        .await;
    let tombstone = directory.tenant("acme").await.unwrap().unwrap();
    assert_eq!((tombstone.id, tombstone.status), (old, TenantStatus::Dropped));

    let new = lobby.add_tenant("acme").await;
    directory.forget(&Change::Tenant(old));
    let living = directory.tenant("acme").await.unwrap().unwrap();
    assert_eq!((living.id, living.status), (new, TenantStatus::Active));
    assert_eq!(directory.tenant_by_id(old).await.unwrap().unwrap().status, TenantStatus::Dropped);
}

// ---- directory ------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_tenant_is_read_whole_with_its_credentials_opened() {
    let lobby = Lobby::initialised().await;
    let id = lobby.add_tenant("acme").await;
    let config = lobby.config("");
    let keyring = Keyring::load(&config).unwrap();
    let place = Place { table: "tenants", row: &id.to_string(), column: "sealed_ro_password" };
    let sealed = keyring.seal(&place, &SecretString::from("reader's")).unwrap();
    let client = lobby.central().await;
    let update = "UPDATE pglobby.tenants SET ro_username = 'acme_ro', sealed_ro_password = $1, pool_mode = 'session',
        pool_size = 7, statement_timeout = '1 min 500 ms', allow_from = '{10.0.0.0/8, ::1/128}', max_clients = 9";
    client.execute(update, &[&sealed]).await.unwrap();
    client
        .run("UPDATE pglobby.hosts SET max_connections = 50, tls_mode = 'verify-ca', tls_root_ca = '/ca.pem'")
        .await;

    let (directory, _) = lobby.directory(&config);
    let tenant = directory.tenant("acme").await.unwrap().unwrap();

    assert_eq!((tenant.id, tenant.name.as_str(), tenant.database.as_str()), (id, "acme", "acme"));
    assert_eq!(tenant.read_write.username, "acme_owner");
    assert_eq!(tenant.read_write.password.expose_secret(), "acme's password");
    let read_only = tenant.read_only.as_ref().unwrap();
    assert_eq!((read_only.username.as_str(), read_only.password.expose_secret()), ("acme_ro", "reader's"));
    assert_eq!(
        (tenant.pool_mode, tenant.pool_size, tenant.max_clients),
        (Some(PoolMode::Session), Some(7), Some(9))
    );
    assert_eq!(tenant.statement_timeout, Some(Duration::from_millis(60_500)));
    assert_eq!(tenant.allow_from, ["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]);
    let address = HostAddress::Tcp { name: "127.0.0.1".into(), port: lobby.cluster.port() };
    assert_eq!((&tenant.host.address, tenant.host.max_connections), (&address, Some(50)));
    assert_eq!(tenant.host.tls_root_ca.as_deref(), Some(Path::new("/ca.pem")));
    assert!(!format!("{tenant:?}").contains("password\""), "{tenant:?}");
}

#[tokio::test]
async fn logins_of_every_kind_are_read_with_their_grants() {
    let lobby = Lobby::initialised().await;
    let (acme, beta) = (lobby.add_tenant("acme").await, lobby.add_tenant("beta").await);
    lobby.add_login("alice@acme", acme).await;
    let client = lobby.central().await;
    let insert = "INSERT INTO pglobby.logins (name, kind, verifier, access, all_tenants, valid_until, disabled_at) VALUES";
    client
        .run(&format!(
            "{insert} ('etl', 'service', '{VERIFIER}', 'read_only', false, '2030-01-02 03:04:05 UTC', NULL),
                ('boss', 'service', '{VERIFIER}', 'read_only', true, 'infinity', NULL),
                ('root', 'admin', '{VERIFIER}', 'read_only', false, '-infinity', now());
             INSERT INTO pglobby.login_tenants SELECT id, {acme}, 'read_write' FROM pglobby.logins WHERE name = 'etl';
             INSERT INTO pglobby.login_tenants SELECT id, {beta}, 'read_only' FROM pglobby.logins WHERE name = 'etl'"
        ))
        .await;
    let (directory, _) = lobby.directory(&lobby.config(""));
    let login = |name: &'static str| {
        let directory = directory.clone();
        async move { directory.login(name).await.unwrap().unwrap() }
    };

    let alice = login("alice@acme").await;
    let LoginKind::Employee { tenant_id, tenant_name, access } = &alice.kind else { panic!("{alice:?}") };
    assert_eq!((*tenant_id, tenant_name.as_str(), *access), (acme, "acme", Access::ReadWrite));
    assert_eq!((alice.verifier.expose_secret(), alice.valid_until, alice.disabled), (VERIFIER, None, false));

    let etl = login("etl").await;
    let LoginKind::Service { all_tenants: None, granted } = &etl.kind else { panic!("{etl:?}") };
    let granted: Vec<_> = granted.iter().map(|grant| (grant.tenant_name.as_str(), grant.access)).collect();
    assert_eq!(granted, [("acme", Access::ReadWrite), ("beta", Access::ReadOnly)]);
    let until = etl.valid_until.unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(until.as_secs(), 1_893_553_445);

    let boss = login("boss").await;
    assert_eq!(boss.kind, LoginKind::Service { all_tenants: Some(Access::ReadOnly), granted: vec![] });
    assert_eq!(boss.valid_until, None);
    let root = login("root").await;
    assert_eq!((&root.kind, root.disabled), (&LoginKind::Admin { read_only: true }, true));
    assert_eq!(root.valid_until, Some(std::time::UNIX_EPOCH), "long expired");
}

#[tokio::test]
async fn names_of_strangers_find_nothing_and_break_nothing() {
    let lobby = Lobby::initialised().await;
    let (directory, _) = lobby.directory(&lobby.config(""));
    let long = "x".repeat(100_000);
    for name in ["", "nobody", "' OR true --", "a\0b", "Ünïcode", "%", long.as_str()] {
        assert!(directory.login(name).await.unwrap().is_none(), "{name}");
        assert!(directory.tenant(name).await.unwrap().is_none(), "{name}");
    }
    assert!(directory.tenant_by_id(-1).await.unwrap().is_none());
}

#[tokio::test]
async fn a_hundred_clients_of_one_name_are_one_look_up() {
    let lobby = Lobby::initialised().await;
    let acme = lobby.add_tenant("acme").await;
    lobby.add_login("alice", acme).await;
    let (directory, _) = lobby.directory(&lobby.config(""));
    let blocker = lobby.central().await;
    blocker.run("BEGIN; LOCK TABLE pglobby.logins IN ACCESS EXCLUSIVE MODE").await;

    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let directory = directory.clone();
            tokio::spawn(async move { directory.login("alice").await.unwrap().unwrap() })
        })
        .collect();
    // The one that asks is there once it waits for the lock; by then all the others have had their turn as well.
    let asking = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby' AND wait_event_type = 'Lock'";
    let observer = lobby.central().await;
    in_time("a look-up", async { while observer.ask(asking).await == "0" {} }).await;
    assert_eq!(observer.ask(asking).await, "1");
    let connected = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby'";
    assert_eq!(observer.ask(connected).await, "1");
    blocker.run("COMMIT").await;

    let mut logins = Vec::new();
    for task in waiting {
        logins.push(task.await.unwrap());
    }
    assert!(logins.iter().all(|login| Arc::ptr_eq(login, &logins[0])));
}

#[tokio::test]
async fn a_row_whose_seal_does_not_open_takes_nobody_else_down() {
    let lobby = Lobby::initialised().await;
    let (good, bad) = (lobby.add_tenant("good").await, lobby.add_tenant("bad").await);
    let client = lobby.central().await;
    client
        .run(&format!(
            "UPDATE pglobby.tenants SET sealed_password =
                (SELECT sealed_password FROM pglobby.tenants WHERE id = {good}) WHERE id = {bad}"
        ))
        .await;
    let (directory, _) = lobby.directory(&lobby.config(""));

    let error = directory.tenant("bad").await.unwrap_err();
    assert!(matches!(&error, DirectoryError::Broken(cause) if cause.contains("does not open")), "{error}");
    assert!(directory.tenant_by_id(bad).await.is_err());
    assert!(directory.tenant("good").await.unwrap().is_some());
}

#[tokio::test]
async fn while_the_central_database_is_down_known_names_work_and_unknown_ones_fail_at_once() {
    let mut lobby = Lobby::initialised().await;
    let acme = lobby.add_tenant("acme").await;
    lobby.add_login("alice", acme).await;
    let (directory, _) = lobby.directory(&lobby.config("directory_fresh = \"1ms\""));
    assert!(directory.login("alice").await.unwrap().is_some());
    assert!(directory.tenant("acme").await.unwrap().is_some());

    lobby.cluster.stop();
    directory.forget(&Change::Everything);
    for _ in 0..50 {
        let asked = Instant::now();
        assert!(directory.login("alice").await.unwrap().is_some());
        assert!(directory.tenant("acme").await.unwrap().is_some());
        let error = directory.login("stranger").await.unwrap_err();
        assert!(matches!(error, DirectoryError::Unavailable(_)), "{error}");
        assert!(asked.elapsed() < Duration::from_secs(2));
    }
    // What is known to have changed is not used, whatever else there is.
    directory.forget(&Change::Tenant(acme));
    assert!(directory.tenant("acme").await.is_err());

    lobby.cluster.start_again();
    let up = Instant::now();
    while directory.login("stranger").await.is_err() {
        assert!(up.elapsed() < Duration::from_secs(2), "two seconds after its return");
        tokio::task::yield_now().await;
    }
    assert!(directory.tenant("acme").await.unwrap().is_some());
}

#[tokio::test]
async fn while_the_central_database_is_slow_known_names_do_not_wait_for_it() {
    let lobby = Lobby::initialised().await;
    let acme = lobby.add_tenant("acme").await;
    lobby.add_login("alice", acme).await;
    lobby.add_login("bob", acme).await;
    let (directory, _) =
        lobby.directory(&lobby.config("directory_fresh = \"1ms\"\ncentral_timeout = \"1s\""));
    assert!(directory.login("alice").await.unwrap().is_some());
    let blocker = lobby.central().await;
    blocker.run("BEGIN; LOCK TABLE pglobby.logins IN ACCESS EXCLUSIVE MODE").await;
    directory.forget(&Change::Everything);

    let asked = Instant::now();
    assert!(directory.login("alice").await.unwrap().is_some());
    assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());

    let asked = Instant::now();
    let error = directory.login("bob").await.unwrap_err();
    assert!(matches!(error, DirectoryError::Unavailable(_)), "{error}");
    assert!(
        (Duration::from_millis(900)..Duration::from_secs(3)).contains(&asked.elapsed()),
        "{:?}",
        asked.elapsed()
    );
}

#[tokio::test]
async fn a_stale_row_is_asked_for_again_before_it_is_used() {
    let lobby = Lobby::initialised().await;
    let acme = lobby.add_tenant("acme").await;
    lobby.add_login("alice", acme).await;
    let (directory, _) = lobby.directory(&lobby.config("directory_fresh = \"1ms\""));
    assert!(!directory.login("alice").await.unwrap().unwrap().disabled);

    lobby.central().await.run("UPDATE pglobby.logins SET disabled_at = now()").await;

    let begun = Instant::now();
    while !directory.login("alice").await.unwrap().unwrap().disabled {
        assert!(begun.elapsed() < PATIENCE);
    }
}

// ---- notifications --------------------------------------------------------------------------------------------------

/// Follows in a task; its changes arrive in the channel.
fn follow(central: Central, directory: Option<Arc<Directory>>) -> mpsc::UnboundedReceiver<Change> {
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(notifications::follow(central, move |change| {
        if let Some(directory) = &directory {
            directory.forget(&change);
        }
        let _ = sender.send(change);
    }));
    receiver
}

async fn next(changes: &mut mpsc::UnboundedReceiver<Change>) -> Change {
    in_time("a change", changes.recv()).await.unwrap()
}

#[tokio::test]
async fn changes_are_heard_and_after_a_loss_everything_may_have_changed() {
    let mut lobby = Lobby::initialised().await;
    let mut changes = follow(Central::open(&lobby.config("")).unwrap(), None);
    assert_eq!(next(&mut changes).await, Change::Everything);

    let acme = lobby.add_tenant("acme").await;
    assert_eq!(next(&mut changes).await, Change::Tenant(acme));
    assert_eq!(next(&mut changes).await, Change::Tenant(acme));

    // A backend killed alone, then the whole server.
    let client = lobby.central().await;
    client.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'").await;
    assert_eq!(next(&mut changes).await, Change::Everything);
    lobby.cluster.restart();
    assert_eq!(next(&mut changes).await, Change::Everything);

    let login = lobby.add_login("alice", acme).await;
    assert_eq!(next(&mut changes).await, Change::Login(login));
}

#[tokio::test]
async fn what_plain_sql_changes_is_known_to_the_directory_once_it_is_heard() {
    let lobby = Lobby::initialised().await;
    let acme = lobby.add_tenant("acme").await;
    let alice = lobby.add_login("alice", acme).await;
    let (directory, central) = lobby.directory(&lobby.config("directory_fresh = \"10min\""));
    let mut changes = follow(central, Some(directory.clone()));
    assert_eq!(next(&mut changes).await, Change::Everything);
    assert!(!directory.login("alice").await.unwrap().unwrap().disabled);
    assert!(directory.tenant("acme").await.unwrap().unwrap().pool_size.is_none());
    assert!(directory.login("bob").await.unwrap().is_none());
    let client = lobby.central().await;

    client.run("UPDATE pglobby.logins SET disabled_at = now()").await;
    assert_eq!(next(&mut changes).await, Change::Login(alice));
    assert!(directory.login("alice").await.unwrap().unwrap().disabled);

    client.run("UPDATE pglobby.hosts SET max_connections = 5").await;
    assert_eq!(next(&mut changes).await, Change::Host("default".to_owned()));
    assert_eq!(directory.tenant("acme").await.unwrap().unwrap().host.max_connections, Some(5));

    // A renamed tenant: the login that names it, and both names.
    client.run("UPDATE pglobby.tenants SET name = 'acme2'").await;
    assert_eq!(next(&mut changes).await, Change::Tenant(acme));
    let login = directory.login("alice").await.unwrap().unwrap();
    assert!(
        matches!(&login.kind, LoginKind::Employee { tenant_name, .. } if tenant_name == "acme2"),
        "{login:?}"
    );
    assert!(directory.tenant("acme").await.unwrap().is_none());

    // A name that was asked for before it existed.
    let bob = lobby.add_login("bob", acme).await;
    assert_eq!(next(&mut changes).await, Change::Login(bob));
    assert!(directory.login("bob").await.unwrap().is_some());
}
