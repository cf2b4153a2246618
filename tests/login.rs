//! From an accepted socket to a proven session, through the proxy as an operator runs it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{path::PathBuf, process::Command};

use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use support::{
    Proxy, Wire,
    certificates::Authority,
    client::in_time,
    cluster::target_folder,
    tls::connect_tls,
    wire::{Message, PROTOCOL_3_0, PROTOCOL_3_2, message, rows, ssl_request, startup_message},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const PASSWORD: &str = "open, sesame";

/// What somebody sees who tries to log in: the tag and length of each message, and the last message.
async fn approach(proxy: &Proxy, user: &str, password: &str, database: &str) -> (Vec<(u8, usize)>, Message) {
    let mut wire = Wire::open(proxy.port()).await;
    wire.startup(PROTOCOL_3_0, &[("user", user), ("database", database)]).await;
    let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
    let mut seen = Vec::new();
    loop {
        let received = wire.receive().await;
        // Some errors name the user.
        let names_user = received.body.windows(user.len()).any(|part| part == user.as_bytes());
        let named = if received.tag == b'E' && names_user { user.len() } else { 0 };
        seen.push((received.tag, received.body.len() - named));
        match received.body.first_chunk::<4>() {
            Some([0, 0, 0, 10]) if received.tag == b'R' => {
                let mut body = b"SCRAM-SHA-256\0".to_vec();
                body.extend(u32::try_from(scram.message().len()).unwrap().to_be_bytes());
                body.extend_from_slice(scram.message());
                wire.send(b'p', &body).await;
            }
            Some([0, 0, 0, 11]) if received.tag == b'R' => {
                scram.update(&received.body[4..]).unwrap();
                wire.send(b'p', scram.message()).await;
            }
            _ => return (seen, received),
        }
    }
}

#[tokio::test]
async fn whoever_may_not_enter_sees_what_a_stranger_sees() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let acme = ["--tenant", "acme"];
    let with = |more: [&'static str; 2]| [acme[0], acme[1], more[0], more[1]];
    proxy.create_login("alice", PASSWORD, &acme);
    proxy.create_login("off", PASSWORD, &acme);
    proxy.command(&["login", "disable", "off"]);
    proxy.create_login("late", PASSWORD, &with(["--valid-until", "2020-01-01"]));
    proxy.create_login("far", PASSWORD, &with(["--allow-from", "192.0.2.0/24"]));
    proxy.create_login("api", PASSWORD, &["--service", "--tenants", "globex"]);
    proxy.create_login("root", PASSWORD, &["--admin"]);

    let (stranger, error) = approach(&proxy, "nobody", PASSWORD, "acme").await;
    assert_eq!(error.sqlstate(), "28P01");
    assert_eq!(error.field(b'S').unwrap(), "FATAL");
    assert_eq!(error.field(b'M').unwrap(), "password authentication failed for user \"nobody\"");
    for (user, password, database) in [
        ("alice", "wrong", "acme"),
        ("nobody", PASSWORD, "no_such_tenant"),
        ("nobody@acme", PASSWORD, "acme"),
        ("alice@globex", PASSWORD, "globex"),
        ("off", PASSWORD, "acme"),
        ("late", PASSWORD, "acme"),
        ("far", PASSWORD, "acme"),
        ("root", "wrong", "pglobby"),
        ("alice", "wrong", "no_such_tenant"),
    ] {
        let (seen, error) = approach(&proxy, user, password, database).await;
        assert_eq!(seen, stranger, "{user} at {database}");
        let words = format!("password authentication failed for user \"{user}\"");
        assert_eq!((error.sqlstate(), error.field(b'M').unwrap()), ("28P01".to_owned(), words));
    }
    // A right password proves the login: it gets one answer for a tenant that does not exist and one that it may not enter.
    for (user, database) in [
        ("alice", "globex"),
        ("alice", "no_such_tenant"),
        ("alice", "pglobby"),
        ("alice", "pgbouncer"),
        ("alice", "postgres"),
        ("api", "acme"),
        ("root", "acme"),
    ] {
        let (_, error) = approach(&proxy, user, PASSWORD, database).await;
        let words = format!("database \"{database}\" does not exist");
        assert_eq!((error.sqlstate(), error.field(b'M').unwrap()), ("3D000".to_owned(), words));
    }
    // And those who may, may.
    for (user, database) in [("alice", "acme"), ("alice@acme", "acme"), ("api", "globex")] {
        let (_, last) = approach(&proxy, user, PASSWORD, database).await;
        assert_eq!(last.tag, b'R', "{user} at {database}: {last:?}");
    }
    for reason in
        ["wrong password", "no such login", "not granted", "disabled", "expired", "address", "console"]
    {
        proxy.logged(reason).await;
    }
    assert!(!proxy.log().contains(PASSWORD));
}

#[tokio::test]
async fn a_tenant_is_named_in_many_ways() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    proxy.create_login("bob@mail.example", PASSWORD, &["--tenant", "globex"]);
    proxy.create_login("api", PASSWORD, &["--service", "--all-tenants"]);
    for (user, password, parameters, tenant) in [
        ("acme_user", "acme-secret", &[("database", "acme")][..], "acme"),
        ("acme_user", "acme-secret", &[], "acme"),
        ("acme_user", "acme-secret", &[("database", "acme_user")], "acme"),
        ("bob@mail.example", PASSWORD, &[("database", "bob@mail.example")], "globex"),
        ("bob@mail.example@globex", PASSWORD, &[], "globex"),
        ("api", PASSWORD, &[("options", "-c pglobby.tenant=globex")], "globex"),
        ("api", PASSWORD, &[("options", "--pglobby.tenant=acme"), ("database", "api")], "acme"),
        ("api", PASSWORD, &[("options", "tenant=acme")], "acme"),
        ("api@globex", PASSWORD, &[("database", "globex"), ("options", "tenant=globex")], "globex"),
    ] {
        let mut wire = Wire::open(proxy.port()).await;
        let all: Vec<_> = [("user", user)].iter().chain(parameters).copied().collect();
        wire.startup(PROTOCOL_3_0, &all).await;
        wire.authenticate(password).await.unwrap_or_else(|error| panic!("{user} {parameters:?}: {error:?}"));
        let database = rows(&wire.query("SELECT current_database()").await)[0][0].clone().unwrap();
        let expected = proxy.json(&["tenant", "show", tenant, "--json"])["database"].clone();
        assert_eq!(database, expected.as_str().unwrap(), "{user} {parameters:?}");
    }
}

