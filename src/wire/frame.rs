//! Finds the messages in a stream of bytes, for both directions.
//!
//! Only the five bytes of a header are read, unless the caller needs more. Bodies are slices of the received
//! chunk and are not copied. Bytes of an incomplete message are held only if the caller needs them together.
//! Pure: any split of a stream gives the same messages (property test below).
//!
//! Source: PostgreSQL documentation, "Message Formats": a type byte, a four-byte length that counts itself, a
//! body.

/// Bytes of a message's header.
pub const HEADER_BYTES: usize = 5;

/// The names in front of a Parse or Bind together take at most this much (64 KiB). PostgreSQL has no limit of
/// its own here; drivers use some tens of bytes.
pub const NAMES_BYTES_MAX: usize = 64 * 1024;

/// The buffer of a held message is freed if it is larger than this.
const HELD_BYTES_KEPT: usize = 1024;

/// How much of a message the caller needs at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The type and length only; the body may come in pieces.
    Header,
    /// The body's first `n` zero-terminated strings; the rest may come in pieces.
    Strings(u8),
    /// The whole message. The caller has checked the length, because the framer holds up to that many bytes.
    Whole,
}

/// A violation of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is less than four, or more than the type allows.
    #[error("invalid message length")]
    Length,
    /// There is no such message in this direction.
    #[error("invalid message type {0}")]
    Type(u8),
    /// Names longer than [`NAMES_BYTES_MAX`].
    #[error("the names in the message are longer than {NAMES_BYTES_MAX} bytes")]
    Names,
    /// A string that does not end within its message.
    #[error("invalid string in message")]
    Strings,
}

/// A message, or a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Header and body.
    Whole {
        /// The type byte.
        tag: u8,
        /// Header and body.
        bytes: &'a [u8],
    },
    /// Header and the first part of a body; [`Piece::Rest`] has the other parts.
    First {
        /// The type byte.
        tag: u8,
        /// Header and the received part of the body, at least as much as was needed.
        bytes: &'a [u8],
    },
    /// More of the body.
    Rest {
        /// The next part.
        bytes: &'a [u8],
        /// Whether the message ends here.
        last: bool,
    },
}

impl<'a> Piece<'a> {
    /// The bytes of this piece.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Whole { bytes, .. } | Self::First { bytes, .. } | Self::Rest { bytes, .. } => bytes,
        }
    }
}

/// The state of a stream between two chunks.
#[derive(Debug, Default)]
pub struct Framer {
    /// The beginning of a message of which more is needed.
    held: Vec<u8>,
    /// `held` was returned as a piece; the next call clears it.
    delivered: bool,
    /// Remaining body bytes of a message that is returned in pieces.
    body_left: usize,
}

impl Framer {
    /// Whether all bytes so far were returned as complete messages.
    pub fn at_boundary(&self) -> bool {
        self.body_left == 0 && (self.held.is_empty() || self.delivered)
    }

    /// Whether the next byte begins a message, and nothing is held.
    #[inline]
    pub fn is_clear(&self) -> bool {
        self.body_left == 0 && self.held.is_empty()
    }

    /// Whether a part of a message was returned and the rest has not arrived.
    pub fn mid_message(&self) -> bool {
        self.body_left > 0
    }

    /// Bytes allocated for held bytes.
    pub fn held_bytes(&self) -> usize {
        self.held.capacity()
    }

    /// Moves the held bytes to the end of `inbox`, as if they had not arrived yet.
    #[inline]
    pub fn take_held(&mut self, inbox: &mut Vec<u8>) {
        if !self.held.is_empty() {
            if !self.delivered {
                inbox.extend_from_slice(&self.held);
            }
            self.forget_held();
        }
    }

    /// Undoes the last piece, which began a message: the message will be returned again from its first byte.
    pub fn put_back(&mut self) {
        self.body_left = 0;
        self.forget_held();
    }

