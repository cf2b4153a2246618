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
    const ALL: [Self; 2] = [Self::ToOwner, Self::ToAll];

    const fn mark(self) -> u8 {
        match self {
            Self::ToOwner => 1,
            Self::ToAll => 2,
        }
    }

    /// The key of a request, and whether a node has passed the request on. `None`: no session has such a key.
    pub fn of(received: &[u8]) -> Option<(&[u8], Option<Self>)> {
        if KEYS.contains(&received.len()) {
            return Some((received, None));
        }
        let (mark, key) = received.split_last().filter(|(_, key)| KEYS.contains(&key.len()))?;
        let to = Self::ALL.into_iter().find(|to| to.mark() == *mark)?;
        Some((key, Some(to)))
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
            assert_eq!(PassedOn::of(&key), Some((&key[..], None)));
            for to in PassedOn::ALL {
                assert_eq!(PassedOn::of(&to.marked(&key)), Some((&key[..], Some(to))));
                assert_eq!(PassedOn::of(&to.marked(&to.marked(&key))), None, "it is passed on once");
            }
        }
        for odd in [&[][..], &[1; 3], &[0; 5], &[3; 5], &[1; 6], &[0; 33], &[1; 256]] {
            assert_eq!(PassedOn::of(odd), None, "{odd:?}");
        }
    }
}
