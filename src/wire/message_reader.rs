//! Reads whole messages, one at a time, until a session exists. After that the relay reads (invariant 5).
//!
//! The buffer grows with the bytes that have arrived, not with an announced length. A length above the
//! caller's limit is refused after the header.

use std::io;

use bytes::{BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::wire::frame::HEADER_BYTES;

/// Bytes for each read. Most messages of a login arrive together and fit.
const READ_BYTES: usize = 2048;

/// One message with its header, in a buffer of its own, so that decoding cannot read into the next message.
#[derive(Debug)]
pub struct Message {
    /// The whole message; at least five bytes.
    pub bytes: BytesMut,
}

impl Message {
    /// The first byte.
    pub fn tag(&self) -> u8 {
        self.bytes.first().copied().unwrap_or_default()
    }

    /// What follows the length.
    pub fn body(&self) -> &[u8] {
        self.bytes.get(HEADER_BYTES..).unwrap_or_default()
    }
}

/// Why there is no next message.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum ReadError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The other side closed the connection, `within` a message or between two.
    #[error("the connection was closed{}", if *within { " in the middle of a message" } else { "" })]
    Closed { within: bool },
    /// A length below four or beyond the limit.
    #[error("a message of type {tag:?} announces {announced} bytes", tag = char::from(*tag))]
    Length { tag: u8, announced: u32 },
}

/// Received bytes that have not been returned yet.
#[derive(Debug, Default)]
pub struct MessageReader {
    buffer: BytesMut,
}

impl MessageReader {
    /// Begins with bytes that were read before.
    pub fn with_leftover(leftover: &[u8]) -> Self {
        Self { buffer: BytesMut::from(leftover) }
    }

    /// Reads the next message. Its length field may be `length_max` at most.
    ///
    /// Cancel safe: received bytes stay in the buffer.
    ///
    /// # Errors
    /// [`ReadError`]; the stream cannot be used after it.
    pub async fn next<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        length_max: u32,
    ) -> Result<Message, ReadError> {
        loop {
            if let Some(total) = self.announced(length_max)?
                && self.buffer.len() >= total
            {
                return Ok(Message { bytes: self.buffer.split_to(total) });
            }
            self.buffer.reserve(READ_BYTES);
            let mut room = (&mut self.buffer).limit(READ_BYTES);
            if stream.read_buf(&mut room).await? == 0 {
                return Err(ReadError::Closed { within: !self.buffer.is_empty() });
            }
        }
    }

    /// Returns when the other side has closed the connection. Bytes before the end are kept, up to
    /// `bytes_max`; if there are more, this reads no further and does not see the end. Cancel safe.
    pub async fn end_of<S: AsyncRead + Unpin>(&mut self, stream: &mut S, bytes_max: usize) {
        while self.buffer.len() < bytes_max {
            self.buffer.reserve(READ_BYTES);
            let mut room = (&mut self.buffer).limit(READ_BYTES);
            if !matches!(stream.read_buf(&mut room).await, Ok(1..)) {
                return;
            }
        }
        std::future::pending().await
    }

    /// Whether the next message has arrived, or its header is invalid.
    pub fn has_message(&self, length_max: u32) -> bool {
        let announced = self.announced(length_max);
        announced.map_or(true, |total| total.is_some_and(|total| self.buffer.len() >= total))
    }

    /// Whether received bytes remain that were not returned.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The size of the first message with its header; `None` until the header has arrived.
    fn announced(&self, length_max: u32) -> Result<Option<usize>, ReadError> {
        let Some((&[tag, a, b, c, d], _)) = self.buffer.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let announced = u32::from_be_bytes([a, b, c, d]);
        if announced < 4 || announced > length_max {
            return Err(ReadError::Length { tag, announced });
        }
        // At most `length_max` and one: no overflow where usize has 32 bits or more.
        Ok(Some(announced as usize + 1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn read_all(pieces: Vec<Vec<u8>>, length_max: u32) -> (Vec<Vec<u8>>, ReadError) {
        let (mut near, mut far) = tokio::io::duplex(7);
        let writer = tokio::spawn(async move {
            for piece in pieces {
                if far.write_all(&piece).await.is_err() {
                    break;
                }
            }
        });
        let mut reader = MessageReader::default();
        let mut messages = Vec::new();
        let error = loop {
            match reader.next(&mut near, length_max).await {
                Ok(message) => messages.push(message.bytes.to_vec()),
                Err(error) => break error,
            }
        };
        drop(near);
        writer.await.unwrap();
        (messages, error)
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn messages_are_the_same_however_the_stream_is_cut(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6),
            cuts in prop::collection::vec(1usize..50, 1..20),
        ) {
            let messages: Vec<Vec<u8>> = bodies.iter().map(|body| {
                let mut message = Vec::new();
                crate::wire::message::append(&mut message, b'R', |out| out.extend_from_slice(body));
                message
            }).collect();
            let stream = messages.concat();
            let (mut pieces, mut rest, mut cut) = (Vec::new(), stream.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((*cut.next().unwrap()).min(rest.len()));
                pieces.push(piece.to_vec());
                rest = after;
            }
            let (read, end) = run(read_all(pieces, 100));
            prop_assert_eq!(read, messages);
            prop_assert!(matches!(end, ReadError::Closed { within: false }), "{:?}", end);
        }
    }

    #[test]
    fn a_length_out_of_bounds_is_refused_on_the_header_alone() {
        for (length, ok) in [(3u32, false), (4, true), (100, true), (101, false), (u32::MAX, false)] {
            let mut header = vec![b'R'];
            header.extend_from_slice(&length.to_be_bytes());
            let (_, end) = run(read_all(vec![header], 100));
            match end {
                ReadError::Length { tag, announced } => assert!(!ok && (tag, announced) == (b'R', length)),
                ReadError::Closed { within } => assert!(ok && within == (length > 4)),
                ReadError::Io(error) => panic!("{error}"),
            }
        }
    }
}
