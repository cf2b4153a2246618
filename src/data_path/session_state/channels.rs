//! LISTEN channels of a session and the NotificationResponse message. Pure.
//!
//! A listening client receives notifications through its pool's shared listener (`pool/shared_listener.rs`).
//! While the client holds a server, that server LISTENs to the same channels, so PostgreSQL applies LISTEN
//! and UNLISTEN with the client's transactions. The shared listener receives the same notifications, so the
//! copies from the server are dropped.

use std::sync::Arc;

use crate::{
    data_path::memory_limit::PIECE_BYTES,
    wire::{
        frame::{HEADER_BYTES, cstr, header},
        message::{append, append_cstr},
    },
};

/// A sorted list of channel names without duplicates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Channels(Vec<Box<str>>);

impl Channels {
    /// Creates the list from names in any order.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<Box<str>> = names.into_iter().map(String::into_boxed_str).collect();
        names.sort_unstable();
        names.dedup();
        Self(names)
    }

    /// Returns whether the client listens to this channel.
    pub fn has(&self, channel: &[u8]) -> bool {
        self.position(channel).is_some()
    }

    fn position(&self, channel: &[u8]) -> Option<usize> {
        self.0.binary_search_by(|name| name.as_bytes().cmp(channel)).ok()
    }

    /// Iterates over the names in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|name| &**name)
    }

    /// Returns the memory used in bytes: this list and two indexes of the shared listener.
    pub fn bytes(&self) -> usize {
        self.iter().map(|name| 3 * (name.len() + 4 * PIECE_BYTES)).sum()
    }

    /// Returns the number of names.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there is no name.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The channel of the markers that order two notification streams (see `pool/shared_listener.rs`). A server
/// listens to it only while its client's channels move to or from the shared listener.
pub const MARKERS: &str = "pglobby_listener";

/// Returns `LISTEN` or `UNLISTEN` statements for all names. Names are quoted, because these statements take
/// no parameters and clients choose the names.
pub fn statements_for<'n>(verb: &str, names: impl IntoIterator<Item = &'n str>) -> String {
    let statements = names.into_iter().map(|name| format!("{verb} \"{}\";", name.replace('"', "\"\"")));
    statements.collect()
}

/// A NotificationResponse message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification<'a> {
    /// Process number of the server that sent it.
    pub process_id: i32,
    /// Channel name.
    pub channel: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Notification<'a> {
    /// Parses a whole message. Returns `None` for a malformed one.
    pub fn read(message: &'a [u8]) -> Option<Self> {
        let (process_id, mut rest) = message.get(HEADER_BYTES..)?.split_first_chunk::<4>()?;
        let (channel, payload) = (cstr(&mut rest).ok()?, cstr(&mut rest).ok()?);
        Some(Self { process_id: i32::from_be_bytes(*process_id), channel, payload })
    }

    /// Appends the message.
    pub fn write(&self, out: &mut Vec<u8>) {
        append(out, b'A', |out| {
            out.extend_from_slice(&self.process_id.to_be_bytes());
            append_cstr(out, self.channel);
            append_cstr(out, self.payload);
        });
    }
}

/// Splits bytes into whole messages.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (_, length) = header(bytes).ok().flatten()?;
        let (message, rest) = bytes.split_at_checked(length + 1)?;
        bytes = rest;
        Some(message)
    })
}

/// Decides which notifications from a server go to its client.
#[derive(Debug, Default)]
pub struct NotificationFilter {
    /// Channels that the client receives through the shared listener; `None` if there are none.
    pub channels: Option<Arc<Channels>>,
    /// The server's process number.
    pub process_id: i32,
    /// The process number that the client knows as its own.
    pub client_process_id: i32,
    /// Notifications dropped since the shared listener's were last delivered to the client.
    pub dropped: usize,
    /// Dropped notifications that the client sent itself.
    pub dropped_own: usize,
    /// The dropped notifications of each channel, by its position in `channels`.
    pub dropped_of: Vec<usize>,
}

impl NotificationFilter {
    /// Handles a notification from the server and appends to `out` what the client receives now. Returns
    /// `true` if the shared listener does not cover the channel.
    pub fn filter(&mut self, message: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(notification) = Notification::read(message) else { return false };
        let own = notification.process_id == self.process_id;
        if let Some(at) = self.position(notification.channel) {
            self.dropped += 1;
            self.dropped_own += usize::from(own);
            if self.dropped_of.len() <= at {
                self.dropped_of.resize(at + 1, 0);
            }
            self.dropped_of[at] += 1;
            return false;
        }
        // Either another session's marker or one that is no longer needed.
        if notification.channel == MARKERS.as_bytes() {
            return false;
        }
        match own {
            true => Notification { process_id: self.client_process_id, ..notification }.write(out),
            false => out.extend_from_slice(message),
        }
        true
    }

    fn position(&self, channel: &[u8]) -> Option<usize> {
        self.channels.as_ref().and_then(|channels| channels.position(channel))
    }

