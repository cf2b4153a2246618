//! The file of a snapshot: a line that says what it is, then sealed records, each with its length in front. The first
//! one is the snapshot. Each later one names rows that have changed since, and is appended as soon as the node hears of them.
//!
//! A record is sealed for its snapshot and its place in the file. What cannot be read to its end is refused as a whole, so
//! that no revocation at the end is lost.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::contents::{About, Contents};
use crate::{
    control_path::secrets::{
        keyring_reload::ReloadableKeyring,
        seal::{SealError, SealedFor},
    },
    data_path::tenant::DirectoryChange,
};

const FIRST_LINE: &[u8] = b"pglobby directory snapshot 1\n";
/// A larger file is none of ours: a thousand times what ten thousand logins take.
const FILE_BYTES_MAX: u64 = 4 << 30;

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum FileRefused {
    /// There is none yet.
    #[error("there is no file {}", path.display())]
    Missing { path: PathBuf },
    /// An error of the operating system.
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
    /// Not made by pglobby, or by another version.
    #[error("{} is not a snapshot of this version of pglobby", path.display())]
    Foreign { path: PathBuf },
    /// Cut off or altered.
    #[error("{} is damaged", path.display())]
    Damaged { path: PathBuf },
    /// It was sealed with another key, for another central database, or altered.
    #[error("{0}")]
    Sealed(SealError),
}

/// Where a snapshot is kept, and what it is sealed with and for.
#[derive(Clone)]
pub struct Place<'a> {
    pub path: &'a Path,
    /// The name of the central database.
    pub database: &'a str,
    pub keyring: &'a ReloadableKeyring,
}

/// A file that this process has written and appends to.
pub struct OpenFile {
    file: File,
    /// Of its snapshot.
    id: String,
    /// Records after the first one.
    appended: usize,
}

impl Place<'_> {
    /// Writes a new file in the place of the old one, complete or not at all, with mode 0600. `changes`: what has
    /// changed since its reading began.
    pub fn write(&self, contents: &Contents, changes: &[DirectoryChange]) -> io::Result<OpenFile> {
        let id = contents.about.id.clone();
        let mut records = self.seal("", 0, &contents.to_bytes()?)?;
        if !changes.is_empty() {
            records.extend(self.seal(&id, 1, &serde_json::to_vec(changes)?)?);
        }
        let name = self.path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
        let draft = self.path.with_file_name(format!(".{name}.{:08x}", rand::random::<u32>()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        let written = file
            .write_all(FIRST_LINE)
            .and_then(|()| file.write_all(&records))
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&draft, self.path));
        written.inspect_err(|_| drop(fs::remove_file(&draft)))?;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(OpenFile { file, id, appended: usize::from(!changes.is_empty()) })
    }

    /// Appends a record of what has changed. The error may say that another process has replaced the file.
    pub fn append(&self, open: &mut OpenFile, changes: &[DirectoryChange]) -> io::Result<()> {
        let (ours, named) = (open.file.metadata()?, fs::metadata(self.path)?);
        if (ours.dev(), ours.ino()) != (named.dev(), named.ino()) {
            return Err(io::Error::other("another process has replaced it"));
        }
        let record = self.seal(&open.id, open.appended + 1, &serde_json::to_vec(changes)?)?;
        open.file.write_all(&record)?;
        open.file.sync_data()?;
        open.appended += 1;
        Ok(())
    }

    /// Reads the snapshot, and what has changed since it was taken.
    pub fn read(&self) -> Result<(Contents, Vec<DirectoryChange>), FileRefused> {
        let path = || self.path.to_owned();
        let bytes = self.bytes()?;
        let mut rest = bytes.strip_prefix(FIRST_LINE).ok_or_else(|| FileRefused::Foreign { path: path() })?;
        let damaged = || FileRefused::Damaged { path: path() };
        let first = record(&mut rest).ok_or_else(damaged)?;
        let open = |id: &str, number: usize, record: &[u8]| {
            let place = self.path.display().to_string();
            let opened =
                self.keyring.open_bytes(sealed_for(self.database, id, &number.to_string(), &place), record);
            opened.map_err(FileRefused::Sealed)
        };
        let contents = Contents::from_bytes(&open("", 0, first)?).map_err(|_| damaged())?;
        let mut changes: Vec<DirectoryChange> = Vec::new();
        let mut number = 0;
        while !rest.is_empty() {
            number += 1;
            let plain = open(&contents.about.id, number, record(&mut rest).ok_or_else(damaged)?)?;
            changes.extend(serde_json::from_slice::<Vec<_>>(&plain).map_err(|_| damaged())?);
        }
        Ok((contents, changes))
    }

    fn bytes(&self) -> Result<Vec<u8>, FileRefused> {
        let path = || self.path.to_owned();
        let failed = |cause: io::Error| match cause.kind() {
            io::ErrorKind::NotFound => FileRefused::Missing { path: path() },
            _ => FileRefused::Io { path: path(), cause },
        };
        let file = File::open(self.path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length > FILE_BYTES_MAX {
            return Err(FileRefused::Foreign { path: path() });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }

    fn seal(&self, id: &str, number: usize, plain: &[u8]) -> io::Result<Vec<u8>> {
        let place = self.path.display().to_string();
        let number = number.to_string();
        let bound_to = sealed_for(self.database, id, &number, &place);
        let sealed = self.keyring.fresh().seal_bytes(bound_to, plain).map_err(io::Error::other)?;
        Ok([&(sealed.len() as u64).to_be_bytes()[..], &sealed].concat())
    }
}

/// `id` and `number`: of the snapshot and of the record in it; the snapshot itself has number 0 and no id yet.
fn sealed_for<'a>(
    database: &'a str,
    id: &'a str,
    number: &'a str,
    name: &'a dyn std::fmt::Display,
) -> SealedFor<'a> {
    SealedFor { purpose: "pglobby directory snapshot", which: [database, id, number], name }
}

