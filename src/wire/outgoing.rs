//! The bytes to write for one chunk that was read.
//!
//! Most chunks are forwarded unchanged; then this is a range of the read buffer. If bytes are removed,
//! inserted or rewritten, a scratch buffer gathers them, so that there is still one write for each read.

/// The largest scratch buffer that is kept. One read with inserted bytes is nearly always smaller.
const SCRATCH_BYTES_KEPT: usize = 256 * 1024;

/// Gathers the bytes to write for one chunk. Pure.
#[derive(Debug)]
pub struct Outgoing<'c> {
    chunk: &'c [u8],
    /// The start and end of the part of `chunk` that follows `built`.
    run: (usize, usize),
    built: &'c mut Vec<u8>,
}

impl<'c> Outgoing<'c> {
    /// Starts empty. `scratch` is cleared, and freed if it is large.
    #[inline]
    pub fn new(chunk: &'c [u8], scratch: &'c mut Vec<u8>) -> Self {
        scratch.clear();
        if scratch.capacity() > SCRATCH_BYTES_KEPT {
            *scratch = Vec::new();
        }
        Self { chunk, run: (0, 0), built: scratch }
    }

    /// Forwards bytes. Bytes that follow each other in the chunk are not copied.
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
            self.flush_run();
            self.run = (start, start + bytes.len());
        }
    }

    /// The buffer for inserted bytes.
    #[inline]
    pub fn build(&mut self) -> &mut Vec<u8> {
        self.flush_run();
        self.built
    }

    /// Moves the run into the scratch buffer, unless that run is all there is and nothing will follow.
    #[inline]
    fn flush_run(&mut self) {
        let (start, end) = std::mem::take(&mut self.run);
        if start < end {
            self.built.extend_from_slice(self.chunk.get(start..end).unwrap_or_default());
        }
    }

    /// Inserted bytes so far, with the bytes of the chunk before them.
    #[inline]
    pub fn built(&self) -> usize {
        self.built.len()
    }

    /// The bytes to write, in one slice.
    pub fn finish(mut self) -> &'c [u8] {
        if self.built.is_empty() {
            return self.chunk.get(self.run.0..self.run.1).unwrap_or_default();
        }
        self.flush_run();
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
