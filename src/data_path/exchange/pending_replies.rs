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

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, sync::Arc};

pub use super::pending_reply::{Asked, Owed, Whose};
use crate::data_path::{
    prepared::{Naming, Statement, sql_prepare_effects::Deeds},
    session_state::pins::Pins,
};

/// How a request came to nothing.
#[derive(Debug, Clone, Copy)]
pub struct Skipped {
    /// It has failed itself.
    pub failed: bool,
    /// In later batches so many requests change the unnamed statement.
    pub unnamed_later: usize,
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
    /// The client has sent extended-protocol messages and no Sync yet, nor a simple query, which does as well unless it is skipped.
    unsynced: bool,
    /// An error came and the server ignores everything until a Sync that the client has yet to send.
    skipping: bool,
    copy_in: CopyIn,
    /// A named statement is parsed or closed in this batch.
    changes: bool,
    /// One was in an earlier batch, which may yet fail.
    changed_before: bool,
    /// The same of the unnamed statement.
    unnamed: bool,
    unnamed_before: bool,
    /// Something that may commit has been sent, and not all is answered.
    pub committing: bool,
    /// We have asked something in the middle of what the client has begun, and not all is answered.
    tells_us: bool,
    /// What takes statements away that the client has prepared has been sent, and not all is answered.
    pub forgetting: bool,
    /// What the client said last waits until all before it is answered.
    all_awaited: bool,
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
            changes: false,
            changed_before: false,
            unnamed: false,
            unnamed_before: false,
            committing: false,
            tells_us: false,
            forgetting: false,
            all_awaited: false,
            batch: 0,
            pins: Pins::default(),
        }
    }
}

