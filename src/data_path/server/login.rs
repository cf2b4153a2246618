//! Logs in to a server and verifies database and role, over a stream that is encrypted already where it is to
//! be.
//!
//! The server is not trusted: all lengths are bounded, all fields optional, and an order of messages that
//! PostgreSQL does not use is an error.

use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::{authentication::md5_hash, message::frontend};
use secrecy::ExposeSecret as _;
use tokio::io::AsyncWriteExt as _;
use zeroize::Zeroize as _;

use super::{
    DialOptions, DialTarget, NewConnection,
    dial_error::{DialCause, StartupError},
    scram::{Binding, SaltedPasswords, ScramExchange},
};
use crate::{
    data_path::{host_address::HostAddress, session_state::parameter_status::PARAMETERS_MAX, sql::PARAMETER},
    wire::{
        message_reader::{Message, MessageReader},
        stream::{Socket, Stream},
        tls::server_end_point,
    },
};

/// libpq's limit for messages before a session exists.
const MESSAGE_BYTES_MAX: u32 = 30_000;

/// All messages of one login. PostgreSQL sends about 500 bytes; login triggers may add notices.
const LOGIN_BYTES_MAX: usize = 256 * 1024;

/// The newest minor version of protocol 3 that the proxy speaks.
const MINOR: u16 = 2;

/// For invariant 2. They are keywords, not functions: a `search_path` of the role cannot replace them, and a
/// new backend need not look them up. The login counts; `ALTER ROLE … SET role` may have made it another role.
const IDENTITY_QUERY: &str = "SELECT CURRENT_CATALOG, SESSION_USER, CURRENT_USER";

/// For hosts of several addresses whose PostgreSQL is older than 14.
const RECOVERY_QUERY: &str = "SELECT pg_catalog.pg_is_in_recovery()";

/// From the startup packet to a verified, idle session.
pub(super) async fn log_in(
    stream: Stream,
    target: &DialTarget<'_>,
    at: &HostAddress,
    options: &DialOptions,
) -> Result<NewConnection, DialCause> {
    let mut login = ServerLogin {
        stream,
        target,
        reader: MessageReader::default(),
        bytes_received: 0,
        minor: MINOR,
        key: None,
        parameters: Vec::new(),
        notices: Vec::new(),
        start_role: None,
    };
    login.start_up().await?;
    login.authenticate(options).await?;
    login.wait_until_ready().await?;
    login.verify_identity().await?;
    let is_standby = target.host.addresses.len() > 1 && login.is_standby().await?;
    if !login.reader.is_empty() {
        return Err(unexpected("bytes after ReadyForQuery"));
    }
    let (process_id, secret) = login.key.unwrap_or_default();
    let ServerLogin { stream, parameters, notices, minor, start_role, .. } = login;
    Ok(NewConnection {
        stream,
        process_id,
        secret,
        parameters,
        notices,
        minor,
        start_role,
        at: at.clone(),
        is_standby,
        primary_changes: 0,
    })
}

struct ServerLogin<'a> {
    stream: Stream,
    target: &'a DialTarget<'a>,
    reader: MessageReader,
    bytes_received: usize,
    minor: u16,
    key: Option<(i32, Vec<u8>)>,
    parameters: Vec<(Vec<u8>, Vec<u8>)>,
    notices: Vec<Vec<u8>>,
    start_role: Option<String>,
}

/// AuthenticationRequest messages that the proxy can answer.
enum AuthRequest {
    Ok,
    CleartextPassword,
    Md5Password([u8; 4]),
    Sasl(Vec<u8>),
}

