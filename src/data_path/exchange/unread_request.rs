//! A request that its server has certainly not read: it may be sent to another server. Pure; `relay/send_again.rs`
//! does the I/O.
//!
//! A server that an administrator ends (57P01: a shutdown, a failover, `pg_terminate_backend`) while it waits for a
//! request says so, reads nothing more and closes the connection. A request that crosses these words is lost, though
//! nothing of it has happened. Two things together tell that:
//!
//! - The words are all that the server has said since the session borrowed it. PostgreSQL holds back such an end from the
//!   moment at which a transaction commits until its CommandComplete is sent, so nothing was committed by one plain statement.
//! - The connection is reset (`Server::has_left_unread`): the kernel does that where bytes were left unread or came after
//!   the end, and closes the connection in order where the server had read them all.
//!
//! Everything else is the application's to repeat, which alone knows what a second time would do.

use crate::wire::{
    frame::{HEADER_BYTES, header},
    server_error::{error_field, is_fatal},
};

/// A longer request is not kept. PostgreSQL reads up to 8 KiB at once, so it has read all of a shorter one or nothing.
const KEPT_BYTES_MAX: usize = 2048;

/// What a session has sent since it borrowed its server, as long as that is one request without a reply. The server has it,
/// so that its buffer is made once.
#[derive(Debug, Default)]
pub struct FirstRequest {
    bytes: Vec<u8>,
}

impl FirstRequest {
    /// The session sends this as the first of a transaction.
    #[inline]
    pub fn keep(&mut self, chunk: &[u8]) {
        self.bytes.clear();
        if chunk.len() <= KEPT_BYTES_MAX {
            self.bytes.extend_from_slice(chunk);
        }
    }

    /// The session has sent more, or the server has answered.
    #[inline]
    pub fn forget(&mut self) {
        self.bytes.clear();
    }

    /// Whether it is one whole request, and leaves nothing in the session but with its replies: a simple query, or a batch
    /// that ends with its Sync and parses no named statement.
    #[cold]
    pub fn is_repeatable(&self) -> bool {
        let (mut rest, mut ended) = (&*self.bytes, false);
        while let Some((message, behind)) = first_message(rest) {
            ended = match (message.first(), message.get(HEADER_BYTES)) {
                (Some(b'Q'), _) if rest.len() == self.bytes.len() => true,
                (Some(b'P'), Some(0)) | (Some(b'B' | b'D' | b'E'), _) if !ended => false,
                (Some(b'S'), _) if !ended && rest.len() < self.bytes.len() => true,
                _ => return false,
            };
            rest = behind;
        }
        ended && rest.is_empty()
    }

    /// Whether all of it, or nothing, has gone to the server, where `waiting` still waits for the server's replies.
    pub fn is_in_one_place(&self, waiting: &[u8]) -> bool {
        waiting.is_empty() || waiting == self.bytes
    }

    /// The bytes, to be sent again.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// Whether these bytes of a server are its last words when an administrator ends it, and nothing else.
#[cold]
pub fn is_only_shutdown(said: &[u8]) -> bool {
    let Some((message, [])) = first_message(said) else { return false };
    message.first() == Some(&b'E') && is_fatal(message) && error_field(message, b'C') == Some(b"57P01")
}

/// What a server has said in front of its last words, which are these bytes' last `length`, if an administrator ends it.
#[cold]
pub fn before_shutdown(said: &[u8], length: usize) -> Option<&[u8]> {
    let (reply, last_words) = said.split_at_checked(said.len().checked_sub(length)?)?;
    is_only_shutdown(last_words).then_some(reply)
}

/// The first message of these bytes, and what follows it.
fn first_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (_, length) = header(bytes).ok().flatten()?;
    bytes.split_at_checked(length.checked_add(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::{append, append_cstr, bind, close_statement, execute, parse};

    fn kept(chunk: &[u8]) -> FirstRequest {
        let mut request = FirstRequest::default();
        request.keep(chunk);
        request
    }

    fn query(sql: &str) -> Vec<u8> {
        let mut out = Vec::new();
        append(&mut out, b'Q', |out| append_cstr(out, sql.as_bytes()));
        out
    }

    fn batch(build: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        build(&mut out);
        append(&mut out, b'S', |_| {});
        out
    }

    fn unnamed(out: &mut Vec<u8>) {
        parse(b"", b"SELECT 1", out);
        bind(b"", &[], out);
        execute(out);
    }

    #[test]
    fn one_whole_request_may_be_repeated() {
        assert!(kept(&query("SELECT 1")).is_repeatable());
        assert!(kept(&batch(unnamed)).is_repeatable());
        assert!(
            kept(&batch(|out| {
                bind(b"named", &[], out);
                execute(out);
            }))
            .is_repeatable()
        );
        for (what, chunk) in [
            ("nothing", Vec::new()),
            ("two queries", [query("SELECT 1"), query("SELECT 2")].concat()),
            ("two batches", [batch(unnamed), batch(unnamed)].concat()),
            ("a query in a batch", batch(|out| out.extend(query("SELECT 1")))),
            ("a lone Sync", batch(|_| {})),
            ("a batch without its Sync", {
                let mut out = Vec::new();
                unnamed(&mut out);
                out
            }),
            ("a statement that the session keeps", batch(|out| parse(b"named", b"SELECT 1", out))),
            ("the end of one", batch(|out| close_statement(b"named", out))),
            ("a query cut short", {
                let mut out = query("SELECT 1");
                out.pop();
                out
            }),
            ("a query and a part of the next", [query("SELECT 1"), b"Q\0".to_vec()].concat()),
            ("more than is read at once", query(&"x".repeat(KEPT_BYTES_MAX))),
        ] {
            assert!(!kept(&chunk).is_repeatable(), "{what}");
        }
        let mut request = kept(&query("SELECT 1"));
        request.forget();
        assert!(!request.is_repeatable());
    }

    #[test]
    fn only_the_last_words_count() {
        let error = |severity: &str, code: &str| {
            let mut out = Vec::new();
            append(&mut out, b'E', |out| {
                for (field, value) in
                    [(b'S', severity), (b'V', severity), (b'C', code), (b'M', "terminating connection")]
                {
                    out.push(field);
                    append_cstr(out, value.as_bytes());
                }
                out.push(0);
            });
            out
        };
        let last = error("FATAL", "57P01");
        assert!(is_only_shutdown(&last));
        assert_eq!(before_shutdown(&last, last.len()), Some(&[][..]));
        let behind = [b"rest of a reply", &last[..]].concat();
        assert_eq!(before_shutdown(&behind, last.len()), Some(&b"rest of a reply"[..]));
        assert_eq!(before_shutdown(&error("FATAL", "57P02"), last.len()), None);
        assert_eq!(before_shutdown(&last, last.len() + 1), None);
        for said in [
            &error("ERROR", "57P01")[..],
            &error("FATAL", "57P05"),
            &error("FATAL", "25P03"),
            &[&last[..], &last].concat(),
            &[b"N\0\0\0\x05\0", &last[..]].concat(),
            &last[..last.len() - 1],
            b"",
        ] {
            assert!(!is_only_shutdown(said), "{}", String::from_utf8_lossy(said));
        }
    }
}
