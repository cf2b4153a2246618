//! How a node marks a cancel request that it passes on to another node, so that it is not passed on for ever: by one byte behind the
//! key. Keys of clients have 4 bytes, or 32 in protocol 3.2.
//!
//! Pure.

/// To whom a cancel request was passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassedOn {
    /// To the node that should have the session.
    ToOwner,
    /// To every node.
    ToAll,
}

/// Bytes of the keys that sessions have.
const KEYS: [usize; 2] = [4, 32];

impl PassedOn {
    const fn mark(self) -> u8 {
        match self {
            Self::ToOwner => 1,
            Self::ToAll => 2,
        }
    }

    /// The key of a request, and whether a node has passed the request on.
    pub fn of(received: &[u8]) -> (&[u8], Option<Self>) {
        match received.split_last() {
            Some((mark, key)) if KEYS.contains(&key.len()) => {
                (key, Some(if *mark == Self::ToOwner.mark() { Self::ToOwner } else { Self::ToAll }))
            }
            _ => (received, None),
        }
    }

    /// The key as it is passed on.
    pub fn marked(self, key: &[u8]) -> Vec<u8> {
        [key, &[self.mark()]].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written_and_a_clients_key_has_none() {
        for length in KEYS {
            let key = vec![7; length];
            assert_eq!(PassedOn::of(&key), (&key[..], None));
            for to in [PassedOn::ToOwner, PassedOn::ToAll] {
                assert_eq!(PassedOn::of(&to.marked(&key)), (&key[..], Some(to)));
            }
        }
        assert_eq!(PassedOn::of(&[]), (&[][..], None));
        assert_eq!(PassedOn::of(&[1; 5]).1, Some(PassedOn::ToOwner));
        assert_eq!(PassedOn::of(&[0; 33]).1, Some(PassedOn::ToAll), "what is not known goes no further");
    }
}
