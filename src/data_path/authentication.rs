//! Who is calling: SCRAM-SHA-256 against the stored verifier, and what the login may reach.
//!
//! An unknown login, an unknown tenant, a wrong password, a disabled or expired login look the same from outside: the same
//! look-ups, the same messages, the same words. An unknown login gets a mock exchange that cannot succeed by construction.
//!
//! Source: RFC 5802, RFC 7677; PostgreSQL documentation, "SASL Authentication".

use std::{
    sync::{Arc, LazyLock},
    time::SystemTime,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use hmac::{Hmac, Mac as _};
use pgwire::api::auth::sasl::scram::{ScramSecret, ScramServerAuth};
use secrecy::ExposeSecret as _;
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::{info, warn};

use super::{
    destination::{Case, Denial, Destination, Hints, Verdict, only_tenant},
    startup::{Hello, STARTUP_BYTES_MAX, StartupError},
    tenant::{Directory, DirectoryError, Login, Tenant},
};
use crate::{
    error::Refusal,
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
pub struct Proven {
    /// Who.
    pub login: Arc<Login>,
    /// Where to.
    pub destination: Destination,
    /// AuthenticationSASLFinal and AuthenticationOk; they go out with the session's first write.
    pub unsent: Vec<u8>,
}

/// What a login is judged by, beside what the client says.
#[derive(Debug, Clone, Copy)]
pub struct Gate<'a> {
    /// Logins and tenants.
    pub directory: &'a Directory,
    /// `tenant_host_suffixes`.
    pub tenant_host_suffixes: &'a [String],
    /// `admin_allow_from`.
    pub admin_allow_from: &'a [ipnet::IpNet],
}

/// Looks up and proves the login.
///
/// # Errors
/// [`StartupError`]; the operator's log has the real reason.
pub async fn prove(stream: &mut Stream, hello: &mut Hello, gate: Gate<'_>) -> Result<Proven, StartupError> {
    let hints = Hints {
        option: hello.tenant_hint.clone(),
        database: hello.database.clone(),
        user: hello.user.clone(),
        server_name: hello
            .tls
            .as_ref()
            .and_then(|tls| tls.server_name.as_deref())
            .and_then(|name| Hints::tenant_of_server_name(name, gate.tenant_host_suffixes)),
    };
    let found = look_up(&hints, gate.directory).await.map_err(|error| {
        warn!(user = hello.user, side = "central", %error, "cannot look up a login");
        Refusal::DirectoryUnavailable
    })?;
    let verdict = match &found.login {
        None => Err(Verdict::Denied(Denial::UnknownLogin)),
        Some(login) => found.tenant.clone().map_err(Verdict::Refused).and_then(|tenant| {
            let case = Case {
                login,
                tenant,
                console: hints.wants_console(),
                peer: hello.peer,
                now: SystemTime::now(),
                admin_allow_from: gate.admin_allow_from,
            };
            case.judge()
        }),
    };
    let secret = found.login.as_ref().and_then(|login| read_verifier(login.verifier.expose_secret()));
    let proof = exchange(stream, hello, secret.unwrap_or_else(|| mock(&hello.user))).await?;
    let denial = match (proof, found.login, verdict) {
        (Proof::Right(server_final), Some(login), Ok(destination)) => {
            let mut unsent = std::mem::take(&mut hello.unsent);
            sasl(&mut unsent, 12, server_final.as_bytes());
            authentication_ok(&mut unsent);
            return Ok(Proven { login, destination, unsent });
        }
        (Proof::Right(_), _, Err(Verdict::Refused(refusal))) => {
            info!(user = hello.user, peer = ?hello.peer, reason = %refusal, "login refused");
            return Err(refusal.into());
        }
        (Proof::Wrong, Some(_), Ok(_) | Err(Verdict::Refused(_))) => Denial::WrongPassword,
        (_, _, Err(Verdict::Denied(denial))) => denial,
        (_, None, _) => Denial::UnknownLogin,
    };
    info!(user = hello.user, database = hello.database, peer = ?hello.peer, reason = %denial, "login refused");
    Err(Refusal::LoginFailed { user: hello.user.clone() }.into())
}

/// What the directory knows of a client's names.
struct Found {
    login: Option<Arc<Login>>,
    /// The tenant named, as [`Case::tenant`] has it.
    tenant: Result<Option<Option<Arc<Tenant>>>, Refusal>,
}

async fn look_up(hints: &Hints, directory: &Directory) -> Result<Found, DirectoryError> {
    let mut login = directory.login(&hints.user).await?;
    let mut suffix = None;
    // Asked for in any case, so that a known login answers no faster than an unknown one.
    if let Some((name, tenant)) = hints.split_user() {
        let (half, tenant) = (directory.login(name).await?, directory.tenant(tenant).await?);
        if login.is_none() && tenant.is_some() {
            (login, suffix) = (half, tenant);
        }
    }
    let split = suffix.is_some();
    let database = match hints.database.as_deref() {
        Some(name) if !hints.wants_console() => directory.tenant(name).await?,
        _ => None,
    };
    let exists = |name: &str| {
        [&suffix, &database].into_iter().flatten().any(|tenant: &Arc<Tenant>| tenant.name == name)
    };
    let named = match hints.tenant(split, exists) {
        Ok(named) => named,
        Err(refusal) => return Ok(Found { login, tenant: Err(refusal) }),
    };
    let only = || login.as_deref().and_then(|login| only_tenant(&login.kind)).map(str::to_owned);
    let tenant = match named.or_else(only) {
        None => None,
        Some(name) => Some(match database.filter(|tenant| tenant.name == name) {
            Some(tenant) => Some(tenant),
            None => directory.tenant(&name).await?,
        }),
    };
    Ok(Found { login, tenant: Ok(tenant) })
}

enum Proof {
    /// With the server-final-message to send.
    Right(String),
    Wrong,
}

/// The SASL exchange. It takes the same course whether the secret is a login's or a mock.
async fn exchange(
    stream: &mut Stream,
    hello: &mut Hello,
    secret: ScramSecret,
) -> Result<Proof, StartupError> {
    let offered =
        hello.tls.as_ref().map(|tls| &tls.snapshot.scram).filter(|scram| scram.supports_channel_binding());
    let plus = offered.is_some();
    let scram = offered.cloned().unwrap_or_else(ScramServerAuth::new);
    let mut request = std::mem::take(&mut hello.unsent);
    append(&mut request, b'R', |out| {
        out.extend_from_slice(&10u32.to_be_bytes());
        for mechanism in [PLUS, PLAIN].into_iter().filter(|mechanism| plus || *mechanism == PLAIN) {
            append_cstr(out, mechanism.as_bytes());
        }
        out.push(0);
    });
    stream.write_all(&request).await?;
    stream.flush().await?;

    let initial = sasl_message(stream, &mut hello.leftover).await?;
    let first = client_first(&initial, plus)?;
    let (server_first, waiting) = scram
        .on_client_first_message_with_secret(first, secret)
        .map_err(|_| Refusal::ProtocolViolation("malformed SCRAM message".into()))?;
    let mut challenge = Vec::new();
    sasl(&mut challenge, 11, server_first.as_bytes());
    stream.write_all(&challenge).await?;
    stream.flush().await?;

    let last = sasl_message(stream, &mut hello.leftover).await?;
    Ok(waiting.on_client_final_message(&last).map_or(Proof::Wrong, Proof::Right))
}

/// The client-first-message of a SASLInitialResponse whose mechanism was offered and fits its channel-binding flag.
fn client_first(mut body: &[u8], plus: bool) -> Result<&[u8], Refusal> {
    let violation = |words: &str| Refusal::ProtocolViolation(words.into());
    let mechanism = cstr(&mut body).map_err(|_| violation("malformed SASL message"))?;
    let Some((length, first)) = body.split_first_chunk::<4>() else {
        return Err(violation("malformed SASL message"));
    };
    if u32::from_be_bytes(*length) as usize != first.len() {
        return Err(violation("malformed SASL message"));
    }
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
        let header = header(buffer).map_err(|error| Refusal::ProtocolViolation(error.to_string()))?;
        if let Some((tag, length)) = header {
            if tag != b'p' {
                let words = format!("expected SASL response, got message type {tag}");
                return Err(Refusal::ProtocolViolation(words).into());
            }
            if length > STARTUP_BYTES_MAX {
                return Err(Refusal::ProtocolViolation("SASL response too long".into()).into());
            }
            if buffer.len() > length {
                let rest = buffer.split_off(length + 1);
                let message = std::mem::replace(buffer, rest);
                return Ok(message.get(HEADER_BYTES..).unwrap_or_default().to_vec());
            }
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
}

/// Reads a verifier as PostgreSQL spells it: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
fn read_verifier(verifier: &str) -> Option<ScramSecret> {
    let (iterations, rest) = verifier.strip_prefix("SCRAM-SHA-256$")?.split_once(':')?;
    let (salt, keys) = rest.split_once('$')?;
    let (stored_key, server_key) = keys.split_once(':')?;
    let decode = |text: &str| BASE64_STANDARD.decode(text).ok();
    let (stored_key, server_key) = (decode(stored_key)?, decode(server_key)?);
    if stored_key.len() != 32 || server_key.len() != 32 {
        return None;
    }
    Some(ScramSecret::Verifier {
        salt: decode(salt)?,
        iterations: iterations.parse().ok()?,
        stored_key,
        server_key,
    })
}

/// What an unknown login is asked: always the same salt for the same name, as a real one would have, and keys that nobody
/// knows.
fn mock(user: &str) -> ScramSecret {
    static SECRET: LazyLock<[u8; 32]> = LazyLock::new(rand::random);
    let salt = Hmac::<Sha256>::new_from_slice(&*SECRET)
        .map(|mac| mac.chain_update(user).finalize().into_bytes().iter().take(16).copied().collect())
        .unwrap_or_default();
    let key = || rand::random::<[u8; 32]>().to_vec();
    ScramSecret::Verifier { salt, iterations: 4096, stored_key: key(), server_key: key() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgresqls_own_verifier_is_read_and_a_broken_one_is_not() {
        let verifier = crate::control_path::verifier::scram_verifier(&"secret".into());
        assert!(read_verifier(verifier.expose_secret()).is_some());
        for broken in ["", "md5abc", "SCRAM-SHA-256$4096:c2FsdA==$AAAA:AAAA", "SCRAM-SHA-256$x:y$z"] {
            assert!(read_verifier(broken).is_none(), "{broken}");
        }
    }

    #[test]
    fn a_mock_asks_the_same_name_with_the_same_salt() {
        let salt = |user| match mock(user) {
            ScramSecret::Verifier { salt, .. } => salt,
            _ => panic!("no verifier"),
        };
        assert_eq!(salt("nobody"), salt("nobody"));
        assert_ne!(salt("nobody"), salt("somebody"));
        assert_eq!(salt("nobody").len(), 16);
    }

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
        for broken in [&b""[..], b"SCRAM-SHA-256", b"SCRAM-SHA-256\0\0\0", b"SCRAM-SHA-256\0\0\0\0\x09n,,"] {
            assert!(client_first(broken, true).is_err());
        }
    }
}
