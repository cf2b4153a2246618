//! What a text may leave behind in the session that runs it. Pure; a text is read once, when it is parsed or first seen.
//!
//! `statement/` says what a text may do; here is decided what follows from it for a session that goes from server to
//! server: what to ask the server when the transaction is over, and what pins at once because nobody can be asked.

#[cfg(test)]
mod tests;

use super::{parameters::matters, pins::Pins, resets::Resets, state_query::Doubts};
use crate::data_path::sql::{
    self, Argument, Discard, Effects, Kind, Lexing, SESSION_FUNCTIONS, SetConfig, SetConfigs, SetValue,
    Statement, Talk, dotted_names, words,
};

/// What a text may leave behind in the session that runs it; read once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aftermath {
    /// What to ask the server when the transaction is over.
    pub doubts: Doubts,
    /// The parameters it names, in lower case.
    pub names: Option<Box<[Box<str>]>>,
    /// Bytes of the statements that SET them.
    pub set_bytes: usize,
    /// What the server cannot be asked about, and pins.
    pub pins: Pins,
    /// It only tidies up, as drivers' pools do between two users of a connection.
    pub tidies: Option<Tidying>,
    /// It is LOAD and nothing else: if it fails, nothing is loaded.
    pub only_loads: bool,
    /// PREPARE, EXECUTE or DEALLOCATE: servers know statements under other names.
    pub names_statements: bool,
    /// It takes statements away that are prepared: DEALLOCATE, DISCARD ALL.
    pub forgets_statements: bool,
    /// It may look at what is prepared (`pg_prepared_statements`).
    pub inspects: bool,
    /// What it has to do with the tenant of the session.
    pub talk: Talk,
    /// It is about roles or a database: see [`super::identity`].
    pub identity: bool,
    /// It may commit a transaction that was begun before.
    pub commits: bool,
    /// It may advance a sequence, by a default perhaps.
    pub advances: bool,
    /// It calls a function that signals another session; `None` too if it calls both.
    pub signals: Option<Signal>,
    /// It takes parameters back to what they were when the session began.
    pub resets: Option<Box<Resets>>,
}

/// What one session may do to another by SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// `pg_cancel_backend`: ends what it runs.
    Cancel,
    /// `pg_terminate_backend`: ends it.
    Terminate,
}

impl Signal {
    fn of(effects: Effects) -> Option<Self> {
        match (effects.contains(Effects::CANCEL), effects.contains(Effects::TERMINATE)) {
            (true, false) => Some(Self::Cancel),
            (false, true) => Some(Self::Terminate),
            _ => None,
        }
    }
}

/// What a text that only tidies up leaves of the session's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tidying {
    /// All of them.
    KeepsSettings,
    /// None but the role: RESET ALL.
    ResetsSettings,
    /// None: DISCARD ALL.
    DiscardsAll,
}

impl Tidying {
    /// What a text of nothing but such statements does; `None` if another one is among them.
    fn read(sql: &[u8], lexing: Lexing) -> Option<Self> {
        let mut all = Self::KeepsSettings;
        for statement in sql::statements(sql, lexing) {
            match statement.kind {
                Kind::Discard(Discard::All) => all = Self::DiscardsAll,
                Kind::ResetAll if all == Self::KeepsSettings => all = Self::ResetsSettings,
                Kind::ResetAll | Kind::Unlisten(None) | Kind::CloseCursor(None) | Kind::Discard(_) => {}
                Kind::Query if is_unlock_all(&statement) => {}
                _ => return None,
            }
        }
        Some(all)
    }
}

/// `SELECT pg_advisory_unlock_all()` as drivers write it.
fn is_unlock_all(statement: &Statement<'_>) -> bool {
    let text = statement.text.to_ascii_lowercase();
    let call = text.strip_prefix(b"select").map(<[u8]>::trim_ascii);
    let call = call.map(|call| call.strip_prefix(b"pg_catalog.").unwrap_or(call));
    call == Some(b"pg_advisory_unlock_all()")
}

