//! Sealing: encrypts a credential for one column of one row of the central database, or other bytes for one purpose.
//!
//! A blob is `version (1) | key id length (1) | key id | nonce (24) | ciphertext and tag`,
//! XChaCha20-Poly1305. The associated data is the key id, table, row and column, so a blob that is copied
//! to another row does not open there.

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Generate as _, Payload},
};
use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

use super::keyring::{Keyring, is_key_id};

const VERSION: u8 = 1;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;

/// The column and row that a credential is sealed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SecretLocation<'a> {
    /// `tenants` or `hosts`.
    pub table: &'static str,
    /// The row's key: a tenant's id in decimal or a host's name.
    pub row: &'a str,
    /// `sealed_password`, `sealed_ro_password`, `sealed_admin_password`.
    pub column: &'static str,
}

/// What a blob is sealed for. It opens for nothing else.
#[derive(Clone, Copy)]
pub struct SealedFor<'a> {
    /// Different for each kind of blob.
    pub purpose: &'static str,
    /// Which one of its kind.
    pub which: [&'a str; 3],
    /// For errors.
    pub name: &'a dyn std::fmt::Display,
}

impl<'a> From<&'a SecretLocation<'_>> for SealedFor<'a> {
    fn from(place: &'a SecretLocation<'_>) -> Self {
        let which = [place.table, place.row, place.column];
        Self { purpose: "pglobby sealed credential", which, name: place }
    }
}

impl std::fmt::Display for SecretLocation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{} of {:?}", self.table, self.column, self.row)
    }
}

/// Why a secret could not be sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum SealError {
    /// Shorter than any blob.
    #[error("{place}: the sealed value is truncated ({bytes} bytes)")]
    Truncated { place: String, bytes: usize },
    /// Written by a newer version, or not by pglobby.
    #[error("{place}: the sealed value has format {version}, this pglobby knows format {VERSION}")]
    UnknownVersion { place: String, version: u8 },
    /// The key is not in the ring.
    #[error("{place}: sealed with key {key}, which is not in the key ring")]
    UnknownKey { place: String, key: String },
    /// The key is there, but the blob is of another place or damaged. The cipher cannot tell which.
    #[error("{place}: does not open with key {key}; it was sealed for another row or column, or altered")]
    DoesNotOpen { place: String, key: String },
    /// The cipher refused it; only for secrets over 256 GiB.
    #[error("{place}: could not be sealed")]
    CouldNotSeal { place: String },
}

impl Keyring {
    /// Encrypts `secret` for `place` with the sealing key.
    pub fn seal(&self, place: &SecretLocation<'_>, secret: &SecretString) -> Result<Vec<u8>, SealError> {
        self.seal_bytes(place.into(), secret.expose_secret().as_bytes())
    }

    /// Decrypts a blob sealed for `place`.
    pub fn open(&self, place: &SecretLocation<'_>, blob: &[u8]) -> Result<SecretString, SealError> {
        let plain = self.open_bytes(place.into(), blob)?;
        let does_not_open = |_| SealError::DoesNotOpen {
            place: place.to_string(),
            key: Self::key_of(blob).unwrap_or_default().to_owned(),
        };
        std::str::from_utf8(&plain).map(SecretString::from).map_err(does_not_open)
    }

    /// Encrypts bytes with the sealing key.
    pub fn seal_bytes(&self, bound_to: SealedFor<'_>, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        let failed = || SealError::CouldNotSeal { place: bound_to.name.to_string() };
        let id = self.writing_key();
        let key = self.key(id).ok_or_else(failed)?;
        let id_length = u8::try_from(id.len()).map_err(|_| failed())?;
        let nonce = XNonce::generate();
        let payload = Payload { msg: plain, aad: &associated_data(id, bound_to) };
        let ciphertext = XChaCha20Poly1305::new(key.into()).encrypt(&nonce, payload).map_err(|_| failed())?;
        Ok([&[VERSION, id_length], id.as_bytes(), &nonce[..], &ciphertext].concat())
    }

    /// Decrypts what [`Self::seal_bytes`] has sealed for the same.
    pub fn open_bytes(&self, bound_to: SealedFor<'_>, blob: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let Sealed { key_id, nonce, ciphertext } = Sealed::parse(bound_to.name, blob)?;
        let key = self.key(key_id).ok_or_else(|| SealError::UnknownKey {
            place: bound_to.name.to_string(),
            key: key_id.to_owned(),
        })?;
        let payload = Payload { msg: ciphertext, aad: &associated_data(key_id, bound_to) };
        let plain = XChaCha20Poly1305::new(key.into()).decrypt(&XNonce::from(*nonce), payload);
        plain
            .map(Zeroizing::new)
            .map_err(|_| SealError::DoesNotOpen { place: bound_to.name.to_string(), key: key_id.to_owned() })
    }

    /// Id of the key that sealed a blob; `None` if it is no blob.
    pub fn key_of(blob: &[u8]) -> Option<&str> {
        Sealed::parse(&"", blob).ok().map(|sealed| sealed.key_id)
    }
}

