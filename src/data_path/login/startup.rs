//! Receives the first request of a client: negotiates TLS, then reads a startup packet or a cancel request.
//!
//! The input is not trusted. At most [`STARTUP_BYTES_MAX`] are read, memory grows with the bytes that have
//! arrived and not with an announced length, and bytes sent in clear are never used after the TLS handshake
//! (CVE-2021-23214).
//!
//! Source: PostgreSQL documentation, "Start-up", "SSL Session Encryption", "Message Formats"; error texts
//! from `ProcessStartupPacket`.

use std::{net::IpAddr, sync::Arc};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::startup_options::{names_tenant, settings_of_options};
use crate::{
    config::TlsMode,
    error::ClientError,
    wire::{
        frame::cstr,
        message::{CANCEL_REQUEST, append, append_cstr},
        stream::{Socket, Stream},
        tls::towards_clients::{ClientTlsAcceptor, TlsSnapshot},
    },
};

/// The longest message before the login is complete, in bytes; PostgreSQL's own limit.
pub const STARTUP_BYTES_MAX: usize = 10_000;

/// Room in the buffer for each read during a login, so that each of its messages takes one read. (By default
/// a full buffer grows by 64 bytes, less than a SASL response.)
pub const LOGIN_READ_BYTES: usize = 512;

/// The newest supported minor version of protocol 3.
pub const MINOR_NEWEST: u16 = 2;

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;

/// Requests for encryption that a client may send before its startup packet: one of each, and one to spare.
const REQUESTS_MAX: usize = 3;

/// How clients may encrypt their connections.
#[derive(Debug, Clone, Copy)]
pub struct TlsRules<'a> {
    /// Answers TLS handshakes; `None`: no TLS.
    pub acceptor: Option<&'a ClientTlsAcceptor>,
    /// A client without TLS is refused, except over a Unix socket.
    pub required: bool,
}

impl<'a> TlsRules<'a> {
    /// The rules of `client_tls_mode`.
    pub fn new(acceptor: Option<&'a ClientTlsAcceptor>, mode: TlsMode) -> Self {
        Self { acceptor, required: mode.requires_tls() }
    }
}

/// The first request on a connection.
#[derive(Debug)]
pub enum FirstRequest {
    Login(StartupPacket),
    /// A cancel request. Its connection is closed when the cancel has reached the server.
    Cancel {
        process_id: i32,
        secret: Vec<u8>,
    },
    /// The client closed the connection before it sent a request; port checks do.
    Closed,
}

/// The contents of a startup packet.
#[derive(Debug, Default)]
pub struct StartupPacket {
    /// Bytes received after the packet.
    pub unread: Vec<u8>,
    /// The minor version of protocol 3 in use.
    pub minor: u16,
    pub user: String,
    pub database: Option<String>,
    /// All other parameters; those in `options` come first, because PostgreSQL applies them first.
    pub settings: Vec<(String, String)>,
    /// `pglobby.tenant` in `options`.
    pub tenant_hint: Option<String>,
    /// The result of the TLS handshake; `None`: no TLS.
    pub tls: Option<TlsFacts>,
    /// The client's address; `None`: a Unix socket.
    pub peer: Option<IpAddr>,
    /// Bytes for the next write: NegotiateProtocolVersion.
    pub unsent: Vec<u8>,
}

/// The result of a TLS handshake.
#[derive(Debug)]
pub struct TlsFacts {
    /// The server name (SNI) that the client sent.
    pub server_name: Option<String>,
    /// The certificate of this connection, with its data for channel binding.
    pub snapshot: Arc<TlsSnapshot>,
}

