//! Side effects of a tenant's own functions.
//!
//! A text shows only its own statements. That `SELECT next_job()` takes an advisory lock is visible only in
//! the function's body, and for `INSERT INTO jobs` only in the body of a trigger. The proxy therefore loads
//! all bodies (`function_effects.rs`), follows dependencies (`dependencies.rs`) and builds a list of names
//! (`effects_by_name.rs`). A text that contains one of these names gets state checks after its transaction.
//! The analysis is conservative: it causes too many checks rather than too few.
//!
//! DDL changes the list only if its text defines something with side effects, names something that has some,
//! or does not show what it does. After such a text, all functions are loaded again; until then every text may
//! have any side effect, except in the session that has run it, which waits. Loads take at most a tenth of the time: [`PAUSE`]. Changes made outside the proxy are
//! detected every `functions_check_delay`. In most databases no function has side effects, and the cost per
//! text is one atomic load.

pub(super) mod dependencies;
pub(super) mod effects_by_name;
pub(crate) mod function_effects;
mod not_loaded;

use std::{
    ops::Deref,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;
use tokio::time::Instant;

pub use self::effects_by_name::EffectsByName;
pub use self::not_loaded::TextsBeforeLoad;

use crate::data_path::{
    lock::locked,
    session_state::{side_effects::SideEffects, state_query::StateChecks},
    sql::words,
};

/// How often in a row the proxy trusts statistics that count no change. Sessions report their counts with a
/// delay, and a superuser's session may not report them.
const TRUSTED_MAX: u8 = 5;

/// A load that took so long is followed by a pause of so many times as long, in which DDL alone starts no load. A
/// session whose text may have unknown side effects does not wait for the pause: it loads at once.
const PAUSE: u32 = 9;

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Function side effects of one database. Shared by the pools and sessions of its tenant.
#[derive(Debug, Default)]
pub struct FunctionEffects {
    /// No text needs a lookup. The only field that is read for every text.
    plain: AtomicBool,
    /// A client of the tenant has read currval or lastval.
    sequences: AtomicBool,
    state: Mutex<State>,
    /// Wakes the sessions that wait for the end of a load.
    load_ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// `None` before the first load.
    effects: Option<Arc<EffectsByName>>,
    /// Fingerprint of the functions at the last load.
    fingerprint: String,
    /// The database's statistics counters at the last check.
    counts: String,
    /// How often the counters alone have been trusted since.
    trusted: u8,
    /// Running transactions that may change functions.
    changes: usize,
    /// Counts events after which `effects` may be outdated.
    generation: u64,
    /// The generation for which `effects` were loaded.
    loaded_generation: u64,
    /// When the server was last queried.
    queried_at: Option<Instant>,
    /// Generation of the tenant's row at that time.
    row_generation: i64,
    /// The server has not been queried since the tenant's first pool was created.
    not_loaded: bool,
    /// A check for changes made outside the proxy is due.
    check_due: bool,
    loading: bool,
    /// The end of the pause after the last load.
    paused_until: Option<Instant>,
    /// The database has no event trigger, and no text may have made one.
    no_event_triggers: bool,
    /// Counts texts that rename objects.
    renames: u64,
    /// Texts of transactions that ended during the load: whether they name something with side effects is
    /// known after it.
    made_during_load: TextsBeforeLoad,
}

/// What tells whether anything has changed meanwhile: the generation, the loaded version, the renames.
type Known = (u64, Option<u64>, u64);

impl State {
    fn is_current(&self) -> bool {
        self.effects.is_some() && self.changes == 0 && self.generation == self.loaded_generation
    }

    fn is_load_due(&self) -> bool {
        !self.loading && self.changes == 0 && (self.check_due || !self.is_current())
    }

    fn must_load(&self, now: impl Fn() -> Instant) -> bool {
        self.is_load_due() && (self.not_loaded || self.paused_until.is_none_or(|end| end <= now()))
    }

    fn known(&self) -> Known {
        (self.generation, self.effects.as_ref().map(|effects| effects.version), self.renames)
    }

    /// Returns whether these texts may name something with side effects.
    fn may_be_named_in(&self, texts: &TextsBeforeLoad) -> bool {
        let names_any = |(text, words_hidden)| {
            self.effects.as_ref().is_none_or(|effects| effects.names_any(text, words_hidden))
        };
        texts.texts().is_none_or(|mut texts| texts.any(names_any))
    }

    /// A transaction has made callers of functions that had no side effects. `since`: what was known when it
    /// began. Returns whether the callers may have side effects.
    fn made_callers(&mut self, texts: &TextsBeforeLoad, since: Known) -> bool {
        let known = self.known();
        if self.loading {
            // The load may have been too early to see them.
            self.made_during_load.extend(texts);
        }
        // A renamed function has another name in the text than in the list.
        let is_renamed = since != known && since.2 != known.2;
        let is_harmful = is_renamed || since != known && self.may_be_named_in(texts);
        self.generation += u64::from(is_harmful);
        is_harmful
    }

    /// Records a query that began at this generation, and whether the database had no event trigger then.
    /// Its result is in `effects`.
    fn record_query(&mut self, generation: u64, no_event_triggers: bool) {
        // A transaction that has begun since may have made one.
        if self.changes == 0 && self.generation == generation {
            self.no_event_triggers = no_event_triggers;
        }
        self.loaded_generation = generation;
        self.queried_at = Some(Instant::now());
        self.not_loaded = false;
        let made = std::mem::take(&mut self.made_during_load);
        self.generation += u64::from(self.may_be_named_in(&made));
    }

    /// The load is over, with or without a result.
    fn end_load(&mut self, pause: Duration) {
        self.made_during_load = TextsBeforeLoad::default();
        self.loading = false;
        self.paused_until = Some(Instant::now() + pause);
    }
}

/// Caches the result for a prepared statement, with the version of [`EffectsByName`].
#[derive(Debug, Default)]
pub struct FoundEffects(Mutex<Option<(u64, Option<Arc<SideEffects>>)>>);

/// Whether the loaded function effects are up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadState {
    /// Up to date.
    Current,
    /// Not loaded, or outdated: the session loads them after its transaction, and looks the text up then.
    NotLoaded,
    /// A transaction that may change functions has not ended.
    Changing,
}

