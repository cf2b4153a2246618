//! From the first byte to the startup packet: TLS or not, a cancel request or a client, and what it asks for.
//!
//! Nothing here is trusted: at most [`STARTUP_BYTES_MAX`] are taken, memory follows what has arrived and not what was
//! announced, and nothing sent in clear survives into TLS (the class of CVE-2021-23214).
//!
//! Source: PostgreSQL documentation, "Start-up", "SSL Session Encryption", "Message Formats"; `ProcessStartupPacket` in
//! its source for the words of errors.

use std::{net::IpAddr, sync::Arc};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::startup_options::{names_tenant, settings_of_options};
use crate::{
    error::ClientError,
    wire::{
        frame::cstr,
        message::{append, append_cstr},
        stream::{Socket, Stream},
        tls::towards_clients::{ClientTlsAcceptor, TlsSnapshot},
    },
};

/// The longest startup packet, and the most that is read before login; PostgreSQL's own limit.
pub const STARTUP_BYTES_MAX: usize = 10_000;

/// Read at a time during a login: its messages fit, so that each takes one read. (A buffer without room grows by 64 bytes
/// otherwise, and a SASL response has more.)
pub const LOGIN_READ_BYTES: usize = 512;

/// The newest minor version of protocol 3 that we speak.
pub const MINOR_NEWEST: u16 = 2;

const CANCEL_REQUEST: u32 = 80_877_102;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;

/// Requests for encryption that a client may make before it must start up: one of each kind, and one to spare.
const REQUESTS_MAX: usize = 3;

/// Whether and how clients may encrypt.
#[derive(Debug, Clone, Copy)]
pub struct TlsRules<'a> {
    /// The certificate; `None`: no TLS.
    pub door: Option<&'a ClientTlsAcceptor>,
    /// In clear only over a Unix socket.
    pub required: bool,
}

/// Who came.
#[derive(Debug)]
pub enum FirstRequest {
    /// A client that wants to log in.
    Client(StartupPacket),
    /// A cancel request; its connection is closed when it has settled.
    Cancel {
        /// The process number it names.
        process_id: i32,
        /// The key it names.
        secret: Vec<u8>,
    },
    /// Somebody who left, or only looked whether the port is open.
    Gone,
}

/// A startup packet, read.
#[derive(Debug, Default)]
pub struct StartupPacket {
    /// Bytes that came behind the packet.
    pub unread: Vec<u8>,
    /// Protocol 3.`minor` is spoken.
    pub minor: u16,
    /// The user name.
    pub user: String,
    /// The database name, if one was given.
    pub database: Option<String>,
    /// Every other parameter, those in `options` first, as PostgreSQL applies them.
    pub settings: Vec<(String, String)>,
    /// `pglobby.tenant` in `options`.
    pub tenant_hint: Option<String>,
    /// What the TLS handshake found out.
    pub tls: Option<TlsFacts>,
    /// Where the client is; `None`: a Unix socket.
    pub peer: Option<IpAddr>,
    /// To be sent with the next write: NegotiateProtocolVersion.
    pub unsent: Vec<u8>,
}

/// What a TLS handshake found out.
#[derive(Debug)]
pub struct TlsFacts {
    /// The server name that the client asked for.
    pub server_name: Option<String>,
    /// The certificate of this connection, with its channel binding.
    pub snapshot: Arc<TlsSnapshot>,
}

