//! Pinned sessions keep their server between transactions. Here is decided which of them must return it when
//! other sessions wait.
//!
//! While no session waits, all may keep their servers. Then each waiting session reclaims one, and again from
//! time to time:
//! - A session that keeps its server only for `currval` and `lastval`, or for a long unnamed statement that
//!   drivers parse anew, returns it after a grace period between two transactions. When a session has waited
//!   for long, it returns it at its next transaction boundary.
//! - A session beyond `max_pinned_servers` is ended with a clear error.
//!
//! The session that has been idle longest comes first.

use std::sync::{Arc, Mutex};

use super::Pool;
use crate::{
    data_path::{
        functions::FunctionEffects,
        lock::locked,
        session_state::pins::Pins,
        sessions::registry::{Activity, SessionHandle},
    },
    error::ClientError,
};

/// Grace period of a session that has just written a sequence, and so may read `lastval` next: if it has read
/// one before, if others of its tenant have, and if none has.
const GRACE_MS: [u32; 3] = [1_000, 250, 50];
/// Grace period of a session that has read `lastval`: it may read it again.
const AGAIN_MS: u32 = 250;

/// While no session of the tenant reads `currval` or `lastval`, servers return after this even if none waits.
const UNREAD_MS: u32 = 1_000;

/// The pinned sessions of a pool, in the order in which they were pinned.
#[derive(Debug)]
pub struct PinnedSessions {
    pub(super) sessions: Mutex<Vec<Arc<SessionHandle>>>,
    /// `max_pinned_servers`.
    pub(super) limit: usize,
    pub(super) functions: Arc<FunctionEffects>,
}

/// A session is pinned as long as this lives.
#[derive(Debug)]
pub struct Pinned {
    all: Arc<PinnedSessions>,
    process_id: i32,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        locked(&self.all.sessions).retain(|session| session.process_id != self.process_id);
    }
}

/// What a pinned session must do because others wait.
#[derive(Debug)]
pub enum Reclaim {
    Nothing,
    /// Return its server; the values for which it was pinned are lost.
    Server,
    /// End, with this error.
    Session(ClientError),
}

impl PinnedSessions {
    /// Asks a session to return its server, if there is one that can.
    fn call_back_one(&self, now_ms: u32) -> bool {
        let sessions = locked(&self.sessions);
        let others_read = self.functions.are_sequences_read();
        let returning = sessions.iter().filter(|session| {
            let pins = session.pins();
            let is_about_to_read = idle_ms(session, now_ms) < Some(grace_ms(pins, others_read));
            can_return(pins) && !is_about_to_read && !session.is_called_back()
        });
        if let Some(session) = longest_idle(returning, now_ms) {
            session.call_back();
            return true;
        }
        false
    }

    #[cold]
    fn reclaim_one(&self, now_ms: u32) -> bool {
        if self.call_back_one(now_ms) {
            return true;
        }
        let sessions = locked(&self.sessions);
        let beyond = sessions.iter().filter(|session| !can_return(session.pins())).skip(self.limit);
        if let Some(session) = longest_idle(beyond, now_ms) {
            session.end_when_free(self.too_many(session.pins()));
        }
        false
    }

    fn is_beyond_limit(&self, session: &SessionHandle) -> bool {
        let sessions = locked(&self.sessions);
        let mut firm = sessions.iter().filter(|session| !can_return(session.pins()));
        firm.position(|other| other.process_id == session.process_id).is_some_and(|place| place >= self.limit)
    }

    fn too_many(&self, pins: Pins) -> ClientError {
        let reasons = pins.names().collect::<Vec<_>>().join(", ");
        ClientError::TooManyPinned { limit: self.limit, reasons }
    }
}

impl Pool {
    /// Pins a session as long as the result lives.
    pub fn pin(&self, session: &Arc<SessionHandle>) -> Pinned {
        locked(&self.pinned.sessions).push(session.clone());
        Pinned { all: self.pinned.clone(), process_id: session.process_id }
    }

    /// What a session with these pins, between two transactions, must do now because others wait.
    #[cold]
    pub fn reclaims(&self, session: &SessionHandle, pins: Pins) -> Reclaim {
        if can_return(pins) {
            let stays = pins.contains(Pins::SEQUENCE_WRITTEN) || !self.queue.has_long_wait();
            return if stays { Reclaim::Nothing } else { Reclaim::Server };
        }
        match self.pinned.is_beyond_limit(session) {
            true => Reclaim::Session(self.pinned.too_many(pins)),
            false => Reclaim::Nothing,
        }
    }

    /// For a waiting session: asks a pinned one to return its server, unless a server is being opened.
    /// `false`: there is none to ask.
    pub(super) fn reclaim_pinned(&self) -> bool {
        let is_needed = !self.is_paused() && self.opening() < self.waiting();
        is_needed && self.pinned.reclaim_one(self.clock.now_ms())
    }

    /// For a session of another tenant with a lower load: asks a pinned one to return its server. `false`: there is
    /// none to ask.
    pub(super) fn call_back_pinned(&self) -> bool {
        self.pinned.call_back_one(self.clock.now_ms())
    }

    /// Reclaims servers that are pinned for `currval` and `lastval`, if no session of the tenant reads these.
    pub(super) fn reclaim_unread(&self) {
        if self.functions.are_sequences_read() {
            return;
        }
        let now_ms = self.clock.now_ms();
        let for_sequences = |pins: Pins| !pins.is_empty() && pins.difference(Pins::SEQUENCES).is_empty();
        for session in locked(&self.pinned.sessions).iter().filter(|session| for_sequences(session.pins())) {
            if idle_ms(session, now_ms) >= Some(UNREAD_MS) {
                session.call_back();
            }
        }
    }
}

fn grace_ms(pins: Pins, others_read: bool) -> u32 {
    let [reads, tenant_reads, nobody_reads] = GRACE_MS;
    match (pins.contains(Pins::SEQUENCE_WRITTEN), pins.contains(Pins::SEQUENCE), others_read) {
        (false, _, _) => AGAIN_MS,
        (true, true, _) => reads,
        (true, false, true) => tenant_reads,
        (true, false, false) => nobody_reads,
    }
}

/// For how long a session has been between two transactions; `None`: it is in one.
fn idle_ms(session: &SessionHandle, now_ms: u32) -> Option<u32> {
    match session.doing() {
        // The clock wraps, and may be read before the session notes a later time.
        (Activity::Pinned, since_ms) => {
            Some(now_ms.wrapping_sub(since_ms).cast_signed().max(0).cast_unsigned())
        }
        _ => None,
    }
}

fn longest_idle<'s>(
    sessions: impl Iterator<Item = &'s Arc<SessionHandle>>,
    now_ms: u32,
) -> Option<&'s Arc<SessionHandle>> {
    let idle = sessions.filter_map(|session| Some((idle_ms(session, now_ms)?, session)));
    idle.max_by_key(|(idle, _)| *idle).map(|(_, session)| session)
}

/// Whether a session with these pins may be asked to return its server.
pub fn can_return(pins: Pins) -> bool {
    !pins.is_empty() && pins.difference(Pins::RECLAIMABLE).is_empty()
}
