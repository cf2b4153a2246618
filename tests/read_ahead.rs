//! Bytes that a client sends before it was asked for them are not lost on the way from stage to stage: from the proof to the
//! session, whatever the session is, from worker to worker, from tenant to tenant.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use support::{
    Proxy,
    certificates::Authority,
    client::in_time,
    tls::connect_tls,
    wire::{Message, PROTOCOL_3_0, batch, c_string, message, rows, ssl_request, startup_message, sync, tags},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};

const PASSWORD: &str = "one for all";

/// How a client encrypts.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Plain,
    SslRequest,
    DirectTls,
}

const WAYS: [Way; 3] = [Way::Plain, Way::SslRequest, Way::DirectTls];

/// A proxy with everything that a login can lead to, and its certificate.
struct House {
    proxy: Proxy,
    folder: TempDir,
}

/// A client that says its first words together with its last proof.
struct Early {
    stream: Box<dyn Both>,
}

trait Both: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Both for T {}

impl House {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Authority::new().write_server_files(folder.path(), &["localhost"]);
        let file = |name: &str| format!("{:?}", folder.path().join(name));
        let proxy = Proxy::with_tenant("acme")
            .and_tenant("beta")
            .and_tenant("sess")
            .config("client_tls_sslmode", "\"prefer\"")
            .config("client_tls_cert_file", &file("server.crt"))
            .config("client_tls_key_file", &file("server.key"))
            .start()
            .await;
        proxy.command(&["tenant", "set", "sess", "pool_mode=session"]);
        proxy.create_login("api", PASSWORD, &["--service", "--tenants", "acme,beta,sess"]);
        proxy.create_login("boss", PASSWORD, &["--admin"]);
        Self { proxy, folder }
    }

    async fn connect(&self, way: Way) -> Box<dyn Both> {
        let mut socket = TcpStream::connect(("127.0.0.1", self.proxy.port())).await.unwrap();
        if way == Way::Plain {
            return Box::new(socket);
        }
        if way == Way::SslRequest {
            socket.write_all(&ssl_request()).await.unwrap();
            assert_eq!(socket.read_u8().await.unwrap(), b'S');
        }
        let authority = self.folder.path().join("ca.crt");
        Box::new(connect_tls(socket, &authority, "localhost", &[b"postgresql"]).await.unwrap())
    }

    /// Logs in, and sends `behind` in the same write as the last proof.
    async fn log_in(&self, way: Way, who: (&str, &str, &str), behind: &[u8]) -> Early {
        let (user, password, database) = who;
        let mut early = Early { stream: self.connect(way).await };
        early.send(&startup_message(PROTOCOL_3_0, &[("user", user), ("database", database)])).await;
        let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        assert_eq!(early.receive().await.tag, b'R');
        let length = u32::try_from(scram.message().len()).unwrap().to_be_bytes();
        let first = [b"SCRAM-SHA-256\0", &length[..], scram.message()].concat();
        early.send(&message(b'p', &first)).await;
        let challenge = early.receive().await;
        assert_eq!(challenge.tag, b'R');
        scram.update(&challenge.body[4..]).unwrap();
        early.send(&[message(b'p', scram.message()), behind.to_vec()].concat()).await;
        early
    }
}

impl Early {
    async fn send(&mut self, bytes: &[u8]) {
        in_time("sending", async {
            self.stream.write_all(bytes).await.unwrap();
            self.stream.flush().await.unwrap();
        })
        .await;
    }

    async fn receive(&mut self) -> Message {
        in_time("waiting for a message", async {
            let tag = self.stream.read_u8().await.unwrap();
            let length = usize::try_from(self.stream.read_u32().await.unwrap()).unwrap();
            let mut body = vec![0; length - 4];
            self.stream.read_exact(&mut body).await.unwrap();
            Message { tag, body }
        })
        .await
    }

    async fn until_ready(&mut self) -> Vec<Message> {
        let mut seen = Vec::new();
        while seen.last().is_none_or(|last: &Message| last.tag != b'Z') {
            seen.push(self.receive().await);
        }
        seen
    }
}

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

