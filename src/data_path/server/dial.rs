//! Opening a connection to a server: reach it, encrypt, log in, prove whose it is.
//!
//! Used when a pool grows and when a query is cancelled, never while a query runs on a connection that is there.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use moka::future::Cache;
use postgres_protocol::message::frontend;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream, lookup_host},
    time::timeout,
};

use super::{
    dial_error::{DialCause, DialError},
    login,
    scram::SaltedPasswords,
};
use crate::{
    config::{Config, Keepalive, TlsMode},
    data_path::{
        session_state::Settings,
        tenant::{Credential, Host, HostAddress},
    },
    wire::{
        stream::{Socket, Stream},
        tls::{
            TlsError,
            towards_servers::{ServerTlsConfigs, Trust},
        },
    },
};

/// While a host's name does not resolve, its last addresses serve for this long…
const LAST_ADDRESSES_LIFE: Duration = Duration::from_secs(60);
/// …and where there are such, this is how long the name service is waited for.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(1);
/// Host names whose addresses are remembered.
const LAST_ADDRESSES_MAX: u64 = 4096;

/// The code of a CancelRequest (PostgreSQL documentation, "Message Formats").
const CANCEL_REQUEST: i32 = 80_877_102;

/// Whose connection is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Where the database lives.
    pub host: &'a Host,
    /// The database on that host.
    pub database: &'a str,
    /// The role to log in as.
    pub credential: &'a Credential,
    /// What `pglobby.tenant` is in its sessions: SHOW and current_setting find it there.
    pub tenant: &'a str,
    /// What `statement_timeout` is in its sessions until they set it; `None`: as server, database and role have it.
    pub statement_timeout: Option<Duration>,
    /// What a client has asked for at startup: RESET goes back to it.
    pub startup: &'a Settings,
    /// Who is told that the host is up.
    pub on_answer: OnAnswer<'a>,
}

/// Called when a server asks for a proof of identity: its host is up and takes connections, whatever comes of this one.
#[derive(Clone, Copy)]
pub struct OnAnswer<'a>(pub &'a (dyn Fn() + Send + Sync));

impl std::fmt::Debug for OnAnswer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnAnswer")
    }
}

/// How connections are opened; made once from the configuration and shared. A reload makes a new one, which reads the
/// files of certificates and authorities again.
#[derive(Debug)]
pub struct DialOptions {
    pub(in crate::data_path) connect_timeout: Duration,
    cancel_timeout: Duration,
    keepalive: Keepalive,
    tls: Arc<ServerTlsConfigs>,
    pub(super) salted_passwords: SaltedPasswords,
    /// `server_require_auth = "scram-sha-256"`.
    pub(super) server_proves_itself: bool,
    last_addresses: Cache<(String, u16), Vec<SocketAddr>>,
}

/// A server connection, logged in, idle, and proved to be the target's.
#[derive(Debug)]
pub struct Opened {
    /// Nothing that was sent is unread.
    pub stream: Stream,
    /// What a CancelRequest names.
    pub process_id: i32,
    /// What a CancelRequest proves itself with: 4 bytes, or up to 256 in protocol 3.2. Empty: the server gave none,
    /// its queries cannot be cancelled.
    pub secret: Vec<u8>,
    /// As ParameterStatus reported them, in that order, each name once.
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// NoticeResponse messages, whole, that came while the session started.
    pub notices: Vec<Vec<u8>>,
    /// Of protocol 3, as negotiated: 0 or 2.
    pub minor: u16,
}

impl DialOptions {
    /// # Errors
    /// [`TlsError`] where the certificate we are to present to servers cannot be used.
    pub fn new(config: &Config) -> Result<Self, TlsError> {
        let tls = &config.server_tls;
        let identity = tls.cert_file.as_deref().zip(tls.key_file.as_deref());
        Ok(Self {
            connect_timeout: config.timeouts.server_connect,
            cancel_timeout: config.timeouts.cancel,
            keepalive: config.timeouts.server_keepalive,
            tls: Arc::new(ServerTlsConfigs::new(tls.ca_file.clone(), identity)?),
            salted_passwords: SaltedPasswords::new(config.limits.directory_cache_max),
            server_proves_itself: config.server_proves_itself,
            last_addresses: Cache::builder()
                .max_capacity(LAST_ADDRESSES_MAX)
                .time_to_live(LAST_ADDRESSES_LIFE)
                .build(),
        })
    }
}

#[cfg(test)]
impl DialOptions {
    /// Every wait as long as `patience`.
    pub(super) fn for_tests(patience: Duration) -> Self {
        Self {
            connect_timeout: patience,
            cancel_timeout: patience,
            keepalive: Keepalive {
                idle: Duration::from_secs(30),
                interval: Duration::from_secs(10),
                user_timeout: None,
            },
            tls: Arc::new(ServerTlsConfigs::new(None, None).unwrap()),
            salted_passwords: SaltedPasswords::new(100),
            server_proves_itself: false,
            last_addresses: Cache::new(10),
        }
    }
}