impl Aftermath {
    /// It may have to wait, or be refused: it speaks of the session's tenant, or of roles or a database.
    #[inline]
    pub fn is_guarded(&self) -> bool {
        self.identity || self.talk == Talk::Chooses
    }

    /// A text nobody reads.
    pub fn unread() -> Self {
        let mut doubts = Doubts::FUNCTIONS;
        doubts.insert(Self::anything().doubts);
        Self { doubts, commits: true, advances: true, ..Self::default() }
    }

    /// Reads a text.
    #[inline]
    pub fn read(sql: &[u8], lexing: Lexing) -> Self {
        let effects = sql::effects(sql, lexing);
        let harmless =
            HARMLESS.contains(effects) && !effects.intersects(Effects::DDL | Effects::SETTING_LOCAL);
        let commits = effects.contains(Effects::TRANSACTION) && commits(sql);
        let (advances, signals) = (may_advance(sql), Signal::of(effects));
        match harmless {
            true => Self { commits, advances, signals, ..Self::default() },
            false => Self { commits, advances, signals, ..Self::of(effects, sql, lexing) },
        }
    }

    /// What cannot be told at all may leave anything behind.
    pub fn anything() -> Self {
        let mut doubts = Doubts::EVERYTHING;
        doubts.insert(Doubts::UNNAMED);
        Self { doubts, ..Self::default() }
    }

    /// A call of a function of PostgreSQL's own, wherever it stands.
    pub fn of_call(name: &[u8]) -> Self {
        let mut call = Self::default();
        let effects = Effects::of_call(name);
        call.follow(effects);
        if effects.contains(Effects::SET_CONFIG) {
            call.doubts.insert(Doubts::ANY_SETTING);
            call.doubts.insert(Doubts::UNNAMED);
        }
        call
    }

    /// What a call of a function with this body, in SQL or PL/pgSQL, may leave behind; `effects` are the body's.
    pub fn of_body(effects: Effects, body: &[u8]) -> Self {
        let mut found = Self::default();
        if !HARMLESS.contains(effects) {
            found.follow(effects);
            let mut names = Vec::new();
            if effects.intersects(Effects::SETTING | Effects::DYNAMIC) {
                found.doubts.insert(Doubts::ANY_SETTING);
                names.extend(dotted_names(body));
            }
            let calls = sql::set_configs(body).filter(|call| call.local != Argument::Boolean(true));
            for call in calls.take_while(|_| effects.contains(Effects::SET_CONFIG)) {
                found.doubts.insert(Doubts::ANY_SETTING);
                match call.name {
                    Argument::Text(name) => names.push(String::from_utf8_lossy(&name).into()),
                    _ => found.pins.insert(Pins::SETTINGS),
                }
            }
            found.names = (!names.is_empty()).then(|| names.into());
        }
        if effects.intersects(Effects::SETTING_LOCAL | Effects::SET_CONFIG) {
            found.doubts.insert(Doubts::LOCAL_SETTINGS);
        }
        if effects.intersects(Effects::DDL) {
            found.doubts.insert(changed_objects(body, false));
        }
        found
    }

    /// The same in a language that puts together what it runs.
    pub fn of_foreign_body(body: &[u8]) -> Self {
        let names: Box<[Box<str>]> = dotted_names(body).collect();
        Self { names: Some(names), ..Self::anything() }
    }

    fn follow(&mut self, effects: Effects) {
        for (effect, doubt, pin) in CONSEQUENCES {
            if effects.intersects(effect) {
                self.doubts.insert(doubt);
                self.pins.insert(pin);
            }
        }
    }