struct Sealed<'a> {
    key_id: &'a str,
    nonce: &'a [u8; NONCE_BYTES],
    ciphertext: &'a [u8],
}

impl<'a> Sealed<'a> {
    fn parse(place: &dyn std::fmt::Display, blob: &'a [u8]) -> Result<Self, SealError> {
        let truncated = || SealError::Truncated { place: place.to_string(), bytes: blob.len() };
        let (&version, rest) = blob.split_first().ok_or_else(truncated)?;
        if version != VERSION {
            return Err(SealError::UnknownVersion { place: place.to_string(), version });
        }
        let (&id_length, rest) = rest.split_first().ok_or_else(truncated)?;
        let (key_id, rest) = rest.split_at_checked(id_length.into()).ok_or_else(truncated)?;
        let (nonce, ciphertext) = rest.split_first_chunk().ok_or_else(truncated)?;
        if ciphertext.len() < TAG_BYTES {
            return Err(truncated());
        }
        let key_id = std::str::from_utf8(key_id).ok().filter(|id| is_key_id(id)).ok_or_else(|| {
            // Not a valid id. Escaped, because it goes into a log line.
            SealError::UnknownKey { place: place.to_string(), key: key_id.escape_ascii().to_string() }
        })?;
        Ok(Self { key_id, nonce, ciphertext })
    }
}

/// Each part is preceded by its length, so that no two places give the same bytes.
fn associated_data(key_id: &str, bound_to: SealedFor<'_>) -> Vec<u8> {
    let [first, second, third] = bound_to.which;
    let mut data = Vec::new();
    for part in [bound_to.purpose, key_id, first, second, third] {
        data.extend_from_slice(&(part.len() as u64).to_be_bytes());
        data.extend_from_slice(part.as_bytes());
    }
    data
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ACME: SecretLocation<'_> = SecretLocation { table: "tenants", row: "7", column: "sealed_password" };

    fn secret(text: &str) -> SecretString {
        SecretString::from(text)
    }

    #[test]
    fn a_blob_copied_to_another_row_or_column_does_not_open() {
        let ring = Keyring::generate();
        let blob = ring.seal(&ACME, &secret("pässword")).unwrap();

        assert_eq!(ring.open(&ACME, &blob).unwrap().expose_secret(), "pässword");
        for elsewhere in [
            SecretLocation { row: "8", ..ACME },
            SecretLocation { column: "sealed_ro_password", ..ACME },
            SecretLocation { table: "hosts", ..ACME },
            // The same letters, divided otherwise.
            SecretLocation { table: "tenants7", row: "", ..ACME },
        ] {
            let error = ring.open(&elsewhere, &blob).unwrap_err();
            assert!(matches!(error, SealError::DoesNotOpen { .. }), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_not_in_the_ring_is_named() {
        let old = Keyring::generate();
        let blob = old.seal(&ACME, &secret("x")).unwrap();

        let error = Keyring::generate().open(&ACME, &blob).unwrap_err();

        assert_eq!(
            error,
            SealError::UnknownKey { place: ACME.to_string(), key: old.writing_key().to_owned() }
        );
        assert_eq!(Keyring::key_of(&blob), Some(old.writing_key()));
    }

    #[test]
    fn what_an_older_key_sealed_still_opens_and_new_blobs_name_the_new_key() {
        let mut ring = Keyring::generate();
        let before = ring.seal(&ACME, &secret("old")).unwrap();
        let added = ring.add_key();
        let after = ring.seal(&ACME, &secret("new")).unwrap();

        assert_eq!(ring.open(&ACME, &before).unwrap().expose_secret(), "old");
        assert_eq!(ring.open(&ACME, &after).unwrap().expose_secret(), "new");
        assert_eq!(Keyring::key_of(&after), Some(added.as_str()));
    }

    #[test]
    fn sealing_twice_never_gives_the_same_bytes() {
        let ring = Keyring::generate();
        let twice = [ring.seal(&ACME, &secret("x")).unwrap(), ring.seal(&ACME, &secret("x")).unwrap()];
        assert_ne!(twice[0], twice[1]);
    }

    proptest! {
        #[test]
        fn whatever_is_sealed_opens_and_nothing_else_does(
            text in ".{0,200}", row in ".{0,40}", flip in any::<prop::sample::Index>(), bit in 0u8..8,
            cut in any::<prop::sample::Index>(),
        ) {
            let ring = Keyring::generate();
            let place = SecretLocation { row: &row, ..ACME };
            let blob = ring.seal(&place, &secret(&text)).unwrap();
            let opened = ring.open(&place, &blob).unwrap();
            prop_assert_eq!(opened.expose_secret(), text.as_str());

            let mut altered = blob.clone();
            altered[flip.index(blob.len())] ^= 1 << bit;
            prop_assert!(ring.open(&place, &altered).is_err());
            prop_assert!(ring.open(&place, &blob[..cut.index(blob.len())]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(blob in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Keyring::key_of(&blob);
            prop_assert!(Keyring::generate().open(&ACME, &blob).is_err());
        }
    }
}
