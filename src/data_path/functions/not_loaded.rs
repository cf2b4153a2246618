//! Texts whose functions are not loaded yet, or are being loaded again. Pure.

use crate::data_path::memory_limit::PIECE_BYTES;

/// Limit of the text kept for a transaction; beyond it, the transaction may have any side effect.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// Limit of the text that a database's transactions may keep for a load.
const LOAD_BYTES_MAX: usize = 256 * 1024;

/// The texts of one transaction, for a lookup after the load.
#[derive(Debug, Default)]
pub struct TextsBeforeLoad {
    /// The flag means that the encoding may hide word boundaries.
    texts: Vec<(Box<[u8]>, bool)>,
    bytes: usize,
    /// Not all texts are kept.
    incomplete: bool,
}

impl TextsBeforeLoad {
    /// Adds a text.
    pub fn push(&mut self, text: &[u8], words_hidden: bool) {
        self.push_within(TEXT_BYTES_MAX, text, words_hidden);
    }

    /// Adds the texts of another transaction.
    pub fn extend(&mut self, other: &Self) {
        self.incomplete |= other.incomplete;
        for (text, words_hidden) in &other.texts {
            self.push_within(LOAD_BYTES_MAX, text, *words_hidden);
        }
    }

    fn push_within(&mut self, bytes_max: usize, text: &[u8], words_hidden: bool) {
        self.bytes = self.bytes.saturating_add(text.len() + size_of::<(Box<[u8]>, bool)>() + PIECE_BYTES);
        match self.bytes <= bytes_max {
            true => self.texts.push((text.into(), words_hidden)),
            false => self.incomplete = true,
        }
    }

    /// Returns all texts; `None` if they exceeded the limit.
    pub fn texts(&self) -> Option<impl Iterator<Item = (&[u8], bool)>> {
        (!self.incomplete).then(|| self.texts.iter().map(|(text, words_hidden)| (&**text, *words_hidden)))
    }
}
