//! Side effects: the state that a text may leave in the session that runs it. Pure; a text is parsed once and
//! the result is stored.
//!
//! `sql/` says what a text may do. This file derives what the proxy must do for a session that changes
//! servers: which state to check after the transaction, and which effects pin the server at once because no
//! query can detect them.

#[cfg(test)]
mod tests;

use super::{parameters::affects_parsing, pins::Pins, resets::Resets, state_query::StateChecks};
use crate::data_path::sql::{
    self, Argument, BareQuery, Discard, Effects, Kind, Lexing, SESSION_FUNCTIONS, SetConfig, SetConfigs,
    SetValue, Statement, TenantMention, dotted_names, words,
};

/// The side effects that a text may have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SideEffects {
    /// State to check on the server after the transaction.
    pub checks: StateChecks,
    /// Parameters that the text names, in lower case.
    pub names: Option<Box<[Box<str>]>>,
    /// Custom parameters that the text sets or resets, also until its transaction ends.
    pub custom_names: Option<Box<[Box<str>]>>,
    /// Size of the statements that SET parameters.
    pub set_bytes: usize,
    /// Pins for state that no query can detect.
    pub pins: Pins,
    /// The text only resets the session, as drivers do between two users of a connection.
    pub driver_reset: Option<DriverReset>,
    /// The text is a single LOAD: if it fails, nothing is loaded.
    pub only_loads: bool,
    /// PREPARE, EXECUTE or DEALLOCATE: their names must be rewritten for the server.
    pub names_statements: bool,
    /// DEALLOCATE or DISCARD ALL: removes prepared statements.
    pub deallocates: bool,
    /// May read the list of prepared statements (`pg_prepared_statements`).
    pub inspects: bool,
    /// Whether the text reads or sets the session's tenant.
    pub tenant: TenantMention,
    /// May change roles or a database: see [`super::identity`].
    pub identity: bool,
    /// May commit a transaction that an earlier text began.
    pub commits: bool,
    /// May advance a sequence, also by a column default.
    pub advances_sequence: bool,
    /// Signals another session. `None` also if the text calls both functions.
    pub signals: Option<BackendSignal>,
    /// The text defines objects and runs no function of the database, unless an event trigger does.
    pub only_defines: bool,
    /// Parameters that return to their value at session start.
    pub resets: Option<Box<Resets>>,
    /// The text is a bare query: nothing else applies, except that an INSERT may advance a sequence. Conservative.
    pub is_bare: bool,
}

/// How a session can signal another one by SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendSignal {
    /// `pg_cancel_backend`: cancels the current query.
    Cancel,
    /// `pg_terminate_backend`: closes the session.
    Terminate,
}

impl BackendSignal {
    fn of(effects: Effects) -> Option<Self> {
        match (effects.contains(Effects::CANCEL), effects.contains(Effects::TERMINATE)) {
            (true, false) => Some(Self::Cancel),
            (false, true) => Some(Self::Terminate),
            _ => None,
        }
    }
}

/// Which settings remain after a driver's reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverReset {
    /// All of them.
    KeepsSettings,
    /// Only the role remains: RESET ALL.
    ResetsSettings,
    /// None remain: DISCARD ALL.
    DiscardsAll,
}

impl DriverReset {
    /// Returns `None` if the text contains other statements than resets.
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

/// Matches `SELECT pg_advisory_unlock_all()` as drivers write it.
fn is_unlock_all(statement: &Statement<'_>) -> bool {
    let text = statement.text.to_ascii_lowercase();
    let call = text.strip_prefix(b"select").map(<[u8]>::trim_ascii);
    let call = call.map(|call| call.strip_prefix(b"pg_catalog.").unwrap_or(call));
    call == Some(b"pg_advisory_unlock_all()")
}

impl SideEffects {
    /// Returns whether the text may have to wait or be rejected: it concerns tenant, roles or a database.
    #[inline]
    pub fn needs_decision(&self) -> bool {
        self.identity || self.tenant == TenantMention::Sets
    }

    /// The side effects of a text that is too long to be read.
    pub fn of_unstored_text() -> Self {
        let mut checks = StateChecks::FUNCTIONS;
        checks.insert(Self::anything().checks);
        Self { checks, commits: true, advances_sequence: true, ..Self::default() }
    }

