//! The stored text of a prepared statement. Pure.
//!
//! A text is read when its client prepares it. Later it is needed only when another server must parse it, or
//! another session prepares it too. So a long text is stored compressed: lists of values take a half,
//! generated SQL a tenth or less.

use std::{ops::Deref, sync::Arc};

/// Shorter texts are stored as they are: they save little, and the compressor's fixed cost is some 20 µs.
const COMPRESSED_FROM: usize = 8 * 1024;

/// The fastest. Higher levels take several times as long and save a few percent.
const LEVEL: i32 = 1;

/// Sent in place of a text that is lost, which means a defect: the server rejects it.
const LOST_TEXT: &[u8] = b"pglobby_lost_text\0\0\0";

/// Body of a Parse message after the name, as stored: the text, a zero byte, the types.
#[derive(Debug, Clone)]
pub struct StoredText {
    /// Compressed if shorter than `length`.
    bytes: Arc<[u8]>,
    length: usize,
}

impl StoredText {
    /// Stores a body.
    pub fn new(body: &[u8]) -> Self {
        Self { bytes: compressed(body).map_or_else(|| body.into(), Into::into), length: body.len() }
    }

    /// In place of a text that nothing needs any more.
    pub fn given_up() -> Self {
        Self::new(LOST_TEXT)
    }

    /// Length of the body.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The bytes that it takes in memory.
    pub fn stored_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Returns the body. Decompresses a long one.
    pub fn body(&self) -> Body {
        if self.bytes.len() == self.length {
            return Body::Stored(self.bytes.clone());
        }
        let body = zstd::bulk::decompress(&self.bytes, self.length);
        Body::Decompressed(body.unwrap_or_else(|defect| {
            tracing::error!(%defect, length = self.length, "stored text of a prepared statement is damaged");
            LOST_TEXT.to_vec()
        }))
    }
}

/// A body for a moment of use.
#[derive(Debug)]
pub enum Body {
    /// Stored as it is.
    Stored(Arc<[u8]>),
    /// Its own copy.
    Decompressed(Vec<u8>),
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Stored(body) => body,
            Self::Decompressed(body) => body,
        }
    }
}

/// Returns the bytes that a body of these bytes would take. As slow as storing it.
pub fn stored_bytes(body: &[u8]) -> usize {
    compressed(body).map_or(body.len(), |compressed| compressed.len())
}

/// `None`: the body is stored as it is, since compression would save less than an eighth.
fn compressed(body: &[u8]) -> Option<Vec<u8>> {
    if body.len() < COMPRESSED_FROM {
        return None;
    }
    let compressed = zstd::bulk::compress(body, LEVEL).ok()?;
    (compressed.len() < body.len() / 8 * 7).then_some(compressed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn in_list(bytes: usize) -> Vec<u8> {
        let values = (0_u64..).map(|at| (at * 7_919_993 % 10_000_019).to_string());
        let mut text = b"SELECT id FROM orders WHERE id IN (0".to_vec();
        for value in values.take_while({
            let mut left = bytes;
            move |value| {
                left = left.saturating_sub(value.len() + 1);
                left > 0
            }
        }) {
            text.extend_from_slice(b",");
            text.extend_from_slice(value.as_bytes());
        }
        text.extend_from_slice(b")\0\0\0");
        text
    }

    #[test]
    fn a_long_text_takes_less_and_comes_back() {
        for length in [COMPRESSED_FROM, 100_000, 500_000] {
            let body = in_list(length + 100);
            let stored = StoredText::new(&body);
            assert!(
                stored.stored_bytes() < body.len() * 6 / 10,
                "{} of {}",
                stored.stored_bytes(),
                body.len()
            );
            assert_eq!(stored.length(), body.len());
            assert_eq!(stored_bytes(&body), stored.stored_bytes());
            assert_eq!(*stored.body(), *body);
        }
    }

    #[test]
    fn a_short_text_and_one_that_saves_nothing_are_stored_as_they_are() {
        let short = in_list(1000);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random.to_le_bytes()[0]
        })
        .take(2 * COMPRESSED_FROM)
        .collect();
        for body in [short, noise, Vec::new()] {
            let stored = StoredText::new(&body);
            assert_eq!(stored.stored_bytes(), body.len());
            assert!(matches!(stored.body(), Body::Stored(same) if *same == *body));
        }
    }

    proptest! {
        #[test]
        fn every_text_comes_back(word in prop::collection::vec(any::<u8>(), 0..40), count in 0..2000_usize) {
            let body = word.repeat(count);
            prop_assert_eq!(&*StoredText::new(&body).body(), &*body);
        }
    }
}
