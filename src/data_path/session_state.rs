//! What a session has SET, and how to make another server look the same. Pure.
//!
//! The rules of SET, SET LOCAL, savepoints, ROLLBACK and RESET are PostgreSQL's, and we do not play them over again: a
//! text that may have changed something leaves a [`Doubts`], and when its transaction is over, before the server is
//! given back, the server itself is asked what became of it. A transaction without such a text costs nothing.
//!
//! Values reach a server only as bound parameters of `set_config`, never by quoting.

use std::sync::Arc;

use super::{
    lease::{Asked, Lease, Pins, Whose},
    statement::{self, Argument, Effects, Kind, Lexing, Statement},
};
use crate::wire::message::{append, append_cstr};

/// The parameters by which a session differs from a server that has just been opened; sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    values: Vec<(Box<str>, Box<str>)>,
}

impl Settings {
    /// From names and values in any order; of a name given twice the last value counts. Names are compared without
    /// regard to case, as PostgreSQL does.
    pub fn new(values: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut settings = Self::default();
        for (name, value) in values {
            settings.set(&name, Some(&value));
        }
        settings
    }

    /// Sets a value or takes it away.
    pub fn set(&mut self, name: &str, value: Option<&str>) {
        let name = name.to_ascii_lowercase().into_boxed_str();
        match (self.values.binary_search_by(|(known, _)| known.cmp(&name)), value) {
            (Ok(at), Some(value)) => self.values[at].1 = value.into(),
            (Ok(at), None) => drop(self.values.remove(at)),
            (Err(at), Some(value)) => self.values.insert(at, (name, value.into())),
            (Err(_), None) => {}
        }
    }

    /// The value of a parameter, by its name in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self.values.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
        self.values.get(at).map(|(_, value)| &**value)
    }

    /// Every name and value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(name, value)| (&**name, &**value))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether the session is as a server is opened.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// What a transaction leaves uncertain until the server is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Doubts(u8);

impl Doubts {
    /// Parameters whose names are known.
    pub const NAMED_SETTINGS: Self = Self(1);
    /// Any parameter.
    pub const ANY_SETTING: Self = Self(1 << 1);
    /// Temporary objects.
    pub const TEMPORARY: Self = Self(1 << 2);
    /// Session-level advisory locks.
    pub const LOCKS: Self = Self(1 << 3);
    /// Cursors WITH HOLD.
    pub const CURSORS: Self = Self(1 << 4);
    /// LISTEN, UNLISTEN.
    pub const LISTEN: Self = Self(1 << 5);
    /// SQL-level PREPARE, DEALLOCATE.
    pub const PREPARED: Self = Self(1 << 6);
    /// Everything above.
    pub const EVERYTHING: Self = Self(0x7f);

    /// No doubt.
    pub const NONE: Self = Self(0);

    /// Nothing to ask.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `other` is all in it.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Adds doubts.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// The pins that the server's answer decides on.
    const PINS: [(Self, Pins, &'static str); 5] = [
        (
            Self::TEMPORARY,
            Pins::TEMPORARY,
            "EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = pg_catalog.pg_my_temp_schema()) \
             OR EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace = pg_catalog.pg_my_temp_schema()) \
             OR EXISTS (SELECT FROM pg_catalog.pg_type WHERE typnamespace = pg_catalog.pg_my_temp_schema())",
        ),
        (
            Self::LOCKS,
            Pins::ADVISORY_LOCK,
            "EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid())",
        ),
        (Self::CURSORS, Pins::HOLD_CURSOR, "EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable)"),
        (Self::LISTEN, Pins::LISTEN, "EXISTS (SELECT pg_catalog.pg_listening_channels())"),
        (
            Self::PREPARED,
            Pins::PREPARE,
            "EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql)",
        ),
    ];
}

/// What a text may leave behind in the session that runs it; read once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aftermath {
    /// What to ask the server when the transaction is over.
    doubts: Doubts,
    /// The parameters it names, in lower case.
    names: Option<Box<[Box<str>]>>,
    /// What the server cannot be asked about, and pins.
    pins: Pins,
    /// EXECUTE or DEALLOCATE in SQL, which may name a statement prepared at protocol level.
    pub names_statements: bool,
}

