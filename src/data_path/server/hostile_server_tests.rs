//! A hostile server can only be rejected. Each test has a server on a real socket that breaks the protocol;
//! `tests/` has logins to real servers.

use std::{io, path::PathBuf, time::Duration};

use proptest::prelude::*;
use secrecy::SecretString;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UnixListener, UnixStream},
};

use super::{
    AddressRoles, DialError, DialOptions, DialTarget, NewConnection, OnAnswer, dial_error::DialCause, open,
    send_cancel,
};
use crate::{
    config::TlsMode,
    data_path::{
        host_address::HostAddress,
        session_state::Settings,
        tenant::{Credential, Host},
    },
    wire::message::{
        append, append_cstr, authentication_ok, backend_key_data, parameter_status, ready_for_query,
    },
};

const PASSWORD: &str = "the tenant's secret";

/// A folder with the server's socket.
struct SocketFolder {
    folder: tempfile::TempDir,
    listener: UnixListener,
}

impl SocketFolder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(".s.PGSQL.5432")).unwrap();
        Self { folder, listener }
    }

    fn host(&self) -> Host {
        host(HostAddress::Unix { directory: self.folder.path().to_owned(), port: 5432 }, TlsMode::Prefer)
    }

    /// Accepts a connection and reads the startup packet.
    async fn accept(&self) -> UnixStream {
        let (mut client, _) = self.listener.accept().await.unwrap();
        let length = client.read_u32().await.unwrap();
        client.read_exact(&mut vec![0; length as usize - 4]).await.unwrap();
        client
    }

    /// Opens a connection to a server that sends `bytes` after the startup packet, and nothing more.
    async fn open_with(&self, bytes: &[u8]) -> Result<NewConnection, DialError> {
        let serve = async {
            let mut client = self.accept().await;
            // The proxy may have closed the connection before.
            let _ = client.write_all(bytes).await;
            let _ = client.shutdown().await;
            client
        };
        let host = self.host();
        let (opened, _client) = tokio::join!(dial(&host), serve);
        opened
    }
}

/// [`SocketFolder::open_with`], once.
fn open_once(bytes: &[u8]) -> Result<NewConnection, DialError> {
    run(async { SocketFolder::new().open_with(bytes).await })
}

fn host(address: HostAddress, tls_mode: TlsMode) -> Host {
    Host {
        name: "default".to_owned(),
        addresses: Box::new([address]),
        tls_mode,
        tls_root_ca: None,
        max_connections: None,
    }
}

async fn tcp_host(mode: TlsMode) -> (TcpListener, Host) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, host(HostAddress::Tcp { name: "127.0.0.1".to_owned(), port }, mode))
}

async fn dial(host: &Host) -> Result<NewConnection, DialError> {
    let options = DialOptions::for_tests(Duration::from_secs(20));
    dial_with(host, &options).await
}

