//! Authenticates a client: SCRAM-SHA-256 against the stored verifier.
//!
//! An unknown login, an unknown tenant, a wrong password, and a disabled or expired login look the same to a
//! client: the same look-ups, messages, error text and timing, also while the central database is
//! unavailable. An unknown login gets a mock exchange, which cannot succeed.
//!
//! Source: RFC 5802, RFC 7677; PostgreSQL documentation, "SASL Authentication".

use pgwire::api::auth::sasl::scram::ScramServerAuth;
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    failed_logins::FailedLogins,
    scram_proof::Verifier,
    startup::{LOGIN_READ_BYTES, STARTUP_BYTES_MAX, StartupError, StartupPacket},
    tenant_routing::LookedUp,
};
use crate::{
    config::FailedLoginRules,
    data_path::directory::Directory,
    error::ClientError,
    metrics::Metrics,
    wire::{
        frame::{HEADER_BYTES, cstr, header},
        message::{append, append_cstr, authentication_ok},
        stream::Stream,
    },
};

const PLAIN: &str = "SCRAM-SHA-256";
const PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Room for the replies that end a usual login.
const REPLIES_BYTES: usize = 1024;

/// The configuration and the shared state that a login needs.
#[derive(Debug, Clone, Copy)]
pub struct AuthContext<'a> {
    pub directory: &'a dyn Directory,
    pub tenant_host_suffixes: &'a [String],
    pub maintenance_databases: &'a [String],
    pub admin_allow_from: &'a [ipnet::IpNet],
    pub failed_logins: &'a FailedLogins,
    pub failed_login_rules: &'a FailedLoginRules,
    /// Counts delayed logins.
    pub metrics: &'a Metrics,
}

/// The result of the SASL exchange.
#[derive(Debug)]
pub enum Proof {
    /// The client knows the password.
    Right {
        /// AuthenticationSASLFinal and AuthenticationOk, for the first write of the session.
        replies: Vec<u8>,
    },
    /// It does not.
    Wrong,
    /// The login has no usable verifier, or there is no such login.
    NoVerifier,
}

impl Proof {
    /// The replies of a right proof.
    pub fn into_replies(self) -> Vec<u8> {
        match self {
            Self::Right { replies } => replies,
            Self::Wrong | Self::NoVerifier => Vec::new(),
        }
    }
}

/// Runs the SASL exchange, with a mock verifier if there is no such login.
pub async fn authenticate(
    stream: &mut Stream,
    packet: &mut StartupPacket,
    names: &LookedUp,
    context: &AuthContext<'_>,
) -> Result<Proof, StartupError> {
    let directory = context.directory;
    let stored = names.login.as_ref().map(|login| login.verifier.expose_secret());
    let (verifier, is_stored) = Verifier::of(stored, &packet.user, directory.mock_salt());
    tokio::time::sleep_until(directory.answer_at(names.begun).into()).await;

    let snapshot = packet.tls.as_ref().map(|tls| tls.snapshot.clone());
    let end_point = snapshot.as_ref().and_then(|snapshot| snapshot.end_point());
    let plus = end_point.is_some();
    let mut request = std::mem::take(&mut packet.unsent);
    append(&mut request, b'R', |out| {
        out.extend_from_slice(&10u32.to_be_bytes());
        for mechanism in [PLUS, PLAIN].into_iter().filter(|mechanism| plus || *mechanism == PLAIN) {
            append_cstr(out, mechanism.as_bytes());
        }
        out.push(0);
    });
    stream.write_all(&request).await?;
    stream.flush().await?;

    let initial = sasl_message(stream, &mut packet.unread).await?;
    let client_first = client_first(&initial, plus)?;
    // pgwire could not hash every certificate, so that the flag, which is checked, stays out of it.
    let flag = client_first.iter().position(|byte| *byte == b',').unwrap_or_default();
    let unbound = [b"n", client_first.get(flag..).unwrap_or_default()].concat();
    let (server_first, _) = ScramServerAuth::new()
        .on_client_first_message_with_secret(&unbound, verifier.secret())
        .map_err(|_| ClientError::ProtocolViolation("malformed SCRAM message".into()))?;
    let mut challenge = Vec::with_capacity(HEADER_BYTES + 4 + server_first.len());
    sasl(&mut challenge, 11, server_first.as_bytes());
    stream.write_all(&challenge).await?;
    stream.flush().await?;

    let client_final = sasl_message(stream, &mut packet.unread).await?;
    without_nul(&client_final)?;
    Ok(match verifier.server_final(client_first, &server_first, &client_final, end_point) {
        Some(server_final) => {
            let mut replies = Vec::with_capacity(REPLIES_BYTES);
            sasl(&mut replies, 12, server_final.as_bytes());
            authentication_ok(&mut replies);
            Proof::Right { replies }
        }
        None if is_stored => Proof::Wrong,
        None => Proof::NoVerifier,
    })
}