impl Aftermath {
    /// A text nobody reads: everything is doubtful, and it pins.
    pub fn unread() -> Self {
        Self { doubts: Doubts::EVERYTHING, pins: Pins::UNREAD, ..Self::default() }
    }

    /// Reads a text.
    #[inline]
    pub fn read(sql: &[u8], lexing: Lexing) -> Self {
        let effects = statement::effects(sql, lexing);
        if HARMLESS.contains(effects) { Self::default() } else { Self::of(effects, sql, lexing) }
    }

    #[cold]
    fn of(effects: Effects, sql: &[u8], lexing: Lexing) -> Self {
        let mut doubts = Doubts::default();
        let mut pins = Pins::default();
        for (effect, doubt, pin) in CONSEQUENCES {
            if effects.intersects(effect) {
                doubts.insert(doubt);
                pins.insert(pin);
            }
        }
        let mut names: Vec<Box<str>> = Vec::new();
        let mut names_statements = false;
        for statement in statement::statements(sql, lexing) {
            names_statements |=
                statement.prepared.is_some() && !matches!(statement.kind, Kind::Prepare { .. });
            if !HARMLESS.contains(statement.deferred) {
                pins.insert(Pins::UNREAD); // each later EXECUTE or FETCH may do it
            }
            if !Self::parameters(&statement, &mut names) {
                doubts.insert(Doubts::ANY_SETTING);
            }
            pins.insert(Self::set_configs(&statement, &mut names));
        }
        if !names.is_empty() {
            doubts.insert(Doubts::NAMED_SETTINGS);
        }
        Self { doubts, names: (!names.is_empty()).then(|| names.into()), pins, names_statements }
    }

    /// The parameters that a SET or RESET names; `false` if it may change others as well.
    fn parameters(statement: &Statement<'_>, names: &mut Vec<Box<str>>) -> bool {
        let mut add = |name: &[u8]| names.push(String::from_utf8_lossy(name).into());
        match &statement.kind {
            Kind::Set { local: false, name, .. } | Kind::Reset(name) => add(name),
            Kind::SetRole { local: false, .. } => add(b"role"),
            Kind::SetSessionCharacteristics { local: false, .. } => {
                add(b"default_transaction_isolation");
                add(b"default_transaction_read_only");
                add(b"default_transaction_deferrable");
            }
            _ => return !statement.effects.contains(Effects::SETTING),
        }
        true
    }

    /// The parameters that calls of set_config name. One that cannot be told may be of a kind that PostgreSQL does not
    /// list: that pins.
    fn set_configs(statement: &Statement<'_>, names: &mut Vec<Box<str>>) -> Pins {
        if !statement.effects.contains(Effects::SET_CONFIG) {
            return Pins::default();
        }
        for call in statement.set_configs() {
            match (call.name, call.local) {
                (_, Argument::Boolean(true)) => {}
                (_, Argument::Text(local)) if is_true(&local) => {}
                (Argument::Text(name), _) => names.push(String::from_utf8_lossy(&name).into()),
                _ => return Pins::SETTINGS,
            }
        }
        if statement.effects.contains(Effects::HIDDEN) { Pins::SETTINGS } else { Pins::default() }
    }
}

