//! SQL files that a new tenant's database starts with.
//!
//! They run as the tenant's own role in a session of its own, with the tenant's rights only. Each statement
//! is a transaction of its own, unless the file says otherwise, so that CREATE INDEX CONCURRENTLY works; if
//! one fails, the whole database is dropped.
//!
//! A file at the command line is run by psql, where that is installed. Without psql, and for a text that came
//! over the network, pglobby itself sends one statement after the other, with the data after `COPY … FROM
//! stdin`. It understands none of psql's commands but the `\restrict` of pg_dump.

use std::path::{Path, PathBuf};

use tokio_postgres::error::ErrorPosition;

use crate::{
    control_path::admin::{
        actor::{AdminError, server_words},
        host_connection::HostSession,
        pg_dump::Restorer,
        psql::{Psql, PsqlError},
    },
    data_path::sql::{self, Copy, Kind, Lexing},
};

/// Limit on a text that pglobby itself runs, because it is in memory.
pub const SCHEMA_FILE_BYTES_MAX: u64 = 64 << 20;

/// What to run, and its name in errors.
#[derive(Debug, Clone)]
pub struct SchemaFile {
    path: PathBuf,
    runner: Runner,
}

#[derive(Debug, Clone)]
enum Runner {
    Psql(Psql),
    /// pglobby itself.
    Text(String),
}

/// Checks all files before anything is created.
///
/// # Errors
/// A file that cannot be read, or, without psql, that is too large or no UTF-8.
pub fn read(paths: &[PathBuf]) -> Result<Vec<SchemaFile>, AdminError> {
    let psql = if paths.is_empty() { None } else { Psql::find() };
    paths.iter().map(|path| read_one(path, psql.as_ref())).collect()
}

fn read_one(path: &Path, psql: Option<&Psql>) -> Result<SchemaFile, AdminError> {
    let file = std::fs::File::open(path).and_then(|file| file.metadata());
    let file = file.map_err(|error| wrong(path, &error.to_string()))?;
    // psql could not read a pipe of this process (`--schema <(…)`).
    match psql {
        Some(psql) if file.is_file() => {
            Ok(SchemaFile { path: path.to_owned(), runner: Runner::Psql(psql.clone()) })
        }
        _ => Ok(SchemaFile::of_text(path, read_text(path)?)),
    }
}

fn wrong(path: &Path, what: &str) -> AdminError {
    AdminError::Invalid(format!("file {}: {what}", path.display()))
}

/// Reads a file whose text pglobby itself sends.
///
/// # Errors
/// It cannot be read, is too large, or is no text.
pub fn read_text(path: &Path) -> Result<String, AdminError> {
    let length = std::fs::metadata(path).map_err(|error| wrong(path, &error.to_string()))?.len();
    if length > SCHEMA_FILE_BYTES_MAX {
        return Err(wrong(
            path,
            &format!(
                "{length} bytes are more than the {SCHEMA_FILE_BYTES_MAX} that pglobby itself sends; psql runs files of any \
                 size (`tenant create --schema` uses it where it is installed; PGLOBBY_POSTGRES_BIN names its folder)"
            ),
        ));
    }
    let sql = std::fs::read_to_string(path).map_err(|error| wrong(path, &error.to_string()))?;
    if sql.contains('\0') {
        return Err(wrong(path, "holds a NUL character"));
    }
    // Some editors write a byte order mark, which is no SQL.
    Ok(sql.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(sql))
}

impl SchemaFile {
    /// A text that pglobby itself runs. Nothing in it reaches this machine.
    pub fn of_text(name: impl Into<PathBuf>, sql: impl Into<String>) -> Self {
        Self { path: name.into(), runner: Runner::Text(sql.into()) }
    }

    /// Runs it as the tenant's role.
    ///
    /// # Errors
    /// [`AdminError::Invalid`] with file, line, column and the server's words; or the host.
    pub async fn load(&self, to: &Restorer<'_>) -> Result<(), AdminError> {
        match &self.runner {
            Runner::Psql(psql) if psql.reaches(to.host) => match psql.run(to, &self.path).await? {
                None => Ok(()),
                Some(error) => Err(self.refused_by_psql(error)),
            },
            Runner::Psql(_) => self.run_text(to, &read_text(&self.path)?).await,
            Runner::Text(sql) => self.run_text(to, sql).await,
        }
    }

