//! SQL files that a new tenant's database starts with.
//!
//! They run as the tenant's own role in a session of its own, with the tenant's rights only. Each file is
//! one simple query, so it is one transaction unless it says otherwise. psql's commands and `COPY … FROM
//! stdin` with data are not supported.

use std::path::{Path, PathBuf};

use tokio_postgres::error::ErrorPosition;

use crate::control_path::admin::{
    actor::{AdminError, server_words},
    host_connection::HostSession,
};

/// PostgreSQL accepts messages up to 1 GiB; a schema of this size is a mistake.
pub const SCHEMA_FILE_BYTES_MAX: u64 = 64 << 20;

/// A file and its text.
#[derive(Debug, Clone)]
pub struct SchemaFile {
    /// The name as the caller wrote it.
    pub path: PathBuf,
    /// What is in it.
    pub sql: String,
}

/// Reads all files before anything is created.
pub fn read(paths: &[PathBuf]) -> Result<Vec<SchemaFile>, AdminError> {
    paths.iter().map(|path| read_one(path)).collect()
}

fn read_one(path: &Path) -> Result<SchemaFile, AdminError> {
    let wrong = |what: String| AdminError::Invalid(format!("schema file {}: {what}", path.display()));
    let length = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
    if length > SCHEMA_FILE_BYTES_MAX {
        return Err(wrong(format!("{length} bytes are more than {SCHEMA_FILE_BYTES_MAX}")));
    }
    let sql = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    if sql.contains('\0') {
        return Err(wrong("holds a NUL character".to_owned()));
    }
    // Some editors write a byte order mark, which is no SQL.
    let sql = sql.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(sql);
    Ok(SchemaFile { path: path.to_owned(), sql })
}

/// Runs one file in a session of the tenant's role.
///
/// # Errors
/// [`AdminError::Invalid`] with file, line, column and the server's words.
pub async fn load(session: &HostSession, file: &SchemaFile) -> Result<(), AdminError> {
    session.run_text(&file.sql).await.map_err(|error| {
        let place = match error.as_db_error().and_then(|said| said.position()) {
            Some(ErrorPosition::Original(position)) => {
                let (line, column) = line_and_column(&file.sql, *position);
                format!("{}:{line}:{column}", file.path.display())
            }
            _ => file.path.display().to_string(),
        };
        AdminError::Invalid(format!(
            "schema file {place}: {}{}",
            server_words(&error),
            hint(&error, &file.sql)
        ))
    })
}

fn hint(error: &tokio_postgres::Error, sql: &str) -> &'static str {
    let said = error.as_db_error().map(tokio_postgres::error::DbError::message);
    // COPY data in the same message is read as SQL; alone, the server would wait for it.
    if said.is_none_or(|said| said.contains("syntax error"))
        && sql.to_ascii_lowercase().contains("from stdin")
    {
        "; data behind COPY … FROM stdin cannot be loaded this way, use INSERT (pg_dump --inserts)"
    } else if said.is_some_and(|said| said.contains(r#"at or near "\"#)) {
        "; psql's own commands (\\…) are not understood here, leave them out"
    } else {
        ""
    }
}

/// Line and column, both from 1, of a character position from 1.
fn line_and_column(sql: &str, position: u32) -> (usize, usize) {
    let before = sql.chars().take((position as usize).saturating_sub(1));
    before.fold(
        (1, 1),
        |(line, column), letter| if letter == '\n' { (line + 1, 1) } else { (line, column + 1) },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_told_as_line_and_column() {
        let sql = "SELECT 1;\n-- ä\nSELEC 2;";
        assert_eq!(line_and_column(sql, 1), (1, 1));
        let position = sql.chars().position(|letter| letter == '2').expect("there") as u32 + 1;
        assert_eq!(line_and_column(sql, position), (3, 7));
        assert_eq!(line_and_column(sql, 1000), (3, 9));
    }
}
