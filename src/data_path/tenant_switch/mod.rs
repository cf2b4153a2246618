//! A service login chooses its session's tenant with SQL: `SET pglobby.tenant = 'acme'`. Pure.
//!
//! This file reads what a text asks for; [`local_answers`] answers the messages; [`switcher`] asks the
//! directory whether the login has access.
//!
//! A choice has to be a statement of its own, while no server is held. So no statement for one tenant can
//! reach another tenant's server. A text that mentions the choice in any other way is refused, see
//! [`TenantMention`].

pub mod local_answers;
mod local_extended;
mod messages;
pub mod own_password;
pub mod switcher;
#[cfg(test)]
mod tests;

use crate::{
    data_path::{
        exchange::ClientSide,
        session_state::{
            identity::{IdentityDecision, NewPassword},
            side_effects::{DriverReset, SideEffects},
        },
        sql::{self, Argument, Discard, Kind, Lexing, SetConfig, SetValue, TenantMention, TransactionModes},
    },
    error::IdentityError,
};

/// A request to change the tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantRequest {
    /// The tenant's name; `None`: the session's first tenant.
    pub tenant: Option<Box<str>>,
    /// For this transaction only.
    pub local: bool,
}

/// A choice in a text; Bind has the values of its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    tenant: Value,
    local: Value,
    form: Form,
}

/// A value in the text or in a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    /// `None`: the session's first tenant.
    Text(Option<Box<str>>),
    Boolean(bool),
    Parameter(u16),
}

/// The statement that makes the choice; the reply depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Set,
    Reset,
    SetConfig,
    AlterRole,
}

/// How a text is answered while the session holds no server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// A server has to answer it.
    Server,
    /// A text without a statement.
    Empty,
    /// Choose a tenant.
    Choose(Choice),
    /// Refuse it: it chooses a tenant in an unsupported way.
    Mixed,
    /// Give the login another password.
    Password(NewPassword),
    /// Refuse it: it would change a role or the database.
    Refused(IdentityError),
    Show(Box<str>),
    /// BEGIN, START TRANSACTION.
    Begin {
        /// READ ONLY and the like.
        modes: TransactionModes,
        /// START TRANSACTION.
        start: bool,
    },
    /// COMMIT or ROLLBACK.
    Finish {
        commit: bool,
    },
    /// `SELECT 1`, with which pools check a connection.
    Ping,
    /// SET of another parameter.
    Set(Box<str>, Box<str>),
    /// RESET of another parameter.
    Unset(Box<str>),
    /// The reset that a pool sends between two users of a connection.
    DriverReset {
        /// What it resets.
        reset: DriverReset,
        /// The CommandComplete of each of its statements.
        tags: Box<[&'static str]>,
    },
}

impl Plan {
    /// The plan for a text of this session.
    pub fn of(sql: &[u8], session: &ClientSide) -> Self {
        match session.rules().identity.decide(sql, session.lexing()) {
            Some(IdentityDecision::Password(password)) => Self::Password(password),
            Some(IdentityDecision::Refused(reason)) => Self::Refused(reason),
            None => Self::read(sql, session.lexing()),
        }
    }

    /// The plan for a text, whatever the session's login is.
    pub fn read(sql: &[u8], lexing: Lexing) -> Self {
        let mut statements = sql::statements(sql, lexing);
        let Some(first) = statements.next() else { return Self::Empty };
        if statements.next().is_some() {
            return Self::of_many(sql, lexing);
        }
        match &first.kind {
            Kind::Begin(modes) => {
                let start = first.text.get(..5).is_some_and(|word| word.eq_ignore_ascii_case(b"start"));
                Self::Begin { modes: *modes, start }
            }
            Kind::Commit { chain: false } => Self::Finish { commit: true },
            Kind::Rollback { chain: false } => Self::Finish { commit: false },
            Kind::Show(Some(name)) => text(name).map_or(Self::Server, Self::Show),
            Kind::Query if first.text.eq_ignore_ascii_case(b"select 1") => Self::Ping,
            _ if first.effects.is_empty() && first.deferred.is_empty() => Self::Server,
            _ if TenantMention::of(&first) == TenantMention::Sets => {
                Self::choice(&first).map_or(Self::Mixed, Self::Choose)
            }
            Kind::Set { local: false, name, value: SetValue::Text(value) } => {
                let set = text(name).zip(text(value));
                set.map_or(Self::Server, |(name, value)| Self::Set(name, value))
            }
            Kind::Reset(name) | Kind::Set { local: false, name, value: SetValue::Default } => {
                text(name).map_or(Self::Server, Self::Unset)
            }
            _ => Self::of_many(sql, lexing),
        }
    }

