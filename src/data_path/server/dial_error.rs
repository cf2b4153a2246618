//! Why a server connection could not be opened, for two readers: the operator gets all details, a client no
//! name that it did not send.

use std::{fmt, io, time::Duration};

use super::DialTarget;
use crate::{
    data_path::{
        host_address::{HostAddress, written},
        session_state::Settings,
    },
    error::ClientError,
    wire::{message_reader::ReadError, server_error::ErrorDetails},
};

/// A longer message of a server is not passed to clients; PostgreSQL's own are far shorter.
const CLIENT_MESSAGE_BYTES_MAX: usize = 300;

/// `Display` is for operators: it names hosts and roles, never a password.
#[derive(Debug)]
pub struct DialError {
    /// The intended host, database and role.
    target: String,
    /// Names that a client must not read.
    hidden: Vec<String>,
    /// The cause.
    pub cause: DialCause,
}

/// A role or database is not as pglobby made it. The control path may repair it.
#[derive(Debug, Clone)]
pub struct IdentityTrouble {
    /// How it was noticed.
    pub kind: TroubleKind,
    /// A sentence for operators.
    pub said: Box<str>,
}

/// How it was noticed that a role or database is not as pglobby made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleKind {
    /// The host rejects the password.
    Password,
    /// The host rejects the role or database for another reason: no LOGIN, a limit, a missing library.
    Refused,
    /// The role has settings that pglobby did not make. Sessions can begin, with wrong settings.
    Settings,
    /// A session was lost at its start. The role's settings may be why (`statement_timeout`, …).
    Suspected,
}

impl IdentityTrouble {
    /// Whether the host accepts the role all the same.
    pub fn is_silent(&self) -> bool {
        matches!(self.kind, TroubleKind::Settings | TroubleKind::Suspected)
    }
}

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum DialCause {
    /// No server answers, or the connection broke.
    #[error("{0}")]
    Unreachable(io::Error),
    /// The host's name has no address.
    #[error("its name could not be resolved: {0}")]
    Unresolved(io::Error),
    /// `server_connect_timeout` passed.
    #[error("no session within {0:?} (server_connect_timeout)")]
    TimedOut(Duration),
    /// The server's own ErrorResponse.
    #[error("the server refused: {0}")]
    Refused(StartupError),
    /// No TLS where it is required, a certificate that is not trusted, files that cannot be read.
    #[error("TLS: {0}")]
    Tls(String),
    /// Bytes that PostgreSQL would not send, or a request that must not be fulfilled.
    #[error("protocol: {0}")]
    Protocol(String),
    /// The server reports another database or another role (invariant 2).
    #[error("wrong identity: the server says database {database:?}, role {role:?}")]
    WrongIdentity {
        /// `current_database()`.
        database: String,
        /// `session_user`.
        role: String,
    },
    /// The server is in recovery, and the host has other addresses.
    #[error("a standby")]
    Standby,
    /// None of the host's addresses accepts writes: what was found at each.
    #[error("no primary: {}", each(.0))]
    NoPrimary(Vec<(HostAddress, DialCause)>),
    /// Both attempts of `prefer` or `allow` failed, with and without TLS.
    #[error("{first}; the other way: {then}")]
    BothWays {
        /// The preferred way.
        first: Box<DialCause>,
        /// The other one.
        then: Box<DialCause>,
    },
}

/// An ErrorResponse; every field is optional, because the server is untrusted input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartupError {
    /// `C`, where it has the five letters and digits of a SQLSTATE.
    pub sqlstate: Option<[u8; 5]>,
    /// `M`.
    pub message: Option<String>,
    /// `D` and `H`.
    pub details: Option<Box<ErrorDetails>>,
    /// `R`: the function of the server's source that said so.
    pub routine: Option<Box<str>>,
}

