//! Texts that ran before their database's functions were loaded. Pure.

use crate::data_path::memory_limit::PIECE_BYTES;

/// Limit of the text kept for a transaction; beyond it, the transaction may have any side effect.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// The texts of one transaction, for a lookup after the load.
#[derive(Debug, Default)]
pub struct TextsBeforeLoad {
    /// The flag means that the encoding may hide word boundaries.
    texts: Vec<(Box<[u8]>, bool)>,
    bytes: usize,
}

impl TextsBeforeLoad {
    /// Adds a text.
    pub fn push(&mut self, text: &[u8], words_hidden: bool) {
        self.bytes = self.bytes.saturating_add(text.len() + size_of::<(Box<[u8]>, bool)>() + PIECE_BYTES);
        if self.bytes <= TEXT_BYTES_MAX {
            self.texts.push((text.into(), words_hidden));
        }
    }

    /// Returns all texts; `None` if they exceeded the limit.
    pub fn texts(&self) -> Option<impl Iterator<Item = (&[u8], bool)>> {
        let all = self.bytes <= TEXT_BYTES_MAX;
        all.then(|| self.texts.iter().map(|(text, words_hidden)| (&**text, *words_hidden)))
    }
}
