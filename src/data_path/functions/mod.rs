//! What a tenant's own functions leave behind in the session that calls them, as far as their texts tell.
//!
//! A client's text shows what it does itself; that `SELECT next_job()` takes an advisory lock only the function's body
//! tells, and that `INSERT INTO jobs` does so only the body of a trigger. So the bodies are read (`function_effects.rs`), what
//! uses them is found out (`dependencies.rs`), and what comes of it is a list of names (`effects_by_name.rs`): a text in which one of
//! them stands is asked about when its transaction is over. Too much is asked rather than too little.
//!
//! A text that may change functions makes every other text doubtful until they have been read again; what is changed past
//! this proxy is looked for every `functions_check_delay`. In a database whose functions leave nothing behind, which
//! are most, a text costs one load.

pub(super) mod dependencies;
pub(super) mod effects_by_name;
pub(super) mod function_effects;
mod not_loaded;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

pub use self::effects_by_name::Known;
pub use self::not_loaded::Unlearnt;

use crate::data_path::session_state::{side_effects::Aftermath, state_query::Doubts};

/// How often in a row a server's statistics are believed when they count no change. Sessions publish what they have counted a
/// little late, and a superuser's may count nothing at all.
const BELIEVED_MAX: u8 = 5;

/// What is known of the functions of one database. Shared by the pools and sessions of its tenant.
#[derive(Debug, Default)]
pub struct Catalogue {
    /// No text need be looked at: the one thing that is read for each of them.
    plain: AtomicBool,
    /// Some client of the tenant reads currval or lastval.
    sequences: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// `None`: nothing yet.
    known: Option<Arc<Known>>,
    /// What the server said of its functions when they were read.
    fingerprint: String,
    /// What its statistics said of them when it was last asked.
    counts: String,
    /// How often those alone have been believed since.
    believed: u8,
    /// Transactions under way that may change them.
    changes: usize,
    /// Counts what may have put `known` out of date.
    generation: u64,
    /// Of it, what `known` has seen.
    learnt: u64,
    /// When the server was last asked.
    asked_at: Option<Instant>,
    /// The tenant's row then.
    row: i64,
    /// It has not been asked since the first of the tenant's pools was made.
    cold: bool,
    /// Somebody is to find out whether they were changed past us.
    due: bool,
    learning: bool,
}

impl State {
    fn is_current(&self) -> bool {
        self.known.is_some() && self.changes == 0 && self.generation == self.learnt
    }

    fn is_to_be_learnt(&self) -> bool {
        !self.learning && self.changes == 0 && (self.due || !self.is_current())
    }

    /// The server has been asked, when that was the generation.
    fn asked(&mut self, generation: u64) {
        self.learnt = generation;
        self.asked_at = Some(Instant::now());
        self.cold = false;
    }
}

/// What was found in a statement's text, and by which [`Known`].
#[derive(Debug, Default)]
pub struct Seen(Mutex<Option<(u64, Option<Arc<Aftermath>>)>>);

/// What is known of the functions that a text may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Functions {
    /// They are as they were read.
    Current,
    /// They have not been read since the tenant's first pool was made.
    NotLoaded,
    /// They may have changed since they were read.
    Changed,
}

/// What a text may leave behind by what it calls.
#[derive(Debug)]
pub struct Look {
    /// What is known of them.
    pub functions: Functions,
    /// They are to be read when the transaction is over.
    pub learn: bool,
    /// As far as they are known.
    pub found: Option<Arc<Aftermath>>,
}

/// A transaction that may change functions is under way, or not looked after yet.
#[derive(Debug)]
pub struct Changing(Arc<Catalogue>);

impl Drop for Changing {
    fn drop(&mut self) {
        self.0.update(|state| {
            state.changes -= 1;
            state.generation += 1;
        });
    }
}

/// Somebody is reading the functions. Dropping it leaves things as they were.
pub(in crate::data_path) struct Learning<'a> {
    catalogue: &'a Catalogue,
    generation: u64,
    /// What the server said of its functions when they were read.
    pub fingerprint: String,
    /// Where these are the same, they are believed; empty: not this time.
    pub counts: String,
}

impl Drop for Learning<'_> {
    fn drop(&mut self) {
        self.catalogue.update(|state| state.learning = false);
    }
}

impl Catalogue {
    /// Of a database whose functions leave nothing behind, and stay so.
    pub fn without_functions() -> Self {
        let known = Known::new(
            [],
            self::effects_by_name::Traces::default(),
            self::effects_by_name::Traces::default(),
        );
        let state = State { known: Some(Arc::new(known)), ..State::default() };
        Self { plain: AtomicBool::new(true), sequences: AtomicBool::new(false), state: Mutex::new(state) }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one door through which the state changes.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.locked();
        change(&mut state);
        let empty = state.known.as_ref().is_some_and(|known| known.is_empty());
        self.plain.store(empty && state.is_current() && !state.due, Ordering::Release);
    }

