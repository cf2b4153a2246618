//! Whether the client still needs the server it borrowed, and why. Pure: reads tags, touches no socket.
//!
//! ```text
//!           request                    ReadyForQuery I, nothing owed, nothing unsynced
//! (given) ──────────▶ Working ───────────────────────────────────────────────────────▶ over
//!                      ▲    │
//!              request │    └─ReadyForQuery T or E──▶ InTransaction ──┐
//!                      └──────────────────────────────────────────────┘
//! ```
//!
//! The lease lives with the server, so that an idle client owns none. Every request that went to the server leaves an
//! [`Owed`] reply here, in order; every reply must match the oldest one. Whatever does not match is a [`Desync`], and
//! ends both connections: nobody may ever see the remains.
//!
//! Source: PostgreSQL documentation, "Message Flow" (extended query, error recovery, COPY), "Pipelining".

use std::{collections::VecDeque, sync::Arc};

pub use super::pins::Pins;
use super::{deeds::Deeds, prepared::Statement};

/// On whose behalf a request went to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The client asked: it gets the reply.
    Client,
    /// Put in so that the client's next request works on this server: success is left out, an error is the client's.
    Follow,
    /// Put in for the client's next request, in a batch of its own: success and error are left out.
    Attempt,
    /// Our own bookkeeping: the reply is left out, and an error ends both connections.
    Ours,
}

impl Whose {
    /// Whether it belongs to what the client asked, and fails with it.
    pub fn is_for_client(self) -> bool {
        matches!(self, Self::Client | Self::Follow)
    }
}

/// What was asked, as far as its reply or failure matters.
#[derive(Debug, Clone)]
pub enum Asked {
    /// Parse; for a named statement what to take back if it fails.
    Parse(Option<Box<Naming>>),
    /// Bind.
    Bind,
    /// Describe.
    Describe,
    /// Execute; with what the portal's PREPARE or DEALLOCATE does.
    Execute(Option<Box<Deeds>>),
    /// Close; of a named statement what to restore if it is skipped.
    Close(Option<Box<Naming>>),
    /// Sync.
    Sync,
    /// A simple query; with what it does by PREPARE and DEALLOCATE.
    Query(Option<Box<Deeds>>),
    /// FunctionCall.
    FunctionCall,
    /// CopyDone or CopyFail sent before the server has said that it takes data. Gets no reply: it marks which Syncs the
    /// server takes for part of the data.
    CopyEnd,
}

/// A statement that got, or lost, its name by a request that may yet be skipped.
#[derive(Debug, Clone)]
pub struct Naming {
    /// The client's name for it; `None` where only the server's knowledge changed.
    pub client_name: Option<Box<[u8]>>,
    /// The statement.
    pub statement: Arc<Statement>,
}

/// A reply the server owes.
#[derive(Debug, Clone)]
pub struct Owed {
    /// To which request.
    pub asked: Asked,
    /// For whom.
    pub whose: Whose,
}

/// The server said something that nobody asked for. Both connections end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an unexpected {:?} message", *.0 as char)]
pub struct Desync(pub u8);

/// COPY FROM STDIN: who may be sending data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum CopyIn {
    #[default]
    None,
    /// The server takes data, and ignores Sync and Flush until the client says it is done.
    Taking,
}

/// What became of a reply.
#[derive(Debug)]
pub struct Settled {
    /// Whether the client gets it.
    pub pass: bool,
    /// The request that this reply completed.
    pub done: Option<Asked>,
}

/// One session's hold on one server.
#[derive(Debug)]
pub struct Lease {
    owed: VecDeque<Owed>,
    /// As the last ReadyForQuery said: `I`, `T` or `E`.
    status: u8,
    /// The client has sent extended-protocol messages and no Sync yet.
    unsynced: bool,
    /// An error came and the server ignores everything until a Sync that the client has yet to send.
    skipping: bool,
    copy_in: CopyIn,
    /// Counts the client's Syncs: what an earlier batch was to prepare is not certain until it is confirmed.
    batch: u32,
    /// Why the server stays after the transaction.
    pub pins: Pins,
}

impl Default for Lease {
    fn default() -> Self {
        Self {
            owed: VecDeque::new(),
            status: b'I',
            unsynced: false,
            skipping: false,
            copy_in: CopyIn::None,
            batch: 0,
            pins: Pins::default(),
        }
    }
}

