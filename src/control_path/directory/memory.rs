//! Rows by key, remembered: fresh ones are used, stale ones are refreshed and used where that takes too long, changed
//! ones never. One look-up at a time for a key.

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
    gate::Gate,
    ledger::{DependsOn, Ledger, Standing},
};
use crate::control_path::central::CentralError;

/// How long a name that is not there, or whose row is broken, is not asked for again.
const ABSENT_FRESH: Duration = Duration::from_secs(1);
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
    ledger: Arc<Ledger>,
    gate: Arc<Gate>,
    limits: Limits,
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
    pub fn new(limits: Limits, ledger: Arc<Ledger>, gate: Arc<Gate>) -> Self {
        let entries = Cache::builder().max_capacity(limits.entries).expire_after(AsLongAsUsable).build();
        Self { entries, ledger, gate, limits }
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
        let asked_at = self.ledger.count();
        loop {
            if let Some(entry) = self.entries.get(&key).await {
                match self.worth(&entry) {
                    Worth::Fresh => return entry.answer.get(),
                    Worth::Stale => {
                        if let Some(entry) = self.refresh(&key, entry, &look_up).await {
                            return entry.answer.get();
                        }
                    }
                    Worth::Nothing => {}
                }
                self.entries.invalidate(&key).await;
            }
            let looked_up = self.entries.try_get_with(key.clone(), self.look_up(look_up()));
            let entry = looked_up.await.map_err(|shared| DirectoryError::clone(&shared))?;
            // We may have joined a look-up that was under way when a change came. One that began after we were asked
            // is good enough, whatever has changed since: so this ends after the second round.
            if entry.since >= asked_at || self.worth(&entry) != Worth::Nothing {
                return entry.answer.get();
            }
        }
    }

    async fn look_up(
        &self,
        look_up: impl Future<Output = Result<Answer<V>, CentralError>>,
    ) -> Result<Arc<Entry<V>>, DirectoryError> {
        let since = self.ledger.count();
        let answered = timeout(self.limits.answer, async {
            let _turn = self.gate.pass().await?;
            look_up.await.map_err(|error| Arc::from(error.to_string())).inspect_err(|cause: &Arc<str>| {
                self.gate.failed(cause.clone());
            })
        });
        let answer = answered.await.unwrap_or_else(|_| {
            let waited = self.limits.answer;
            let cause: Arc<str> = format!("no answer within {waited:?} (central_timeout)").into();
            self.gate.failed(cause.clone());
            Err(cause)
        });
        let answer = answer.map_err(DirectoryError::Unavailable)?;
        self.gate.succeeded();
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
                memory.entries.insert(key, renewed.unwrap_or_else(|_| stale.postponed())).await;
                let _ = stale.refreshed.set(());
            });
        }
        let _ = timeout(REFRESH_PATIENCE, stale.refreshed.wait()).await;
        let newest = self.entries.get(key).await.unwrap_or(stale);
        (self.worth(&newest) != Worth::Nothing).then_some(newest)
    }

    fn worth(&self, entry: &Entry<V>) -> Worth {
        let now = Instant::now();
        let standing = match &entry.answer {
            Answer::Found(value) if !value.has_gone() => self.ledger.standing(entry.since, &**value),
            // Any change may have been the one that made or repaired it.
            _ if self.ledger.count() > entry.since => Standing::Changed,
            _ => Standing::Unchanged,
        };
        match standing {
            Standing::Changed => Worth::Nothing,
            _ if now >= entry.usable_until => Worth::Nothing,
            Standing::Unchanged if now < entry.fresh_until => Worth::Fresh,
            _ => Worth::Stale,
        }
    }
}

