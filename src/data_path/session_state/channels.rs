//! What a session LISTENs to, and the message that tells it of a NOTIFY. Pure.
//!
//! A client that listens hears by its pool's ear (`pool/shared_listener.rs`). While it has a server, that server listens to the same
//! channels, so that LISTEN, UNLISTEN and their transactions are PostgreSQL's own business; what the server is told of is
//! left out then, because the ear is told as well.

use std::sync::Arc;

use crate::{
    data_path::memory_limit::PIECE_BYTES,
    wire::{
        frame::{HEADER_BYTES, cstr, header},
        message::{append, append_cstr},
    },
};

/// Names of channels; sorted, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Channels(Vec<Box<str>>);

impl Channels {
    /// From names in any order.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<Box<str>> = names.into_iter().map(String::into_boxed_str).collect();
        names.sort_unstable();
        names.dedup();
        Self(names)
    }

    /// Whether a notification of this channel is meant.
    pub fn has(&self, channel: &[u8]) -> bool {
        self.0.binary_search_by(|name| name.as_bytes().cmp(channel)).is_ok()
    }

    /// Every name.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|name| &**name)
    }

    /// What they take: here, and where the ear looks for who hears them and who wants them.
    pub fn bytes(&self) -> usize {
        self.iter().map(|name| 3 * (name.len() + 4 * PIECE_BYTES)).sum()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The channel on which marks travel (see `pool/shared_listener.rs`). A server listens to it while its client's channels are handed over.
pub const MARKS: &str = "pglobby_ear";

/// `LISTEN` or `UNLISTEN` of each name, as one text. The statements take no parameters, so names are quoted: they are what
/// a server said that somebody listens to.
pub fn each<'n>(verb: &str, names: impl IntoIterator<Item = &'n str>) -> String {
    let statements = names.into_iter().map(|name| format!("{verb} \"{}\";", name.replace('"', "\"\"")));
    statements.collect()
}

/// A NotificationResponse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification<'a> {
    /// The server that notified.
    pub process_id: i32,
    /// Where.
    pub channel: &'a [u8],
    /// What it said.
    pub payload: &'a [u8],
}

impl<'a> Notification<'a> {
    /// Reads a whole message; `None` if it is none.
    pub fn read(message: &'a [u8]) -> Option<Self> {
        let (process_id, mut rest) = message.get(HEADER_BYTES..)?.split_first_chunk::<4>()?;
        let (channel, payload) = (cstr(&mut rest).ok()?, cstr(&mut rest).ok()?);
        Some(Self { process_id: i32::from_be_bytes(*process_id), channel, payload })
    }

    fn write(&self, out: &mut Vec<u8>) {
        append(out, b'A', |out| {
            out.extend_from_slice(&self.process_id.to_be_bytes());
            append_cstr(out, self.channel);
            append_cstr(out, self.payload);
        });
    }
}

/// Whole messages, one behind the other.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (_, length) = header(bytes).ok().flatten()?;
        let (message, rest) = bytes.split_at_checked(length + 1)?;
        bytes = rest;
        Some(message)
    })
}

/// A server's part in what its client hears.
#[derive(Debug, Default)]
pub struct Hearing {
    /// What its client hears by the ear, and this server therefore listens to as well; `None`: nothing.
    pub channels: Option<Arc<Channels>>,
    /// The server's own process…
    pub process_id: i32,
    /// …and what its client takes it for.
    pub told_as: i32,
    /// Notifications left out since the client was last told what the ear has heard.
    pub overheard: usize,
    /// Those among them that the client itself has sent.
    pub own: usize,
}