/// Result of a lookup for a text.
#[derive(Debug)]
pub struct Lookup {
    /// Whether `found` can be relied on.
    pub state: LoadState,
    /// The session must load the functions after its transaction.
    pub load: bool,
    /// The side effects, from the last load.
    pub found: Option<Arc<SideEffects>>,
    /// The text may change function effects.
    pub changes: bool,
}

/// Exists while a transaction that may change functions runs or awaits its check.
#[derive(Debug)]
pub struct FunctionsChanging {
    functions: Arc<FunctionEffects>,
    change: Change,
}

#[derive(Debug)]
enum Change {
    /// All texts may have other side effects afterwards.
    Any,
    /// The texts make callers of functions without side effects. Another transaction may make such a function
    /// harmful meanwhile, and a load does not see the callers before this one commits.
    Callers {
        texts: TextsBeforeLoad,
        since: Known,
    },
    Over,
}

impl FunctionsChanging {
    /// Adds a text that makes callers.
    pub fn makes_callers(&mut self, text: &[u8], words_hidden: bool) {
        if let Change::Callers { texts, .. } = &mut self.change {
            texts.push(text, words_hidden);
        }
    }

    /// Whether all texts may have other side effects afterwards.
    pub fn is_any(&self) -> bool {
        matches!(self.change, Change::Any)
    }

    /// The transaction is over. Returns whether its own texts may have had unknown side effects.
    pub fn end(mut self) -> bool {
        self.settle()
    }

    fn settle(&mut self) -> bool {
        let (change, mut harmful) = (std::mem::replace(&mut self.change, Change::Over), true);
        self.functions.update(|state| match change {
            Change::Any => {
                state.changes -= 1;
                state.generation += 1;
            }
            Change::Callers { texts, since } => harmful = state.made_callers(&texts, since),
            Change::Over => harmful = false,
        });
        harmful
    }
}

impl Drop for FunctionsChanging {
    fn drop(&mut self) {
        self.settle();
    }
}

/// A load in progress. Dropping it without a result leaves the state unchanged.
pub(in crate::data_path) struct Loading<'a> {
    functions: &'a FunctionEffects,
    generation: u64,
    began: Instant,
    /// Fingerprint at the last load; empty if none.
    pub fingerprint: String,
    /// Counters at the last check: if the server still has these, nothing changed. Empty: not to be trusted.
    pub counts: String,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let pause = (self.began.elapsed() * PAUSE).min(PAUSE_MAX);
        self.functions.update(|state| state.end_load(pause));
        self.functions.load_ended.notify_waiters();
    }
}

impl FunctionEffects {
    /// Creates the state of a database whose functions have no side effects and never change.
    pub fn without_functions() -> Self {
        let effects = EffectsByName::new([], Default::default(), Default::default());
        let state = State { effects: Some(Arc::new(effects)), ..State::default() };
        Self { plain: AtomicBool::new(true), state: Mutex::new(state), ..Self::default() }
    }