impl Lease {
    /// A request goes to the server; `false` if the server will ignore it, because it skips to the next Sync.
    #[inline]
    #[must_use = "a request that the server ignores has no effect"]
    pub fn ask(&mut self, asked: Asked, whose: Whose) -> bool {
        match asked {
            Asked::Sync if self.copy_in == CopyIn::Taking && whose == Whose::Client => return true,
            Asked::Sync => {
                self.batch = self.batch.wrapping_add(1);
                self.skipping = false;
                self.unsynced &= whose != Whose::Client;
            }
            _ if self.skipping => return false,
            Asked::Query(_) | Asked::FunctionCall => self.unsynced = false,
            _ => self.unsynced |= whose.is_for_client(),
        }
        self.owed.push_back(Owed { asked, whose });
        true
    }

    /// The client's COPY data ends: CopyDone or CopyFail goes to the server. Perhaps before the server has said that it
    /// takes data.
    pub fn copy_done(&mut self) {
        let marked = matches!(self.owed.back(), None | Some(Owed { asked: Asked::CopyEnd, .. }));
        if self.copy_in == CopyIn::None && !marked {
            self.owed.push_back(Owed { asked: Asked::CopyEnd, whose: Whose::Client });
        }
        self.copy_in = CopyIn::None;
    }

    /// The oldest reply is in.
    #[inline]
    fn settle_front(&mut self) -> Option<Owed> {
        let settled = self.owed.pop_front();
        self.skip_copy_end();
        settled
    }

    /// No COPY was waiting for this end.
    #[inline]
    fn skip_copy_end(&mut self) {
        while let Some(Owed { asked: Asked::CopyEnd, .. }) = self.owed.front() {
            self.owed.pop_front();
        }
    }

    /// For whom the message that comes now is; `None` when nothing is owed.
    #[inline]
    pub fn whose(&self) -> Option<Whose> {
        self.owed.front().map(|owed| owed.whose)
    }

    /// What the simple query or Execute that is being answered does to the client's statements.
    pub fn deeds(&mut self) -> Option<&mut Option<Box<Deeds>>> {
        match self.owed.front_mut() {
            Some(Owed { asked: Asked::Query(deeds) | Asked::Execute(deeds), .. }) => Some(deeds),
            _ => None,
        }
    }

    /// The client's name for the statement that the Parse being answered makes.
    pub fn client_name(&self) -> Option<&Naming> {
        match self.owed.front() {
            Some(Owed { asked: Asked::Parse(Some(naming)), .. }) => Some(naming),
            _ => None,
        }
    }

    /// A reply other than ErrorResponse and ReadyForQuery has arrived.
    ///
    /// # Errors
    /// [`Desync`] if it answers nothing that was asked.
    #[inline]
    pub fn reply(&mut self, tag: u8) -> Result<Settled, Desync> {
        let Some(front) = self.owed.front() else {
            return Err(Desync(tag));
        };
        let completes = match (tag, &front.asked) {
            (b'1', Asked::Parse(_)) | (b'2', Asked::Bind) | (b'3', Asked::Close(_)) => true,
            (b'T' | b'n', Asked::Describe) => true,
            (b'C' | b'I' | b's', Asked::Execute(_)) => true,
            (b't', Asked::Describe) => false,
            (b'T' | b'C' | b'I', Asked::Query(_)) | (b'V', Asked::FunctionCall) => false,
            (b'D' | b'H' | b'd' | b'c', Asked::Execute(_) | Asked::Query(_)) => false,
            (b'G', Asked::Execute(_) | Asked::Query(_)) => {
                self.start_copy_in();
                false
            }
            _ => return Err(Desync(tag)),
        };
        let pass = self.whose() == Some(Whose::Client);
        let done = if completes { self.settle_front().map(|owed| owed.asked) } else { None };
        Ok(Settled { pass, done })
    }

    /// The server takes COPY data now: it ignores every Sync that comes before it hears that the data has ended.
    fn start_copy_in(&mut self) {
        let end = self.owed.iter().position(|owed| matches!(owed.asked, Asked::CopyEnd));
        let behind = end.map(|end| self.owed.split_off(end + 1));
        let before = self.owed.len();
        self.owed.retain(|owed| !matches!(owed.asked, Asked::Sync | Asked::CopyEnd));
        let ignored_syncs = before - self.owed.len() > usize::from(end.is_some());
        match behind {
            Some(mut behind) => self.owed.append(&mut behind),
            None => self.copy_in = CopyIn::Taking,
        }
        self.unsynced |= ignored_syncs && !self.owed.iter().any(|owed| matches!(owed.asked, Asked::Sync));
    }