fn record<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, more) = rest.split_first_chunk()?;
    let (record, more) = more.split_at_checked(usize::try_from(u64::from_be_bytes(*length)).ok()?)?;
    *rest = more;
    Some(record)
}

impl About {
    /// `taken by NODE from URL`, for the log.
    pub fn origin(&self) -> String {
        format!("{} from {}", self.taken_by, self.url)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::{config::Config, control_path::secrets::keyring::Keyring};

    fn keyring(folder: &TempDir) -> ReloadableKeyring {
        let path = folder.path().join("keyring.toml");
        if !path.exists() {
            Keyring::generate().create_file(&path).unwrap();
        }
        let text = "[central]\nurl = \"postgres://m@h/c\"\n[keys]\nfile = \"keyring.toml\"\n";
        let config = Config::read(text, Some(&folder.path().join("proxy.toml")), &|_| None).unwrap();
        ReloadableKeyring::load(&config).unwrap()
    }

    #[test]
    fn what_has_changed_since_is_read_with_the_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        let (keyring, path) = (keyring(&folder), folder.path().join("snapshot"));
        let place = Place { path: &path, database: "central", keyring: &keyring };
        assert!(matches!(place.read().err(), Some(FileRefused::Missing { .. })));
        let changes = [
            DirectoryChange::Login(1),
            DirectoryChange::LoginName("a\nb".into()),
            DirectoryChange::Tenant(7),
        ];

        let mut file = place.write(&Contents::empty("one"), &changes[..1]).unwrap();
        place.append(&mut file, &changes[1..2]).unwrap();
        place.append(&mut file, &changes[2..]).unwrap();

        let (contents, read) = place.read().unwrap();
        assert_eq!((contents.about.id.as_str(), read.as_slice()), ("one", &changes[..]));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let another = Place { database: "another", ..place.clone() };
        assert!(matches!(another.read().err(), Some(FileRefused::Sealed(_))));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no draft is left");
    }

    #[test]
    fn a_file_that_another_process_has_replaced_is_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let (keyring, path) = (keyring(&folder), folder.path().join("snapshot"));
        let place = Place { path: &path, database: "central", keyring: &keyring };
        let mut ours = place.write(&Contents::empty("ours"), &[]).unwrap();
        let mut theirs = place.write(&Contents::empty("theirs"), &[]).unwrap();

        assert!(place.append(&mut ours, &[DirectoryChange::Login(1)]).is_err());
        place.append(&mut theirs, &[DirectoryChange::Login(2)]).unwrap();

        let (contents, changes) = place.read().unwrap();
        assert_eq!(contents.about.id, "theirs");
        assert_eq!(changes, [DirectoryChange::Login(2)]);
    }

    #[test]
    fn a_record_of_another_snapshot_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (keyring, path) = (keyring(&folder), folder.path().join("snapshot"));
        let place = Place { path: &path, database: "central", keyring: &keyring };
        place.write(&Contents::empty("one"), &[]).unwrap();
        let plain = fs::read(&path).unwrap().len();
        place.write(&Contents::empty("one"), &[DirectoryChange::Login(1)]).unwrap();
        let record = fs::read(&path).unwrap()[plain..].to_vec();
        place.write(&Contents::empty("two"), &[]).unwrap();
        fs::write(&path, [fs::read(&path).unwrap(), record].concat()).unwrap();

        assert!(matches!(place.read().err(), Some(FileRefused::Sealed(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_file_that_is_cut_or_altered_gives_nothing_or_whole_records(
            appended in 0_i64..4, at in any::<prop::sample::Index>(), flip in prop::option::of(0_u8..8),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let (keyring, path) = (keyring(&folder), folder.path().join("snapshot"));
            let place = Place { path: &path, database: "central", keyring: &keyring };
            let mut file = place.write(&Contents::empty("one"), &[]).unwrap();
            let mut ends = vec![fs::read(&path).unwrap().len()];
            for id in 0..appended {
                place.append(&mut file, &[DirectoryChange::Login(id)]).unwrap();
                ends.push(fs::read(&path).unwrap().len());
            }
            let mut bytes = fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            match flip {
                Some(bit) => bytes[at] ^= 1 << bit,
                None => bytes.truncate(at),
            }
            fs::write(&path, &bytes).unwrap();
            match place.read() {
                Ok((_, changes)) => prop_assert!(flip.is_none() && ends.contains(&at) && changes.len() < ends.len()),
                Err(FileRefused::Missing { .. } | FileRefused::Io { .. }) => prop_assert!(false, "it is there"),
                Err(_) => {}
            }
        }
    }
}
