//! What `currval` and `lastval` tell: never what another session did.
//!
//! A server remembers the sequences that whoever used it has advanced. Nobody minds as long as no client of the tenant reads
//! `currval` or `lastval`; from the first one on, a server that comes from another session forgets them first, in front
//! of the client's own request, and a session that has written keeps its server for its next transactions. So that the
//! first one finds its value as well, every session does so the first few times.

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

/// So many transactions of a session that may have advanced a sequence are followed by others on the same server, though no
/// client of its tenant has read `currval` or `lastval`: drivers that ask what they have inserted do so from the first
/// INSERT on.
const TRIALS: u8 = 8;

/// What a session has done with sequences.
#[derive(Debug, Clone, Copy)]
pub struct SequenceUse {
    /// How often it still keeps its server for a `currval` that nobody has been seen to ask for.
    trials: u8,
    /// Counts the texts that may have advanced one.
    count: u32,
    /// It has asked for `currval` or `lastval`, and not discarded everything since.
    pub(super) reads: bool,
}

impl Default for SequenceUse {
    fn default() -> Self {
        Self { trials: TRIALS, count: 0, reads: false }
    }
}

/// Whose values a server remembers.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServerSequences {
    /// The session that holds it, or held it last; 0: nobody.
    of: i32,
    /// [`Advances::count`] when that session was last here.
    count: Option<u32>,
    /// There may be others' among them.
    mixed: bool,
    /// The session has asked for nothing yet since it was lent.
    untouched: bool,
    /// It has, since its last transaction was settled.
    pub stirred: bool,
    /// So many more transactions it is kept for, if none of them reads what was written before.
    patience: u8,
}

/// Drivers look up what a sequence is called, perhaps, before they ask for its value.
const PATIENCE: u8 = 3;

impl ServerSequences {
    /// The server is lent to that session.
    #[inline]
    pub fn lent_to(&mut self, session: i32) {
        if self.of != session {
            self.mixed |= self.of != 0;
            (self.of, self.count) = (session, None);
        }
        self.untouched = true;
    }

    /// The session has advanced others elsewhere since it was last here.
    #[inline]
    fn is_behind(&self, advances: &SequenceUse) -> bool {
        self.count.is_some_and(|count| count != advances.count)
    }

    /// A transaction is over that has left `news`: those of the pins `before` it that still hold.
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
    /// A session begins to use it: what others have left is forgotten in front of all that it asks, while no batch is under way.
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

    /// `whose`: [`Whose::Attempt`] in a batch of its own, which would end one that is under way, or [`Whose::Follow`] within one.
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
    /// A text goes to the server, and has been noted: the first of its tenant, perhaps, that reads sequences. `alone`: it is a simple
    /// query.
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

/// Takes down that a text reads sequences, or may advance one.
#[inline]
pub(super) fn note_sequences(
    side_effects: &SideEffects,
    advances: &mut SequenceUse,
    rules: &SessionRules,
    server: &mut ServerSide,
) {
    let here = &mut server.sequences;
    // Its own values, too, are not the last ones if it has been elsewhere since.
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
