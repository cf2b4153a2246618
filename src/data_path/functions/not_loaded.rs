//! Texts that ran before anybody had read the functions of their database: a tenant's first. Pure.

use crate::data_path::memory_limit::PIECE_BYTES;

/// Bytes of text that are kept of one transaction; of a longer one nothing is known.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// The texts of one transaction, to be looked at when the functions have been read.
#[derive(Debug, Default)]
pub struct TextsBeforeLoad {
    /// And whether their encoding hides where words begin.
    texts: Vec<(Box<[u8]>, bool)>,
    bytes: usize,
}

impl TextsBeforeLoad {
    /// One more text.
    pub fn push(&mut self, text: &[u8], tangled: bool) {
        self.bytes = self.bytes.saturating_add(text.len() + size_of::<(Box<[u8]>, bool)>() + PIECE_BYTES);
        if self.bytes <= TEXT_BYTES_MAX {
            self.texts.push((text.into(), tangled));
        }
    }

    /// All of them; `None` if they were too long to be kept.
    pub fn texts(&self) -> Option<impl Iterator<Item = (&[u8], bool)>> {
        let all = self.bytes <= TEXT_BYTES_MAX;
        all.then(|| self.texts.iter().map(|(text, tangled)| (&**text, *tangled)))
    }
}
