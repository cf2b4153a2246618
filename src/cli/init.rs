//! `pglobby init`.

use clap::Args;

use crate::{
    cli::{Failure, Globals, output},
    control_path::init::{InitReport, init},
};

/// Create or upgrade the central database and the key ring
///
/// Creates the central database if it is missing, upgrades its schema, revokes CONNECT on it from PUBLIC,
/// creates the key ring if there is none, and registers the cluster of the central database as host
/// "default". Safe to run again.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby init\n  pglobby init --config /etc/pglobby/proxy.toml")]
pub struct Init {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Init {
    /// Runs the command and prints what it did.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_config()?;
        let report = init(&config).await?;
        match self.json {
            true => output::json(&report),
            false => print(&report),
        }
        Ok(())
    }
}

fn print(report: &InitReport) {
    let InitReport { central, schema_version, keyring, host, .. } = report;
    let print = |done: bool, new: String, old: String| output::line(if done { new } else { old });
    print(
        report.database_created,
        format!("central database {central} is created"),
        format!("central database {central} exists"),
    );
    print(
        !report.migrations_applied.is_empty(),
        format!(
            "its schema is upgraded to version {schema_version}: {}",
            report.migrations_applied.join(", ")
        ),
        format!("its schema has version {schema_version}"),
    );
    print(
        report.keyring_created,
        format!("key ring {keyring} is created; keep a copy in a safe place"),
        format!("key ring {keyring} exists"),
    );
    print(
        report.host_registered,
        format!("its cluster is registered as host \"{host}\""),
        format!("host \"{host}\" is registered"),
    );
    print(
        report.host_budget.is_some(),
        format!(
            "all nodes together open at most {} connections there",
            report.host_budget.unwrap_or_default()
        ),
        format!(
            "nodes open connections there without a limit; see `pglobby check`, and `pglobby host set {host}`"
        ),
    );
}