    /// An ErrorResponse has arrived: hands `skipped`, latest first, every request of the batch that the server will now
    /// skip, and tells for whom the error is.
    ///
    /// # Errors
    /// [`Desync`] if it answers nothing.
    pub fn error(&mut self, mut skipped: impl FnMut(Asked)) -> Result<Whose, Desync> {
        self.copy_in = CopyIn::None;
        let Some(front) = self.owed.front() else {
            return Err(Desync(b'E'));
        };
        let whose = front.whose;
        if matches!(front.asked, Asked::Sync | Asked::Query(_) | Asked::FunctionCall) {
            return Ok(whose);
        }
        let sync = self.owed.iter().position(|owed| matches!(owed.asked, Asked::Sync));
        self.skipping = sync.is_none();
        let end = sync.unwrap_or(self.owed.len());
        for owed in self.owed.drain(..end).rev() {
            skipped(owed.asked);
        }
        self.skip_copy_end();
        Ok(whose)
    }

    /// ReadyForQuery has arrived; `true` if the client gets it.
    ///
    /// # Errors
    /// [`Desync`] if no request of that kind is the oldest one.
    #[inline]
    pub fn ready(&mut self, status: u8) -> Result<bool, Desync> {
        if !matches!(status, b'I' | b'T' | b'E') {
            return Err(Desync(b'Z'));
        }
        match self.settle_front() {
            Some(Owed { asked: Asked::Sync | Asked::Query(_) | Asked::FunctionCall, whose }) => {
                self.status = status;
                self.copy_in = CopyIn::None;
                Ok(whose == Whose::Client)
            }
            _ => Err(Desync(b'Z')),
        }
    }