    /// Parses a text.
    #[inline]
    pub fn read(sql: &[u8], lexing: Lexing) -> Self {
        match sql::bare_query(sql, lexing) {
            Some(query) => Self::of_bare(query),
            None => Self::parse(sql, lexing),
        }
    }

    /// The side effects of a bare query.
    #[inline]
    pub fn of_bare(query: BareQuery) -> Self {
        Self { advances_sequence: query.inserts, is_bare: true, ..Self::default() }
    }

    /// Parses a text that is no bare query.
    pub fn parse(sql: &[u8], lexing: Lexing) -> Self {
        let effects = sql::effects(sql, lexing);
        let harmless =
            HARMLESS.contains(effects) && !effects.intersects(Effects::DDL | Effects::SETTING_LOCAL);
        let commits = effects.contains(Effects::TRANSACTION) && commits(sql);
        let (advances, signals) = (may_advance(sql), BackendSignal::of(effects));
        match harmless {
            true => Self { commits, advances_sequence: advances, signals, ..Self::default() },
            false => Self { commits, advances_sequence: advances, signals, ..Self::of(effects, sql, lexing) },
        }
    }

    /// Any side effect: for texts that cannot be analysed.
    pub fn anything() -> Self {
        let mut checks = StateChecks::EVERYTHING;
        checks.insert(StateChecks::UNNAMED);
        Self { checks, ..Self::default() }
    }

    /// The side effects of a call of a built-in function.
    pub fn of_call(name: &[u8]) -> Self {
        let mut call = Self::default();
        let effects = Effects::of_call(name);
        call.add_effects(effects);
        if effects.contains(Effects::SET_CONFIG) {
            call.checks.insert(StateChecks::ANY_SETTING);
            call.checks.insert(StateChecks::UNNAMED);
        }
        call
    }

    /// The side effects of a function with this SQL or PL/pgSQL body; `effects` are those of the body.
    pub fn of_body(effects: Effects, body: &[u8]) -> Self {
        let mut found = Self::default();
        if !HARMLESS.contains(effects) {
            found.add_effects(effects);
            let mut names = Vec::new();
            if effects.intersects(Effects::SETTING | Effects::DYNAMIC) {
                found.checks.insert(StateChecks::ANY_SETTING);
                names.extend(dotted_names(body));
            }
            let calls = sql::set_configs(body).filter(|call| call.local != Argument::Boolean(true));
            for call in calls.take_while(|_| effects.contains(Effects::SET_CONFIG)) {
                found.checks.insert(StateChecks::ANY_SETTING);
                match call.name {
                    Argument::Text(name) => names.push(String::from_utf8_lossy(&name).into()),
                    _ => found.pins.insert(Pins::SETTINGS),
                }
            }
            found.names = (!names.is_empty()).then(|| names.into());
        }
        if effects.intersects(Effects::SETTING_LOCAL | Effects::SET_CONFIG) {
            found.checks.insert(StateChecks::LOCAL_SETTINGS);
            let mut calls = sql::set_configs(body);
            let calls = effects.contains(Effects::SET_CONFIG) && calls.any(|call| is_custom(&call));
            found.checks.set(StateChecks::CUSTOM_PARAMETERS, calls || sets_custom(body));
        }
        if effects.intersects(Effects::DDL) {
            found.checks.insert(changed_objects(body, false));
        }
        found
    }

    /// The same for languages whose SQL is built at run time.
    pub fn of_foreign_body(body: &[u8]) -> Self {
        let names: Box<[Box<str>]> = dotted_names(body).collect();
        Self { names: Some(names), ..Self::anything() }
    }

    fn add_effects(&mut self, effects: Effects) {
        for (effect, check, pin) in CONSEQUENCES {
            if effects.intersects(effect) {
                self.checks.insert(check);
                self.pins.insert(pin);
            }
        }
    }