async fn dial_with(host: &Host, options: &DialOptions) -> Result<NewConnection, DialError> {
    let credential = Credential { username: "acme_rw".to_owned(), password: SecretString::from(PASSWORD) };
    let target = DialTarget {
        host,
        tenant: "acme",
        database: "acme_db",
        credential: &credential,
        statement_timeout: None,
        startup: &Settings::default(),
        roles: &AddressRoles::new("default", &host.addresses),
        on_answer: OnAnswer(&|| {}),
    };
    open(&target, options).await
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn authentication(out: &mut Vec<u8>, code: u32, data: &[u8]) {
    append(out, b'R', |out| out.extend_from_slice(&[&code.to_be_bytes()[..], data].concat()));
}

fn identity(out: &mut Vec<u8>, columns: &[Option<&[u8]>]) {
    append(out, b'T', |out| out.extend_from_slice(&[0, 0]));
    append(out, b'D', |out| {
        out.extend_from_slice(&u16::try_from(columns.len()).unwrap().to_be_bytes());
        for column in columns {
            let length = column.map_or(-1, |value| i32::try_from(value.len()).unwrap());
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(column.unwrap_or_default());
        }
    });
    append(out, b'C', |out| append_cstr(out, b"SELECT 1"));
    ready_for_query(out, b'I');
}

/// The messages of a correct server without authentication.
fn correct_login() -> Vec<u8> {
    let mut out = Vec::new();
    append(&mut out, b'v', |out| out.extend_from_slice(&[0, 3, 0, 0, 0, 0, 0, 0]));
    authentication_ok(&mut out);
    parameter_status(&mut out, b"server_version", b"15.1");
    parameter_status(&mut out, b"TimeZone", b"UTC");
    parameter_status(&mut out, b"TimeZone", b"Europe/Berlin");
    backend_key_data(&mut out, 77, &[1, 2, 3, 4]);
    append(&mut out, b'N', |out| out.extend_from_slice(b"Mwelcome\0\0"));
    ready_for_query(&mut out, b'I');
    identity(&mut out, &[Some(b"acme_db"), Some(b"acme_rw"), Some(b"owner")]);
    out
}

#[test]
fn the_messages_of_a_correct_server_are_kept() {
    let opened = open_once(&correct_login()).unwrap();
    assert_eq!((opened.process_id, opened.secret.as_slice(), opened.minor), (77, &[1, 2, 3, 4][..], 0));
    let pair = |name: &[u8], value: &[u8]| (name.to_vec(), value.to_vec());
    assert_eq!(opened.parameters, [pair(b"server_version", b"15.1"), pair(b"TimeZone", b"Europe/Berlin")]);
    assert_eq!(opened.start_role.as_deref(), Some("owner"));
    assert_eq!(opened.notices, [b"N\0\0\0\x0eMwelcome\0\0".to_vec()]);
}

#[test]
fn a_server_may_end_anywhere() {
    let correct_login = correct_login();
    run(async {
        let place = SocketFolder::new();
        for cut in 0..correct_login.len() {
            assert!(place.open_with(&correct_login[..cut]).await.is_err(), "cut at {cut}");
        }
    });
}

#[test]
fn bytes_after_the_identity_are_rejected() {
    let mut bytes = correct_login();
    parameter_status(&mut bytes, b"TimeZone", b"UTC");
    let error = open_once(&bytes).unwrap_err();
    assert!(matches!(error.cause, DialCause::Protocol(_)), "{error}");
}

#[test]
fn another_database_or_role_is_rejected_and_the_client_reads_neither_name() {
    for (columns, told) in [
        ([Some(&b"other_db"[..]), Some(&b"acme_rw"[..]), Some(&b"acme_rw"[..])], true),
        ([Some(&b"acme_db"[..]), Some(&b"postgres"[..]), Some(&b"acme_rw"[..])], true),
        ([Some(&b"acme_db"[..]), Some(&b"acme_rw"[..]), None], false),
    ] {
        let mut bytes = Vec::new();
        authentication_ok(&mut bytes);
        ready_for_query(&mut bytes, b'I');
        identity(&mut bytes, &columns);
        let error = open_once(&bytes).unwrap_err();
        assert_eq!(matches!(error.cause, DialCause::WrongIdentity { .. }), told, "{error}");
        let read = error.client_error().to_string();
        assert!(!read.contains("other_db") && !read.contains("acme"), "{read}");
    }
}

#[test]
fn lengths_and_values_out_of_bounds_are_protocol_errors() {
    let message = |tag: u8, body: &[u8]| {
        let mut out = Vec::new();
        append(&mut out, tag, |out| out.extend_from_slice(body));
        out
    };
    let after_ok = |tag: u8, body: &[u8]| {
        let mut out = Vec::new();
        authentication_ok(&mut out);
        out.extend(message(tag, body));
        out
    };
    let mut many_parameters = message(b'R', &[0; 4]);
    for at in 0..300 {
        parameter_status(&mut many_parameters, format!("p{at}").as_bytes(), b"");
    }
    let mut many_notices = Vec::new();
    for _ in 0..20 {
        many_notices.extend(message(b'N', &[b'x'; 29_000]));
    }
    for (what, bytes) in [
        ("garbage", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("a huge message", vec![b'R', 0x7f, 0xff, 0xff, 0xff]),
        ("a negative length", vec![b'R', 0xff, 0xff, 0xff, 0xff]),
        ("a length below four", vec![b'R', 0, 0, 0, 3]),
        ("a message of 30 001 bytes", vec![b'R', 0, 0, 0x75, 0x31]),
        ("an authentication without a code", message(b'R', b"")),
        ("an unknown method", message(b'R', &[0, 0, 0, 99])),
        ("a salt too short", message(b'R', &[0, 0, 0, 5, 1])),
        ("Kerberos", message(b'R', &[0, 0, 0, 2])),
        ("no mechanism that we know", message(b'R', b"\0\0\0\x0aOAUTHBEARER\0\0")),
        ("no mechanism", message(b'R', b"\0\0\0\x0a")),
        ("binding without a channel", message(b'R', b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")),
        ("a newer protocol than asked for", message(b'v', &[0, 3, 0, 9, 0, 0, 0, 0])),
        ("another major version", message(b'v', &[0, 4, 0, 0, 0, 0, 0, 0])),
        ("options we did not send", message(b'v', b"\0\x03\0\0\0\0\0\x01_pq_.x\0")),
        (
            "two negotiations",
            [message(b'v', &[0, 3, 0, 0, 0, 0, 0, 0]), message(b'v', &[0, 3, 0, 0, 0, 0, 0, 0])].concat(),
        ),
        ("a session without authentication", message(b'Z', b"I")),
        ("a key without a secret", after_ok(b'K', &[0, 0, 0, 1])),
        ("a secret too long", after_ok(b'K', &[1; 4 + 257])),
        ("a session in a transaction", after_ok(b'Z', b"T")),
        ("a parameter without a value", after_ok(b'S', b"name\0")),
        ("rows without a request", after_ok(b'D', &[0, 0])),
        ("parameters without end", many_parameters),
        ("notices without end", many_notices),
    ] {
        let error = open_once(&bytes).unwrap_err();
        assert!(matches!(error.cause, DialCause::Protocol(_)), "{what}: {error}");
        assert_eq!(error.client_error().sqlstate(), "08006");
    }
}

#[test]
fn a_long_key_belongs_to_protocol_3_2() {
    let bytes = |negotiated: bool| {
        let mut out = Vec::new();
        if negotiated {
            append(&mut out, b'v', |out| out.extend_from_slice(&[0, 3, 0, 0, 0, 0, 0, 0]));
        }
        authentication_ok(&mut out);
        backend_key_data(&mut out, 1, &[9; 32]);
        ready_for_query(&mut out, b'I');
        identity(&mut out, &[Some(b"acme_db"), Some(b"acme_rw"), Some(b"acme_rw")]);
        out
    };
    let opened = open_once(&bytes(false)).unwrap();
    assert_eq!((opened.secret, opened.minor), (vec![9; 32], 2));
    assert!(open_once(&bytes(true)).is_err());
}

#[test]
fn an_error_response_may_lack_every_field() {
    for body in [&b""[..], b"\0", b"C\0\0", b"Sx", b"C\xff\xff\xff\xff\xff\0\0"] {
        let mut bytes = Vec::new();
        append(&mut bytes, b'E', |out| out.extend_from_slice(body));
        let error = open_once(&bytes).unwrap_err();
        assert!(matches!(error.cause, DialCause::Refused(_)), "{error}");
        assert_eq!(error.client_error().sqlstate(), "08006");
    }
}

/// A server without the password, which answers SCRAM with `challenge` (of the client's nonce) and `last`.
async fn scram(
    place: &SocketFolder,
    challenge: impl Fn(&str) -> Vec<u8>,
    last: &[u8],
) -> (Result<NewConnection, DialError>, usize) {
    let serve = async {
        let mut client = place.accept().await;
        let mut out = Vec::new();
        authentication(&mut out, 10, b"NEWER-THAN-US\0SCRAM-SHA-256\0\0");
        client.write_all(&out).await.unwrap();
        let initial = read_password(&mut client).await.unwrap();
        let initial = String::from_utf8_lossy(&initial).into_owned();
        let nonce = initial.rsplit_once("r=").unwrap().1.to_owned();
        let mut out = Vec::new();
        authentication(&mut out, 11, &challenge(&nonce));
        client.write_all(&out).await.unwrap();
        let answers = usize::from(read_password(&mut client).await.is_ok());
        let _ = client.write_all(last).await;
        answers
    };
    let host = place.host();
    tokio::join!(dial(&host), serve)
}

async fn read_password(client: &mut UnixStream) -> io::Result<Vec<u8>> {
    assert_eq!(client.read_u8().await?, b'p');
    let mut body = vec![0; client.read_u32().await? as usize - 4];
    client.read_exact(&mut body).await?;
    Ok(body)
}

#[test]
fn a_hostile_scram_challenge_is_not_answered() {
    type Challenge = fn(&str) -> Vec<u8>;
    let challenges: [(&str, Challenge); 6] = [
        ("iterations that cost minutes", |nonce| format!("r={nonce}x,s=AAAA,i=2000000000").into()),
        ("no iterations", |nonce| format!("r={nonce}x,s=AAAA,i=0").into()),
        ("a nonce of 20 000 letters", |nonce| format!("r={nonce}{},s=AAAA,i=1", "x".repeat(20_000)).into()),
        ("a nonce that is not ours", |_| b"r=whatever,s=AAAA,i=1".to_vec()),
        ("not a challenge", |_| b"\xff\0".to_vec()),
        ("nothing", |_| Vec::new()),
    ];
    for (what, challenge) in challenges {
        let (opened, answers) = run(async { scram(&SocketFolder::new(), challenge, b"").await });
        assert!(matches!(opened.unwrap_err().cause, DialCause::Protocol(_)), "{what}");
        assert_eq!(answers, 0, "{what}");
    }
}

#[test]
fn a_server_without_the_password_is_rejected() {
    let mut skipped = Vec::new();
    authentication_ok(&mut skipped);
    let mut wrong = Vec::new();
    authentication(&mut wrong, 12, b"v=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=");
    authentication_ok(&mut wrong);
    for last in [skipped, wrong] {
        let challenge = |nonce: &str| format!("r={nonce}x,s=AAAA,i=1").into();
        let (opened, answers) = run(async { scram(&SocketFolder::new(), challenge, &last).await });
        assert!(matches!(opened.unwrap_err().cause, DialCause::Protocol(_)));
        assert_eq!(answers, 1);
    }
}

#[tokio::test]
async fn a_password_is_not_sent_in_clear_over_a_network() {
    let (listener, host) = tcp_host(TlsMode::Disable).await;
    let serve = async {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut ask = Vec::new();
        authentication(&mut ask, 3, b"");
        client.write_all(&ask).await.unwrap();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        heard
    };
    let (opened, heard) = tokio::join!(dial(&host), serve);
    assert!(matches!(opened.unwrap_err().cause, DialCause::Protocol(_)));
    assert!(!heard.windows(PASSWORD.len()).any(|part| part == PASSWORD.as_bytes()));
}

#[tokio::test]
async fn bytes_in_clear_after_the_s_never_become_messages() {
    let (listener, host) = tcp_host(TlsMode::Require).await;
    let serve = async {
        let (mut client, _) = listener.accept().await.unwrap();
        client.read_exact(&mut [0; 8]).await.unwrap();
        client.write_all(&[&b"S"[..], &correct_login()].concat()).await.unwrap();
        let mut heard = Vec::new();
        let _ = client.read_to_end(&mut heard).await;
    };
    let (opened, ()) = tokio::join!(dial(&host), serve);
    assert!(matches!(opened.unwrap_err().cause, DialCause::Tls(_)));
}

#[tokio::test]
async fn a_server_without_tls_is_rejected_where_tls_is_required() {
    for (answer, mode) in [(b"N", TlsMode::Require), (b"N", TlsMode::VerifyFull), (b"E", TlsMode::Prefer)] {
        let (listener, host) = tcp_host(mode).await;
        let serve = async {
            let (mut client, _) = listener.accept().await.unwrap();
            client.read_exact(&mut [0; 8]).await.unwrap();
            client.write_all(answer).await.unwrap();
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).await.unwrap();
            heard.len()
        };
        let (opened, heard) = tokio::join!(dial(&host), serve);
        assert!(matches!(opened.unwrap_err().cause, DialCause::Tls(_) | DialCause::Protocol(_)));
        assert_eq!(heard, 0, "nothing may follow in clear");
    }
}

#[tokio::test]
async fn a_silent_server_costs_the_connect_timeout_and_a_closed_port_costs_nothing() {
    let place = SocketFolder::new();
    let options = DialOptions::for_tests(Duration::from_millis(100));
    let error = dial_with(&place.host(), &options).await.unwrap_err();
    assert!(matches!(error.cause, DialCause::TimedOut(_)), "{error}");

    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let address = HostAddress::Tcp { name: "localhost".to_owned(), port };
    let error = dial(&host(address, TlsMode::Prefer)).await.unwrap_err();
    assert_eq!(
        error.client_error().to_string(),
        "could not connect to the tenant's database: connection refused"
    );

    let address = HostAddress::Unix { directory: PathBuf::from("/nonexistent"), port: 1 };
    let error = dial(&host(address, TlsMode::Prefer)).await.unwrap_err();
    assert!(!error.client_error().to_string().contains("nonexistent"));
    assert!(error.to_string().contains("nonexistent") && !format!("{error:?}").contains(PASSWORD));
}

#[tokio::test]
async fn a_cancel_has_settled_when_the_server_has_closed() {
    let place = SocketFolder::new();
    let options = DialOptions::for_tests(Duration::from_secs(20));
    let host = place.host();
    let serve = async {
        let (mut client, _) = place.listener.accept().await.unwrap();
        let mut request = [0; 12 + 32];
        client.read_exact(&mut request).await.unwrap();
        let mut expected = 44u32.to_be_bytes().to_vec();
        expected.extend_from_slice(&80_877_102u32.to_be_bytes());
        expected.extend_from_slice(&77u32.to_be_bytes());
        expected.extend_from_slice(&[5; 32]);
        assert_eq!(request.as_slice(), expected);
        client
    };
    let cancel = send_cancel(&host, &host.addresses[0], None, 77, &[5; 32], &options);
    tokio::pin!(cancel);
    let client = tokio::select! {
        biased;
        settled = &mut cancel => panic!("settled before the server closed: {settled:?}"),
        client = serve => client,
    };
    drop(client);
    cancel.await.unwrap();

    let options = DialOptions::for_tests(Duration::from_millis(50));
    let error = send_cancel(&host, &host.addresses[0], None, 77, &[5; 4], &options).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(send_cancel(&host, &host.addresses[0], None, 0, &[], &options).await.is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_changed_byte_never_panics_and_never_proves_another_identity(at in any::<prop::sample::Index>(), byte: u8) {
        let mut bytes = correct_login();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        // It may be accepted, unless the two names were changed.
        let opened = open_once(&bytes);
        let names = correct_login().windows(7).enumerate().filter(|(_, part)| *part == b"acme_db" || *part == b"acme_rw")
            .any(|(start, _)| (start..start + 7).contains(&at));
        if names && bytes != correct_login() {
            prop_assert!(opened.is_err());
        }
    }
}
