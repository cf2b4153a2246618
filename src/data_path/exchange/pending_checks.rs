//! What the transactions of a lease may have changed, and the query that asks the server about it. Pure.
//!
//! The proxy does not re-implement PostgreSQL's rules for SET, SET LOCAL, savepoints, ROLLBACK and RESET. A
//! text that may have changed something adds a [`StateChecks`]. After its transaction, before the server
//! returns to the pool, the server is asked for the result. A transaction without such a text costs nothing.

use std::{ops::Deref, sync::Arc};

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
            server_role::{HiddenCatalogs, ServerRole},
            side_effects::{DriverReset, SideEffects},
            state_query::StateChecks,
        },
        sql::TenantMention,
    },
    wire::message::array_literal,
};

/// What the transactions of a lease may have changed so far.
#[derive(Debug, Default)]
pub struct PendingChecks {
    checks: StateChecks,
    pins: Pins,
    names: Vec<Box<str>>,
    /// All checks come from one driver reset, which ran outside a transaction block.
    driver_reset: Option<DriverReset>,
    /// All checks come from one LOAD, which ran outside a transaction block.
    only_loads: bool,
    /// RESET ALL or DISCARD ALL was sent.
    pub resets: bool,
    /// The answer decides whether settings still pin the server.
    decides_on_settings: bool,
    /// The transaction may have changed settings that matter for parsing, perhaps with SET LOCAL only.
    changes_parsing: bool,
    /// Shared statements that were prepared after a text whose functions are not loaded yet.
    prepared: Vec<Arc<Statement>>,
    /// Parse settings to be filled in with the settings at the end of the transaction.
    parsed: Vec<Arc<ParseSettings>>,
    /// The transaction may change functions.
    functions_changing: Option<FunctionsChanging>,
    /// Texts that may call functions that are not loaded yet.
    pub before_load: Option<Box<TextsBeforeLoad>>,
    /// Parameters that texts have reset.
    reset_parameters: Resets,
    /// Custom parameters with unknown names may have been set.
    sets_custom: bool,
    /// Startup parameters to be set again after such a reset.
    pub pending: Option<Box<PendingRestore>>,
}

/// Limit in bytes of the parameter names that are kept for one transaction.
const NAMES_BYTES_MAX: usize = 32 * 1024;

/// Limits of the server's answer.
#[derive(Debug, Clone, Copy)]
pub struct AnswerLimits {
    /// Bytes of a parameter's name and value.
    pub value_bytes: usize,
    /// Channels that the session listens to.
    pub channels: usize,
}

/// The settings of session and server after a check.
#[derive(Debug, PartialEq, Eq)]
pub struct CheckedState {
    /// The session's settings.
    pub wanted: Settings,
    /// The server's settings: fewer than `wanted` if the client has reset parameters of its startup packet.
    pub applied: Settings,
    /// The channels that the session listens to; `None`: unchanged.
    pub channels: Option<Channels>,
}

