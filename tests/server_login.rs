//! Opening server connections against a real PostgreSQL: every way in, and every way to be turned away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::path::PathBuf;

use pglobby::{
    config::Config,
    data_path::{
        server::{DialError, DialOptions, Opened, Target, dial_error::DialCause, open, send_cancel},
        tenant::{Credential, Host, HostAddress, TlsMode},
    },
};
use secrecy::SecretString;
use support::Cluster;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const PASSWORD: &str = "open, sesame";

fn options(server_connect_timeout: &str) -> DialOptions {
    let text = format!(
        "server_connect_timeout = \"{server_connect_timeout}\"\n[central]\nurl = \"postgres://master@127.0.0.1/central\"\n"
    );
    DialOptions::new(&Config::read(&text, None, &|_| None).unwrap()).unwrap()
}

/// A cluster's tenant database `acme_db` with a role `acme_rw`.
struct Server {
    cluster: Cluster,
    tls_mode: TlsMode,
    tls_root_ca: Option<PathBuf>,
}

impl Server {
    async fn new(cluster: Cluster) -> Self {
        cluster.create_database("acme_db", "acme_rw", PASSWORD).await;
        Self { cluster, tls_mode: TlsMode::Prefer, tls_root_ca: None }
    }

    /// `None`: the Unix socket.
    fn host(&self, name: Option<&str>) -> Host {
        let port = self.cluster.port();
        let address = match name {
            Some(name) => HostAddress::Tcp { name: name.to_owned(), port },
            None => HostAddress::Unix { directory: self.cluster.socket_folder().to_owned(), port },
        };
        Host {
            name: "default".to_owned(),
            address,
            tls_mode: self.tls_mode,
            tls_root_ca: self.tls_root_ca.clone(),
            max_connections: None,
        }
    }

    async fn open(&self, name: Option<&str>) -> Result<Opened, DialError> {
        self.open_as(name, "acme_db", "acme_rw", PASSWORD).await
    }

    async fn open_as(
        &self,
        name: Option<&str>,
        database: &str,
        username: &str,
        password: &str,
    ) -> Result<Opened, DialError> {
        let credential = Credential { username: username.to_owned(), password: SecretString::from(password) };
        let host = self.host(name);
        open(&Target { host: &host, database, credential: &credential }, &options("20s")).await
    }

    /// Whether the connection is encrypted, as the server sees it.
    async fn sees_tls(&self, opened: &Opened) -> bool {
        let sql = format!("SELECT ssl FROM pg_stat_ssl WHERE pid = {}", opened.process_id);
        self.cluster.client("postgres").await.ask(&sql).await == "t"
    }
}

#[tokio::test]
async fn a_session_opens_over_tcp_and_unix_socket_and_is_the_tenants() {
    let server = Server::new(Cluster::start()).await;
    for name in [Some("127.0.0.1"), Some("localhost"), None] {
        let mut opened = server.open(name).await.unwrap();
        assert_eq!((opened.secret.len(), opened.minor), (4, 0), "PostgreSQL 15 speaks 3.0");
        let version = opened.parameters.iter().find(|(name, _)| name == b"server_version").unwrap();
        assert!(!version.1.is_empty());
        let sql = format!("SELECT usename FROM pg_stat_activity WHERE pid = {}", opened.process_id);
        assert_eq!(server.cluster.client("postgres").await.ask(&sql).await, "acme_rw");
        // In step: the next bytes answer the next question.
        opened.stream.write_all(b"Q\0\0\0\x06;\0").await.unwrap();
        let mut answer = [0; 11];
        opened.stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"I\0\0\0\x04Z\0\0\0\x05I");
    }
}

#[tokio::test]
async fn postgresql_18_gives_protocol_3_2_and_a_long_key() {
    let server = Server::new(Cluster::postgres_18().tls().start()).await;
    let opened = server.open(Some("127.0.0.1")).await.unwrap();
    assert_eq!((opened.secret.len(), opened.minor), (32, 2));
    assert!(server.sees_tls(&opened).await);
}

