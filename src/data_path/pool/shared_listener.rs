//! The shared listener: one server connection that listens for all sessions of a (tenant, access) that
//! LISTEN.
//!
//! ```text
//!                     LISTEN commits                   the mark
//! the session's server ──────┬────────────────────────────┤ UNLISTEN
//!                            └ notifications come by this ┘
//!                                                         ┌ by this, to the end ─────▶
//! the shared listener      ─ ─ ─ ─ LISTEN ────────────────┴──────────────────────────▶
//! ```
//!
//! A mark is a NOTIFY of ours that both connections receive. PostgreSQL sends notifications to all listeners
//! in one order. So those before the mark are taken from one connection, those after it from the other, and
//! each exactly once. The connection and its task are in `listener_connection.rs`. When it is lost, the
//! sessions that subscribed are ended.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::{Notify, oneshot};

use super::{Pool, listener_connection::ListenerConnection};
use crate::{
    data_path::{
        lock::locked,
        memory_limit::Account,
        session_state::channels::{Channels, MARKERS, Notification, messages, statements_for},
        sessions::registry::SessionHandle,
    },
    error::ClientError,
    wire::message::{append, append_cstr},
};

/// The shared listener of a (tenant, access), if there is one. Pools share it with those that replace them.
#[derive(Debug, Default)]
pub struct ListenerSlot {
    current: Mutex<Option<Arc<SharedListener>>>,
    /// Held by the session that opens it; others wait.
    opening: tokio::sync::Mutex<()>,
}

/// What the sessions and the listener's task share. The task runs on the pool's first worker.
#[derive(Debug)]
pub struct SharedListener {
    /// `client_encoding` of its connection.
    pub encoding: Box<str>,
    state: Mutex<State>,
    /// Wakes the task.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    subscribers: HashMap<u64, Subscriber>,
    /// Subscriptions of a channel.
    by_channel: HashMap<Box<str>, Vec<u64>>,
    /// How many want a channel, those included to scope it is yet to be handed over.
    needed: HashMap<Box<str>, usize>,
    /// Keyed by mark.
    handovers: HashMap<String, PendingHandover>,
    outbox: Vec<u8>,
    /// Queries in the outbox or sent, without an answer yet.
    unanswered: VecDeque<PendingQuery>,
    /// The pool to go on with. Weak: the pool holds this listener, which stays after it has ended.
    successor: Weak<Pool>,
    /// Why the listener has ended.
    ended: Option<ClientError>,
}

#[derive(Debug)]
struct Subscriber {
    session: Arc<SessionHandle>,
    /// Counts the notifications that wait for it.
    memory: Arc<Account>,
    channels: Arc<Channels>,
}

#[derive(Debug)]
struct PendingHandover {
    subscription: u64,
    channels: Arc<Channels>,
    done: oneshot::Sender<()>,
}

#[derive(Debug)]
struct PendingQuery {
    answered: oneshot::Sender<()>,
    failed: bool,
}

/// A session's subscription. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription {
    listener: Arc<SharedListener>,
    id: u64,
}

/// The listener has LISTENed for a session; from the mark on the session's notifications come by it.
#[derive(Debug)]
pub struct Handover {
    /// The payload to NOTIFY on [`MARKERS`].
    pub mark: String,
    /// Resolves when the listener has received the mark.
    pub done: oneshot::Receiver<()>,
}

/// The listener has ended, or its server has refused a LISTEN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the listener connection is lost")]
pub struct ListenerLost;

/// What the listener's task must do beside reading and writing.
#[derive(Debug)]
pub(super) enum Instruction {
    Nothing,
    /// Go on with a connection of this pool.
    Move(Arc<Pool>),
    End(ClientError),
}

impl Pool {
    /// Subscribes a session to the shared listener, which is opened if there is none. `memory` counts its
    /// notifications. Errors: as [`Pool::open_beside`].
    pub async fn subscribe(
        self: &Arc<Self>,
        session: &Arc<SessionHandle>,
        memory: &Arc<Account>,
    ) -> Result<Subscription, ClientError> {
        let join = || self.listener.now().and_then(|listener| listener.subscribe(session, memory));
        if let Some(subscription) = join() {
            return Ok(subscription);
        }
        let _opening = self.listener.opening.lock().await;
        if let Some(subscription) = join() {
            return Ok(subscription);
        }
        let pool = self.current().ok_or(ClientError::AdminShutdown)?;
        let connection = ListenerConnection::open(&pool).await?;
        let listener = Arc::new(SharedListener {
            encoding: connection.encoding().into(),
            state: Mutex::default(),
            changed: Notify::new(),
        });
        let subscription = listener.subscribe(session, memory).ok_or(ClientError::Internal)?;
        *locked(&self.listener.current) = Some(listener.clone());
        if self.is_paused() || self.current().is_none() {
            listener.end(ClientError::AdminShutdown);
        }
        let home = pool.placement.home();
        home.spawn(connection.listen(listener, pool));
        Ok(subscription)
    }
}

