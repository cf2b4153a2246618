//! Copies a whole database with `pg_dump` and `pg_restore`: into a file, or from host to host.
//!
//! `pg_dump` logs in as the host's administrator and only reads tables and catalogs. It runs no view,
//! function or policy of the tenant ([`master_session`](super::tenant_database)). `pg_restore` runs code
//! that the tenant defined (constraints, defaults, indexes, types), so it logs in as the tenant's own role.
//! Passwords go into the environment of the child process, which only its user and root can read, never
//! into its arguments.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use secrecy::{ExposeSecret as _, SecretString};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};

use super::{
    actor::AdminError,
    host_connection::{HostAdmin, HostSession},
    host_locks::Dumping,
};
use crate::{config::TlsMode, local_postgres::binaries::PostgresBinaries};

/// How much of a program's error output is reported.
const TOLD_BYTES_MAX: usize = 600;

/// `pg_dump` and `pg_restore` of one version.
#[derive(Debug)]
pub struct CopyPrograms {
    binaries: PostgresBinaries,
}

/// The output of pg_dump in its custom format, without rows.
#[derive(Debug)]
pub struct Definitions(Vec<u8>);

/// Which definitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of them.
    All,
    /// Tables and what they need.
    BeforeRows,
    /// Indexes, foreign keys and triggers.
    AfterRows,
}

/// A tenant's own role in its database, as which pg_restore and psql log in.
#[derive(Debug, Clone, Copy)]
pub struct Restorer<'a> {
    /// Its host.
    pub host: &'a HostAdmin,
    /// The database.
    pub database: &'a str,
    /// The tenant's role.
    pub role: &'a str,
    /// Its password.
    pub password: &'a SecretString,
}

impl CopyPrograms {
    /// Programs of the server's version or a newer one.
    pub async fn for_server(session: &HostSession) -> Result<Self, AdminError> {
        let major = u32::try_from(session.rights().await?.server_version / 10_000).unwrap_or_default();
        let found = PostgresBinaries::find_major(None, major).or_else(|_| PostgresBinaries::find(None));
        let binaries = found.map_err(|error| AdminError::Refused(error.to_string()))?;
        if binaries.major() < major {
            return Err(AdminError::Refused(format!(
                "the server is PostgreSQL {major}, and pg_dump on this machine is {}, which cannot read it; install a \
                 newer one, or name its folder with {}",
                binaries.major(),
                crate::local_postgres::binaries::ENVIRONMENT
            )));
        }
        Ok(Self { binaries })
    }