#[tokio::test]
async fn sslmode_means_what_libpq_means() {
    let mut server = Server::new(Cluster::build().tls().start()).await;
    for (mode, tls) in [
        (TlsMode::Disable, false),
        (TlsMode::Allow, false),
        (TlsMode::Prefer, true),
        (TlsMode::Require, true),
    ] {
        server.tls_mode = mode;
        // Over TLS this is SCRAM-SHA-256-PLUS: the server refuses a client that could bind and does not.
        let opened = server.open(Some("localhost")).await.unwrap();
        assert_eq!(server.sees_tls(&opened).await, tls, "{mode:?}");
        assert_eq!(opened.stream.is_tls(), tls);
    }
    // The real authority, and one that signed nothing here.
    let stranger = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(stranger.path(), support::certificates::Authority::new().pem()).unwrap();
    for mode in [TlsMode::Require, TlsMode::VerifyCa, TlsMode::VerifyFull] {
        server.tls_mode = mode;
        server.tls_root_ca = Some(server.cluster.data().join("ca.crt"));
        for name in ["localhost", "127.0.0.1"] {
            assert!(server.sees_tls(&server.open(Some(name)).await.unwrap()).await, "{mode:?}");
        }
        server.tls_root_ca = Some(stranger.path().to_owned());
        let error = server.open(Some("localhost")).await.unwrap_err();
        assert!(matches!(error.cause, DialCause::Tls(_)), "{mode:?}: {error}");
        // TLS does not concern Unix sockets.
        assert!(!server.sees_tls(&server.open(None).await.unwrap()).await);
    }
}

#[tokio::test]
async fn tls_is_demanded_only_of_a_server_that_has_it() {
    let mut server = Server::new(Cluster::start()).await;
    assert!(!server.open(Some("localhost")).await.unwrap().stream.is_tls());
    server.tls_mode = TlsMode::Require;
    let error = server.open(Some("localhost")).await.unwrap_err();
    assert!(matches!(error.cause, DialCause::Tls(_)), "{error}");
}

#[tokio::test]
async fn allow_and_prefer_try_the_other_way_where_the_server_has_no_rule_for_the_first() {
    let rules = |kind: &str| {
        let lines = "local all all trust\nhost all master 127.0.0.1/32 scram-sha-256\n";
        format!("{lines}{kind} all all 127.0.0.1/32 scram-sha-256\n")
    };
    for (kind, mode, tls) in [("hostssl", TlsMode::Allow, true), ("hostnossl", TlsMode::Prefer, false)] {
        let mut server = Server::new(Cluster::build().tls().hba(&rules(kind)).start()).await;
        server.tls_mode = mode;
        let opened = server.open(Some("127.0.0.1")).await.unwrap();
        assert_eq!(server.sees_tls(&opened).await, tls, "{kind}");
        server.tls_mode = if tls { TlsMode::Disable } else { TlsMode::Require };
        let error = server.open(Some("127.0.0.1")).await.unwrap_err();
        assert_eq!(error.to_refusal().sqlstate(), "28000", "{error}");
    }
}

#[tokio::test]
async fn trust_and_md5_are_served_and_a_password_in_clear_only_where_nobody_listens() {
    let trusting = Server::new(Cluster::build().trust().start()).await;
    trusting.open_as(Some("127.0.0.1"), "acme_db", "acme_rw", "").await.unwrap();

    let old = Server::new(Cluster::build().md5().start()).await;
    old.open(Some("127.0.0.1")).await.unwrap();
    let error = old.open_as(None, "acme_db", "acme_rw", "wrong").await.unwrap_err();
    assert_eq!(error.to_refusal().sqlstate(), "28P01");

    let rules = "host all master 127.0.0.1/32 scram-sha-256\nlocal all all password\nhost all all 127.0.0.1/32 password\n";
    let mut clear = Server::new(Cluster::build().tls().hba(rules).start()).await;
    clear.open(None).await.unwrap();
    assert!(clear.open(Some("127.0.0.1")).await.unwrap().stream.is_tls());
    clear.tls_mode = TlsMode::Disable;
    let error = clear.open(Some("127.0.0.1")).await.unwrap_err();
    assert!(matches!(error.cause, DialCause::Protocol(_)), "{error}");
}