/// How PostgreSQL reads a boolean, as far as drivers write one.
fn is_true(text: &[u8]) -> bool {
    [&b"true"[..], b"t", b"on", b"yes", b"1"].iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// Leaves nothing behind that the next transaction could miss on another server.
const HARMLESS: Effects = Effects::TRANSACTION
    .union(Effects::SETTING_LOCAL)
    .union(Effects::NOTIFY)
    .union(Effects::COPY)
    .union(Effects::DDL)
    .union(Effects::OUTSIDE_TRANSACTION)
    .union(Effects::SEQUENCE_WRITE)
    .union(Effects::CODE)
    .union(Effects::HIDDEN);

/// What each effect makes doubtful, and what it pins.
const CONSEQUENCES: [(Effects, Doubts, Pins); 13] = [
    (Effects::PREPARED, Doubts::PREPARED, Pins::NONE),
    (Effects::LISTEN, Doubts::LISTEN, Pins::NONE),
    (Effects::CURSOR.union(Effects::CURSOR_HOLD), Doubts::CURSORS, Pins::NONE),
    (Effects::TEMPORARY.union(Effects::DROP), Doubts::TEMPORARY, Pins::NONE),
    (Effects::ADVISORY_LOCK.union(Effects::ADVISORY_UNLOCK), Doubts::LOCKS, Pins::NONE),
    (Effects::SET_CONFIG, Doubts::ANY_SETTING, Pins::NONE),
    (Effects::LOAD, Doubts::ANY_SETTING, Pins::LOAD),
    (Effects::SEQUENCE_READ, Doubts::NONE, Pins::SEQUENCE),
    (Effects::SEED, Doubts::NONE, Pins::FUNCTION_STATE),
    (Effects::FUNCTION_STATE, Doubts::NONE, Pins::FUNCTION_STATE),
    (Effects::DISCARD, Doubts::EVERYTHING, Pins::NONE),
    (Effects::DYNAMIC, Doubts::EVERYTHING, Pins::NONE),
    (Effects::UNKNOWN, Doubts::EVERYTHING, Pins::UNREAD),
];

/// What the transactions of a lease have left uncertain so far.
#[derive(Debug, Default)]
pub struct Uncertain {
    doubts: Doubts,
    pins: Pins,
    names: Vec<Box<str>>,
}

impl Uncertain {
    /// Nothing to ask and nothing to pin.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.doubts.is_empty() && self.pins.is_empty()
    }

    /// A text with this aftermath goes to the server.
    #[inline]
    pub fn note(&mut self, aftermath: &Aftermath) {
        self.pins.insert(aftermath.pins);
        self.doubts.insert(aftermath.doubts);
        for name in aftermath.names.iter().flatten() {
            self.name(name);
        }
    }

    /// The pins that no question decides. A text that nobody understood leaves nothing behind if it failed.
    pub fn pins(&self, failed: bool) -> Pins {
        let mut pins = self.pins;
        if failed {
            pins.remove(Pins::UNREAD);
        }
        pins
    }

    /// Whether the server must be asked.
    pub fn has_doubts(&self) -> bool {
        !self.doubts.is_empty()
    }

    /// That parameter may have changed.
    pub fn name(&mut self, name: &str) {
        if name == "session_authorization" {
            self.pins.insert(Pins::SETTINGS);
        }
        self.doubts.insert(Doubts::NAMED_SETTINGS);
        if !self.names.iter().any(|known| **known == *name) {
            self.names.push(name.into());
        }
    }

    /// Nothing is uncertain any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The question to ask, and its one parameter, a PostgreSQL array of names.
    ///
    /// Rows: `('s', name, value)` for settings, `('p', pin, '')` for each pin that holds. `carried` are the settings of
    /// which the session knows already: those that PostgreSQL does not list are asked for by name.
    pub fn question(&self, carried: &Settings) -> (String, String) {
        let mut parts = Vec::new();
        let mut names: Vec<&str> = self.names.iter().map(|name| &**name).collect();
        if self.doubts.contains(Doubts::ANY_SETTING) {
            parts.push(
                "SELECT 's', name, pg_catalog.current_setting(name) FROM pg_catalog.pg_settings WHERE source = 'session'"
                    .to_owned(),
            );
            names.extend(carried.iter().map(|(name, _)| name).filter(|name| name.contains('.')));
            names.push("role");
        }
        parts.push(
            "SELECT 's', name, pg_catalog.current_setting(name, true) FROM pg_catalog.unnest($1::text[]) AS name"
                .to_owned(),
        );
        for (doubt, pin, holds) in Doubts::PINS {
            if self.doubts.contains(doubt) {
                parts.push(format!("SELECT 'p', '{}', '' WHERE {holds}", pin.bits()));
            }
        }
        names.retain(|name| !UNASKABLE.contains(name));
        (parts.join(" UNION ALL "), array_literal(&names))
    }

    /// Takes in the answer: what the session's settings are now, and the pins that hold.
    pub fn answered(&self, rows: &[Vec<Option<Vec<u8>>>], carried: &Settings, pins: &mut Pins) -> Settings {
        let mut settings =
            if self.doubts.contains(Doubts::ANY_SETTING) { Settings::default() } else { carried.clone() };
        for (doubt, pin, _) in Doubts::PINS {
            if self.doubts.contains(doubt) {
                pins.remove(pin);
            }
        }
        for row in rows {
            let text = |at: usize| {
                row.get(at).and_then(Option::as_deref).and_then(|bytes| std::str::from_utf8(bytes).ok())
            };
            match (text(0), text(1), text(2)) {
                (Some("p"), Some(bits), _) => pins.insert(Pins::from_bits(bits.parse().unwrap_or(0))),
                (Some("s"), Some("role"), Some("none")) => settings.set("role", None),
                (Some("s"), Some(name), Some(value)) => settings.set(name, Some(value)),
                (Some("s"), Some(name), None) => settings.set(name, None),
                _ => {}
            }
        }
        settings
    }
}

