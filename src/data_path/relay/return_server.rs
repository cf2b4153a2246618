//! The session returns its server to the pool: after a transaction that has left nothing in it, and earlier or
//! later where the session is pinned and another one waits.

use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::{
    Relay, Step, acquire_server::ReplyWait, load_functions::load_then_give_back, session_end::SessionEnd,
};
use crate::data_path::{
    exchange::unread_request::before_shutdown,
    pool::{
        PooledServer,
        pinned_sessions::{Reclaim, can_return},
    },
    session_state::pins::Pins,
    sessions::registry::Activity,
};

impl Relay {
    /// The one place where a server goes back: a ReadyForQuery is sent, or a cancel is complete.
    #[inline]
    pub(super) fn after_reply(&mut self, now: Instant) -> Option<Step> {
        let server = self.server.as_mut()?;
        if !server.side.replies.is_over() || !server.is_between_messages() || self.cancelling.is_some() {
            if !server.side.replies.is_working() {
                self.session.handle.set_doing(Activity::InTransaction, self.pool.clock.now_ms());
            }
            return None;
        }
        self.request_began = None;
        let follows = self.session.side.follows();
        if server.side.has_pending_checks(follows) {
            return Some(Step::AfterTransaction);
        }
        if let Some(began) = self.transaction_began.take() {
            self.session.traffic.transactions += 1;
            let stats = &self.pool.stats;
            stats.transactions.fetch_add(1, Ordering::Relaxed);
            stats.transaction_time.record(now.saturating_duration_since(began));
            stats.count_statements(std::mem::take(&mut server.side.statements.counts));
        }
        if server.side.is_pinned(follows) {
            if let Some(step) = self.idle_with_server(follows) {
                return Some(step);
            }
        } else {
            self.give_back();
        }
        self.session.leaving.take().map(|reason| Step::End(SessionEnd::Refused(reason)))
    }

    pub(super) fn give_back(&mut self) {
        let Some(server) = self.server.take() else { return };
        self.session.side.custom.insert(server.side.custom.by_session);
        self.session.handle.server_process_id.store(0, Ordering::Relaxed);
        self.session.handle.set_doing(Activity::Idle, self.pool.clock.now_ms());
        self.session.handle.set_prepared(self.session.side.statements.len());
        // The beginning of the client's next message waits in the inbox for the next server.
        self.session.side.take_held(&mut self.session.inbox);
        match std::mem::take(&mut self.loads_functions) {
            true => load_then_give_back(server, &self.pool),
            false => self.pool.give_back(server),
        }
    }

    /// Another session waits for a server. This one returns its pinned server, if it is between two
    /// transactions and pinned for values of sequences only; `currval` then fails (`exchange/sequences.rs`).
    #[cold]
    pub(super) fn return_pinned_server(&mut self) -> Option<Step> {
        let server = self.server.as_mut()?;
        let free = server.side.replies.is_over() && self.held_reply.is_empty();
        if !free || !self.session.side.follows() || !can_return(server.side.replies.pins()) {
            return None;
        }
        if server.side.replies.pins().contains(Pins::UNSTORED_UNNAMED) {
            self.session.side.statements.forget_unnamed();
        }
        self.set_pins(Pins::empty());
        self.after_reply(Instant::now())
    }

    /// The server has ended between two transactions of a session that kept it only for values of sequences: the session
    /// goes on, as if it had returned it. `false`: the session ends with its server.
    #[cold]
    pub(super) fn goes_on_without_server(&mut self) -> bool {
        let is_done = self.is_done_with_server();
        if is_done {
            drop(self.abandon_server());
            self.session.handle.set_doing(Activity::Idle, self.pool.clock.now_ms());
        }
        is_done
    }

    /// Whether the session is between two transactions and has nothing on its server but values of sequences.
    fn is_done_with_server(&self) -> bool {
        let Some(server) = self.server.as_ref() else { return false };
        let is_idle =
            server.side.replies.is_over() && self.held_reply.is_empty() && self.cancelling.is_none();
        is_idle && Pins::SEQUENCES.contains(server.side.replies.pins()) && self.session.side.follows()
    }

    /// The server has said its last words, the last `length` of these bytes. If they come behind the end of a reply, they
    /// do not concern the session: returns the reply, and the server is not lent again. `None`: the session ends with it.
    #[cold]
    pub(super) fn reply_before_shutdown<'b>(&mut self, bytes: &'b [u8], length: usize) -> Option<&'b [u8]> {
        let reply = before_shutdown(bytes, length).filter(|_| self.is_done_with_server())?;
        self.server.as_mut()?.has_ended = true;
        Some(reply)
    }

    /// The session goes on without its server, which has ended.
    pub(super) fn abandon_server(&mut self) -> Option<Box<PooledServer>> {
        self.set_pins(Pins::empty());
        let server = self.server.take()?;
        self.session.side.custom.insert(server.side.custom.by_session);
        self.session.handle.server_process_id.store(0, Ordering::Relaxed);
        (self.transaction_began, self.request_began) = (None, None);
        self.reply_wait = ReplyWait::Nothing;
        Some(server)
    }

    /// The session is between two transactions and keeps its server, unless a waiting session reclaims it.
    pub(super) fn idle_with_server(&mut self, follows: bool) -> Option<Step> {
        self.session.handle.set_doing(Activity::Pinned, self.pool.clock.now_ms());
        if self.session.handle.is_notified() {
            self.send_notifications();
        }
        if follows && self.pool.waiting() > 0 { self.offer_server() } else { None }
    }

    #[cold]
    fn offer_server(&mut self) -> Option<Step> {
        let pins = self.server.as_ref()?.side.replies.pins();
        match self.pool.reclaims(&self.session.handle, pins) {
            Reclaim::Nothing => None,
            Reclaim::Server => self.return_pinned_server(),
            Reclaim::Session(reason) => Some(reason.into()),
        }
    }
}