impl StartupError {
    /// Reads the body of an ErrorResponse, as far as it goes: a field cut short ends it.
    pub fn parse(mut body: &[u8]) -> Self {
        let mut error = Self::default();
        while let Some((&field, rest)) = body.split_first()
            && field != 0
        {
            let Some(end) = rest.iter().position(|byte| *byte == 0) else { break };
            let (value, behind) = rest.split_at(end);
            match field {
                b'C' => {
                    let code = <[u8; 5]>::try_from(value).ok();
                    error.sqlstate = code.filter(|code| code.iter().all(u8::is_ascii_alphanumeric));
                }
                b'M' => error.message = Some(String::from_utf8_lossy(value).into_owned()),
                b'D' => {
                    let detail = String::from_utf8_lossy(value).into_owned();
                    error.details.get_or_insert_default().detail = Some(detail);
                }
                b'H' => {
                    let hint = String::from_utf8_lossy(value).into_owned();
                    error.details.get_or_insert_default().hint = Some(hint);
                }
                b'R' => error.routine = Some(String::from_utf8_lossy(value).into()),
                _ => {}
            }
            body = behind.get(1..).unwrap_or_default();
        }
        error
    }

    /// The SQLSTATE, if there is one.
    pub fn code(&self) -> Option<&str> {
        self.sqlstate.as_ref().and_then(|code| std::str::from_utf8(code).ok())
    }

    /// The server's message if it has none of the `hidden` names, else a sentence for its SQLSTATE.
    fn for_client(&self, hidden: &[String]) -> String {
        let code = self.code().unwrap_or_default();
        // Resources, shutdowns and missing databases. Other messages name roles, hosts and the proxy's
        // address, or come from an extension or a login trigger.
        let is_public = ["53", "57", "3D"].iter().any(|class| code.starts_with(class));
        let own = self.message.as_deref().filter(|message| {
            is_public
                && message.len() <= CLIENT_MESSAGE_BYTES_MAX
                && !message.contains(char::is_control)
                && !hidden.iter().any(|name| message.contains(name.as_str()))
        });
        let by_code = match code {
            "53300" => "too many connections",
            "3D000" => "the database does not exist",
            "42501" => "permission denied for the database",
            _ if code.starts_with("28") => "the server does not accept the tenant's credentials",
            _ if code.starts_with("57P") => "the server does not accept connections at the moment",
            _ => "the server refused the connection",
        };
        own.unwrap_or(by_code).to_owned()
    }

    /// The SQLSTATE for a client. One about passwords or roles would seem to be about the client's own.
    fn sqlstate_for_client(&self) -> Option<[u8; 5]> {
        self.sqlstate.filter(|code| !code.starts_with(b"28") && !code.starts_with(b"00"))
    }
}

impl fmt::Display for StartupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message.as_deref().unwrap_or("(no message)"))?;
        if let Some(detail) = self.details.as_ref().and_then(|details| details.detail.as_ref()) {
            write!(f, " ({detail})")?;
        }
        write!(f, " [SQLSTATE {}]", self.code().unwrap_or("missing"))
    }
}

impl DialError {
    pub(super) fn new(target: &DialTarget<'_>, cause: DialCause) -> Self {
        let mut hidden =
            vec![target.database.to_owned(), target.credential.username.clone(), target.host.name.clone()];
        for address in &target.host.addresses {
            hidden.extend([address.to_string(), address.place()]);
        }
        hidden.retain(|name| !name.is_empty());
        let intended = format!(
            "host {} ({}), database {:?}, role {:?}",
            target.host.name,
            written(&target.host.addresses),
            target.database,
            target.credential.username
        );
        Self { target: intended, hidden, cause }
    }

