//! What need not wait for a server: a Parse whose text is known, and a Sync that ends no batch.
//!
//! A program that prepares on one connection while it has transactions open on others would wait for itself where all
//! servers are held by its own transactions: `pgbench -M prepared` with more clients than servers and threads does so. A
//! Parse that comes alone (Parse, Sync), of a text that a server has taken before, is therefore answered at once where no
//! server is idle. It is not left out: it reaches a server in front of the statement's first use.

use super::client_side::ClientSide;
use crate::wire::{
    frame::{HEADER_BYTES, cstr, header},
    message::{append, ready_for_query},
};

impl ClientSide {
    /// Answers what is at the front of `inbox` where no server need see it now, and tells how many bytes that is. Called only
    /// while the session holds no server.
    pub fn answer_unserved(&mut self, inbox: &[u8], replies: &mut Vec<u8>) -> usize {
        if let Some((sync, _)) = message(b'S', inbox) {
            ready_for_query(replies, b'I');
            return sync.len();
        }
        self.postpone_parse(inbox, replies).unwrap_or(0)
    }

    /// A Parse and a Sync.
    fn postpone_parse(&mut self, inbox: &[u8], replies: &mut Vec<u8>) -> Option<usize> {
        let (parse, rest) = message(b'P', inbox)?;
        let (sync, _) = message(b'S', rest)?;
        let mut body = parse.get(HEADER_BYTES..)?;
        let name = cstr(&mut body).ok()?;
        let free = !name.is_empty() && self.statements.get(name).is_none();
        if !self.rules.follow
            || !free
            || self.rules.admit(&self.statements, 1, name.len() + body.len()).is_err()
        {
            return None;
        }
        self.look_at_settings();
        let found = self.rules.shared_statements.find(body, &self.parse_settings.0);
        let statement = found.filter(|statement| statement.was_parsed())?;
        self.statements.insert(name, statement);
        self.statements.defer(name);
        append(replies, b'1', |_| {});
        ready_for_query(replies, b'I');
        Some(parse.len() + sync.len())
    }
}

/// The message at the front, if it is there whole and of that kind, and what is behind it.
fn message(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    match header(bytes) {
        Ok(Some((found, length))) if found == tag => bytes.split_at_checked(length + 1),
        _ => None,
    }
}