    /// The plan for several statements, or for one that may be a pool's reset.
    fn of_many(sql: &[u8], lexing: Lexing) -> Self {
        let side_effects = SideEffects::read(sql, lexing);
        match side_effects.driver_reset {
            _ if side_effects.tenant == TenantMention::Sets => Self::Mixed,
            Some(reset) => {
                let tags = sql::statements(sql, lexing).map(|statement| tag(&statement.kind)).collect();
                Self::DriverReset { reset, tags }
            }
            None => Self::Server,
        }
    }

    fn choice(statement: &sql::Statement<'_>) -> Option<Choice> {
        let (value, local, form) = match &statement.kind {
            Kind::Set { local, value, .. } => (value, *local, Form::Set),
            Kind::Reset(_) => (&SetValue::Default, false, Form::Reset),
            _ => return Choice::by_call(&statement.lone_set_config()?),
        };
        let tenant = match value {
            SetValue::Default => None,
            SetValue::Text(name) => Some(text(name)?),
            SetValue::Opaque => return None,
        };
        Some(Choice { tenant: Value::Text(tenant), local: Value::Boolean(local), form })
    }
}

impl Plan {
    /// The types of its parameters.
    fn parameters(&self) -> Vec<self::messages::Type> {
        let Self::Choose(choice) = self else { return Vec::new() };
        let is_flag = |number| choice.local == Value::Parameter(number);
        let type_of =
            |number| if is_flag(number) { self::messages::Type::Bool } else { self::messages::Type::Text };
        (1..=choice.parameters()).map(type_of).collect()
    }
}

impl Choice {
    fn by_call(call: &SetConfig<'_>) -> Option<Self> {
        let tenant = match &call.value {
            Argument::Text(name) => Value::Text(Some(text(name)?)),
            Argument::Null => Value::Text(None),
            Argument::Parameter(number) => Value::Parameter(*number),
            Argument::Boolean(_) | Argument::Opaque => return None,
        };
        let local = match &call.local {
            Argument::Boolean(local) => Value::Boolean(*local),
            Argument::Parameter(number) => Value::Parameter(*number),
            _ => return None,
        };
        matches!(&call.name, Argument::Text(_)).then_some(Self { tenant, local, form: Form::SetConfig })
    }

    /// The number of parameters. All are `text`, except for the flag of set_config.
    fn parameters(&self) -> u16 {
        let number = |value: &Value| if let Value::Parameter(number) = value { *number } else { 0 };
        number(&self.tenant).max(number(&self.local))
    }

    /// The request with these parameters; `None` if they give no valid one.
    fn request(&self, parameters: &[Option<&[u8]>]) -> Option<TenantRequest> {
        let given = |number: u16| parameters.get(usize::from(number).checked_sub(1)?).copied();
        let tenant = match &self.tenant {
            Value::Text(tenant) => tenant.clone(),
            Value::Parameter(number) => {
                given(*number)?.map(text).map_or(Some(None), |name| name.map(Some))?
            }
            Value::Boolean(_) => return None,
        };
        let local = match self.local {
            Value::Boolean(local) => local,
            Value::Parameter(number) => boolean(given(number)?)?,
            Value::Text(_) => return None,
        };
        Some(TenantRequest { tenant, local })
    }
}

/// The CommandComplete of a statement of a reset.
fn tag(kind: &Kind<'_>) -> &'static str {
    match kind {
        Kind::Discard(Discard::All) => "DISCARD ALL",
        Kind::Discard(Discard::Plans) => "DISCARD PLANS",
        Kind::Discard(Discard::Sequences) => "DISCARD SEQUENCES",
        Kind::Discard(Discard::Temp) => "DISCARD TEMP",
        Kind::ResetAll => "RESET",
        Kind::Unlisten(_) => "UNLISTEN",
        Kind::CloseCursor(_) => "CLOSE CURSOR ALL",
        _ => self::messages::ONE_ROW,
    }
}

/// A boolean parameter, in text or binary; NULL is false.
fn boolean(bytes: Option<&[u8]>) -> Option<bool> {
    match bytes {
        None | Some([0] | b"f" | b"false" | b"off" | b"0" | b"no") => Some(false),
        Some([1] | b"t" | b"true" | b"on" | b"1" | b"yes") => Some(true),
        Some(_) => None,
    }
}

fn text(bytes: &[u8]) -> Option<Box<str>> {
    std::str::from_utf8(bytes).ok().map(Into::into)
}