impl PendingChecks {
    /// Whether nothing is to be checked and nothing to be pinned.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.checks.is_empty() && self.pins.is_empty() && !self.resets && self.before_load.is_none()
    }

    /// Records the effects of a text that goes to the server. `alone`: it runs in a transaction of its own.
    #[inline]
    pub fn record(&mut self, side_effects: &SideEffects, alone: bool) {
        const UNASKED: StateChecks = StateChecks::LOCAL_SETTINGS.union(StateChecks::CUSTOM_PARAMETERS);
        self.sets_custom |= side_effects.checks.contains(StateChecks::CUSTOM_PARAMETERS);
        let checks = side_effects.checks.difference(UNASKED);
        if !checks.is_empty() {
            let is_all = alone && self.is_empty();
            self.driver_reset = side_effects.driver_reset.filter(|_| is_all);
            self.only_loads = side_effects.only_loads && is_all;
        }
        self.resets |= side_effects.tenant == TenantMention::Resets;
        self.changes_parsing |=
            side_effects.checks.intersects(StateChecks::LOCAL_SETTINGS | StateChecks::ANY_SETTING);
        if let Some(resets) = &side_effects.resets {
            self.reset_parameters.add_lasting(resets);
        }
        self.pins.insert(side_effects.pins);
        self.checks.insert(checks);
        for name in side_effects.names.iter().flatten() {
            self.name(name);
        }
    }

    /// Records the effects of the functions that a text may call. `text` gives the text where it must be read;
    /// `read` is what the text itself shows. `cached`: a prepared statement's cache for them. `words_hidden`: the
    /// text's encoding hides where words begin.
    #[cold]
    pub fn record_calls<T: Deref<Target = [u8]>>(
        &mut self,
        functions: &Arc<FunctionEffects>,
        text: impl Fn() -> T,
        words_hidden: bool,
        read: &SideEffects,
        cached: Option<&FoundEffects>,
    ) {
        let Lookup { state, load, found, changes } = functions.lookup(&text, words_hidden, read, cached);
        match state {
            LoadState::Current => {}
            LoadState::NotLoaded => self.before_load.get_or_insert_default().push(&text(), words_hidden),
            LoadState::Changing => self.record(&SideEffects::anything(), false),
        }
        if load {
            self.checks.insert(StateChecks::COMPARE_FUNCTIONS);
        }
        if let Some(found) = found {
            self.record(&found, false);
        }
        if changes {
            self.changes_functions(functions, read.only_defines);
        }
    }

    /// Whether custom parameters with unknown names may have been set since the last call.
    #[inline]
    pub fn take_sets_custom(&mut self) -> bool {
        std::mem::take(&mut self.sets_custom)
    }

    /// Whether nothing is to be done except loading functions.
    pub fn only_loads_functions(&self) -> bool {
        self.checks.difference(StateChecks::COMPARE_FUNCTIONS).is_empty()
            && self.pins.is_empty()
            && !self.resets
    }

    /// The pins that need no check. `failed`: a request of the transaction failed.
    pub fn pins(&self, failed: bool) -> Pins {
        if failed && self.only_loads { self.pins.difference(Pins::LOAD) } else { self.pins }
    }

    /// A request failed: its SET may not have taken effect.
    pub fn failed(&mut self) {
        self.checks.insert(StateChecks::SETTING_SOURCES);
    }

    /// Adds checks that do not come from a text.
    pub fn add(&mut self, checks: StateChecks) {
        self.driver_reset = None;
        self.checks.insert(checks);
    }

    /// Whether any of these checks is pending.
    pub fn includes(&self, what: StateChecks) -> bool {
        self.checks.intersects(what)
    }

    /// Decides whether the answer can end a pin for settings. Only an answer about all settings can: checks
    /// of named settings are extended to all. Returns the decision.
    pub fn decides_on_settings(&mut self) -> bool {
        if self.checks.contains(StateChecks::NAMED_SETTINGS) {
            self.add(StateChecks::ANY_SETTING);
        }
        self.decides_on_settings = self.checks.contains(StateChecks::ANY_SETTING);
        self.decides_on_settings
    }

    /// Whether the server must be asked.
    pub fn must_ask_server(&self) -> bool {
        let unasked = StateChecks::FUNCTIONS
            | StateChecks::CALLERS
            | StateChecks::COMPARE_FUNCTIONS
            | StateChecks::SESSION_START
            | StateChecks::UNSTORED_UNNAMED;
        !self.checks.difference(unasked).is_empty()
    }

    /// The state after a successful driver reset, without a query. `None` if other checks are pending.
    pub fn after_driver_reset(&self, wanted: &Settings, startup: &Settings) -> Option<CheckedState> {
        match self.driver_reset? {
            DriverReset::KeepsSettings => {
                Some(CheckedState { wanted: wanted.clone(), applied: wanted.clone(), channels: None })
            }
            // RESET ALL does not reset the role.
            DriverReset::ResetsSettings if wanted.get("role").is_some() => None,
            DriverReset::ResetsSettings | DriverReset::DiscardsAll => {
                Some(CheckedState { wanted: startup.clone(), applied: Settings::default(), channels: None })
            }
        }
    }

    /// The server reports a changed parameter. If no text has named it, the change may come from a reload of
    /// the host's configuration.
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
            // Too many names: the settings pin the server.
            false => self.pins.insert(Pins::SETTINGS),
        }
    }

    /// A transaction begins.
    #[inline]
    pub fn begin(&mut self) {
        self.changes_parsing = false;
        self.pending = None;
    }

    /// Whether the transaction may have changed settings that matter for parsing.
    #[inline]
    pub fn changes_parsing(&self) -> bool {
        self.changes_parsing
    }

    /// Records a shared statement. It is unshared if functions have changed settings before its Parse.
    #[inline]
    pub fn prepares(&mut self, statement: &Arc<Statement>) {
        if self.before_load.is_some() && statement.has_fixed_meaning {
            self.prepared.push(statement.clone());
        }
    }

    /// Returns the statements that were prepared under unknown settings. Called after functions are loaded.
    pub fn take_prepared_under_unknown(&mut self) -> Vec<Arc<Statement>> {
        let prepared = std::mem::take(&mut self.prepared);
        if self.changes_parsing { prepared } else { Vec::new() }
    }

    /// Records parse settings to be filled in at the end of the transaction.
    #[cold]
    pub fn parses(&mut self, under: &Arc<ParseSettings>) {
        self.parsed.push(under.clone());
    }

    /// Fills in the recorded parse settings: `before` and `left` are those before and after the transaction.
    /// The lexer's settings are those of `before`, because PostgreSQL scans a text before it runs any of it.
    pub fn set_parsed_settings(&self, before: &Settings, left: &Settings) {
        if self.parsed.is_empty() {
            return;
        }
        let mut settings = left.clone();
        for name in LEXER_SETTINGS {
            settings.set(name, before.get(name));
        }
        self.parsed.iter().for_each(|under| under.set_values(&settings));
    }

    /// The named parameters.
    pub fn named(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(|name| &**name)
    }

    /// The transaction may change functions. `only_defines`: see [`SideEffects::only_defines`].
    #[cold]
    pub fn changes_functions(&mut self, functions: &Arc<FunctionEffects>, only_defines: bool) {
        if !only_defines || !self.functions_changing.as_ref().is_some_and(FunctionsChanging::is_any) {
            let before = self.functions_changing.replace(functions.begin_change(only_defines));
            self.ends_change(before);
        }
    }

    /// The transaction makes callers of functions.
    #[cold]
    pub fn makes_callers(&mut self, functions: &Arc<FunctionEffects>, text: &[u8], words_hidden: bool) {
        match &mut self.functions_changing {
            Some(changing) => changing.makes_callers(text, words_hidden),
            None => self.functions_changing = Some(functions.begin_callers(text, words_hidden)),
        }
    }

    /// The transaction is over. Returns whether functions that it used may have changed meanwhile.
    pub fn has_changed_functions(&mut self) -> bool {
        let changing = self.functions_changing.take();
        self.ends_change(changing)
    }

    fn ends_change(&mut self, changing: Option<FunctionsChanging>) -> bool {
        let made_callers = changing.as_ref().is_some_and(|changing| !changing.is_any());
        let changed = changing.is_some_and(FunctionsChanging::end);
        if changed && made_callers {
            // What the transaction has made, and perhaps used, has side effects by now.
            self.record(&SideEffects::anything(), false);
        }
        changed
    }

    /// Removes all checks.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The query and its first parameter, a PostgreSQL array of names.
    ///
    /// Rows: `('s', name, value, whether the session has set it)`; `('p', pin, '', true)` for each pin that
    /// holds; `('c', channel, '', true)` for each channel; `('l', name, '', true)` for a set value longer
    /// than `max.value_bytes`. `carried` are the session's settings: those that pg_settings does not list are
    /// asked for by name.
    ///
    /// [`StateChecks::PREPARED`] adds two parameters: the names of the session's statements that others may
    /// prepare again, and all names on the server. A row `('m', name, '', true)` comes for each missing
    /// statement.
    ///
    /// Where `role` may not read a catalog, the answer lacks what it says: [`Self::answered`] and
    /// [`Self::needs_all_values`].
    pub fn state_query(
        &self,
        carried: &Settings,
        startup: &Settings,
        role: &ServerRole,
        max: AnswerLimits,
    ) -> (String, String) {
        let mut parts = Vec::new();
        let mut names: Vec<&str> = self.names.iter().map(|name| &**name).collect();
        let sees_settings = !role.hides(HiddenCatalogs::SETTINGS);
        if self.checks.contains(StateChecks::ANY_SETTING) {
            // PostgreSQL itself sets such parameters, which belong to a finished transaction or another
            // session.
            parts.extend(sees_settings.then(|| {
                format!(
                    "SELECT 's', pg_catalog.lower(name), pg_catalog.current_setting(name), true \
                 FROM pg_catalog.pg_show_all_settings() WHERE source = 'session' AND name <> ALL ('{}')",
                    array_literal(NOT_RESTORABLE.into_iter())
                )
            }));
            names.extend(carried.iter().map(|(name, _)| name).filter(|name| name.contains('.')));
            names.push("role");
        }
        names.retain(|name| !NOT_RESTORABLE.contains(name));
        // A parameter that a failed SET or a RESET left unchanged need not be restored, and perhaps cannot be
        // set. The session itself has set every parameter that is not listed.
        let is_set = match self.do_sources_matter(startup) && sees_settings {
            true => {
                "coalesce((SELECT source = 'session' FROM pg_catalog.pg_show_all_settings() WHERE pg_catalog.lower(name) = n), true)"
            }
            false => "true",
        };
        parts.push(format!(
            "SELECT 's', n, pg_catalog.current_setting(n, true), {is_set} FROM pg_catalog.unnest($1::text[]) AS n"
        ));
        for (check, pin, catalog, holds) in StateChecks::PINS {
            if self.checks.contains(check) && !role.hides(catalog) {
                parts.push(format!("SELECT 'p', '{}', '', true WHERE {holds}", pin.bits()));
            }
        }
        // DEALLOCATE in code also removes statements that other sessions will use.
        if self.checks.contains(StateChecks::PREPARED) && !role.hides(HiddenCatalogs::PREPARED) {
            parts.push(
                "SELECT 'm', n, '', true FROM pg_catalog.unnest($3::text[]) AS n \
                 WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_prepared_statement() WHERE name = n)"
                    .to_owned(),
            );
        }
        if self.may_have_superuser_settings(carried, role) && sees_settings {
            parts.push(format!(
                "SELECT 'p', '{}', '', true WHERE {HAS_SUPERUSER_SETTING}",
                Pins::SETTINGS.bits()
            ));
        }
        if self.checks.contains(StateChecks::LISTEN) {
            // One more than the limit shows that there are too many.
            let channels = max.channels.saturating_add(1);
            parts.push(format!(
                "SELECT 'c', channel, '', true FROM (SELECT channel FROM pg_catalog.pg_listening_channels() AS channel \
                 LIMIT {channels}) AS c"
            ));
        }
        (without_long_values(&parts.join(" UNION ALL "), max.value_bytes), array_literal(names.into_iter()))
    }

    /// Whether it matters which source has set the named parameters.
    fn do_sources_matter(&self, startup: &Settings) -> bool {
        self.checks.contains(StateChecks::SETTING_SOURCES)
            || self.names.iter().any(|name| startup.get(name).is_some())
            || self.checks.contains(StateChecks::ANY_SETTING) && !startup.is_empty()
    }

    /// Whether the session may have set a parameter under a role that its login may not set: such a parameter
    /// cannot be restored on another server.
    pub fn may_have_superuser_settings(&self, carried: &Settings, role: &ServerRole) -> bool {
        let any = self.checks.contains(StateChecks::ANY_SETTING);
        let named = |role: bool| self.names.iter().any(|name| (**name == *"role") == role);
        let under_role = any || named(true) || carried.get("role").is_some();
        let others = named(false) || any && carried.iter().any(|(name, _)| name.contains('.'));
        !role.is_superuser && (under_role && others || self.decides_on_settings)
    }

    /// Whether the session may have become another login.
    pub fn may_have_other_login(&self) -> bool {
        self.checks.contains(StateChecks::ANY_SETTING)
            || self.names.iter().any(|name| **name == *"session_authorization")
    }

    /// Whether pg_settings is hidden and the answer lacks what it says: then all values, and those of a new
    /// session, are compared ([`Self::add_settings`]).
    pub fn needs_all_values(&self, startup: &Settings, role: &ServerRole) -> bool {
        role.hides(HiddenCatalogs::SETTINGS)
            && (self.checks.contains(StateChecks::ANY_SETTING) || self.do_sources_matter(startup))
    }

    /// Adds to the answer what pg_settings would say: `values` are the rows of SHOW ALL, once now and once
    /// for a new session.
    pub fn add_settings(&self, rows: &mut Vec<Vec<Option<Vec<u8>>>>, values: &[Vec<Option<Vec<u8>>>]) {
        let (now, new) = values.split_at(values.len() / 2);
        for (now, new) in now.iter().zip(new) {
            let ([Some(name), value, ..], [_, new_value, ..]) = (&now[..], &new[..]) else { continue };
            let name = name.to_ascii_lowercase();
            let is_set = value != new_value;
            let mut named = rows.iter_mut().filter(
                |row| matches!(&row[..], [Some(kind), Some(other), ..] if kind == b"s" && *other == name),
            );
            if let Some(row) = named.next() {
                if let [.., source] = &mut row[..] {
                    *source = Some(if is_set { b"t".to_vec() } else { b"f".to_vec() });
                }
            } else if is_set
                && self.checks.contains(StateChecks::ANY_SETTING)
                && !NOT_RESTORABLE.iter().any(|other| other.as_bytes() == name)
            {
                rows.push(vec![Some(b"s".to_vec()), Some(name), value.clone(), Some(b"t".to_vec())]);
            }
        }
    }

    /// Removes the pins that the answer adds again if they hold. What the server may not see is taken to be
    /// there.
    fn assume_hidden(&self, role: &ServerRole, pins: &mut Pins) {
        let discards_all = self.driver_reset == Some(DriverReset::DiscardsAll);
        for (check, pin, catalog, _) in StateChecks::PINS {
            if self.checks.contains(check) {
                pins.set(pin, role.hides(catalog) && !discards_all);
            }
        }
    }

    /// Reads the answer: sets `pins` and returns the settings. Reset ones of `startup` are wanted again. What
    /// the server may not see is taken to be there.
    pub fn answered(
        &self,
        rows: &[Vec<Option<Vec<u8>>>],
        carried: &Settings,
        startup: &Settings,
        role: &ServerRole,
        pins: &mut Pins,
    ) -> CheckedState {
        let any = self.checks.contains(StateChecks::ANY_SETTING);
        let mut applied = if any { Settings::default() } else { carried.clone() };
        self.assume_hidden(role, pins);
        // PostgreSQL does not say what has set the role. The role of a new session is set if a text says so.
        let is_role_set = |now: &str| {
            let is_chosen = self.reset_parameters.sets_role()
                || carried.get("role") == Some(now) && !self.reset_parameters.is_role_reset();
            *now != *role.start || startup.get("role").is_some() && is_chosen
        };
        // PostgreSQL does not list an unknown parameter, nor its source. A startup parameter that a text has
        // reset and that is empty now was reset.
        let is_reset = |name: &str, value: &str| {
            let may_be_unlisted = value.is_empty() && name.contains('.') && startup.get(name).is_some();
            may_be_unlisted && self.reset_parameters.is_reset(name)
        };
        let mut set_names: Vec<&str> = Vec::new();
        let mut channels = Vec::new();
        for row in rows {
            let text = |at: usize| {
                row.get(at).and_then(Option::as_deref).and_then(|bytes| std::str::from_utf8(bytes).ok())
            };
            match (text(0), text(1), text(2)) {
                (Some("p"), Some(bits), _) => pins.insert(Pins::from_bits_retain(bits.parse().unwrap_or(0))),
                (Some("c"), Some(channel), _) => channels.push(channel.to_owned()),
                (Some("s"), Some("role"), Some(role)) if !is_role_set(role) => applied.set("role", None),
                (Some("s"), Some(name), Some(value)) if is_reset(name, value) => applied.set(name, None),
                (Some("s"), Some(name), Some(value)) if text(3) == Some("t") || name == "role" => {
                    applied.set(name, Some(value));
                    set_names.push(name);
                }
                (Some("s"), Some(name), None) if matches!(row.get(2), Some(Some(_))) => {
                    // Text that is not UTF-8 cannot be kept: it pins the server.
                    applied.set(name, None);
                    set_names.push(name);
                    pins.insert(Pins::SETTINGS);
                }
                (Some("s"), Some(name), _) => applied.set(name, None),
                (Some("l"), Some(name), _) if text(3) == Some("t") => {
                    // A value that is too long to keep pins the server.
                    applied.set(name, None);
                    set_names.push(name);
                    pins.insert(Pins::SETTINGS);
                }
                _ => {}
            }
        }
        let mut wanted = applied.clone();
        // RESET ALL must not remove settings with unknown names while they pin the server.
        if self.checks.contains(StateChecks::UNNAMED) && !pins.contains(Pins::SETTINGS) {
            applied.set(UNKNOWN_SETTINGS, Some(""));
        }
        let may_be_reset = |name: &str| any || self.names.iter().any(|known| **known == *name);
        for (name, value) in
            startup.iter().filter(|(name, _)| may_be_reset(name) && !set_names.contains(name))
        {
            wanted.set(name, Some(value));
        }
        let channels = self.checks.contains(StateChecks::LISTEN).then(|| Channels::new(channels));
        CheckedState { wanted, applied, channels }
    }
}