/// createdb, `vacuumdb --all` and Django's test runner connect to `postgres` first.
#[tokio::test]
async fn a_maintenance_database_is_the_logins_own_tenant() {
    let proxy = Proxy::with_tenant("acme")
        .and_tenant("globex")
        .config("maintenance_databases", "[\"postgres\"]")
        .start()
        .await;
    proxy.create_login("alice", PASSWORD, &["--tenant", "globex"]);
    proxy.create_login("api", PASSWORD, &["--service", "--all-tenants"]);
    let client = proxy.caller("alice", PASSWORD, "postgres").connect().await;
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "globex");
    let service = proxy.caller("api", PASSWORD, "postgres").connect().await;
    assert_eq!(service.ask("SHOW pglobby.tenant").await, "", "it has several tenants, and chooses one");
    assert_eq!(proxy.caller("alice", "wrong", "postgres").refusal().await, "28P01");
}

#[tokio::test]
async fn whoever_is_proven_hears_what_is_wrong() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").and_tenant("gone").start().await;
    proxy.create_login("api", PASSWORD, &["--service", "--all-tenants"]);
    proxy.command(&["tenant", "suspend", "globex", "--reason", "unpaid bill"]);
    proxy.command(&["tenant", "drop", "gone", "--yes"]);
    for (database, options, sqlstate, words) in [
        ("acme", "tenant=globex", "28000", "more than one tenant: globex and acme"),
        ("globex", "", "57P03", "unpaid bill"),
        ("gone", "", "3D000", "dropped"),
    ] {
        let parameters = [("user", "api"), ("database", database), ("options", options)];
        for (password, sqlstate, words) in
            [(PASSWORD, sqlstate, words), ("wrong", "28P01", "password authentication failed")]
        {
            let mut wire = Wire::open(proxy.port()).await;
            wire.startup(PROTOCOL_3_0, &parameters).await;
            let error = wire.authenticate(password).await.expect_err("refused");
            let said = error.field(b'M').unwrap();
            assert!(error.sqlstate() == sqlstate && said.contains(words), "{database}: {said}");
            assert!(wire.until_end().await.is_empty());
        }
    }
}

