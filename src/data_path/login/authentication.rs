//! Who is calling: SCRAM-SHA-256 against the stored verifier, and what the login may reach.
//!
//! An unknown login, an unknown tenant, a wrong password, a disabled or expired login look the same from outside: the same
//! look-ups, the same messages, the same words, at the same pace, also while the central database is away. An unknown login
//! gets a mock exchange that cannot succeed by construction.
//!
//! Source: RFC 5802, RFC 7677; PostgreSQL documentation, "SASL Authentication".

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use futures_util::future::join_all;
use pgwire::api::auth::sasl::scram::ScramServerAuth;
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::{info, warn};

use super::{
    connection_limits::ClientNetwork,
    failed_logins::{FailedLogins, Outcome},
    scram_proof::Verifier,
    startup::{LOGIN_READ_BYTES, STARTUP_BYTES_MAX, StartupError, StartupPacket},
    tenant_routing::{Goal, Hints, Known, LoginRefusal, Route, RouteRequest, Verdict, is_tenant},
};
use crate::{
    config::FailedLoginRules,
    data_path::{
        directory::{Directory, DirectoryError},
        tenant::Login,
    },
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

/// Who proved to be who, and may go where.
#[derive(Debug)]
pub struct Authenticated {
    /// Who.
    pub login: Arc<Login>,
    /// Where to.
    pub destination: Route,
    /// AuthenticationSASLFinal and AuthenticationOk; they go out with the session's first write.
    pub unsent: Vec<u8>,
}

/// What a login is judged by, beside what the client says.
#[derive(Debug, Clone, Copy)]
pub struct AuthContext<'a> {
    /// Logins and tenants.
    pub directory: &'a dyn Directory,
    /// `tenant_host_suffixes`.
    pub tenant_host_suffixes: &'a [String],
    /// `admin_allow_from`.
    pub admin_allow_from: &'a [ipnet::IpNet],
    /// What slows guessing down.
    pub failed_logins: &'a FailedLogins,
    /// `failed_login…`.
    pub failed_login_rules: &'a FailedLoginRules,
    /// Counts those that are delayed.
    pub metrics: &'a Metrics,
}

/// Looks up and proves the login.
///
/// # Errors
/// [`StartupError`]; the operator's log has the real reason.
pub async fn authenticate(
    stream: &mut Stream,
    packet: &mut StartupPacket,
    gate: AuthContext<'_>,
) -> Result<Authenticated, StartupError> {
    let server_name = packet.tls.as_ref().and_then(|tls| tls.server_name.as_deref());
    let hints = Hints {
        option: packet.tenant_hint.clone(),
        database: packet.database.clone(),
        user: packet.user.clone(),
        server_name: server_name
            .and_then(|name| Hints::tenant_of_server_name(name, gate.tenant_host_suffixes)),
    };
    let begun = Instant::now();
    let found = look_up(&hints, gate.directory).await;
    let stored = found.login.as_ref().map(|login| login.verifier.expose_secret());
    let (verifier, is_stored) = Verifier::of(stored, &packet.user, gate.directory.mock_salt());
    tokio::time::sleep_until(gate.directory.answer_at(begun).into()).await;

    // Until here nothing but the client's own words has decided what was asked of whom; and only a right proof gets
    // to know more than that it failed.
    let proof = exchange(stream, packet, &verifier).await?;
    let verdict = match (&found.login, proof) {
        // A password that is wrong may be a new one, and a name that is unknown a new name.
        (None, _) | (Some(_), Proof::Wrong) if found.unavailable || !gate.directory.is_current() => {
            Err(Verdict::Refused(ClientError::DirectoryUnavailable))
        }
        (None, _) => Err(Verdict::Denied(LoginRefusal::UnknownLogin)),
        (Some(_), Proof::Wrong) if !is_stored => Err(Verdict::Denied(LoginRefusal::BrokenVerifier)),
        (Some(_), Proof::Wrong) => Err(Verdict::Denied(LoginRefusal::WrongPassword)),
        (Some(login), Proof::Right(server_final)) => {
            let case = RouteRequest {
                login,
                hints: &hints,
                split: found.split,
                tenants: &found.tenants,
                peer: packet.peer,
                now: SystemTime::now(),
                admin_allow_from: gate.admin_allow_from,
            };
            settle(&case, gate.directory).await.map(|destination| (login, destination, server_final))
        }
    };
    let verdict = verdict.map_err(|verdict| (verdict.to_string(), verdict.into_refusal(&packet.user)));
    answer_in_time(packet, verdict.as_ref().err(), gate).await?;
    match verdict {
        Ok((login, destination, server_final)) => {
            let mut unsent = Vec::new();
            sasl(&mut unsent, 12, server_final.as_bytes());
            authentication_ok(&mut unsent);
            Ok(Authenticated { login: login.clone(), destination, unsent })
        }
        Err((_, refusal)) => Err(refusal.into()),
    }
}

