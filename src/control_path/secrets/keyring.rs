//! The key ring: named keys of 32 bytes. One key seals, all keys open (`seal.rs`).
//!
//! The ring is a TOML file that only its owner may read (or root's, which a group may read), or the same text in the
//! environment variable `PGLOBBY_KEYS`:
//!
//! ```toml
//! writing = "k20260131-x7q2"
//!
//! [keys]
//! "k20260131-x7q2" = "<32 bytes in base64>"
//! ```

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rand::Rng as _;
use secrecy::ExposeSecret as _;
use zeroize::Zeroizing;

use crate::config::Config;

/// Bytes of a sealing key (XChaCha20-Poly1305).
pub const KEY_BYTES: usize = 32;
/// Longest key id; it is written into every blob.
pub const KEY_ID_BYTES_MAX: usize = 64;
/// Letters of the random end of a generated id, so that two rings of one day have different key ids.
const ID_LETTERS: &[u8] = b"abcdefghjkmnpqrstvwxyz23456789";
/// Room for a thousand keys; a longer file is not a key ring.
const FILE_BYTES_MAX: u64 = 128 * 1024;

/// The keys, in memory. Zeroised on drop; `Debug` shows ids only.
#[derive(Clone)]
pub struct Keyring {
    writing: String,
    keys: BTreeMap<String, Zeroizing<[u8; KEY_BYTES]>>,
}

/// Why the key ring cannot be used. Never quotes its content.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum KeyringError {
    /// Neither `[keys] file` nor `PGLOBBY_KEYS`.
    #[error("no key ring is configured; set [keys] file in the configuration, or PGLOBBY_KEYS")]
    NotConfigured,
    /// The file is not there.
    #[error("key ring {} does not exist; `pglobby init` makes one", path.display())]
    Missing { path: PathBuf },
    /// `create_file` never overwrites: every sealed row would be lost with the keys.
    #[error("key ring {} exists already and is not overwritten", path.display())]
    Exists { path: PathBuf },
    /// Other users of this machine can read the file.
    #[error("key ring {} has mode {mode:04o}; run: chmod 600 {}", path.display(), path.display())]
    TooOpen { path: PathBuf, mode: u32 },
    /// An error of the operating system.
    #[error("key ring {}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
    /// Not a ring.
    #[error("{origin} is not a key ring: {problem}")]
    Invalid { origin: String, problem: String },
}

impl Keyring {
    /// The ring that `config` names: `PGLOBBY_KEYS` if it is set, otherwise `[keys] file`.
    ///
    /// # Errors
    /// [`KeyringError`]; a file others may read is refused.
    pub fn load(config: &Config) -> Result<Self, KeyringError> {
        match (&config.keys_text, &config.keys_file) {
            (Some(text), _) => Self::parse(text.expose_secret(), "PGLOBBY_KEYS"),
            (None, Some(path)) => Self::read_file(path),
            (None, None) => Err(KeyringError::NotConfigured),
        }
    }

    /// A ring with one new key.
    pub fn generate() -> Self {
        let mut ring = Self { writing: String::new(), keys: BTreeMap::new() };
        ring.add_key();
        ring
    }

    /// Adds a new key that seals from now on, and returns its id. Older keys still open.
    pub fn add_key(&mut self) -> String {
        let mut rng = rand::rng();
        let today = time::OffsetDateTime::now_utc();
        let id = loop {
            let suffix: String =
                (0..4).map(|_| char::from(ID_LETTERS[rng.random_range(0..ID_LETTERS.len())])).collect();
            let id = format!("k{}{:02}{:02}-{suffix}", today.year(), u8::from(today.month()), today.day());
            if !self.keys.contains_key(&id) {
                break id;
            }
        };
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        rng.fill(key.as_mut_slice());
        self.keys.insert(id.clone(), key);
        self.writing.clone_from(&id);
        id
    }

    /// Removes a key that seals nothing any more. `false`: the key is unknown, or the sealing one.
    pub fn remove_key(&mut self, id: &str) -> bool {
        id != self.writing && self.keys.remove(id).is_some()
    }

    /// Id of the key that seals.
    pub fn writing_key(&self) -> &str {
        &self.writing
    }