/// How a startup fails.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// The client is told.
    #[error("{0}")]
    Refused(#[from] ClientError),
    /// No PostgreSQL client, or one that left by a Terminate before it came in: closed without a word, as PostgreSQL does.
    #[error("{0}")]
    Garbled(&'static str),
    /// There is nobody to tell, or no way.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Reads up to the startup packet, and turns `stream` into TLS on the way if the client asks for it.
///
/// # Errors
/// [`StartupError`].
pub async fn receive(
    stream: &mut Stream,
    peer: Option<IpAddr>,
    rules: TlsRules<'_>,
) -> Result<FirstRequest, StartupError> {
    let mut tls = None;
    if let (Some(door), true) = (rules.door, starts_with_tls(stream).await?) {
        tls = Some(encrypt(stream, door, true).await?);
    }
    let mut buffer = Vec::new();
    for _ in 0..=REQUESTS_MAX {
        let Some((code, body)) = packet(stream, &mut buffer).await? else {
            return Ok(FirstRequest::Gone);
        };
        match code {
            SSL_REQUEST | GSSENC_REQUEST if !buffer.is_empty() => {
                let words = "received unencrypted data after SSL request";
                return Err(ClientError::ProtocolViolation(words.into()).into());
            }
            SSL_REQUEST => match rules.door {
                Some(door) if tls.is_none() && peer.is_some() => {
                    stream.write_all(b"S").await?;
                    tls = Some(encrypt(stream, door, false).await?);
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
                return Ok(FirstRequest::Client(packet));
            }
        }
    }
    Err(ClientError::ProtocolViolation("too many requests for encryption".into()).into())
}

/// Whether the first byte is a TLS handshake's; it stays unread.
async fn starts_with_tls(stream: &Stream) -> std::io::Result<bool> {
    let Stream::Plain(Socket::Tcp(tcp)) = stream else { return Ok(false) };
    let mut first = [0];
    Ok(tcp.peek(&mut first).await? == 1 && first == [0x16])
}

async fn encrypt(stream: &mut Stream, door: &ClientTlsAcceptor, direct: bool) -> std::io::Result<TlsFacts> {
    let Stream::Plain(socket) = std::mem::replace(stream, Stream::Plain(Socket::Gone)) else {
        return Err(std::io::ErrorKind::InvalidData.into());
    };
    let accepted = Box::pin(door.accept(socket)).await?;
    if direct && !accepted.alpn {
        let words = "direct TLS without the application protocol \"postgresql\" (ALPN)";
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, words));
    }
    *stream = accepted.stream;
    Ok(TlsFacts { server_name: accepted.server_name, snapshot: accepted.snapshot })
}

/// The next packet without a type byte: its code and what follows. What comes behind it stays in `buffer`. `None` at the
/// end of the connection.
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

fn read_startup_packet(version: u32, mut body: &[u8], packet: &mut StartupPacket) -> Result<(), ClientError> {
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
    // Drivers may also give it as a parameter of its own; the last one counts, as with every parameter.
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

/// A name read lossily would be another name.
fn text(bytes: &[u8]) -> Result<String, ClientError> {
    let invalid = |_| {
        ClientError::ProtocolViolation("invalid byte sequence for encoding \"UTF8\" in startup packet".into())
    };
    std::str::from_utf8(bytes).map(str::to_owned).map_err(invalid)
}

/// NegotiateProtocolVersion: what we speak instead, and the options we do not know.
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
    fn arrive(bytes: &[u8], cuts: &[usize]) -> Result<FirstRequest, StartupError> {
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
            let rules = TlsRules { door: None, required: false };
            let (_client, arrival) = tokio::join!(sending, receive(&mut stream, None, rules));
            arrival
        })
    }

    fn packet(bytes: &[u8]) -> StartupPacket {
        match arrive(bytes, &[]) {
            Ok(FirstRequest::Client(packet)) => packet,
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
            assert!(matches!(arrive(bytes, &[]), Err(StartupError::Garbled(_))), "{bytes:?}");
        }
        assert!(matches!(
            arrive(&packet_of(2 << 16, &[]), &[]),
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
                matches!(arrive(&bytes, &[]), Ok(FirstRequest::Cancel { process_id: 7, secret }) if secret == vec![9; length])
            );
        }
    }

    #[test]
    fn a_client_that_leaves_is_no_error() {
        assert!(matches!(arrive(b"", &[]), Ok(FirstRequest::Gone)));
        assert!(matches!(arrive(&[0, 0, 0], &[]), Ok(FirstRequest::Gone)));
    }

    proptest! {
        #[test]
        fn any_fragmentation_gives_the_same_hello(cuts in prop::collection::vec(any::<usize>(), 0..12)) {
            let bytes = packet_of(3 << 16, &[("user", "alice"), ("database", "acme"), ("application_name", "x")]);
            let Ok(FirstRequest::Client(packet)) = arrive(&bytes, &cuts) else { panic!() };
            prop_assert_eq!((packet.user.as_str(), packet.settings.len()), ("alice", 1));
        }

        #[test]
        fn mutated_bytes_never_panic(at in any::<usize>(), byte in any::<u8>(), cut in any::<usize>()) {
            let mut bytes = packet_of(3 << 16, &[("user", "alice"), ("options", "-c a=1")]);
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut % (bytes.len() + 1));
            drop(arrive(&bytes, &[]));
        }
    }
}