    /// pg_dump as the administrator, after a check that none of the tenant's code would run.
    async fn dump<'a>(
        &self,
        admin: &'a HostAdmin,
        database: &'a str,
    ) -> Result<(Command, Dumping<'a>), AdminError> {
        let options = admin.dump_options(database).await?;
        let mut command = self.program("pg_dump", admin, database, &admin.user, admin.password.as_ref());
        command.env("PGOPTIONS", options).stdout(Stdio::piped());
        let dumping = Dumping::of(admin, database);
        command.env("PGAPPNAME", &dumping.name);
        command.arg(format!("--lock-wait-timeout={}", Dumping::PATIENCE.as_millis()));
        Ok((command, dumping))
    }

    /// pg_restore as the tenant's role, in one transaction. It reads the archive from standard input.
    fn restore_as(&self, to: &Restorer<'_>) -> Command {
        let mut command = self.program("pg_restore", to.host, to.database, to.role, Some(to.password));
        command.args(["--no-owner", "--no-privileges", "--no-tablespaces", "--exit-on-error"]);
        command.args(["--single-transaction", "--dbname"]).arg(connection_string(to.database));
        command.stdout(Stdio::null());
        command
    }

    fn program(
        &self,
        name: &str,
        host: &HostAdmin,
        database: &str,
        user: &str,
        password: Option<&SecretString>,
    ) -> Command {
        client_program(&self.binaries.program(name), host, database, user, password)
    }

    /// Writes `database` to a new file that only its owner can read, in pg_dump's custom format. The file
    /// appears complete or not at all.
    ///
    /// # Errors
    /// The file exists, the disk is full, or pg_dump's error output.
    pub async fn dump_to(&self, admin: &HostAdmin, database: &str, file: &Path) -> Result<(), AdminError> {
        refuse_existing(file)?;
        let (mut command, dumping) = self.dump(admin, database).await?;
        let unfinished = unfinished(file);
        let wrong = |error: std::io::Error| AdminError::Refused(format!("{}: {error}", unfinished.display()));
        let _ = fs::remove_file(&unfinished);
        let out =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished).map_err(wrong)?;
        let mut to = tokio::fs::File::from_std(out.try_clone().map_err(wrong)?);
        let child = command.arg("--format=custom").spawn();
        let mut child = child.map_err(|error| not_started("pg_dump", &error))?;
        let from = child.stdout.take();
        // pglobby writes the file itself, because pg_dump ends with success if the disk is full for the
        // last kilobytes.
        let written = async {
            if let Some(mut from) = from {
                tokio::io::copy(&mut from, &mut to).await?;
            }
            to.flush().await
        };
        let dumped = async {
            let (written, dumped) = tokio::join!(written, finished("pg_dump", Ok(child)));
            written.map_err(wrong).and(dumped)
        };
        let dumped = dumping.see_through(dumped).await;
        let dumped = dumped.and_then(|_| keep(&out, &unfinished, file).map_err(wrong));
        if dumped.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        dumped
    }

    /// The definitions in `database`, without rows, owners and privileges.
    pub async fn definitions(
        &self,
        admin: &HostAdmin,
        database: &str,
        part: Part,
    ) -> Result<Definitions, AdminError> {
        let (mut dump, dumping) = self.dump(admin, database).await?;
        dump.args(["--format=custom", "--no-owner", "--no-privileges"]);
        dump.arg(match part {
            Part::All => "--schema-only",
            Part::BeforeRows => "--section=pre-data",
            Part::AfterRows => "--section=post-data",
        });
        Ok(Definitions(dumping.see_through(finished("pg_dump", dump.spawn())).await?))
    }

    /// The same as SQL, to be compared; without publications and subscriptions.
    pub async fn statements(&self, definitions: &Definitions) -> Result<String, AdminError> {
        let mut restore = Command::new(self.binaries.program("pg_restore"));
        restore.args([
            "--file=-",
            "--no-owner",
            "--no-privileges",
            "--no-publications",
            "--no-subscriptions",
        ]);
        let text = fed(restore.stdout(Stdio::piped()), &definitions.0).await?;
        Ok(without_restriction(&String::from_utf8_lossy(&text)))
    }

    /// Creates the `definitions` as the tenant's role, without extensions and without the schemas `made`
    /// (by oid on the old host), which exist already.
    ///
    /// # Errors
    /// pg_restore's error output. Objects that this role may not create are errors.
    pub async fn define(
        &self,
        to: &Restorer<'_>,
        definitions: &Definitions,
        made: &[u32],
    ) -> Result<(), AdminError> {
        let mut list = Command::new(self.binaries.program("pg_restore"));
        let list = fed(list.arg("--list").stdout(Stdio::piped()), &definitions.0).await?;
        let wanted = ListFile::new(&still_to_make(&String::from_utf8_lossy(&list), made))?;
        let mut restore = self.restore_as(to);
        restore.arg("--use-list").arg(&wanted.0);
        fed(&mut restore, &definitions.0).await.map(drop)
    }

    /// Copies rows of all tables except `left_out` (quoted names), values of sequences, and large objects.
    pub async fn copy_rows(
        &self,
        from: &HostAdmin,
        to: &Restorer<'_>,
        left_out: &[String],
    ) -> Result<(), AdminError> {
        let (mut dump, of_dump) = self.dump(from, to.database).await?;
        dump.args(["--format=custom", "--section=data"]);
        dump.args(left_out.iter().map(|table| format!("--exclude-table-data={table}")));
        let mut dumping = dump.spawn().map_err(|error| not_started("pg_dump", &error))?;
        let stdout = dumping.stdout.take().map(TryInto::<Stdio>::try_into).transpose();
        let stdout = stdout.map_err(|error| not_started("pg_restore", &error))?.unwrap_or_else(Stdio::null);
        let mut restore = self.restore_as(to);
        let restoring = restore.stdin(stdout).spawn();
        drop(restore); // and with it our end of the pipe
        let dumped = of_dump.see_through(finished("pg_dump", Ok(dumping)));
        let (dumped, restored) = tokio::join!(dumped, finished("pg_restore", restoring));
        // If one program dies, the other reports a broken pipe: both messages are kept.
        match (dumped, restored) {
            (Ok(_), restored) => restored.map(drop),
            (dumped, Ok(_)) => dumped.map(drop),
            (Err(one), Err(other)) => Err(AdminError::Refused(format!("{other}; {one}"))),
        }
    }
}