    /// Ids of all keys in alphabetical order.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    pub(in crate::control_path) fn key(&self, id: &str) -> Option<&[u8; KEY_BYTES]> {
        self.keys.get(id).map(|key| &**key)
    }

    /// Writes a new file, mode 0600, complete or not at all.
    pub fn create_file(&self, path: &Path) -> Result<(), KeyringError> {
        let io = |cause| KeyringError::Io { path: path.to_owned(), cause };
        let draft = self.write_draft(path).map_err(io)?;
        // A link fails if the file exists; a rename would overwrite it.
        let linked = fs::hard_link(&draft, path);
        let removed = fs::remove_file(&draft);
        match linked {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(KeyringError::Exists { path: path.to_owned() })
            }
            linked => linked.and(removed).and_then(|()| sync_folder(path)).map_err(io),
        }
    }

    /// Replaces the file atomically.
    ///
    /// # Errors
    /// What the operating system says; the old file stays valid then.
    pub fn replace_file(&self, path: &Path) -> Result<(), KeyringError> {
        let replace = || {
            let draft = self.write_draft(path)?;
            fs::rename(&draft, path).inspect_err(|_| drop(fs::remove_file(&draft)))?;
            sync_folder(path)
        };
        replace().map_err(|cause| KeyringError::Io { path: path.to_owned(), cause })
    }

    fn write_draft(&self, path: &Path) -> io::Result<PathBuf> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
        let draft = path.with_file_name(format!(".{name}.{:08x}", rand::random::<u32>()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(self.to_toml().as_bytes())
            .and_then(|()| file.sync_all())
            .inspect_err(|_| drop(fs::remove_file(&draft)))?;
        Ok(draft)
    }

    fn to_toml(&self) -> Zeroizing<String> {
        // Full capacity at once, so that growing leaves no copy of the keys in memory.
        let mut text = Zeroizing::new(String::with_capacity(512 + self.keys.len() * (KEY_ID_BYTES_MAX + 64)));
        text.push_str(
            "# The key ring of pglobby. It opens every sealed password. Without it no sealed password can be opened.\n",
        );
        text.push_str(
            "# Keep a copy in a safe place. `pglobby key rotate` adds keys, the old ones stay readable.\n\n",
        );
        // Writing to a String cannot fail.
        let _ = writeln!(text, "writing = \"{}\"\n\n[keys]", self.writing);
        for (id, key) in &self.keys {
            let encoded = Zeroizing::new(STANDARD.encode(key.as_slice()));
            let _ = writeln!(text, "\"{id}\" = \"{}\"", *encoded);
        }
        text
    }

    fn read_file(path: &Path) -> Result<Self, KeyringError> {
        let io = |cause: io::Error| match cause.kind() {
            io::ErrorKind::NotFound => KeyringError::Missing { path: path.to_owned() },
            _ => KeyringError::Io { path: path.to_owned(), cause },
        };
        let file = File::open(path).map_err(io)?;
        // Checks the open file, not the path, so that the checked file is the one read.
        let metadata = file.metadata().map_err(io)?;
        let mode = metadata.permissions().mode() & 0o7777;
        if is_too_open(mode, metadata.uid(), rustix::process::geteuid().as_raw()) {
            return Err(KeyringError::TooOpen { path: path.to_owned(), mode });
        }
        let size = usize::try_from(metadata.len().min(FILE_BYTES_MAX)).unwrap_or(0);
        let mut text = Zeroizing::new(String::with_capacity(size + 1));
        file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(io)?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses a ring. `origin` names its source in errors.
    ///
    /// # Errors
    /// [`KeyringError::Invalid`]; the parser's own words are left out, because they quote the line.
    pub fn parse(text: &str, origin: &str) -> Result<Self, KeyringError> {
        let invalid = |problem: String| KeyringError::Invalid { origin: origin.to_owned(), problem };
        let written: WrittenRing = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            invalid(format!(
                "line {line} is not as it should be (writing = \"ID\", then [keys] ID = \"BASE64\")"
            ))
        })?;
        let mut keys = BTreeMap::new();
        for (id, encoded) in written.keys {
            if !is_key_id(&id) {
                return Err(invalid(format!(
                    "a key id has 1 to {KEY_ID_BYTES_MAX} letters, digits, '-', '_' or '.'"
                )));
            }
            let bytes = STANDARD.decode(encoded.as_bytes()).map(Zeroizing::new);
            let key = bytes.ok().and_then(|bytes| <[u8; KEY_BYTES]>::try_from(bytes.as_slice()).ok());
            let key = key.ok_or_else(|| invalid(format!("key {id} is not {KEY_BYTES} bytes in base64")))?;
            keys.insert(id, Zeroizing::new(key));
        }
        if !keys.contains_key(&written.writing) {
            return Err(invalid("the writing key is not among its keys".to_owned()));
        }
        Ok(Self { writing: written.writing, keys })
    }
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring")
            .field("writing", &self.writing)
            .field("keys", &self.keys.keys())
            .finish_non_exhaustive()
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRing {
    writing: String,
    keys: BTreeMap<String, Zeroizing<String>>,
}

