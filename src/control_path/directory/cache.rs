//! A cache of rows by key. A fresh row is used. A stale row is refreshed, and used if the refresh takes too
//! long. An outdated row waits longer for its refresh. A changed row is never used. There is one look-up at a time
//! for each key.
//!
//! A missing name is cached like a row and for as long, so that no response time tells which names exist.

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
use tokio::{
    sync::{Notify, SetOnce},
    time::timeout,
};

use super::{
    invalidation::{ChangeCounts, DependsOn, Validity},
    lookup_limit::LookupLimit,
    response_pace::ResponsePace,
};
use crate::{
    control_path::central::CentralError,
    data_path::{directory::DirectoryError, tenant::DirectoryChange},
};

/// How long an invalid row is not read again.
const BROKEN_FRESH: Duration = Duration::from_secs(1);
/// How long a caller with a stale row waits for its refresh.
const REFRESH_PATIENCE: Duration = Duration::from_millis(50);
/// The same for a row that quotes one that has changed.
const OUTDATED_PATIENCE: Duration = Duration::from_secs(1);
/// Pause after a failed refresh of a stale row.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);

/// From the configuration.
#[derive(Debug, Clone, Copy)]
pub struct CacheLimits {
    /// `directory_cache_max`.
    pub entries: u64,
    /// `directory_fresh`.
    pub fresh: Duration,
    /// `directory_stale`.
    pub stale: Duration,
    /// `central_timeout`.
    pub answer: Duration,
}

/// The result of a look-up.
pub enum Lookup<V> {
    /// A row.
    Found(Arc<V>),
    /// No row.
    Absent,
    /// An invalid row.
    Broken(Arc<str>),
}

/// The cache. Cheap to clone.
pub struct RowCache<K, V> {
    entries: Cache<K, Arc<Entry<V>>>,
    /// Missing keys. Clients can invent any number of them, so they have a cache of their own and cannot
    /// displace rows.
    absent: Cache<K, Arc<Entry<V>>>,
    /// The change that reports a new row for a key.
    appearance: fn(&K) -> DirectoryChange,
    shared: CacheShared,
    limits: CacheLimits,
}

/// Shared by the caches of a directory.
#[derive(Debug, Clone)]
pub struct CacheShared {
    /// Changes.
    pub changes: Arc<ChangeCounts>,
    /// Limit on look-ups.
    pub lookups: Arc<LookupLimit>,
    /// Durations of look-ups.
    pub pace: Arc<ResponsePace>,
    /// Notified when a row was used that the central database could not confirm.
    pub unconfirmed: Arc<Notify>,
}

struct Entry<V> {
    answer: Lookup<V>,
    /// Count of changes at the start of the look-up.
    since: u64,
    fresh_until: Instant,
    /// Until then a stale row is used without a refresh, because one has just failed.
    retry_at: Instant,
    usable_until: Instant,
    /// A refresh is running; `refreshed` is set at its end, successful or not.
    refreshing: AtomicBool,
    refreshed: SetOnce<()>,
}

/// Why a look-up returned no row. Shared by all callers that waited for it.
enum LookupMiss<V> {
    Absent(Arc<Entry<V>>),
    Failed(DirectoryError),
}

#[derive(Debug, PartialEq, Eq)]
enum Freshness {
    Fresh,
    /// Older than `directory_fresh`.
    Stale,
    /// It may have changed while no notifications were received.
    Doubtful,
    /// A row that it quotes has changed.
    Outdated,
    Nothing,
}