/// Why a login ends without a session.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// The client receives this error.
    #[error("{0}")]
    Refused(#[from] ClientError),
    /// The bytes are no startup packet. The connection is closed without an error, as PostgreSQL does.
    #[error("{0}")]
    Garbled(&'static str),
    /// The connection is lost; no error can be sent.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Reads the first request. `stream` becomes a TLS stream if the client asks for TLS.
pub async fn receive(
    stream: &mut Stream,
    peer: Option<IpAddr>,
    rules: TlsRules<'_>,
) -> Result<FirstRequest, StartupError> {
    let mut tls = None;
    if let (Some(acceptor), true) = (rules.acceptor, starts_with_tls(stream).await?) {
        tls = Some(encrypt(stream, acceptor, true).await?);
    }
    let mut buffer = Vec::new();
    for _ in 0..=REQUESTS_MAX {
        let Some((code, body)) = packet(stream, &mut buffer).await? else {
            return Ok(FirstRequest::Closed);
        };
        match code {
            SSL_REQUEST | GSSENC_REQUEST if !buffer.is_empty() => {
                let words = "received unencrypted data after SSL request";
                return Err(ClientError::ProtocolViolation(words.into()).into());
            }
            SSL_REQUEST => match rules.acceptor {
                Some(acceptor) if tls.is_none() && peer.is_some() => {
                    stream.write_all(b"S").await?;
                    tls = Some(encrypt(stream, acceptor, false).await?);
                }
                _ => stream.write_all(b"N").await?,
            },
            GSSENC_REQUEST => stream.write_all(b"N").await?,
            CANCEL_REQUEST => return cancel_request(&body),
            _ => {
                if rules.required && tls.is_none() && peer.is_some() {
                    return Err(ClientError::EncryptionRequired.into());
                }
                let mut packet = StartupPacket { unread: buffer, tls, peer, ..StartupPacket::default() };
                read_startup_packet(code, &body, &mut packet)?;
                return Ok(FirstRequest::Login(packet));
            }
        }
    }
    Err(ClientError::ProtocolViolation("too many requests for encryption".into()).into())
}

/// Returns whether the first byte starts a TLS handshake. The byte stays unread.
async fn starts_with_tls(stream: &Stream) -> std::io::Result<bool> {
    let Stream::Plain(Socket::Tcp(tcp)) = stream else { return Ok(false) };
    let mut first = [0];
    Ok(tcp.peek(&mut first).await? == 1 && first == [0x16])
}

async fn encrypt(
    stream: &mut Stream,
    acceptor: &ClientTlsAcceptor,
    direct: bool,
) -> std::io::Result<TlsFacts> {
    let Stream::Plain(socket) = std::mem::replace(stream, Stream::Plain(Socket::Gone)) else {
        return Err(std::io::ErrorKind::InvalidData.into());
    };
    let accepted = Box::pin(acceptor.accept(socket)).await?;
    if direct && !accepted.alpn {
        let words = "direct TLS without the application protocol \"postgresql\" (ALPN)";
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, words));
    }
    *stream = accepted.stream;
    Ok(TlsFacts { server_name: accepted.server_name, snapshot: accepted.snapshot })
}

/// Returns the code and the body of the next packet without a type byte; `None` at the end of the connection.
/// Bytes after the packet stay in `buffer`.
async fn packet(stream: &mut Stream, buffer: &mut Vec<u8>) -> Result<Option<(u32, Vec<u8>)>, StartupError> {
    loop {
        if let Some((length, _)) = buffer.split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*length) as usize;
            if !(8..=STARTUP_BYTES_MAX).contains(&length) {
                return Err(StartupError::Garbled("invalid length of startup packet"));
            }
            if buffer.len() >= length {
                let rest = buffer.split_off(length);
                let packet = std::mem::replace(buffer, rest);
                let code = packet.get(4..).and_then(|bytes| bytes.split_first_chunk::<4>());
                return Ok(code.map(|(code, body)| (u32::from_be_bytes(*code), body.to_vec())));
            }
        }
        buffer.reserve(LOGIN_READ_BYTES);
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

fn cancel_request(body: &[u8]) -> Result<FirstRequest, StartupError> {
    match body.split_first_chunk::<4>() {
        Some((process_id, secret)) if (4..=256).contains(&secret.len()) => {
            Ok(FirstRequest::Cancel { process_id: i32::from_be_bytes(*process_id), secret: secret.to_vec() })
        }
        _ => Err(StartupError::Garbled("invalid length of cancel request packet")),
    }
}