impl Lease {
    /// A request goes to the server; `false` if the server will ignore it, because it skips to the next Sync.
    #[inline(always)]
    #[must_use = "a request that the server ignores has no effect"]
    pub fn ask(&mut self, asked: Asked, whose: Whose) -> bool {
        match asked {
            Asked::Sync if self.copy_in == CopyIn::Taking && whose == Whose::Client => return true,
            Asked::Sync => {
                self.batch = self.batch.wrapping_add(1);
                self.skipping = false;
                self.unsynced &= whose != Whose::Client;
                self.changed_before |= std::mem::take(&mut self.changes);
                self.unnamed_before |= std::mem::take(&mut self.unnamed);
            }
            _ if self.skipping => return false,
            Asked::Query(_) | Asked::FunctionCall => {
                // In a batch that has begun it may be skipped, and leave the unnamed statement as it is.
                self.unnamed |= self.unsynced;
                self.unsynced = false;
            }
            Asked::Parse(Some(_)) | Asked::Close(Some(_)) => {
                self.changes = true;
                self.unsynced |= whose.is_for_client();
            }
            Asked::Parse(None) | Asked::CloseUnnamed => {
                self.unnamed |= whose.is_for_client();
                self.unsynced |= whose.is_for_client();
            }
            _ => self.unsynced |= whose.is_for_client(),
        }
        self.tells_us |= matches!(asked, Asked::Shape(_) | Asked::Settings(_));
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

    /// The client's name for the statement that the Parse being answered makes, or would make.
    pub fn client_name(&self) -> Option<&Naming> {
        match &self.owed.front()?.asked {
            Asked::Parse(Some(naming)) | Asked::ParseTaken(naming) => Some(naming),
            _ => None,
        }
    }

    /// Whether a reply that is owed may tell us something.
    #[inline]
    pub fn tells_us(&self) -> bool {
        self.tells_us
    }

    /// Whether the oldest reply that is owed tells us the shape of a statement.
    pub fn is_shape_owed(&self) -> bool {
        matches!(self.owed.front(), Some(Owed { asked: Asked::Shape(_), .. }))
    }

    /// Whether the oldest reply that is owed tells us which settings the server has.
    pub fn are_settings_owed(&self) -> bool {
        matches!(self.owed.front(), Some(Owed { asked: Asked::Settings(_), .. }))
    }

    /// Whether a batch before the client's present one may yet fail, and change what `name` means.
    #[inline]
    pub fn is_doubtful(&self, name: &[u8]) -> bool {
        self.changed_before && self.may_mean_another(name)
    }

    /// Whether one may yet fail, and leave the server with other statements than it is thought to have.
    #[inline]
    pub fn may_have_others(&self) -> bool {
        self.changed_before && self.is_awaited()
    }

    /// The same of the unnamed statement. What comes behind its Parse in the same batch is skipped with that.
    #[inline]
    pub fn is_unnamed_doubtful(&self) -> bool {
        self.unnamed_before && !self.unnamed && self.is_awaited()
    }

    #[cold]
    fn may_mean_another(&self, name: &[u8]) -> bool {
        if self.copy_in == CopyIn::Taking {
            return false;
        }
        let last_sync = self.owed.iter().rposition(|owed| matches!(owed.asked, Asked::Sync)).unwrap_or(0);
        self.owed.iter().take(last_sync).any(|owed| match &owed.asked {
            Asked::Parse(Some(naming)) | Asked::Close(Some(naming)) => {
                naming.client_name.as_deref() == Some(name)
            }
            _ => false,
        })
    }

    /// What a client's Close of `name` takes away is `new` and not `old`: if it is skipped, that stays.
    #[cold]
    pub fn closes_instead(&mut self, name: &[u8], old: &Statement, new: &Arc<Statement>) {
        for owed in &mut self.owed {
            if let Asked::Close(Some(naming)) = &mut owed.asked
                && naming.client_name.as_deref() == Some(name)
                && naming.statement.is(old)
            {
                naming.statement = new.clone();
            }
        }
    }

    /// Whether what is owed tells the shape of a statement that is being prepared by another name.
    #[cold]
    pub fn shows_shape_of(&self, statement: &Statement, name: &[u8]) -> bool {
        self.owed.iter().any(|owed| match &owed.asked {
            Asked::Shape(naming) => {
                naming.statement.is(statement) && naming.client_name.as_deref() != Some(name)
            }
            _ => false,
        })
    }

    /// Whether what is owed will tell what names mean, or what shape a statement has, and comes without anything further
    /// from the client.
    pub fn is_awaited(&self) -> bool {
        let tells = |asked: &Asked| match asked {
            Asked::Parse(_) | Asked::Close(Some(_)) | Asked::CloseUnnamed | Asked::Shape(_) => true,
            Asked::Query(_) => self.unnamed_before,
            _ => false,
        };
        self.copy_in != CopyIn::Taking && self.owed.iter().any(|owed| self.all_awaited || tells(&owed.asked))
    }

    /// Whether a batch that the client has begun, and not ended, may yet fail: the server would skip what comes behind it, unless a
    /// Sync of ours came first.
    pub fn may_yet_skip(&self) -> bool {
        self.unsynced && self.is_working() && self.copy_in != CopyIn::Taking
    }

    /// Whether what a name means is not certain before all that was sent is answered, since it may take the name away; that is waited
    /// for, then.
    #[inline]
    pub fn is_forgetting(&mut self) -> bool {
        self.forgetting = self.forgetting && self.is_working() && self.copy_in != CopyIn::Taking;
        self.all_awaited |= self.forgetting;
        self.forgetting
    }

    /// What the client said last waits until that is known.
    pub fn wait_for_all(&mut self) {
        self.all_awaited = true;
    }

    /// A reply other than ErrorResponse and ReadyForQuery has arrived.
    ///
    /// # Errors
    /// [`Desync`] if it answers nothing that was asked.
    #[inline(always)]
    pub fn reply(&mut self, tag: u8) -> Result<Settled, Desync> {
        let Some(front) = self.owed.front() else {
            return Err(Desync(tag));
        };
        let completes = match (tag, &front.asked) {
            (b'1', Asked::Parse(_) | Asked::ParseAsIs | Asked::ParseTaken(_))
            | (b'2', Asked::Bind)
            | (b'3', Asked::Close(_) | Asked::CloseUnnamed) => true,
            (b'T' | b'n', Asked::Describe | Asked::Shape(_)) => true,
            (b'C' | b'I' | b's', Asked::Execute(_)) | (b'C', Asked::Settings(_)) => true,
            (b't', Asked::Describe | Asked::Shape(_)) => false,
            (b'T' | b'C' | b'I', Asked::Query(_)) | (b'V', Asked::FunctionCall) => false,
            (b'D' | b'H' | b'd' | b'c', Asked::Execute(_) | Asked::Query(_)) | (b'D', Asked::Settings(_)) => {
                false
            }
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

    /// An ErrorResponse has arrived: hands `skipped`, latest first, every request of the batch that the server will now skip
    /// and last the one that failed; and tells for whom the error is.
    ///
    /// # Errors
    /// [`Desync`] if it answers nothing.
    pub fn error(&mut self, mut skipped: impl FnMut(Owed, Skipped)) -> Result<Whose, Desync> {
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
        // Also where a simple query stood in the batch, which would have ended it.
        self.unsynced |= self.skipping;
        let end = sync.unwrap_or(self.owed.len());
        let unnamed_later = self.owed.iter().skip(end).filter(|owed| owed.changes_unnamed()).count();
        for (place, owed) in self.owed.drain(..end).enumerate().rev() {
            skipped(owed, Skipped { failed: place == 0, unnamed_later });
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
                if self.owed.is_empty() {
                    (self.changed_before, self.unnamed_before) = (false, false);
                    self.committing = false;
                    (self.tells_us, self.all_awaited, self.forgetting) = (false, false, false);
                }
                Ok(matches!(whose, Whose::Client | Whose::Denied(_)))
            }
            _ => Err(Desync(b'Z')),
        }
    }

    /// Nothing is owed, nothing is open: the transaction has ended. Pins are not asked.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.owed.is_empty() && self.status == b'I' && !self.unsynced
    }

    /// How many replies are owed.
    #[inline]
    pub fn owed(&self) -> usize {
        self.owed.len()
    }

    /// A request is being worked on (as opposed to a transaction that idles).
    pub fn is_working(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Whether the status is that in which the client's next query finds the server: what is still owed is ours, and in batches of its
    /// own.
    pub fn is_settled(&self) -> bool {
        !self.unsynced && self.owed.iter().all(|owed| matches!(owed.whose, Whose::Ours | Whose::Attempt))
    }

    /// A BEGIN of ours goes to the server: what comes behind it finds it in a transaction.
    pub fn begin(&mut self) {
        let _ = self.ask(Asked::Query(None), Whose::Ours);
        self.status = b'T';
    }

    /// The server takes data of a COPY, and any other message for an error in it.
    pub fn takes_copy_data(&self) -> bool {
        self.copy_in == CopyIn::Taking
    }

    /// As the last ReadyForQuery said.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the client has begun a batch that it has not ended by Sync.
    pub fn is_unsynced(&self) -> bool {
        self.unsynced
    }

    /// Whether the server ignores everything until a Sync that the client has yet to send.
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// The number of the batch that the client is sending.
    pub fn batch(&self) -> u32 {
        self.batch
    }
}