/// Whole requests, half of one, the first one whole and half of another, and what is longer than any read of a login.
async fn nothing_is_lost(house: &House, way: Way, who: (&str, &str, &str), request: &[u8], answer: &str) {
    let three = request.repeat(3);
    let length = request.len();
    let cuts = [three.len(), length / 2, length + 3, length, 1, three.len() - 1];
    // Where bytes are cut is the same to TLS.
    for cut in cuts.into_iter().take(if way == Way::Plain { 6 } else { 2 }) {
        let mut early = house.log_in(way, who, &three[..cut]).await;
        let greeting = early.until_ready().await;
        assert!(tags(&greeting).starts_with("RR"), "{way:?} {who:?}: {greeting:?}");
        early.send(&three[cut..]).await;
        for number in 0..3 {
            let answers = early.until_ready().await;
            assert_eq!(tags(&answers), answer, "{way:?} {who:?} cut at {cut}, answer {number}: {answers:?}");
        }
    }
}

#[tokio::test]
async fn what_is_sent_with_the_last_proof_reaches_a_session_of_every_kind() {
    let house = House::new().await;
    let long = format!("SELECT '{}'", "x".repeat(60_000));
    for way in WAYS {
        for tenant in ["acme", "sess"] {
            let (user, password) = (format!("{tenant}_user"), format!("{tenant}-secret"));
            let employee = (user.as_str(), password.as_str(), tenant);
            nothing_is_lost(&house, way, employee, &query("SELECT 'early'"), "TDCZ").await;
            nothing_is_lost(&house, way, employee, &batch("SELECT 'early'"), "12DCZ").await;
            nothing_is_lost(&house, way, employee, &sync(), "Z").await;
            nothing_is_lost(&house, way, employee, &query(&long), "TDCZ").await;
            nothing_is_lost(&house, way, ("api", PASSWORD, tenant), &query("SELECT 1, 2"), "TDCZ").await;
        }
        nothing_is_lost(&house, way, ("api", PASSWORD, "api"), &query("SHOW pglobby.tenant"), "TDCZ").await;
        nothing_is_lost(&house, way, ("boss", PASSWORD, "pglobby"), &query("SHOW VERSION"), "TDCZ").await;
        nothing_is_lost(&house, way, ("boss", PASSWORD, "pglobby"), &batch("SHOW VERSION"), "12DCZ").await;
    }
}

/// From nowhere to a tenant, and on to others, with all that is behind each choice in the same write.
#[tokio::test]
async fn what_is_sent_with_a_choice_of_tenant_goes_along() {
    let house = House::new().await;
    for way in WAYS {
        let tenants = ["acme", "beta", "sess"];
        let mut said = Vec::new();
        for tenant in tenants {
            said.extend(query(&format!("SET pglobby.tenant = '{tenant}'")));
            said.extend(query("SELECT current_database()"));
        }
        let last = query("SELECT 'behind'");
        for cut in [0, 1, 3, 7, last.len()] {
            let early = [&said[..], &last[..cut]].concat();
            let mut early = house.log_in(way, ("api", PASSWORD, "api"), &early).await;
            early.until_ready().await;
            for tenant in tenants {
                let chosen = early.until_ready().await;
                assert!(tags(&chosen).ends_with("CZ"), "{chosen:?}");
                let answers = early.until_ready().await;
                assert_eq!(rows(&answers)[0][0].as_deref(), Some(tenant), "{way:?} {answers:?}");
            }
            early.send(&last[cut..]).await;
            assert_eq!(rows(&early.until_ready().await)[0][0].as_deref(), Some("behind"));
        }
    }
}

/// A client that has sent its first query already is told that it is logged in, though no server is free for the query.
#[tokio::test]
async fn a_greeting_waits_for_no_server_that_an_early_query_waits_for() {
    let house = House::new().await;
    house.proxy.command(&["tenant", "set", "acme", "pool_size=1"]);
    let mut holder = house.proxy.wire("acme").await;
    holder.query("BEGIN").await;
    for way in WAYS {
        let who = ("acme_user", "acme-secret", "acme");
        let mut early = house.log_in(way, who, &query("SELECT 'early'")).await;
        assert!(tags(&early.until_ready().await).starts_with("RR"));
        holder.query("COMMIT").await;
        assert_eq!(tags(&early.until_ready().await), "TDCZ");
        // It may keep its server for a while, for what it may have left behind.
        drop(early);
        holder.query("BEGIN").await;
    }
}
