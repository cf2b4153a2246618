//! Limits the logins at a time (`max_logins_at_a_time`). Further logins wait for their turn, fair between
//! addresses. A turn ends with the login or after [`TURN`], so that a slow client does not delay others.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::oneshot;

use super::connection_limits::ClientNetwork;

use crate::data_path::lock::locked;

/// The longest turn. A login over a local network takes a few milliseconds; a longer one goes on without.
const TURN: Duration = Duration::from_millis(100);

/// A queue that serves its keys in turn, and the items of a key in their order.
#[derive(Debug)]
struct FairQueue<K, T> {
    waiting: HashMap<K, VecDeque<T>>,
    /// Each key that has items, once; the first is next.
    order: VecDeque<K>,
}

impl<K, T> Default for FairQueue<K, T> {
    fn default() -> Self {
        Self { waiting: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Copy + Eq + Hash, T> FairQueue<K, T> {
    fn push(&mut self, key: K, item: T) {
        let items = self.waiting.entry(key).or_default();
        if items.is_empty() {
            self.order.push_back(key);
        }
        items.push_back(item);
    }

    fn pop(&mut self) -> Option<T> {
        let key = self.order.pop_front()?;
        let items = self.waiting.get_mut(&key)?;
        let item = items.pop_front();
        if items.is_empty() {
            self.waiting.remove(&key);
        } else {
            self.order.push_back(key);
        }
        item
    }
}

/// The turns of all logins.
#[derive(Debug, Default)]
pub struct LoginTurns(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    taken: usize,
    queue: FairQueue<ClientNetwork, oneshot::Sender<Turn>>,
}

/// A login's turn; it ends when this is dropped.
#[derive(Debug)]
struct Turn(Option<Arc<LoginTurns>>);

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.pass_on();
        }
    }
}

impl LoginTurns {
    /// Runs a login when it has its turn. Its future is made only then, so that a waiting client stays small.
    pub async fn take<F: Future>(
        self: &Arc<Self>,
        origin: ClientNetwork,
        at_a_time: usize,
        login: impl FnOnce() -> F,
    ) -> F::Output {
        let mut turn = Some(self.wait(origin, at_a_time).await);
        let mut login = Box::pin(login());
        match tokio::time::timeout(TURN, &mut login).await {
            Ok(output) => output,
            Err(_) => {
                turn.take();
                login.await
            }
        }
    }

    async fn wait(self: &Arc<Self>, origin: ClientNetwork, at_a_time: usize) -> Turn {
        let turn = {
            let mut state = locked(&self.0);
            if state.taken < at_a_time {
                state.taken += 1;
                return Turn(Some(self.clone()));
            }
            let (sender, turn) = oneshot::channel();
            state.queue.push(origin, sender);
            turn
        };
        // The queue drops no sender, so this does not fail.
        turn.await.unwrap_or(Turn(None))
    }

    /// Gives the turn to the next login. A login that has ended meanwhile is skipped.
    fn pass_on(self: Arc<Self>) {
        loop {
            let next = {
                let mut state = locked(&self.0);
                let next = state.queue.pop();
                state.taken -= usize::from(next.is_none());
                next
            };
            let Some(next) = next else { return };
            match next.send(Turn(Some(self.clone()))) {
                Ok(()) => return,
                Err(mut unwanted) => unwanted.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_single_login_does_not_wait_behind_another_address() {
        let mut queue = FairQueue::default();
        for number in 0..1000 {
            queue.push("crowd", number);
        }
        queue.push("alone", 7);
        assert_eq!((queue.pop(), queue.pop(), queue.pop()), (Some(0), Some(7), Some(1)));
    }

    proptest! {
        /// Nothing is lost, items keep their order, and no key is served twice while another waits.
        #[test]
        fn keys_take_turns(pushed in proptest::collection::vec(0u8..5, 0..60)) {
            let mut queue = FairQueue::default();
            for (number, key) in pushed.iter().enumerate() {
                queue.push(*key, (*key, number));
            }
            let popped: Vec<(u8, usize)> = std::iter::from_fn(|| queue.pop()).collect();
            prop_assert_eq!(popped.len(), pushed.len());
            for (at, (key, number)) in popped.iter().enumerate() {
                let later = &popped[at + 1..];
                prop_assert!(later.iter().all(|(other, after)| other != key || after > number));
                let Some(again) = later.iter().position(|(other, _)| other == key) else { continue };
                let between: std::collections::HashSet<_> = later[..again].iter().map(|(other, _)| other).collect();
                prop_assert_eq!(between.len(), again, "a key was served twice");
                prop_assert!(later[again..].iter().all(|(other, _)| other == key || between.contains(other)));
            }
            prop_assert!(queue.waiting.is_empty() && queue.order.is_empty());
        }
    }

    #[tokio::test]
    async fn a_turn_is_passed_on_also_past_those_who_have_left() {
        let turns: Arc<LoginTurns> = Arc::default();
        let origin = ClientNetwork::of(None);
        let first = turns.wait(origin, 1).await;
        let left = tokio::spawn({
            let turns = turns.clone();
            async move { turns.wait(origin, 1).await }
        });
        tokio::task::yield_now().await;
        let stays = tokio::spawn({
            let turns = turns.clone();
            async move { drop(turns.wait(origin, 1).await) }
        });
        tokio::task::yield_now().await;
        left.abort();
        let _ = left.await;
        drop(first);
        stays.await.unwrap();
        assert_eq!(locked(&turns.0).taken, 0);
    }

    #[tokio::test]
    async fn a_slow_login_goes_on_without_its_turn() {
        let turns: Arc<LoginTurns> = Arc::default();
        let origin = ClientNetwork::of(None);
        let (finish, finished) = oneshot::channel::<()>();
        let slow = tokio::spawn({
            let turns = turns.clone();
            async move { turns.take(origin, 1, || finished).await.is_ok() }
        });
        tokio::task::yield_now().await;
        assert_eq!(turns.take(origin, 1, async || 7).await, 7);
        finish.send(()).unwrap();
        assert!(slow.await.unwrap());
    }
}
