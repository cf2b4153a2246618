//! The sessions that keep their server between transactions, and who must let go when somebody waits.
//!
//! As long as nobody waits every session may keep its server. Then the pool asks, one for each that waits and again from
//! time to time: a session that keeps its server for nothing but `currval` and `lastval`, or an unnamed statement that was too
//! long to keep and that drivers parse anew, gives it back when it has idled a little, or between two transactions where somebody has waited for long, and has no such value any more; one beyond
//! `max_pinned_servers` is ended with a clear error. The one that has idled longest comes first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Pool;
use crate::{
    data_path::{
        exchange::pending_replies::Pins,
        sessions::registry::{Doing, SessionHandle},
    },
    error::ClientError,
};

/// Who has just inserted is about to ask for `lastval`: so long it is left alone if it has asked before, if others of its tenant
/// have, and if nobody has; and so long who has asked, for it may ask again.
const GRACE_MS: [u32; 3] = [1_000, 250, 50];
const AGAIN_MS: u32 = 250;

/// A tenant none of whose clients has been seen to read `currval` or `lastval` has its servers back after this.
const UNREAD_MS: u32 = 1_000;

/// The sessions that keep their server, in the order in which they began to.
#[derive(Debug, Default)]
pub struct Kept(Mutex<Vec<Arc<SessionHandle>>>);

/// A session's place among them. Dropping it gives it up.
#[derive(Debug)]
pub struct Pinned {
    pool: Arc<Pool>,
    process_id: i32,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.pool.kept.sessions().retain(|session| session.process_id != self.process_id);
    }
}

impl Kept {
    fn sessions(&self) -> MutexGuard<'_, Vec<Arc<SessionHandle>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// A session keeps its server from now on.
    pub fn keep(self: &Arc<Self>, session: &Arc<SessionHandle>) -> Pinned {
        self.kept.sessions().push(session.clone());
        Pinned { pool: self.clone(), process_id: session.process_id }
    }

    /// Has servers back that are kept for a `currval` which nobody seems to ask for.
    pub(super) fn call_back_unread(&self) {
        if self.catalogue.are_sequences_read() {
            return;
        }
        let now_ms = self.worker.clock.now_ms();
        let for_sequences = |pins: Pins| !pins.is_empty() && pins.difference(Pins::SEQUENCES).is_empty();
        for session in self.kept.sessions().iter().filter(|session| for_sequences(session.pins())) {
            if idle_ms(session, now_ms) >= Some(UNREAD_MS) {
                session.call_back();
            }
        }
    }

    /// Somebody waits: asks one session that idles to let go of its server, where none is being opened; `false` if there is
    /// none to ask.
    pub(super) fn ask_for_kept(&self) -> bool {
        !self.is_paused() && self.opening() < self.waiting() && self.call_back()
    }

    #[cold]
    fn call_back(&self) -> bool {
        let now_ms = self.worker.clock.now_ms();
        let kept = self.kept.sessions();
        let others_read = self.catalogue.are_sequences_read();
        let yielding = kept.iter().filter(|session| {
            let pins = session.pins();
            let is_about_to_read = idle_ms(session, now_ms) < Some(grace_ms(pins, others_read));
            yields(pins) && !is_about_to_read && !session.is_called_back()
        });
        if let Some(session) = longest_idle(yielding, now_ms) {
            session.call_back();
            return true;
        }
        let beyond = kept.iter().filter(|session| !yields(session.pins())).skip(self.rules.pinned_max);
        if let Some(session) = longest_idle(beyond, now_ms) {
            session.end_when_free(self.too_many(session.pins()));
        }
        false
    }

    /// Whether a session with these pins, between two transactions, must let go of its server now.
    #[cold]
    pub fn wants_back(&self, session: &SessionHandle, pins: Pins) -> Wanted {
        if yields(pins) {
            let stays = pins.contains(Pins::SEQUENCE_WRITTEN) || !self.line.is_impatient();
            return if stays { Wanted::No } else { Wanted::Yielded };
        }
        let kept = self.kept.sessions();
        let mut firm = kept.iter().filter(|kept| !yields(kept.pins()));
        match firm.position(|kept| kept.process_id == session.process_id) {
            Some(place) if place >= self.rules.pinned_max => Wanted::Ended(self.too_many(pins)),
            _ => Wanted::No,
        }
    }

    fn too_many(&self, pins: Pins) -> ClientError {
        let reasons = pins.names().collect::<Vec<_>>().join(", ");
        ClientError::TooManyPinned { limit: self.rules.pinned_max, reasons }
    }
}

/// What somebody who waits wants of a session that keeps its server.
#[derive(Debug)]
pub enum Wanted {
    /// Nothing yet.
    No,
    /// That it gives the server back, and forgets what it was for.
    Yielded,
    /// That it ends.
    Ended(ClientError),
}

/// How long a session that idles is left alone.
fn grace_ms(pins: Pins, others_read: bool) -> u32 {
    let [reads, tenant_reads, nobody_reads] = GRACE_MS;
    match (pins.contains(Pins::SEQUENCE_WRITTEN), pins.contains(Pins::SEQUENCE), others_read) {
        (false, _, _) => AGAIN_MS,
        (true, true, _) => reads,
        (true, false, true) => tenant_reads,
        (true, false, false) => nobody_reads,
    }
}

/// How long a session has been between two transactions; `None`: it is not.
fn idle_ms(session: &SessionHandle, now_ms: u32) -> Option<u32> {
    match session.doing() {
        // The clock wraps; what lies ahead of it was noted since it was read.
        (Doing::Pinned, since_ms) => Some(now_ms.wrapping_sub(since_ms).cast_signed().max(0).cast_unsigned()),
        _ => None,
    }
}

fn longest_idle<'k>(
    sessions: impl Iterator<Item = &'k Arc<SessionHandle>>,
    now_ms: u32,
) -> Option<&'k Arc<SessionHandle>> {
    let idle = sessions.filter_map(|session| Some((idle_ms(session, now_ms)?, session)));
    idle.max_by_key(|(idle, _)| *idle).map(|(_, session)| session)
}

/// Whether a session that keeps its server for these reasons can do without.
pub fn yields(pins: Pins) -> bool {
    !pins.is_empty() && pins.difference(Pins::YIELDING).is_empty()
}
