//! `pglobby run`: one piece of SQL over many tenants.

use std::{io::Read as _, path::PathBuf};

use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::{
    cli::{Failure, Globals, actor::operator, output, progress::bar, table},
    control_path::{
        admin::run_on_tenants::{TenantOutcome, TenantSelection, run_on_tenants},
        onboarding::schema_files,
    },
};

/// Run SQL for many tenants, as each tenant's own role; exit status 1 unless all succeeded
///
/// For a tenant, all statements are one transaction unless they say otherwise. A tenant that fails stops nobody else;
/// who failed is named at the end, so that the same can be run for them again. At most 1000 rows are kept of each answer.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby run \"SELECT count(*) FROM orders\" --tenants all\n  \
                        pglobby run --file migration.sql --tenants acme,globex --concurrency 8 --json")]
pub struct Run {
    /// What to run
    #[arg(value_name = "SQL", required_unless_present = "file", conflicts_with = "file")]
    sql: Option<String>,
    /// Run this file (`-`: standard input); psql's own commands (\…) are not understood
    #[arg(long, value_name = "FILE.sql")]
    file: Option<PathBuf>,
    /// For whom: `all` (active and suspended ones), or names
    #[arg(long, required = true, value_delimiter = ',', value_name = "all|A,B")]
    tenants: Vec<String>,
    /// Tenants at a time; each holds one connection to its host meanwhile
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// With `--json`.
#[derive(Serialize)]
struct Told<'a> {
    ok: bool,
    succeeded: usize,
    failed: usize,
    tenants: &'a [TenantOutcome],
}

impl Run {
    /// Does it.
    ///
    /// # Errors
    /// [`Failure`], also where it failed for one tenant.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let sql = self.text()?;
        let operator = operator(globals).await?;
        let selection = match self.tenants.as_slice() {
            [all] if all == "all" => TenantSelection::All,
            names => TenantSelection::Named(names.to_vec()),
        };
        let bar = bar("tenants");
        let concurrency = usize::from(self.concurrency);
        let outcomes = run_on_tenants(
            &operator,
            &sql,
            &selection,
            concurrency,
            |count| bar.set_length(count as u64),
            |done| {
                tell(&bar, done);
            },
        )
        .await?;
        bar.finish_and_clear();

        let failed: Vec<&str> =
            outcomes.iter().filter(|outcome| !outcome.ok).map(|outcome| outcome.tenant.as_str()).collect();
        let succeeded = outcomes.len() - failed.len();
        match self.json {
            true => output::json(&Told {
                ok: failed.is_empty(),
                succeeded,
                failed: failed.len(),
                tenants: &outcomes,
            }),
            false => in_tables(&outcomes),
        }
        if failed.is_empty() {
            return Ok(());
        }
        Err(Failure::new(format!(
            "failed for {} of {} tenants; the same for them again: --tenants {}",
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
            (None, Some(file)) => {
                let files = schema_files::read(std::slice::from_ref(file))?;
                Ok(files.into_iter().map(|file| file.sql).collect())
            }
            (None, None) => Err(Failure::new("give the SQL, or --file")),
        }
    }
}

fn tell(bar: &ProgressBar, done: &TenantOutcome) {
    bar.inc(1);
    let outcome = match &done.error {
        None => format!("{}: done in {} ms", done.tenant, done.elapsed_ms),
        Some(error) => format!("{}: {error}", done.tenant),
    };
    match (bar.is_hidden(), done.ok) {
        (true, _) => {
            output::complain(format!("{}/{} {outcome}", bar.position(), bar.length().unwrap_or_default()));
        }
        (false, true) => bar.set_message(done.tenant.clone()),
        (false, false) => bar.println(outcome),
    }
}

/// Tenants whose answers have the same columns share a table.
fn in_tables(outcomes: &[TenantOutcome]) {
    let mut tables: Vec<(Vec<&str>, Vec<Vec<String>>)> = Vec::new();
    for outcome in outcomes {
        for answer in &outcome.results {
            let mut headings = vec!["TENANT"];
            headings.extend(answer.columns.iter().map(String::as_str));
            let mut rows: Vec<Vec<String>> = answer.rows.iter().map(|row| line_of(outcome, row)).collect();
            if answer.columns.is_empty() {
                headings.push("RESULT");
                rows.push(vec![outcome.tenant.clone(), format!("done, {} rows", answer.row_count)]);
            } else if answer.truncated {
                rows.push(vec![outcome.tenant.clone(), format!("… of {} rows", answer.row_count)]);
            }
            place(&mut tables, headings, rows);
        }
        if let Some(error) = &outcome.error {
            place(&mut tables, vec!["TENANT", "ERROR"], vec![vec![outcome.tenant.clone(), error.clone()]]);
        }
    }
    for (headings, rows) in &tables {
        table::table("no rows", headings, rows);
    }
    if tables.is_empty() {
        output::line("no tenants");
    }
}

fn line_of(outcome: &TenantOutcome, row: &[Option<String>]) -> Vec<String> {
    let cells = row.iter().map(|cell| cell.clone().unwrap_or_else(|| "-".to_owned()));
    std::iter::once(outcome.tenant.clone()).chain(cells).collect()
}

fn place<'a>(
    tables: &mut Vec<(Vec<&'a str>, Vec<Vec<String>>)>,
    headings: Vec<&'a str>,
    rows: Vec<Vec<String>>,
) {
    match tables.iter_mut().find(|(known, _)| *known == headings) {
        Some((_, table)) => table.extend(rows),
        None => tables.push((headings, rows)),
    }
}
