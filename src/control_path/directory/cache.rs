//! Rows by key, remembered: fresh ones are used, stale ones are refreshed and used where that takes too long, changed
//! ones never. One look-up at a time for a key.
//!
//! That a name is nobody's is remembered as long and in the same way as a row, so that nothing in how a name is treated tells
//! whether it is somebody's.

#[cfg(test)]
mod tests;

use std::{
    fmt::Debug,
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use moka::{Expiry, future::Cache};
use tokio::{sync::SetOnce, time::timeout};

use super::{
    DirectoryError,
    invalidation::{DependsOn, Ledger, Standing},
    lookup_limit::Gate,
    response_pace::Pace,
};
use crate::{control_path::central::CentralError, data_path::tenant::Change};

/// How long a row that is broken is not asked for again.
const BROKEN_FRESH: Duration = Duration::from_secs(1);
/// How long somebody with a stale row waits for a fresh one before using what there is.
const REFRESH_PATIENCE: Duration = Duration::from_millis(50);
/// How long a stale row is used without another try after one has failed.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);

/// From the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `directory_cache_max`.
    pub entries: u64,
    /// `directory_fresh`.
    pub fresh: Duration,
    /// `directory_stale`.
    pub stale: Duration,
    /// `central_timeout`.
    pub answer: Duration,
}

/// What a look-up may find.
pub enum Answer<V> {
    /// A row.
    Found(Arc<V>),
    /// No row.
    Absent,
    /// A row that cannot be used.
    Broken(Arc<str>),
}

/// The rows. Cheap to clone.
pub struct Memory<K, V> {
    entries: Cache<K, Arc<Entry<V>>>,
    /// Keys that nobody has. Strangers invent them, so they have a place of their own: however many come, they push out
    /// each other.
    absent: Cache<K, Arc<Entry<V>>>,
    /// The change by which a key comes to be somebody's.
    appearance: fn(&K) -> Change,
    shared: Shared,
    limits: Limits,
}

/// What the memories of a directory have in common.
#[derive(Debug, Clone)]
pub struct Shared {
    /// What changed.
    pub ledger: Arc<Ledger>,
    /// Who may ask now.
    pub gate: Arc<Gate>,
    /// How long asking takes.
    pub pace: Arc<Pace>,
}

struct Entry<V> {
    answer: Answer<V>,
    /// The ledger's count when the look-up began.
    since: u64,
    fresh_until: Instant,
    /// Stale before this: used without asking, because asking has just failed.
    retry_at: Instant,
    usable_until: Instant,
    /// Somebody is looking it up again; `refreshed` tells when that has ended, well or not.
    refreshing: AtomicBool,
    refreshed: SetOnce<()>,
}

/// Why a look-up has led to no row; whoever waited for the same one shares it.
enum Missed<V> {
    Absent(Arc<Entry<V>>),
    Failed(DirectoryError),
}

#[derive(Debug, PartialEq, Eq)]
enum Worth {
    Fresh,
    Stale,
    Nothing,
}

