//! The schema of the central database, in numbered steps. There is no way back, and none is needed: a binary
//! works with the schema of the release before it and with newer ones that say so. A rollout may stop
//! half-way, and `pglobby init` may run before it or after it.
//!
//! The rule for a new step: it only adds. What older binaries read and write keeps its name, type and meaning,
//! and what it adds has a default, so that their INSERTs work. Then its `compatible_from` is that of the step
//! before. A step that must break this rule has its own number there; older binaries then refuse the schema.
//!
//! The rule for a new binary: what a step after [`OLDEST`] adds may be missing. A table is asked for where it
//! is needed, and its absence ([`is_older`]) switches the feature off. An optional column of an old table is
//! read as `to_jsonb(t) ->> 'column'`, which is null where there is none.
//!
//! Each step runs in a transaction of its own that holds an advisory lock. If two `pglobby init` run at the
//! same time, the second waits and then finds nothing to do.

use std::cmp::Ordering;

use tokio_postgres::{Client, GenericClient, error::SqlState};

use crate::control_path::central::causes;

/// One step.
#[derive(Debug)]
pub struct Migration {
    /// 1, 2, 3, …
    pub number: i32,
    /// The file's name without number and ending.
    pub name: &'static str,
    /// The oldest binary, by the last step that it knows, that works with the schema after this step. Steps up
    /// to 5 are not recorded with it.
    pub compatible_from: i32,
    sql: &'static str,
}

macro_rules! steps {
    ($($number:literal $name:literal $file:literal works_from $compatible_from:literal;)+) => {
        &[$(Migration {
            number: $number,
            name: $name,
            compatible_from: $compatible_from,
            sql: include_str!($file),
        },)+]
    };
}

/// Every step this binary knows, in order.
pub const ALL: &[Migration] = steps! {
    1 "schema" "0001_schema.sql" works_from 1;
    2 "fences" "0002_fences.sql" works_from 2;
    3 "names_and_limits" "0003_names_and_limits.sql" works_from 3;
    4 "given_roles" "0004_given_roles.sql" works_from 4;
    5 "fleet" "0005_fleet.sql" works_from 4;
    6 "fleet_commands" "0006_fleet_commands.sql" works_from 4;
    7 "host_addresses" "0007_host_addresses.sql" works_from 4;
};

/// The oldest schema that this binary works with: the one of the release before.
pub const OLDEST: i32 = 4;

/// The step that adds the column `compatible_from`.
const RECORDS_COMPATIBILITY: i32 = 6;

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
    /// A newer version. `compatible_from`: the largest of the steps that this binary does not know; `None`: one
    /// of them does not say.
    Newer { found: i32, compatible_from: Option<i32> },
}

/// Why the schema is not usable. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum MigrationError {
    /// The schema is of a newer binary.
    #[error(
        "the central schema has version {found}, newer than this pglobby works with ({}); upgrade pglobby",
        latest()
    )]
    Newer { found: i32 },
    /// `pglobby init` was not run.
    #[error("the central database has no pglobby schema; run `pglobby init`")]
    Missing,
    /// `pglobby init` was not run after several upgrades.
    #[error(
        "the central schema has version {found}, this pglobby needs at least {OLDEST}; run `pglobby init`"
    )]
    Older { found: i32 },
    /// A step failed and was rolled back.
    #[error("migration {number} ({name}) failed and was rolled back: {}", causes(cause))]
    Step { number: i32, name: &'static str, cause: tokio_postgres::Error },
    /// Any other error of the central database.
    #[error("central database: {}", causes(.0))]
    Database(#[from] tokio_postgres::Error),
}

/// The last step that this binary knows.
pub fn latest() -> i32 {
    ALL.last().map_or(0, |migration| migration.number)
}

/// Applies and returns the missing migrations. Safe to run on several machines at once. A newer schema that
/// this binary works with stays as it is.
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
        newer @ SchemaState::Newer { .. } => return newer.usable().map(|_| None),
        SchemaState::Current => return Ok(None),
        SchemaState::Older { found } => found,
        SchemaState::Missing => {
            transaction.batch_execute(CREATE_MIGRATIONS).await?;
            0
        }
    };
    let Some(migration) = ALL.iter().find(|migration| migration.number > found) else { return Ok(None) };
    let Migration { number, name, compatible_from, sql } = migration;
    let step = async {
        transaction.batch_execute(sql).await?;
        let record = "INSERT INTO pglobby.migrations (number, name) VALUES ($1, $2)";
        transaction.execute(record, &[number, name]).await?;
        if *number >= RECORDS_COMPATIBILITY {
            let record = "UPDATE pglobby.migrations SET compatible_from = $2 WHERE number = $1";
            transaction.execute(record, &[number, compatible_from]).await?;
        }
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
    // A schema before `compatible_from` has no such column.
    let sql = "SELECT number, (pg_catalog.to_jsonb(m) ->> 'compatible_from')::integer
               FROM pglobby.migrations m ORDER BY number";
    let rows = client.query(sql, &[]).await?;
    let steps = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    Ok(SchemaState::of(&steps.collect::<Result<Vec<_>, tokio_postgres::Error>>()?))
}