pub(in crate::control_path) fn is_key_id(id: &str) -> bool {
    (1..=KEY_ID_BYTES_MAX).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// PostgreSQL's rule for private keys. A file of root, as Kubernetes mounts a secret, may be readable by a group:
/// else only root could read it.
fn is_too_open(mode: u32, owner: u32, own_user: u32) -> bool {
    let refused = if owner == 0 && own_user != 0 { 0o037 } else { 0o077 };
    mode & refused != 0
}

/// Flushes the folder, so that the new name survives a crash.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ring: &Keyring) -> Vec<&str> {
        ring.key_ids().collect()
    }

    #[test]
    fn a_ring_read_back_is_the_ring_that_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyring.toml");
        let mut ring = Keyring::generate();
        ring.create_file(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);

        let first = ring.writing_key().to_owned();
        let second = ring.add_key();
        ring.replace_file(&path).unwrap();
        let read = Keyring::read_file(&path).unwrap();

        assert_eq!(read.writing_key(), second);
        assert_eq!(ids(&read), ids(&ring));
        assert_eq!(read.key(&first), ring.key(&first));
        let names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["keyring.toml"], "drafts are removed");
    }

    #[test]
    fn a_ring_is_never_overwritten_by_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyring.toml");
        let ring = Keyring::generate();
        ring.create_file(&path).unwrap();

        let error = Keyring::generate().create_file(&path).unwrap_err();

        assert!(matches!(error, KeyringError::Exists { .. }), "{error}");
        assert_eq!(Keyring::read_file(&path).unwrap().writing_key(), ring.writing_key());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_ring_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyring.toml");
        Keyring::generate().create_file(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();

        let error = Keyring::read_file(&path).unwrap_err().to_string();

        assert!(error.contains("has mode 0640; run: chmod 600"), "{error}");
        let missing = Keyring::read_file(&folder.path().join("none")).unwrap_err();
        assert!(matches!(missing, KeyringError::Missing { .. }), "{missing}");
    }

    #[test]
    fn a_ring_of_root_may_be_readable_by_a_group() {
        const ROOT: u32 = 0;
        const PGLOBBY: u32 = 6432;
        for (mode, owner, user, refused) in [
            (0o600, PGLOBBY, PGLOBBY, false),
            (0o440, ROOT, PGLOBBY, false),
            (0o640, ROOT, PGLOBBY, false),
            (0o640, PGLOBBY, PGLOBBY, true),
            (0o440, ROOT, ROOT, true),
            (0o460, ROOT, PGLOBBY, true),
            (0o444, ROOT, PGLOBBY, true),
        ] {
            assert_eq!(is_too_open(mode, owner, user), refused, "{mode:04o} of {owner} for {user}");
        }
    }

    #[test]
    fn errors_and_debug_never_show_a_key() {
        let ring = Keyring::generate();
        let text = ring.to_toml();
        let encoded = STANDARD.encode(ring.key(ring.writing_key()).unwrap());
        assert!(text.contains(&encoded));
        assert!(!format!("{ring:?}").contains(&encoded));

        for broken in [
            format!("writing = {encoded}"),
            format!("writing = \"a\"\nkeys = \"{encoded}\""),
            format!("writing = \"a\"\n[keys]\na = \"{}\"", &encoded[..40]),
            format!("writing = \"b\"\n[keys]\na = \"{encoded}\""),
            format!("writing = \"a b\"\n[keys]\n\"a b\" = \"{encoded}\""),
        ] {
            let error = Keyring::parse(&broken, "PGLOBBY_KEYS").unwrap_err().to_string();
            assert!(
                error.starts_with("PGLOBBY_KEYS is not a key ring") && !error.contains(&encoded[..20]),
                "{error}"
            );
        }
    }

    #[test]
    fn the_writing_key_cannot_be_forgotten() {
        let mut ring = Keyring::generate();
        let first = ring.writing_key().to_owned();
        assert!(!ring.remove_key(&first));
        let second = ring.add_key();
        assert!(ring.remove_key(&first));
        assert_eq!(ids(&ring), [second.as_str()]);
    }
}
