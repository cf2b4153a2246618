//! A text that chooses the tenant, on its way to a server: it waits, or is refused.

use std::ops::ControlFlow;

use super::{
    bringing::Hold,
    client_side::violation,
    requests::{GOES_ON, Requests},
};
use crate::{
    data_path::{
        aftermath::Aftermath,
        choice::Talk,
        lease::{Asked, Whose},
    },
    error::{NoChoice, Objection, Refusal},
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::{append, append_cstr, parse},
    },
};

/// What no server takes for a statement.
const UNREADABLE: &[u8] = b"pglobby.tenant";

/// Whether a text may be about the tenant at all. An employee's session in session mode pays this much for each.
#[inline]
pub(super) fn names_choice(bytes: &[u8]) -> bool {
    const NAME: &[u8] = b"pglobby";
    bytes.windows(NAME.len()).any(|window| window.eq_ignore_ascii_case(NAME))
}

impl Requests<'_, '_> {
    /// A text that chooses the tenant. It waits where nothing else of its transaction has gone to the server; elsewhere the
    /// server is made to refuse it, so that what comes behind it fails with it as with any other error.
    #[cold]
    pub(super) fn choice(&mut self, tag: u8) -> ControlFlow<Hold> {
        let lease = &self.server.lease;
        if !self.rules.chooses {
            self.deny(tag, NoChoice::Employee);
        } else if lease.is_unsynced() || lease.takes_copy_data() {
            self.deny(tag, NoChoice::TransactionBegun);
        } else {
            return ControlFlow::Break(Hold::Choice);
        }
        ControlFlow::Continue(())
    }

    /// In place of a message the server gets one that it cannot read, and its error goes to the client in words of ours.
    #[cold]
    pub(super) fn deny(&mut self, tag: u8, reason: NoChoice) {
        let objection = Objection::NoChoice(reason);
        if self.server.lease.takes_copy_data() {
            // Whatever it is: the COPY fails of it.
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else if tag == b'Q' {
            self.end_unnamed();
            let _ = self.server.lease.ask(Asked::Query(None), Whose::Denied(objection));
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else {
            self.server.statements.doubt_unnamed();
            let _ = self.server.lease.ask(Asked::Parse(None), Whose::Denied(objection));
            parse(b"", UNREADABLE, self.out.build());
        }
    }

    /// A session that keeps its server: read along for one thing only, and of an employee's only where it is named.
    pub(super) fn in_session_mode(&mut self, tag: u8, bytes: &[u8]) -> Result<ControlFlow<Hold>, Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if tag == b'P' {
            cstr(&mut body).map_err(violation)?;
        }
        let talk = cstr(&mut body).map(|sql| Aftermath::read(sql, self.server.lexing()).talk);
        if matches!(talk, Ok(Talk::Resets)) {
            self.server.uncertain.note_reset();
        }
        match (tag, talk) {
            (b'Q', Ok(Talk::Chooses)) => return Ok(self.choice(tag)),
            (_, Ok(Talk::Chooses)) if !self.rules.chooses => self.deny(tag, NoChoice::Employee),
            (_, Ok(Talk::Chooses)) => self.deny(tag, NoChoice::SessionMode),
            (b'Q', _) => {
                self.end_unnamed();
                self.ask(Asked::Query(None));
                self.out.pass(bytes);
            }
            _ => {
                self.ask(Asked::Parse(None));
                self.out.pass(bytes);
            }
        }
        GOES_ON
    }

    /// A Bind whose rest is yet to come is too long to name a tenant, and cannot be taken back.
    #[cold]
    pub(super) fn choice_bound(&mut self, whole: bool) -> Result<ControlFlow<Hold>, Refusal> {
        if whole { Ok(self.choice(b'B')) } else { Err(NoChoice::NotAlone.into()) }
    }
}
