//! Opens a connection to a server: connects, encrypts, logs in, verifies database and role. Sends cancel
//! requests.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
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
    address_roles::{AddressRole, AddressRoles},
    dial_error::{DialCause, DialError},
    login,
    scram::SaltedPasswords,
};
use crate::{
    config::{Config, Keepalive, TlsMode},
    data_path::{
        host_address::HostAddress,
        session_state::Settings,
        tenant::{Credential, Host},
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
/// An address that did not answer has this long, where the host has others to ask.
const SILENT_ADDRESS_TIME_MAX: Duration = Duration::from_secs(1);
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
    /// What is known of the host's addresses; what is found out is noted there.
    pub roles: &'a AddressRoles,
    /// Called when the host has answered; where it has several addresses, its primary.
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
    /// The host's address that it was opened at.
    pub at: HostAddress,
    /// The server is in recovery. Asked only where the host has several addresses.
    pub is_standby: bool,
    /// [`AddressRoles::changes`] when the server had said that it is the primary.
    pub primary_changes: u64,
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

/// Opens a connection for `target` within `server_connect_timeout`, name service and login included. Where the host
/// has several addresses, to its primary.
pub async fn open(target: &DialTarget<'_>, options: &DialOptions) -> Result<NewConnection, DialError> {
    // Boxed: inlined into a client's task, it would cost each idle client some kilobytes.
    match timeout(options.connect_timeout, Box::pin(find(target, options))).await {
        Ok(outcome) => outcome,
        Err(_) => Err(DialCause::TimedOut(options.connect_timeout)),
    }
    .map_err(|cause| DialError::new(target, cause))
}

/// Asks the server to cancel the query of `process_id`, and returns when the server has closed this
/// connection: from then on the cancel cannot hit a later query. `at` is the host's address that the server was opened
/// at, and `peer` that of its connection, because a name may stand for several servers (`None`: a Unix socket). Errors: The
/// socket's; [`io::ErrorKind::TimedOut`] after `cancel_timeout`, when the cancel may still be under way;
/// [`io::ErrorKind::InvalidInput`] if the server gave no secret.
pub async fn send_cancel(
    host: &Host,
    at: &HostAddress,
    peer: Option<SocketAddr>,
    process_id: i32,
    secret: &[u8],
    options: &DialOptions,
) -> io::Result<()> {
    let request = cancel_request(process_id, secret)?;
    let to = Place { host, address: at, peer, within: options.cancel_timeout };
    let sent = async { request_cancel(connect_for_cancel(&to, options).await?, &request).await };
    let outcome = timeout(options.cancel_timeout, Box::pin(sent)).await;
    outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The same for a node, which passes it on to its session. Errors: [`io::ErrorKind::NotConnected`] if the node could not
/// be reached `within` this time: then it has got nothing.
pub async fn pass_on_cancel(
    node: &Host,
    at: &HostAddress,
    within: Duration,
    process_id: i32,
    secret: &[u8],
    options: &DialOptions,
) -> io::Result<()> {
    let request = cancel_request(process_id, secret)?;
    let to = Place { host: node, address: at, peer: None, within };
    let connected = timeout(within, Box::pin(connect_for_cancel(&to, options))).await;
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

/// Where one connection goes.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    host: &'a Host,
    /// One of the host's.
    address: &'a HostAddress,
    /// One address of its name; `None`: any.
    peer: Option<SocketAddr>,
    /// The time for all addresses of its name.
    within: Duration,
}

async fn connect_for_cancel(to: &Place<'_>, options: &DialOptions) -> io::Result<Stream> {
    // A cancel has no password: where TLS is optional, plain text is good enough.
    let (first, fallback) = match encryptions(to) {
        (Encryption::Plain, Some(_)) => (Encryption::IfOffered, Some(Encryption::Plain)),
        other => other,
    };
    let stream = match (connect(to, first, options).await, fallback) {
        (Err(DialCause::Tls(_)), Some(fallback)) => connect(to, fallback, options).await,
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
fn encryptions(to: &Place<'_>) -> (Encryption, Option<Encryption>) {
    match (to.address, to.host.tls_mode) {
        (HostAddress::Unix { .. }, _) | (_, TlsMode::Disable) => (Encryption::Plain, None),
        (_, TlsMode::Allow) => (Encryption::Plain, Some(Encryption::Required)),
        (_, TlsMode::Prefer) => (Encryption::IfOffered, Some(Encryption::Plain)),
        (_, TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull) => (Encryption::Required, None),
    }
}

async fn find(target: &DialTarget<'_>, options: &DialOptions) -> Result<NewConnection, DialCause> {
    match &*target.host.addresses {
        [only] => try_address(target, only, options.connect_timeout, options).await,
        several => find_primary(target, several, options).await,
    }
}

/// Goes through the addresses until one says that it accepts writes. What an address says of the role or the
/// database counts (a wrong password stays wrong), but not what a standby says, which may lag behind.
async fn find_primary(
    target: &DialTarget<'_>,
    addresses: &[HostAddress],
    options: &DialOptions,
) -> Result<NewConnection, DialCause> {
    // A little is left to say what was found.
    let deadline = Instant::now() + options.connect_timeout.mul_f64(0.9);
    let order = target.roles.order();
    let mut found = Vec::new();
    for (tried, &(number, role)) in order.iter().enumerate() {
        let Some(address) = addresses.get(number) else { continue };
        let left = deadline.saturating_duration_since(Instant::now());
        let mut within = left / u32::try_from(order.len() - tried).unwrap_or(u32::MAX);
        if role == AddressRole::Silent {
            within = within.min(SILENT_ADDRESS_TIME_MAX);
        }
        let answered = AtomicBool::new(false);
        let on_answer = || answered.store(true, Ordering::Relaxed);
        let asked = DialTarget { on_answer: OnAnswer(&on_answer), ..*target };
        let outcome = timeout(within, try_address(&asked, address, within, options)).await;
        let cause = match outcome.unwrap_or(Err(DialCause::TimedOut(within))) {
            Ok(mut opened) if opened.is_standby => {
                target.roles.found(number, AddressRole::Standby);
                let _ = opened.stream.write_all(&[b'X', 0, 0, 0, 4]).await;
                DialCause::Standby
            }
            Ok(opened) => {
                let primary_changes = target.roles.found(number, AddressRole::Primary);
                (target.on_answer.0)();
                return Ok(NewConnection { primary_changes, ..opened });
            }
            Err(cause) if cause.is_outage() => {
                target.roles.found(number, AddressRole::Silent);
                cause
            }
            Err(cause) if role == AddressRole::Standby => cause,
            Err(cause) => {
                if answered.into_inner() {
                    (target.on_answer.0)();
                }
                return Err(cause);
            }
        };
        found.push((address.clone(), cause));
    }
    Err(DialCause::NoPrimary(found))
}

async fn try_address(
    target: &DialTarget<'_>,
    address: &HostAddress,
    within: Duration,
    options: &DialOptions,
) -> Result<NewConnection, DialCause> {
    let to = Place { host: target.host, address, peer: None, within };
    let (first, fallback) = encryptions(&to);
    let mut encrypted = first == Encryption::Required;
    let outcome = match connect(&to, first, options).await {
        Ok(stream) => {
            encrypted = stream.is_tls();
            login::log_in(stream, target, address, options).await
        }
        Err(cause) => Err(cause),
    };
    match (outcome, fallback) {
        (Err(first), Some(fallback)) if worth_another_try(&first, encrypted, fallback) => {
            let again = async {
                let stream = connect(&to, fallback, options).await?;
                login::log_in(stream, target, address, options).await
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

async fn connect(to: &Place<'_>, encryption: Encryption, options: &DialOptions) -> Result<Stream, DialCause> {
    #[cfg(test)]
    if let Some(host) = &options.simulated {
        return Ok((host.0)()?.into());
    }
    match to.address {
        HostAddress::Unix { directory, port } => {
            Ok(UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).await?.into())
        }
        HostAddress::Tcp { name, port } => {
            let socket = match to.peer {
                Some(address) => TcpStream::connect(address).await?,
                None => connect_tcp(name, *port, to.within, options).await?,
            };
            tune(&socket, options)?;
            encrypt(socket, to.host, name, encryption, options).await
        }
    }
}

/// Tries all addresses of a name, each for its share of the time: a silent one leaves time for others.
async fn connect_tcp(
    name: &str,
    port: u16,
    within: Duration,
    options: &DialOptions,
) -> Result<TcpStream, DialCause> {
    let deadline = Instant::now() + within;
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
    let tls = connector.connect(name, Socket::Tcp(socket)).await.map_err(|error| match error.kind() {
        // A server that goes down. Where TLS is optional, one that cannot speak it.
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            if encryption == Encryption::Required =>
        {
            DialCause::Unreachable(error)
        }
        _ => failed(&error),
    })?;
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
