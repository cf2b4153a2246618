//! Finds PostgreSQL's programs on this machine.
//!
//! Distributions differ in where they install them, and few put `initdb` on the PATH. A folder counts only
//! if `initdb`, `postgres` and `pg_ctl` in it all run and have the same version.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A folder with PostgreSQL's programs, which were run once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresBinaries {
    folder: PathBuf,
    major: u32,
}

/// PostgreSQL was not found. `Display` is one line that ends in what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum NoBinaries {
    /// The folder of the flag or of [`ENVIRONMENT`] has no usable programs.
    #[error("{folder:?} does not hold PostgreSQL's initdb, postgres and pg_ctl in a state that runs")]
    NotThere { folder: PathBuf },
    /// No usable folder was found.
    #[error(
        "PostgreSQL's initdb is not on this machine; install it with `{install}`, or name its folder with {ENVIRONMENT}"
    )]
    NotInstalled { install: &'static str },
    /// The version of a data folder is not installed.
    #[error(
        "the data was made by PostgreSQL {wanted}, which is not there (found: {found}); install it, or choose another data folder"
    )]
    NoSuchVersion { wanted: u32, found: String },
}

/// Environment variable for the folder of PostgreSQL's programs, if it is not found otherwise.
pub const ENVIRONMENT: &str = "PGLOBBY_POSTGRES_BIN";

impl PostgresBinaries {
    /// The folder `explicit`, or else [`ENVIRONMENT`], or else the first usable one of: `pg_config`, PATH,
    /// the folders of Debian, Red Hat, Homebrew and Alpine (newest version first).
    pub fn find(explicit: Option<&Path>) -> Result<Self, NoBinaries> {
        if let Some(folder) = named(explicit) {
            return Self::in_folder(&folder).ok_or(NoBinaries::NotThere { folder });
        }
        candidates()
            .iter()
            .find_map(|folder| Self::in_folder(folder))
            .ok_or(NoBinaries::NotInstalled { install: how_to_install() })
    }

    /// Like [`PostgresBinaries::find`] for one major version: a data folder needs the version that created
    /// it.
    pub fn find_major(explicit: Option<&Path>, wanted: u32) -> Result<Self, NoBinaries> {
        let folders = named(explicit).map_or_else(candidates, |folder| vec![folder]);
        let found: Vec<Self> = folders.iter().filter_map(|folder| Self::in_folder(folder)).collect();
        let versions = found.iter().map(|binaries| binaries.major.to_string()).collect::<Vec<_>>().join(", ");
        let versions = if versions.is_empty() { "none".to_owned() } else { versions };
        found
            .into_iter()
            .find(|binaries| binaries.major == wanted)
            .ok_or(NoBinaries::NoSuchVersion { wanted, found: versions })
    }

    /// The programs in `folder`, if they run.
    pub fn in_folder(folder: &Path) -> Option<Self> {
        // The real folder, because PostgreSQL finds its libraries relative to the program.
        let folder = fs::canonicalize(folder.join("initdb")).ok()?.parent()?.to_path_buf();
        let mut majors =
            ["initdb", "postgres", "pg_ctl"].map(|name| major_version(&folder.join(name))).into_iter();
        let major = majors.next()??;
        majors.all(|other| other == Some(major)).then_some(Self { folder, major })
    }

    /// A client program such as `psql` with its major version, searched in the same folders. It counts
    /// without the server's programs, because many machines have only the clients.
    pub fn find_client(program: &str) -> Option<(PathBuf, u32)> {
        named(None).into_iter().chain(folders()).find_map(|folder| {
            let path = folder.join(program);
            major_version(&path).map(|major| (path, major))
        })
    }

    /// The path of one of the programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The major version, such as 15.
    pub fn major(&self) -> u32 {
        self.major
    }
}

fn named(explicit: Option<&Path>) -> Option<PathBuf> {
    explicit
        .map(Path::to_path_buf)
        .or_else(|| env::var_os(ENVIRONMENT).filter(|it| !it.is_empty()).map(PathBuf::from))
}

/// Folders with `initdb`, the most likely first.
fn candidates() -> Vec<PathBuf> {
    let mut folders = folders();
    folders.retain(|folder| folder.join("initdb").exists());
    folders
}

