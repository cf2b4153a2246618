//! What `currval` and `lastval` tell: never what another session did.
//!
//! A server remembers the sequences that whoever used it has advanced. Nobody minds as long as no client of the tenant reads
//! `currval` or `lastval`; from the first one on, a server that comes from another session forgets them first, in front
//! of the client's own request, and a session that has written keeps its server for its next transaction.

use super::requests::Requests;
use crate::{
    data_path::{
        aftermath::Aftermath,
        catalogue::words,
        lease::{Asked, Whose},
        pins::Pins,
    },
    wire::message::{append, append_cstr},
};

/// Whose values a server remembers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sequences {
    /// The session that holds it, or held it last; 0: nobody.
    of: i32,
    /// There may be others' among them.
    mixed: bool,
    /// The session has asked for nothing yet since it was lent.
    untouched: bool,
    /// It has, since its last transaction was settled.
    pub stirred: bool,
}

impl Sequences {
    /// The server is lent to that session.
    #[inline]
    pub fn lent_to(&mut self, session: i32) {
        self.mixed |= self.of != session && self.of != 0;
        self.of = session;
        self.untouched = true;
    }
}

impl Requests<'_, '_> {
    /// A text goes to the server; `reads` currval or lastval, perhaps. `alone`: it is a simple query.
    #[inline]
    pub(super) fn part_sequences(&mut self, reads: bool, text: &[u8], alone: bool) {
        self.server.sequences.stirred = true;
        if reads {
            self.rules.catalogue.sequence_is_read();
        }
        let first = std::mem::take(&mut self.server.sequences.untouched);
        if self.rules.catalogue.are_sequences_read() {
            if first && self.server.sequences.mixed {
                self.discard_sequences(alone);
            }
            if writes(text) {
                let written = Aftermath { pins: Pins::SEQUENCE_WRITTEN, ..Aftermath::default() };
                self.server.uncertain.note(&written, false);
            }
        }
    }

    /// The same where the text is the client's unnamed statement.
    #[inline]
    pub(super) fn part_sequences_of_unnamed(&mut self, reads: bool) {
        if reads || self.rules.catalogue.are_sequences_read() {
            let body = self.statements.unnamed_body().unwrap_or_default().to_vec();
            self.part_sequences(reads, &body, false);
        } else {
            self.part_sequences(false, b"", false);
        }
    }

    #[cold]
    fn discard_sequences(&mut self, alone: bool) {
        let whose = if alone { Whose::Attempt } else { Whose::Follow };
        let lease = &mut self.server.lease;
        if !lease.ask(Asked::Parse(None), whose) {
            return;
        }
        let _ = lease.ask(Asked::Bind, whose);
        let _ = lease.ask(Asked::Execute(None), whose);
        self.server.statements.doubt_unnamed();
        self.server.sequences.mixed = false;
        let out = self.out.build();
        append(out, b'P', |out| {
            append_cstr(out, b"");
            append_cstr(out, b"DISCARD SEQUENCES");
            out.extend_from_slice(&[0, 0]);
        });
        append(out, b'B', |out| out.extend_from_slice(&[0; 8]));
        append(out, b'E', |out| out.extend_from_slice(&[0; 5]));
        if alone {
            let _ = self.server.lease.ask(Asked::Sync, Whose::Ours);
            append(out, b'S', |_| {});
        }
    }
}

/// Whether a text may advance a sequence, by a default perhaps.
fn writes(text: &[u8]) -> bool {
    const WRITES: [&[u8]; 8] =
        [b"insert", b"merge", b"copy", b"nextval", b"setval", b"execute", b"call", b"do"];
    words(text).any(|word| WRITES.iter().any(|write| word.eq_ignore_ascii_case(write)))
}