/// Parameters that change how PostgreSQL's lexer reads a text.
pub(super) const LEXER_SETTINGS: [&str; 3] =
    ["backslash_quote", "client_encoding", "standard_conforming_strings"];

/// All parameters' values, and then those of a new session, for a role that may not read pg_settings. SHOW
/// needs no privilege.
pub const ALL_VALUES: &str = "SHOW ALL; BEGIN; RESET ALL; SHOW ALL; ROLLBACK";

/// Whether the session has set a superuser's parameter.
const HAS_SUPERUSER_SETTING: &str = "EXISTS (SELECT FROM pg_catalog.pg_show_all_settings() WHERE source = 'session' AND context = 'superuser')";

/// Marks settings with unknown names among a server's settings. RESET ALL comes before the next use.
const UNKNOWN_SETTINGS: &str = "pglobby.unnamed";

/// Replaces rows of more than `bytes_max` bytes by an `l` row.
fn without_long_values(rows: &str, bytes_max: usize) -> String {
    let long = format!("pg_catalog.octet_length(n) + pg_catalog.octet_length(v) > {bytes_max}");
    format!(
        "SELECT CASE WHEN {long} THEN 'l' ELSE k END, pg_catalog.left(n, {bytes_max}), \
         CASE WHEN {long} THEN '' ELSE v END, s FROM ({rows}) AS a (k, n, v, s)"
    )
}