    /// Removes from the shared listener's notifications those that PostgreSQL does not send, because the
    /// session has ended its LISTEN: `listened` are its channels now. Of any other channel it gets as many as
    /// the server has sent itself.
    pub fn without_unlistened(&mut self, received: &[u8], listened: &Channels) -> Vec<u8> {
        let mut left = Vec::with_capacity(received.len());
        for message in messages(received) {
            let Some(Notification { channel, .. }) = Notification::read(message) else { continue };
            let sent = self.position(channel).and_then(|at| self.dropped_of.get_mut(at));
            match sent {
                _ if listened.has(channel) => {}
                Some(sent @ 1..) => *sent -= 1,
                _ => continue,
            }
            left.extend_from_slice(message);
        }
        left
    }

    /// Calls [`Self::filter`] for each message in `bytes`.
    pub fn filter_all(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        for message in messages(bytes) {
            self.filter(message, out);
        }
    }

    /// Rewrites notifications from the shared listener: in those that this client sent, the process number
    /// becomes the client's own. Earlier clients of the server have the same process number, but the present
    /// client is its last user: its own notifications are the last ones from that process.
    pub fn restore_own(&mut self, received: &[u8]) -> Vec<u8> {
        self.dropped = 0;
        self.dropped_of.clear();
        let ours = |message: &[u8]| {
            Notification::read(message).is_some_and(|received| received.process_id == self.process_id)
        };
        let sent = messages(received).filter(|message| ours(message)).count();
        let mut foreign = sent.saturating_sub(std::mem::take(&mut self.dropped_own));
        let mut restored = Vec::with_capacity(received.len());
        for message in messages(received) {
            match Notification::read(message) {
                Some(notification) if ours(message) && foreign == 0 => {
                    Notification { process_id: self.client_process_id, ..notification }.write(&mut restored);
                }
                _ => {
                    foreign = foreign.saturating_sub(usize::from(ours(message)));
                    restored.extend_from_slice(message);
                }
            }
        }
        restored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(process_id: i32, channel: &str, payload: &str) -> Vec<u8> {
        let mut message = Vec::new();
        Notification { process_id, channel: channel.as_bytes(), payload: payload.as_bytes() }
            .write(&mut message);
        message
    }

    fn channels(names: &[&str]) -> Channels {
        Channels::new(names.iter().map(|name| (*name).to_owned()))
    }

    #[test]
    fn names_are_sorted_unique_and_quoted() {
        let all = channels(&["b", "a", "b", "we\"ird"]);
        assert_eq!(all.iter().collect::<Vec<_>>(), ["a", "b", "we\"ird"]);
        assert!(all.has(b"b") && !all.has(b"c"));
        assert_eq!(statements_for("LISTEN", all.iter()), "LISTEN \"a\";LISTEN \"b\";LISTEN \"we\"\"ird\";");
    }

    #[test]
    fn only_channels_of_the_shared_listener_are_dropped() {
        let mut filter =
            NotificationFilter { process_id: 7, client_process_id: 70, ..NotificationFilter::default() };
        let mut out = Vec::new();
        assert!(filter.filter(&message(8, "new", "x"), &mut out));
        assert!(filter.filter(&message(7, "new", "y"), &mut out));
        filter.channels = Some(Arc::new(channels(&["old"])));
        assert!(!filter.filter(&message(7, "old", "z"), &mut out));
        assert!(!filter.filter(&message(8, MARKERS, "another session's mark"), &mut out));
        assert_eq!(out, [message(8, "new", "x"), message(70, "new", "y")].concat());
        assert_eq!((filter.dropped, filter.dropped_own), (1, 1));
    }

    #[test]
    fn a_channel_that_is_unlistened_gives_what_the_server_has_sent() {
        let channels = Some(Arc::new(channels(&["kept", "left", "quiet"])));
        let mut filter = NotificationFilter { channels, ..NotificationFilter::default() };
        let before = message(8, "left", "before");
        filter.filter(&before, &mut Vec::new());
        let (kept, after) = (message(8, "kept", "x"), message(8, "left", "after"));
        let received = [&before[..], &kept, &after, &message(8, "quiet", "x")].concat();
        let left = filter.without_unlistened(&received, &super::Channels::new(["kept".to_owned()]));
        assert_eq!(left, [before, kept].concat());
    }

    #[test]
    fn only_the_last_notifications_of_a_server_are_its_present_clients_own() {
        let mut filter = NotificationFilter {
            process_id: 7,
            client_process_id: 70,
            dropped: 3,
            dropped_own: 1,
            ..NotificationFilter::default()
        };
        let received =
            [message(7, "a", "a stranger's"), message(7, "a", "ours"), message(8, "a", "another's")];
        let restored = filter.restore_own(&received.concat());
        assert_eq!(
            restored,
            [message(7, "a", "a stranger's"), message(70, "a", "ours"), message(8, "a", "another's")]
                .concat()
        );
        assert_eq!((filter.dropped, filter.dropped_own), (0, 0));
    }
}