impl<K, V> RowCache<K, V>
where
    K: Hash + Eq + Clone + Debug + Send + Sync + 'static,
    V: DependsOn + Send + Sync + 'static,
{
    /// Empty.
    pub fn new(limits: CacheLimits, shared: CacheShared, appearance: fn(&K) -> DirectoryChange) -> Self {
        let cache = || Cache::builder().max_capacity(limits.entries).expire_after(AsLongAsUsable).build();
        Self { entries: cache(), absent: cache(), appearance, shared, limits }
    }

    /// Whether any cached row is usable.
    pub fn has_usable(&self) -> bool {
        self.entries.iter().any(|(key, entry)| self.freshness(&key, &entry) != Freshness::Nothing)
    }

    /// The row of `key`. Calls `look_up` if it is not cached or no longer usable.
    ///
    /// # Errors
    /// [`DirectoryError`], after `central_timeout` at most.
    pub async fn get<L, F>(&self, key: K, look_up: L) -> Result<Option<Arc<V>>, DirectoryError>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Lookup<V>, CentralError>> + Send + 'static,
    {
        // Nearly every login finds its rows fresh.
        if let Some(entry) = self.remembered(&key).await
            && self.freshness(&key, &entry) == Freshness::Fresh
        {
            return entry.answer.get();
        }
        // Boxed, because a look-up's future is large, and would be moved by each login.
        let recalled = Box::pin(self.recall_or_wait(key, look_up));
        let in_time = timeout(self.limits.answer, recalled).await;
        in_time.unwrap_or_else(|_| {
            let waited = self.limits.answer;
            let cause = format!("the central database did not answer within {waited:?} (central_timeout)");
            Err(DirectoryError::Unavailable(cause.into()))
        })
    }

    /// The row of `key` as the central database has it now. A row in the cache counts only if notifications have been
    /// received since it was read.
    ///
    /// # Errors
    /// [`DirectoryError`], after `central_timeout` at most.
    pub async fn confirmed<L, F>(&self, key: K, look_up: L) -> Result<Option<Arc<V>>, DirectoryError>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Lookup<V>, CentralError>> + Send + 'static,
    {
        if let Some(entry) = self.remembered(&key).await {
            match self.freshness(&key, &entry) {
                Freshness::Fresh => return entry.answer.get(),
                Freshness::Nothing => {}
                Freshness::Stale | Freshness::Doubtful | Freshness::Outdated => {
                    // Not replaced before it is read: until then, others may use it.
                    let renewed = self.look_up(look_up()).await?;
                    self.keep(key, renewed.clone()).await;
                    return renewed.answer.get();
                }
            }
        }
        self.get(key, look_up).await
    }

    /// Keeps a row that was looked up by another key.
    pub async fn adopt<O>(&self, key: K, other: &RowCache<O, V>, by: &O)
    where
        O: Hash + Eq + Clone + Debug + Send + Sync + 'static,
    {
        if let Some(entry) = other.remembered(by).await
            && other.freshness(by, &entry) == Freshness::Fresh
        {
            self.keep(key, entry.copy()).await;
        }
    }

    async fn recall_or_wait<L, F>(&self, key: K, look_up: L) -> Result<Option<Arc<V>>, DirectoryError>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Lookup<V>, CentralError>> + Send + 'static,
    {
        let asked_at = self.shared.changes.count();
        loop {
            if let Some(entry) = self.remembered(&key).await {
                match self.freshness(&key, &entry) {
                    Freshness::Fresh => return entry.answer.get(),
                    Freshness::Stale | Freshness::Doubtful => {
                        if let Some(entry) = self.refresh(&key, entry, REFRESH_PATIENCE, &look_up).await {
                            return entry.answer.get();
                        }
                    }
                    Freshness::Outdated => {
                        if let Some(entry) = self.refresh(&key, entry, OUTDATED_PATIENCE, &look_up).await {
                            return entry.answer.get();
                        }
                    }
                    Freshness::Nothing => {}
                }
                self.entries.invalidate(&key).await;
                self.absent.invalidate(&key).await;
            }
            let looked_up = self.entries.try_get_with(key.clone(), self.look_up_row(&key, look_up())).await;
            let entry = match looked_up.map_err(Arc::unwrap_or_clone) {
                Ok(entry) | Err(LookupMiss::Absent(entry)) => entry,
                Err(LookupMiss::Failed(error)) => return Err(error),
            };
            // This may have joined a look-up that was running when a change came. A look-up that began
            // after this call is good enough, whatever has changed since, so the loop ends after the second
            // round.
            if entry.since >= asked_at || self.freshness(&key, &entry) != Freshness::Nothing {
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
        look_up: impl Future<Output = Result<Lookup<V>, CentralError>>,
    ) -> Result<Arc<Entry<V>>, LookupMiss<V>> {
        let entry = self.look_up(look_up).await.map_err(LookupMiss::Failed)?;
        if matches!(entry.answer, Lookup::Absent) {
            self.absent.insert(key.clone(), entry.clone()).await;
            return Err(LookupMiss::Absent(entry));
        }
        Ok(entry)
    }

    async fn look_up(
        &self,
        look_up: impl Future<Output = Result<Lookup<V>, CentralError>>,
    ) -> Result<Arc<Entry<V>>, DirectoryError> {
        let (since, begun) = (self.shared.changes.count(), Instant::now());
        let answered = timeout(self.limits.answer, async {
            let _turn = self.shared.lookups.acquire().await?;
            look_up.await.map_err(|error| Arc::from(error.to_string())).inspect_err(|cause: &Arc<str>| {
                self.shared.lookups.failed(cause.clone());
            })
        });
        let answer = answered.await.unwrap_or_else(|_| {
            let waited = self.limits.answer;
            let cause: Arc<str> = format!("no answer within {waited:?} (central_timeout)").into();
            self.shared.lookups.failed(cause.clone());
            Err(cause)
        });
        self.shared.pace.took(begun.elapsed());
        let answer = answer.map_err(DirectoryError::Unavailable)?;
        self.shared.lookups.succeeded();
        Ok(Arc::new(Entry::new(answer, since, self.limits)))
    }

    /// Refreshes a stale row in a task of its own, so that neither a slow answer nor a client that leaves
    /// delays other callers. Waits a little for it. `None`: the row has changed.
    async fn refresh<L, F>(
        &self,
        key: &K,
        stale: Arc<Entry<V>>,
        patience: Duration,
        look_up: &L,
    ) -> Option<Arc<Entry<V>>>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Lookup<V>, CentralError>> + Send + 'static,
    {
        if Instant::now() < stale.retry_at {
            self.note_if_unconfirmed(key, &stale);
            return Some(stale);
        }
        if !stale.refreshing.swap(true, Ordering::AcqRel) {
            let (cache, key, stale, asked) = (self.clone(), key.clone(), stale.clone(), look_up());
            tokio::spawn(async move {
                let renewed = cache.look_up(asked).await;
                cache.keep(key, renewed.unwrap_or_else(|_| stale.postponed())).await;
                let _ = stale.refreshed.set(());
            });
        }
        let _ = timeout(patience, stale.refreshed.wait()).await;
        let since = stale.since;
        let newest = self.remembered(key).await.unwrap_or(stale);
        match self.freshness(key, &newest) {
            Freshness::Nothing => None,
            // Read again, by a look-up that began before the change.
            Freshness::Outdated if newest.since > since => None,
            _ => {
                self.note_if_unconfirmed(key, &newest);
                Some(newest)
            }
        }
    }

    fn note_if_unconfirmed(&self, key: &K, entry: &Entry<V>) {
        if matches!(self.freshness(key, entry), Freshness::Doubtful | Freshness::Outdated) {
            self.shared.unconfirmed.notify_one();
        }
    }

    async fn keep(&self, key: K, entry: Arc<Entry<V>>) {
        let (home, other) = match entry.answer {
            Lookup::Absent => (&self.absent, &self.entries),
            Lookup::Found(_) | Lookup::Broken(_) => (&self.entries, &self.absent),
        };
        home.insert(key.clone(), entry).await;
        other.invalidate(&key).await;
    }

    fn freshness(&self, key: &K, entry: &Entry<V>) -> Freshness {
        let now = Instant::now();
        let validity = match &entry.answer {
            // Any change may have repaired it.
            Lookup::Broken(_) if self.shared.changes.count() > entry.since => Validity::Changed,
            Lookup::Broken(_) => Validity::Unchanged,
            answer @ (Lookup::Found(_) | Lookup::Absent) => self
                .shared
                .changes
                .validity(entry.since, &Answer { answer, appearance: (self.appearance)(key) }),
        };
        match validity {
            Validity::Changed => Freshness::Nothing,
            _ if now >= entry.usable_until => Freshness::Nothing,
            Validity::Outdated => Freshness::Outdated,
            Validity::Doubtful => Freshness::Doubtful,
            Validity::Unchanged if now < entry.fresh_until => Freshness::Fresh,
            Validity::Unchanged => Freshness::Stale,
        }
    }
}

/// The answer of a look-up, and what it depends on.
pub struct Answer<'a, V> {
    /// The answer.
    pub answer: &'a Lookup<V>,
    /// The change that reports a new row for its key.
    pub appearance: DirectoryChange,
}

impl<V: DependsOn> DependsOn for Answer<'_, V> {
    fn depends_on_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        match self.answer {
            Lookup::Found(value) => {
                value.depends_on_any(changed) || value.frees_its_name() && changed(&self.appearance)
            }
            Lookup::Absent | Lookup::Broken(_) => changed(&self.appearance),
        }
    }

    fn quotes_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        matches!(self.answer, Lookup::Found(value) if value.quotes_any(changed))
    }
}

