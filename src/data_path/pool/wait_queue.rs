//! Who waits for a server of a pool: first come, first served.
//!
//! What comes back is handed to whoever has waited longest, on the spot: it does not lie idle where somebody who comes
//! later would find it. Nobody who waits has a timer; while there are any, one task of the pool's looks after all of them.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use super::{Pool, Server, connect_backoff::TOLD_WITHIN};
use crate::error::ClientError;

/// How often it is looked after those who wait: their deadlines, and those asked who keep a server. Coarse, so that a wait
/// costs nothing but its place.
const LOOK_AFTER_EVERY: Duration = Duration::from_millis(25);
/// Who has waited so long has a session's server that needs it less, as soon as that is between two transactions.
const IMPATIENT_AFTER: Duration = Duration::from_millis(100);

/// Those who wait for an `S`.
#[derive(Debug)]
pub struct Line<S> {
    places: Mutex<Places<S>>,
    /// How many wait; written under the lock.
    waiting: AtomicUsize,
    /// Whether the first of them had waited for [`IMPATIENT_AFTER`] when it was last looked after them.
    impatient: AtomicBool,
}

#[derive(Debug)]
struct Places<S> {
    next: u64,
    waiting: VecDeque<Waiter>,
    /// What is kept for those who have been woken and have not come yet.
    served: Vec<(u64, Result<S, ClientError>)>,
    looked_after: bool,
    closed: bool,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    since: Instant,
    /// How long it waits at most.
    wait: Duration,
    waker: Waker,
}

/// What becomes of somebody who comes.
#[derive(Debug)]
enum Came<S> {
    /// It has a place, with this number.
    Waits(u64),
    /// It need not wait.
    Served(S),
    /// Nobody is served any more.
    Closed,
}

impl<S> Default for Line<S> {
    fn default() -> Self {
        let places = Places {
            next: 0,
            waiting: VecDeque::new(),
            served: Vec::new(),
            looked_after: false,
            closed: false,
        };
        Self { places: Mutex::new(places), waiting: AtomicUsize::new(0), impatient: AtomicBool::new(false) }
    }
}

impl<S> Line<S> {
    fn locked(&self) -> MutexGuard<'_, Places<S>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self, places: &Places<S>) {
        self.waiting.store(places.waiting.len(), Ordering::Release);
    }

    /// How many wait.
    #[inline]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// Whether somebody has waited for long.
    pub fn is_impatient(&self) -> bool {
        self.impatient.load(Ordering::Relaxed)
    }

    /// Takes a place, the first one for who was `served` in vain; unless there is a `spare` one after all, which nobody
    /// else finds meanwhile.
    fn come(
        &self,
        since: Instant,
        wait: Duration,
        waker: &Waker,
        served: bool,
        spare: impl FnOnce() -> Option<S>,
    ) -> Came<S> {
        let mut places = self.locked();
        if places.closed {
            return Came::Closed;
        }
        if let Some(spare) = spare() {
            return Came::Served(spare);
        }
        let number = places.next;
        places.next += 1;
        let waiter = Waiter { number, since, wait, waker: waker.clone() };
        match served {
            true => places.waiting.push_front(waiter),
            false => places.waiting.push_back(waiter),
        }
        self.counted(&places);
        Came::Waits(number)
    }

    /// What the one with this number has got; `None`: it waits still, and `waker` is woken.
    fn ask(&self, number: u64, waker: &Waker) -> Option<Result<S, ClientError>> {
        let mut places = self.locked();
        if let Some(at) = places.served.iter().position(|(served, _)| *served == number) {
            return Some(places.served.swap_remove(at).1);
        }
        match places.waiting.iter_mut().find(|waiter| waiter.number == number) {
            Some(waiter) => waiter.waker.clone_from(waker),
            None => return Some(Err(ClientError::AdminShutdown)), // never so
        }
        None
    }

    /// Gives a place up; hands back what was kept for it.
    fn leave(&self, number: u64) -> Option<S> {
        let mut places = self.locked();
        if let Some(at) = places.served.iter().position(|(served, _)| *served == number) {
            return places.served.swap_remove(at).1.ok();
        }
        places.waiting.retain(|waiter| waiter.number != number);
        self.counted(&places);
        None
    }

    /// For whoever has waited longest; `keep` has it if nobody waits, before anybody can come.
    #[inline]
    fn hand(&self, served: S, keep: impl FnOnce(S)) {
        let mut places = self.locked();
        match places.waiting.pop_front() {
            None => keep(served),
            Some(waiter) => {
                places.served.push((waiter.number, Ok(served)));
                self.counted(&places);
                drop(places);
                waiter.waker.wake();
            }
        }
    }

    /// Sends away those who wait in vain, and tells them why.
    fn refuse(&self, why: impl Fn(&Waiter) -> Option<ClientError>) {
        let mut woken = Vec::new();
        let mut places = self.locked();
        let Places { waiting, served, .. } = &mut *places;
        waiting.retain(|waiter| match why(waiter) {
            None => true,
            Some(refusal) => {
                served.push((waiter.number, Err(refusal)));
                woken.push(waiter.waker.clone());
                false
            }
        });
        self.counted(&places);
        drop(places);
        woken.into_iter().for_each(Waker::wake);
    }

    /// Nobody can be served for now: all are told why.
    pub fn refuse_all(&self, refusal: &ClientError) {
        self.refuse(|_| Some(refusal.clone()));
    }

    /// Nobody is served any more.
    pub fn close(&self) {
        self.locked().closed = true;
        self.refuse_all(&ClientError::AdminShutdown);
    }

    /// Whether somebody has to begin to look after those who wait.
    fn begins(&self) -> bool {
        !std::mem::replace(&mut self.locked().looked_after, true)
    }

    /// Sends away whoever has waited too long, with the `reason` why no server could be opened since then, if there is one; and
    /// whoever has waited for [`TOLD_WITHIN`] where the host is `silent`. `false` if nobody waits any more, and so nobody looks
    /// after the line.
    fn look_after(
        &self,
        now: Instant,
        silent: Option<&ClientError>,
        reason: impl Fn(Instant) -> Option<ClientError>,
    ) -> bool {
        self.refuse(|waiter| {
            let waited = now.saturating_duration_since(waiter.since);
            let busy = || ClientError::PoolBusy { waited: waiter.wait };
            let too_long = (waited >= waiter.wait).then(|| reason(waiter.since).unwrap_or_else(busy));
            too_long.or_else(|| silent.filter(|_| waited >= TOLD_WITHIN).cloned())
        });
        let mut places = self.locked();
        let first = places.waiting.front();
        self.impatient
            .store(first.is_some_and(|first| now - first.since >= IMPATIENT_AFTER), Ordering::Relaxed);
        places.looked_after = !places.waiting.is_empty();
        places.looked_after
    }
}