impl ServerLogin<'_> {
    async fn start_up(&mut self) -> Result<(), DialCause> {
        let timeout = self.target.statement_timeout.map(milliseconds);
        let mut parameters =
            vec![("user", self.target.credential.username.as_str()), ("database", self.target.database)];
        // RESET and DISCARD ALL restore startup parameters.
        parameters.push((PARAMETER, self.target.tenant));
        parameters.extend(timeout.as_deref().map(|timeout| ("statement_timeout", timeout)));
        parameters.extend(self.target.startup.iter());
        let mut packet = BytesMut::new();
        frontend::startup_message(parameters, &mut packet)?;
        // The builder writes 3.0; the minor version is in bytes 6 and 7.
        if let Some(minor) = packet.get_mut(6..8) {
            minor.copy_from_slice(&MINOR.to_be_bytes());
        }
        self.send(&packet).await
    }

    async fn authenticate(&mut self, options: &DialOptions) -> Result<(), DialCause> {
        let credential = self.target.credential;
        let request = self.auth_request().await?;
        // A Unix socket is on this machine; over a network another program may have answered.
        let unproved = !matches!(request, AuthRequest::Sasl(_))
            && !matches!(self.stream, Stream::Plain(Socket::Unix(_)));
        if unproved && options.server_proves_itself {
            return Err(unexpected(
                "the server does not prove that it knows the role's password, as SCRAM-SHA-256 does; to allow this, set \
                 server_require_auth = \"any\"",
            ));
        }
        match request {
            AuthRequest::Ok => return Ok(()),
            AuthRequest::CleartextPassword => {
                if matches!(self.stream, Stream::Plain(Socket::Tcp(_))) {
                    return Err(unexpected(
                        "the server wants the password in clear, over a network without TLS",
                    ));
                }
                self.send_password(credential.password.expose_secret().as_bytes()).await?;
            }
            AuthRequest::Md5Password(salt) => {
                let password = credential.password.expose_secret().as_bytes();
                let mut hash = md5_hash(credential.username.as_bytes(), password, salt);
                let sent = self.send_password(hash.as_bytes()).await;
                hash.zeroize();
                sent?;
            }
            AuthRequest::Sasl(mechanisms) => self.scram(&mechanisms, &options.salted_passwords).await?,
        }
        match self.next().await? {
            message if message.tag() == b'R' && message.body() == 0i32.to_be_bytes() => Ok(()),
            message => Err(unexpected_message(&message, "after the password")),
        }
    }

    /// The first AuthenticationRequest. An older server sends NegotiateProtocolVersion before it.
    async fn auth_request(&mut self) -> Result<AuthRequest, DialCause> {
        let mut message = self.next().await?;
        if message.tag() == b'v' {
            self.minor = negotiated(message.body()).ok_or_else(|| unexpected("NegotiateProtocolVersion"))?;
            message = self.next().await?;
        }
        let (b'R', Some((code, rest))) = (message.tag(), message.body().split_first_chunk::<4>()) else {
            return Err(unexpected_message(&message, "where authentication begins"));
        };
        (self.target.on_answer.0)();
        match (i32::from_be_bytes(*code), rest) {
            (0, []) => Ok(AuthRequest::Ok),
            (3, []) => Ok(AuthRequest::CleartextPassword),
            (5, &[a, b, c, d]) => Ok(AuthRequest::Md5Password([a, b, c, d])),
            (10, mechanisms) => Ok(AuthRequest::Sasl(mechanisms.to_vec())),
            (code, _) => Err(unexpected(&format!("the server wants authentication method {code}"))),
        }
    }

    async fn scram(&mut self, mechanisms: &[u8], passwords: &SaltedPasswords) -> Result<(), DialCause> {
        let exchange = ScramExchange::begin(self.binding(mechanisms)?);
        let mut message = BytesMut::new();
        frontend::sasl_initial_response(
            exchange.mechanism(),
            exchange.first_message().as_bytes(),
            &mut message,
        )?;
        self.send(&message).await?;

        let challenge = exchange.challenged(&self.sasl_data(11).await?)?;
        let salted = passwords.get(&self.target.credential.password, &challenge).await?;
        let answer = exchange.answer(&challenge, &salted);
        message.clear();
        frontend::sasl_response(answer.message.as_bytes(), &mut message)?;
        self.send(&message).await?;

        answer.verify(&self.sasl_data(12).await?)
    }

    /// Chooses a mechanism from the server's list.
    fn binding(&self, mechanisms: &[u8]) -> Result<Binding, DialCause> {
        let offered = |name: &[u8]| mechanisms.split(|byte| *byte == 0).any(|mechanism| mechanism == name);
        let end_point = match &self.stream {
            Stream::Tls(tls) => {
                let certificates = tls.get_ref().1.peer_certificates();
                certificates.and_then(|chain| server_end_point(chain.first()?))
            }
            Stream::Plain(_) => None,
        };
        match (offered(b"SCRAM-SHA-256-PLUS"), end_point) {
            (true, _) if !self.stream.is_tls() => {
                Err(unexpected("the server offers channel binding without a channel to bind to"))
            }
            (true, Some(end_point)) => Ok(Binding::ServerEndPoint(end_point)),
            _ if !offered(b"SCRAM-SHA-256") => Err(unexpected("the server offers no SCRAM-SHA-256")),
            (false, Some(_)) => Ok(Binding::NotOffered),
            (_, None) => Ok(Binding::Unable),
        }
    }

    async fn sasl_data(&mut self, step: i32) -> Result<Vec<u8>, DialCause> {
        let message = self.next().await?;
        match (message.tag(), message.body().strip_prefix(&step.to_be_bytes())) {
            (b'R', Some(data)) => Ok(data.to_vec()),
            _ => Err(unexpected_message(&message, "within SCRAM")),
        }
    }

    async fn wait_until_ready(&mut self) -> Result<(), DialCause> {
        loop {
            let message = self.next().await?;
            match (message.tag(), message.body()) {
                (b'K', body) if self.key.is_none() => {
                    let key = body.split_first_chunk::<4>();
                    // Four bytes in 3.0, up to 256 in 3.2 (PostgreSQL documentation, BackendKeyData).
                    let fits = |secret: &[u8]| {
                        secret.len() == 4 || (self.minor >= 2 && (4..=256).contains(&secret.len()))
                    };
                    let Some((process_id, secret)) = key.filter(|(_, secret)| fits(secret)) else {
                        return Err(unexpected("BackendKeyData"));
                    };
                    self.key = Some((i32::from_be_bytes(*process_id), secret.to_vec()));
                }
                (b'Z', b"I") => return Ok(()),
                _ => return Err(unexpected_message(&message, "after authentication")),
            }
        }
    }

    async fn verify_identity(&mut self) -> Result<(), DialCause> {
        let mut query = BytesMut::new();
        frontend::query(IDENTITY_QUERY, &mut query)?;
        self.send(&query).await?;

        self.expect(b'T').await?;
        let row = self.expect(b'D').await?;
        let Some([database, role, current_role]) = three_columns(row.body()) else {
            return Err(unexpected("the identity's DataRow"));
        };
        let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        self.start_role = (current_role != role).then(|| text(current_role));
        self.expect(b'C').await?;
        if self.expect(b'Z').await?.body() != b"I" {
            return Err(unexpected("a transaction after the identity query"));
        }
        let DialTarget { database: meant, credential, .. } = self.target;
        if (database, role) != (meant.as_bytes(), credential.username.as_bytes()) {
            return Err(DialCause::WrongIdentity { database: text(database), role: text(role) });
        }
        Ok(())
    }

    /// Whether the server is in recovery. It reports that itself since PostgreSQL 14. The role's own
    /// `default_transaction_read_only` says nothing of the server.
    async fn is_standby(&mut self) -> Result<bool, DialCause> {
        let reported = self.parameters.iter().find(|(name, _)| name == b"in_hot_standby");
        if let Some((_, value)) = reported {
            return Ok(value == b"on");
        }
        let mut query = BytesMut::new();
        frontend::query(RECOVERY_QUERY, &mut query)?;
        self.send(&query).await?;
        self.expect(b'T').await?;
        let row = self.expect(b'D').await?;
        let is_standby = match row.body() {
            [0, 1, 0, 0, 0, 1, b't'] => true,
            [0, 1, 0, 0, 0, 1, b'f'] => false,
            _ => return Err(unexpected("the DataRow of pg_is_in_recovery")),
        };
        self.expect(b'C').await?;
        self.expect(b'Z').await?;
        Ok(is_standby)
    }

    async fn expect(&mut self, tag: u8) -> Result<Message, DialCause> {
        match self.next().await? {
            message if message.tag() == tag => Ok(message),
            message => Err(unexpected_message(&message, "in answer to the identity query")),
        }
    }

    /// The next message except notices, parameters and errors, which are handled here.
    async fn next(&mut self) -> Result<Message, DialCause> {
        loop {
            let message = self.reader.next(&mut self.stream, MESSAGE_BYTES_MAX).await?;
            self.bytes_received += message.bytes.len();
            if self.bytes_received > LOGIN_BYTES_MAX {
                return Err(unexpected("more than 256 KiB in one login"));
            }
            match message.tag() {
                b'N' => self.notices.push(message.bytes.to_vec()),
                b'S' => self.keep_parameter(message.body())?,
                b'E' => return Err(DialCause::Refused(StartupError::parse(message.body()))),
                _ => return Ok(message),
            }
        }
    }

    fn keep_parameter(&mut self, body: &[u8]) -> Result<(), DialCause> {
        let mut parts = body.split(|byte| *byte == 0);
        let (Some(name), Some(value), Some([]), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(unexpected("ParameterStatus"));
        };
        if let Some((_, known)) = self.parameters.iter_mut().find(|(known, _)| known == name) {
            *known = value.to_vec();
        } else if self.parameters.len() < PARAMETERS_MAX {
            self.parameters.push((name.to_vec(), value.to_vec()));
        } else {
            return Err(unexpected("too many ParameterStatus"));
        }
        Ok(())
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<(), DialCause> {
        let mut message = BytesMut::new();
        frontend::password_message(password, &mut message)?;
        let sent = self.send(&message).await;
        message.as_mut().zeroize();
        sent
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), DialCause> {
        self.stream.write_all(bytes).await?;
        Ok(self.stream.flush().await?)
    }
}

