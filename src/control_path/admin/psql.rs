//! Runs SQL files of the operator with `psql`, as a tenant's role.
//!
//! psql runs what the file says on this machine as well (`\!`, `\copy`, `\i`). So it gets files of the
//! operator at the command line only, never a text that came over the network. It reads no psqlrc and
//! nothing from standard input, asks for no password, and stops at the first error.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::Child,
};

use super::{
    actor::AdminError,
    host_connection::HostAdmin,
    pg_dump::{Restorer, client_program, connection_string, not_started},
};
use crate::{
    config::TlsMode, control_path::central::detail_is_shown, local_postgres::binaries::PostgresBinaries,
};

/// How much of the end of psql's error output is kept. The error that ended it is there; notices may be many.
const KEPT_BYTES_MAX: usize = 32 << 10;
/// libpq's first version that verifies a host by the system's authorities.
const SYSTEM_AUTHORITIES_SINCE: u32 = 16;

/// psql, as found on this machine.
#[derive(Debug, Clone)]
pub struct Psql {
    program: PathBuf,
    major: u32,
}

/// The error that ended psql.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PsqlError {
    /// The file and line where the statement ends, if psql named them. An included file has its own name.
    pub place: Option<(String, usize)>,
    /// The message on one line, with the SQLSTATE if a server sent it.
    pub message: String,
    /// The line of the statement with the error, as libpq prints it, and how many characters of it precede
    /// the error.
    pub excerpt: Option<(String, usize)>,
}

impl Psql {
    /// Searches where PostgreSQL's programs are searched; the server's programs need not be installed.
    pub fn find() -> Option<Self> {
        PostgresBinaries::find_client("psql").map(|(program, major)| Self { program, major })
    }

    /// Whether it can verify this host.
    pub fn reaches(&self, host: &HostAdmin) -> bool {
        host.tls_mode != TlsMode::VerifyFull
            || host.tls_root_ca.is_some()
            || self.major >= SYSTEM_AUTHORITIES_SINCE
    }

    /// Runs `file`. `Some`: the error that ended it.
    ///
    /// # Errors
    /// psql could not be started.
    pub async fn run(&self, to: &Restorer<'_>, file: &Path) -> Result<Option<PsqlError>, AdminError> {
        let mut command = client_program(&self.program, to.host, to.database, to.role, Some(to.password));
        command
            // psql's own messages are read below.
            .env("LC_ALL", "C")
            .env("PGCLIENTENCODING", "UTF8")
            .args(["--no-psqlrc", "--quiet", "--no-password"])
            .args(["--set=ON_ERROR_STOP=1", "--set=VERBOSITY=verbose", "--set=SHOW_CONTEXT=never"])
            .arg("--file")
            .arg(file)
            .arg("--dbname")
            .arg(connection_string(to.database))
            .stdout(Stdio::null());
        let failed = |error: std::io::Error| not_started("psql", &error);
        let mut child = command.spawn().map_err(failed)?;
        let said = match child.stderr.take() {
            Some(stderr) => end_of(stderr).await.map_err(failed)?,
            None => Vec::new(),
        };
        let status = Child::wait(&mut child).await.map_err(failed)?;
        if status.success() {
            return Ok(None);
        }
        let error = last_error(&String::from_utf8_lossy(&said));
        Ok(Some(error.unwrap_or_else(|| PsqlError {
            message: format!("psql ended ({status}) without an error message"),
            ..PsqlError::default()
        })))
    }
}

/// The last bytes of what a program writes.
async fn end_of(mut output: impl AsyncRead + Unpin) -> std::io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    while output.read_buf(&mut kept).await? > 0 {
        if kept.len() > 2 * KEPT_BYTES_MAX {
            kept.drain(..kept.len() - KEPT_BYTES_MAX);
        }
    }
    Ok(kept)
}

