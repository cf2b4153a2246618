//! What the transactions of a lease have left uncertain, and the question that the server is asked about it. Pure.
//!
//! The rules of SET, SET LOCAL, savepoints, ROLLBACK and RESET are PostgreSQL's, and we do not play them over again: a
//! text that may have changed something leaves a [`Doubts`], and when its transaction is over, before the server is
//! given back, the server itself is asked what became of it. A transaction without such a text costs nothing.

use std::sync::Arc;

use crate::{
    data_path::{
        functions::{FoundEffects, FunctionEffects, FunctionsChanging, LoadState, Lookup, TextsBeforeLoad},
        memory_limit::PIECE_BYTES,
        prepared::{Statement, parse_settings::ParseSettings},
        session_state::{
            Settings,
            channels::Channels,
            parameters::{NOT_RESTORABLE, affects_parsing},
            pins::Pins,
            resets::{PendingRestore, Resets},
            side_effects::{DriverReset, SideEffects},
            state_query::StateChecks,
        },
        sql::TenantMention,
    },
    wire::message::array_literal,
};

/// What the transactions of a lease have left uncertain so far.
#[derive(Debug, Default)]
pub struct PendingChecks {
    checks: StateChecks,
    pins: Pins,
    names: Vec<Box<str>>,
    /// One text, and nothing else, made all of it uncertain, outside a transaction block: and it only tidies up.
    driver_reset: Option<DriverReset>,
    /// The same of one that only loads a library.
    only_loads: bool,
    /// RESET ALL or DISCARD ALL is among it.
    resets: bool,
    /// It is decided anew whether the session keeps its server for its settings.
    decides_on_settings: bool,
    /// The transaction may have changed settings that matter when a text is parsed, for itself alone perhaps: what is set now
    /// only the server knows.
    changes_parsing: bool,
    /// What has been prepared, to be shared, behind texts that may call functions which nobody has read yet.
    prepared: Vec<Arc<Statement>>,
    /// What has been parsed under the settings that it leaves, as far as can be told.
    parsed: Vec<Arc<ParseSettings>>,
    /// Functions may be changed by the transaction that is under way.
    functions_changing: Option<FunctionsChanging>,
    /// Texts that may call functions which nobody has read yet.
    before_load: Option<Box<TextsBeforeLoad>>,
    /// What texts have taken back to what it was when the session began.
    taken_back: Resets,
    /// What is to be set again for that.
    pub pending: Option<Box<PendingRestore>>,
}

/// Names of parameters that are taken down of one transaction take at most this much.
const NAMES_BYTES_MAX: usize = 32 * 1024;

/// How much the server may answer.
#[derive(Debug, Clone, Copy)]
pub struct AnswerLimits {
    /// Bytes of a parameter's name and value.
    pub value_bytes: usize,
    /// Channels that it listens to.
    pub channels: usize,
}

/// What the session's and the server's settings are, now that nothing is uncertain.
#[derive(Debug, PartialEq, Eq)]
pub struct CheckedState {
    /// What the session wants from now on.
    pub wanted: Settings,
    /// What the server has. Less than wanted where the client has reset what it asked for at startup.
    pub applied: Settings,
    /// What it listens to; `None`: as before.
    pub channels: Option<Channels>,
}