    fn refused_by_psql(&self, error: PsqlError) -> AdminError {
        let PsqlError { place, message, excerpt } = error;
        let place = place.map(|(file, end)| {
            // psql names the line where the statement ends.
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            match excerpt.and_then(|(line, column)| find_line(&text, end, &line, column)) {
                Some((line, column)) => format!("{file}:{line}:{column}"),
                None => format!("{file}:{end}"),
            }
        });
        let place = place.unwrap_or_else(|| self.path.display().to_string());
        AdminError::Invalid(format!("schema file {place}: {message}"))
    }

    async fn run_text(&self, to: &Restorer<'_>, sql: &str) -> Result<(), AdminError> {
        let session = to.host.connect_as(to.role, Some(to.password), to.database, "").await?;
        let mut at = 0;
        while let Some(part) = next_part(sql, &mut at) {
            self.run_part(&session, sql, part).await?;
        }
        Ok(())
    }

    async fn run_part(&self, session: &HostSession, sql: &str, part: Part<'_>) -> Result<(), AdminError> {
        let place = |byte: usize| {
            let (line, column) = line_and_column(sql, byte);
            format!("{}:{line}:{column}", self.path.display())
        };
        let (start, text, ran) = match part {
            Part::Command { start, command } => {
                return Err(AdminError::Invalid(format!(
                    "schema file {}: {command} is a command of psql's; give the file to `pglobby tenant create --schema` \
                     on a machine with psql, or leave it out",
                    place(start)
                )));
            }
            Part::Statement { start, text } => (start, text, session.run_text(text).await),
            Part::Copy { start, text, data } => (start, text, session.copy_text(text, data).await),
        };
        let Err(error) = ran else { return Ok(()) };
        let said = error.as_db_error();
        let row = said.and_then(|said| said.where_()).and_then(line_of_copy);
        let place = match (said.and_then(|said| said.position()), part, row) {
            (Some(ErrorPosition::Original(position)), _, _) => {
                let letters = (*position as usize).saturating_sub(1);
                place(start + text.char_indices().nth(letters).map_or(text.len(), |(byte, _)| byte))
            }
            (_, Part::Copy { data, .. }, Some(row)) => {
                let first = line_and_column(sql, start_of(sql, data)).0;
                format!("{}:{}", self.path.display(), first + row - 1)
            }
            _ => place(start),
        };
        Err(AdminError::Invalid(format!("schema file {place}: {}{}", server_words(&error), hint(&error))))
    }
}

fn hint(error: &tokio_postgres::Error) -> &'static str {
    match error.as_db_error().is_some_and(|said| said.message().contains(r#"at or near "\"#)) {
        true => "; psql's own commands (\\…) are not understood here, leave them out",
        false => "",
    }
}

/// A part of a text, as psql would send it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part<'a> {
    Statement {
        start: usize,
        text: &'a str,
    },
    /// COPY FROM STDIN and its rows.
    Copy {
        start: usize,
        text: &'a str,
        data: &'a str,
    },
    /// A command of psql's.
    Command {
        start: usize,
        command: &'a str,
    },
}

/// Reads the part at or after byte `at`, and moves `at` behind it.
fn next_part<'a>(sql: &'a str, at: &mut usize) -> Option<Part<'a>> {
    loop {
        let rest = sql.get(*at..)?;
        let found = sql::statements(rest.as_bytes(), Lexing::default()).next()?;
        let start = *at + found.start;
        let text = sql.get(start..start + found.text.len())?;
        if let Some(command) = text.strip_prefix('\\') {
            let end = line_end(sql, start);
            *at = end;
            let name = command.split(|letter: char| letter.is_whitespace()).next().unwrap_or_default();
            // pg_dump's, against psql's commands in a dump, of which there are none here.
            if matches!(name, "restrict" | "unrestrict") {
                continue;
            }
            return Some(Part::Command { start, command: text.get(..=name.len()).unwrap_or(text) });
        }
        let end = start + text.len();
        *at = end + usize::from(sql.get(end..).is_some_and(|rest| rest.starts_with(';')));
        if !matches!(found.kind, Kind::Copy(Copy::FromClient)) {
            return Some(Part::Statement { start, text });
        }
        let data_start = line_end(sql, *at);
        let (data_end, after) = copy_data(sql, data_start);
        *at = after;
        return Some(Part::Copy { start, text, data: sql.get(data_start..data_end).unwrap_or_default() });
    }
}