/// Opens a connection for `target`; takes `server_connect_timeout` at most, name service and login included.
///
/// # Errors
/// [`DialError`]; whatever had been opened is closed.
pub async fn open(target: &Target<'_>, options: &DialOptions) -> Result<Opened, DialError> {
    // Boxed: inlined into a client's task it would cost every idle client some kilobytes.
    match timeout(options.connect_timeout, Box::pin(try_all(target, options))).await {
        Ok(outcome) => outcome,
        Err(_) => Err(DialCause::TimedOut(options.connect_timeout)),
    }
    .map_err(|cause| DialError::new(target, cause))
}

/// Asks the server to cancel what `process_id` runs, over the transport its session would have, `at` the address where that
/// has it (a host's name may have several, each another server; `None`: a Unix socket), and returns when the server has closed that connection: from then on the cancel can hit nobody else.
///
/// # Errors
/// The socket's own; [`io::ErrorKind::TimedOut`] where `cancel_timeout` passed, and then the cancel may still be
/// under way; [`io::ErrorKind::InvalidInput`] where the server gave no secret.
pub async fn send_cancel(
    host: &Host,
    at: Option<SocketAddr>,
    process_id: i32,
    secret: &[u8],
    options: &DialOptions,
) -> io::Result<()> {
    let length = i32::try_from(secret.len() + 12).ok().filter(|_| !secret.is_empty());
    let Some(length) = length else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mut request = Vec::with_capacity(secret.len() + 12);
    for field in [length, CANCEL_REQUEST, process_id] {
        request.extend_from_slice(&field.to_be_bytes());
    }
    request.extend_from_slice(secret);
    let settled = timeout(options.cancel_timeout, Box::pin(cancel(host, at, &request, options)));
    settled.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn cancel(
    host: &Host,
    at: Option<SocketAddr>,
    request: &[u8],
    options: &DialOptions,
) -> io::Result<()> {
    // A cancel bears no password: where TLS is a wish only, either way will do.
    let (first, fallback) = match encryptions(host) {
        (Encryption::Plain, Some(_)) => (Encryption::IfOffered, Some(Encryption::Plain)),
        other => other,
    };
    let stream = match (connect(host, at, first, options).await, fallback) {
        (Err(DialCause::Tls(_)), Some(fallback)) => connect(host, at, fallback, options).await,
        (outcome, _) => outcome,
    };
    let mut stream = stream.map_err(|cause| match cause {
        DialCause::Unreachable(error) | DialCause::Unresolved(error) => error,
        other => io::Error::other(other.to_string()),
    })?;
    stream.write_all(request).await?;
    stream.flush().await?;
    // The server answers by closing. Without TLS's own farewell, or by a reset, it has closed all the same.
    let mut ignored = [0; 64];
    loop {
        match stream.read(&mut ignored).await {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) => {
                use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
                let closed = matches!(error.kind(), ConnectionReset | UnexpectedEof | BrokenPipe);
                return if closed { Ok(()) } else { Err(error) };
            }
        }
    }
}

/// One try at encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encryption {
    Plain,
    IfOffered,
    Demanded,
}

/// What to try first, and what then: libpq's meaning of `sslmode`, which never applies to Unix sockets.
fn encryptions(host: &Host) -> (Encryption, Option<Encryption>) {
    match (&host.address, host.tls_mode) {
        (HostAddress::Unix { .. }, _) | (_, TlsMode::Disable) => (Encryption::Plain, None),
        (_, TlsMode::Allow) => (Encryption::Plain, Some(Encryption::Demanded)),
        (_, TlsMode::Prefer) => (Encryption::IfOffered, Some(Encryption::Plain)),
        (_, TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull) => (Encryption::Demanded, None),
    }
}

async fn try_all(target: &Target<'_>, options: &DialOptions) -> Result<Opened, DialCause> {
    let (first, fallback) = encryptions(target.host);
    let mut encrypted = first == Encryption::Demanded;
    let outcome = match connect(target.host, None, first, options).await {
        Ok(stream) => {
            encrypted = stream.is_tls();
            login::log_in(stream, target, options).await
        }
        Err(cause) => Err(cause),
    };
    match (outcome, fallback) {
        (Err(first), Some(fallback)) if worth_another_try(&first, encrypted, fallback) => {
            let again = async {
                let stream = connect(target.host, None, fallback, options).await?;
                login::log_in(stream, target, options).await
            };
            again.await.map_err(|then| DialCause::BothWays { first: Box::new(first), then: Box::new(then) })
        }
        (outcome, _) => outcome,
    }
}

/// Whether the other kind of connection may fare better: TLS failed, or the server has no rule for connections of
/// this kind (28000). libpq tries again after every refusal; a wrong password stays wrong.
fn worth_another_try(cause: &DialCause, encrypted: bool, fallback: Encryption) -> bool {
    match cause {
        DialCause::Tls(_) => fallback == Encryption::Plain,
        DialCause::Refused(error) => {
            error.code() == Some("28000") && encrypted == (fallback == Encryption::Plain)
        }
        _ => false,
    }
}