    #[cold]
    fn of(effects: Effects, sql: &[u8], lexing: Lexing) -> Self {
        let mut followed = Self::default();
        followed.follow(effects);
        let Self { mut doubts, mut pins, .. } = followed;
        let mut names: Vec<Box<str>> = Vec::new();
        let (mut names_statements, mut unfollowed, mut identity) = (false, false, false);
        let (inspects, mut forgets_statements) = (effects.contains(Effects::INSPECTION), false);
        let (mut talk, mut set_bytes, mut taken_back) = (Talk::default(), 0, Resets::default());
        if effects.intersects(Effects::DDL) {
            doubts.insert(changed_objects(sql, true));
        }
        if effects.intersects(Effects::HIDDEN | Effects::DYNAMIC | Effects::UNKNOWN) {
            names.extend(dotted_names(sql));
        }
        for statement in sql::statements(sql, lexing) {
            names_statements |= statement.prepared.is_some();
            forgets_statements |= matches!(
                statement.kind,
                Kind::Deallocate | Kind::DeallocateAll | Kind::Discard(Discard::All)
            );
            unfollowed |= statement.effects.contains(Effects::PREPARED) && statement.prepared.is_none();
            talk = talk.max(Talk::of(&statement));
            identity |= statement.identity_change().is_some();
            taken_back.take(&statement);
            if !is_read_again(&statement) {
                // A FETCH may do it, at the latest when the transaction ends: what is held is read then.
                let mut later = Self::default();
                later.follow(statement.deferred);
                doubts.insert(later.doubts);
                pins.insert(later.pins);
            }
            if resets(&statement.kind) {
                doubts.insert(Doubts::SOURCES);
            }
            let named = names.len();
            if !Self::parameters(&statement, &mut names) {
                doubts.insert(Doubts::ANY_SETTING);
            }
            let (asked, opaque) = Self::set_configs(&statement, &mut names);
            doubts.insert(asked);
            pins.insert(opaque);
            if changes_parsing(&statement) {
                doubts.insert(Doubts::LOCAL_SETTINGS);
            }
            if names.len() > named && is_set(&statement) {
                set_bytes += statement.text.len();
            }
        }
        if !names.is_empty() {
            doubts.insert(Doubts::NAMED_SETTINGS);
        }
        if names_statements && !unfollowed && !effects.intersects(EVERYTHING_PREPARED) {
            doubts = doubts.difference(Doubts::PREPARED);
        }
        let names = (!names.is_empty()).then(|| names.into());
        let tidies = Tidying::read(sql, lexing);
        let only_loads = effects == Effects::LOAD && sql::statements(sql, lexing).count() == 1;
        let read = Self { doubts, names, pins, tidies, set_bytes, only_loads, ..Self::default() };
        let resets = taken_back.unless_none();
        Self { names_statements, forgets_statements, inspects, talk, identity, resets, ..read }
    }