impl<V> Entry<V> {
    fn new(answer: Answer<V>, since: u64, limits: Limits) -> Self {
        let now = Instant::now();
        let (fresh, usable) = match answer {
            Answer::Found(_) => (limits.fresh, limits.stale),
            Answer::Absent | Answer::Broken(_) => (ABSENT_FRESH, ABSENT_FRESH),
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
            ledger: self.ledger.clone(),
            gate: self.gate.clone(),
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use tokio::sync::oneshot;

    use super::*;
    use crate::data_path::tenant::Change;

    #[derive(Debug, PartialEq)]
    struct Row(&'static str);

    impl DependsOn for Row {
        fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool {
            changed(&Change::Tenant(1))
        }
    }

    fn memory() -> (Memory<&'static str, Row>, Arc<Ledger>) {
        let second = Duration::from_secs(1);
        let limits = Limits { entries: 10, fresh: 60 * second, stale: 600 * second, answer: 10 * second };
        let ledger = Arc::new(Ledger::new(10));
        (Memory::new(limits, ledger.clone(), Arc::new(Gate::new(10))), ledger)
    }

    fn found(text: &'static str) -> Answer<Row> {
        Answer::Found(Arc::new(Row(text)))
    }

    /// A look-up that says when it has begun and answers when told to.
    fn slow_look_up(
        begun: oneshot::Sender<()>,
        answer: oneshot::Receiver<&'static str>,
    ) -> impl Fn() -> futures_util::future::BoxFuture<'static, Result<Answer<Row>, CentralError>> {
        let once = std::sync::Mutex::new(Some((begun, answer)));
        move || {
            let (begun, answer) = once.lock().unwrap().take().expect("asked once");
            Box::pin(async move {
                begun.send(()).unwrap();
                Ok(found(answer.await.unwrap()))
            })
        }
    }

    #[tokio::test]
    async fn whoever_asks_after_a_change_does_not_get_an_answer_begun_before_it() {
        let (memory, ledger) = memory();
        let ((begun, has_begun), (reply, answer)) = (oneshot::channel(), oneshot::channel());
        let first = tokio::spawn({
            let memory = memory.clone();
            async move { memory.recall("acme", slow_look_up(begun, answer)).await }
        });
        has_begun.await.unwrap();
        ledger.note(&Change::Tenant(1));

        let second = tokio::spawn({
            let memory = memory.clone();
            async move { memory.recall("acme", || async { Ok(found("new")) }).await }
        });
        tokio::task::yield_now().await;
        reply.send("old").unwrap();

        assert_eq!(*second.await.unwrap().unwrap().unwrap(), Row("new"));
        // Who asked before the change may get either.
        first.await.unwrap().unwrap().unwrap();
        let kept = memory.recall("acme", || async { panic!("it is remembered") }).await;
        assert_eq!(*kept.unwrap().unwrap(), Row("new"));
    }

    #[tokio::test]
    async fn a_client_that_leaves_while_its_look_up_runs_leaves_no_trace() {
        let (memory, _) = memory();
        let ((begun, has_begun), (_reply, answer)) = (oneshot::channel(), oneshot::channel());
        let leaver = tokio::spawn({
            let memory = memory.clone();
            async move { memory.recall("acme", slow_look_up(begun, answer)).await }
        });
        has_begun.await.unwrap();
        leaver.abort();

        let other = memory.recall("acme", || async { Ok(found("acme")) }).await;

        assert_eq!(*other.unwrap().unwrap(), Row("acme"));
    }

    #[tokio::test]
    async fn an_absent_name_is_asked_for_once_until_anything_changes() {
        let (memory, ledger) = memory();
        let asked = Arc::new(AtomicU32::new(0));
        let look_up = {
            let asked = asked.clone();
            move || {
                asked.fetch_add(1, Ordering::Relaxed);
                async { Ok(Answer::Absent) }
            }
        };
        for _ in 0..10 {
            assert!(memory.recall("acme", &look_up).await.unwrap().is_none());
        }
        let before = asked.swap(0, Ordering::Relaxed);
        ledger.note(&Change::Login(77));
        assert!(memory.recall("acme", &look_up).await.unwrap().is_none());

        // Once for each second that a busy machine may have taken.
        assert!((1..=9).contains(&before), "{before}");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