#[tokio::test]
async fn what_is_no_postgresql_client_is_told_so_and_leaves_no_trace() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let packet = |version: u32, parameters: &[(&str, &str)]| startup_message(version, parameters);
    let gss = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
    let twice = [ssl_request(), ssl_request()].concat();
    for (what, bytes, sqlstate, words) in [
        ("a version of old", packet(2 << 16, &[]), "0A000", "unsupported frontend protocol 2.0"),
        ("a version to come", packet(4 << 16, &[]), "0A000", "unsupported frontend protocol 4.0"),
        ("nobody", packet(PROTOCOL_3_0, &[("database", "acme")]), "28000", "no PostgreSQL user name"),
        (
            "a replica",
            packet(PROTOCOL_3_0, &[("user", "a"), ("replication", "database")]),
            "0A000",
            "replication",
        ),
        (
            "a switch",
            packet(PROTOCOL_3_0, &[("user", "a"), ("options", "-D /")]),
            "42601",
            "invalid command-line argument",
        ),
        ("no terminator", vec![0, 0, 0, 12, 0, 3, 0, 0, b'u', b's', b'e', b'r'], "08P01", "terminator"),
        ("bytes behind SSLRequest", twice, "08P01", "unencrypted data after SSL request"),
        ("bytes behind GSSENCRequest", [&gss[..], b"x"].concat(), "08P01", "unencrypted data after"),
    ] {
        let mut wire = Wire::open(proxy.port()).await;
        wire.send_bytes(&bytes).await;
        let error = wire.receive().await;
        let said = error.field(b'M').unwrap();
        assert!(error.sqlstate() == sqlstate && said.contains(words), "{what}: {} {said}", error.sqlstate());
        assert!(wire.until_end().await.is_empty(), "{what}");
    }
    // Who speaks something else is not answered. A node-postgres client that is told to leave before it has come in sends its
    // Terminate first, and took an error of ours for its own.
    for bytes in [&b"GET / HTTP/1.1\r\nHost: lobby\r\n\r\n"[..], &[0, 0, 0x27, 0x11], &message(b'X', b"")] {
        let mut wire = Wire::open(proxy.port()).await;
        wire.send_bytes(bytes).await;
        assert!(wire.until_end().await.is_empty(), "{bytes:?}");
    }
    // Requests for encryption in any order, refused one by one, and then an ordinary login.
    let mut wire = Wire::open(proxy.port()).await;
    for request in [&gss[..], &ssl_request()] {
        wire.send_bytes(request).await;
        assert_eq!(wire.receive_byte().await, b'N');
    }
    wire.startup(PROTOCOL_3_2, &[("user", "acme_user"), ("database", "acme")]).await;
    wire.authenticate("acme-secret").await.unwrap();
}