/// A program that connects to `database` by libpq's environment variables. None of the caller's own is kept, nor
/// psql's.
pub(super) fn client_program(
    program: &Path,
    host: &HostAdmin,
    database: &str,
    user: &str,
    password: Option<&SecretString>,
) -> Command {
    let mut command = Command::new(program);
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("PG") || name.starts_with("PSQL") {
            command.env_remove(variable);
        }
    }
    let (names, ports, finds_primary) = host.for_libpq();
    if finds_primary {
        command.env("PGTARGETSESSIONATTRS", "read-write");
    }
    command
        .env("PGHOST", names)
        .env("PGPORT", ports)
        .env("PGUSER", user)
        .env("PGDATABASE", database)
        .env("PGAPPNAME", "pglobby")
        .env("PGSSLMODE", host.tls_mode.word())
        .kill_on_drop(true)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    match (&host.tls_root_ca, host.tls_mode) {
        (Some(root_ca), _) => {
            command.env("PGSSLROOTCERT", root_ca);
        }
        // The system's authorities; libpq's own default is a file in the home folder. `system` exists
        // since version 16.
        (None, TlsMode::VerifyFull) => {
            command.env("PGSSLROOTCERT", "system");
        }
        (None, _) => {}
    }
    if let Some(password) = password {
        command.env("PGPASSWORD", password.expose_secret());
    }
    command
}

/// Lines of an archive's list that name the objects to restore: `3; 3079 16385 EXTENSION - pg_trgm`.
fn still_to_make(list: &str, made: &[u32]) -> String {
    let there = |line: &str| {
        let Some((_, entry)) = line.split_once("; ") else { return false };
        let mut words = entry.splitn(3, ' ').skip(1);
        let oid = words.next().and_then(|oid| oid.parse::<u32>().ok());
        let what = words.next().unwrap_or_default();
        what.starts_with("EXTENSION - ")
            || what.starts_with("COMMENT - EXTENSION ")
            || (what.starts_with("SCHEMA - ") && oid.is_some_and(|oid| made.contains(&oid)))
    };
    list.split_inclusive('\n').filter(|line| !there(line)).collect()
}

/// A file for `pg_restore --use-list`. It is removed on drop.
struct ListFile(PathBuf);

impl ListFile {
    fn new(list: &str) -> Result<Self, AdminError> {
        let path = std::env::temp_dir().join(format!("pglobby-{:032x}.list", rand::random::<u128>()));
        let wrong = |error: std::io::Error| AdminError::Refused(format!("{}: {error}", path.display()));
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(wrong)?;
        let file_of_ours = Self(path.clone());
        file.write_all(list.as_bytes()).map_err(wrong)?;
        Ok(file_of_ours)
    }
}

impl Drop for ListFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs pg_restore on an archive and returns its output.
async fn fed(restore: &mut Command, archive: &[u8]) -> Result<Vec<u8>, AdminError> {
    let child = restore.stdin(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn();
    let mut child = child.map_err(|error| not_started("pg_restore", &error))?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // If pg_restore stops reading, its own error says why.
            let _ = stdin.write_all(archive).await;
        }
    };
    let ((), restored) = tokio::join!(feed, finished("pg_restore", Ok(child)));
    restored
}

/// Refuses a file that exists.
pub fn refuse_existing(file: &Path) -> Result<(), AdminError> {
    if file.exists() {
        return Err(AdminError::Exists(format!("{} exists already; name another file", file.display())));
    }
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match folder.is_dir() {
        true => Ok(()),
        false => Err(AdminError::Invalid(format!("there is no folder {}", folder.display()))),
    }
}

