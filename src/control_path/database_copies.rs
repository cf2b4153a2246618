//! Whole databases, copied by PostgreSQL's own `pg_dump` and `pg_restore`: into a file, or from host to host.
//!
//! They log in as the host's administrator. The password travels in the child's environment, which only its own user and
//! root can read; never in its arguments.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use secrecy::ExposeSecret as _;
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};

use super::{
    host_session::{HostAdmin, HostSession},
    operator::OperatorError,
    postgres_binaries::PostgresBinaries,
};
use crate::data_path::tenant::TlsMode;

/// Of what a program said before it failed, as much is told.
const TOLD_BYTES_MAX: usize = 600;

/// `pg_dump` and `pg_restore` of one version.
#[derive(Debug)]
pub struct CopyPrograms {
    binaries: PostgresBinaries,
}

impl CopyPrograms {
    /// Programs that can read what this server has: of its version, or a newer one.
    ///
    /// # Errors
    /// There are none on this machine.
    pub async fn for_server(session: &HostSession) -> Result<Self, OperatorError> {
        let major = u32::try_from(session.rights().await?.server_version / 10_000).unwrap_or_default();
        let found = PostgresBinaries::find_major(None, major).or_else(|_| PostgresBinaries::find(None));
        let binaries = found.map_err(|error| OperatorError::Refused(error.to_string()))?;
        if binaries.major() < major {
            return Err(OperatorError::Refused(format!(
                "the server is PostgreSQL {major}, and pg_dump on this machine is {}, which cannot read it; install a \
                 newer one, or name its folder with {}",
                binaries.major(),
                super::postgres_binaries::ENVIRONMENT
            )));
        }
        Ok(Self { binaries })
    }

    fn program(&self, name: &str, admin: &HostAdmin, database: &str) -> Command {
        let mut command = Command::new(self.binaries.program(name));
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PG") {
                command.env_remove(variable);
            }
        }
        command
            .env("PGHOST", &admin.address)
            .env("PGPORT", admin.port.to_string())
            .env("PGUSER", &admin.user)
            .env("PGDATABASE", database)
            .env("PGAPPNAME", "pglobby")
            .env("PGSSLMODE", ssl_mode(admin.tls_mode))
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        match (&admin.tls_root_ca, admin.tls_mode) {
            (Some(root_ca), _) => {
                command.env("PGSSLROOTCERT", root_ca);
            }
            // Our own default; libpq's is a file in the user's home. It knows this word since version 16.
            (None, TlsMode::VerifyFull) => {
                command.env("PGSSLROOTCERT", "system");
            }
            (None, _) => {}
        }
        if let Some(password) = &admin.password {
            command.env("PGPASSWORD", password.expose_secret());
        }
        command
    }

    /// Writes `database` to a new file that only its owner can read, in pg_dump's custom format; what is there under
    /// that name appears all at once, or not at all.
    ///
    /// # Errors
    /// The file exists, the disk is full, or pg_dump's own words.
    pub async fn dump_to(&self, admin: &HostAdmin, database: &str, file: &Path) -> Result<(), OperatorError> {
        refuse_existing(file)?;
        let unfinished = unfinished(file);
        let wrong =
            |error: std::io::Error| OperatorError::Refused(format!("{}: {error}", unfinished.display()));
        let _ = fs::remove_file(&unfinished);
        let out =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished).map_err(wrong)?;
        let mut to = tokio::fs::File::from_std(out.try_clone().map_err(wrong)?);
        let mut command = self.program("pg_dump", admin, database);
        let child = command.arg("--format=custom").stdout(Stdio::piped()).spawn();
        let mut child = child.map_err(|error| not_started("pg_dump", &error))?;
        let from = child.stdout.take();
        // We write the file: pg_dump ends well where the disk has no room for the last few kilobytes.
        let written = async {
            if let Some(mut from) = from {
                tokio::io::copy(&mut from, &mut to).await?;
            }
            to.flush().await
        };
        let (written, dumped) = tokio::join!(written, finished("pg_dump", Ok(child)));
        let dumped =
            written.map_err(wrong).and(dumped).and_then(|_| keep(&out, &unfinished, file).map_err(wrong));
        if dumped.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        dumped
    }

    /// The statements that make what is in `database`, its rows aside; without owners and privileges, and without what
    /// replicates it.
    ///
    /// # Errors
    /// pg_dump's own words, or a schema that is not UTF-8.
    pub async fn schema(&self, admin: &HostAdmin, database: &str) -> Result<String, OperatorError> {
        let mut dump = self.program("pg_dump", admin, database);
        dump.args([
            "--schema-only",
            "--no-owner",
            "--no-privileges",
            "--no-publications",
            "--no-subscriptions",
        ]);
        dump.arg("--encoding=UTF8").stdout(Stdio::piped());
        let text = finished("pg_dump", dump.spawn()).await?;
        let text = String::from_utf8(text)
            .map_err(|_| OperatorError::Refused(format!("the schema of {database:?} is not UTF-8")))?;
        Ok(without_restriction(&text))
    }

    /// Copies `database` from one host to a database of that name on another, which is there and empty. Owners and
    /// privileges are left out: they are the new host's business.
    ///
    /// # Errors
    /// Either program's own words.
    pub async fn copy(&self, from: &HostAdmin, to: &HostAdmin, database: &str) -> Result<(), OperatorError> {
        let mut dump = self.program("pg_dump", from, database);
        dump.args(["--format=custom", "--no-owner", "--no-privileges"]).stdout(Stdio::piped());
        let mut dumping = dump.spawn().map_err(|error| not_started("pg_dump", &error))?;
        let stdout = dumping.stdout.take().map(TryInto::<Stdio>::try_into).transpose();
        let stdout = stdout.map_err(|error| not_started("pg_restore", &error))?.unwrap_or_else(Stdio::null);
        let mut restore = self.program("pg_restore", to, database);
        restore.args([
            "--no-owner",
            "--no-privileges",
            "--exit-on-error",
            "--single-transaction",
            "--dbname",
        ]);
        restore.arg(connection_string(database)).stdin(stdout).stdout(Stdio::null());
        let restoring = restore.spawn();
        drop(restore); // and with it our end of the pipe
        let (dumped, restored) =
            tokio::join!(finished("pg_dump", Ok(dumping)), finished("pg_restore", restoring));
        // Where one dies, the other complains of the pipe: both are worth hearing.
        match (dumped, restored) {
            (Ok(_), restored) => restored.map(drop),
            (dumped, Ok(_)) => dumped.map(drop),
            (Err(one), Err(other)) => Err(OperatorError::Refused(format!("{other}; {one}"))),
        }
    }
}