/// Returns the client-first-message of a SASLInitialResponse. Its mechanism must be an offered one and fit
/// the channel-binding flag.
fn client_first(mut body: &[u8], plus: bool) -> Result<&[u8], ClientError> {
    let violation = |text: &str| ClientError::ProtocolViolation(text.into());
    let mechanism = cstr(&mut body).map_err(|_| violation("malformed SASL message"))?;
    let Some((length, first)) = body.split_first_chunk::<4>() else {
        return Err(violation("malformed SASL message"));
    };
    if u32::from_be_bytes(*length) as usize != first.len() {
        return Err(violation("malformed SASL message"));
    }
    without_nul(first)?;
    let binds = first.starts_with(b"p=");
    if !(binds || first.starts_with(b"n,") || first.starts_with(b"y,")) {
        return Err(violation("malformed SCRAM message"));
    }
    if binds && !first.starts_with(b"p=tls-server-end-point,") {
        return Err(violation("unsupported SCRAM channel-binding type"));
    }
    // The client believes that PLUS was not offered: somebody has removed it from the list.
    if plus && first.starts_with(b"y") {
        return Err(violation("SCRAM channel binding negotiation error"));
    }
    match mechanism {
        b"SCRAM-SHA-256-PLUS" if plus && binds => Ok(first),
        b"SCRAM-SHA-256" if !binds => Ok(first),
        b"SCRAM-SHA-256-PLUS" | b"SCRAM-SHA-256" if plus || !binds => {
            Err(violation("the SCRAM channel-binding flag does not fit the SASL mechanism"))
        }
        _ => Err(violation("client selected an invalid SASL authentication mechanism")),
    }
}

/// Refuses an empty message and one with a zero byte, with PostgreSQL's error.
fn without_nul(message: &[u8]) -> Result<(), ClientError> {
    if message.is_empty() || message.contains(&0) {
        return Err(ClientError::ProtocolViolation("malformed SCRAM message".into()));
    }
    Ok(())
}

/// Appends an AuthenticationSASL… message.
fn sasl(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    append(out, b'R', |out| {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(data);
    });
}

/// Returns the body of the next message, which must have type `p` and at most [`STARTUP_BYTES_MAX`] bytes.
async fn sasl_message(stream: &mut Stream, buffer: &mut Vec<u8>) -> Result<Vec<u8>, StartupError> {
    loop {
        let header = header(buffer).map_err(|error| ClientError::ProtocolViolation(error.to_string()))?;
        if let Some((tag, length)) = header {
            if tag != b'p' {
                let text = format!("expected SASL response, got message type {tag}");
                return Err(ClientError::ProtocolViolation(text).into());
            }
            if length > STARTUP_BYTES_MAX {
                return Err(ClientError::ProtocolViolation("SASL response too long".into()).into());
            }
            if buffer.len() > length {
                let rest = buffer.split_off(length + 1);
                let message = std::mem::replace(buffer, rest);
                return Ok(message.get(HEADER_BYTES..).unwrap_or_default().to_vec());
            }
        }
        buffer.reserve(LOGIN_READ_BYTES);
        if stream.read_buf(buffer).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanism_and_channel_binding_flag_must_agree() {
        let message = |mechanism: &str, first: &str| {
            let mut body = Vec::new();
            append_cstr(&mut body, mechanism.as_bytes());
            body.extend_from_slice(&u32::try_from(first.len()).unwrap().to_be_bytes());
            body.extend_from_slice(first.as_bytes());
            body
        };
        for (mechanism, first, plus, good) in [
            (PLAIN, "n,,n=,r=x", false, true),
            (PLAIN, "y,,n=,r=x", false, true),
            (PLUS, "p=tls-server-end-point,,n=,r=x", true, true),
            (PLUS, "n,,n=,r=x", true, false),
            (PLAIN, "p=tls-server-end-point,,n=,r=x", true, false),
            (PLUS, "p=tls-server-end-point,,n=,r=x", false, false),
            ("PLAIN", "n,,n=,r=x", true, false),
            (PLAIN, "y,,n=,r=x", true, false),
            (PLAIN, "x,,n=,r=x", false, false),
            (PLUS, "p=tls-unique,,n=,r=x", true, false),
        ] {
            assert_eq!(
                client_first(&message(mechanism, first), plus).is_ok(),
                good,
                "{mechanism} {first} {plus}"
            );
        }
        for broken in [
            &b""[..],
            b"SCRAM-SHA-256\0\xff\xff\xff\xff",
            b"SCRAM-SHA-256\0\0\0\0\x04n,\0,",
            b"SCRAM-SHA-256",
            b"SCRAM-SHA-256\0\0\0",
            b"SCRAM-SHA-256\0\0\0\0\x09n,,",
        ] {
            assert!(client_first(broken, true).is_err());
        }
    }
}
