//! Opening server connections to a real PostgreSQL: the ways in, what the operator and the client read when there is
//! none, and what a tenant's settings make of a session.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{path::PathBuf, time::Duration};

use pglobby::{
    config::{Config, TlsMode},
    data_path::{
        host_address::HostAddress,
        server::{
            AddressRoles, DialError, DialOptions, DialTarget, NewConnection, OnAnswer, dial_error::DialCause,
            open, send_cancel,
        },
        session_state::Settings,
        tenant::{Credential, Host},
    },
    error::ClientError,
};
use secrecy::SecretString;
use support::{
    Cluster,
    certificates::Authority,
    client::in_time,
    wire::{Message, c_string, message, rows, tags},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const PASSWORD: &str = "open, sesame";

/// A cluster with the tenant's database `acme_db` and its role `acme_rw`, and how to reach it.
struct Server {
    cluster: Cluster,
    tls_mode: TlsMode,
    tls_root_ca: Option<PathBuf>,
    name: &'static str,
    require_auth: &'static str,
}

impl Server {
    async fn of(cluster: Cluster) -> Self {
        cluster.create_database("acme_db", "acme_rw", PASSWORD).await;
        Self {
            cluster,
            tls_mode: TlsMode::Prefer,
            tls_root_ca: None,
            name: "127.0.0.1",
            require_auth: "scram-sha-256",
        }
    }

    /// TLS, with rules of pg_hba.conf for `acme_rw`; the superuser comes by any way.
    async fn with_tls(rules: &str) -> Self {
        let hba = format!(
            "local all all scram-sha-256\nhost all master 127.0.0.1/32 scram-sha-256\n{}",
            rules.replace(';', "\n")
        );
        Self::of(Cluster::build().tls().hba(&format!("{hba}\n")).start()).await
    }

    fn tls(&mut self, mode: TlsMode, root_ca: Option<PathBuf>) -> &Self {
        (self.tls_mode, self.tls_root_ca) = (mode, root_ca);
        self
    }

    fn host(&self) -> Host {
        let port = self.cluster.port();
        let address = match self.name {
            "" => HostAddress::Unix { directory: self.cluster.socket_folder().to_owned(), port },
            name => HostAddress::of(name, port),
        };
        let (tls_mode, tls_root_ca) = (self.tls_mode, self.tls_root_ca.clone());
        Host {
            name: "secret_host".to_owned(),
            addresses: Box::new([address]),
            tls_mode,
            tls_root_ca,
            max_connections: None,
        }
    }

    async fn open(&self) -> Result<NewConnection, DialError> {
        self.open_with("acme_db", PASSWORD, None).await
    }

    async fn open_with(
        &self,
        database: &str,
        password: &str,
        statement_timeout: Option<Duration>,
    ) -> Result<NewConnection, DialError> {
        let credential =
            Credential { username: "acme_rw".to_owned(), password: SecretString::from(password) };
        let host = self.host();
        let startup = Settings::default();
        let target = DialTarget {
            host: &host,
            tenant: "acme",
            database,
            credential: &credential,
            statement_timeout,
            startup: &startup,
            roles: &AddressRoles::new("default", &host.addresses),
            on_answer: OnAnswer(&|| {}),
        };
        in_time("opening a server connection", open(&target, &options(self.require_auth))).await
    }

    /// Why it cannot be opened: for the operator, and for the client (SQLSTATE, reason).
    async fn refusal(&self, database: &str, password: &str) -> (DialError, String, String) {
        let error = self.open_with(database, password, None).await.map(|_| ()).expect_err("refused");
        let refusal = error.client_error();
        let sqlstate = refusal.sqlstate().to_owned();
        let told = refusal.to_string();
        for hidden in ["acme_rw", "acme_db", "secret_host", "127.0.0.1", PASSWORD] {
            assert!(!told.contains(hidden), "{told}");
        }
        assert!(!error.to_string().contains(PASSWORD) && !format!("{error:?}").contains(PASSWORD));
        assert!(error.to_string().contains("acme_rw") && error.to_string().contains("secret_host"));
        let ClientError::ServerUnreachable { reason, .. } = refusal else { panic!("{refusal:?}") };
        (error, sqlstate, reason)
    }
}

fn options(require_auth: &str) -> DialOptions {
    let text = format!(
        "server_connect_timeout = \"20s\"\nserver_require_auth = {require_auth:?}\n\
         [central]\nurl = \"postgres://m@127.0.0.1:1/c\"\n"
    );
    DialOptions::new(&Config::read(&text, None, &|_| None).unwrap()).unwrap()
}

async fn send(opened: &mut NewConnection, sql: &str) {
    opened.stream.write_all(&message(b'Q', &c_string(sql))).await.unwrap();
    opened.stream.flush().await.unwrap();
}

async fn answers(opened: &mut NewConnection) -> Vec<Message> {
    let mut seen: Vec<Message> = Vec::new();
    while seen.last().is_none_or(|last| last.tag != b'Z') {
        let tag = in_time("a message", opened.stream.read_u8()).await.unwrap();
        let mut body = vec![0; opened.stream.read_u32().await.unwrap() as usize - 4];
        opened.stream.read_exact(&mut body).await.unwrap();
        seen.push(Message { tag, body });
    }
    seen
}

/// The first value of a statement's answer.
async fn ask(opened: &mut NewConnection, sql: &str) -> String {
    send(opened, sql).await;
    rows(&answers(opened).await)[0][0].clone().unwrap()
}

async fn is_encrypted(opened: &mut NewConnection) -> bool {
    ask(opened, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").await == "t"
}

#[tokio::test]
async fn scram_opens_over_tcp_and_over_a_unix_socket() {
    let mut server = Server::of(Cluster::start()).await;
    for name in ["127.0.0.1", "localhost", ""] {
        server.name = name;
        let mut opened = server.open().await.unwrap();
        assert_eq!(ask(&mut opened, "SELECT pg_backend_pid()").await, opened.process_id.to_string());
        assert_eq!(opened.secret.len(), if opened.minor >= 2 { 32 } else { 4 });
        let reported = |name: &[u8]| opened.parameters.iter().any(|(reported, _)| reported == name);
        assert!(reported(b"server_version") && reported(b"client_encoding"));
    }
}

#[tokio::test]
async fn a_server_that_proves_nothing_is_believed_where_that_is_said_and_on_a_unix_socket() {
    for builder in [Cluster::build().md5(), Cluster::build().trust()] {
        let mut server = Server::of(builder.start()).await;
        let (error, sqlstate, _) = server.refusal("acme_db", PASSWORD).await;
        assert!(error.to_string().contains("server_require_auth"), "{error}");
        assert_eq!(sqlstate, "08006");
        server.require_auth = "any";
        server.open().await.unwrap();
        (server.require_auth, server.name) = ("scram-sha-256", "");
        server.open().await.unwrap();
    }
    let mut server = Server::of(Cluster::build().md5().start()).await;
    let stored = "SELECT left(rolpassword, 3) FROM pg_authid WHERE rolname = 'acme_rw'";
    assert_eq!(server.cluster.client("postgres").await.ask(stored).await, "md5");
    server.require_auth = "any";
    assert_eq!(server.refusal("acme_db", "wrong").await.1, "08006");
}

#[tokio::test]
async fn a_password_in_clear_is_for_tls_and_unix_sockets_only() {
    let rules = "local all all password;host all acme_rw 127.0.0.1/32 password";
    let mut server = Server::with_tls(rules).await;
    let (error, ..) = server.tls(TlsMode::Require, None).refusal("acme_db", PASSWORD).await;
    assert!(error.to_string().contains("server_require_auth"), "{error}");
    server.require_auth = "any";
    server.tls(TlsMode::Require, None).open().await.unwrap();
    let (error, sqlstate, _) = server.tls(TlsMode::Disable, None).refusal("acme_db", PASSWORD).await;
    assert!(matches!(error.cause, DialCause::Protocol(_)), "{error}");
    assert_eq!(sqlstate, "08006");

    server.name = "";
    server.open().await.unwrap();
}

#[tokio::test]
async fn each_tls_mode_verifies_what_libpq_verifies() {
    use TlsMode::{Disable, Prefer, Require, VerifyCa, VerifyFull};
    let mut server = Server::with_tls("host all acme_rw 127.0.0.1/32 scram-sha-256").await;
    let right = server.cluster.data().join("ca.crt");
    let folder = tempfile::tempdir().unwrap();
    let wrong = folder.path().join("other.crt");
    std::fs::write(&wrong, Authority::new().pem()).unwrap();
    let missing = folder.path().join("missing.crt");

    // Reaches the same socket, by a name that is not on the certificate.
    let other_name = "::ffff:127.0.0.1";
    for (mode, root_ca, name, encrypted) in [
        (Disable, None, "127.0.0.1", Some(false)),
        (Prefer, None, "127.0.0.1", Some(true)),
        (Require, None, other_name, Some(true)),
        (Require, Some(&right), other_name, Some(true)),
        (Require, Some(&wrong), "127.0.0.1", None),
        (VerifyCa, Some(&right), other_name, Some(true)),
        (VerifyCa, Some(&wrong), "127.0.0.1", None),
        (VerifyCa, None, "127.0.0.1", None), // the system's authorities did not sign it
        (VerifyFull, Some(&right), "127.0.0.1", Some(true)),
        (VerifyFull, Some(&right), "localhost", Some(true)),
        (VerifyFull, Some(&right), other_name, None),
        (VerifyFull, Some(&missing), "127.0.0.1", None),
    ] {
        server.name = name;
        let what = format!("{mode:?} {root_ca:?} {name}");
        match server.tls(mode, root_ca.cloned()).open().await {
            Ok(mut opened) => assert_eq!(Some(is_encrypted(&mut opened).await), encrypted, "{what}"),
            Err(error) => {
                assert!(matches!(error.cause, DialCause::Tls(_)) && encrypted.is_none(), "{what}: {error}");
                let refusal = error.client_error();
                assert_eq!(refusal.sqlstate(), "08006");
                assert!(!refusal.to_string().contains(folder.path().to_str().unwrap()), "{refusal}");
            }
        }
    }
}

/// PostgreSQL's manual makes certificates of X.509 version 1 with the host's name in the subject, which rustls's verifier
/// refuses altogether.
#[tokio::test]
async fn a_certificate_as_the_manual_makes_it_is_verified_as_libpq_does() {
    use TlsMode::{Prefer, Require, VerifyCa, VerifyFull};
    let mut server = Server::with_tls("hostssl all acme_rw 127.0.0.1/32 scram-sha-256").await;
    let (authority, data) = (Authority::new(), server.cluster.data().to_owned());
    let (certificate, key) = authority.certify_as_version_1("localhost");
    std::fs::write(data.join("server.crt"), certificate).unwrap();
    std::fs::write(data.join("server.key"), key).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (right, wrong) = (folder.path().join("ca.crt"), data.join("ca.crt"));
    std::fs::write(&right, authority.pem()).unwrap();
    server.cluster.client("postgres").await.run("SELECT pg_reload_conf()").await;
    server.tls(VerifyCa, Some(right.clone()));
    in_time("the certificate is loaded", async { while server.open().await.is_err() {} }).await;

    for (mode, root_ca, name, opens) in [
        (Prefer, None, "127.0.0.1", true),
        (Require, None, "127.0.0.1", true),
        (VerifyCa, Some(&right), "127.0.0.1", true),
        (VerifyCa, Some(&wrong), "127.0.0.1", false),
        (VerifyFull, Some(&right), "localhost", true),
        (VerifyFull, Some(&right), "127.0.0.1", false),
        (VerifyFull, Some(&wrong), "localhost", false),
        (VerifyCa, None, "localhost", false),
    ] {
        server.name = name;
        let opened = server.tls(mode, root_ca.cloned()).open().await;
        assert_eq!(opened.is_ok(), opens, "{mode:?} {root_ca:?} {name}: {opened:?}");
    }
}

#[tokio::test]
async fn prefer_and_allow_try_the_other_way_where_the_server_has_no_rule_for_the_first() {
    let mut server = Server::with_tls("hostssl all acme_rw 127.0.0.1/32 scram-sha-256").await;
    let mut allowed = server.tls(TlsMode::Allow, None).open().await.unwrap();
    assert!(is_encrypted(&mut allowed).await);

    let mut server = Server::with_tls("hostnossl all acme_rw 127.0.0.1/32 scram-sha-256").await;
    let mut preferred = server.tls(TlsMode::Prefer, None).open().await.unwrap();
    assert!(!is_encrypted(&mut preferred).await);
    let mut allowed = server.tls(TlsMode::Allow, None).open().await.unwrap();
    assert!(!is_encrypted(&mut allowed).await);
    assert!(server.tls(TlsMode::Require, None).open().await.is_err());
}

#[tokio::test]
async fn where_both_ways_fail_the_operator_reads_of_both() {
    let mut server = Server::with_tls("host all somebody_else 127.0.0.1/32 scram-sha-256").await;
    for mode in [TlsMode::Prefer, TlsMode::Allow] {
        let (error, sqlstate, _) = server.tls(mode, None).refusal("acme_db", PASSWORD).await;
        let text = error.to_string();
        assert!(matches!(error.cause, DialCause::BothWays { .. }), "{text}");
        assert!(text.contains("SSL encryption") && text.contains("no encryption"), "{text}");
        assert_eq!(sqlstate, "08006");
    }
}

#[tokio::test]
async fn what_the_server_says_reaches_the_client_without_names_and_never_doubts_its_password() {
    let mut server = Server::of(Cluster::start()).await;
    let (error, sqlstate, _) = server.refusal("acme_db", "wrong").await;
    assert!(error.to_string().contains("28P01"), "{error}");
    assert_eq!(sqlstate, "08006");

    let credential =
        Credential { username: "acme_rw".to_owned(), password: SecretString::from(PASSWORD.to_owned()) };
    let host = server.host();
    let target = DialTarget {
        tenant: "acme",
        host: &host,
        database: "no_such",
        credential: &credential,
        statement_timeout: None,
        startup: &Settings::default(),
        roles: &AddressRoles::new("default", &host.addresses),
        on_answer: OnAnswer(&|| {}),
    };
    let error = open(&target, &options("scram-sha-256")).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("\"no_such\" does not exist"), "{error}");
    let refusal = error.client_error();
    assert_eq!(refusal.sqlstate(), "3D000");
    assert!(!refusal.to_string().contains("no_such"), "{refusal}");

    let master = server.cluster.client("postgres").await;
    master.run("ALTER ROLE acme_rw CONNECTION LIMIT 0").await;
    let (error, sqlstate, reason) = server.refusal("acme_db", PASSWORD).await;
    assert!(error.to_string().contains("too many connections for role"), "{error}");
    assert_eq!((sqlstate.as_str(), reason.as_str()), ("53300", "too many connections"));
    drop(master);

    server.cluster.stop();
    let (error, sqlstate, reason) = server.refusal("acme_db", PASSWORD).await;
    assert!(matches!(error.cause, DialCause::Unreachable(_)), "{error}");
    assert_eq!((sqlstate.as_str(), reason.as_str()), ("08006", "connection refused"));
    server.name = "";
    let (error, ..) = server.refusal("acme_db", PASSWORD).await;
    assert!(matches!(error.cause, DialCause::Unreachable(_)), "{error}");
}

/// `ALTER ROLE … SET role` lets a role act as another one that it is a member of. The login proves who it is.
#[tokio::test]
async fn a_role_that_acts_as_another_is_the_tenants_by_its_login() {
    let server = Server::of(Cluster::start()).await;
    let master = server.cluster.client("postgres").await;
    master.run("CREATE ROLE other; GRANT other TO acme_rw; ALTER ROLE acme_rw SET role = other").await;
    let mut opened = server.open().await.unwrap();
    assert_eq!(opened.start_role.as_deref(), Some("other"));
    assert_eq!(ask(&mut opened, "SELECT session_user || ' ' || current_user").await, "acme_rw other");
}

#[tokio::test]
async fn a_search_path_that_hides_pg_catalog_does_not_forge_an_identity() {
    let server = Server::of(Cluster::start()).await;
    let master = server.cluster.client("acme_db").await;
    master
        .run("CREATE FUNCTION public.current_database() RETURNS name LANGUAGE sql AS $$SELECT 'forged'::name$$")
        .await;
    master.run("ALTER ROLE acme_rw SET search_path = public, pg_catalog").await;
    let mut opened = server.open().await.unwrap();
    assert_eq!(ask(&mut opened, "SELECT current_database()").await, "forged");
}

#[tokio::test]
async fn a_tenants_statement_timeout_outlasts_what_a_session_does_to_it() {
    let server = Server::of(Cluster::start()).await;
    for (timeout, shown) in [
        (Some(Duration::from_millis(1500)), "1500ms"),
        (Some(Duration::ZERO), "0"),
        (Some(Duration::MAX), "2147483647ms"),
        (None, "0"),
    ] {
        let mut opened = server.open_with("acme_db", PASSWORD, timeout).await.unwrap();
        assert_eq!(ask(&mut opened, "SHOW statement_timeout").await, shown);
        for undo in ["RESET ALL", "DISCARD ALL"] {
            for sql in ["SET statement_timeout = '1h'", undo] {
                send(&mut opened, sql).await;
                assert_eq!(tags(&answers(&mut opened).await), "CZ", "{sql}");
            }
            assert_eq!(ask(&mut opened, "SHOW statement_timeout").await, shown, "{undo}");
        }
    }
}

#[tokio::test]
async fn a_cancel_ends_the_query_over_tls_and_in_clear() {
    let mut server = Server::with_tls("host all acme_rw 127.0.0.1/32 scram-sha-256").await;
    for (mode, name) in
        [(TlsMode::Require, "127.0.0.1"), (TlsMode::Disable, "127.0.0.1"), (TlsMode::Prefer, "")]
    {
        server.name = name;
        let mut opened = server.tls(mode, None).open().await.unwrap();
        send(&mut opened, "SELECT pg_sleep(600)").await;
        let master = server.cluster.client("postgres").await;
        let running = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {} AND wait_event = 'PgSleep'",
            opened.process_id
        );
        while master.ask(&running).await != "1" {}
        // Whatever the name says now: a cancel goes where its session is. It used to resolve the name again, which may lead to
        // another of the host's servers.
        let peer = opened.stream.addresses().map(|(_, theirs)| theirs);
        if peer.is_some() {
            server.name = "elsewhere.invalid";
        }
        let host = server.host();
        send_cancel(
            &host,
            &host.addresses[0],
            peer,
            opened.process_id,
            &opened.secret,
            &options("scram-sha-256"),
        )
        .await
        .unwrap();
        let seen = answers(&mut opened).await;
        assert_eq!(seen.iter().find(|message| message.tag == b'E').unwrap().sqlstate(), "57014");
    }
}
