//! Parse and Sync messages that the proxy answers without a server.
//!
//! A program that prepares on one connection while its own transactions hold all servers would wait for
//! itself (`pgbench -M prepared` with more clients than servers and threads). If no server is idle, a lone
//! Parse and Sync is answered at once, provided that some server has parsed the same text before. The Parse
//! goes to a server before the first use of the statement.

use super::client_side::ClientSide;
use crate::wire::{
    frame::{HEADER_BYTES, cstr, header},
    message::{append, ready_for_query},
};

impl ClientSide {
    /// Answers the first messages of `inbox` if they need no server now. Returns their length in bytes, or 0.
    /// Called only while the session holds no server. `status`: `T` if the proxy has answered a BEGIN that no
    /// server knows yet.
    pub fn answer_without_server(&mut self, inbox: &[u8], status: u8, replies: &mut Vec<u8>) -> usize {
        let answered = match message(b'S', inbox) {
            Some((sync, _)) => sync.len(),
            None => self.defer_parse(inbox, replies).unwrap_or(0),
        };
        if answered > 0 {
            ready_for_query(replies, status);
        }
        answered
    }

    /// Answers a Parse and a Sync, except for the ReadyForQuery.
    fn defer_parse(&mut self, inbox: &[u8], replies: &mut Vec<u8>) -> Option<usize> {
        let (parse, rest) = message(b'P', inbox)?;
        let (sync, _) = message(b'S', rest)?;
        let mut body = parse.get(HEADER_BYTES..)?;
        let name = cstr(&mut body).ok()?;
        let free = !name.is_empty() && self.statements.get(name).is_none();
        if !self.rules.follow || !free || self.rules.admit_text(&self.statements, name, body).is_err() {
            return None;
        }
        self.update_parse_settings();
        let found = self.rules.shared_statements.find(body, &self.parse_settings.0);
        let statement = found.filter(|statement| statement.was_parsed())?;
        self.statements.insert(name, statement);
        self.statements.defer(name);
        append(replies, b'1', |_| {});
        Some(parse.len() + sync.len())
    }
}

/// The first message, if it is whole and has this type, and the bytes after it.
fn message(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    match header(bytes) {
        Ok(Some((found, length))) if found == tag => bytes.split_at_checked(length + 1),
        _ => None,
    }
}
