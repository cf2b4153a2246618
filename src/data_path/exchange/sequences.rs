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
        message::{append, bind, execute, parse},
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
    trials: u8,
    /// Number of texts that may have advanced a sequence; wraps around.
    count: u32,
    /// It has read `currval` or `lastval`, and has not discarded everything since.
    pub(super) reads: bool,
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
    of: i32,
    /// [`SequenceUse::count`] at that session's last text here.
    count: Option<u32>,
    /// The server may remember values of other sessions.
    mixed: bool,
    /// The session has sent no text since the lease began.
    untouched: bool,
    /// The session has sent a text since the last after-transaction check.
    pub stirred: bool,
    /// Number of further transactions that keep the server if none of them reads a value.
    patience: u8,
}

/// A driver may look up the sequence's name in a transaction of its own before it reads the value.
const PATIENCE: u8 = 3;

impl ServerSequences {
    /// A lease begins.
    #[inline]
    pub fn lent_to(&mut self, session: i32) {
        if self.of != session {
            self.mixed |= self.of != 0;
            (self.of, self.count) = (session, None);
        }
        self.untouched = true;
    }

    /// Whether the session has advanced sequences on another server since its last text here.
    #[inline]
    fn is_behind(&self, advances: &SequenceUse) -> bool {
        self.count.is_some_and(|count| count != advances.count)
    }

    /// A transaction with these `new` pins is over. Returns the pins of `before` that still hold.
    pub fn after_transaction(&mut self, before: Pins, news: Pins) -> Pins {
        self.stirred = false;
        if news.contains(Pins::SEQUENCE_WRITTEN) {
            self.patience = PATIENCE;
        } else if news.contains(Pins::SEQUENCE) {
            self.patience = 0;
        } else {
            self.patience = self.patience.saturating_sub(1);
        }
        if self.patience == 0 { before.difference(Pins::SEQUENCE_WRITTEN) } else { before }
    }
}

impl ServerSide {
    /// A lease begins: if the server may remember other sessions' values, they are discarded before the
    /// client's first batch.
    #[inline]
    pub(super) fn part_sequences_first(
        &mut self,
        advances: &SequenceUse,
        rules: &SessionRules,
        out: &mut Outgoing<'_>,
    ) {
        let here = &mut self.sequences;
        if !here.untouched || !rules.follow {
            return;
        }
        here.mixed |= here.is_behind(advances);
        if here.mixed && rules.functions.are_sequences_read() {
            here.count = Some(advances.count);
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
        self.sequences.mixed = false;
        parse(b"", b"DISCARD SEQUENCES", out);
        bind(b"", &[], out);
        execute(out);
        if origin == Origin::TryPrepare {
            let _ = self.replies.track(Request::Sync, Origin::Proxy);
            append(out, b'S', |_| {});
        }
    }
}

impl ClientMessages<'_, '_> {
    /// Called after a text's effects are recorded, before it is sent. It may be the tenant's first that reads
    /// a sequence. `alone`: it is a simple query.
    #[inline(always)]
    pub(super) fn part_sequences(&mut self, alone: bool) {
        self.server.sequences.stirred = true;
        let first = std::mem::take(&mut self.server.sequences.untouched);
        if first && self.server.sequences.mixed && self.rules.functions.are_sequences_read() {
            let apart = alone && !self.server.replies.is_unsynced();
            let origin = if apart { Origin::TryPrepare } else { Origin::Prepare };
            self.server.discard_sequences(origin, self.out.build());
        }
    }
}

/// Records whether a text reads or may advance a sequence.
#[inline]
pub(super) fn note_sequences(
    side_effects: &SideEffects,
    advances: &mut SequenceUse,
    rules: &SessionRules,
    server: &mut ServerSide,
) {
    let here = &mut server.sequences;
    // The session's own values here are outdated if it has advanced sequences elsewhere.
    here.mixed |= here.untouched && here.is_behind(advances);
    advances.count = advances.count.wrapping_add(u32::from(side_effects.advances_sequence));
    here.count = Some(advances.count);
    if side_effects.pins.contains(Pins::SEQUENCE) {
        rules.functions.record_sequence_read();
        advances.reads = true;
    }
    if side_effects.advances_sequence && !server.checks.pins(false).contains(Pins::SEQUENCE_WRITTEN) {
        let read = rules.functions.are_sequences_read();
        if read || advances.trials > 0 {
            advances.trials = if read { TRIALS } else { advances.trials - 1 };
            let reads = if advances.reads { Pins::SEQUENCE } else { Pins::empty() };
            let written = SideEffects { pins: Pins::SEQUENCE_WRITTEN.union(reads), ..SideEffects::default() };
            server.checks.note(&written, false);
        }
    }
}