impl PendingChecks {
    /// Nothing to ask and nothing to pin.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.checks.is_empty() && self.pins.is_empty() && !self.resets && self.before_load.is_none()
    }

    /// A text with this aftermath goes to the server. `alone`: in a transaction of its own, as far as that can be told.
    #[inline]
    pub fn note(&mut self, side_effects: &SideEffects, alone: bool) {
        let checks = side_effects.checks.difference(StateChecks::LOCAL_SETTINGS);
        if !checks.is_empty() {
            let is_all = alone && self.is_empty();
            self.driver_reset = side_effects.driver_reset.filter(|_| is_all);
            self.only_loads = side_effects.only_loads && is_all;
        }
        self.resets |= side_effects.tenant == TenantMention::Resets;
        self.changes_parsing |=
            side_effects.checks.intersects(StateChecks::LOCAL_SETTINGS | StateChecks::ANY_SETTING);
        if let Some(resets) = &side_effects.resets {
            self.taken_back.add_lasting(resets);
        }
        self.pins.insert(side_effects.pins);
        self.checks.insert(checks);
        for name in side_effects.names.iter().flatten() {
            self.name(name);
        }
    }

    /// Takes down what a text may leave behind by what it calls. `seen` is where a prepared statement remembers it; `words_hidden`:
    /// the text's encoding hides where words begin.
    #[cold]
    pub fn note_calls(
        &mut self,
        catalogue: &Arc<FunctionEffects>,
        text: &[u8],
        words_hidden: bool,
        seen: Option<&FoundEffects>,
    ) {
        let Lookup { state: functions, load: learn, found } = catalogue.lookup(text, words_hidden, seen);
        match functions {
            LoadState::Current => {}
            LoadState::NotLoaded => self.before_load.get_or_insert_default().push(text, words_hidden),
            LoadState::Changed => self.note(&SideEffects::anything(), false),
        }
        if learn {
            self.checks.insert(StateChecks::COMPARE_FUNCTIONS);
        }
        if let Some(found) = found {
            self.note(&found, false);
            if catalogue.may_be_changed_by(found.checks) {
                self.changes_functions(catalogue);
            }
        }
    }

    /// What is to be looked at again when they have been read.
    pub fn take_before_load(&mut self) -> Option<Box<TextsBeforeLoad>> {
        self.before_load.take()
    }

    /// Whether functions are to be read.
    pub fn must_load_functions(&self) -> bool {
        self.checks.contains(StateChecks::COMPARE_FUNCTIONS)
    }

    /// Whether nothing is to be done but to read functions.
    pub fn only_loads_functions(&self) -> bool {
        self.checks.difference(StateChecks::COMPARE_FUNCTIONS).is_empty()
            && self.pins.is_empty()
            && !self.resets
    }

    /// The pins that no question decides.
    pub fn pins(&self, failed: bool) -> Pins {
        if failed && self.only_loads { self.pins.difference(Pins::LOAD) } else { self.pins }
    }

    /// Something failed: what is named may not have been set.
    pub fn failed(&mut self) {
        self.checks.insert(StateChecks::SETTING_SOURCES);
    }

    /// Something that no text has told is doubtful as well.
    pub fn add(&mut self, checks: StateChecks) {
        self.driver_reset = None;
        self.checks.insert(checks);
    }

    /// RESET ALL or DISCARD ALL goes to the server.
    pub fn note_reset(&mut self) {
        self.resets = true;
    }

    /// Whether RESET ALL or DISCARD ALL is among it.
    pub fn resets(&self) -> bool {
        self.resets
    }

    /// Whether that is doubtful.
    pub fn includes(&self, what: StateChecks) -> bool {
        self.checks.intersects(what)
    }

    /// Whether any parameter may have been set.
    pub fn includes_any_setting(&self) -> bool {
        self.checks.contains(StateChecks::ANY_SETTING)
    }

    /// The session keeps its server for settings that cannot be put elsewhere: where any may have changed, all are asked for,
    /// and it is decided anew whether it must. Whether that is so.
    pub fn decides_on_settings(&mut self) -> bool {
        if self.checks.contains(StateChecks::NAMED_SETTINGS) {
            self.add(StateChecks::ANY_SETTING);
        }
        self.decides_on_settings = self.checks.contains(StateChecks::ANY_SETTING);
        self.decides_on_settings
    }

    /// Whether the server must be asked what has become of the session.
    pub fn must_ask_server(&self) -> bool {
        let unasked = StateChecks::FUNCTIONS
            | StateChecks::CALLERS
            | StateChecks::COMPARE_FUNCTIONS
            | StateChecks::SESSION_START
            | StateChecks::UNSTORED_UNNAMED;
        !self.checks.difference(unasked).is_empty()
    }

    /// What a text that only tidied up, and succeeded, has left: nobody need be asked. `None` if that is not all there is.
    pub fn after_driver_reset(&self, wanted: &Settings, startup: &Settings) -> Option<CheckedState> {
        match self.driver_reset? {
            DriverReset::KeepsSettings => {
                Some(CheckedState { wanted: wanted.clone(), applied: wanted.clone(), channels: None })
            }
            // RESET ALL leaves the role.
            DriverReset::ResetsSettings if wanted.get("role").is_some() => None,
            DriverReset::ResetsSettings | DriverReset::DiscardsAll => {
                Some(CheckedState { wanted: startup.clone(), applied: Settings::default(), channels: None })
            }
        }
    }

    /// That parameter is reported to have changed. Where no text has named it, it need not be the session's: the host's
    /// configuration may have been read anew.
    pub fn reported(&mut self, name: &str) {
        if self.driver_reset.is_none() {
            if !self.names.iter().any(|known| **known == *name) {
                self.checks.insert(StateChecks::SETTING_SOURCES);
            }
            self.name(name);
        }
    }

    fn name(&mut self, name: &str) {
        self.changes_parsing |= affects_parsing(name);
        self.checks.insert(StateChecks::NAMED_SETTINGS);
        if self.names.iter().any(|known| **known == *name) {
            return;
        }
        let bytes: usize = self.names.iter().map(|name| name.len() + PIECE_BYTES).sum();
        match bytes + name.len() <= NAMES_BYTES_MAX {
            true => self.names.push(name.into()),
            // Nobody asks for so many: they stay where they are.
            false => self.pins.insert(Pins::SETTINGS),
        }
    }

    /// A transaction begins: nothing has changed settings yet.
    #[inline]
    pub fn begin(&mut self) {
        self.changes_parsing = false;
        self.pending = None;
    }

    /// Whether settings may be others than they were when the transaction began, as far as that matters when a text is parsed.
    #[inline]
    pub fn changes_parsing(&self) -> bool {
        self.changes_parsing
    }

    /// A statement is prepared to be shared: it must not be if functions have changed settings in front of it.
    #[inline]
    pub fn prepares(&mut self, statement: &Arc<Statement>) {
        if self.before_load.is_some() && statement.has_fixed_meaning {
            self.prepared.push(statement.clone());
        }
    }

    /// Those of them that have been prepared under settings which nobody knows, now that functions have been read.
    pub fn prepared_in_error(&mut self) -> Vec<Arc<Statement>> {
        let prepared = std::mem::take(&mut self.prepared);
        if self.changes_parsing { prepared } else { Vec::new() }
    }

    /// Something is parsed under the settings that the transaction leaves, as far as can be told.
    #[cold]
    pub fn parses(&mut self, under: &Arc<ParseSettings>) {
        self.parsed.push(under.clone());
    }

    /// These are the settings that were `before` it, and those that it has `left`. A text is cut into words before any of it runs.
    pub fn has_left(&self, before: &Settings, left: &Settings) {
        if self.parsed.is_empty() {
            return;
        }
        let mut settings = left.clone();
        for name in CUTTING {
            settings.set(name, before.get(name));
        }
        self.parsed.iter().for_each(|under| under.set_values(&settings));
    }

    /// The parameters that are named.
    pub fn named(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(|name| &**name)
    }

    /// Functions may be changed by the transaction that is under way.
    #[cold]
    pub fn changes_functions(&mut self, catalogue: &Arc<FunctionEffects>) {
        self.functions_changing.get_or_insert_with(|| catalogue.begin_change());
    }

    /// The transaction is over: what it may have changed can be read now. Whether it may have changed functions.
    pub fn has_changed_functions(&mut self) -> bool {
        self.functions_changing.take().is_some()
    }

    /// Nothing is uncertain any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The question to ask, and its one parameter, a PostgreSQL array of names.
    ///
    /// Rows: `('s', name, value, whether the session has set it)`, `('p', pin, '', true)` for each pin that holds, and
    /// `('c', channel, '', true)` for each channel it listens to.
    /// `carried` are the settings of which the session knows already: those that PostgreSQL does not list are asked for by
    /// name. Whether a parameter is set at all is asked only where it may not be, and for those given at `startup`.
    /// Where [`Doubts::PREPARED`] is among the doubts there are two more parameters: the names of statements that the session has
    /// prepared under names of its own and others may prepare again; and all that the server is known to have, with a row
    /// `('m', name, '', true)` for each that is missing.
    /// Of a value of more than `max.value_bytes` comes `('l', name, '', true)`, where the session has set it.
    pub fn question(&self, carried: &Settings, startup: &Settings, max: AnswerLimits) -> (String, String) {
        let mut parts = Vec::new();
        let mut names: Vec<&str> = self.names.iter().map(|name| &**name).collect();
        if self.checks.contains(StateChecks::ANY_SETTING) {
            // PostgreSQL itself leaves such marks, of a transaction that is over, and of another session perhaps.
            parts.push(format!(
                "SELECT 's', pg_catalog.lower(name), pg_catalog.current_setting(name), true \
                 FROM pg_catalog.pg_settings WHERE source = 'session' AND name <> ALL ('{}')",
                array_literal(NOT_RESTORABLE.into_iter())
            ));
            names.extend(carried.iter().map(|(name, _)| name).filter(|name| name.contains('.')));
            names.push("role");
        }
        names.retain(|name| !NOT_RESTORABLE.contains(name));
        // What a refused SET, or a RESET, has left as it was need not be set elsewhere, and may not be settable at all. A
        // parameter that is not listed is the session's own.
        let sources_matter = self.checks.contains(StateChecks::SETTING_SOURCES)
            || names.iter().any(|name| startup.get(name).is_some());
        let is_set = match sources_matter {
            true => {
                "coalesce((SELECT source = 'session' FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) = n), true)"
            }
            false => "true",
        };
        parts.push(format!(
            "SELECT 's', n, pg_catalog.current_setting(n, true), {is_set} FROM pg_catalog.unnest($1::text[]) AS n"
        ));
        for (doubt, pin, holds) in StateChecks::PINS {
            if self.checks.contains(doubt) {
                parts.push(format!("SELECT 'p', '{}', '', true WHERE {holds}", pin.bits()));
            }
        }
        // Code that has run DEALLOCATE has done so to everybody.
        if self.checks.contains(StateChecks::PREPARED) {
            parts.push(
                "SELECT 'm', n, '', true FROM pg_catalog.unnest($3::text[]) AS n \
                 WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE name = n)"
                    .to_owned(),
            );
        }
        if self.checks.contains(StateChecks::ANY_SETTING)
            || self.names.iter().any(|name| **name == *AUTHORIZATION)
        {
            parts.push(format!("SELECT 'p', '{}', '', true WHERE {ANOTHERS_RIGHTS}", Pins::SETTINGS.bits()));
        }
        // What a role may set, and its login may not, cannot be set elsewhere before the role.
        let under_role = names.contains(&"role") || carried.get("role").is_some();
        if under_role && names.iter().any(|name| *name != "role") || self.decides_on_settings {
            parts.push(format!("SELECT 'p', '{}', '', true WHERE {ROLES_OWN}", Pins::SETTINGS.bits()));
        }
        if self.checks.contains(StateChecks::LISTEN) {
            // One more than may be says that there are too many.
            let channels = max.channels.saturating_add(1);
            parts.push(format!(
                "SELECT 'c', channel, '', true FROM (SELECT channel FROM pg_catalog.pg_listening_channels() AS channel \
                 LIMIT {channels}) AS c"
            ));
        }
        (without_long_values(&parts.join(" UNION ALL "), max.value_bytes), array_literal(names.into_iter()))
    }

    /// Takes in the answer: what the settings are now, and the pins that hold. What the client has reset is again as it
    /// asked for at `startup`.
    pub fn answered(
        &self,
        rows: &[Vec<Option<Vec<u8>>>],
        carried: &Settings,
        startup: &Settings,
        pins: &mut Pins,
    ) -> CheckedState {
        let any = self.checks.contains(StateChecks::ANY_SETTING);
        let mut applied = if any { Settings::default() } else { carried.clone() };
        for (doubt, pin, _) in StateChecks::PINS {
            if self.checks.contains(doubt) {
                pins.remove(pin);
            }
        }
        // PostgreSQL lists no parameter that it does not know, and tells nothing of its source: one that was given at startup, that a
        // text has reset, and that is empty now, is reset.
        let is_reset = |name: &str, value: &str| {
            let told = value.is_empty() && name.contains('.') && startup.get(name).is_some();
            told && self.taken_back.is_reset(name)
        };
        let mut kept: Vec<&str> = Vec::new();
        let mut channels = Vec::new();
        for row in rows {
            let text = |at: usize| {
                row.get(at).and_then(Option::as_deref).and_then(|bytes| std::str::from_utf8(bytes).ok())
            };
            match (text(0), text(1), text(2)) {
                (Some("p"), Some(bits), _) => pins.insert(Pins::from_bits_retain(bits.parse().unwrap_or(0))),
                (Some("c"), Some(channel), _) => channels.push(channel.to_owned()),
                (Some("s"), Some("role"), Some("none")) => applied.set("role", None),
                (Some("s"), Some(name), Some(value)) if is_reset(name, value) => applied.set(name, None),
                (Some("s"), Some(name), Some(value)) if text(3) == Some("t") || name == "role" => {
                    applied.set(name, Some(value));
                    kept.push(name);
                }
                (Some("s"), Some(name), None) if matches!(row.get(2), Some(Some(_))) => {
                    // Text in another encoding than UTF-8, which is not kept: its server has it and stays.
                    applied.set(name, None);
                    kept.push(name);
                    pins.insert(Pins::SETTINGS);
                }
                (Some("s"), Some(name), _) => applied.set(name, None),
                (Some("l"), Some(name), _) if text(3) == Some("t") => {
                    // Too long to be kept, which is the same.
                    applied.set(name, None);
                    kept.push(name);
                    pins.insert(Pins::SETTINGS);
                }
                _ => {}
            }
        }
        let mut wanted = applied.clone();
        // What a session has set under names that nobody knows must not be reset while it keeps its server for that.
        if self.checks.contains(StateChecks::UNNAMED) && !pins.contains(Pins::SETTINGS) {
            applied.set(UNNAMED, Some(""));
        }
        let may_be_reset = |name: &str| any || self.names.iter().any(|known| **known == *name);
        for (name, value) in startup.iter().filter(|(name, _)| may_be_reset(name) && !kept.contains(name)) {
            wanted.set(name, Some(value));
        }
        let channels = self.checks.contains(StateChecks::LISTEN).then(|| Channels::new(channels));
        CheckedState { wanted, applied, channels }
    }
}

