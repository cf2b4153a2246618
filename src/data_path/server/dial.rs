//! Opens a connection to a server: connects, encrypts, logs in, verifies database and role. Sends cancel
//! requests.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use moka::future::Cache;
use postgres_protocol::message::frontend;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream, lookup_host},
    time::{Instant, timeout},
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
        message::CANCEL_REQUEST,
        stream::{Socket, Stream},
        tls::{
            TlsError,
            towards_servers::{ServerTlsConfigs, Trust},
        },
    },
};

/// While a host's name does not resolve, its last addresses are used for this long…
const LAST_ADDRESSES_LIFE: Duration = Duration::from_secs(60);
/// …and where there are some, the name service has this long to answer.
const LOOKUP_TIME_MAX: Duration = Duration::from_secs(1);
/// Most host names whose addresses are kept.
const LAST_ADDRESSES_MAX: u64 = 4096;

/// Which connection to open.
#[derive(Debug, Clone, Copy)]
pub struct DialTarget<'a> {
    /// The database's host.
    pub host: &'a Host,
    /// The database's name on the host.
    pub database: &'a str,
    /// The role to log in as.
    pub credential: &'a Credential,
    /// The tenant's name, the value of `pglobby.tenant` in its sessions.
    pub tenant: &'a str,
    /// `statement_timeout` at session start; `None`: that of server, database and role.
    pub statement_timeout: Option<Duration>,
    /// Startup parameters of a client; RESET restores them.
    pub startup: &'a Settings,
    /// Called when the host has answered.
    pub on_answer: OnAnswer<'a>,
}

/// Called when a server asks for authentication: its host is up, also if this login fails.
#[derive(Clone, Copy)]
pub struct OnAnswer<'a>(pub &'a (dyn Fn() + Send + Sync));

impl std::fmt::Debug for OnAnswer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnAnswer")
    }
}

/// How connections are opened: one shared value made from the configuration. A reload makes a new one and
/// reads the certificate files again.
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
    /// In the simulation: opens a connection to its host.
    #[cfg(test)]
    pub(in crate::data_path) simulated: Option<SimulatedHost>,
}

/// A host within this process; an error refuses the connection.
#[cfg(test)]
#[derive(Clone)]
pub struct SimulatedHost(pub Arc<dyn Fn() -> io::Result<tokio::io::DuplexStream> + Send + Sync>);

#[cfg(test)]
impl std::fmt::Debug for SimulatedHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimulatedHost")
    }
}

/// A server connection that is logged in, idle and verified to be the target's.
#[derive(Debug)]
pub struct NewConnection {
    /// All received bytes have been read.
    pub stream: Stream,
    /// The server's process number, for a CancelRequest.
    pub process_id: i32,
    /// The key for a CancelRequest: 4 bytes, or up to 256 in protocol 3.2. Empty: the server sent none, and
    /// its queries cannot be cancelled.
    pub secret: Vec<u8>,
    /// Parameters from ParameterStatus, in order, each name once.
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whole NoticeResponse messages from the session's start.
    pub notices: Vec<Vec<u8>>,
    /// Minor version of protocol 3: 0 or 2.
    pub minor: u16,
    /// The role that the session began with, if it is not the login.
    pub start_role: Option<String>,
}

impl DialOptions {
    /// Fails if the certificate for servers cannot be used.
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
            #[cfg(test)]
            simulated: None,
        })
    }
}

#[cfg(test)]
impl DialOptions {
    /// All timeouts are `time_max`.
    pub(in crate::data_path) fn for_tests(time_max: Duration) -> Self {
        Self {
            connect_timeout: time_max,
            cancel_timeout: time_max,
            keepalive: Keepalive {
                idle: Duration::from_secs(30),
                interval: Duration::from_secs(10),
                user_timeout: None,
            },
            tls: Arc::new(ServerTlsConfigs::new(None, None).unwrap()),
            salted_passwords: SaltedPasswords::new(100),
            server_proves_itself: false,
            last_addresses: Cache::new(10),
            simulated: None,
        }
    }
}

/// Opens a connection for `target` within `server_connect_timeout`, name service and login included.
pub async fn open(target: &DialTarget<'_>, options: &DialOptions) -> Result<NewConnection, DialError> {
    // Boxed: inlined into a client's task, it would cost each idle client some kilobytes.
    match timeout(options.connect_timeout, Box::pin(try_all(target, options))).await {
        Ok(outcome) => outcome,
        Err(_) => Err(DialCause::TimedOut(options.connect_timeout)),
    }
    .map_err(|cause| DialError::new(target, cause))
}