/// The start of the next line.
fn line_end(sql: &str, from: usize) -> usize {
    sql.get(from..).and_then(|rest| rest.find('\n')).map_or(sql.len(), |length| from + length + 1)
}

/// The end of the rows that start here, and the end of the line `\.` after them.
fn copy_data(sql: &str, from: usize) -> (usize, usize) {
    let mut at = from;
    while at < sql.len() {
        let next = line_end(sql, at);
        if sql.get(at..next).is_some_and(|line| line.trim_end_matches(['\r', '\n']) == r"\.") {
            return (at, next);
        }
        at = next;
    }
    (at, at)
}

/// The byte in `sql` where its part begins.
fn start_of(sql: &str, part: &str) -> usize {
    (part.as_ptr() as usize).saturating_sub(sql.as_ptr() as usize)
}

/// The row that an error of COPY is about, from 1: `COPY t, line 3, column a: "…"`.
fn line_of_copy(context: &str) -> Option<usize> {
    let (_, rest) = context.strip_prefix("COPY ")?.split_once(", line ")?;
    rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

/// Line and column, both from 1, of a byte.
fn line_and_column(sql: &str, byte: usize) -> (usize, usize) {
    let before = sql.get(..byte).unwrap_or(sql);
    let line = before.rsplit('\n').next().unwrap_or_default();
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}

/// Line and column of the error in the line that contains `excerpt`, at or before line `end`.
fn find_line(text: &str, end: usize, excerpt: &str, letters_before: usize) -> Option<(usize, usize)> {
    let lines: Vec<&str> = text.lines().take(end).collect();
    lines.iter().enumerate().rev().find_map(|(index, line)| {
        // libpq prints a tab as a space.
        let line = line.replace('\t', " ");
        let at = line.find(excerpt)?;
        Some((index + 1, line.get(..at)?.chars().count() + letters_before + 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(sql: &str) -> Vec<Part<'_>> {
        let mut at = 0;
        std::iter::from_fn(|| next_part(sql, &mut at)).collect()
    }

    #[test]
    fn a_place_is_told_as_line_and_column() {
        let sql = "SELECT 1;\n-- ä\nSELEC 2;";
        assert_eq!(line_and_column(sql, 0), (1, 1));
        assert_eq!(line_and_column(sql, sql.find('2').expect("there")), (3, 7));
        assert_eq!(line_and_column(sql, 1000), (3, 9));
        assert_eq!(find_line(sql, 3, "SELEC 2;", 6), Some((3, 7)));
        assert_eq!(find_line(sql, 2, "SELEC 2;", 6), None);
        assert_eq!(line_of_copy("COPY t, line 12, column a: \"x\""), Some(12));
    }

    #[test]
    fn a_dump_is_taken_apart_as_psql_does_it() {
        let sql = "-- dump\n\\restrict kQ8\n\nSET x = ';';\nCOPY t (a) FROM stdin;\n1\n\\N\n\\.\n\n\
                   CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END;\n\\unrestrict kQ8\n";
        let texts: Vec<(&str, &str)> = parts(sql)
            .into_iter()
            .map(|part| match part {
                Part::Statement { text, .. } => (text, ""),
                Part::Copy { text, data, .. } => (text, data),
                Part::Command { command, .. } => (command, "command"),
            })
            .collect();
        assert_eq!(
            texts,
            [
                ("SET x = ';'", ""),
                ("COPY t (a) FROM stdin", "1\n\\N\n"),
                ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END", ""),
            ]
        );
    }

    #[test]
    fn data_ends_with_the_text_or_with_its_line() {
        for (sql, data) in [
            ("COPY t FROM stdin;", ""),
            ("COPY t FROM stdin;\n", ""),
            ("COPY t FROM stdin; \r\n1\r\n\\.\r\n", "1\r\n"),
            ("COPY t FROM stdin;\n1", "1"),
        ] {
            let [Part::Copy { data: found, .. }] = parts(sql)[..] else { panic!("{sql}") };
            assert_eq!(found, data, "{sql:?}");
        }
    }

    #[test]
    fn commands_of_psql_are_told_by_name_and_place() {
        for sql in ["SELECT 1;\n \\! touch x\n", "SELECT 1;\n \\!\n"] {
            assert_eq!(parts(sql)[1], Part::Command { start: 11, command: r"\!" }, "{sql}");
        }
        assert_eq!(parts("\\i other.sql"), [Part::Command { start: 0, command: r"\i" }]);
    }
}
