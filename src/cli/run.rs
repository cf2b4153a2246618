//! `pglobby run`: the same SQL in many tenants.

use std::{io::Read as _, path::PathBuf};

use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::{
    cli::{Failure, Globals, actor::actor, output, progress::bar, table},
    control_path::{
        admin::run_on_tenants::{TenantOutcome, TenantSelection, run_on_tenants},
        onboarding::schema_files,
    },
};

/// Run SQL in many tenants, as the role of each
///
/// All statements for a tenant are one transaction, unless they say otherwise. If one tenant fails, the
/// others go on; the failed ones are named at the end, and the exit status is 1. At most 1000 rows of each
/// result are printed.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby run \"SELECT count(*) FROM pg_tables\" --tenants all\n  \
                        pglobby run --file migration.sql --tenants acme,globex --concurrency 8 --json")]
pub struct Run {
    /// The SQL
    #[arg(value_name = "SQL", required_unless_present = "file", conflicts_with = "file")]
    sql: Option<String>,
    /// Run this file (`-` is standard input); commands of psql (\…) are not supported
    #[arg(long, value_name = "FILE.sql")]
    file: Option<PathBuf>,
    /// Names of tenants, or `all` for all active and suspended ones
    #[arg(long, required = true, value_delimiter = ',', value_name = "all|A,B")]
    tenants: Vec<String>,
    /// How many tenants to work on at once, with one connection each
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Summary<'a> {
    ok: bool,
    succeeded: usize,
    failed: usize,
    tenants: &'a [TenantOutcome],
}

impl Run {
    /// Runs the SQL and prints the results.
    ///
    /// # Errors
    /// [`Failure`], also if the SQL failed for one tenant.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let sql = self.text()?;
        let actor = actor(globals).await?;
        let selection = match self.tenants.as_slice() {
            [all] if all == "all" => TenantSelection::All,
            names => TenantSelection::Named(names.to_vec()),
        };
        let bar = bar("tenants");
        let concurrency = usize::from(self.concurrency);
        let outcomes = run_on_tenants(
            &actor,
            &sql,
            &selection,
            concurrency,
            |count| bar.set_length(count as u64),
            |done| print_progress(&bar, done),
        )
        .await?;
        bar.finish_and_clear();

        let failed: Vec<&str> =
            outcomes.iter().filter(|outcome| !outcome.ok).map(|outcome| outcome.tenant.as_str()).collect();
        let succeeded = outcomes.len() - failed.len();
        match self.json {
            true => output::json(&Summary {
                ok: failed.is_empty(),
                succeeded,
                failed: failed.len(),
                tenants: &outcomes,
            }),
            false => print_tables(&outcomes),
        }
        if failed.is_empty() {
            return Ok(());
        }
        Err(Failure::new(format!(
            "failed for {} of {} tenants; to repeat it for them: --tenants {}",
            failed.len(),
            outcomes.len(),
            failed.join(",")
        )))
    }

    fn text(&self) -> Result<String, Failure> {
        match (&self.sql, &self.file) {
            (Some(sql), _) => Ok(sql.clone()),
            (None, Some(file)) if file.as_os_str() == "-" => {
                let mut sql = String::new();
                std::io::stdin().take(schema_files::SCHEMA_FILE_BYTES_MAX).read_to_string(&mut sql)?;
                Ok(sql)
            }
            (None, Some(file)) => Ok(schema_files::read_text(file)?),
            (None, None) => Err(Failure::new("name the SQL, or a file with --file")),
        }
    }
}

fn print_progress(bar: &ProgressBar, done: &TenantOutcome) {
    bar.inc(1);
    let result = match &done.error {
        None => format!("{}: done in {} ms", done.tenant, done.elapsed_ms),
        Some(error) => format!("{}: failed: {error}", done.tenant),
    };
    match (bar.is_hidden(), done.ok) {
        (true, _) => {
            output::error_line(format!("{}/{} {result}", bar.position(), bar.length().unwrap_or_default()));
        }
        (false, true) => bar.set_message(done.tenant.clone()),
        (false, false) => bar.println(result),
    }
}

/// Prints one table for all results with the same columns.
fn print_tables(outcomes: &[TenantOutcome]) {
    let mut tables: Vec<(Vec<&str>, Vec<Vec<String>>)> = Vec::new();
    for outcome in outcomes {
        for answer in &outcome.results {
            let mut headings = vec!["TENANT"];
            headings.extend(answer.columns.iter().map(String::as_str));
            let mut rows: Vec<Vec<String>> = answer.rows.iter().map(|row| cells(outcome, row)).collect();
            if answer.columns.is_empty() {
                headings.push("RESULT");
                rows.push(vec![outcome.tenant.clone(), format!("ok, {} rows", answer.row_count)]);
            } else if answer.truncated {
                rows.push(vec![outcome.tenant.clone(), format!("… {} rows in all", answer.row_count)]);
            }
            append(&mut tables, headings, rows);
        }
        if let Some(error) = &outcome.error {
            append(&mut tables, vec!["TENANT", "ERROR"], vec![vec![outcome.tenant.clone(), error.clone()]]);
        }
    }
    for (headings, rows) in &tables {
        table::table("no rows", headings, rows);
    }
    if tables.is_empty() {
        output::line("no tenants");
    }
}

fn cells(outcome: &TenantOutcome, row: &[Option<String>]) -> Vec<String> {
    let cells = row.iter().map(|cell| cell.clone().unwrap_or_else(|| "-".to_owned()));
    std::iter::once(outcome.tenant.clone()).chain(cells).collect()
}

fn append<'a>(
    tables: &mut Vec<(Vec<&'a str>, Vec<Vec<String>>)>,
    headings: Vec<&'a str>,
    rows: Vec<Vec<String>>,
) {
    match tables.iter_mut().find(|(known, _)| *known == headings) {
        Some((_, table)) => table.extend(rows),
        None => tables.push((headings, rows)),
    }
}