    /// The parameters that a SET or RESET names; `false` if it may change others as well.
    fn parameters(statement: &Statement<'_>, names: &mut Vec<Box<str>>) -> bool {
        let mut add = |name: &[u8]| names.push(String::from_utf8_lossy(name).into());
        match &statement.kind {
            // It takes the role with it.
            Kind::Reset(name) if **name == *b"session_authorization" => {
                add(name);
                add(b"role");
            }
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
    /// list: that pins. What code in PL/pgSQL runs by EXECUTE is asked about as in any other code.
    fn set_configs(statement: &Statement<'_>, names: &mut Vec<Box<str>>) -> (Doubts, Pins) {
        const ANY: Doubts = Doubts::ANY_SETTING;
        if !statement.effects.contains(Effects::SET_CONFIG) {
            return Default::default();
        }
        let told = Self::name_all(statement.set_configs(), names);
        let code = statement.code_block();
        let told = told && code.as_deref().is_none_or(|code| Self::name_all(sql::set_configs(code), names));
        match code {
            _ if !told => (ANY, Pins::SETTINGS),
            Some(_) => (ANY | Doubts::UNNAMED, Pins::default()),
            None if statement.effects.contains(Effects::HIDDEN) => (ANY, Pins::SETTINGS),
            None => Default::default(),
        }
    }

    /// Whether they can all be told.
    fn name_all(calls: SetConfigs<'_>, names: &mut Vec<Box<str>>) -> bool {
        for call in calls {
            match (call.name, call.local) {
                (_, Argument::Boolean(true)) => {}
                (_, Argument::Text(local)) if is_true(&local) => {}
                (Argument::Text(name), _) => names.push(String::from_utf8_lossy(&name).into()),
                _ => return false,
            }
        }
        true
    }
}

/// Whether a statement sets, for its transaction, what matters when a text is parsed.
fn changes_parsing(statement: &Statement<'_>) -> bool {
    let name_matters = |name: &[u8]| std::str::from_utf8(name).map_or(true, matters);
    let is_set = match &statement.kind {
        Kind::Set { local: true, name, .. } => name_matters(name),
        Kind::SetRole { local: true, .. } | Kind::SetSessionAuthorization { local: true, .. } => true,
        _ => false,
    };
    let called = |call: SetConfig<'_>| match call.name {
        Argument::Text(name) => name_matters(&name),
        _ => true,
    };
    let calls = statement.effects.contains(Effects::SET_CONFIG) || statement.effects.contains(HIDDEN_LOCAL);
    is_set || calls && (statement.effects.contains(Effects::HIDDEN) || statement.set_configs().any(called))
}

/// A DO, or a text within the text, sets something.
const HIDDEN_LOCAL: Effects = Effects::HIDDEN.union(Effects::SETTING_LOCAL);

/// Whether one of the statements is COMMIT, END or PREPARE TRANSACTION, as far as their first words tell.
fn commits(sql: &[u8]) -> bool {
    const ENDS: [&[u8]; 3] = [b"commit", b"end", b"prepare"];
    let first = |part: &[u8]| -> usize {
        part.iter().position(|byte| !byte.is_ascii_alphabetic()).unwrap_or(part.len())
    };
    sql.split(|byte| *byte == b';').map(<[u8]>::trim_ascii_start).any(|part| {
        let word = part.get(..first(part)).unwrap_or_default();
        ENDS.iter().any(|end| word.eq_ignore_ascii_case(end))
    })
}

/// Whether a text may advance a sequence. SELECT and UPDATE do so by name only, which is seen at a glance in most.
#[inline]
fn may_advance(sql: &[u8]) -> bool {
    let text = sql.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text);
    let by_name = |verb: &[u8]| text.get(..verb.len()).is_some_and(|first| first.eq_ignore_ascii_case(verb));
    let is_plain = (by_name(b"select") || by_name(b"update"))
        && !text.iter().any(|byte| matches!(byte, b';' | b'v' | b'V'));
    !is_plain && has_advancing_word(text)
}

#[cold]
fn has_advancing_word(text: &[u8]) -> bool {
    const WORDS: [&[u8]; 7] = [b"insert", b"merge", b"copy", b"nextval", b"setval", b"call", b"do"];
    words(text).any(|word| WORDS.iter().any(|advances| word.eq_ignore_ascii_case(advances)))
}

/// Whether a statement does nothing but SET a parameter for the session, so that its text tells how long the value is.
fn is_set(statement: &Statement<'_>) -> bool {
    matches!(statement.kind, Kind::Set { value: SetValue::Text(_), .. })
        || statement.lone_set_config().is_some()
}

/// Whether a parameter that is named goes back to where it was.
fn resets(kind: &Kind<'_>) -> bool {
    matches!(kind, Kind::Reset(_) | Kind::Set { local: false, value: SetValue::Default, .. })
}

/// Whether what a statement may do later is looked at when it is done: a function's body, a view, what PREPARE prepares.
fn is_read_again(statement: &Statement<'_>) -> bool {
    matches!(statement.kind, Kind::CreateRoutine | Kind::Ddl | Kind::Prepare { .. })
}

