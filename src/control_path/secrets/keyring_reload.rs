//! The key ring of a node that runs. `pglobby key rotate` changes the file while nodes serve, so a node that meets a key
//! it does not know looks at the file again, by itself; and so does whoever is about to seal.
//!
//! Each version of the file is read once, whatever it holds: blobs that name keys nobody has cost no more than a `stat`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use secrecy::SecretString;
use tracing::{info, warn};

use super::{
    keyring::{Keyring, KeyringError},
    seal::{SealError, SecretLocation},
};
use crate::config::Config;

/// A ring and where it came from.
pub struct ReloadableKeyring {
    ring: ArcSwap<Keyring>,
    origin: Mutex<Origin>,
}

struct Origin {
    config: Config,
    /// The file as it was when it was last read, or tried to be.
    version: Option<Version>,
}

/// `replace_file` puts another file in the place of the old one, so the inode tells; the time, where somebody edits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    modified: (i64, i64),
}

impl ReloadableKeyring {
    /// The ring that `config` names.
    ///
    /// # Errors
    /// [`KeyringError`].
    pub fn load(config: &Config) -> Result<Self, KeyringError> {
        // Looked at before it is read: replaced in between, it is read once more, which does no harm.
        let version = version_of(config);
        let ring = Keyring::load(config)?;
        let origin = Origin { config: config.clone(), version };
        Ok(Self { ring: ArcSwap::from_pointee(ring), origin: Mutex::new(origin) })
    }

    /// Another configuration holds from now on, with another ring perhaps.
    pub fn replace(&self, other: Self) {
        let origin = other.origin.into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner) = origin;
        self.ring.store(other.ring.load_full());
    }

    /// The ring as it is in the file now; what was read last where that cannot be read. Whoever seals takes this one: a
    /// key that was retired meanwhile must seal nothing more.
    pub fn fresh(&self) -> Arc<Keyring> {
        self.look_again();
        self.ring.load_full()
    }

    /// [`Keyring::seal`], with the ring as it is now.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn seal(&self, place: &SecretLocation<'_>, secret: &SecretString) -> Result<Vec<u8>, SealError> {
        self.fresh().seal(place, secret)
    }

    /// [`Keyring::open`]; for a key that is not known, or is another, after another look at the file.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn open(&self, place: &SecretLocation<'_>, blob: &[u8]) -> Result<SecretString, SealError> {
        match self.ring.load().open(place, blob) {
            Err(SealError::UnknownKey { .. } | SealError::DoesNotOpen { .. }) if self.look_again() => {
                self.ring.load().open(place, blob)
            }
            opened => opened,
        }
    }

    /// Whether there was something new.
    fn look_again(&self) -> bool {
        let mut origin = self.origin.lock().unwrap_or_else(PoisonError::into_inner);
        let version = version_of(&origin.config);
        if version.is_none() || version == origin.version {
            return false;
        }
        origin.version = version;
        match Keyring::load(&origin.config) {
            Ok(ring) => {
                info!(writing = ring.writing_key(), "the key ring has changed and was read again");
                self.ring.store(Arc::new(ring));
                true
            }
            Err(error) => {
                warn!(%error, "the key ring has changed and cannot be read; the old one is used");
                false
            }
        }
    }
}

/// `None`: the ring is not in a file, or that is gone.
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
