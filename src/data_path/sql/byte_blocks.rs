//! Looks for bytes in a text, a block at a time.

/// Bytes of a block: the compiler makes a few vector instructions of it.
pub(super) const BLOCK_BYTES: usize = 32;

/// How many bytes a test sees beyond its place.
const AHEAD: usize = 3;

/// Whether `test` holds for the four bytes that begin at some place of `text`; behind its end there are blanks. The
/// test should have no branch, because it runs for all places of a block.
#[inline(always)]
pub fn any_place(text: &[u8], test: impl Fn([u8; 4]) -> bool) -> bool {
    let in_block = |block: &[u8; BLOCK_BYTES + AHEAD]| {
        // A number, because the compiler would make branches of a `bool`.
        let mut any = 0;
        for at in 0..BLOCK_BYTES {
            any |= u8::from(test([block[at], block[at + 1], block[at + 2], block[at + 3]]));
        }
        any != 0
    };
    let mut rest = text;
    while let Some(block) = rest.first_chunk() {
        if in_block(block) {
            return true;
        }
        rest = rest.get(BLOCK_BYTES..).unwrap_or_default();
    }
    let mut last = [b' '; 2 * BLOCK_BYTES + AHEAD];
    last[..rest.len()].copy_from_slice(rest);
    last.first_chunk().is_some_and(in_block)
        || rest.len() > BLOCK_BYTES && last[BLOCK_BYTES..].first_chunk().is_some_and(in_block)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_place_of_a_text_is_tested(length in 0usize..200, at in any::<prop::sample::Index>()) {
            let mut text = vec![b'a'; length];
            prop_assert!(!any_place(&text, |[byte, ..]| byte == b'x'));
            if length > 0 {
                text[at.index(length)] = b'x';
                prop_assert!(any_place(&text, |[byte, ..]| byte == b'x'));
            }
            if length > 3 {
                let at = at.index(length - 3);
                text[at..at + 4].copy_from_slice(b"bcde");
                prop_assert!(any_place(&text, |[a, b, c, d]| (a == b'b') & (b == b'c') & (c == b'd') & (d == b'e')));
            }
        }
    }
}