/// Reads a startup packet after its version.
pub(crate) fn read_startup_packet(
    version: u32,
    mut body: &[u8],
    packet: &mut StartupPacket,
) -> Result<(), ClientError> {
    let (major, minor) = (version >> 16, (version & 0xffff) as u16);
    if major != 3 {
        return Err(ClientError::NotSupported(format!(
            "unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.{MINOR_NEWEST}"
        )));
    }
    packet.minor = minor.min(MINOR_NEWEST);
    let mut unknown = Vec::new();
    let (mut user, mut options) = (None, None);
    loop {
        let name = cstr(&mut body).map_err(|_| layout())?;
        if name.is_empty() {
            break;
        }
        let value = cstr(&mut body).map_err(|_| layout())?;
        match name {
            b"user" => user = Some(text(value)?),
            b"database" => packet.database = Some(text(value)?).filter(|name| !name.is_empty()),
            b"options" => options = Some(text(value)?),
            b"replication" if !matches!(value, b"false" | b"off" | b"no" | b"0") => {
                return Err(ClientError::NotSupported(
                    "replication connections are not supported by pglobby".into(),
                ));
            }
            b"replication" => {}
            name if name.starts_with(b"_pq_.") => unknown.push(name.to_vec()),
            name => packet.settings.push((text(name)?, text(value)?)),
        }
    }
    if !body.is_empty() {
        return Err(layout());
    }
    packet.user = user.filter(|name| !name.is_empty()).ok_or(ClientError::NoUser)?;
    if let Some(options) = options {
        let (settings, tenant) = settings_of_options(&options)?;
        packet.settings.splice(0..0, settings);
        packet.tenant_hint = tenant;
    }
    // A driver may send the tenant as a parameter of its own. The last value counts, as for every parameter.
    packet.settings.retain(|(name, value)| {
        let is_hint = names_tenant(name);
        if is_hint {
            packet.tenant_hint = Some(value.clone());
        }
        !is_hint
    });
    packet.tenant_hint.take_if(|name| name.is_empty());
    if minor > MINOR_NEWEST || !unknown.is_empty() {
        negotiate(packet.minor, &unknown, &mut packet.unsent);
    }
    Ok(())
}

fn layout() -> ClientError {
    ClientError::ProtocolViolation("invalid startup packet layout: expected terminator as last byte".into())
}

/// Strict, because lossy decoding could turn a name into another one.
fn text(bytes: &[u8]) -> Result<String, ClientError> {
    let invalid = |_| {
        ClientError::ProtocolViolation("invalid byte sequence for encoding \"UTF8\" in startup packet".into())
    };
    std::str::from_utf8(bytes).map(str::to_owned).map_err(invalid)
}