/// For PostgreSQL, a number without a unit is milliseconds and 0 is no limit: a shorter timeout becomes 1.
fn milliseconds(timeout: Duration) -> String {
    let whole = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    if timeout.is_zero() { whole } else { whole.max(1) }.to_string()
}

/// The minor version in a NegotiateProtocolVersion; servers send the whole version, the documentation has the
/// minor one. `None`: also if the server rejects options, of which the proxy sends none.
fn negotiated(body: &[u8]) -> Option<u16> {
    let (version, rest) = body.split_first_chunk::<4>()?;
    let &[0, 0 | 3, high, low] = version else { return None };
    let minor = u16::from_be_bytes([high, low]);
    (rest == [0; 4] && minor <= MINOR).then_some(minor)
}

/// The values of a DataRow with exactly three columns, none NULL.
fn three_columns(body: &[u8]) -> Option<[&[u8]; 3]> {
    let (first, rest) = column(body.strip_prefix(&3u16.to_be_bytes())?)?;
    let (second, rest) = column(rest)?;
    let (third, rest) = column(rest)?;
    rest.is_empty().then_some([first, second, third])
}

/// A value and the bytes after it; `None` for NULL, which has a negative length.
fn column(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(usize::try_from(i32::from_be_bytes(*length)).ok()?)
}

fn unexpected(what: &str) -> DialCause {
    DialCause::Protocol(what.to_owned())
}

fn unexpected_message(message: &Message, when: &str) -> DialCause {
    DialCause::Protocol(format!("unexpected message of type {:?} {when}", char::from(message.tag())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_timeout_does_not_become_none() {
        for (timeout, told) in [
            (Duration::ZERO, "0"),
            (Duration::from_micros(3), "1"),
            (Duration::from_millis(1500), "1500"),
            (Duration::MAX, "2147483647"),
        ] {
            assert_eq!(milliseconds(timeout), told);
        }
    }
}