#[tokio::test]
async fn messages_before_the_proof_must_be_what_was_asked_for() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let initial = |mechanism: &str, first: &[u8]| {
        let mut body = [mechanism.as_bytes(), b"\0"].concat();
        body.extend(u32::try_from(first.len()).unwrap().to_be_bytes());
        body.extend_from_slice(first);
        message(b'p', &body)
    };
    let first = b"n,,n=,r=abcdefghijklmnop";
    for (what, bytes) in [
        ("a query", message(b'Q', b"SELECT 1\0")),
        ("a length of three", vec![b'p', 0, 0, 0, 3]),
        ("a length of 10 001", vec![b'p', 0, 0, 0x27, 0x11]),
        ("a length of two gigabytes", vec![b'p', 0x7f, 0xff, 0xff, 0xff]),
        ("a password in clear", message(b'p', b"acme-secret\0")),
        ("an unknown mechanism", initial("PLAIN", first)),
        (
            "channel binding that was not offered",
            initial("SCRAM-SHA-256-PLUS", b"p=tls-server-end-point,,n=,r=abcd"),
        ),
        ("no client-first-message", initial("SCRAM-SHA-256", b"")),
        ("half of one", initial("SCRAM-SHA-256", b"n,,n=")),
        ("a NUL", initial("SCRAM-SHA-256", b"n,,n=,r=ab\0cd")),
        ("what is no UTF-8", initial("SCRAM-SHA-256", b"n,,n=,r=\xff\xff")),
    ] {
        let mut wire = Wire::open(proxy.port()).await;
        wire.startup(PROTOCOL_3_0, &[("user", "acme_user"), ("database", "acme")]).await;
        assert_eq!(wire.receive().await.tag, b'R');
        wire.send_bytes(&bytes).await;
        let error = wire.receive().await;
        assert_eq!((error.tag, error.sqlstate()), (b'E', "08P01".to_owned()), "{what}");
        assert!(wire.until_end().await.is_empty(), "{what}");
    }
}

/// A proxy with a certificate for `localhost`, and who signed it.
struct Encrypted {
    proxy: Proxy,
    folder: TempDir,
}

impl Encrypted {
    async fn start(mode: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Authority::new().write_server_files(folder.path(), &["localhost", "acme.lobby.test", "127.0.0.1"]);
        Self::start_with(mode, folder).await
    }

    /// With the files in `folder`.
    async fn start_with(mode: &str, folder: TempDir) -> Self {
        let file = |name: &str| format!("{:?}", folder.path().join(name));
        let proxy = Proxy::with_tenant("acme")
            .config("client_tls_sslmode", &format!("{mode:?}"))
            .config("client_tls_cert_file", &file("server.crt"))
            .config("client_tls_key_file", &file("server.key"))
            .config("tenant_host_suffixes", "[\"lobby.test\"]")
            .start()
            .await;
        Self { proxy, folder }
    }