    /// Whether the role or database may not be as pglobby made them: with another password, without LOGIN,
    /// with a limit or a missing library. A failure that `startup` may have caused does not count.
    pub fn identity_trouble(&self, startup: &Settings) -> Option<IdentityTrouble> {
        const BY_STARTUP: [&str; 3] = ["local_preload_libraries", "session_preload_libraries", "role"];
        let by_client = BY_STARTUP.iter().any(|name| startup.get(name).is_some());
        let is_password = self.cause.is_refusal(|error| error.code() == Some("28P01"));
        let is_changed = self.cause.is_refusal(|error| {
            let of_one =
                matches!(error.routine.as_deref(), Some("InitializeSessionUserId" | "CheckMyDatabase"));
            match error.code().unwrap_or_default() {
                "28000" | "53300" | "42501" | "55000" => of_one,
                "58P01" => !by_client,
                _ => false,
            }
        }) || !by_client && matches!(self.cause, DialCause::WrongIdentity { .. });
        // Timeouts so short that the identity query of a login runs into them.
        let is_timeout = self
            .cause
            .is_refusal(|error| matches!(error.code(), Some("57014" | "57P05" | "25P03" | "25P04")));
        let kind = match () {
            () if is_password => TroubleKind::Password,
            () if is_changed => TroubleKind::Refused,
            () if is_timeout && !startup.iter().any(|(name, _)| name.ends_with("_timeout")) => {
                TroubleKind::Suspected
            }
            () => return None,
        };
        Some(IdentityTrouble { kind, said: self.to_string().into() })
    }

    /// Whether the host takes no more connections. CONNECTION LIMIT of a role or database has the same
    /// SQLSTATE, from other routines of PostgreSQL.
    pub fn is_host_full(&self) -> bool {
        let of_one = ["InitializeSessionUserId", "CheckMyDatabase"];
        self.cause.is_refusal(|error| {
            error.code() == Some("53300")
                && error.routine.as_deref().is_none_or(|routine| !of_one.contains(&routine))
        })
    }

    /// Whether another tenant would have failed as well. `answered`: the server had asked for authentication.
    /// Later failures concern the role or database, except for a full host (reserved connections).
    pub fn is_of_host(&self, answered: bool) -> bool {
        self.is_host_full() || !answered && self.cause.is_of_host()
    }

    /// Whether the host is away for a while: it restarts, fails over, or the network does. Another attempt may
    /// succeed without anybody's doing.
    pub fn is_outage(&self) -> bool {
        self.cause.is_outage()
    }

    /// The error for a client that waited for this server.
    pub fn client_error(&self) -> ClientError {
        let (sqlstate, reason) = self.cause.for_client(&self.hidden);
        ClientError::ServerUnreachable { sqlstate, reason }
    }
}

impl DialError {
    /// The server's own error about a startup parameter of the client, whole. `None`: it is about something else,
    /// or has a name that a client must not read and has not sent.
    pub fn about_parameter(&self, startup: &Settings) -> Option<ClientError> {
        let DialCause::Refused(error) = &self.cause else { return None };
        let sqlstate = error.code()?.to_owned();
        // Of these routines it would be about the role or the database.
        let of_one = matches!(error.routine.as_deref(), Some("InitializeSessionUserId" | "CheckMyDatabase"));
        let is_parameter = matches!(&*sqlstate, "0A000" | "22023" | "42501" | "42602" | "42704" | "55P02");
        if startup.is_empty() || of_one || !is_parameter {
            return None;
        }
        let is_sent = |name: &str| startup.iter().any(|(_, value)| value.contains(name));
        let is_public =
            |text: &String| !self.hidden.iter().any(|name| has_word(text, name) && !is_sent(name));
        let message = error.message.clone().filter(is_public)?;
        let ErrorDetails { detail, hint } = error.details.as_deref().cloned().unwrap_or_default();
        let details = ErrorDetails::of(detail.filter(is_public), hint.filter(is_public));
        Some(ClientError::Server { sqlstate, message, details })
    }
}

