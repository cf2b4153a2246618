//! What an open server connection is (in step, on which protocol, with which key), and what a server costs that is
//! silent or down. The ways in are in `dial.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use pglobby::{
    config::{Config, TlsMode},
    data_path::{
        host_address::HostAddress,
        server::{
            AddressRoles, DialError, DialOptions, DialTarget, NewConnection, OnAnswer, dial_error::DialCause,
            open,
        },
        session_state::Settings,
        tenant::{Credential, Host},
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
}

impl Server {
    async fn new(cluster: Cluster) -> Self {
        cluster.create_database("acme_db", "acme_rw", PASSWORD).await;
        Self { cluster }
    }

    /// `None`: the Unix socket.
    fn host(&self, name: Option<&str>) -> Host {
        let port = self.cluster.port();
        let address = match name {
            Some(name) => HostAddress::of(name, port),
            None => HostAddress::Unix { directory: self.cluster.socket_folder().to_owned(), port },
        };
        Host {
            name: "default".to_owned(),
            addresses: Box::new([address]),
            tls_mode: TlsMode::Prefer,
            tls_root_ca: None,
            max_connections: None,
        }
    }

    async fn open(&self, name: Option<&str>) -> Result<NewConnection, DialError> {
        self.open_within(name, "20s").await
    }

    async fn open_within(
        &self,
        name: Option<&str>,
        server_connect_timeout: &str,
    ) -> Result<NewConnection, DialError> {
        let credential =
            Credential { username: "acme_rw".to_owned(), password: SecretString::from(PASSWORD) };
        let host = self.host(name);
        let target = DialTarget {
            host: &host,
            tenant: "acme",
            database: "acme_db",
            credential: &credential,
            statement_timeout: None,
            startup: &Settings::default(),
            roles: &AddressRoles::new("default", &host.addresses),
            on_answer: OnAnswer(&|| {}),
        };
        open(&target, &options(server_connect_timeout)).await
    }

    /// Whether the connection is encrypted, as the server sees it.
    async fn sees_tls(&self, opened: &NewConnection) -> bool {
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
async fn a_server_that_answers_nothing_costs_the_timeout_and_one_that_is_down_nothing() {
    let mut server = Server::new(Cluster::start()).await;
    server.cluster.pause();
    for name in [Some("127.0.0.1"), None] {
        let error = server.open_within(name, "200ms").await.unwrap_err();
        assert!(matches!(error.cause, DialCause::TimedOut(_)), "{error}");
    }
    server.cluster.resume();
    server.cluster.stop();
    let error = server.open(Some("127.0.0.1")).await.unwrap_err();
    assert_eq!(
        error.client_error().to_string(),
        "could not connect to the tenant's database: connection refused"
    );
    assert_eq!(error.client_error().sqlstate(), "08006");
    assert!(server.open(None).await.is_err());
}
