//! The key ring of a running node. `pglobby key rotate` changes the file while nodes serve. A node reads
//! the file again when it meets an unknown key, and before it seals.
//!
//! Each version of the file is read once. So blobs that name unknown keys cost no more than a `stat`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use secrecy::SecretString;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::{
    keyring::{Keyring, KeyringError},
    seal::{SealError, SealedFor, SecretLocation},
};
use crate::config::Config;

/// A key ring and its source.
pub struct ReloadableKeyring {
    ring: ArcSwap<Keyring>,
    origin: Mutex<Origin>,
}

struct Origin {
    config: Config,
    /// Version of the file at the last attempt to read it.
    version: Option<Version>,
}

/// A replaced file has another inode; an edited one another time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    modified: (i64, i64),
}

impl ReloadableKeyring {
    /// Loads the ring that `config` names.
    pub fn load(config: &Config) -> Result<Self, KeyringError> {
        // The version is read first: if the file is replaced in between, it is read once more later.
        let version = version_of(config);
        let ring = Keyring::load(config)?;
        let origin = Origin { config: config.clone(), version };
        Ok(Self { ring: ArcSwap::from_pointee(ring), origin: Mutex::new(origin) })
    }

    /// Takes over the ring and source of `other`, after a reload.
    pub fn replace(&self, other: Self) {
        let origin = other.origin.into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner) = origin;
        self.ring.store(other.ring.load_full());
    }

    /// The ring as it is in the file now, or as it was read last if the file cannot be read. Used for
    /// sealing: a key that was retired meanwhile must not seal.
    pub fn fresh(&self) -> Arc<Keyring> {
        self.reload_if_changed();
        self.ring.load_full()
    }

    /// [`Keyring::seal`] with the newest ring.
    pub fn seal(&self, place: &SecretLocation<'_>, secret: &SecretString) -> Result<Vec<u8>, SealError> {
        self.fresh().seal(place, secret)
    }

    /// [`Keyring::open`]; reads the file again if the key is unknown or does not open the blob.
    pub fn open(&self, place: &SecretLocation<'_>, blob: &[u8]) -> Result<SecretString, SealError> {
        self.open_with(|ring| ring.open(place, blob))
    }

    /// [`Keyring::open_bytes`], in the same way.
    pub fn open_bytes(&self, bound_to: SealedFor<'_>, blob: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        self.open_with(|ring| ring.open_bytes(bound_to, blob))
    }

    fn open_with<T>(&self, open: impl Fn(&Keyring) -> Result<T, SealError>) -> Result<T, SealError> {
        match open(&self.ring.load()) {
            Err(SealError::UnknownKey { .. } | SealError::DoesNotOpen { .. }) if self.reload_if_changed() => {
                open(&self.ring.load())
            }
            opened => opened,
        }
    }

    /// Reads the file if it has changed. Returns whether the ring is a new one.
    fn reload_if_changed(&self) -> bool {
        let mut origin = self.origin.lock().unwrap_or_else(PoisonError::into_inner);
        let version = version_of(&origin.config);
        if version.is_none() || version == origin.version {
            return false;
        }
        origin.version = version;
        match Keyring::load(&origin.config) {
            Ok(ring) => {
                info!(key = ring.writing_key(), "key ring reloaded");
                self.ring.store(Arc::new(ring));
                true
            }
            Err(error) => {
                warn!(%error, "cannot read the changed key ring; the old one stays in use");
                false
            }
        }
    }
}

/// `None`: the ring is not in a file, or the file is missing.
fn version_of(config: &Config) -> Option<Version> {
    let path: &Path = config.keys_file.as_deref().filter(|_| config.keys_text.is_none())?;
    let metadata = fs::metadata(path).ok()?;
    Some(Version { inode: metadata.ino(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
}

impl std::fmt::Debug for ReloadableKeyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ReloadableKeyring").field(&self.ring.load()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACME: SecretLocation<'_> = SecretLocation { table: "tenants", row: "7", column: "sealed_password" };

    #[test]
    fn a_key_added_while_it_runs_is_found_and_a_broken_file_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyring.toml");
        let mut ring = Keyring::generate();
        ring.create_file(&path).unwrap();
        let text = "[central]\nurl = \"postgres://m@h/c\"\n[keys]\nfile = \"keyring.toml\"\n";
        let config = Config::read(text, Some(&folder.path().join("proxy.toml")), &|_| None).unwrap();
        let live = ReloadableKeyring::load(&config).unwrap();

        let added = ring.add_key();
        let blob = ring.seal(&ACME, &SecretString::from("x")).unwrap();
        assert!(matches!(live.open(&ACME, &blob), Err(SealError::UnknownKey { .. })));
        ring.replace_file(&path).unwrap();
        assert!(live.open(&ACME, &blob).is_ok());

        fs::remove_file(&path).unwrap();
        fs::write(&path, "no ring").unwrap();
        let strange = Keyring::generate().seal(&ACME, &SecretString::from("x")).unwrap();
        assert!(matches!(live.open(&ACME, &strange), Err(SealError::UnknownKey { .. })));
        assert_eq!(live.fresh().writing_key(), added);
    }
}