    /// Nothing is owed, nothing is open: the transaction has ended. Pins are not asked.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.owed.is_empty() && self.status == b'I' && !self.unsynced
    }

    /// A request is being worked on (as opposed to a transaction that idles).
    pub fn is_working(&self) -> bool {
        !self.owed.is_empty()
    }

    /// As the last ReadyForQuery said.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the client has begun a batch that it has not ended by Sync.
    pub fn is_unsynced(&self) -> bool {
        self.unsynced
    }

    /// The number of the batch that the client is sending.
    pub fn batch(&self) -> u32 {
        self.batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(lease: &mut Lease, requests: &str) {
        for request in requests.chars() {
            let asked = match request {
                'P' => Asked::Parse(None),
                'B' => Asked::Bind,
                'D' => Asked::Describe,
                'E' => Asked::Execute(None),
                'C' => Asked::Close(None),
                'S' => Asked::Sync,
                'Q' => Asked::Query(None),
                'F' => Asked::FunctionCall,
                other => panic!("{other}"),
            };
            let _ = lease.ask(asked, Whose::Client);
        }
    }

    fn replies(lease: &mut Lease, tags: &str) -> Result<(), Desync> {
        for tag in tags.bytes() {
            match tag {
                b'Z' => drop(lease.ready(b'I')?),
                b'E' => drop(lease.error(|_| {})?),
                tag => drop(lease.reply(tag)?),
            }
        }
        Ok(())
    }

    #[test]
    fn a_simple_query_needs_the_server_until_ready_for_query() {
        let mut lease = Lease::default();
        asked(&mut lease, "Q");
        replies(&mut lease, "TDDC").unwrap();
        assert!(!lease.is_over());
        replies(&mut lease, "Z").unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn a_transaction_keeps_the_server_between_its_statements() {
        let mut lease = Lease::default();
        asked(&mut lease, "Q");
        replies(&mut lease, "C").unwrap();
        assert!(lease.ready(b'T').unwrap());
        assert!(!lease.is_over() && !lease.is_working());
        asked(&mut lease, "Q");
        replies(&mut lease, "CZ").unwrap();
        assert!(lease.is_over());
    }

    /// pgdog#164: Parse, Describe and Flush without Sync, and the server was given back inside an implicit transaction.
    #[test]
    fn a_batch_without_sync_keeps_the_server_although_every_reply_is_in() {
        let mut lease = Lease::default();
        asked(&mut lease, "PD");
        replies(&mut lease, "1tT").unwrap();
        assert!(!lease.is_over());
        asked(&mut lease, "S");
        replies(&mut lease, "Z").unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn an_error_skips_to_the_sync_of_its_own_batch_only() {
        let mut lease = Lease::default();
        asked(&mut lease, "PBDESPBES");
        replies(&mut lease, "1E").unwrap();
        assert!(!lease.is_over());
        replies(&mut lease, "Z12CZ").unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn what_is_sent_behind_an_error_without_sync_is_ignored_until_the_sync() {
        let mut lease = Lease::default();
        asked(&mut lease, "P");
        replies(&mut lease, "E").unwrap();
        assert!(!lease.ask(Asked::Bind, Whose::Client));
        assert!(!lease.ask(Asked::Query(None), Whose::Client), "a simple query is skipped as well");
        asked(&mut lease, "S");
        replies(&mut lease, "Z").unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn an_error_of_a_simple_query_behind_a_batch_skips_nothing_of_the_query() {
        let mut lease = Lease::default();
        asked(&mut lease, "QQ");
        replies(&mut lease, "EZCZ").unwrap();
        assert!(lease.is_over());
    }

    /// libpq sends Sync with the COPY's Execute already; the server ignores it while it takes data.
    #[test]
    fn a_sync_sent_before_copy_data_is_not_answered() {
        let mut lease = Lease::default();
        asked(&mut lease, "PBES");
        replies(&mut lease, "12G").unwrap();
        assert!(!lease.is_over());
        lease.copy_done();
        asked(&mut lease, "S");
        replies(&mut lease, "CZ").unwrap();
        assert!(lease.is_over());
    }

    /// The whole COPY in one write: the Sync behind CopyDone is answered, the one before it is not.
    #[test]
    fn a_copy_that_is_sent_at_once_ends_with_the_sync_behind_its_data() {
        let mut lease = Lease::default();
        asked(&mut lease, "PBES");
        lease.copy_done();
        asked(&mut lease, "SQ");
        replies(&mut lease, "12GCZ").unwrap();
        assert!(!lease.is_over());
        replies(&mut lease, "TCZ").unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn an_end_of_copy_data_that_nobody_waits_for_is_nothing() {
        let mut lease = Lease::default();
        lease.copy_done();
        assert!(lease.is_over());
        asked(&mut lease, "Q");
        lease.copy_done();
        asked(&mut lease, "PBES");
        lease.copy_done();
        replies(&mut lease, "EZ12CZ").unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn copy_data_that_fails_half_way_ends_with_the_sync_behind_it() {
        let mut lease = Lease::default();
        asked(&mut lease, "PBES");
        replies(&mut lease, "12GE").unwrap();
        assert!(!lease.is_over(), "the server skips until a Sync that is yet to come");
        lease.copy_done();
        asked(&mut lease, "S");
        replies(&mut lease, "Z").unwrap();
        assert!(lease.is_over());
    }

    #[test]
    fn what_nobody_asked_for_is_a_desync() {
        let mut lease = Lease::default();
        assert_eq!(replies(&mut lease, "C"), Err(Desync(b'C')));
        asked(&mut lease, "PS");
        assert_eq!(replies(&mut lease, "1D"), Err(Desync(b'D')));
        let mut lease = Lease::default();
        assert_eq!(lease.ready(b'I'), Err(Desync(b'Z')));
        asked(&mut lease, "Q");
        assert_eq!(lease.ready(b'X'), Err(Desync(b'Z')));
    }

    #[test]
    fn replies_to_what_we_put_in_stay_with_us() {
        let mut lease = Lease::default();
        assert!(lease.ask(Asked::Parse(None), Whose::Follow));
        asked(&mut lease, "BES");
        assert!(!lease.reply(b'1').unwrap().pass);
        assert!(lease.reply(b'2').unwrap().pass);
    }

    #[test]
    fn an_error_of_what_we_put_in_for_the_client_is_the_clients() {
        let mut lease = Lease::default();
        assert!(lease.ask(Asked::Parse(None), Whose::Follow));
        asked(&mut lease, "BES");
        assert_eq!(lease.error(|_| {}), Ok(Whose::Follow));
        assert!(lease.ready(b'I').unwrap());
    }
}