    /// Takes the next piece from the front of `chunk`; `None` when the chunk is empty.
    ///
    /// `need` is called once for each header with type and length (which includes itself, not the type).
    ///
    /// # Errors
    /// [`FrameError`]; the stream cannot be read any further.
    #[inline]
    pub fn next<'p, 'c: 'p>(
        &'p mut self,
        chunk: &mut &'c [u8],
        need: impl Fn(u8, usize) -> Result<Need, FrameError>,
    ) -> Result<Option<Piece<'p>>, FrameError> {
        self.next_within(chunk, need, |_| true)
    }

    /// The same. `may_hold` is called once for an incomplete message that is needed whole, with the bytes to
    /// hold. If it returns `false`, the message is returned in pieces.
    #[inline]
    pub fn next_within<'p, 'c: 'p>(
        &'p mut self,
        chunk: &mut &'c [u8],
        need: impl Fn(u8, usize) -> Result<Need, FrameError>,
        may_hold: impl FnMut(usize) -> bool,
    ) -> Result<Option<Piece<'p>>, FrameError> {
        let mut may_hold = may_hold;
        if self.delivered {
            self.forget_held();
        }
        if chunk.is_empty() {
            return Ok(None);
        }
        if self.body_left > 0 {
            return Ok(Some(self.rest(chunk)));
        }
        if !self.held.is_empty() {
            return self.continue_held(chunk, need, may_hold);
        }
        let Some((tag, length)) = header(chunk)? else {
            return Ok(self.hold(chunk));
        };
        let total = length + 1;
        let need = need(tag, length)?;
        if let Some((bytes, rest)) = chunk.split_at_checked(total) {
            *chunk = rest;
            return Ok(Some(Piece::Whole { tag, bytes }));
        }
        match need {
            Need::Whole if may_hold(total) => Ok(self.hold(chunk)),
            Need::Strings(count) if !has_strings(chunk, count)? => Ok(self.hold(chunk)),
            Need::Whole | Need::Header | Need::Strings(_) => {
                let bytes = std::mem::take(chunk);
                self.body_left = total - bytes.len();
                Ok(Some(Piece::First { tag, bytes }))
            }
        }
    }

    fn rest<'c>(&mut self, chunk: &mut &'c [u8]) -> Piece<'c> {
        let (bytes, rest) = chunk.split_at(self.body_left.min(chunk.len()));
        *chunk = rest;
        self.body_left -= bytes.len();
        Piece::Rest { bytes, last: self.body_left == 0 }
    }

    fn hold<'p>(&mut self, chunk: &mut &[u8]) -> Option<Piece<'p>> {
        self.held.extend_from_slice(std::mem::take(chunk));
        None
    }

    /// Continues a message that began in an earlier chunk; takes only the bytes that are needed.
    #[cold]
    fn continue_held<'p>(
        &'p mut self,
        chunk: &mut &[u8],
        need: impl Fn(u8, usize) -> Result<Need, FrameError>,
        mut may_hold: impl FnMut(usize) -> bool,
    ) -> Result<Option<Piece<'p>>, FrameError> {
        let begins = self.held.len() < HEADER_BYTES;
        self.take_until(HEADER_BYTES, chunk);
        let Some((tag, length)) = header(&self.held)? else {
            return Ok(None);
        };
        let total = length + 1;
        match need(tag, length)? {
            Need::Header => {}
            Need::Whole if begins && chunk.len() < total - self.held.len() && !may_hold(total) => {}
            Need::Whole => {
                self.take_until(total, chunk);
                if self.held.len() < total {
                    return Ok(None);
                }
            }
            Need::Strings(count) => {
                while self.held.len() < total && !has_strings(&self.held, count)? {
                    if chunk.is_empty() {
                        return Ok(None);
                    }
                    // In growing steps, because each one looks through all names again.
                    self.take_until((self.held.len() + self.held.len().max(256)).min(total), chunk);
                }
            }
        }
        self.body_left = total.saturating_sub(self.held.len());
        self.delivered = true;
        let bytes = self.held.as_slice();
        Ok(Some(if self.body_left == 0 { Piece::Whole { tag, bytes } } else { Piece::First { tag, bytes } }))
    }

    fn take_until(&mut self, length: usize, chunk: &mut &[u8]) {
        let wanted = length.saturating_sub(self.held.len()).min(chunk.len());
        let (taken, rest) = chunk.split_at(wanted);
        self.held.extend_from_slice(taken);
        *chunk = rest;
    }

    #[cold]
    fn forget_held(&mut self) {
        self.delivered = false;
        if self.held.capacity() > HELD_BYTES_KEPT {
            self.held = Vec::new();
        } else {
            self.held.clear();
        }
    }
}