/// The version of the schema.
///
/// # Errors
/// There is no schema, or this binary does not work with it.
pub async fn require_usable(client: &impl GenericClient) -> Result<i32, MigrationError> {
    match state(client).await {
        Ok(state) => state.usable(),
        // A login other than the master's may see that the schema exists, but not its tables.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Err(MigrationError::Missing),
        Err(error) => Err(error.into()),
    }
}

/// Whether a query failed because the schema is older than this binary.
pub fn is_older(error: &tokio_postgres::Error) -> bool {
    [Some(&SqlState::UNDEFINED_TABLE), Some(&SqlState::UNDEFINED_COLUMN)].contains(&error.code())
}

impl SchemaState {
    /// `steps`: the numbers of the applied steps in order, each with its `compatible_from`.
    fn of(steps: &[(i32, Option<i32>)]) -> Self {
        let found = steps.last().map_or(0, |(number, _)| *number);
        let unknown = steps.iter().filter(|(number, _)| *number > latest());
        match found.cmp(&latest()) {
            Ordering::Less => Self::Older { found },
            Ordering::Equal => Self::Current,
            Ordering::Greater => {
                let all: Option<Vec<i32>> = unknown.map(|(_, compatible_from)| *compatible_from).collect();
                Self::Newer { found, compatible_from: all.and_then(|all| all.into_iter().max()) }
            }
        }
    }

    /// The version of the schema, if this binary works with it.
    fn usable(self) -> Result<i32, MigrationError> {
        match self {
            Self::Current => Ok(latest()),
            Self::Missing => Err(MigrationError::Missing),
            Self::Older { found } if found >= OLDEST => Ok(found),
            Self::Older { found } => Err(MigrationError::Older { found }),
            Self::Newer { found, compatible_from: Some(from) } if from <= latest() => Ok(found),
            Self::Newer { found, .. } => Err(MigrationError::Newer { found }),
        }
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

    #[test]
    fn a_step_that_does_not_say_what_it_needs_is_refused() {
        let usable = |steps: &[(i32, Option<i32>)]| SchemaState::of(steps).usable().ok();
        let ours = latest();
        assert_eq!(usable(&[]), None);
        assert_eq!(usable(&[(OLDEST - 1, None)]), None);
        assert_eq!(usable(&[(OLDEST, None)]), Some(OLDEST));
        assert_eq!(usable(&[(ours, None)]), Some(ours));
        assert_eq!(usable(&[(ours, None), (ours + 1, Some(OLDEST))]), Some(ours + 1));
        assert_eq!(usable(&[(ours, None), (ours + 1, None)]), None);
        assert_eq!(usable(&[(ours + 1, None), (ours + 2, Some(OLDEST))]), None, "one of two is not enough");
        assert_eq!(usable(&[(ours, None), (ours + 1, Some(ours + 1))]), None);
    }

    #[test]
    fn the_schema_works_with_the_release_before() {
        for step in ALL {
            assert!(step.compatible_from <= step.number, "{}", step.name);
        }
        assert!(ALL.last().unwrap().compatible_from <= OLDEST);
    }
}