/// Appends NegotiateProtocolVersion: the supported minor version and the options that are unknown.
fn negotiate(minor: u16, unknown: &[Vec<u8>], out: &mut Vec<u8>) {
    append(out, b'v', |out| {
        out.extend_from_slice(&(3 << 16 | u32::from(minor)).to_be_bytes());
        out.extend_from_slice(&u32::try_from(unknown.len()).unwrap_or(0).to_be_bytes());
        for name in unknown {
            append_cstr(out, name);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::net::UnixStream;

    fn packet_of(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
        let mut body = version.to_be_bytes().to_vec();
        for (name, value) in parameters {
            append_cstr(&mut body, name.as_bytes());
            append_cstr(&mut body, value.as_bytes());
        }
        body.push(0);
        let mut packet = u32::try_from(body.len() + 4).unwrap().to_be_bytes().to_vec();
        packet.extend(body);
        packet
    }

    /// Sends `bytes` cut at `cuts` and then closes.
    fn receive_from(bytes: &[u8], cuts: &[usize]) -> Result<FirstRequest, StartupError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut client, server) = UnixStream::pair().unwrap();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let sending = async {
                for part in cuts.windows(2) {
                    client.write_all(&bytes[part[0]..part[1]]).await.unwrap();
                    tokio::task::yield_now().await;
                }
                drop(client.shutdown().await);
                client
            };
            let mut stream = Stream::from(server);
            let rules = TlsRules { acceptor: None, required: false };
            let (_client, received) = tokio::join!(sending, receive(&mut stream, None, rules));
            received
        })
    }

    fn packet(bytes: &[u8]) -> StartupPacket {
        match receive_from(bytes, &[]) {
            Ok(FirstRequest::Login(packet)) => packet,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_startup_packet_says_who_where_and_how() {
        let mut bytes = packet_of(
            3 << 16,
            &[
                ("user", "alice"),
                ("database", "acme"),
                ("options", "-c a=1 --pglobby.tenant=acme"),
                ("datestyle", "ISO"),
            ],
        );
        bytes.extend_from_slice(b"behind");
        let packet = packet(&bytes);
        assert_eq!((packet.user.as_str(), packet.database.as_deref()), ("alice", Some("acme")));
        assert_eq!(packet.settings, [("a".into(), "1".into()), ("datestyle".into(), "ISO".into())]);
        assert_eq!((packet.tenant_hint.as_deref(), &*packet.unread), (Some("acme"), &b"behind"[..]));
        assert_eq!((packet.minor, packet.unsent.len()), (0, 0));
    }

    #[test]
    fn a_newer_protocol_and_unknown_options_are_negotiated_down() {
        let packet = packet(&packet_of(3 << 16 | 9999, &[("user", "a"), ("_pq_.x", "1")]));
        assert_eq!(packet.minor, 2);
        let mut expected = Vec::new();
        negotiate(2, &[b"_pq_.x".to_vec()], &mut expected);
        assert_eq!(packet.unsent, expected);
    }

    #[test]
    fn what_is_no_startup_packet_is_refused_on_its_header_alone() {
        // All but the first have a length and no more.
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"GET ", &[0, 0, 0, 7], &[0xff; 4], &[0, 0, 0x27, 0x11]]
        {
            assert!(matches!(receive_from(bytes, &[]), Err(StartupError::Garbled(_))), "{bytes:?}");
        }
        assert!(matches!(
            receive_from(&packet_of(2 << 16, &[]), &[]),
            Err(StartupError::Refused(ClientError::NotSupported(_)))
        ));
    }

    #[test]
    fn a_cancel_request_may_have_a_long_key() {
        for length in [4, 32, 256] {
            let mut bytes = u32::try_from(12 + length).unwrap().to_be_bytes().to_vec();
            bytes.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
            bytes.extend_from_slice(&7i32.to_be_bytes());
            bytes.extend(vec![9; length]);
            assert!(
                matches!(receive_from(&bytes, &[]), Ok(FirstRequest::Cancel { process_id: 7, secret }) if secret == vec![9; length])
            );
        }
    }

    #[test]
    fn a_client_that_leaves_is_no_error() {
        assert!(matches!(receive_from(b"", &[]), Ok(FirstRequest::Closed)));
        assert!(matches!(receive_from(&[0, 0, 0], &[]), Ok(FirstRequest::Closed)));
    }

    proptest! {
        #[test]
        fn any_fragmentation_gives_the_same_startup_packet(cuts in prop::collection::vec(any::<usize>(), 0..12)) {
            let bytes = packet_of(3 << 16, &[("user", "alice"), ("database", "acme"), ("application_name", "x")]);
            let Ok(FirstRequest::Login(packet)) = receive_from(&bytes, &cuts) else { panic!() };
            prop_assert_eq!((packet.user.as_str(), packet.settings.len()), ("alice", 1));
        }

        #[test]
        fn mutated_bytes_never_panic(at in any::<usize>(), byte in any::<u8>(), cut in any::<usize>()) {
            let mut bytes = packet_of(3 << 16, &[("user", "alice"), ("options", "-c a=1")]);
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut % (bytes.len() + 1));
            drop(receive_from(&bytes, &[]));
        }
    }
}
