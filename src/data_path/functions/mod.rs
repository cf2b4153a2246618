//! Side effects of a tenant's own functions.
//!
//! A text shows only its own statements. That `SELECT next_job()` takes an advisory lock is visible only in
//! the function's body, and for `INSERT INTO jobs` only in the body of a trigger. The proxy therefore loads
//! all bodies (`function_effects.rs`), follows dependencies (`dependencies.rs`) and builds a list of names
//! (`effects_by_name.rs`). A text that contains one of these names gets state checks after its transaction.
//! The analysis is conservative: it causes too many checks rather than too few.
//!
//! After a text that may change functions, all functions are loaded again; until then every text may have any
//! side effect. Changes made outside the proxy are detected every `functions_check_delay`. In most databases
//! no function has side effects, and the cost per text is one atomic load.

pub(super) mod dependencies;
pub(super) mod effects_by_name;
pub(super) mod function_effects;
mod not_loaded;

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

pub use self::effects_by_name::EffectsByName;
pub use self::not_loaded::TextsBeforeLoad;

use crate::data_path::{
    lock::locked,
    session_state::{side_effects::SideEffects, state_query::StateChecks},
};

/// How often in a row the proxy trusts statistics that count no change. Sessions report their counts with a
/// delay, and a superuser's session may not report them.
const TRUSTED_MAX: u8 = 5;

/// Function side effects of one database. Shared by the pools and sessions of its tenant.
#[derive(Debug, Default)]
pub struct FunctionEffects {
    /// No text needs a lookup. The only field that is read for every text.
    plain: AtomicBool,
    /// A client of the tenant has read currval or lastval.
    sequences: AtomicBool,
    state: Mutex<State>,
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
}

impl State {
    fn is_current(&self) -> bool {
        self.effects.is_some() && self.changes == 0 && self.generation == self.loaded_generation
    }

    fn must_load(&self) -> bool {
        !self.loading && self.changes == 0 && (self.check_due || !self.is_current())
    }

    /// Records a query that began at this generation.
    fn record_query(&mut self, generation: u64) {
        self.loaded_generation = generation;
        self.queried_at = Some(Instant::now());
        self.not_loaded = false;
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
    /// Not loaded since the tenant's first pool was created.
    NotLoaded,
    /// Functions may have changed since the load.
    Changed,
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
}

/// Exists while a transaction that may change functions runs or awaits its check.
#[derive(Debug)]
pub struct FunctionsChanging(Arc<FunctionEffects>);

impl Drop for FunctionsChanging {
    fn drop(&mut self) {
        self.0.update(|state| {
            state.changes -= 1;
            state.generation += 1;
        });
    }
}

/// A load in progress. Dropping it without a result leaves the state unchanged.
pub(in crate::data_path) struct Loading<'a> {
    functions: &'a FunctionEffects,
    generation: u64,
    /// Fingerprint at the last load; empty if none.
    pub fingerprint: String,
    /// Counters at the last check: if the server still has these, nothing changed. Empty: not to be trusted.
    pub counts: String,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.functions.update(|state| state.loading = false);
    }
}

impl FunctionEffects {
    /// Creates the state of a database whose functions have no side effects and never change.
    pub fn without_functions() -> Self {
        let effects = EffectsByName::new([], Default::default(), Default::default());
        let state = State { effects: Some(Arc::new(effects)), ..State::default() };
        Self { plain: AtomicBool::new(true), sequences: AtomicBool::new(false), state: Mutex::new(state) }
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

    /// Returns whether a text with these checks may change function effects. Where no function has side
    /// effects, objects that call functions have none either, so migrations of tables and views stay fast.
    #[inline]
    pub fn may_be_changed_by(&self, checks: StateChecks) -> bool {
        checks.contains(StateChecks::FUNCTIONS) || checks.contains(StateChecks::CALLERS) && !self.is_plain()
    }

    /// Looks up the side effects of the functions that a text may call. `text` gives the text; it is called
    /// only if `cache`, which belongs to a prepared statement, has no answer.
    /// `words_hidden`: see [`EffectsByName::find`].
    #[cold]
    pub fn lookup<T: Deref<Target = [u8]>>(
        &self,
        text: impl Fn() -> T,
        words_hidden: bool,
        cache: Option<&FoundEffects>,
    ) -> Lookup {
        let (effects, current, not_loaded, load) = {
            let state = locked(&self.state);
            (state.effects.clone(), state.is_current(), state.not_loaded, state.must_load())
        };
        let state = match (current, not_loaded) {
            (true, _) => LoadState::Current,
            (false, true) => LoadState::NotLoaded,
            (false, false) => LoadState::Changed,
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
        Lookup { state, load, found }
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

    /// Marks the effects as changing until the guard is dropped. Called before a text that may change them.
    pub fn begin_change(self: &Arc<Self>) -> FunctionsChanging {
        self.update(|state| state.changes += 1);
        FunctionsChanging(self.clone())
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
        locked(&self.state).must_load()
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
        Some(Loading { functions: self, generation: state.generation, fingerprint, counts })
    }
}

impl Loading<'_> {
    /// The statistics count no change.
    pub fn trust_counts(&self) {
        self.functions.update(|state| {
            state.record_query(self.generation);
            state.trusted += 1;
        });
    }

    /// The fingerprint has not changed. `counts` were read just before it.
    pub fn unchanged(&self, counts: String) {
        self.functions.update(|state| {
            state.record_query(self.generation);
            (state.counts, state.trusted) = (counts, 0);
        });
    }

    /// Stores newly loaded effects.
    pub fn loaded(&self, effects: EffectsByName, fingerprint: String, counts: String) {
        self.functions.update(|state| {
            state.record_query(self.generation);
            state.effects = Some(Arc::new(effects));
            state.fingerprint = fingerprint;
            (state.counts, state.trusted) = (counts, 0);
        });
    }
}
