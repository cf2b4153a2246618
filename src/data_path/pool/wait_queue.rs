//! Idle servers and waiting sessions of a pool: one state, so that no session waits while a server is idle.
//!
//! ```text
//!                    ┌─ a session waits ──▶ handed to the one that has waited longest
//! a server comes back┤
//!                    └─ none waits ───────▶ idle ──▶ taken by the next session that needs one
//! ```
//!
//! A pool that uses several workers keeps a session and its server on one of them where that costs the others
//! little: a session gets an idle server of its own worker first, and a server that comes back goes to the first
//! session that waits on the same worker, past at most [`OVERTAKES_MAX`] others in a row.
//!
//! A wait ends with an error after `query_wait_timeout`. Waiting sessions have no timer of their own; one task
//! per pool watches all of them.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::Instant;

use super::{Pool, PooledServer, connect_backoff::ERROR_WITHIN};
use crate::{data_path::lock::locked, error::ClientError};

/// How often the watching task looks at deadlines and at pinned sessions. So a wait costs no timer.
const WATCH_EVERY: Duration = Duration::from_millis(25);
/// After this wait, a pinned session is asked to return its server at its next transaction boundary.
const LONG_WAIT: Duration = Duration::from_millis(100);

/// How often in a row a session that waits on a server's own worker gets it instead of the one that has waited
/// longest. To change the worker costs a server some microseconds.
const OVERTAKES_MAX: usize = 8;

/// Idle servers (`S`) and waiting sessions. `home` is the number of the worker whose reactor has the server.
#[derive(Debug)]
pub struct WaitQueue<S> {
    state: Mutex<State<S>>,
    /// Length of the queue; written under the lock. Sequentially consistent, as the counts of servers open
    /// and being opened: if an attempt ends while a session begins to wait, one of the two sees the other.
    waiting: AtomicUsize,
    /// Copy of `state.paused`; written under the lock.
    paused: AtomicBool,
    /// Whether the first session had waited for [`LONG_WAIT`] when the watching task last looked.
    has_long_wait: AtomicBool,
}

#[derive(Debug)]
struct State<S> {
    /// While true, no server is lent or becomes idle.
    paused: bool,
    /// As `paused`, but for ever: sessions get an error and do not wait.
    closed: bool,
    /// The one that was used last comes last.
    idle: Vec<(usize, S)>,
    next_number: u64,
    waiting: VecDeque<Waiter>,
    /// How often in a row others were served before the first of `waiting`.
    overtakes: usize,
    /// Results for sessions that have been woken and have not polled yet.
    results: Vec<(u64, Result<S, ClientError>)>,
    /// The watching task runs.
    is_watched: bool,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    home: usize,
    since: Instant,
    wait_max: Duration,
    waker: Waker,
}

/// What a session gets when it asks for a server.
#[derive(Debug)]
enum Entered<S> {
    Idle(S),
    /// It waits under this number.
    Waits(u64),
    Closed,
}

impl<S> State<S> {
    /// The idle server that was used last, of this worker if there is one.
    #[inline]
    fn take_idle(&mut self, home: usize) -> Option<S> {
        let at = self.idle.iter().rposition(|(of, _)| *of == home).or(self.idle.len().checked_sub(1))?;
        Some(self.idle.remove(at).1)
    }

    /// The session that gets a server of this worker.
    fn next_waiter(&mut self, home: usize) -> Option<Waiter> {
        let is_near = |waiter: &Waiter| waiter.home == home;
        let near = self.waiting.iter().take(OVERTAKES_MAX).position(is_near);
        let at = near.filter(|_| self.overtakes < OVERTAKES_MAX).unwrap_or(0);
        self.overtakes = if at == 0 { 0 } else { self.overtakes + 1 };
        self.waiting.remove(at)
    }
}

impl<S> WaitQueue<S> {
    /// No server yet.
    pub fn new(paused: bool) -> Self {
        let state = State {
            paused,
            closed: false,
            idle: Vec::new(),
            next_number: 0,
            waiting: VecDeque::new(),
            overtakes: 0,
            results: Vec::new(),
            is_watched: false,
        };
        Self {
            state: Mutex::new(state),
            waiting: AtomicUsize::new(0),
            paused: AtomicBool::new(paused),
            has_long_wait: AtomicBool::new(false),
        }
    }

    fn count_waiting(&self, state: &State<S>) {
        self.waiting.store(state.waiting.len(), Ordering::SeqCst);
    }