/// Folders to search, the most likely first.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = ask_pg_config().into_iter().collect();
    folders.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    for (parent, prefix, below) in VERSIONED_FOLDERS {
        folders.extend(newest_first(Path::new(parent), prefix).into_iter().map(|folder| folder.join(below)));
    }
    folders.extend(PLAIN_FOLDERS.iter().map(PathBuf::from));
    folders
}

/// (parent, start of the version's folder name, what follows it).
const VERSIONED_FOLDERS: [(&str, &str, &str); 6] = [
    ("/usr/lib/postgresql", "", "bin"),          // Debian, Ubuntu
    ("/usr", "pgsql-", "bin"),                   // Red Hat, from postgresql.org
    ("/opt/homebrew/opt", "postgresql@", "bin"), // Homebrew on Apple silicon
    ("/usr/local/opt", "postgresql@", "bin"),    // Homebrew on Intel
    ("/usr/libexec", "postgresql", ""),          // Alpine
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

const PLAIN_FOLDERS: [&str; 3] = ["/usr/lib64/pgsql", "/usr/bin", "/usr/local/pgsql/bin"];

fn newest_first(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((version, entry.path()))
        })
        .collect();
    versions.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    versions.into_iter().map(|(_, path)| path).collect()
}

fn ask_pg_config() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").stdin(Stdio::null()).output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(folder.trim()))
}

fn major_version(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| parse_major(&String::from_utf8_lossy(&output.stdout))).flatten()
}

/// `initdb (PostgreSQL) 15.17 (Debian 15.17-0+deb12u1)`, `postgres (PostgreSQL) 18beta2`.
fn parse_major(version_line: &str) -> Option<u32> {
    let version = version_line.split_once("(PostgreSQL) ")?.1;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn how_to_install() -> &'static str {
    let installers = [
        ("apt-get", "apt-get install postgresql"),
        ("dnf", "dnf install postgresql-server"),
        ("apk", "apk add postgresql"),
        ("zypper", "zypper install postgresql-server"),
        ("pacman", "pacman -S postgresql"),
        ("brew", "brew install postgresql@17"),
    ];
    let on_path = |name: &str| {
        env::var_os("PATH").iter().flat_map(env::split_paths).any(|folder| folder.join(name).is_file())
    };
    installers
        .into_iter()
        .find(|(installer, _)| on_path(installer))
        .map_or("your system's package manager", |(_, command)| command)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn versions_are_read_as_every_packager_words_them() {
        assert_eq!(parse_major("initdb (PostgreSQL) 15.17 (Debian 15.17-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_major("postgres (PostgreSQL) 18beta2"), Some(18));
        assert_eq!(parse_major("pg_ctl (something else) 18"), None);
        assert_eq!(parse_major(""), None);
    }

    #[test]
    fn the_newest_version_comes_first_as_a_number() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["9", "16", "15", "common", "16.old"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let names: Vec<_> =
            newest_first(parent.path(), "").iter().map(|it| it.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["16", "15", "9"]);
    }

    #[test]
    fn a_folder_with_a_stray_wrapper_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, body: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        write("initdb", "echo 'initdb (PostgreSQL) 15.1'");
        write("pg_ctl", "echo 'pg_ctl (PostgreSQL) 15.1'");
        assert_eq!(PostgresBinaries::in_folder(folder.path()), None, "no postgres at all");

        write("postgres", "exec docker run postgres");
        assert_eq!(PostgresBinaries::in_folder(folder.path()), None, "a wrapper that does not answer");

        write("postgres", "echo 'postgres (PostgreSQL) 16.1'");
        assert_eq!(PostgresBinaries::in_folder(folder.path()), None, "another version");

        write("postgres", "echo 'postgres (PostgreSQL) 15.2'");
        assert_eq!(PostgresBinaries::in_folder(folder.path()).unwrap().major(), 15);
    }

    #[test]
    fn a_folder_that_is_named_and_does_not_serve_is_an_error_that_names_it() {
        let error = PostgresBinaries::find(Some(Path::new("/nowhere/bin"))).unwrap_err().to_string();
        assert!(error.contains("/nowhere/bin"), "{error}");
    }

    #[test]
    fn this_machine_has_one() {
        let found = PostgresBinaries::find(None).expect("the tests need PostgreSQL: run scripts/test");
        assert!(found.major() >= 13);
        assert_eq!(PostgresBinaries::find_major(None, found.major()).unwrap().major(), found.major());
    }
}