impl ListenerSlot {
    fn now(&self) -> Option<Arc<SharedListener>> {
        locked(&self.current).clone()
    }

    /// Ends the listener, and with `reason` the sessions that subscribed.
    pub fn end(&self, reason: ClientError) {
        if let Some(listener) = locked(&self.current).take() {
            listener.end(reason);
        }
    }

    /// The pool was replaced: the listener goes on with a connection of the new one.
    pub fn replaced_by(&self, pool: &Arc<Pool>) {
        if let Some(listener) = self.now() {
            locked(&listener.state).successor = Arc::downgrade(pool);
            listener.changed.notify_one();
        }
    }
}

impl SharedListener {
    /// `None`: the listener has ended.
    fn subscribe(
        self: &Arc<Self>,
        session: &Arc<SessionHandle>,
        memory: &Arc<Account>,
    ) -> Option<Subscription> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut state = locked(&self.state);
        if state.ended.is_some() {
            return None;
        }
        let (session, memory) = (session.clone(), memory.clone());
        state.subscribers.insert(id, Subscriber { session, memory, channels: Arc::default() });
        Some(Subscription { listener: self.clone(), id })
    }

    fn end(&self, reason: ClientError) {
        locked(&self.state).ended.get_or_insert(reason);
        self.changed.notify_one();
    }

    /// Resolves when the task may have something to do.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(super) fn instruction(&self) -> Instruction {
        let mut state = locked(&self.state);
        if let Some(reason) = &state.ended {
            return Instruction::End(reason.clone());
        }
        let successor = std::mem::take(&mut state.successor);
        successor.upgrade().map_or(Instruction::Nothing, Instruction::Move)
    }

    pub(super) fn take_outbox(&self) -> Vec<u8> {
        std::mem::take(&mut locked(&self.state).outbox)
    }

    /// All channels that a session needs.
    pub(super) fn needed(&self) -> Channels {
        Channels::new(locked(&self.state).needed.keys().map(|name| name.to_string()))
    }

    /// Passes a NotificationResponse to the subscribers of its channel. A session for which more than
    /// `bytes_max` would wait is ended.
    pub(super) fn deliver(&self, message: &[u8], bytes_max: usize) {
        let Some(Notification { channel, payload, .. }) = Notification::read(message) else { return };
        let (Ok(channel), mut state) = (std::str::from_utf8(channel), locked(&self.state)) else { return };
        if channel == MARKERS
            && let Ok(mark) = std::str::from_utf8(payload)
        {
            state.hand_over(mark);
        }
        for id in state.by_channel.get(channel).into_iter().flatten() {
            if let Some(Subscriber { session, memory, .. }) = state.subscribers.get(id)
                && let Err(client_error) = session.notify(message, bytes_max, memory)
            {
                session.end(client_error);
            }
        }
    }

    /// Whether a query in the outbox or sent has no answer yet.
    pub(super) fn has_unanswered(&self) -> bool {
        !locked(&self.state).unanswered.is_empty()
    }

    /// The server has sent an error for the first unanswered query.
    pub(super) fn refused(&self) {
        if let Some(unanswered) = locked(&self.state).unanswered.front_mut() {
            unanswered.failed = true;
        }
    }

    /// The server has finished the first unanswered query; `false`: there was none.
    pub(super) fn answered(&self) -> bool {
        match locked(&self.state).unanswered.pop_front() {
            Some(PendingQuery { answered, failed: false }) => drop(answered.send(())),
            Some(_) => {}
            None => return false,
        }
        true
    }

    /// The task has ended: fails what waits, and ends the subscribed sessions between two transactions.
    pub(super) fn ended(&self, reason: &ClientError) {
        let mut state = locked(&self.state);
        state.ended.get_or_insert(reason.clone());
        let subscribers = std::mem::take(&mut state.subscribers);
        *state = State { ended: state.ended.take(), ..State::default() };
        drop(state);
        for Subscriber { session, .. } in subscribers.into_values() {
            session.end_when_free(reason.clone());
        }
    }

    fn send(&self, state: &mut State, sql: &str) -> oneshot::Receiver<()> {
        let (answered, answer) = oneshot::channel();
        state.query(sql, answered);
        self.changed.notify_one();
        answer
    }
}

impl State {
    fn query(&mut self, sql: &str, answered: oneshot::Sender<()>) {
        append(&mut self.outbox, b'Q', |out| append_cstr(out, sql.as_bytes()));
        self.unanswered.push_back(PendingQuery { answered, failed: false });
    }