/// The last error in psql's output: `psql:FILE:LINE: ERROR:  42601: syntax error …` of a server, and
/// `psql:FILE:LINE: error: …` or `psql: error: …` of psql itself.
fn last_error(stderr: &str) -> Option<PsqlError> {
    let lines: Vec<&str> = stderr.lines().collect();
    let (at, mut error, sqlstate) = lines.iter().enumerate().rev().find_map(|(at, line)| {
        let (place, said) = place_and_words(line)?;
        let own = said.strip_prefix("error: ").map(|words| (words.to_owned(), None));
        let (message, sqlstate) = own.or_else(|| of_server(said))?;
        Some((at, PsqlError { place, message, excerpt: None }, sqlstate))
    })?;
    let (mut text, mut caret) = (None, None);
    for line in lines.iter().skip(at + 1) {
        if let Some((_, excerpt)) = line.strip_prefix("LINE ").and_then(|rest| rest.split_once(": ")) {
            text = Some((line.len() - excerpt.len(), excerpt));
        } else if caret.is_none() && line.trim_start() == "^" {
            caret = Some(line.chars().count() - 1);
        } else if let Some(sqlstate) = &sqlstate
            && detail_is_shown(sqlstate)
            && (line.starts_with("DETAIL:") || line.starts_with("HINT:"))
        {
            error.message += &format!("; {}", line.replace(":  ", ": "));
        }
    }
    if let Some(sqlstate) = sqlstate {
        error.message += &format!(" (SQLSTATE {sqlstate})");
    }
    if let (Some((prefix, excerpt)), Some(caret)) = (text, caret) {
        // Dots stand for the rest of a long line.
        let start = excerpt.strip_prefix("...").unwrap_or(excerpt);
        let dots = excerpt.chars().count() - start.chars().count();
        let excerpt = start.strip_suffix("...").unwrap_or(start);
        error.excerpt = Some((excerpt.to_owned(), caret.saturating_sub(prefix + dots)));
    }
    Some(error)
}

/// A file with a line number.
type Place = (String, usize);

fn place_and_words(line: &str) -> Option<(Option<Place>, &str)> {
    if let Some(words) = line.strip_prefix("psql: ") {
        return Some((None, words));
    }
    let rest = line.strip_prefix("psql:")?;
    // A file's name may contain colons.
    rest.match_indices(": ").find_map(|(end, _)| {
        let (file, number) = rest.get(..end)?.rsplit_once(':')?;
        Some((Some((file.to_owned(), number.parse().ok()?)), rest.get(end + 2..)?))
    })
}

/// `ERROR:  42601: words`. The severity is in the server's language, so the SQLSTATE tells an error from a
/// notice.
fn of_server(said: &str) -> Option<(String, Option<String>)> {
    let (_, rest) = said.split_once(":  ")?;
    let (sqlstate, words) = rest.split_once(": ")?;
    let is_one = sqlstate.len() == 5 && sqlstate.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let is_error = is_one && !["00", "01", "02"].contains(&sqlstate.get(..2)?);
    is_error.then(|| (words.to_owned(), Some(sqlstate.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_that_ended_psql_is_found_among_notices() {
        let stderr = "psql:a: b.sql:1: NOTICE:  00000: table \"t\" does not exist, skipping\nLOCATION:  x, y.c:1\n\
                      psql:a: b.sql:12: ERROR:  42703: column \"nam\" does not exist\n\
                      LINE 2: ...ELECT nam FROM customers WHERE…...\n                  ^\n\
                      HINT:  Perhaps you meant \"name\".\nLOCATION:  errorMissingColumn, x.c:3\n";
        let error = last_error(stderr).expect("one");
        assert_eq!(error.place, Some(("a: b.sql".to_owned(), 12)));
        assert_eq!(
            error.message,
            "column \"nam\" does not exist; HINT: Perhaps you meant \"name\". (SQLSTATE 42703)"
        );
        assert_eq!(error.excerpt, Some(("ELECT nam FROM customers WHERE…".to_owned(), 7)));
    }

    #[test]
    fn rows_are_left_out_and_psqls_own_errors_are_kept() {
        let stderr =
            "psql:s.sql:3: FEHLER:  23505: doppelter Schlüssel\nDETAIL:  Key (a)=(secret) already exists.\n";
        assert_eq!(last_error(stderr).expect("one").message, "doppelter Schlüssel (SQLSTATE 23505)");
        let error = last_error("psql:s.sql:3: error: invalid command \\frob\n").expect("one");
        assert_eq!(
            error,
            PsqlError {
                place: Some(("s.sql".to_owned(), 3)),
                message: "invalid command \\frob".to_owned(),
                excerpt: None
            }
        );
        let error = last_error("psql: error: connection to server failed\n").expect("one");
        assert_eq!((error.place, error.message.as_str()), (None, "connection to server failed"));
        assert_eq!(last_error("psql:s.sql:3: WARNING:  01000: w\n"), None);
    }
}