#[tokio::test]
async fn a_refusal_keeps_the_servers_sqlstate_and_tells_a_client_no_name() {
    let server = Server::new(Cluster::start()).await;
    let master = server.cluster.client("postgres").await;
    master.run("CREATE ROLE full_up LOGIN PASSWORD 'open, sesame' CONNECTION LIMIT 0").await;
    master.run("CREATE DATABASE closed").await;
    master.run("REVOKE CONNECT ON DATABASE closed FROM PUBLIC").await;
    for (database, role, password, sqlstate, words) in [
        ("acme_db", "acme_rw", "wrong", "28P01", "the server does not accept the tenant's credentials"),
        ("acme_db", "nobody", PASSWORD, "28P01", "the server does not accept the tenant's credentials"),
        ("no_such_db", "acme_rw", PASSWORD, "3D000", "the database does not exist"),
        ("acme_db", "full_up", PASSWORD, "53300", "too many connections"),
        ("closed", "acme_rw", PASSWORD, "42501", "permission denied for the database"),
    ] {
        let error = server.open_as(Some("127.0.0.1"), database, role, password).await.unwrap_err();
        let refusal = error.to_refusal();
        assert_eq!(refusal.sqlstate(), sqlstate, "{error}");
        assert_eq!(refusal.to_string(), format!("could not connect to the tenant's database: {words}"));
        let operator = format!("{error} {error:?}");
        assert!(operator.contains(role) && operator.contains(database), "{operator}");
        assert!(!operator.contains(password) && !operator.contains("sesame"), "{operator}");
    }
}

#[tokio::test]
async fn a_role_that_turns_into_another_is_not_lent() {
    let server = Server::new(Cluster::start()).await;
    let master = server.cluster.client("postgres").await;
    master.run("CREATE ROLE other; GRANT other TO acme_rw; ALTER ROLE acme_rw SET role = other").await;
    let error = server.open(Some("127.0.0.1")).await.unwrap_err();
    assert!(matches!(&error.cause, DialCause::WrongIdentity { role, .. } if role == "other"), "{error}");

    // What a role's own search path puts in front answers nothing.
    master
        .run("ALTER ROLE acme_rw RESET role; ALTER ROLE acme_rw SET search_path = public, pg_catalog")
        .await;
    let lie =
        "CREATE FUNCTION public.current_database() RETURNS name LANGUAGE sql AS $$ SELECT 'lie'::name $$";
    server.cluster.client("acme_db").await.run(lie).await;
    server.open(Some("127.0.0.1")).await.unwrap();
}

#[tokio::test]
async fn a_server_that_answers_nothing_costs_the_timeout_and_one_that_is_down_nothing() {
    let mut server = Server::new(Cluster::start()).await;
    server.cluster.pause();
    let credential = Credential { username: "acme_rw".to_owned(), password: SecretString::from(PASSWORD) };
    for name in [Some("127.0.0.1"), None] {
        let host = server.host(name);
        let target = Target { host: &host, database: "acme_db", credential: &credential };
        let error = open(&target, &options("200ms")).await.unwrap_err();
        assert!(matches!(error.cause, DialCause::TimedOut(_)), "{error}");
    }
    server.cluster.resume();
    server.cluster.stop();
    let error = server.open(Some("127.0.0.1")).await.unwrap_err();
    assert_eq!(
        error.to_refusal().to_string(),
        "could not connect to the tenant's database: connection refused"
    );
    assert_eq!(error.to_refusal().sqlstate(), "08006");
    assert!(server.open(None).await.is_err());
}

#[tokio::test]
async fn a_cancel_reaches_the_query_over_every_transport() {
    let mut server = Server::new(Cluster::build().tls().start()).await;
    for (name, mode) in [
        (None, TlsMode::Prefer),
        (Some("127.0.0.1"), TlsMode::Disable),
        (Some("127.0.0.1"), TlsMode::Allow),
        (Some("127.0.0.1"), TlsMode::Require),
    ] {
        server.tls_mode = mode;
        let mut opened = server.open(name).await.unwrap();
        let query = b"Q\0\0\0\x1aSELECT pg_sleep(3600)\0";
        assert_eq!(query.len(), 0x1a + 1);
        opened.stream.write_all(query).await.unwrap();
        opened.stream.flush().await.unwrap();
        let master = server.cluster.client("postgres").await;
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {} AND wait_event = 'PgSleep'",
            opened.process_id
        );
        while master.ask(&sql).await != "1" {
            tokio::task::yield_now().await;
        }
        send_cancel(&server.host(name), opened.process_id, &opened.secret, &options("20s")).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"Z\0\0\0\x05I") {
            assert_ne!(opened.stream.read_buf(&mut answer).await.unwrap(), 0);
        }
        assert!(answer.windows(6).any(|part| part == b"C57014"), "{mode:?}");
    }
}
