//! `pglobby check`.

use clap::Args;

use crate::{
    cli::{Failure, Globals, output},
    control_path::check::{Check as Checked, check},
};

/// Validate configuration, keys and reachability without serving
///
/// Says everything that is wrong; exit status 1 if anything is.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby check --config proxy.toml --json")]
pub struct Check {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Checks and says what was found.
    ///
    /// # Errors
    /// How many findings there are; they themselves are printed.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let checks = match globals.load_config() {
            Ok(config) => check(&config).await,
            Err(failure) => vec![Checked::failed("configuration", failure.to_string())],
        };
        let findings = checks.iter().filter(|check| !check.ok).count();
        if self.json {
            output::json(&serde_json::json!({ "ok": findings == 0, "checks": checks }));
        } else {
            for Checked { check, ok, detail } in &checks {
                output::line(format!("{}  {check}: {detail}", if *ok { "ok    " } else { "FAILED" }));
            }
        }
        match findings {
            0 => Ok(()),
            1 => Err(Failure::new("1 check failed; it is named above")),
            _ => Err(Failure::new(format!("{findings} checks failed; they are named above"))),
        }
    }
}
