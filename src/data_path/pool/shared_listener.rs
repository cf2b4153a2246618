//! The pool's ear: one server connection that listens for all clients of a (tenant, access) that LISTEN.
//!
//! ```text
//!                     LISTEN commits                the mark
//! the client's server ──────┬──────────────────────────┤ UNLISTEN
//!                           └ the client hears by this ┘
//!                                                      ┌ by this, to the end ─────▶
//! the ear                  ─ ─ ─ ─ LISTEN ─────────────┴──────────────────────────▶
//! ```
//!
//! A mark is a NOTIFY of ours that both connections hear. PostgreSQL tells every listener everything in one order, so what
//! comes before the mark is taken from one connection, what comes after it from the other, and nothing twice or never.
//! The ear's work is in `listener_connection.rs`; when it ends, whoever heard by it is told by the end of its session.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::{Notify, oneshot};

use super::{Pool, listener_connection::Line};
use crate::{
    data_path::{
        exchange::channels::{Channels, MARKS, Notification, each, messages},
        memory_limit::Account,
        sessions::registry::SessionHandle,
    },
    error::ClientError,
    wire::message::{append, append_cstr},
};

/// Where the ear of a (tenant, access) is; the same for a pool and those that replace it.
#[derive(Debug, Default)]
pub struct EarPlace {
    ear: Mutex<Option<Arc<Ear>>>,
    /// One opens it, the others wait.
    opening: tokio::sync::Mutex<()>,
}

/// One ear. Its task lives on the pool's worker.
#[derive(Debug)]
pub struct Ear {
    /// `client_encoding` of its connection.
    pub encoding: Box<str>,
    state: Mutex<State>,
    /// There is something for the task to do.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    seats: HashMap<u64, Taken>,
    /// Who hears what.
    by_channel: HashMap<Box<str>, Vec<u64>>,
    /// How many want a channel, those included to whom it is yet to be handed over.
    wanted: HashMap<Box<str>, usize>,
    /// By their mark.
    handovers: HashMap<String, Pending>,
    outbox: Vec<u8>,
    /// Who waits for the answer to each query in or behind the outbox.
    owed: VecDeque<Owed>,
    successor: Option<Arc<Pool>>,
    over: Option<ClientError>,
}

/// A listening session.
#[derive(Debug)]
struct Taken {
    session: Arc<SessionHandle>,
    /// Where what waits for it counts.
    memory: Arc<Account>,
    channels: Arc<Channels>,
}

#[derive(Debug)]
struct Pending {
    seat: u64,
    channels: Arc<Channels>,
    done: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Owed {
    answered: oneshot::Sender<()>,
    failed: bool,
}

/// A session's place at the ear, given up by drop.
#[derive(Debug)]
pub struct Seat {
    ear: Arc<Ear>,
    id: u64,
}

/// The ear listens for a session; from the mark on the session hears by it.
#[derive(Debug)]
pub struct Handover {
    /// The payload to NOTIFY on [`MARKS`].
    pub mark: String,
    /// Resolves when the ear has heard it.
    pub done: oneshot::Receiver<()>,
}

/// The ear has ended, or its server has refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the listening connection is lost")]
pub struct Deaf;

/// What the ear's task is to do beside reading and writing.
#[derive(Debug)]
pub(super) enum Wish {
    Nothing,
    /// Go on with a connection of this pool.
    Move(Arc<Pool>),
    End(ClientError),
}

impl Pool {
    /// A seat at the pool's ear, which is opened if there is none.
    ///
    /// # Errors
    /// The budget is spent, or the server cannot be reached.
    pub async fn seat(
        self: &Arc<Self>,
        session: &Arc<SessionHandle>,
        memory: &Arc<Account>,
    ) -> Result<Seat, ClientError> {
        if let Some(seat) = self.listener.now().and_then(|ear| ear.seat(session, memory)) {
            return Ok(seat);
        }
        let _one = self.listener.opening.lock().await;
        if let Some(seat) = self.listener.now().and_then(|ear| ear.seat(session, memory)) {
            return Ok(seat);
        }
        let pool = self.current().ok_or(ClientError::AdminShutdown)?;
        let line = Line::open(&pool).await?;
        let ear = Arc::new(Ear {
            encoding: line.encoding().into(),
            state: Mutex::default(),
            changed: Notify::new(),
        });
        let seat = ear.seat(session, memory).ok_or(ClientError::Internal)?;
        *self.listener.locked() = Some(ear.clone());
        if self.is_paused() || self.current().is_none() {
            ear.end(ClientError::AdminShutdown);
        }
        let worker = pool.worker.clone();
        worker.spawn(line.listen(ear, pool));
        Ok(seat)
    }
}

impl EarPlace {
    fn locked(&self) -> MutexGuard<'_, Option<Arc<Ear>>> {
        self.ear.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Option<Arc<Ear>> {
        self.locked().clone()
    }