    #[cold]
    fn of(effects: Effects, sql: &[u8], lexing: Lexing) -> Self {
        let mut found = Self { inspects: effects.contains(Effects::INSPECTION), ..Self::default() };
        found.add_effects(effects);
        let mut names: Vec<Box<str>> = Vec::new();
        let (mut names_hidden, mut resets) = (false, Resets::default());
        let changes_objects = effects.intersects(Effects::DDL);
        found.only_defines = changes_objects;
        let mut custom_names: Vec<Box<str>> = Vec::new();
        if effects.contains(Effects::HIDDEN) && sets_custom(sql) {
            found.checks.insert(StateChecks::CUSTOM_PARAMETERS);
        }
        if effects.intersects(Effects::HIDDEN | Effects::DYNAMIC | Effects::UNKNOWN) {
            names.extend(dotted_names(sql));
        }
        for statement in sql::statements(sql, lexing) {
            if changes_objects {
                found.checks.insert(changed_by(&statement));
                found.only_defines &= statement.only_defines();
            }
            found.names_statements |= statement.prepared.is_some();
            found.deallocates |= matches!(
                statement.kind,
                Kind::Deallocate | Kind::DeallocateAll | Kind::Discard(Discard::All)
            );
            names_hidden |= statement.effects.contains(Effects::PREPARED) && statement.prepared.is_none();
            found.tenant = found.tenant.max(TenantMention::of(&statement));
            found.identity |= statement.identity_change().is_some();
            resets.add_statement(&statement);
            if !Self::custom(&statement, &mut custom_names) {
                found.checks.insert(StateChecks::CUSTOM_PARAMETERS);
            }
            if !is_analysed_later(&statement) {
                // A FETCH may have these effects, at the latest at commit of a cursor WITH HOLD.
                found.add_effects(statement.deferred);
            }
            if resets_by_name(&statement.kind) {
                found.checks.insert(StateChecks::SETTING_SOURCES);
            }
            let named = names.len();
            if !Self::parameters(&statement, &mut names) {
                found.checks.insert(StateChecks::ANY_SETTING);
            }
            let (set_checks, set_pins) = Self::set_configs(&statement, &mut names);
            found.checks.insert(set_checks);
            found.pins.insert(set_pins);
            if changes_parsing(&statement) {
                found.checks.insert(StateChecks::LOCAL_SETTINGS);
            }
            if names.len() > named && is_set(&statement) {
                found.set_bytes += statement.text.len();
            }
        }
        if !names.is_empty() {
            found.checks.insert(StateChecks::NAMED_SETTINGS);
        }
        if found.names_statements && !names_hidden && !effects.intersects(EVERYTHING_PREPARED) {
            found.checks.remove(StateChecks::PREPARED);
        }
        found.names = (!names.is_empty()).then(|| names.into());
        found.custom_names = (!custom_names.is_empty()).then(|| custom_names.into());
        found.driver_reset = DriverReset::read(sql, lexing);
        found.only_loads = effects == Effects::LOAD && sql::statements(sql, lexing).count() == 1;
        found.resets = (resets != Resets::default()).then(|| Box::new(resets));
        found
    }