    #[inline]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    pub fn idle(&self) -> usize {
        locked(&self.state).idle.len()
    }

    /// Whether no server is lent for now.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Whether a session has waited for long.
    pub fn has_long_wait(&self) -> bool {
        self.has_long_wait.load(Ordering::Relaxed)
    }

    /// The idle server that was put back last, of this worker if there is one.
    #[inline]
    pub fn take_idle(&self, home: usize) -> Option<S> {
        locked(&self.state).take_idle(home)
    }

    /// All idle servers; the one that was used last comes last.
    pub fn take_all_idle(&self) -> Vec<S> {
        let idle = std::mem::take(&mut locked(&self.state).idle);
        idle.into_iter().map(|(_, server)| server).collect()
    }

    /// Hands a server to a session that waits, or makes it idle. The error is the server, to be closed, of a
    /// pool that is paused or closed.
    #[inline]
    pub fn put(&self, home: usize, server: S) -> Result<(), S> {
        let mut state = locked(&self.state);
        if state.paused || state.closed {
            return Err(server);
        }
        match state.next_waiter(home) {
            None => {
                state.idle.push((home, server));
                Ok(())
            }
            Some(waiter) => {
                state.results.push((waiter.number, Ok(server)));
                self.count_waiting(&state);
                drop(state);
                waiter.waker.wake();
                Ok(())
            }
        }
    }

    /// Takes an idle server, or a place in the queue for a session on this worker, the first one if its turn
    /// had come (`first`).
    fn enter(
        &self,
        home: usize,
        since: Instant,
        wait_max: Duration,
        waker: &Waker,
        first: bool,
    ) -> Entered<S> {
        let mut state = locked(&self.state);
        if state.closed {
            return Entered::Closed;
        }
        if let Some(server) = state.take_idle(home) {
            return Entered::Idle(server);
        }
        let number = state.next_number;
        state.next_number += 1;
        let waiter = Waiter { number, home, since, wait_max, waker: waker.clone() };
        match first {
            true => state.waiting.push_front(waiter),
            false => state.waiting.push_back(waiter),
        }
        self.count_waiting(&state);
        Entered::Waits(number)
    }

    /// The result for a session; `None`: it waits still, and `waker` is woken.
    fn poll_result(&self, number: u64, waker: &Waker) -> Option<Result<S, ClientError>> {
        let mut state = locked(&self.state);
        if let Some(at) = state.results.iter().position(|(of, _)| *of == number) {
            return Some(state.results.swap_remove(at).1);
        }
        match state.waiting.iter_mut().find(|waiter| waiter.number == number) {
            Some(waiter) => waiter.waker.clone_from(waker),
            // Unreachable: a waiter stays in the queue until it has a result.
            None => return Some(Err(ClientError::AdminShutdown)),
        }
        None
    }

    /// Leaves the queue; returns the server that was handed over already.
    fn leave(&self, number: u64) -> Option<S> {
        let mut state = locked(&self.state);
        if let Some(at) = state.results.iter().position(|(of, _)| *of == number) {
            return state.results.swap_remove(at).1.ok();
        }
        state.waiting.retain(|waiter| waiter.number != number);
        self.count_waiting(&state);
        None
    }

    fn refuse_where(
        &self,
        mut state: MutexGuard<'_, State<S>>,
        why: impl Fn(&Waiter) -> Option<ClientError>,
    ) {
        let mut woken = Vec::new();
        let State { waiting, results, .. } = &mut *state;
        waiting.retain(|waiter| match why(waiter) {
            None => true,
            Some(client_error) => {
                results.push((waiter.number, Err(client_error)));
                woken.push(waiter.waker.clone());
                false
            }
        });
        self.count_waiting(&state);
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }

    /// Ends all waits with this error.
    pub fn refuse_all(&self, client_error: &ClientError) {
        self.refuse_where(locked(&self.state), |_| Some(client_error.clone()));
    }

    /// Lends no server until it is called with `false`; idle ones are dropped. Sessions go on waiting.
    pub fn set_paused(&self, paused: bool) {
        {
            let mut state = locked(&self.state);
            state.paused = paused;
            self.paused.store(paused, Ordering::Relaxed);
        }
        if paused {
            self.drop_idle();
        }
    }

    /// Lends no server any more: drops the idle ones and ends all waits.
    pub fn close(&self) {
        let mut state = locked(&self.state);
        state.closed = true;
        self.refuse_where(state, |_| Some(ClientError::AdminShutdown));
        self.drop_idle();
    }

    /// Not under the lock: the drop of a server may open another one, which reads the queue.
    fn drop_idle(&self) {
        drop(self.take_all_idle());
    }

    /// Whether the caller has to start the watching task.
    fn starts_watching(&self) -> bool {
        !std::mem::replace(&mut locked(&self.state).is_watched, true)
    }

    /// Ends waits that have taken too long, with the `reason` why no server could be opened since they began,
    /// if there is one. Where the host is `silent`, waits end after [`ERROR_WITHIN`]. `false`: the queue is
    /// empty, and the watching task ends.
    fn watch(
        &self,
        now: Instant,
        silent: Option<&ClientError>,
        reason: impl Fn(Instant) -> Option<ClientError>,
    ) -> bool {
        self.refuse_where(locked(&self.state), |waiter| {
            let waited = now.saturating_duration_since(waiter.since);
            let busy = || ClientError::PoolBusy { waited: waiter.wait_max };
            let too_long = (waited >= waiter.wait_max).then(|| reason(waiter.since).unwrap_or_else(busy));
            too_long.or_else(|| silent.filter(|_| waited >= ERROR_WITHIN).cloned())
        });
        let mut state = locked(&self.state);
        let first = state.waiting.front();
        let is_long = first.is_some_and(|first| now.saturating_duration_since(first.since) >= LONG_WAIT);
        self.has_long_wait.store(is_long, Ordering::Relaxed);
        state.is_watched = !state.waiting.is_empty();
        state.is_watched
    }
}