    /// One more subscription needs these; returns those that none needed before.
    fn need<'c>(&mut self, channels: &'c Channels) -> Vec<&'c str> {
        let mut new = Vec::new();
        for name in channels.iter() {
            let count = self.needed.entry(name.into()).or_default();
            *count += 1;
            if *count == 1 {
                new.push(name);
            }
        }
        new
    }

    /// One fewer subscription needs these; UNLISTENs those that none needs now.
    fn unneed(&mut self, channels: &Channels) {
        let mut old = Vec::new();
        for name in channels.iter() {
            match self.needed.get_mut(name) {
                Some(count) if *count > 1 => *count -= 1,
                _ => {
                    self.needed.remove(name);
                    old.push(name);
                }
            }
        }
        old.retain(|name| *name != MARKERS);
        if !old.is_empty() {
            self.query(&statements_for("UNLISTEN", old), oneshot::channel().0);
        }
    }

    /// The mark was received: from now on the session gets its new channels, and only these.
    fn hand_over(&mut self, mark: &str) {
        let Some(PendingHandover { subscription, channels, done }) = self.handovers.remove(mark) else {
            return;
        };
        let Some(subscriber) = self.subscribers.get_mut(&subscription) else { return };
        let before = std::mem::replace(&mut subscriber.channels, channels.clone());
        self.forget(subscription, &before);
        for name in channels.iter() {
            self.by_channel.entry(name.into()).or_default().push(subscription);
        }
        self.unneed(&before);
        let _ = done.send(());
    }

    /// The session gets these no more.
    fn forget(&mut self, subscription: u64, channels: &Channels) {
        for name in channels.iter() {
            if let Some(subscribers) = self.by_channel.get_mut(name) {
                subscribers.retain(|id| *id != subscription);
                if subscribers.is_empty() {
                    self.by_channel.remove(name);
                }
            }
        }
    }
}

impl Subscription {
    pub fn is_lost(&self) -> bool {
        locked(&self.listener.state).ended.is_some()
    }

    /// `client_encoding` of the notifications.
    pub fn encoding(&self) -> &str {
        &self.listener.encoding
    }

    /// Prepares to get these channels, and only these, from a mark on. On an error it is as before.
    pub async fn prepare(&self, channels: Arc<Channels>) -> Result<Handover, ListenerLost> {
        self.prepare_at(format!("{:032x}", rand::random::<u128>()), channels).await
    }

    /// The same for a mark that the session's listener in another process waits for, too.
    pub async fn prepare_at(&self, mark: String, channels: Arc<Channels>) -> Result<Handover, ListenerLost> {
        let (answer, done) = {
            let mut state = locked(&self.listener.state);
            if state.ended.is_some() {
                return Err(ListenerLost);
            }
            let sql = statements_for("LISTEN", state.need(&channels));
            let (done, received) = oneshot::channel();
            let pending = PendingHandover { subscription: self.id, channels: channels.clone(), done };
            state.handovers.insert(mark.clone(), pending);
            // Also where `sql` is empty: the answers to LISTENs of other sessions come before this one's.
            (self.listener.send(&mut state, &sql), received)
        };
        match answer.await {
            Ok(()) => Ok(Handover { mark, done }),
            Err(_) => {
                let mut state = locked(&self.listener.state);
                if state.handovers.remove(&mark).is_some() {
                    state.unneed(&channels);
                    self.listener.changed.notify_one();
                }
                Err(ListenerLost)
            }
        }
    }

    /// Returns when all earlier notifications are here: a server sends them before it answers a query.
    pub async fn caught_up(&self) -> Result<(), ListenerLost> {
        let answer = {
            let mut state = locked(&self.listener.state);
            if state.ended.is_some() {
                return Err(ListenerLost);
            }
            self.listener.send(&mut state, "")
        };
        answer.await.map_err(|_| ListenerLost)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = locked(&self.listener.state);
        if let Some(Subscriber { channels, .. }) = state.subscribers.remove(&self.id) {
            state.forget(self.id, &channels);
            state.unneed(&channels);
        }
        let markers = state.handovers.iter().filter(|(_, pending)| pending.subscription == self.id);
        let markers: Vec<String> = markers.map(|(mark, _)| mark.clone()).collect();
        for mark in markers {
            if let Some(PendingHandover { channels, .. }) = state.handovers.remove(&mark) {
                state.unneed(&channels);
            }
        }
        // The last session has left: the task ends.
        if state.subscribers.is_empty() {
            state.ended.get_or_insert(ClientError::ListenerLost);
        }
        self.listener.changed.notify_one();
    }
}

pub(super) fn is_mark(message: &[u8], mark: &str) -> bool {
    Notification::read(message)
        .is_some_and(|received| received.channel == MARKERS.as_bytes() && received.payload == mark.as_bytes())
}

/// The messages before the mark, and those after it; without a mark all are before it.
pub fn around_mark<'m>(bytes: &'m [u8], mark: &str) -> (&'m [u8], &'m [u8]) {
    let mut at = 0;
    for message in messages(bytes) {
        if is_mark(message, mark) {
            let behind = at + message.len();
            return (bytes.get(..at).unwrap_or_default(), bytes.get(behind..).unwrap_or_default());
        }
        at += message.len();
    }
    (bytes, &[])
}