impl Hearing {
    /// A notification has come from the server; `out` gets what goes to the client at once. `true` if it is of a channel
    /// that the client does not hear by the ear.
    pub fn notified(&mut self, message: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(notification) = Notification::read(message) else { return false };
        let own = notification.process_id == self.process_id;
        if self.channels.as_ref().is_some_and(|channels| channels.has(notification.channel)) {
            self.overheard += 1;
            self.own += usize::from(own);
            return false;
        }
        // Another session's, or one that has done its part.
        if notification.channel == MARKS.as_bytes() {
            return false;
        }
        match own {
            true => Notification { process_id: self.told_as, ..notification }.write(out),
            false => out.extend_from_slice(message),
        }
        true
    }

    /// [`Self::notified`] of several.
    pub fn notified_all(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        for message in messages(bytes) {
            self.notified(message, out);
        }
    }

    /// What is left out was heard by the ear as well, and is in `heard`, whole messages: the client's own are put under
    /// the number that the client knows as its own. Nobody but the client has used the server meanwhile, so they are the
    /// last ones that the server has sent.
    pub fn adopt(&mut self, heard: &[u8]) -> Vec<u8> {
        self.overheard = 0;
        let ours = |message: &[u8]| {
            Notification::read(message).is_some_and(|heard| heard.process_id == self.process_id)
        };
        let sent = messages(heard).filter(|message| ours(message)).count();
        let mut strangers = sent.saturating_sub(std::mem::take(&mut self.own));
        let mut adopted = Vec::with_capacity(heard.len());
        for message in messages(heard) {
            match Notification::read(message) {
                Some(notification) if ours(message) && strangers == 0 => {
                    Notification { process_id: self.told_as, ..notification }.write(&mut adopted);
                }
                _ => {
                    strangers = strangers.saturating_sub(usize::from(ours(message)));
                    adopted.extend_from_slice(message);
                }
            }
        }
        adopted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(process_id: i32, channel: &str, payload: &str) -> Vec<u8> {
        let mut message = Vec::new();
        Notification { process_id, channel: channel.as_bytes(), payload: payload.as_bytes() }
            .write(&mut message);
        message
    }

    fn channels(names: &[&str]) -> Channels {
        Channels::new(names.iter().map(|name| (*name).to_owned()))
    }

    #[test]
    fn names_are_sorted_known_and_quoted() {
        let all = channels(&["b", "a", "b", "we\"ird"]);
        assert_eq!(all.iter().collect::<Vec<_>>(), ["a", "b", "we\"ird"]);
        assert!(all.has(b"b") && !all.has(b"c"));
        assert_eq!(each("LISTEN", all.iter()), "LISTEN \"a\";LISTEN \"b\";LISTEN \"we\"\"ird\";");
    }

    #[test]
    fn what_the_ear_hears_is_left_out_and_what_it_does_not_hear_yet_is_passed() {
        let mut hearing = Hearing { process_id: 7, told_as: 70, ..Hearing::default() };
        let mut out = Vec::new();
        assert!(hearing.notified(&told(8, "new", "x"), &mut out));
        assert!(hearing.notified(&told(7, "new", "y"), &mut out));
        hearing.channels = Some(Arc::new(channels(&["old"])));
        assert!(!hearing.notified(&told(7, "old", "z"), &mut out));
        assert!(!hearing.notified(&told(8, MARKS, "another session's mark"), &mut out));
        assert_eq!(out, [told(8, "new", "x"), told(70, "new", "y")].concat());
        assert_eq!((hearing.overheard, hearing.own), (1, 1));
    }

    #[test]
    fn only_the_last_of_a_servers_notifications_are_its_present_clients() {
        let mut hearing = Hearing { process_id: 7, told_as: 70, overheard: 3, own: 1, ..Hearing::default() };
        let heard = [told(7, "a", "a stranger's"), told(7, "a", "ours"), told(8, "a", "another's")];
        let adopted = hearing.adopt(&heard.concat());
        assert_eq!(
            adopted,
            [told(7, "a", "a stranger's"), told(70, "a", "ours"), told(8, "a", "another's")].concat()
        );
        assert_eq!((hearing.overheard, hearing.own), (0, 0));
    }
}