impl<K, V> Memory<K, V>
where
    K: Hash + Eq + Clone + Debug + Send + Sync + 'static,
    V: DependsOn + Send + Sync + 'static,
{
    /// Empty.
    pub fn new(limits: Limits, shared: Shared, appearance: fn(&K) -> Change) -> Self {
        let cache = || Cache::builder().max_capacity(limits.entries).expire_after(AsLongAsUsable).build();
        Self { entries: cache(), absent: cache(), appearance, shared, limits }
    }

    /// Whether any row is remembered that can be used.
    pub fn has_usable(&self) -> bool {
        self.entries.iter().any(|(key, entry)| self.worth(&key, &entry) != Worth::Nothing)
    }

    /// The row under `key`, by `look_up` where it is not known well enough.
    ///
    /// # Errors
    /// [`DirectoryError`], after `central_timeout` at most.
    pub async fn recall<L, F>(&self, key: K, look_up: L) -> Result<Option<Arc<V>>, DirectoryError>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Answer<V>, CentralError>> + Send + 'static,
    {
        let in_time = timeout(self.limits.answer, self.recall_or_wait(key, look_up)).await;
        in_time.unwrap_or_else(|_| {
            let waited = self.limits.answer;
            let cause = format!("the central database did not answer within {waited:?} (central_timeout)");
            Err(DirectoryError::Unavailable(cause.into()))
        })
    }

    async fn recall_or_wait<L, F>(&self, key: K, look_up: L) -> Result<Option<Arc<V>>, DirectoryError>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Answer<V>, CentralError>> + Send + 'static,
    {
        let asked_at = self.shared.ledger.count();
        loop {
            if let Some(entry) = self.remembered(&key).await {
                match self.worth(&key, &entry) {
                    Worth::Fresh => return entry.answer.get(),
                    Worth::Stale => {
                        if let Some(entry) = self.refresh(&key, entry, &look_up).await {
                            return entry.answer.get();
                        }
                    }
                    Worth::Nothing => {}
                }
                self.entries.invalidate(&key).await;
                self.absent.invalidate(&key).await;
            }
            let looked_up = self.entries.try_get_with(key.clone(), self.look_up_row(&key, look_up())).await;
            let entry = match looked_up.map_err(Arc::unwrap_or_clone) {
                Ok(entry) | Err(Missed::Absent(entry)) => entry,
                Err(Missed::Failed(error)) => return Err(error),
            };
            // We may have joined a look-up that was under way when a change came. One that began after we were asked
            // is good enough, whatever has changed since: so this ends after the second round.
            if entry.since >= asked_at || self.worth(&key, &entry) != Worth::Nothing {
                return entry.answer.get();
            }
        }
    }

    async fn remembered(&self, key: &K) -> Option<Arc<Entry<V>>> {
        let (row, absent) = (self.entries.get(key).await, self.absent.get(key).await);
        row.or(absent)
    }

    async fn look_up_row(
        &self,
        key: &K,
        look_up: impl Future<Output = Result<Answer<V>, CentralError>>,
    ) -> Result<Arc<Entry<V>>, Missed<V>> {
        let entry = self.look_up(look_up).await.map_err(Missed::Failed)?;
        if matches!(entry.answer, Answer::Absent) {
            self.absent.insert(key.clone(), entry.clone()).await;
            return Err(Missed::Absent(entry));
        }
        Ok(entry)
    }

    async fn look_up(
        &self,
        look_up: impl Future<Output = Result<Answer<V>, CentralError>>,
    ) -> Result<Arc<Entry<V>>, DirectoryError> {
        let (since, begun) = (self.shared.ledger.count(), Instant::now());
        let answered = timeout(self.limits.answer, async {
            let _turn = self.shared.gate.pass().await?;
            look_up.await.map_err(|error| Arc::from(error.to_string())).inspect_err(|cause: &Arc<str>| {
                self.shared.gate.failed(cause.clone());
            })
        });
        let answer = answered.await.unwrap_or_else(|_| {
            let waited = self.limits.answer;
            let cause: Arc<str> = format!("no answer within {waited:?} (central_timeout)").into();
            self.shared.gate.failed(cause.clone());
            Err(cause)
        });
        self.shared.pace.took(begun.elapsed());
        let answer = answer.map_err(DirectoryError::Unavailable)?;
        self.shared.gate.succeeded();
        Ok(Arc::new(Entry::new(answer, since, self.limits)))
    }

    /// Looks a stale row up again, in a task of its own, so that neither a slow answer nor a client that leaves is in
    /// anybody's way; waits for it a little. `None`: it has changed meanwhile.
    async fn refresh<L, F>(&self, key: &K, stale: Arc<Entry<V>>, look_up: &L) -> Option<Arc<Entry<V>>>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Answer<V>, CentralError>> + Send + 'static,
    {
        if Instant::now() < stale.retry_at {
            return Some(stale);
        }
        if !stale.refreshing.swap(true, Ordering::AcqRel) {
            let (memory, key, stale, asked) = (self.clone(), key.clone(), stale.clone(), look_up());
            tokio::spawn(async move {
                let renewed = memory.look_up(asked).await;
                memory.keep(key, renewed.unwrap_or_else(|_| stale.postponed())).await;
                let _ = stale.refreshed.set(());
            });
        }
        let _ = timeout(REFRESH_PATIENCE, stale.refreshed.wait()).await;
        let newest = self.remembered(key).await.unwrap_or(stale);
        (self.worth(key, &newest) != Worth::Nothing).then_some(newest)
    }

    async fn keep(&self, key: K, entry: Arc<Entry<V>>) {
        let (home, other) = match entry.answer {
            Answer::Absent => (&self.absent, &self.entries),
            Answer::Found(_) | Answer::Broken(_) => (&self.entries, &self.absent),
        };
        home.insert(key.clone(), entry).await;
        other.invalidate(&key).await;
    }

    fn worth(&self, key: &K, entry: &Entry<V>) -> Worth {
        let now = Instant::now();
        let standing = match &entry.answer {
            // Any change may have been the one that repaired it.
            Answer::Broken(_) if self.shared.ledger.count() > entry.since => Standing::Changed,
            Answer::Broken(_) => Standing::Unchanged,
            Answer::Found(_) | Answer::Absent => {
                let appearance = (self.appearance)(key);
                self.shared.ledger.standing(entry.since, &Remembered { entry, appearance })
            }
        };
        match standing {
            Standing::Changed => Worth::Nothing,
            _ if now >= entry.usable_until => Worth::Nothing,
            Standing::Unchanged if now < entry.fresh_until => Worth::Fresh,
            _ => Worth::Stale,
        }
    }
}