    /// All changes of the state go through here, so that `plain` always matches it.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = locked(&self.state);
        change(&mut state);
        let empty = state.effects.as_ref().is_some_and(|effects| effects.is_empty());
        self.plain.store(empty && state.is_current() && !state.check_due, Ordering::Release);
    }

    /// Returns whether no text needs a lookup. Costs one atomic load.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.plain.load(Ordering::Acquire)
    }

    /// Returns whether a function with these checks may change function effects. Where no function has side
    /// effects, objects that call functions have none either.
    fn may_be_changed_by(&self, checks: StateChecks) -> bool {
        checks.contains(StateChecks::FUNCTIONS) || checks.contains(StateChecks::CALLERS) && !self.is_plain()
    }

    /// Looks up the side effects of the functions that a text may call, and whether it changes them. `text` gives
    /// the text; it is called only where it must be read. `read` is what the text itself shows. `cache` belongs
    /// to a prepared statement. `words_hidden`: see [`EffectsByName::find`].
    #[cold]
    pub fn lookup<T: Deref<Target = [u8]>>(
        &self,
        text: impl Fn() -> T,
        words_hidden: bool,
        read: &SideEffects,
        cache: Option<&FoundEffects>,
    ) -> Lookup {
        let (effects, current, is_changing, load, runs_nothing) = {
            let state = locked(&self.state);
            let runs_nothing = read.only_defines && state.no_event_triggers;
            let load = state.must_load(Instant::now);
            let is_changing = state.changes > 0 && !state.not_loaded;
            (state.effects.clone(), state.is_current(), is_changing, load, runs_nothing && !state.not_loaded)
        };
        let makes_callers = read.checks.contains(StateChecks::CALLERS);
        let names_any = || effects.as_ref().is_some_and(|effects| effects.names_any(&text(), words_hidden));
        let changes = makes_callers && current && names_any();
        if runs_nothing {
            return Lookup { state: LoadState::Current, load, found: None, changes };
        }
        let state = match (current, is_changing) {
            (true, _) => LoadState::Current,
            (false, true) => LoadState::Changing,
            (false, false) => LoadState::NotLoaded,
        };
        let found = effects.and_then(|effects| match cache {
            Some(FoundEffects(cache)) => {
                let mut cache = locked(cache);
                match &*cache {
                    Some((version, found)) if *version == effects.version => found.clone(),
                    _ => {
                        let found = effects.find(&text(), words_hidden).map(Arc::new);
                        *cache = Some((effects.version, found.clone()));
                        found
                    }
                }
            }
            None => effects.find(&text(), words_hidden).map(Arc::new),
        });
        let changes = changes || found.as_ref().is_some_and(|found| self.may_be_changed_by(found.checks));
        Lookup { state, load, found, changes }
    }

    /// Returns the side effects of texts that ran before the load. They may have any, if the load is outdated
    /// or if the texts `changed` functions.
    pub fn lookup_after_load(&self, texts_before_load: &TextsBeforeLoad, changed: bool) -> Vec<SideEffects> {
        let (effects, current) = {
            let state = locked(&self.state);
            (state.effects.clone(), state.is_current())
        };
        let (Some(effects), Some(texts)) =
            (effects.filter(|_| current && !changed), texts_before_load.texts())
        else {
            return vec![SideEffects::anything()];
        };
        let found: Vec<_> =
            texts.filter_map(|(text, words_hidden)| effects.find(text, words_hidden)).collect();
        if found.iter().any(|found| self.may_be_changed_by(found.checks)) {
            self.update(|state| state.generation += 1);
        }
        found
    }

    /// Records that a client reads currval or lastval.
    pub fn record_sequence_read(&self) {
        self.sequences.store(true, Ordering::Relaxed);
    }

    /// Returns whether a client has ever read currval or lastval.
    #[inline]
    pub fn are_sequences_read(&self) -> bool {
        self.sequences.load(Ordering::Relaxed)
    }

    /// Marks the effects as changing until the guard is dropped. Called before a text that may change
    /// functions. `only_defines`: see [`SideEffects::only_defines`]; other texts may make event triggers.
    pub fn begin_change(self: &Arc<Self>, only_defines: bool) -> FunctionsChanging {
        self.update(|state| {
            state.changes += 1;
            state.no_event_triggers &= only_defines;
        });
        FunctionsChanging { functions: self.clone(), change: Change::Any }
    }

    /// Called before a text that makes callers of functions, or renames something.
    pub fn begin_callers(self: &Arc<Self>, text: &[u8], words_hidden: bool) -> FunctionsChanging {
        let since = locked(&self.state).known();
        let mut texts = TextsBeforeLoad::default();
        texts.push(text, words_hidden);
        if words(text).any(|word| word.eq_ignore_ascii_case(b"rename")) {
            self.update(|state| state.renames += 1);
        }
        FunctionsChanging { functions: self.clone(), change: Change::Callers { texts, since } }
    }

    /// Requests a check for changes made outside the proxy, unless one was made within `functions_check`.
    pub fn request_check(&self, functions_check: Duration) {
        self.update(|state| {
            state.check_due |= state.queried_at.is_none_or(|at| at.elapsed() >= functions_check)
        });
    }

    /// Called when a pool is created for this generation of the tenant's row. Effects loaded for another
    /// generation, or longer ago than `functions_check`, are outdated.
    pub fn pool_created(&self, row: i64, functions_check: Duration) {
        self.update(|state| {
            let is_fresh = state.queried_at.is_some_and(|at| at.elapsed() < functions_check);
            if row != state.row_generation || !is_fresh {
                state.generation += 1;
                state.not_loaded = true;
            }
            state.row_generation = row;
        });
    }

    /// Returns whether a session should start a load now.
    pub fn must_load(&self) -> bool {
        locked(&self.state).must_load(Instant::now)
    }

    /// Returns whether a session that waits for the result should start a load now.
    pub fn must_load_at_once(&self) -> bool {
        locked(&self.state).is_load_due()
    }

    /// Returns when no load is running.
    pub async fn until_load_ended(&self) {
        loop {
            let mut ended = pin!(self.load_ended.notified());
            ended.as_mut().enable();
            if !locked(&self.state).loading {
                return;
            }
            ended.await;
        }
    }

    /// Starts a load. Returns `None` if one is running or none is needed.
    pub(in crate::data_path) fn begin_load(&self) -> Option<Loading<'_>> {
        let mut state = locked(&self.state);
        if state.loading || (state.is_current() && !state.check_due) {
            return None;
        }
        state.loading = true;
        // Cleared before the query, so that a request made during the load is kept.
        state.check_due = false;
        let fingerprint = if state.effects.is_some() { state.fingerprint.clone() } else { String::new() };
        // Statistics may not count a change yet that the proxy itself has seen.
        let is_trustworthy = state.is_current() && state.trusted < TRUSTED_MAX;
        let counts = if is_trustworthy { state.counts.clone() } else { String::new() };
        let (generation, began) = (state.generation, Instant::now());
        Some(Loading { functions: self, generation, began, fingerprint, counts })
    }
}