/// They end with their transaction, cannot be set again from what they show, or are reported but nobody's to set.
const UNASKABLE: [&str; 10] = [
    "transaction_isolation",
    "transaction_read_only",
    "transaction_deferrable",
    "seed",
    "session_authorization",
    "is_superuser",
    "in_hot_standby",
    "server_version",
    "server_encoding",
    "integer_datetimes",
];

fn array_literal(names: &[&str]) -> String {
    let quoted: Vec<String> =
        names.iter().map(|name| format!("\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""))).collect();
    format!("{{{}}}", quoted.join(","))
}

/// What a server calls our statement that sets parameters.
const SETTER: &[u8] = b"pglobby_set";

/// Appends what turns a server with `applied` into one with `wanted`; in the same write as the client's next request.
/// `has_setter` tells whether the server knows our statement already.
pub fn prelude(
    applied: &Arc<Settings>,
    wanted: &Arc<Settings>,
    has_setter: &mut bool,
    lease: &mut Lease,
    out: &mut Vec<u8>,
) {
    if Arc::ptr_eq(applied, wanted) || applied == wanted {
        return;
    }
    let none = Settings::default();
    let mut from: &Settings = applied;
    if applied.iter().any(|(name, _)| wanted.get(name).is_none()) {
        // Neither role nor session authorisation is touched by RESET ALL.
        append(out, b'Q', |out| append_cstr(out, b"RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL"));
        let _ = lease.ask(Asked::Query, Whose::Ours);
        from = &none;
    }
    let missing = || wanted.iter().filter(|(name, value)| from.get(name) != Some(value));
    // A role may set less than the login: it comes last.
    let ordered =
        missing().filter(|(name, _)| *name != "role").chain(missing().filter(|(name, _)| *name == "role"));
    let mut any = false;
    for (name, value) in ordered {
        if !std::mem::replace(has_setter, true) {
            append(out, b'P', |out| {
                append_cstr(out, SETTER);
                append_cstr(out, b"SELECT pg_catalog.set_config($1, $2, false)");
                out.extend_from_slice(&0u16.to_be_bytes());
            });
            let _ = lease.ask(Asked::Parse(None), Whose::Ours);
        }
        any = true;
        bind_setter(name, value, out);
        let _ = lease.ask(Asked::Bind, Whose::Ours);
        append(out, b'E', |out| out.extend_from_slice(&[0; 5]));
        let _ = lease.ask(Asked::Execute, Whose::Ours);
    }
    if any {
        append(out, b'S', |_| {});
        let _ = lease.ask(Asked::Sync, Whose::Ours);
    }
}

/// Bind of the unnamed portal to [`SETTER`] with two text parameters.
fn bind_setter(name: &str, value: &str, out: &mut Vec<u8>) {
    append(out, b'B', |out| {
        append_cstr(out, b"");
        append_cstr(out, SETTER);
        out.extend_from_slice(&[0, 0, 0, 2]); // parameter formats: all text; two parameters
        for text in [name, value] {
            out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        out.extend_from_slice(&[0, 0]); // result formats: all text
    });
}
