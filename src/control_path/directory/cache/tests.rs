//! What is cached, and for how long.

use std::sync::atomic::AtomicU32;

use tokio::sync::oneshot;

use super::*;

#[derive(Debug, PartialEq)]
struct Row(&'static str);

impl DependsOn for Row {
    fn depends_on_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        changed(&DirectoryChange::Tenant(1))
    }

    fn quotes_any(&self, changed: &dyn Fn(&DirectoryChange) -> bool) -> bool {
        changed(&DirectoryChange::Tenant(9))
    }
}

async fn down() -> Result<Lookup<Row>, CentralError> {
    Err(CentralError::Setup("down".to_owned()))
}

fn cache() -> (RowCache<&'static str, Row>, Arc<ChangeCounts>) {
    let second = Duration::from_secs(1);
    let limits = CacheLimits { entries: 10, fresh: 60 * second, stale: 600 * second, answer: 10 * second };
    let changes = Arc::new(ChangeCounts::new(10));
    let shared = CacheShared {
        changes: changes.clone(),
        lookups: Arc::new(LookupLimit::new(10)),
        pace: Arc::new(ResponsePace::default()),
        unconfirmed: Arc::default(),
    };
    (RowCache::new(limits, shared, |name| DirectoryChange::TenantName((*name).to_owned())), changes)
}

fn found(text: &'static str) -> Lookup<Row> {
    Lookup::Found(Arc::new(Row(text)))
}

/// A look-up that says when it has begun and answers when told to.
fn slow_look_up(
    begun: oneshot::Sender<()>,
    answer: oneshot::Receiver<&'static str>,
) -> impl Fn() -> futures_util::future::BoxFuture<'static, Result<Lookup<Row>, CentralError>> {
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
    let (cache, changes) = cache();
    let ((begun, has_begun), (reply, answer)) = (oneshot::channel(), oneshot::channel());
    let first = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get("acme", slow_look_up(begun, answer)).await }
    });
    has_begun.await.unwrap();
    changes.note(&DirectoryChange::Tenant(1));

    let second = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get("acme", || async { Ok(found("new")) }).await }
    });
    tokio::task::yield_now().await;
    reply.send("old").unwrap();

    assert_eq!(*second.await.unwrap().unwrap().unwrap(), Row("new"));
    // A caller from before the change may get either row.
    first.await.unwrap().unwrap().unwrap();
    let kept = cache.get("acme", || async { panic!("it is remembered") }).await;
    assert_eq!(*kept.unwrap().unwrap(), Row("new"));
}

#[tokio::test]
async fn a_client_that_leaves_while_its_look_up_runs_leaves_no_trace() {
    let (cache, _) = cache();
    let ((begun, has_begun), (_reply, answer)) = (oneshot::channel(), oneshot::channel());
    let leaver = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get("acme", slow_look_up(begun, answer)).await }
    });
    has_begun.await.unwrap();
    leaver.abort();

    let other = cache.get("acme", || async { Ok(found("acme")) }).await;

    assert_eq!(*other.unwrap().unwrap(), Row("acme"));
}

type LookedUp = std::future::Ready<Result<Lookup<Row>, CentralError>>;

/// Counts how often it is asked.
fn counted(answer: fn() -> Lookup<Row>) -> (Arc<AtomicU32>, impl Fn() -> LookedUp) {
    let asked = Arc::new(AtomicU32::new(0));
    let count = asked.clone();
    let look_up = move || {
        count.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok(answer()))
    };
    (asked, look_up)
}

#[tokio::test]
async fn an_absent_name_is_asked_for_as_often_as_a_known_one_and_at_once_when_it_comes() {
    let (cache, changes) = cache();
    let (absent, look_up_absent) = counted(|| Lookup::Absent);
    let (known, look_up_known) = counted(|| found("known"));
    for change in [
        DirectoryChange::Login(77),
        DirectoryChange::Tenant(2),
        DirectoryChange::TenantName("other".to_owned()),
        DirectoryChange::Everything,
        DirectoryChange::Host("h".to_owned()),
    ] {
        for _ in 0..10 {
            assert!(cache.get("nobody", &look_up_absent).await.unwrap().is_none());
            assert!(cache.get("known", &look_up_known).await.unwrap().is_some());
        }
        changes.note(&change);
    }
    assert_eq!(absent.load(Ordering::Relaxed), known.load(Ordering::Relaxed));

    changes.note(&DirectoryChange::TenantName("nobody".to_owned()));
    let (came, look_up) = counted(|| found("came"));
    assert_eq!(*cache.get("nobody", &look_up).await.unwrap().unwrap(), Row("came"));
    assert_eq!(*cache.get("nobody", &look_up).await.unwrap().unwrap(), Row("came"));
    assert_eq!(came.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_row_that_quotes_a_changed_one_is_read_again_and_used_if_that_fails() {
    for (then, expected) in [("new", Row("new")), ("nothing", Row("old"))] {
        let (cache, changes) = cache();
        cache.get("acme", || async { Ok(found("old")) }).await.unwrap();
        changes.note(&DirectoryChange::Tenant(9));
        let got = match then {
            "new" => cache.get("acme", || async { Ok(found("new")) }).await,
            _ => cache.get("acme", down).await,
        };
        assert_eq!(*got.unwrap().unwrap(), expected);
        let is_noted = timeout(Duration::ZERO, cache.shared.unconfirmed.notified()).await.is_ok();
        assert_eq!(is_noted, then == "nothing");
        changes.note(&DirectoryChange::Tenant(1));
        assert!(cache.get("acme", down).await.is_err(), "what has changed itself is never used");
    }
}

#[tokio::test]
async fn what_is_confirmed_was_read_since_notifications_are_received() {
    let (cache, changes) = cache();
    cache.get("acme", || async { Ok(found("old")) }).await.unwrap();
    let known = cache.confirmed("acme", || async { panic!("it is fresh") }).await;
    assert_eq!(*known.unwrap().unwrap(), Row("old"));

    changes.note(&DirectoryChange::Everything);

    assert!(cache.confirmed("acme", down).await.is_err());
    assert_eq!(*cache.get("acme", down).await.unwrap().unwrap(), Row("old"), "others may use it");
    cache.shared.lookups.succeeded();
    let new = cache.confirmed("acme", || async { Ok(found("new")) }).await;
    assert_eq!(*new.unwrap().unwrap(), Row("new"));
}

#[tokio::test]
async fn a_flood_of_invented_names_pushes_out_nothing_that_is_real_and_has_a_limit() {
    let (cache, _) = cache();
    let (known, look_up) = counted(|| found("known"));
    cache.get("known", &look_up).await.unwrap();
    for number in 0..2000 {
        let invented: &'static str = Box::leak(format!("invented {number}").into_boxed_str());
        assert!(cache.get(invented, || async { Ok(Lookup::Absent) }).await.unwrap().is_none());
    }
    cache.entries.run_pending_tasks().await;
    cache.absent.run_pending_tasks().await;
    cache.get("known", &look_up).await.unwrap();
    assert_eq!(known.load(Ordering::Relaxed), 1);
    assert!(cache.absent.entry_count() <= cache.limits.entries, "{}", cache.absent.entry_count());
}