/// `at`: one of the host's addresses, and no other.
async fn connect(
    host: &Host,
    at: Option<SocketAddr>,
    encryption: Encryption,
    options: &DialOptions,
) -> Result<Stream, DialCause> {
    match &host.address {
        HostAddress::Unix { directory, port } => {
            Ok(UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).await?.into())
        }
        HostAddress::Tcp { name, port } => {
            let socket = match at {
                Some(address) => TcpStream::connect(address).await?,
                None => connect_tcp(name, *port, options).await?,
            };
            tune(&socket, options)?;
            encrypt(socket, host, name, encryption, options).await
        }
    }
}

/// Tries a name's addresses one after another, each for its share of the time, so that one that swallows packets does
/// not keep the others from being tried.
async fn connect_tcp(name: &str, port: u16, options: &DialOptions) -> Result<TcpStream, DialCause> {
    let deadline = Instant::now() + options.connect_timeout;
    let addresses = resolve(name, port, options).await?;
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (at, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - at).unwrap_or(u32::MAX);
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => failure = error,
            Err(_) => failure = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failure.into())
}

/// The addresses of a host; the last ones that were found, where the name service fails or dawdles.
async fn resolve(name: &str, port: u16, options: &DialOptions) -> Result<Vec<SocketAddr>, DialCause> {
    let key = (name.to_owned(), port);
    let last = options.last_addresses.get(&key).await;
    let patience = if last.is_some() { LOOKUP_PATIENCE } else { options.connect_timeout };
    let failure = match timeout(patience, lookup_host((name, port))).await {
        Ok(Ok(found)) => {
            let found: Vec<_> = found.collect();
            options.last_addresses.insert(key, found.clone()).await;
            return Ok(found);
        }
        Ok(Err(error)) => error,
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    last.ok_or(DialCause::Unresolved(failure))
}

/// A server that vanishes without a word is noticed: by keepalives when idle, by TCP_USER_TIMEOUT while bytes wait to
/// be acknowledged.
fn tune(socket: &TcpStream, options: &DialOptions) -> io::Result<()> {
    socket.set_nodelay(true)?;
    options.keepalive.apply(&SockRef::from(socket))
}

async fn encrypt(
    mut socket: TcpStream,
    host: &Host,
    name: &str,
    encryption: Encryption,
    options: &DialOptions,
) -> Result<Stream, DialCause> {
    if encryption == Encryption::Plain {
        return Ok(socket.into());
    }
    let mut request = bytes::BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).await?;
    // Exactly one byte: what follows it in clear is then read as TLS, fails there, and never becomes a message
    // (CVE-2021-23222).
    match (socket.read_u8().await?, encryption) {
        (b'S', _) => {}
        (b'N', Encryption::IfOffered) => return Ok(socket.into()),
        (b'N', _) => return Err(DialCause::Tls("the server does not offer it".to_owned())),
        (other, _) => {
            return Err(DialCause::Protocol(format!("SSLRequest was answered with byte {other}")));
        }
    }
    let failed = |error: &dyn std::fmt::Display| DialCause::Tls(error.to_string());
    let trust = trust(host, options);
    let name = match ServerName::try_from(name.to_owned()) {
        Ok(name) => name,
        // What no certificate can bear (an address with a zone) matters only where names are compared.
        Err(_) if trust != Trust::AuthorityAndName => IpAddr::from(Ipv4Addr::UNSPECIFIED).into(),
        Err(error) => return Err(failed(&error)),
    };
    let config = tls_config(&options.tls, trust, host.tls_root_ca.clone()).await?;
    let connector = tokio_rustls::TlsConnector::from(config);
    let tls = connector.connect(name, Socket::Tcp(socket)).await.map_err(|error| failed(&error))?;
    Ok(Stream::Tls(Box::new(tls.into())))
}

/// Off the reactor: at its first use it reads files, the system's authorities among them.
async fn tls_config(
    configs: &Arc<ServerTlsConfigs>,
    trust: Trust,
    authorities: Option<PathBuf>,
) -> Result<Arc<ClientConfig>, DialCause> {
    let configs = configs.clone();
    let failed = |error: &dyn std::fmt::Display| DialCause::Tls(error.to_string());
    tokio::task::spawn_blocking(move || configs.get(trust, authorities.as_deref()))
        .await
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))
}

/// As libpq: `require` with authorities named means `verify-ca`.
fn trust(host: &Host, options: &DialOptions) -> Trust {
    match host.tls_mode {
        TlsMode::VerifyFull => Trust::AuthorityAndName,
        TlsMode::VerifyCa => Trust::Authority,
        TlsMode::Require if options.tls.names_authorities(host.tls_root_ca.as_deref()) => Trust::Authority,
        _ => Trust::Anybody,
    }
}