/// Returns when the client may hear how its login went: later, the more of them have failed.
///
/// # Errors
/// [`ClientError::TooManyFailedLogins`]: it may not hear it.
async fn answer_in_time(
    packet: &StartupPacket,
    refused: Option<&(String, ClientError)>,
    gate: AuthContext<'_>,
) -> Result<(), ClientError> {
    let outcome = match refused {
        Some((_, ClientError::LoginFailed { .. })) => Outcome::Wrong,
        Some((_, ClientError::DirectoryUnavailable)) => Outcome::Unknown,
        _ => Outcome::Right,
    };
    // `alice@acme` is `alice`, whatever tenant is named.
    let login = packet.user.rsplit_once('@').map_or(packet.user.as_str(), |(login, _)| login);
    let origin = ClientNetwork::of(packet.peer);
    let delay = gate.failed_logins.judge(origin, login, outcome, Instant::now(), gate.failed_login_rules);
    match refused {
        // The address first: nothing that a client chooses stands before it. docs/security.md has the filter for fail2ban.
        Some((reason, _)) if delay.is_logged => {
            let address = packet.peer.map_or_else(|| "local".to_owned(), |peer| peer.to_string());
            warn!(%address, user = packet.user, database = packet.database, reason, "login failed");
        }
        Some((reason, _)) if outcome != Outcome::Wrong => {
            info!(user = packet.user, database = packet.database, peer = ?packet.peer, reason, "login refused");
        }
        _ => {}
    }
    if !delay.wait.is_zero() {
        gate.metrics.login_delayed();
        tokio::time::sleep(delay.wait).await;
    }
    if delay.is_refused { Err(ClientError::TooManyFailedLogins) } else { Ok(()) }
}

/// Where a login that has proved itself goes.
async fn settle(case: &RouteRequest<'_>, directory: &dyn Directory) -> Result<Route, Verdict> {
    let tenant = match case.goal()? {
        Goal::Console { read_only } => return Ok(Route::Console { read_only }),
        Goal::Lobby => return Ok(Route::NoTenant),
        Goal::Named(tenant) => Some(tenant),
        Goal::Only(id) => directory.tenant_by_id(id).await.map_err(|error| {
            warn!(login = case.login.name, tenant = id, side = "central", %error, "cannot look up a tenant");
            Verdict::Refused(ClientError::DirectoryUnavailable)
        })?,
    };
    case.enter(tenant)
}

/// What the directory knows of a client's names.
struct Found {
    login: Option<Arc<Login>>,
    /// Whether there is such a login could not be found out.
    unavailable: bool,
    /// The user name is this login's, `@`, and a tenant's.
    split: bool,
    /// Every name that may be a tenant's.
    tenants: Vec<(String, Known)>,
}

/// Asks for every name, whatever the answer to another one: what is asked depends on what the client says and on
/// nothing that it may want to find out.
async fn look_up(hints: &Hints, directory: &dyn Directory) -> Found {
    let half_name = hints.split_user().map(|(name, _)| name);
    let logins =
        join_all([Some(&*hints.user), half_name].into_iter().flatten().map(|name| login(name, directory)));
    let tenants = join_all(hints.names().into_iter().map(|name| tenant(name, directory)));
    let (logins, tenants) = tokio::join!(logins, tenants);
    let unavailable = logins.iter().any(|found| matches!(found, Err(DirectoryError::Unavailable(_))));
    let mut logins = logins.into_iter();
    let whole = logins.next().unwrap_or(Ok(None));
    let half = logins.next().and_then(Result::ok).flatten().filter(|_| matches!(whole, Ok(None)));
    if let Ok(Some(login)) = whole {
        return Found { login: Some(login), unavailable, split: false, tenants };
    }
    let login = half.filter(|login| {
        hints.split_user().is_some_and(|(_, suffix)| is_tenant(&tenants, suffix, &login.kind))
    });
    Found { split: login.is_some(), login, unavailable, tenants }
}