/// What counts when a text is cut into words.
const CUTTING: [&str; 3] = ["backslash_quote", "client_encoding", "standard_conforming_strings"];

const AUTHORIZATION: &str = "session_authorization";

/// Whether the session is somebody else than who has logged in.
const ANOTHERS_RIGHTS: &str = "(SELECT usesysid FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())) \
     <> (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = session_user)";

/// Whether the session has set what only a superuser may, or who was granted it, and is none itself.
const ROLES_OWN: &str = "EXISTS (SELECT FROM pg_catalog.pg_settings WHERE source = 'session' AND context = 'superuser') \
     AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = session_user)";

/// Stands among a server's settings for those nobody knows of. No session wants it, so RESET ALL comes before the next use.
const UNNAMED: &str = "pglobby.unnamed";

/// Rows of more than so many bytes tell only that there is such a one: nobody keeps it.
fn without_long_values(rows: &str, bytes_max: usize) -> String {
    let long = format!("pg_catalog.octet_length(n) + pg_catalog.octet_length(v) > {bytes_max}");
    format!(
        "SELECT CASE WHEN {long} THEN 'l' ELSE k END, pg_catalog.left(n, {bytes_max}), \
         CASE WHEN {long} THEN '' ELSE v END, s FROM ({rows}) AS a (k, n, v, s)"
    )
}