    /// Whoever hears by it is told `reason` by the end of its session.
    pub fn end(&self, reason: ClientError) {
        if let Some(ear) = self.locked().take() {
            ear.end(reason);
        }
    }

    /// The pool was replaced: the ear goes on with a connection of the new one.
    pub fn replaced_by(&self, pool: &Arc<Pool>) {
        if let Some(ear) = self.now() {
            ear.locked().successor = Some(pool.clone());
            ear.changed.notify_one();
        }
    }
}

impl Ear {
    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None`: it has ended.
    fn seat(self: &Arc<Self>, session: &Arc<SessionHandle>, memory: &Arc<Account>) -> Option<Seat> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut state = self.locked();
        if state.over.is_some() {
            return None;
        }
        let (session, memory) = (session.clone(), memory.clone());
        state.seats.insert(id, Taken { session, memory, channels: Arc::default() });
        Some(Seat { ear: self.clone(), id })
    }

    fn end(&self, reason: ClientError) {
        self.locked().over.get_or_insert(reason);
        self.changed.notify_one();
    }

    /// Resolves when there may be something to do.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(super) fn wish(&self) -> Wish {
        let mut state = self.locked();
        if let Some(reason) = &state.over {
            return Wish::End(reason.clone());
        }
        state.successor.take().map_or(Wish::Nothing, Wish::Move)
    }

    /// What is to be sent.
    pub(super) fn take_outbox(&self) -> Vec<u8> {
        std::mem::take(&mut self.locked().outbox)
    }

    /// Every channel that somebody wants.
    pub(super) fn wanted(&self) -> Channels {
        Channels::new(self.locked().wanted.keys().map(|name| name.to_string()))
    }

    /// A NotificationResponse has come: everybody who hears that channel gets it, `bytes_max` waiting for one of them.
    pub(super) fn hear(&self, message: &[u8], bytes_max: usize) {
        let Some(Notification { channel, payload, .. }) = Notification::read(message) else { return };
        let (Ok(channel), mut state) = (std::str::from_utf8(channel), self.locked()) else { return };
        if channel == MARKS
            && let Ok(mark) = std::str::from_utf8(payload)
        {
            state.hand_over(mark);
        }
        for id in state.by_channel.get(channel).into_iter().flatten() {
            if let Some(Taken { session, memory, .. }) = state.seats.get(id)
                && let Err(refusal) = session.notify(message, bytes_max, memory)
            {
                session.end(refusal);
            }
        }
    }

    /// Whether a query that was sent, or is to be sent, is unanswered.
    pub(super) fn is_owed(&self) -> bool {
        !self.locked().owed.is_empty()
    }

    /// The server has refused the query it works on.
    pub(super) fn refused(&self) {
        if let Some(owed) = self.locked().owed.front_mut() {
            owed.failed = true;
        }
    }

    /// The server has answered a query; `false` if there was none.
    pub(super) fn answered(&self) -> bool {
        match self.locked().owed.pop_front() {
            Some(Owed { answered, failed: false }) => drop(answered.send(())),
            Some(_) => {}
            None => return false,
        }
        true
    }

    /// The task has ended: those who waited for it hear of it, those who heard by it are ended between two transactions.
    pub(super) fn over(&self, reason: &ClientError) {
        let mut state = self.locked();
        state.over.get_or_insert(reason.clone());
        let seats = std::mem::take(&mut state.seats);
        *state = State { over: state.over.take(), ..State::default() };
        drop(state);
        for Taken { session, .. } in seats.into_values() {
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
        self.owed.push_back(Owed { answered, failed: false });
    }

    /// One more wants each of them; those that nobody wanted before.
    fn want<'c>(&mut self, channels: &'c Channels) -> Vec<&'c str> {
        let mut new = Vec::new();
        for name in channels.iter() {
            let count = self.wanted.entry(name.into()).or_default();
            *count += 1;
            if *count == 1 {
                new.push(name);
            }
        }
        new
    }

    /// One fewer wants each of them.
    fn unwant(&mut self, channels: &Channels) {
        let mut old = Vec::new();
        for name in channels.iter() {
            match self.wanted.get_mut(name) {
                Some(count) if *count > 1 => *count -= 1,
                _ => {
                    self.wanted.remove(name);
                    old.push(name);
                }
            }
        }
        old.retain(|name| *name != MARKS);
        if !old.is_empty() {
            self.query(&each("UNLISTEN", old), oneshot::channel().0);
        }
    }

    /// The mark was heard: from now on the session hears what it is to hear.
    fn hand_over(&mut self, mark: &str) {
        let Some(Pending { seat, channels, done }) = self.handovers.remove(mark) else { return };
        let Some(taken) = self.seats.get_mut(&seat) else { return };
        let before = std::mem::replace(&mut taken.channels, channels.clone());
        self.forget(seat, &before);
        for name in channels.iter() {
            self.by_channel.entry(name.into()).or_default().push(seat);
        }
        self.unwant(&before);
        let _ = done.send(());
    }

    /// The session hears these no more.
    fn forget(&mut self, seat: u64, channels: &Channels) {
        for name in channels.iter() {
            if let Some(seats) = self.by_channel.get_mut(name) {
                seats.retain(|id| *id != seat);
                if seats.is_empty() {
                    self.by_channel.remove(name);
                }
            }
        }
    }
}

impl Seat {
    /// Whether the ear has ended.
    pub fn is_lost(&self) -> bool {
        self.ear.locked().over.is_some()
    }

    /// `client_encoding` of what is heard here.
    pub fn encoding(&self) -> &str {
        &self.ear.encoding
    }

    /// Makes ready to hear these channels, and no others, from a mark on.
    ///
    /// # Errors
    /// [`Deaf`]; what is heard stays as it is.
    pub async fn prepare(&self, channels: Arc<Channels>) -> Result<Handover, Deaf> {
        let mark = format!("{:032x}", rand::random::<u128>());
        let (answer, done) = {
            let mut state = self.ear.locked();
            if state.over.is_some() {
                return Err(Deaf);
            }
            let sql = each("LISTEN", state.want(&channels));
            let (done, heard) = oneshot::channel();
            let pending = Pending { seat: self.id, channels: channels.clone(), done };
            state.handovers.insert(mark.clone(), pending);
            // Also where there is nothing to send: what others have asked for is answered before.
            (self.ear.send(&mut state, &sql), heard)
        };
        match answer.await {
            Ok(()) => Ok(Handover { mark, done }),
            Err(_) => {
                let mut state = self.ear.locked();
                if state.handovers.remove(&mark).is_some() {
                    state.unwant(&channels);
                    self.ear.changed.notify_one();
                }
                Err(Deaf)
            }
        }
    }

    /// Returns when everything that was notified before has been heard: a server tells a listener what has come before it
    /// answers.
    ///
    /// # Errors
    /// [`Deaf`].
    pub async fn caught_up(&self) -> Result<(), Deaf> {
        let answer = {
            let mut state = self.ear.locked();
            if state.over.is_some() {
                return Err(Deaf);
            }
            self.ear.send(&mut state, "")
        };
        answer.await.map_err(|_| Deaf)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.ear.locked();
        if let Some(Taken { channels, .. }) = state.seats.remove(&self.id) {
            state.forget(self.id, &channels);
            state.unwant(&channels);
        }
        let marks = state.handovers.iter().filter(|(_, pending)| pending.seat == self.id);
        let marks: Vec<String> = marks.map(|(mark, _)| mark.clone()).collect();
        for mark in marks {
            if let Some(Pending { channels, .. }) = state.handovers.remove(&mark) {
                state.unwant(&channels);
            }
        }
        // Nobody is left to be told.
        if state.seats.is_empty() {
            state.over.get_or_insert(ClientError::ListenerLost);
        }
        self.ear.changed.notify_one();
    }
}

/// Whether a message is that mark.
pub(super) fn is_mark(message: &[u8], mark: &str) -> bool {
    Notification::read(message)
        .is_some_and(|heard| heard.channel == MARKS.as_bytes() && heard.payload == mark.as_bytes())
}

/// The messages before the mark, and those behind it; all are before it where there is none.
pub fn around_mark<'m>(bytes: &'m [u8], mark: &str) -> (&'m [u8], &'m [u8]) {
    let mut at = 0;
    for message in messages(bytes) {
        if is_mark(message, mark) {
            return (
                bytes.get(..at).unwrap_or_default(),
                bytes.get(at + message.len()..).unwrap_or_default(),
            );
        }
        at += message.len();
    }
    (bytes, &[])
}
