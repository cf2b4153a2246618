//! The schema of the central database, in numbered steps. There is no way back.
//!
//! Each step runs in a transaction of its own that holds an advisory lock. If two `pglobby init` run at the
//! same time, the second waits and then finds nothing to do.

use tokio_postgres::{Client, GenericClient, error::SqlState};

use crate::control_path::central::causes;

/// One step.
#[derive(Debug)]
pub struct Migration {
    /// 1, 2, 3, …
    pub number: i32,
    /// The file's name without number and ending.
    pub name: &'static str,
    sql: &'static str,
}

/// Every step this binary knows, in order.
pub const ALL: &[Migration] = &[
    Migration { number: 1, name: "schema", sql: include_str!("0001_schema.sql") },
    Migration { number: 2, name: "fences", sql: include_str!("0002_fences.sql") },
    Migration { number: 3, name: "names_and_limits", sql: include_str!("0003_names_and_limits.sql") },
    Migration { number: 4, name: "given_roles", sql: include_str!("0004_given_roles.sql") },
    Migration { number: 5, name: "fleet", sql: include_str!("0005_fleet.sql") },
];

/// "pglobby" in hexadecimal. Any number that no other program locks in the central database.
const ADVISORY_LOCK: i64 = 0x0070_676c_6f62_6279;

/// The state of the schema for this binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "`found` is the last step applied")]
pub enum SchemaState {
    /// Not made yet.
    Missing,
    /// Steps are missing.
    Older { found: i32 },
    /// The version this binary needs.
    Current,
    /// A newer version.
    Newer { found: i32 },
}

/// Why the schema is not usable. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum MigrationError {
    /// The schema is of a newer binary.
    #[error(
        "the central schema has version {found}, newer than this pglobby knows ({}); upgrade pglobby",
        latest()
    )]
    Newer { found: i32 },
    /// `pglobby init` was not run.
    #[error("the central database has no pglobby schema; run `pglobby init`")]
    Missing,
    /// `pglobby init` was not run after an upgrade.
    #[error("the central schema has version {found}, this pglobby needs {}; run `pglobby init`", latest())]
    Older { found: i32 },
    /// A step failed and was rolled back.
    #[error("migration {number} ({name}) failed and was rolled back: {}", causes(cause))]
    Step { number: i32, name: &'static str, cause: tokio_postgres::Error },
    /// Any other error of the central database.
    #[error("central database: {}", causes(.0))]
    Database(#[from] tokio_postgres::Error),
}

/// The version this binary needs.
pub fn latest() -> i32 {
    ALL.last().map_or(0, |migration| migration.number)
}

/// Applies and returns the missing migrations. Safe to run on several machines at once.
///
/// # Errors
/// [`MigrationError::Newer`] before anything is touched; [`MigrationError::Step`] leaves the steps before it
/// applied.
pub async fn apply(client: &mut Client) -> Result<Vec<&'static Migration>, MigrationError> {
    let mut applied = Vec::new();
    while let Some(migration) = apply_next(client).await? {
        applied.push(migration);
    }
    Ok(applied)
}

async fn apply_next(client: &mut Client) -> Result<Option<&'static Migration>, MigrationError> {
    let transaction = client.transaction().await?;
    transaction.execute("SELECT pg_catalog.pg_advisory_xact_lock($1)", &[&ADVISORY_LOCK]).await?;
    let found = match state(&transaction).await? {
        SchemaState::Newer { found } => return Err(MigrationError::Newer { found }),
        SchemaState::Current => return Ok(None),
        SchemaState::Older { found } => found,
        SchemaState::Missing => {
            transaction.batch_execute(CREATE_MIGRATIONS).await?;
            0
        }
    };
    let Some(migration) = ALL.iter().find(|migration| migration.number > found) else { return Ok(None) };
    let Migration { number, name, sql } = migration;
    let step = async {
        transaction.batch_execute(sql).await?;
        let record = "INSERT INTO pglobby.migrations (number, name) VALUES ($1, $2)";
        transaction.execute(record, &[number, name]).await?;
        transaction.commit().await
    };
    step.await.map_err(|cause| MigrationError::Step { number: *number, name, cause })?;
    Ok(Some(migration))
}

const CREATE_MIGRATIONS: &str = "
    CREATE SCHEMA IF NOT EXISTS pglobby;
    CREATE TABLE IF NOT EXISTS pglobby.migrations (
        number      integer PRIMARY KEY,
        name        text NOT NULL,
        applied_at  timestamptz NOT NULL DEFAULT now()
    );";

/// The state of the schema.
pub async fn state(client: &impl GenericClient) -> Result<SchemaState, tokio_postgres::Error> {
    let exists = "SELECT pg_catalog.to_regclass('pglobby.migrations') IS NOT NULL";
    if !client.query_one(exists, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(SchemaState::Missing);
    }
    let newest = "SELECT pg_catalog.max(number) FROM pglobby.migrations";
    let found: Option<i32> = client.query_one(newest, &[]).await?.try_get(0)?;
    Ok(match found {
        None => SchemaState::Older { found: 0 },
        Some(found) if found > latest() => SchemaState::Newer { found },
        Some(found) if found < latest() => SchemaState::Older { found },
        Some(_) => SchemaState::Current,
    })
}

/// Refuses any other version of the schema.
pub async fn require_current(client: &impl GenericClient) -> Result<(), MigrationError> {
    match state(client).await {
        Ok(SchemaState::Current) => Ok(()),
        Ok(SchemaState::Missing) => Err(MigrationError::Missing),
        Ok(SchemaState::Older { found }) => Err(MigrationError::Older { found }),
        Ok(SchemaState::Newer { found }) => Err(MigrationError::Newer { found }),
        // A login other than the master's may see that the schema exists, but not its tables.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Err(MigrationError::Missing),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_numbered_from_one_without_gaps() {
        for (at, migration) in ALL.iter().enumerate() {
            assert_eq!(migration.number, i32::try_from(at).unwrap() + 1, "{}", migration.name);
        }
    }
}