async fn login(name: &str, directory: &dyn Directory) -> Result<Option<Arc<Login>>, DirectoryError> {
    let found = directory.login(name).await;
    found.inspect_err(|error| warn!(user = name, side = "central", %error, "cannot look up a login"))
}

async fn tenant(name: &str, directory: &dyn Directory) -> (String, Known) {
    let known = match directory.tenant(name).await {
        Ok(Some(tenant)) => Known::Tenant(tenant),
        Ok(None) => Known::Nobody,
        Err(error) => {
            warn!(tenant = name, side = "central", %error, "cannot look up a tenant");
            Known::Unavailable
        }
    };
    (name.to_owned(), known)
}

enum Proof {
    /// With the server-final-message to send.
    Right(String),
    Wrong,
}

/// The SASL exchange. It takes the same course whether the secret is a login's or a mock.
async fn exchange(
    stream: &mut Stream,
    packet: &mut StartupPacket,
    verifier: &Verifier,
) -> Result<Proof, StartupError> {
    let offered =
        packet.tls.as_ref().map(|tls| &tls.snapshot.scram).filter(|scram| scram.supports_channel_binding());
    let plus = offered.is_some();
    let scram = offered.cloned().unwrap_or_else(ScramServerAuth::new);
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
    let first = client_first(&initial, plus)?;
    let (server_first, waiting) = scram
        .on_client_first_message_with_secret(first, verifier.secret())
        .map_err(|_| ClientError::ProtocolViolation("malformed SCRAM message".into()))?;
    let mut challenge = Vec::new();
    sasl(&mut challenge, 11, server_first.as_bytes());
    stream.write_all(&challenge).await?;
    stream.flush().await?;

    let last = sasl_message(stream, &mut packet.unread).await?;
    without_nul(&last)?;
    if !verifier.is_proved(first, &server_first, &last) {
        return Ok(Proof::Wrong);
    }
    // Nonce, channel binding, and the proof once more.
    Ok(waiting.on_client_final_message(&last).map_or(Proof::Wrong, Proof::Right))
}

/// The client-first-message of a SASLInitialResponse whose mechanism was offered and fits its channel-binding flag.
fn client_first(mut body: &[u8], plus: bool) -> Result<&[u8], ClientError> {
    let violation = |words: &str| ClientError::ProtocolViolation(words.into());
    let mechanism = cstr(&mut body).map_err(|_| violation("malformed SASL message"))?;
    let Some((length, first)) = body.split_first_chunk::<4>() else {
        return Err(violation("malformed SASL message"));
    };
    if u32::from_be_bytes(*length) as usize != first.len() {
        return Err(violation("malformed SASL message"));
    }
    without_nul(first)?;
    let binds = first.starts_with(b"p=");
    match mechanism {
        b"SCRAM-SHA-256-PLUS" if plus && binds => Ok(first),
        b"SCRAM-SHA-256" if !binds => Ok(first),
        b"SCRAM-SHA-256-PLUS" | b"SCRAM-SHA-256" if plus || !binds => {
            Err(violation("the SCRAM channel-binding flag does not fit the SASL mechanism"))
        }
        _ => Err(violation("client selected an invalid SASL authentication mechanism")),
    }
}

/// SCRAM is text; PostgreSQL's words for what is not.
fn without_nul(message: &[u8]) -> Result<(), ClientError> {
    if message.is_empty() || message.contains(&0) {
        return Err(ClientError::ProtocolViolation("malformed SCRAM message".into()));
    }
    Ok(())
}

/// An AuthenticationSASL… message.
fn sasl(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    append(out, b'R', |out| {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(data);
    });
}

/// The body of the next message, which must be of type `p` and of decent size.
async fn sasl_message(stream: &mut Stream, buffer: &mut Vec<u8>) -> Result<Vec<u8>, StartupError> {
    loop {
        let header = header(buffer).map_err(|error| ClientError::ProtocolViolation(error.to_string()))?;
        if let Some((tag, length)) = header {
            if tag != b'p' {
                let words = format!("expected SASL response, got message type {tag}");
                return Err(ClientError::ProtocolViolation(words).into());
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