impl Loading<'_> {
    /// The statistics count no change.
    pub fn trust_counts(&self) {
        self.functions.update(|state| {
            state.record_query(self.generation, state.no_event_triggers);
            state.trusted += 1;
        });
    }

    /// The fingerprint has not changed. `counts` were read just before it.
    pub fn unchanged(&self, counts: String, no_event_triggers: bool) {
        self.functions.update(|state| {
            state.record_query(self.generation, no_event_triggers);
            (state.counts, state.trusted) = (counts, 0);
        });
    }

    /// Stores newly loaded effects.
    pub fn loaded(
        &self,
        effects: EffectsByName,
        fingerprint: String,
        counts: String,
        no_event_triggers: bool,
    ) {
        self.functions.update(|state| {
            state.effects = Some(Arc::new(effects));
            state.record_query(self.generation, no_event_triggers);
            state.fingerprint = fingerprint;
            (state.counts, state.trusted) = (counts, 0);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{
        effects_by_name::{CallEffects, NamedEffects},
        *,
    };
    use crate::data_path::sql::Lexing;

    const LONG_AGO: Duration = Duration::from_secs(1);

    /// Loads effects in which `harmful` is the only function with any; the load took a second.
    fn load(functions: &FunctionEffects) {
        load_during(functions, || {});
    }

    fn load_during(functions: &FunctionEffects, meanwhile: impl FnOnce()) {
        let mut loading = functions.begin_load().unwrap();
        meanwhile();
        loading.began -= LONG_AGO;
        let call = CallEffects { checks: StateChecks::LOCKS, ..CallEffects::default() };
        let effects = NamedEffects { always: call, ..NamedEffects::default() };
        let all = EffectsByName::new(
            [(b"harmful".to_vec(), effects)],
            CallEffects::default(),
            CallEffects::default(),
        );
        loading.loaded(all, String::new(), String::new(), true);
    }

    fn loaded() -> Arc<FunctionEffects> {
        let functions = Arc::new(FunctionEffects::default());
        load(&functions);
        functions
    }

    fn look_up(functions: &FunctionEffects, sql: &str) -> Lookup {
        let read = SideEffects::read(sql.as_bytes(), Lexing::default());
        functions.lookup(|| sql.as_bytes(), false, &read, None)
    }

    #[test]
    fn a_burst_of_changes_is_loaded_once_until_the_pause_is_over() {
        let functions = loaded();
        let mut loads = 0;
        for _ in 0..50 {
            drop(functions.begin_change(true));
            if functions.must_load() {
                load(&functions);
                loads += 1;
            }
        }
        assert_eq!(loads, 0);
        // A text that needs to know them does not wait for the pause.
        assert_eq!(look_up(&functions, "SELECT 1").state, LoadState::NotLoaded);
        assert!(functions.must_load_at_once());
        let after = |wait| locked(&functions.state).must_load(|| Instant::now() + wait);
        assert!(!after(PAUSE * LONG_AGO - LONG_AGO));
        assert!(after(PAUSE_MAX));
    }

    #[test]
    fn the_first_load_of_a_pool_does_not_wait_for_a_pause() {
        let functions = loaded();
        functions.pool_created(7, Duration::ZERO);
        assert!(functions.must_load());
    }

    #[test]
    fn a_text_changes_effects_only_if_it_names_something_that_has_some() {
        let functions = loaded();
        for (sql, changes) in [
            ("CREATE VIEW v AS SELECT harmless()", false),
            ("CREATE VIEW v AS SELECT HARMFUL()", true),
            ("CREATE TABLE t (x int DEFAULT \"harmful\"())", true),
            ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT harmless()'", false),
            ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT harmful()'", true),
            ("CREATE VIEW v AS SELECT U&\"harmf\\0075l\"()", true),
            ("SELECT harmful()", false),
        ] {
            assert_eq!(look_up(&functions, sql).changes, changes, "{sql}");
        }
    }

    const HARMFUL: &[u8] = b"CREATE VIEW v AS SELECT harmful()";
    const HARMLESS: &[u8] = b"CREATE VIEW v AS SELECT harmless()";

    #[test]
    fn callers_made_while_their_function_becomes_harmful_are_loaded_again() {
        let is_current = |functions: &FunctionEffects| locked(&functions.state).is_current();
        for (text, harmful) in [(HARMLESS, false), (HARMFUL, true)] {
            let functions = Arc::new(FunctionEffects::without_functions());
            let made = functions.begin_callers(text, false);
            assert!(!made.end(), "nothing has changed meanwhile");
            let made = functions.begin_callers(text, false);
            drop(functions.begin_change(true));
            load(&functions);
            assert!(is_current(&functions));
            assert_eq!(made.end(), harmful);
            assert_eq!(is_current(&functions), !harmful);
        }
    }

    #[test]
    fn callers_committed_during_a_load_are_loaded_again_if_it_finds_their_function_harmful() {
        for (text, current) in [(HARMLESS, true), (HARMFUL, false)] {
            let functions = Arc::new(FunctionEffects::without_functions());
            drop(functions.begin_change(true));
            let made = functions.begin_callers(text, false);
            load_during(&functions, || drop(made));
            assert_eq!(locked(&functions.state).is_current(), current);
        }
    }

    #[test]
    fn callers_of_a_function_that_was_renamed_and_changed_meanwhile_are_loaded_again() {
        let functions = Arc::new(FunctionEffects::without_functions());
        let made = functions.begin_callers(HARMLESS, false);
        drop(functions.begin_callers(b"ALTER FUNCTION harmless RENAME TO harmful", false));
        drop(functions.begin_change(true));
        load(&functions);
        assert!(made.end());
        assert!(!locked(&functions.state).is_current());
    }

    #[test]
    fn definitions_get_no_checks_unless_an_event_trigger_may_run() {
        let functions = loaded();
        let checks = |sql| {
            let Lookup { state, found, .. } = look_up(&functions, sql);
            state != LoadState::Current || found.is_some()
        };
        drop(functions.begin_change(true));
        assert!(!checks("CREATE VIEW v AS SELECT harmful()"));
        assert!(checks("CREATE TABLE t AS SELECT harmless()"));
        assert!(checks("SELECT 1"));
        let makes_event_trigger = functions.begin_change(false);
        assert!(checks("CREATE VIEW v AS SELECT 1"));
        load(&functions);
        assert!(checks("CREATE VIEW v AS SELECT 1"), "the load did not see it");
        drop(makes_event_trigger);
        load(&functions);
        assert!(!checks("CREATE VIEW v AS SELECT 1"));
    }
}