/// A place in a pool's line, and at last a server. Dropping it gives both up.
#[derive(Debug)]
pub(super) struct InLine<'p> {
    pool: &'p Arc<Pool>,
    since: Instant,
    wait: Duration,
    number: Option<u64>,
    /// It had a server, which was of no use.
    served: bool,
}

impl<'p> InLine<'p> {
    /// Waits for at most `wait` from `since` on.
    pub(super) fn new(pool: &'p Arc<Pool>, since: Instant, wait: Duration) -> Self {
        Self { pool, since, wait, number: None, served: false }
    }

    fn come(&mut self, waker: &Waker) -> Poll<Result<Box<Server>, ClientError>> {
        let pool = self.pool;
        match pool.line.come(self.since, self.wait, waker, self.served, || pool.try_borrow()) {
            Came::Served(server) => Poll::Ready(Ok(server)),
            Came::Closed => Poll::Ready(Err(ClientError::AdminShutdown)),
            Came::Waits(number) => {
                self.number = Some(number);
                pool.open_wanted();
                pool.ask_for_kept();
                if pool.line.begins() {
                    pool.worker.spawn(look_after(pool.clone()));
                }
                Poll::Pending
            }
        }
    }
}

impl Future for InLine<'_> {
    type Output = Result<Box<Server>, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(number) = self.number {
            let Some(got) = self.pool.line.ask(number, cx.waker()) else { return Poll::Pending };
            self.number = None;
            match got.map(|server| self.pool.vet(server)) {
                Ok(Some(server)) => return Poll::Ready(Ok(server)),
                Err(refusal) => return Poll::Ready(Err(refusal)),
                Ok(None) => self.served = true,
            }
        }
        self.come(cx.waker())
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        if let Some(server) = self.number.and_then(|number| self.pool.line.leave(number)) {
            self.pool.give_back(server);
        }
    }
}

impl Pool {
    /// A server that nobody has: for who has waited longest, or idle.
    #[inline]
    pub(super) fn offer(&self, server: Box<Server>) {
        // A retired pool is closed and hands the server back to be dropped.
        self.line.hand(server, |server| drop(self.servers.try_add(server)));
    }
}

