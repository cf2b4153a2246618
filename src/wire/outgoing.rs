//! What a chunk becomes on its way to the other side.
//!
//! Most chunks leave as they came: then this is just a range of the read buffer and the bytes are written from there.
//! Only when something is left out, put in or rewritten are the bytes gathered in a scratch buffer, so that the
//! other side still gets one write for one read.

/// A scratch buffer is used again up to this; one read with what is put in is shorter nearly always.
const SCRATCH_BYTES_KEPT: usize = 256 * 1024;

/// Gathers the bytes to write for one chunk read. Pure.
#[derive(Debug)]
pub struct Outgoing<'c> {
    chunk: &'c [u8],
    /// The part of `chunk` that follows what is in `built`, if anything: start and end.
    run: (usize, usize),
    built: &'c mut Vec<u8>,
}

impl<'c> Outgoing<'c> {
    /// Starts with nothing. `scratch` is emptied, and given back where it has grown large.
    #[inline]
    pub fn new(chunk: &'c [u8], scratch: &'c mut Vec<u8>) -> Self {
        scratch.clear();
        if scratch.capacity() > SCRATCH_BYTES_KEPT {
            *scratch = Vec::new();
        }
        Self { chunk, run: (0, 0), built: scratch }
    }

    /// Passes bytes on. Costs nothing while they follow each other in the chunk; others are copied.
    #[inline]
    pub fn pass(&mut self, bytes: &[u8]) {
        let base = self.chunk.as_ptr() as usize;
        let start = (bytes.as_ptr() as usize).wrapping_sub(base);
        let inside = start < self.chunk.len() && bytes.len() <= self.chunk.len() - start;
        if !inside {
            self.build().extend_from_slice(bytes);
        } else if self.run.1 == start && self.run.0 < self.run.1 {
            self.run.1 += bytes.len();
        } else {
            self.settle();
            self.run = (start, start + bytes.len());
        }
    }

    /// The place to append bytes of our own.
    #[inline]
    pub fn build(&mut self) -> &mut Vec<u8> {
        self.settle();
        self.built
    }

    /// Moves the run into the scratch buffer, unless that run is all there is and nothing will follow.
    #[inline]
    fn settle(&mut self) {
        let (start, end) = std::mem::take(&mut self.run);
        if start < end {
            self.built.extend_from_slice(self.chunk.get(start..end).unwrap_or_default());
        }
    }

    /// Bytes of our own so far, with those of the chunk before them.
    #[inline]
    pub fn built(&self) -> usize {
        self.built.len()
    }

    /// The bytes to write, in one slice.
    pub fn finish(mut self) -> &'c [u8] {
        if self.built.is_empty() {
            return self.chunk.get(self.run.0..self.run.1).unwrap_or_default();
        }
        self.settle();
        self.built
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untouched_chunk_is_not_copied() {
        let chunk = b"abcdef".to_vec();
        let mut scratch = Vec::new();
        let mut out = Outgoing::new(&chunk, &mut scratch);
        out.pass(&chunk[..2]);
        out.pass(&chunk[2..6]);
        assert_eq!(out.finish().as_ptr(), chunk.as_ptr());
        assert!(scratch.is_empty());
    }

    #[test]
    fn what_is_left_out_put_in_and_foreign_comes_out_in_order() {
        let chunk = b"abcdef".to_vec();
        let mut scratch = Vec::new();
        let mut out = Outgoing::new(&chunk, &mut scratch);
        out.pass(&chunk[0..1]);
        out.pass(&chunk[2..3]);
        out.build().extend_from_slice(b"+");
        out.pass(b"foreign");
        out.pass(&chunk[4..6]);
        assert_eq!(out.finish(), b"ac+foreignef");
    }
}