impl<V> Clone for LookupMiss<V> {
    fn clone(&self) -> Self {
        match self {
            Self::Absent(entry) => Self::Absent(entry.clone()),
            Self::Failed(error) => Self::Failed(error.clone()),
        }
    }
}

impl<V> Entry<V> {
    fn new(answer: Lookup<V>, since: u64, limits: CacheLimits) -> Self {
        let now = Instant::now();
        let (fresh, usable) = match answer {
            Lookup::Found(_) | Lookup::Absent => (limits.fresh, limits.stale),
            Lookup::Broken(_) => (BROKEN_FRESH, BROKEN_FRESH),
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

    /// The same entry, to be refreshed after a pause.
    fn postponed(&self) -> Arc<Self> {
        self.with_retry_at(Instant::now() + REFRESH_PAUSE)
    }

    /// The same entry, to be refreshed by itself.
    fn copy(&self) -> Arc<Self> {
        self.with_retry_at(self.retry_at)
    }

    fn with_retry_at(&self, retry_at: Instant) -> Arc<Self> {
        Arc::new(Self {
            answer: self.answer.clone(),
            since: self.since,
            fresh_until: self.fresh_until,
            retry_at,
            usable_until: self.usable_until,
            refreshing: AtomicBool::new(false),
            refreshed: SetOnce::new(),
        })
    }
}

impl<V> Lookup<V> {
    /// The row; `None`: there is none.
    pub fn get(&self) -> Result<Option<Arc<V>>, DirectoryError> {
        match self {
            Self::Found(value) => Ok(Some(value.clone())),
            Self::Absent => Ok(None),
            Self::Broken(cause) => Err(DirectoryError::Broken(cause.clone())),
        }
    }
}

impl<V> Clone for Lookup<V> {
    fn clone(&self) -> Self {
        match self {
            Self::Found(value) => Self::Found(value.clone()),
            Self::Absent => Self::Absent,
            Self::Broken(cause) => Self::Broken(cause.clone()),
        }
    }
}

impl<K, V> Clone for RowCache<K, V> {
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

/// moka drops an entry that is no longer usable.
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
