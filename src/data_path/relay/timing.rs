//! When a session's request and its transaction began, and what the session has done so far.

use std::time::{Duration, Instant};

/// What a session has done, for the line that its end leaves in the log.
#[derive(Debug, Clone, Copy, Default)]
pub struct Traffic {
    /// Transactions that servers have run for it.
    pub transactions: u64,
    /// Bytes from its client.
    pub bytes_in: u64,
    /// Bytes to its client.
    pub bytes_out: u64,
}

/// The clock of one session at a pool.
#[derive(Debug, Default)]
pub(super) struct Timing {
    transaction_began: Option<Instant>,
    request_began: Option<Instant>,
    pub traffic: Traffic,
}

impl Timing {
    /// Of a session that has done this before.
    pub fn new(traffic: Traffic) -> Self {
        Self { traffic, ..Self::default() }
    }

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
        let began = self.transaction_began.take()?;
        self.traffic.transactions += 1;
        Some(now.saturating_duration_since(began))
    }
}