/// Makes prepared statements doubtful whatever else a text does.
const EVERYTHING_PREPARED: Effects = Effects::DISCARD.union(Effects::DYNAMIC).union(Effects::UNKNOWN);

/// Whether a text may make or change functions, or only what calls them; or settings of a role or a database. `tables`: tables
/// count, whose defaults may.
fn changed_objects(text: &[u8], tables: bool) -> Doubts {
    const FUNCTIONS: [&[u8]; 11] = [
        b"function",
        b"procedure",
        b"routine",
        b"event",
        b"extension",
        b"operator",
        b"cast",
        b"aggregate",
        b"domain",
        b"type",
        b"language",
    ];
    const CALLERS: [&[u8]; 7] =
        [b"trigger", b"rule", b"view", b"policy", b"constraint", b"materialized", b"recursive"];
    const TABLES: [&[u8]; 3] = [b"table", b"unlogged", b"foreign"];
    const SESSION_STARTS: [&[u8]; 4] = [b"role", b"user", b"group", b"database"];
    let words =
        text.split(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_').filter(|word| !word.is_empty());
    let (mut before, mut changed, mut calls): (&[u8], _, _) = (b"", Doubts::empty(), false);
    for word in words {
        let verb =
            [&b"create"[..], b"alter", b"replace"].iter().any(|verb| before.eq_ignore_ascii_case(verb));
        before = word;
        let is = |object: &&[u8]| word.eq_ignore_ascii_case(object);
        if verb && SESSION_STARTS.iter().any(is) {
            changed.insert(Doubts::SESSION_START);
        }
        if verb && FUNCTIONS.iter().any(is) {
            changed.insert(Doubts::FUNCTIONS);
        }
        if verb && (CALLERS.iter().any(is) || tables && TABLES.iter().any(is)) {
            changed.insert(Doubts::CALLERS);
        }
        // A view or a default that calls one of PostgreSQL's own leaves something behind by itself.
        calls |= word.len() > 6 && SESSION_FUNCTIONS.iter().any(|name| is(&name.as_bytes()));
    }
    let functions = changed.contains(Doubts::FUNCTIONS) || calls && changed.contains(Doubts::CALLERS);
    if functions { changed.difference(Doubts::CALLERS).union(Doubts::FUNCTIONS) } else { changed }
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
    .union(Effects::CANCEL)
    .union(Effects::TERMINATE)
    .union(Effects::ANY_RELATION)
    .union(Effects::HIDDEN);

/// What each effect makes doubtful, and what it pins.
const CONSEQUENCES: [(Effects, Doubts, Pins); 13] = [
    (Effects::PREPARED, Doubts::PREPARED, Pins::empty()),
    (Effects::LISTEN, Doubts::LISTEN, Pins::empty()),
    (Effects::CURSOR.union(Effects::CURSOR_HOLD), Doubts::CURSORS, Pins::empty()),
    (Effects::TEMPORARY.union(Effects::DROP), Doubts::TEMPORARY, Pins::empty()),
    (Effects::ADVISORY_LOCK.union(Effects::ADVISORY_UNLOCK), Doubts::LOCKS, Pins::empty()),
    (Effects::LOAD, Doubts::ANY_SETTING, Pins::LOAD),
    (Effects::SEQUENCE_READ, Doubts::empty(), Pins::SEQUENCE),
    (Effects::SEED, Doubts::empty(), Pins::FUNCTION_STATE),
    (Effects::FUNCTION_STATE, Doubts::empty(), Pins::FUNCTION_STATE),
    (Effects::DBLINK, Doubts::DBLINK, Pins::empty()),
    (Effects::DISCARD, Doubts::EVERYTHING, Pins::empty()),
    (Effects::DYNAMIC, Doubts::EVERYTHING.union(Doubts::UNNAMED), Pins::empty()),
    (Effects::UNKNOWN, Doubts::EVERYTHING.union(Doubts::UNNAMED), Pins::empty()),
];