impl DialCause {
    /// Whether any tenant would have failed, where the server had not asked for authentication yet.
    fn is_of_host(&self) -> bool {
        match self {
            // Resources (a role's limit comes later), shutdowns and restarts. A rule of pg_hba.conf may be
            // for one role.
            Self::Refused(error) => {
                ["53", "57P", "58"].iter().any(|class| error.code().unwrap_or_default().starts_with(class))
            }
            Self::WrongIdentity { .. } => false,
            Self::BothWays { first, then } => first.is_of_host() && then.is_of_host(),
            _ => true,
        }
    }

    /// Whether the host is away for a while; not a refusal of the role, the database or this kind of connection.
    pub(super) fn is_outage(&self) -> bool {
        match self {
            Self::Unreachable(error) => error.kind() != io::ErrorKind::PermissionDenied,
            Self::Unresolved(_) | Self::TimedOut(_) | Self::Standby | Self::NoPrimary(_) => true,
            // It shuts down or starts. A login trigger of the tenant's may use these codes too.
            Self::Refused(error) => {
                matches!(error.code(), Some("57P01" | "57P02" | "57P03"))
                    && error.routine.as_deref() != Some("exec_stmt_raise")
            }
            Self::BothWays { first, then } => first.is_outage() || then.is_outage(),
            Self::Tls(_) | Self::Protocol(_) | Self::WrongIdentity { .. } => false,
        }
    }

    /// Whether the server has sent an error for which `such` holds, with or without TLS.
    fn is_refusal(&self, such: impl Fn(&StartupError) -> bool + Copy) -> bool {
        match self {
            Self::Refused(error) => such(error),
            Self::BothWays { first, then } => first.is_refusal(such) || then.is_refusal(such),
            _ => false,
        }
    }

    /// SQLSTATE (`None`: 08006) and reason.
    fn for_client(&self, hidden: &[String]) -> (Option<[u8; 5]>, String) {
        let reason = match self {
            Self::Unreachable(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
                io::ErrorKind::NotFound => "there is no server at its address".to_owned(),
                io::ErrorKind::TimedOut => "the server does not answer".to_owned(),
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe => "the server closed the connection".to_owned(),
                _ => "the server cannot be reached".to_owned(),
            },
            Self::Unresolved(_) => "the server's name could not be resolved".to_owned(),
            Self::TimedOut(waited) => format!("no answer within {waited:?} (server_connect_timeout)"),
            Self::Refused(error) => return (error.sqlstate_for_client(), error.for_client(hidden)),
            Self::BothWays { then, .. } => return then.for_client(hidden),
            Self::Standby | Self::NoPrimary(_) => {
                return (
                    Some(*b"57P03"),
                    "no server of the tenant's host accepts writes at the moment".to_owned(),
                );
            }
            Self::Tls(_) => "no trusted TLS connection to the server".to_owned(),
            Self::Protocol(_) => "the server does not speak PostgreSQL's protocol as expected".to_owned(),
            Self::WrongIdentity { .. } => {
                "the server is not the one that is registered for this tenant".to_owned()
            }
        };
        (None, reason)
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.target, self.cause)
    }
}

impl std::error::Error for DialError {}

impl From<io::Error> for DialCause {
    fn from(error: io::Error) -> Self {
        Self::Unreachable(error)
    }
}

impl From<ReadError> for DialCause {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(error) => Self::Unreachable(error),
            ReadError::Closed { .. } => {
                Self::Unreachable(io::Error::new(io::ErrorKind::UnexpectedEof, error.to_string()))
            }
            ReadError::Length { .. } => Self::Protocol(error.to_string()),
        }
    }
}

/// Whether a text has this name, and not only as a part of a longer word.
fn has_word(text: &str, name: &str) -> bool {
    let ends = |next: Option<char>| next.is_none_or(|next| !next.is_alphanumeric() && next != '_');
    text.match_indices(name).any(|(at, _)| {
        let (before, behind) = (text.get(..at), text.get(at + name.len()..));
        ends(before.and_then(|text| text.chars().next_back()))
            && ends(behind.and_then(|text| text.chars().next()))
    })
}