    fn authority(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// What psql prints for `SELECT 'in'`, and its errors. Later words of `more` win.
    fn psql(&self, more: &str) -> (String, String) {
        let (port, authority) = (self.proxy.port(), self.authority());
        let whole = format!(
            "host=localhost hostaddr=127.0.0.1 port={port} user=acme_user dbname=acme sslrootcert={} {more}",
            authority.display()
        );
        let output = Command::new("psql")
            .args(["-X", "-A", "-t", "-c", "SELECT 'in'", &whole])
            .env("PGPASSWORD", "acme-secret")
            .output();
        let output = output.expect("psql runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (text(&output.stdout), text(&output.stderr))
    }

    /// A TLS connection to the server name, with application protocols.
    async fn tls(&self, socket: TcpStream, name: &'static str, alpn: &[&[u8]]) -> std::io::Result<Tls> {
        connect_tls(socket, &self.authority(), name, alpn).await
    }
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

#[tokio::test]
async fn libpq_logs_in_over_tls_bound_to_the_channel() {
    let encrypted = Encrypted::start("require").await;
    for more in ["sslmode=verify-full channel_binding=require", "sslmode=require channel_binding=disable"] {
        assert_eq!(encrypted.psql(more), ("in".to_owned(), String::new()), "{more}");
    }
    let (_, said) = encrypted.psql("sslmode=disable");
    assert!(said.contains("requires an encrypted connection"), "{said}");
}

/// As PostgreSQL's manual makes it: of X.509 version 1, with its name in the subject only.
#[tokio::test]
async fn a_certificate_as_the_manual_makes_it_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write_server_files(folder.path(), &["localhost"]);
    let (certificate, key) = authority.certify_as_version_1("localhost");
    std::fs::write(folder.path().join("server.crt"), certificate).unwrap();
    std::fs::write(folder.path().join("server.key"), key).unwrap();
    let encrypted = Encrypted::start_with("require", folder).await;
    let said = encrypted.psql("sslmode=verify-full channel_binding=require");
    assert_eq!(said, ("in".to_owned(), String::new()));
}

/// The newest libpq there is, as psycopg carries it: direct TLS, protocol 3.2, a cancel with a long key inside TLS.
#[tokio::test]
async fn libpq_18_speaks_protocol_3_2_within_direct_tls() {
    let encrypted = Encrypted::start("require").await;
    let (port, authority) = (encrypted.proxy.port(), encrypted.authority());
    let output = Command::new(target_folder().join("drivers/python/bin/python"))
        .arg("tests/drivers/libpq_18.py")
        .arg(format!(
            "host=localhost hostaddr=127.0.0.1 port={port} user=acme_user dbname=acme sslrootcert={}",
            authority.display()
        ))
        .env("PGPASSWORD", "acme-secret")
        .output()
        .expect("run scripts/test, which installs psycopg");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn the_tls_server_name_names_the_tenant() {
    let encrypted = Encrypted::start("prefer").await;
    encrypted.proxy.create_login("api", "acme-secret", &["--service", "--all-tenants"]);
    let api = "user=api dbname=api sslmode=verify-full";
    assert_eq!(encrypted.psql(&format!("{api} host=acme.lobby.test")), ("in".to_owned(), String::new()));
    let (_, said) = encrypted.psql(&format!("{api} host=localhost"));
    assert!(said.contains("no tenant is chosen"), "{said}");
}

#[tokio::test]
async fn libpq_logs_in_after_the_certificate_was_renewed() {
    let encrypted = Encrypted::start("prefer").await;
    Authority::new().write_server_files(encrypted.folder.path(), &["localhost"]);
    assert!(encrypted.psql("sslmode=verify-full").0.is_empty(), "the new one is not served yet");
    encrypted.proxy.signal(rustix::process::Signal::HUP);
    let bound = "sslmode=verify-full channel_binding=require";
    in_time("the new certificate", async {
        while encrypted.psql(bound).0.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Sends a startup packet and reads the tag of the answer.
async fn first_answer(tls: &mut Tls) -> std::io::Result<u8> {
    tls.write_all(&startup_message(PROTOCOL_3_0, &[("user", "acme_user")])).await?;
    tls.flush().await?;
    in_time("an answer", tls.read_u8()).await
}

#[tokio::test]
async fn tls_may_come_at_once_where_it_says_that_it_is_postgresql() {
    let encrypted = Encrypted::start("prefer").await;
    let socket = || async { TcpStream::connect(("127.0.0.1", encrypted.proxy.port())).await.unwrap() };
    let mut direct = encrypted.tls(socket().await, "localhost", &[b"postgresql"]).await.unwrap();
    assert_eq!(first_answer(&mut direct).await.unwrap(), b'R');

    // Somebody's browser, and somebody who says nothing.
    assert!(encrypted.tls(socket().await, "localhost", &[b"h2"]).await.is_err());
    if let Ok(mut silent) = encrypted.tls(socket().await, "localhost", &[]).await {
        assert!(first_answer(&mut silent).await.is_err());
    }

    // Behind SSLRequest nothing need be said.
    let mut asked = socket().await;
    asked.write_all(&ssl_request()).await.unwrap();
    assert_eq!(asked.read_u8().await.unwrap(), b'S');
    let mut asked = encrypted.tls(asked, "localhost", &[]).await.unwrap();
    assert_eq!(first_answer(&mut asked).await.unwrap(), b'R');
}

#[tokio::test]
async fn bytes_in_clear_do_not_get_into_tls() {
    let encrypted = Encrypted::start("prefer").await;
    let mut wire = Wire::open(encrypted.proxy.port()).await;
    let injected = startup_message(PROTOCOL_3_0, &[("user", "mallory")]);
    wire.send_bytes(&[ssl_request(), injected].concat()).await;
    let error = wire.receive().await;
    assert_eq!((error.tag, error.sqlstate()), (b'E', "08P01".to_owned()));
    assert!(wire.until_end().await.is_empty());
}

#[tokio::test]
async fn a_cancel_request_is_taken_inside_tls() {
    let encrypted = Encrypted::start("prefer").await;
    let mut wire = encrypted.proxy.wire("acme").await;
    let query = b"SELECT pg_sleep(3600) /* to be cancelled */\0";
    wire.send(b'Q', query).await;
    let master = encrypted.proxy.cluster.client("postgres").await;
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%to be cancelled%' AND wait_event = 'PgSleep'";
    in_time("the query", async { while master.ask(running).await != "1" {} }).await;

    let socket = TcpStream::connect(("127.0.0.1", encrypted.proxy.port())).await.unwrap();
    let mut tls = encrypted.tls(socket, "localhost", &[b"postgresql"]).await.unwrap();
    tls.write_all(&wire.cancel_request()).await.unwrap();
    tls.flush().await.unwrap();
    let answers = wire.until_ready().await;
    let error = answers.iter().find(|answer| answer.tag == b'E').expect("an error");
    assert_eq!(error.sqlstate(), "57014");
    let mut rest = Vec::new();
    let _ = in_time("the cancel's end", tls.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
}

/// A node forgets nothing about strangers when it starts again, and no two nodes differ: nor does a salt tell who is known.
#[tokio::test]
async fn a_stranger_is_asked_with_the_same_salt_after_a_restart() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let mut salts = Vec::new();
    for _ in 0..2 {
        for user in ["acme_user", "nobody"] {
            salts.push(salt_of(&proxy, user).await);
        }
        if salts.len() == 2 {
            proxy.kill_9();
            proxy.start_again().await;
        }
    }
    assert_eq!(salts[..2], salts[2..]);
    assert_eq!(salts[0].len(), salts[1].len());
    assert_ne!(salts[0], salts[1]);
}

/// The salt of a SCRAM challenge.
async fn salt_of(proxy: &Proxy, user: &str) -> String {
    let mut wire = Wire::open(proxy.port()).await;
    wire.startup(PROTOCOL_3_0, &[("user", user), ("database", "acme")]).await;
    let scram = ScramSha256::new(b"x", ChannelBinding::unsupported());
    wire.receive().await;
    let mut body = b"SCRAM-SHA-256\0".to_vec();
    body.extend(u32::try_from(scram.message().len()).unwrap().to_be_bytes());
    body.extend_from_slice(scram.message());
    wire.send(b'p', &body).await;
    let challenge = String::from_utf8(wire.receive().await.body[4..].to_vec()).unwrap();
    challenge.split(',').find_map(|part| part.strip_prefix("s=")).unwrap().to_owned()
}

#[tokio::test]
async fn while_the_central_database_is_away_a_stranger_sees_what_a_known_login_sees() {
    let mut proxy = Proxy::with_tenant("acme").config("central_timeout", "\"1s\"").start().await;
    proxy.create_login("later", PASSWORD, &["--tenant", "acme"]);
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    assert_eq!(proxy.caller("remembered", "x", "acme").refusal().await, "28P01");
    proxy.cluster.stop();
    proxy.logged("cannot follow changes").await;
    let mut views = Vec::new();
    // Known and remembered; nobody's and remembered as such; known and not remembered; nobody's.
    for user in ["acme_user", "remembered", "later", "nobody"] {
        for database in ["acme", "nowhere"] {
            let (seen, error) = approach(&proxy, user, "wrong", database).await;
            views.push((seen, error.sqlstate(), error.field(b'M')));
        }
    }
    assert_eq!(views[0].1, "57P03");
    assert!(views[0].0.len() == 3, "it was asked for a proof: {views:?}");
    for view in &views {
        assert_eq!(view, &views[0]);
    }
}