/// Looks after those who wait for as long as there are any.
async fn look_after(pool: Arc<Pool>) {
    loop {
        tokio::time::sleep(LOOK_AFTER_EVERY).await;
        let now = Instant::now();
        if !pool.line.look_after(now, pool.silent(now).as_ref(), |since| pool.reason_since(since)) {
            return;
        }
        // Nobody waits where a server is idle; but another thread may have come just as one was looked at.
        while pool.waiting() > 0
            && let Some(server) = pool.try_borrow()
        {
            pool.offer(server);
        }
        // Nor does nobody open one; but another thread may have come just as the last attempt failed, and behind a failure
        // the next attempt waits for the end of a pause.
        if pool.live() == 0 || pool.is_failing() {
            pool.open_wanted();
        }
        // Whoever has just begun to keep a server may be asked a moment later; one of them for each who waits.
        for _ in 0..pool.waiting() {
            if !pool.ask_for_kept() {
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

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn waits(line: &Line<u32>, since: Instant, served: bool) -> u64 {
        match line.come(since, WAIT, Waker::noop(), served, || None) {
            Came::Waits(number) => number,
            other => panic!("{other:?}"),
        }
    }

    fn got(line: &Line<u32>, number: u64) -> Option<u32> {
        line.ask(number, Waker::noop()).map(Result::unwrap)
    }

    #[test]
    fn who_came_first_is_served_first_and_woken_once() {
        let (line, woken) = (Line::default(), Arc::new(Woken::default()));
        let Came::Waits(first) = line.come(Instant::now(), WAIT, &woken.clone().into(), false, || None)
        else {
            panic!("served")
        };
        let second = waits(&line, Instant::now(), false);
        line.hand(7, |_| panic!("kept"));
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert_eq!((got(&line, second), got(&line, first)), (None, Some(7)));
        // Who was served in vain comes before everybody else.
        let first = waits(&line, Instant::now(), true);
        line.hand(8, |_| panic!("kept"));
        assert_eq!((got(&line, second), got(&line, first)), (None, Some(8)));
        assert_eq!(line.waiting(), 1);
    }

    #[test]
    fn what_is_spare_is_found_before_a_place_is_taken() {
        let line = Line::default();
        assert!(matches!(line.come(Instant::now(), WAIT, Waker::noop(), false, || Some(7)), Came::Served(7)));
        let mut kept = None;
        line.hand(8, |served| kept = Some(served));
        assert_eq!((kept, line.waiting()), (Some(8), 0));
    }

    #[test]
    fn who_has_waited_too_long_is_sent_away_and_who_has_waited_long_is_impatient() {
        let (line, now) = (Line::default(), Instant::now());
        assert!(line.begins() && !line.begins());
        let first = waits(&line, now, false);
        let second = waits(&line, now + WAIT / 2, false);
        assert!(line.look_after(now + IMPATIENT_AFTER / 2, None, |_| None) && !line.is_impatient());
        assert!(line.look_after(now + IMPATIENT_AFTER, None, |_| None) && line.is_impatient());
        assert!(line.look_after(now + WAIT, None, |_| None) && line.is_impatient());
        let refused = line.ask(first, Waker::noop());
        assert!(matches!(refused, Some(Err(ClientError::PoolBusy { waited: WAIT }))), "{refused:?}");
        assert_eq!((got(&line, second), line.leave(second)), (None, None));
        // Nobody waits: the next who comes has somebody look after the line again.
        assert!(!line.look_after(now + WAIT, None, |_| None) && !line.is_impatient() && line.begins());
    }

    #[test]
    fn a_closed_line_refuses_those_in_it_and_those_who_come() {
        let line = Line::<u32>::default();
        let waiter = waits(&line, Instant::now(), false);
        line.close();
        assert!(matches!(line.ask(waiter, Waker::noop()), Some(Err(ClientError::AdminShutdown))));
        assert!(matches!(line.come(Instant::now(), WAIT, Waker::noop(), false, || None), Came::Closed));
    }

    proptest! {
        /// Whatever happens, everything that was handed in is with exactly one of: who waited, who keeps it, who left it.
        #[test]
        fn nothing_is_lost_and_nobody_overtakes(steps in proptest::collection::vec((0u8..4, 0usize..8), 1..200)) {
            let line = Line::default();
            let (mut here, mut order, mut handed, mut out) = (Vec::new(), VecDeque::new(), 0, 0);
            for (step, which) in steps {
                match step {
                    0 => {
                        let number = waits(&line, Instant::now(), false);
                        here.push(number);
                        order.push_back(number);
                    }
                    1 => {
                        let mut kept = false;
                        line.hand(handed, |_| kept = true);
                        handed += 1;
                        out += u32::from(kept);
                        prop_assert_eq!(kept, order.is_empty());
                        order.pop_front();
                    }
                    _ if here.is_empty() => {}
                    2 => {
                        let at = which % here.len();
                        let got = got(&line, here[at]);
                        prop_assert_eq!(got.is_some(), !order.contains(&here[at]));
                        if got.is_some() {
                            here.swap_remove(at);
                            out += 1;
                        }
                    }
                    _ => {
                        let left = here.swap_remove(which % here.len());
                        let got = line.leave(left);
                        prop_assert_eq!(got.is_some(), !order.contains(&left));
                        out += u32::from(got.is_some());
                        order.retain(|number| *number != left);
                    }
                }
                prop_assert_eq!(line.waiting(), order.len());
            }
            out += here.iter().filter(|number| line.leave(**number).is_some()).count() as u32;
            prop_assert_eq!(out, handed);
        }
    }
}