/// A session's wait for a server. Dropping it leaves the queue; a server handed over already goes back.
#[derive(Debug)]
pub(super) struct ServerWait<'p> {
    pool: &'p Arc<Pool>,
    /// The session's worker.
    home: usize,
    since: Instant,
    wait_max: Duration,
    number: Option<u64>,
    /// The server that was handed over had ended: the session is the first again.
    first: bool,
}

impl<'p> ServerWait<'p> {
    /// Waits on this worker, for at most `wait_max` from `since` on.
    pub(super) fn new(pool: &'p Arc<Pool>, home: usize, since: Instant, wait_max: Duration) -> Self {
        Self { pool, home, since, wait_max, number: None, first: false }
    }

    fn enter(&mut self, waker: &Waker) -> Poll<Result<Box<PooledServer>, ClientError>> {
        let pool = self.pool;
        loop {
            match pool.queue.enter(self.home, self.since, self.wait_max, waker, self.first) {
                Entered::Closed => return Poll::Ready(Err(ClientError::AdminShutdown)),
                Entered::Idle(server) => match pool.inspect(server) {
                    Some(server) => return Poll::Ready(Ok(server)),
                    None => continue,
                },
                Entered::Waits(number) => {
                    self.number = Some(number);
                    pool.open_wanted();
                    pool.reclaim_pinned();
                    if pool.queue.starts_watching() {
                        pool.spawn(watch(pool.clone()));
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Future for ServerWait<'_> {
    type Output = Result<Box<PooledServer>, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(number) = self.number {
            let Some(result) = self.pool.queue.poll_result(number, cx.waker()) else { return Poll::Pending };
            self.number = None;
            if let Some(server) = self.pool.inspect(result?) {
                return Poll::Ready(Ok(server));
            }
            self.first = true;
        }
        self.enter(cx.waker())
    }
}

impl Drop for ServerWait<'_> {
    fn drop(&mut self) {
        if let Some(server) = self.number.and_then(|number| self.pool.queue.leave(number)) {
            self.pool.give_back(server);
        }
    }
}

/// The watching task: does what becomes due with time, as long as sessions wait.
async fn watch(pool: Arc<Pool>) {
    loop {
        tokio::time::sleep(WATCH_EVERY).await;
        let now = Instant::now();
        let silent = if pool.is_paused() { None } else { pool.connector.silent(now) };
        if !pool.queue.watch(now, silent.as_ref(), |since| pool.connector.reason_since(since)) {
            return;
        }
        // After a failure, the next attempt begins when a pause is over.
        if pool.connector.is_failing() {
            pool.open_wanted();
        }
        pool.connector.budget.look_again(&pool);
        // Grace periods of pinned sessions end; each waiting session reclaims one server.
        for _ in 0..pool.waiting() {
            if !pool.reclaim_pinned() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use proptest::prelude::*;

    use super::*;

    const WAIT: Duration = Duration::from_secs(1);
    const HOME: usize = 0;

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn queue() -> WaitQueue<u32> {
        WaitQueue::new(false)
    }

    fn enter(queue: &WaitQueue<u32>, since: Instant, first: bool) -> Entered<u32> {
        queue.enter(HOME, since, WAIT, Waker::noop(), first)
    }

    fn wait(queue: &WaitQueue<u32>, since: Instant, first: bool) -> u64 {
        match enter(queue, since, first) {
            Entered::Waits(number) => number,
            other => panic!("{other:?}"),
        }
    }

    fn result(queue: &WaitQueue<u32>, number: u64) -> Option<u32> {
        queue.poll_result(number, Waker::noop()).map(Result::unwrap)
    }

    #[test]
    fn the_longest_waiter_is_served_first_and_woken_once() {
        let (queue, woken) = (queue(), Arc::new(Woken::default()));
        let Entered::Waits(first) = queue.enter(HOME, Instant::now(), WAIT, &woken.clone().into(), false)
        else {
            panic!("served")
        };
        let second = wait(&queue, Instant::now(), false);
        queue.put(HOME, 7).unwrap();
        assert_eq!((woken.0.load(Ordering::Relaxed), queue.idle()), (1, 0));
        assert_eq!((result(&queue, second), result(&queue, first)), (None, Some(7)));
        // A session whose server had ended comes before all others.
        let first = wait(&queue, Instant::now(), true);
        queue.put(HOME, 8).unwrap();
        assert_eq!((result(&queue, second), result(&queue, first)), (None, Some(8)));
        assert_eq!((queue.waiting(), queue.idle()), (1, 0));
    }

    #[test]
    fn a_session_takes_the_idle_server_that_was_used_last_instead_of_a_place() {
        let queue = queue();
        queue.put(HOME, 6).unwrap();
        queue.put(HOME, 7).unwrap();
        assert!(matches!(enter(&queue, Instant::now(), false), Entered::Idle(7)));
        assert_eq!((queue.waiting(), queue.take_idle(HOME), queue.take_idle(HOME)), (0, Some(6), None));
    }

    #[test]
    fn a_wait_that_is_too_long_ends_and_a_long_one_is_known() {
        let (queue, now) = (queue(), Instant::now());
        assert!(queue.starts_watching() && !queue.starts_watching());
        let first = wait(&queue, now, false);
        let second = wait(&queue, now + WAIT / 2, false);
        assert!(queue.watch(now + LONG_WAIT / 2, None, |_| None) && !queue.has_long_wait());
        assert!(queue.watch(now + LONG_WAIT, None, |_| None) && queue.has_long_wait());
        assert!(queue.watch(now + WAIT, None, |_| None) && queue.has_long_wait());
        let refused = queue.poll_result(first, Waker::noop());
        assert!(matches!(refused, Some(Err(ClientError::PoolBusy { waited: WAIT }))), "{refused:?}");
        assert_eq!((result(&queue, second), queue.leave(second)), (None, None));
        // The queue is empty: the next session that waits starts the watching task again.
        assert!(
            !queue.watch(now + WAIT, None, |_| None) && !queue.has_long_wait() && queue.starts_watching()
        );
    }

    #[test]
    fn a_closed_queue_ends_all_waits_and_keeps_no_server() {
        let closed = queue();
        let waiter = wait(&closed, Instant::now(), false);
        closed.close();
        assert!(matches!(closed.poll_result(waiter, Waker::noop()), Some(Err(ClientError::AdminShutdown))));
        assert!(matches!(enter(&closed, Instant::now(), false), Entered::Closed));
        let with_idle = queue();
        with_idle.put(HOME, 7).unwrap();
        with_idle.close();
        assert_eq!((with_idle.take_idle(HOME), with_idle.put(HOME, 8)), (None, Err(8)));
    }

    #[test]
    fn a_session_gets_an_idle_server_of_its_own_worker_before_others() {
        let queue = queue();
        for (home, server) in [(0, 1), (1, 2), (1, 3), (0, 4)] {
            queue.put(home, server).unwrap();
        }
        let taken = [1, 1, 1, 2].map(|home| queue.take_idle(home));
        assert_eq!(taken, [Some(3), Some(2), Some(4), Some(1)]);
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Enter { first: bool },
        Put,
        Take,
        Poll(usize),
        Leave(usize),
        Pause(bool),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => any::<bool>().prop_map(|first| Step::Enter { first }),
            4 => Just(Step::Put),
            1 => Just(Step::Take),
            3 => any::<usize>().prop_map(Step::Poll),
            2 => any::<usize>().prop_map(Step::Leave),
            1 => any::<bool>().prop_map(Step::Pause),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        /// Servers of any worker go to sessions of any worker: the first of all, or the first of the server's own worker
        /// past few others.
        #[test]
        fn no_session_is_overtaken_for_long(homes in proptest::collection::vec((0_usize..3, 0_usize..3), 1..100)) {
            let queue = queue();
            let mut waiting: VecDeque<(u64, usize)> = VecDeque::new();
            for (home, _) in &homes {
                let Entered::Waits(number) = queue.enter(*home, Instant::now(), WAIT, Waker::noop(), false) else {
                    panic!("served")
                };
                waiting.push_back((number, *home));
            }
            let mut overtakes = 0;
            for (_, home) in homes {
                queue.put(home, 7).unwrap();
                let served = (0..waiting.len()).find(|at| result(&queue, waiting[*at].0).is_some()).unwrap();
                if served == 0 {
                    overtakes = 0;
                } else {
                    overtakes += 1;
                    prop_assert!(served < OVERTAKES_MAX && overtakes <= OVERTAKES_MAX);
                    prop_assert!((0..served).all(|at| waiting[at].1 != home) && waiting[served].1 == home);
                }
                waiting.remove(served);
            }
            prop_assert_eq!(queue.waiting(), 0);
        }

        /// In any sequence of events: each server is in exactly one place; sessions are served in order; none
        /// waits while a server is idle; nothing is idle or handed over during a pause.
        #[test]
        fn no_server_is_lost_and_no_session_overtaken_or_left_waiting(steps in steps()) {
            let queue = queue();
            let (mut sessions, mut order, mut idle) = (Vec::new(), VecDeque::new(), Vec::new());
            let (mut next, mut out, mut paused) = (0, 0, false);
            for step in steps {
                match step {
                    Step::Enter { first } => match enter(&queue, Instant::now(), first) {
                        Entered::Waits(number) => {
                            sessions.push(number);
                            if first { order.push_front(number) } else { order.push_back(number) }
                            prop_assert!(idle.is_empty());
                        }
                        Entered::Idle(server) => {
                            prop_assert_eq!(Some(server), idle.pop());
                            out += 1;
                        }
                        Entered::Closed => prop_assert!(false),
                    },
                    Step::Put => {
                        let put = queue.put(HOME, next);
                        prop_assert_eq!(put.is_err(), paused);
                        if paused {
                            out += 1;
                        } else if order.pop_front().is_none() {
                            idle.push(next);
                        }
                        next += 1;
                    }
                    Step::Take => {
                        let taken = queue.take_idle(HOME);
                        prop_assert_eq!(taken, idle.pop());
                        out += u32::from(taken.is_some());
                    }
                    Step::Pause(pause) => {
                        queue.set_paused(pause);
                        paused = pause;
                        if pause {
                            out += idle.drain(..).len() as u32;
                        }
                    }
                    Step::Poll(_) | Step::Leave(_) if sessions.is_empty() => {}
                    Step::Poll(which) => {
                        let at = which % sessions.len();
                        let result = result(&queue, sessions[at]);
                        prop_assert_eq!(result.is_some(), !order.contains(&sessions[at]));
                        if result.is_some() {
                            sessions.swap_remove(at);
                            out += 1;
                        }
                    }
                    Step::Leave(which) => {
                        let left = sessions.swap_remove(which % sessions.len());
                        let result = queue.leave(left);
                        prop_assert_eq!(result.is_some(), !order.contains(&left));
                        out += u32::from(result.is_some());
                        order.retain(|number| *number != left);
                    }
                }
                prop_assert_eq!((queue.waiting(), queue.idle()), (order.len(), idle.len()));
                prop_assert!(order.is_empty() || idle.is_empty());
            }
            out += sessions.iter().filter(|number| queue.leave(**number).is_some()).count() as u32;
            out += idle.len() as u32;
            prop_assert_eq!(out, next);
        }
    }
}