/// What is remembered under a key, and what it depends on.
struct Remembered<'a, V> {
    entry: &'a Entry<V>,
    appearance: Change,
}

impl<V: DependsOn> DependsOn for Remembered<'_, V> {
    fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool {
        match &self.entry.answer {
            Answer::Found(value) => {
                value.depends_on_any(changed) || value.has_gone() && changed(&self.appearance)
            }
            Answer::Absent | Answer::Broken(_) => changed(&self.appearance),
        }
    }
}

impl<V> Clone for Missed<V> {
    fn clone(&self) -> Self {
        match self {
            Self::Absent(entry) => Self::Absent(entry.clone()),
            Self::Failed(error) => Self::Failed(error.clone()),
        }
    }
}

impl<V> Entry<V> {
    fn new(answer: Answer<V>, since: u64, limits: Limits) -> Self {
        let now = Instant::now();
        let (fresh, usable) = match answer {
            Answer::Found(_) | Answer::Absent => (limits.fresh, limits.stale),
            Answer::Broken(_) => (BROKEN_FRESH, BROKEN_FRESH),
        };
        Self {
            answer,
            since,
            fresh_until: now + fresh,
            retry_at: now,
            usable_until: now + usable,
            refreshing: AtomicBool::new(false),
            refreshed: SetOnce::new(),
        }
    }

    /// The same, as stale as it was, to be tried again after a pause.
    fn postponed(&self) -> Arc<Self> {
        Arc::new(Self {
            answer: self.answer.clone(),
            since: self.since,
            fresh_until: self.fresh_until,
            retry_at: Instant::now() + REFRESH_PAUSE,
            usable_until: self.usable_until,
            refreshing: AtomicBool::new(false),
            refreshed: SetOnce::new(),
        })
    }
}

impl<V> Answer<V> {
    fn get(&self) -> Result<Option<Arc<V>>, DirectoryError> {
        match self {
            Self::Found(value) => Ok(Some(value.clone())),
            Self::Absent => Ok(None),
            Self::Broken(cause) => Err(DirectoryError::Broken(cause.clone())),
        }
    }
}

impl<V> Clone for Answer<V> {
    fn clone(&self) -> Self {
        match self {
            Self::Found(value) => Self::Found(value.clone()),
            Self::Absent => Self::Absent,
            Self::Broken(cause) => Self::Broken(cause.clone()),
        }
    }
}

impl<K, V> Clone for Memory<K, V> {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
            absent: self.absent.clone(),
            appearance: self.appearance,
            shared: self.shared.clone(),
            limits: self.limits,
        }
    }
}

/// moka drops an entry when nobody could use it any more.
struct AsLongAsUsable;

impl<K, V> Expiry<K, Arc<Entry<V>>> for AsLongAsUsable {
    fn expire_after_create(&self, _: &K, entry: &Arc<Entry<V>>, now: Instant) -> Option<Duration> {
        Some(entry.usable_until.saturating_duration_since(now))
    }

    fn expire_after_update(
        &self,
        _: &K,
        entry: &Arc<Entry<V>>,
        now: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(entry.usable_until.saturating_duration_since(now))
    }
}