/// Asks the server to cancel the query of `process_id`, and returns when the server has closed this
/// connection: from then on the cancel cannot hit a later query. `at` is the address of that server's
/// connection, because a host's name may stand for several servers (`None`: a Unix socket). Errors: The
/// socket's; [`io::ErrorKind::TimedOut`] after `cancel_timeout`, when the cancel may still be under way;
/// [`io::ErrorKind::InvalidInput`] if the server gave no secret.
pub async fn send_cancel(
    host: &Host,
    at: Option<SocketAddr>,
    process_id: i32,
    secret: &[u8],
    options: &DialOptions,
) -> io::Result<()> {
    let request = cancel_request(process_id, secret)?;
    let sent = async { request_cancel(connect_for_cancel(host, at, options).await?, &request).await };
    let outcome = timeout(options.cancel_timeout, Box::pin(sent)).await;
    outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The same for a node, which passes it on to its session. Errors: [`io::ErrorKind::NotConnected`] if the node could not
/// be reached `within` this time: then it has got nothing.
pub async fn pass_on_cancel(
    node: &Host,
    within: Duration,
    process_id: i32,
    secret: &[u8],
    options: &DialOptions,
) -> io::Result<()> {
    let request = cancel_request(process_id, secret)?;
    let connected = timeout(within, Box::pin(connect_for_cancel(node, None, options))).await;
    let stream = match connected {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(io::Error::new(io::ErrorKind::NotConnected, error)),
        Err(_) => return Err(io::ErrorKind::NotConnected.into()),
    };
    let outcome = timeout(options.cancel_timeout, Box::pin(request_cancel(stream, &request))).await;
    outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn cancel_request(process_id: i32, secret: &[u8]) -> io::Result<Vec<u8>> {
    let length = i32::try_from(secret.len() + 12).ok().filter(|_| !secret.is_empty());
    let length = length.ok_or(io::ErrorKind::InvalidInput)?;
    let mut request = Vec::with_capacity(secret.len() + 12);
    for field in [length.to_be_bytes(), CANCEL_REQUEST.to_be_bytes(), process_id.to_be_bytes()] {
        request.extend_from_slice(&field);
    }
    request.extend_from_slice(secret);
    Ok(request)
}

async fn connect_for_cancel(
    host: &Host,
    at: Option<SocketAddr>,
    options: &DialOptions,
) -> io::Result<Stream> {
    // A cancel has no password: where TLS is optional, plain text is good enough.
    let (first, fallback) = match encryptions(host) {
        (Encryption::Plain, Some(_)) => (Encryption::IfOffered, Some(Encryption::Plain)),
        other => other,
    };
    let stream = match (connect(host, at, first, options).await, fallback) {
        (Err(DialCause::Tls(_)), Some(fallback)) => connect(host, at, fallback, options).await,
        (outcome, _) => outcome,
    };
    stream.map_err(|cause| match cause {
        DialCause::Unreachable(error) | DialCause::Unresolved(error) => error,
        other => io::Error::other(other.to_string()),
    })
}

async fn request_cancel(mut stream: Stream, request: &[u8]) -> io::Result<()> {
    stream.write_all(request).await?;
    stream.flush().await?;
    // The server answers by closing the connection, perhaps with a reset or without TLS close_notify.
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

/// Encryption of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encryption {
    Plain,
    IfOffered,
    Required,
}

/// The first and the second attempt, as libpq understands `sslmode`, which does not apply to Unix sockets.
fn encryptions(host: &Host) -> (Encryption, Option<Encryption>) {
    match (&host.address, host.tls_mode) {
        (HostAddress::Unix { .. }, _) | (_, TlsMode::Disable) => (Encryption::Plain, None),
        (_, TlsMode::Allow) => (Encryption::Plain, Some(Encryption::Required)),
        (_, TlsMode::Prefer) => (Encryption::IfOffered, Some(Encryption::Plain)),
        (_, TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull) => (Encryption::Required, None),
    }
}

async fn try_all(target: &DialTarget<'_>, options: &DialOptions) -> Result<NewConnection, DialCause> {
    let (first, fallback) = encryptions(target.host);
    let mut encrypted = first == Encryption::Required;
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

/// Whether the second attempt may succeed: TLS failed, or the server has no rule for this kind of connection
/// (28000). libpq makes it after any error; a wrong password would stay wrong.
fn worth_another_try(cause: &DialCause, encrypted: bool, fallback: Encryption) -> bool {
    match cause {
        DialCause::Tls(_) => fallback == Encryption::Plain,
        DialCause::Refused(error) => {
            error.code() == Some("28000") && encrypted == (fallback == Encryption::Plain)
        }
        _ => false,
    }
}

/// `at`: connects to this address only.
async fn connect(
    host: &Host,
    at: Option<SocketAddr>,
    encryption: Encryption,
    options: &DialOptions,
) -> Result<Stream, DialCause> {
    #[cfg(test)]
    if let Some(host) = &options.simulated {
        return Ok((host.0)()?.into());
    }
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

/// Tries all addresses of a name, each for its share of the time: a silent one leaves time for others.
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

/// The addresses of a host; the last known ones where the name service fails or is slow.
async fn resolve(name: &str, port: u16, options: &DialOptions) -> Result<Vec<SocketAddr>, DialCause> {
    let key = (name.to_owned(), port);
    let last = options.last_addresses.get(&key).await;
    let time_max = if last.is_some() { LOOKUP_TIME_MAX } else { options.connect_timeout };
    let failure = match timeout(time_max, lookup_host((name, port))).await {
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

/// A lost server is noticed by keepalives when idle, and by TCP_USER_TIMEOUT while bytes wait.
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
    // Exactly one byte: further bytes in clear are read as TLS and fail there, and never become a message
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
        // No certificate has such a name (an address with a zone); that matters only where names are
        // compared.
        Err(_) if trust != Trust::AuthorityAndName => IpAddr::from(Ipv4Addr::UNSPECIFIED).into(),
        Err(error) => return Err(failed(&error)),
    };
    let config = tls_config(&options.tls, trust, host.tls_root_ca.clone()).await?;
    let connector = tokio_rustls::TlsConnector::from(config);
    let tls = connector.connect(name, Socket::Tcp(socket)).await.map_err(|error| failed(&error))?;
    Ok(Stream::Tls(Box::new(tls.into())))
}

/// Off the reactor: the first use reads files, such as the system's authorities.
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

/// As in libpq, `require` with configured authorities means `verify-ca`.
fn trust(host: &Host, options: &DialOptions) -> Trust {
    match host.tls_mode {
        TlsMode::VerifyFull => Trust::AuthorityAndName,
        TlsMode::VerifyCa => Trust::Authority,
        TlsMode::Require if options.tls.names_authorities(host.tls_root_ca.as_deref()) => Trust::Authority,
        _ => Trust::AnyCertificate,
    }
}