/// Type and length of the message that `bytes` begin with; `None` if they do not hold a whole header.
#[inline]
pub fn header(bytes: &[u8]) -> Result<Option<(u8, usize)>, FrameError> {
    let &[tag, a, b, c, d, ..] = bytes else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length < 4 || length > i32::MAX as usize { Err(FrameError::Length) } else { Ok(Some((tag, length))) }
}

/// Whether `count` zero-terminated strings follow the header.
fn has_strings(message: &[u8], count: u8) -> Result<bool, FrameError> {
    let body = message.get(HEADER_BYTES..).unwrap_or_default();
    let names = &body[..body.len().min(NAMES_BYTES_MAX)];
    let found = names.iter().filter(|byte| **byte == 0).take(count.into()).count();
    match found == usize::from(count) {
        true => Ok(true),
        false if body.len() >= NAMES_BYTES_MAX => Err(FrameError::Names),
        false => Ok(false),
    }
}

/// Takes a zero-terminated string from the front of a body.
pub fn cstr<'a>(body: &mut &'a [u8]) -> Result<&'a [u8], FrameError> {
    let end = memchr::memchr(0, body).ok_or(FrameError::Strings)?;
    let (text, rest) = body.split_at(end);
    *body = rest.get(1..).unwrap_or_default();
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn need(tag: u8, _: usize) -> Result<Need, FrameError> {
        Ok(match tag {
            b'W' => Need::Whole,
            b'N' => Need::Strings(2),
            b'd' => Need::Header,
            other => return Err(FrameError::Type(other)),
        })
    }

    /// Feeds `stream` in chunks that end at `cuts`; returns each message and what was seen of it at first.
    fn messages(stream: &[u8], cuts: &[usize]) -> Vec<(u8, Vec<u8>)> {
        let mut framer = Framer::default();
        let mut seen: Vec<(u8, Vec<u8>)> = Vec::new();
        let mut start = 0;
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        cuts.push(stream.len());
        cuts.sort_unstable();
        for cut in cuts {
            let mut chunk = &stream[start..cut];
            start = cut;
            while let Some(piece) = framer.next(&mut chunk, need).unwrap() {
                match piece {
                    Piece::Whole { tag, bytes } => seen.push((tag, bytes.to_vec())),
                    Piece::First { tag, bytes } => {
                        assert_ne!(tag, b'W', "needed whole");
                        if tag == b'N' {
                            let mut body = &bytes[HEADER_BYTES..];
                            cstr(&mut body).unwrap();
                            cstr(&mut body).unwrap();
                        }
                        seen.push((tag, bytes.to_vec()));
                    }
                    Piece::Rest { bytes, .. } => seen.last_mut().unwrap().1.extend_from_slice(bytes),
                }
            }
        }
        assert!(framer.at_boundary());
        seen
    }

    proptest! {
        #[test]
        fn any_split_of_any_stream_gives_the_same_messages(
            parts in prop::collection::vec((0u8..3, prop::collection::vec(any::<u8>(), 0..600)), 0..8),
            cuts in prop::collection::vec(any::<usize>(), 0..40),
        ) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for (kind, body) in parts {
                let mut message = Vec::new();
                crate::wire::message::append(&mut message, [b'W', b'N', b'd'][usize::from(kind)], |out| {
                    if kind == 1 {
                        out.extend_from_slice(b"portal\0statement\0");
                    }
                    out.extend_from_slice(&body);
                });
                stream.extend_from_slice(&message);
                expected.push((message[0], message));
            }
            prop_assert_eq!(messages(&stream, &cuts), expected);
        }

        #[test]
        fn hostile_bytes_never_panic(stream in prop::collection::vec(any::<u8>(), 0..300), cut in any::<usize>()) {
            let mut framer = Framer::default();
            let cut = cut % (stream.len() + 1);
            'chunks: for mut chunk in [&stream[..cut], &stream[cut..]] {
                loop {
                    match framer.next(&mut chunk, |tag, _| Ok([Need::Header, Need::Strings(2), Need::Whole][usize::from(tag % 3)])) {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'chunks,
                    }
                }
            }
        }
    }

    #[test]
    fn a_length_that_does_not_count_itself_is_refused() {
        let mut framer = Framer::default();
        let mut chunk: &[u8] = &[b'd', 0, 0, 0, 3, 1, 2];
        assert_eq!(framer.next(&mut chunk, need), Err(FrameError::Length));
    }
}
