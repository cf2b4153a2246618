//! `currval` and `lastval` never show the values of another session.
//!
//! A server remembers the sequences that were advanced on it. This matters only once a client of the tenant
//! reads `currval` or `lastval`. From then on, a server that comes from another session gets DISCARD
//! SEQUENCES before the client's request, and a session that has advanced a sequence keeps its server for its
//! next transactions. A session's first few transactions keep the server in any case, so that the tenant's
//! first `currval` finds its value.

use super::{
    client_messages::ClientMessages,
    client_side::SessionRules,
    pending_replies::{Origin, Request},
    server_side::ServerSide,
};
use crate::{
    data_path::session_state::{pins::Pins, side_effects::SideEffects},
    wire::{
        message::{bind, execute, parse},
        outgoing::Outgoing,
    },
};

/// Number of transactions of a session that keep the server for a `currval` although no client of the tenant
/// has read one. A driver that reads inserted keys does so from the first INSERT on.
const TRIALS: u8 = 8;

/// A session's use of sequences.
#[derive(Debug, Clone, Copy)]
pub struct SequenceUse {
    /// Remaining transactions that keep the server although `currval` has not been read.
    pub(super) trials: u8,
    /// Number of texts that may have advanced a sequence; wraps around.
    count: u32,
    /// It has read `currval` or `lastval`, and has not discarded everything since.
    pub(super) reads: bool,
}

impl SequenceUse {
    /// Of a session that has come from another process. No server here remembers a value of it.
    pub(super) fn arrived(trials: u8, reads: bool) -> Self {
        Self { trials, reads, count: 0 }
    }
}

impl Default for SequenceUse {
    fn default() -> Self {
        Self { trials: TRIALS, count: 0, reads: false }
    }
}

/// The session whose sequence values a server remembers.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServerSequences {
    /// The session that holds the server or held it last; 0: none.
    session: i32,
    /// [`SequenceUse::count`] at that session's last text here.
    count: Option<u32>,
    /// The server may remember values of other sessions.
    has_foreign_values: bool,
    /// The session has sent no text since the lease began.
    is_unused: bool,
    /// The session has sent a text since the last after-transaction check.
    pub has_sent_text: bool,
    /// Number of further transactions that keep the server if none of them reads a value.
    transactions_left: u8,
}

/// A driver may look up the sequence's name in a transaction of its own before it reads the value.
const PINNED_TRANSACTIONS: u8 = 3;

impl ServerSequences {
    /// A lease begins.
    #[inline]
    pub fn lent_to(&mut self, session: i32) {
        if self.session != session {
            self.has_foreign_values |= self.session != 0;
            (self.session, self.count) = (session, None);
        }
        self.is_unused = true;
    }

    /// Whether the session has advanced sequences on another server since its last text here.
    #[inline]
    fn is_behind(&self, sequence_use: &SequenceUse) -> bool {
        self.count.is_some_and(|count| count != sequence_use.count)
    }

    /// A transaction with these `new` pins is over. Returns the pins of `before` that still hold.
    pub fn after_transaction(&mut self, before: Pins, new: Pins) -> Pins {
        self.has_sent_text = false;
        if new.contains(Pins::SEQUENCE_WRITTEN) {
            self.transactions_left = PINNED_TRANSACTIONS;
        } else if new.contains(Pins::SEQUENCE) {
            self.transactions_left = 0;
        } else {
            self.transactions_left = self.transactions_left.saturating_sub(1);
        }
        if self.transactions_left == 0 { before.difference(Pins::SEQUENCE_WRITTEN) } else { before }
    }
}

impl ServerSide {
    /// A lease begins: other sessions' values are discarded before the client's first batch.
    #[inline]
    pub(super) fn discard_sequences_at_lease_start(
        &mut self,
        sequence_use: &SequenceUse,
        rules: &SessionRules,
        out: &mut Outgoing<'_>,
    ) {
        let sequences = &mut self.sequences;
        if !sequences.is_unused || !rules.follow {
            return;
        }
        sequences.has_foreign_values |= sequences.is_behind(sequence_use);
        if sequences.has_foreign_values && rules.functions.are_sequences_read() {
            sequences.count = Some(sequence_use.count);
            self.discard_sequences(Origin::TryPrepare, out.build());
        }
    }

    /// `origin`: [`Origin::TryPrepare`] sends a batch of its own, which would end an open one;
    /// [`Origin::Prepare`] stays within the open batch.
    #[cold]
    fn discard_sequences(&mut self, origin: Origin, out: &mut Vec<u8>) {
        if !self.replies.track(Request::Parse(None), origin) {
            return;
        }
        let _ = self.replies.track(Request::Bind, origin);
        let _ = self.replies.track(Request::Execute(None), origin);
        self.statements.set_unnamed_unknown();
        self.sequences.has_foreign_values = false;
        parse(b"", b"DISCARD SEQUENCES", out);
        bind(b"", &[], out);
        execute(out);
        if origin == Origin::TryPrepare {
            self.replies.end_own_batch(out);
        }
    }
}

impl ClientMessages<'_, '_> {
    /// Called after a text's effects are recorded, before it is sent. It may be the tenant's first that reads
    /// a sequence. `alone`: it is a simple query.
    #[inline(always)]
    pub(super) fn discard_sequences_before_text(&mut self, alone: bool) {
        self.server.sequences.has_sent_text = true;
        let first = std::mem::take(&mut self.server.sequences.is_unused);
        if first && self.server.sequences.has_foreign_values && self.rules.functions.are_sequences_read() {
            let apart = alone && self.server.replies.admits_own_batch();
            let origin = if apart { Origin::TryPrepare } else { Origin::Prepare };
            self.server.discard_sequences(origin, self.out.build());
        }
    }
}

/// Records whether a text reads or may advance a sequence.
#[inline]
pub(super) fn record_sequences(
    side_effects: &SideEffects,
    sequence_use: &mut SequenceUse,
    rules: &SessionRules,
    server: &mut ServerSide,
) {
    let sequences = &mut server.sequences;
    // The session's own values here are outdated if it has advanced sequences elsewhere.
    sequences.has_foreign_values |= sequences.is_unused && sequences.is_behind(sequence_use);
    sequence_use.count = sequence_use.count.wrapping_add(u32::from(side_effects.advances_sequence));
    sequences.count = Some(sequence_use.count);
    if side_effects.pins.contains(Pins::SEQUENCE) {
        rules.functions.record_sequence_read();
        sequence_use.reads = true;
    }
    if side_effects.advances_sequence && !server.checks.pins(false).contains(Pins::SEQUENCE_WRITTEN) {
        let are_read = rules.functions.are_sequences_read();
        if are_read || sequence_use.trials > 0 {
            sequence_use.trials = if are_read { TRIALS } else { sequence_use.trials - 1 };
            let reads = if sequence_use.reads { Pins::SEQUENCE } else { Pins::empty() };
            let written = SideEffects { pins: Pins::SEQUENCE_WRITTEN.union(reads), ..SideEffects::default() };
            server.checks.record(&written, false);
        }
    }
}