    /// Adds the parameters that a SET or RESET names. Returns `false` if it may change others too.
    fn parameters(statement: &Statement<'_>, names: &mut Vec<Box<str>>) -> bool {
        let mut add = |name: &[u8]| names.push(String::from_utf8_lossy(name).into());
        match &statement.kind {
            // RESET SESSION AUTHORIZATION resets the role too.
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

    /// Adds the custom parameters that a statement sets or resets. Returns `false` if it may set others too.
    fn custom(statement: &Statement<'_>, names: &mut Vec<Box<str>>) -> bool {
        let mut add = |name: &[u8]| {
            if name.contains(&b'.') {
                names.push(String::from_utf8_lossy(name).into());
            }
        };
        match &statement.kind {
            Kind::Set { name, .. } | Kind::Reset(name) => add(name),
            _ if statement.effects.contains(Effects::SET_CONFIG) => {
                let mut all_named = true;
                for call in statement.set_configs() {
                    match &call.name {
                        Argument::Text(name) => add(name),
                        _ => all_named = false,
                    }
                }
                let code = statement.code_block();
                return all_named
                    && !code.is_some_and(|code| sql::set_configs(&code).any(|call| is_custom(&call)));
            }
            _ => {}
        }
        true
    }

    /// Adds the parameters that calls of set_config name. A computed name may be a custom parameter, which
    /// PostgreSQL does not list: it pins. PL/pgSQL code that uses EXECUTE is checked like any other code.
    fn set_configs(statement: &Statement<'_>, names: &mut Vec<Box<str>>) -> (StateChecks, Pins) {
        const ANY: StateChecks = StateChecks::ANY_SETTING;
        if !statement.effects.contains(Effects::SET_CONFIG) {
            return Default::default();
        }
        let all_named = Self::name_all(statement.set_configs(), names);
        let code = statement.code_block();
        let all_named =
            all_named && code.as_deref().is_none_or(|code| Self::name_all(sql::set_configs(code), names));
        match code {
            _ if !all_named => (ANY, Pins::SETTINGS),
            Some(_) => (ANY | StateChecks::UNNAMED, Pins::default()),
            None if statement.effects.contains(Effects::HIDDEN) => (ANY, Pins::SETTINGS),
            None => Default::default(),
        }
    }

    /// Adds the names of all calls. Returns `false` if a name is computed.
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

/// Returns whether a call may set a custom parameter.
fn is_custom(call: &SetConfig<'_>) -> bool {
    !matches!(&call.name, Argument::Text(name) if !name.contains(&b'.'))
}

/// Returns whether code has a SET of a custom parameter.
fn sets_custom(code: &[u8]) -> bool {
    const BEFORE: [&[u8]; 3] = [b"set", b"local", b"session"];
    let mut before: &[u8] = b"";
    code.split(|byte| !byte.is_ascii_alphanumeric() && !matches!(byte, b'_' | b'.' | b'$' | b'"'))
        .filter(|word| !word.is_empty())
        .any(|word| {
            let is_set = BEFORE.iter().any(|verb| before.eq_ignore_ascii_case(verb));
            before = word;
            is_set && word.contains(&b'.')
        })
}

/// Returns whether a statement changes parsing until its transaction ends.
fn changes_parsing(statement: &Statement<'_>) -> bool {
    let name_affects_parsing = |name: &[u8]| std::str::from_utf8(name).map_or(true, affects_parsing);
    let is_set = match &statement.kind {
        Kind::Set { local: true, name, .. } => name_affects_parsing(name),
        Kind::SetRole { local: true, .. } | Kind::SetSessionAuthorization { local: true, .. } => true,
        _ => false,
    };
    let called = |call: SetConfig<'_>| match call.name {
        Argument::Text(name) => name_affects_parsing(&name),
        _ => true,
    };
    let calls = statement.effects.contains(Effects::SET_CONFIG) || statement.effects.contains(HIDDEN_LOCAL);
    is_set || calls && (statement.effects.contains(Effects::HIDDEN) || statement.set_configs().any(called))
}

/// A DO block or nested text sets a parameter.
const HIDDEN_LOCAL: Effects = Effects::HIDDEN.union(Effects::SETTING_LOCAL);

/// Looks only at the first word of each statement for COMMIT, END or PREPARE TRANSACTION.
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

/// Returns whether a text may advance a sequence. SELECT and UPDATE do it only by a function name that
/// contains a `v`, which a fast scan excludes for most texts.
#[inline]
fn may_advance(sql: &[u8]) -> bool {
    let text = sql.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text);
    let by_name = |verb: &[u8]| text.get(..verb.len()).is_some_and(|first| first.eq_ignore_ascii_case(verb));
    let is_plain = (by_name(b"select") || by_name(b"update"))
        && !sql::any_place(text, |[byte, ..]| (byte == b';') | (byte | 0x20 == b'v'));
    !is_plain && has_advancing_word(text)
}

#[cold]
fn has_advancing_word(text: &[u8]) -> bool {
    const WORDS: [&[u8]; 7] = [b"insert", b"merge", b"copy", b"nextval", b"setval", b"call", b"do"];
    words(text).any(|word| WORDS.iter().any(|advances| word.eq_ignore_ascii_case(advances)))
}

/// Returns whether a statement only sets parameters, so that its length limits the size of the value.
fn is_set(statement: &Statement<'_>) -> bool {
    matches!(statement.kind, Kind::Set { value: SetValue::Text(_), .. })
        || statement.lone_set_config().is_some()
}

/// Returns whether a statement resets a parameter by name.
fn resets_by_name(kind: &Kind<'_>) -> bool {
    matches!(kind, Kind::Reset(_) | Kind::Set { local: false, value: SetValue::Default, .. })
}

/// Returns whether the deferred effects are analysed later: of a function, a view or a prepared statement.
fn is_analysed_later(statement: &Statement<'_>) -> bool {
    matches!(statement.kind, Kind::CreateRoutine | Kind::Ddl | Kind::Prepare { .. })
}

/// Effects that require a check of prepared statements, whatever the text names.
const EVERYTHING_PREPARED: Effects = Effects::DISCARD.union(Effects::DYNAMIC).union(Effects::UNKNOWN);

/// Returns the checks on functions and their callers after a statement. A function, domain or operator whose
/// definition shows that it leaves nothing itself is no more than a caller of what the definition names.
fn changed_by(statement: &Statement<'_>) -> StateChecks {
    let changed = changed_objects(statement.text, true);
    match changed.contains(StateChecks::FUNCTIONS) && statement.defines_harmless() {
        true => changed.difference(StateChecks::FUNCTIONS).union(StateChecks::CALLERS),
        false => changed,
    }
}

/// Returns the checks after DDL: on functions, on objects that call functions (tables count if `tables` is
/// set, because of their defaults), and on settings of roles and databases.
fn changed_objects(text: &[u8], tables: bool) -> StateChecks {
    #[rustfmt::skip]
    const FUNCTIONS: [&[u8]; 11] = [
        b"function", b"procedure", b"routine", b"event", b"extension", b"operator", b"cast", b"aggregate",
        b"domain", b"type", b"language",
    ];
    const CALLERS: [&[u8]; 7] =
        [b"trigger", b"rule", b"view", b"policy", b"constraint", b"materialized", b"recursive"];
    const TABLES: [&[u8]; 3] = [b"table", b"unlogged", b"foreign"];
    const SESSION_STARTS: [&[u8]; 4] = [b"role", b"user", b"group", b"database"];
    let words =
        text.split(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_').filter(|word| !word.is_empty());
    let (mut before, mut changed, mut calls): (&[u8], _, _) = (b"", StateChecks::empty(), false);
    for word in words {
        let verb =
            [&b"create"[..], b"alter", b"replace"].iter().any(|verb| before.eq_ignore_ascii_case(verb));
        before = word;
        let is = |object: &&[u8]| word.eq_ignore_ascii_case(object);
        if verb && SESSION_STARTS.iter().any(is) {
            changed.insert(StateChecks::SESSION_START);
        }
        if verb && FUNCTIONS.iter().any(is) {
            changed.insert(StateChecks::FUNCTIONS);
        }
        if verb && (CALLERS.iter().any(is) || tables && TABLES.iter().any(is)) {
            changed.insert(StateChecks::CALLERS);
        }
        // A view or default that calls a built-in session function has side effects itself.
        calls |= word.len() > 6 && SESSION_FUNCTIONS.iter().any(|name| is(&name.as_bytes()));
    }
    let functions =
        changed.contains(StateChecks::FUNCTIONS) || calls && changed.contains(StateChecks::CALLERS);
    if functions { changed.difference(StateChecks::CALLERS).union(StateChecks::FUNCTIONS) } else { changed }
}

/// PostgreSQL's spellings of true, as far as drivers use them.
fn is_true(text: &[u8]) -> bool {
    [&b"true"[..], b"t", b"on", b"yes", b"1"].iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// Effects that end with the transaction or do not matter to the session.
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

/// For each effect: the checks that it requires and the pins that it sets.
const CONSEQUENCES: [(Effects, StateChecks, Pins); 13] = [
    (Effects::PREPARED, StateChecks::PREPARED, Pins::empty()),
    (Effects::LISTEN, StateChecks::LISTEN, Pins::empty()),
    (Effects::CURSOR.union(Effects::CURSOR_HOLD), StateChecks::CURSORS, Pins::empty()),
    (Effects::TEMPORARY.union(Effects::DROP), StateChecks::TEMPORARY, Pins::empty()),
    (Effects::ADVISORY_LOCK.union(Effects::ADVISORY_UNLOCK), StateChecks::LOCKS, Pins::empty()),
    (Effects::LOAD, StateChecks::ANY_SETTING, Pins::LOAD),
    (Effects::SEQUENCE_READ, StateChecks::empty(), Pins::SEQUENCE),
    (Effects::SEED, StateChecks::empty(), Pins::FUNCTION_STATE),
    (Effects::FUNCTION_STATE, StateChecks::empty(), Pins::FUNCTION_STATE),
    (Effects::DBLINK, StateChecks::DBLINK, Pins::empty()),
    (Effects::DISCARD, StateChecks::EVERYTHING, Pins::empty()),
    (Effects::DYNAMIC, StateChecks::EVERYTHING.union(StateChecks::UNNAMED), Pins::empty()),
    (Effects::UNKNOWN, StateChecks::EVERYTHING.union(StateChecks::UNNAMED), Pins::empty()),
];
