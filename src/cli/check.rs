//! `pglobby check`.

use clap::Args;

use crate::{
    cli::{
        Failure, Globals,
        output::{self, BAD, GOOD, coloured},
    },
    control_path::check::{Check as Checked, check},
};

/// Test configuration, keys, hosts and credentials without serving
///
/// Prints the result of every check. The exit status is 1 if one failed.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby check\n  pglobby check --json")]
pub struct Check {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Runs all checks and prints their results.
    ///
    /// # Errors
    /// The number of failed checks, after each of them is printed.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let checks = match globals.load_config() {
            Ok(config) => check(&config).await,
            Err(failure) => vec![Checked::failed("configuration", failure.to_string())],
        };
        let failed = checks.iter().filter(|check| !check.ok).count();
        if self.json {
            output::json(&serde_json::json!({ "ok": failed == 0, "checks": checks }));
        } else {
            for Checked { check, ok, detail } in &checks {
                let word = if *ok { coloured("ok    ", GOOD) } else { coloured("FAILED", BAD) };
                output::line(format!("{word}  {check}: {detail}"));
            }
        }
        match failed {
            0 => Ok(()),
            _ => Err(Failure::new(format!("{failed} of {} checks failed; see FAILED above", checks.len()))),
        }
    }
}