/// Newer versions of pg_dump put `\restrict` and `\unrestrict` lines with a random word around the text.
fn without_restriction(text: &str) -> String {
    let word = text.lines().find_map(|line| line.strip_prefix(r"\restrict "));
    let ours = |line: &str| {
        let said = line.strip_prefix(r"\restrict ").or_else(|| line.strip_prefix(r"\unrestrict "));
        said.is_some() && said == word
    };
    text.split_inclusive('\n').filter(|line| !ours(line.trim_end())).collect()
}

/// `--dbname` takes a connection string, and a database name with `=` would be read as one.
pub(super) fn connection_string(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', r"\\").replace('\'', r"\'"))
}

fn unfinished(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

/// Moves the file, flushed to disk, to its own name.
fn keep(out: &File, unfinished: &Path, file: &Path) -> std::io::Result<()> {
    out.sync_all()?;
    fs::hard_link(unfinished, file)?; // which, unlike a rename, never replaces anything
    fs::remove_file(unfinished)
}

/// Its standard output, unless that was redirected.
async fn finished(program: &str, child: std::io::Result<Child>) -> Result<Vec<u8>, AdminError> {
    let child = child.map_err(|error| not_started(program, &error))?;
    let Output { status, stderr, stdout } =
        child.wait_with_output().await.map_err(|error| not_started(program, &error))?;
    if status.success() {
        return Ok(stdout);
    }
    Err(AdminError::Refused(format!("{program} failed ({status}): {}", own_words(&stderr))))
}

/// The program's own error lines. A server's DETAIL and CONTEXT after them quote a tenant's rows.
fn own_words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let own: Vec<&str> =
        text.lines().filter(|line| line.starts_with("pg_") || line.starts_with("HINT:")).collect();
    own.join("; ").chars().take(TOLD_BYTES_MAX).collect()
}

pub(super) fn not_started(program: &str, error: &std::io::Error) -> AdminError {
    AdminError::Refused(format!("{program} could not be run: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_around_a_dump_is_left_out_and_nothing_else() {
        let text = "-- dump\n\\restrict abc\nCREATE TABLE t ();\n\\restrict in a body\n\\unrestrict abc\n";
        assert_eq!(without_restriction(text), "-- dump\nCREATE TABLE t ();\n\\restrict in a body\n");
        assert_eq!(without_restriction("SELECT 1;\n"), "SELECT 1;\n");
    }

    #[test]
    fn what_a_server_quotes_of_a_tenants_rows_is_left_out() {
        let stderr = "pg_restore: error: COPY failed for table \"t\": ERROR:  value too long\nDETAIL:  Failing row contains \
                      (secret\nsecret).\nCONTEXT:  COPY t, line 1: \"secret\"\nHINT:  none\npg_restore: warning: ignored\n";
        let told = "pg_restore: error: COPY failed for table \"t\": ERROR:  value too long; HINT:  none; pg_restore: warning: \
                    ignored";
        assert_eq!(own_words(stderr.as_bytes()), told);
    }

    #[test]
    fn extensions_and_their_schemas_are_left_out_of_what_is_to_be_made() {
        let list = ";\n; Archive\n6; 2615 16388 SCHEMA - ext acme_rw\n7; 2615 16400 SCHEMA - hr acme_rw\n\
                    2; 3079 16389 EXTENSION - pg_trgm \n3500; 0 0 COMMENT - EXTENSION pg_trgm \n\
                    3501; 0 0 COMMENT - SCHEMA hr acme_rw\n215; 1259 16401 TABLE hr EXTENSION acme_rw\n";
        let left = still_to_make(list, &[16388]);
        let left: Vec<&str> = left.lines().map(|line| line.split(';').next().unwrap_or_default()).collect();
        assert_eq!(left, ["", "", "7", "3501", "215"]);
    }

    #[test]
    fn a_database_name_stays_a_name_in_a_connection_string() {
        assert_eq!(connection_string("a=b"), "dbname='a=b'");
        assert_eq!(connection_string(r"o'neil\"), r"dbname='o\'neil\\'");
    }
}
