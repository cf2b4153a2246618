//! When a session's request and its transaction began.

use std::time::{Duration, Instant};

/// The clock of one session at a pool.
#[derive(Debug, Default)]
pub(super) struct Timing {
    transaction_began: Option<Instant>,
    request_began: Option<Instant>,
}

impl Timing {
    /// Whether the server works on a request, so that the clock need not be read for what is pipelined behind
    /// it.
    #[inline]
    pub fn is_running(&self) -> bool {
        self.request_began.is_some()
    }

    /// A request goes to the server. Returns whether a transaction begins with it.
    #[inline]
    pub fn request_begins(&mut self, now: Instant) -> bool {
        self.request_began = Some(now);
        let begins = self.transaction_began.is_none();
        if begins {
            self.transaction_began = Some(now);
        }
        begins
    }

    /// A request is answered; `working`: the server goes on with another. Returns how long it took.
    #[inline]
    pub fn request_answered(&mut self, now: Instant, working: bool) -> Option<Duration> {
        let began = self.request_began.take();
        self.request_began = working.then_some(now);
        began.map(|began| now - began)
    }

    /// Nothing is pending any more.
    #[inline]
    pub fn requests_are_over(&mut self) {
        self.request_began = None;
    }

    /// The transaction is over. Returns how long it took; `None`: there was none.
    #[inline]
    pub fn transaction_ends(&mut self, now: Instant) -> Option<Duration> {
        self.transaction_began.take().map(|began| now.saturating_duration_since(began))
    }
}