/// What was found at each address, for operators.
fn each(found: &[(HostAddress, DialCause)]) -> String {
    let each = found.iter().map(|(address, cause)| format!("{address}: {cause}"));
    each.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(fields: &[(u8, &str)]) -> StartupError {
        let mut body = Vec::new();
        for (field, value) in fields {
            body.push(*field);
            crate::wire::message::append_cstr(&mut body, value.as_bytes());
        }
        body.push(0);
        StartupError::parse(&body)
    }

    #[test]
    fn a_client_reads_the_servers_message_unless_it_has_hidden_names() {
        let hidden = ["t_acme_rw".to_owned(), "db7.internal".to_owned()];
        for (code, message, read) in [
            ("53300", "sorry, too many clients already", "sorry, too many clients already"),
            ("57P03", "the database system is starting up", "the database system is starting up"),
            ("53300", "too many connections for role \"t_acme_rw\"", "too many connections"),
            ("3D000", "database \"acme\" does not exist", "database \"acme\" does not exist"),
            ("3D000", "database \"t_acme_rw\" does not exist", "the database does not exist"),
            ("28P01", "Passwort falsch", "the server does not accept the tenant's credentials"),
            ("XX000", "db7.internal is sad", "the server refused the connection"),
            ("P0001", "not on Sundays, bob", "the server refused the connection"),
            ("57P03", "two\nlines", "the server does not accept connections at the moment"),
        ] {
            assert_eq!(error(&[(b'C', code), (b'M', message)]).for_client(&hidden), read);
        }
    }

    #[test]
    fn an_error_about_a_parameter_is_whole_unless_it_has_hidden_names() {
        let startup = Settings::new([("role".to_owned(), "db7.internal".to_owned())]);
        let told = |fields: &[(u8, &str)], startup: &Settings| {
            let hidden = vec!["main".to_owned(), "db7.internal".to_owned(), "t_acme_rw".to_owned()];
            let cause = DialCause::Refused(error(fields));
            DialError { target: String::new(), hidden, cause }.about_parameter(startup)
        };
        let server = |message: &str, detail: Option<&str>, hint: Option<&str>| {
            let details = ErrorDetails::of(detail.map(Into::into), hint.map(Into::into));
            Some(ClientError::Server { sqlstate: "22023".to_owned(), message: message.to_owned(), details })
        };
        let fields = |message, detail| [(b'C', "22023"), (b'M', message), (b'D', detail), (b'H', "Try x.")];
        let whole = fields("invalid domain", "It remains so.");
        assert_eq!(told(&whole, &startup), server("invalid domain", Some("It remains so."), Some("Try x.")));
        assert_eq!(told(&fields("x", "Of \"t_acme_rw\"."), &startup), server("x", None, Some("Try x.")));
        assert_eq!(told(&fields("role \"t_acme_rw\" has no such role", ""), &startup), None);
        let sent = fields("role \"db7.internal\" does not exist", "d");
        assert_eq!(
            told(&sent, &startup),
            server("role \"db7.internal\" does not exist", Some("d"), Some("Try x."))
        );
        // Without parameters it is about something else, and so it is where PostgreSQL checks role and database.
        assert_eq!(told(&whole, &Settings::default()), None);
        let denied = [(b'C', "42501"), (b'M', "permission denied"), (b'R', "CheckMyDatabase")];
        assert_eq!(told(&denied, &startup), None);
    }

    #[test]
    fn a_failure_that_any_tenant_would_have_had_is_the_hosts() {
        let refused = |code, routine| DialCause::Refused(error(&[(b'C', code), (b'R', routine)]));
        let of_host = |cause, answered| {
            DialError { target: String::new(), hidden: Vec::new(), cause }.is_of_host(answered)
        };
        let unreachable = || DialCause::Unreachable(io::ErrorKind::ConnectionRefused.into());
        let silent = || DialCause::TimedOut(Duration::from_secs(5));
        let untrusted = || DialCause::Tls("unknown issuer".to_owned());
        for (cause, answered, expected) in [
            (unreachable(), false, true),
            // A library of the database that crashes, a login that hangs: the host has asked for the
            // password.
            (unreachable(), true, false),
            (silent(), false, true),
            (silent(), true, false),
            (untrusted(), false, true),
            (refused("57P03", "ProcessStartupPacket"), false, true),
            (refused("53300", "InitProcess"), false, true),
            (refused("53300", "InitPostgres"), true, true),
            (refused("53300", "CheckMyDatabase"), true, false),
            (refused("53300", "InitializeSessionUserId"), true, false),
            (refused("3D000", "InitPostgres"), true, false),
            (refused("28000", "ClientAuthentication"), false, false),
            (refused("28000", "InitializeSessionUserId"), true, false),
            (refused("28P01", "auth_failed"), true, false),
            (refused("57P03", "exec_stmt_raise"), true, false),
        ] {
            let said = format!("{cause:?}, {answered}");
            assert_eq!(of_host(cause, answered), expected, "{said}");
        }
        let both = |first, then| DialCause::BothWays { first: Box::new(first), then: Box::new(then) };
        assert!(of_host(both(untrusted(), unreachable()), false));
        assert!(!of_host(both(refused("28000", "ClientAuthentication"), untrusted()), false));
    }

    #[test]
    fn an_outage_is_what_another_attempt_may_find_over() {
        let refused = |code, routine| DialCause::Refused(error(&[(b'C', code), (b'R', routine)]));
        let both = |first, then| DialCause::BothWays { first: Box::new(first), then: Box::new(then) };
        let gone = |kind: io::ErrorKind| DialCause::Unreachable(kind.into());
        for outage in [
            gone(io::ErrorKind::ConnectionRefused),
            gone(io::ErrorKind::UnexpectedEof),
            gone(io::ErrorKind::NotFound),
            DialCause::Unresolved(io::ErrorKind::NotFound.into()),
            DialCause::TimedOut(Duration::from_secs(5)),
            refused("57P03", "ProcessStartupPacket"),
            refused("57P01", "ProcessInterrupts"),
            DialCause::NoPrimary(vec![(HostAddress::of("pg1", 5432), DialCause::Standby)]),
            both(DialCause::Tls("broken".to_owned()), gone(io::ErrorKind::ConnectionRefused)),
        ] {
            assert!(outage.is_outage(), "{outage:?}");
        }
        for final_one in [
            refused("28P01", "auth_failed"),
            refused("3D000", "InitPostgres"),
            refused("53300", "InitProcess"),
            refused("28000", "ClientAuthentication"),
            refused("57P03", "exec_stmt_raise"),
            gone(io::ErrorKind::PermissionDenied),
            DialCause::Tls("unknown issuer".to_owned()),
            DialCause::WrongIdentity { database: String::new(), role: String::new() },
        ] {
            assert!(!final_one.is_outage(), "{final_one:?}");
        }
    }

    #[test]
    fn every_field_may_be_missing() {
        assert_eq!(StartupError::parse(b""), StartupError::default());
        assert_eq!(StartupError::parse(b"\0"), StartupError::default());
        assert_eq!(StartupError::parse(b"Mcut"), StartupError::default());
        assert_eq!(error(&[(b'C', "toolong"), (b'M', "m")]).code(), None);
        assert_eq!(error(&[(b'C', "00\u{7f}\u{1}0")]).code(), None);
        assert_eq!(error(&[]).to_string(), "(no message) [SQLSTATE missing]");
    }

    proptest! {
        #[test]
        fn no_error_response_makes_the_parser_panic(body in prop::collection::vec(any::<u8>(), 0..80)) {
            let error = StartupError::parse(&body);
            let _ = (error.to_string(), error.for_client(&["a".to_owned()]));
        }
    }
}