/// Refuses to write over something.
///
/// # Errors
/// It is there, or its folder is not.
pub fn refuse_existing(file: &Path) -> Result<(), OperatorError> {
    if file.exists() {
        return Err(OperatorError::Exists(format!("{} exists already; name another file", file.display())));
    }
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match folder.is_dir() {
        true => Ok(()),
        false => Err(OperatorError::Invalid(format!("there is no folder {}", folder.display()))),
    }
}

/// Newer pg_dumps put the text between two lines for psql, with a word that is another every time.
fn without_restriction(text: &str) -> String {
    let word = text.lines().find_map(|line| line.strip_prefix(r"\restrict "));
    let ours = |line: &str| {
        let said = line.strip_prefix(r"\restrict ").or_else(|| line.strip_prefix(r"\unrestrict "));
        said.is_some() && said == word
    };
    text.split_inclusive('\n').filter(|line| !ours(line.trim_end())).collect()
}

/// `--dbname` takes a connection string; a name with `=` in it would be one.
fn connection_string(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', r"\\").replace('\'', r"\'"))
}

fn unfinished(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

/// The file is on the disk, under its own name.
fn keep(out: &File, unfinished: &Path, file: &Path) -> std::io::Result<()> {
    out.sync_all()?;
    fs::hard_link(unfinished, file)?; // which, unlike a rename, never replaces anything
    fs::remove_file(unfinished)
}

/// What it printed, where that was not sent elsewhere.
async fn finished(program: &str, child: std::io::Result<Child>) -> Result<Vec<u8>, OperatorError> {
    let child = child.map_err(|error| not_started(program, &error))?;
    let Output { status, stderr, stdout } =
        child.wait_with_output().await.map_err(|error| not_started(program, &error))?;
    if status.success() {
        return Ok(stdout);
    }
    Err(OperatorError::Refused(format!("{program} failed ({status}): {}", own_words(&stderr))))
}

/// What pg_dump or pg_restore says itself. A server's DETAIL and CONTEXT below that quote a tenant's rows.
fn own_words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let own: Vec<&str> =
        text.lines().filter(|line| line.starts_with("pg_") || line.starts_with("HINT:")).collect();
    own.join("; ").chars().take(TOLD_BYTES_MAX).collect()
}

fn not_started(program: &str, error: &std::io::Error) -> OperatorError {
    OperatorError::Refused(format!("{program} could not be run: {error}"))
}

/// As libpq spells it.
pub(super) fn ssl_mode(mode: TlsMode) -> &'static str {
    match mode {
        TlsMode::Disable => "disable",
        TlsMode::Allow => "allow",
        TlsMode::Prefer => "prefer",
        TlsMode::Require => "require",
        TlsMode::VerifyCa => "verify-ca",
        TlsMode::VerifyFull => "verify-full",
    }
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
    fn a_database_name_stays_a_name_in_a_connection_string() {
        assert_eq!(connection_string("a=b"), "dbname='a=b'");
        assert_eq!(connection_string(r"o'neil\"), r"dbname='o\'neil\\'");
    }
}