    /// Whether no text need be looked at. Costs one load.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.plain.load(Ordering::Acquire)
    }

    /// Whether a text with these doubts may change what is known. Where no function leaves anything behind, nothing that calls
    /// them does: a migration that makes tables and views is not slowed down.
    #[inline]
    pub fn may_be_changed_by(&self, doubts: Doubts) -> bool {
        doubts.contains(Doubts::FUNCTIONS) || doubts.contains(Doubts::CALLERS) && !self.is_plain()
    }

    /// What a text may leave behind by what it calls. `seen` is where a prepared statement remembers it; `tangled`: the text's
    /// encoding hides where words begin.
    #[cold]
    pub fn look(&self, text: &[u8], tangled: bool, seen: Option<&Seen>) -> Look {
        let (known, current, cold, learn) = {
            let state = self.locked();
            (state.known.clone(), state.is_current(), state.cold, state.is_to_be_learnt())
        };
        let known_are = match (current, cold) {
            (true, _) => Functions::Current,
            (false, true) => Functions::NotLoaded,
            (false, false) => Functions::Changed,
        };
        let found = known.and_then(|known| match seen {
            Some(Seen(seen)) => {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                match &*seen {
                    Some((version, found)) if *version == known.version => found.clone(),
                    _ => {
                        let found = known.look(text, tangled).map(Arc::new);
                        *seen = Some((known.version, found.clone()));
                        found
                    }
                }
            }
            None => known.look(text, tangled).map(Arc::new),
        });
        Look { functions: known_are, learn, found }
    }

    /// Functions have been read since these texts ran: what they may have left behind by what they call. Where that cannot be
    /// told, or they `changed` functions themselves, it may be anything.
    pub fn look_again(&self, unlearnt: &Unlearnt, changed: bool) -> Vec<Aftermath> {
        let (known, current) = {
            let state = self.locked();
            (state.known.clone(), state.is_current())
        };
        let (Some(known), Some(texts)) = (known.filter(|_| current && !changed), unlearnt.texts()) else {
            return vec![Aftermath::anything()];
        };
        let found: Vec<_> = texts.filter_map(|(text, tangled)| known.look(text, tangled)).collect();
        if found.iter().any(|found| self.may_be_changed_by(found.doubts)) {
            self.doubt();
        }
        found
    }

    /// They may be others by now.
    fn doubt(&self) {
        self.update(|state| state.generation += 1);
    }

    /// A client reads currval or lastval.
    pub fn sequence_is_read(&self) {
        self.sequences.store(true, Ordering::Relaxed);
    }

    /// Whether one ever did.
    #[inline]
    pub fn are_sequences_read(&self) -> bool {
        self.sequences.load(Ordering::Relaxed)
    }

    /// A text that may change functions is about to run.
    pub fn changing(self: &Arc<Self>) -> Changing {
        self.update(|state| state.changes += 1);
        Changing(self.clone())
    }

    /// They may have been changed past us: somebody is to find out, unless somebody has asked within `functions_check`.
    pub fn check(&self, functions_check: Duration) {
        self.update(|state| state.due |= state.asked_at.is_none_or(|at| at.elapsed() >= functions_check));
    }

    /// A pool is made for the tenant's row of that generation. What was learnt for another row, or longer ago than
    /// `functions_check`, is learnt again.
    pub fn serves(&self, row: i64, functions_check: Duration) {
        self.update(|state| {
            let is_fresh = state.asked_at.is_some_and(|at| at.elapsed() < functions_check);
            if row != state.row || !is_fresh {
                state.generation += 1;
                state.cold = true;
            }
            state.row = row;
        });
    }

    /// Whether somebody should read them now.
    pub fn is_to_be_learnt(&self) -> bool {
        self.locked().is_to_be_learnt()
    }

    /// Begins to read them; `None` if somebody does already, or need not.
    pub(in crate::data_path) fn begin_learning(&self) -> Option<Learning<'_>> {
        let mut state = self.locked();
        if state.learning || (state.is_current() && !state.due) {
            return None;
        }
        state.learning = true;
        // Before anybody looks: what is changed from now on is looked for again.
        state.due = false;
        let fingerprint = if state.known.is_some() { state.fingerprint.clone() } else { String::new() };
        // What this proxy has seen change may not be counted yet.
        let believable = state.is_current() && state.believed < BELIEVED_MAX;
        let counts = if believable { state.counts.clone() } else { String::new() };
        Some(Learning { catalogue: self, generation: state.generation, fingerprint, counts })
    }
}

impl Learning<'_> {
    /// By what its statistics count, nothing has changed.
    pub fn believed(&self) {
        self.catalogue.update(|state| {
            state.asked(self.generation);
            state.believed += 1;
        });
    }

    /// They are as they were when they were read. `counts`: what the statistics said just before.
    pub fn unchanged(&self, counts: String) {
        self.catalogue.update(|state| {
            state.asked(self.generation);
            (state.counts, state.believed) = (counts, 0);
        });
    }

    /// They have been read.
    pub fn learnt(&self, known: Known, fingerprint: String, counts: String) {
        self.catalogue.update(|state| {
            state.asked(self.generation);
            state.known = Some(Arc::new(known));
            state.fingerprint = fingerprint;
            (state.counts, state.believed) = (counts, 0);
        });
    }
}
