//! `pglobby init`.

use clap::Args;

use crate::{
    cli::{Failure, Globals, output},
    control_path::init::{InitReport, init},
};

/// Create or upgrade the central database; make a key ring if there is none
///
/// Creates the central database if it is missing, applies what its schema lacks, closes it to everybody but the master
/// login, and registers the cluster it lives on as host "default". Run it again whenever you like.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby init --config proxy.toml")]
pub struct Init {
    /// Say what was done as JSON
    #[arg(long)]
    json: bool,
}

impl Init {
    /// Does it and says what was done.
    ///
    /// # Errors
    /// What is missing, and how to supply it.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_config()?;
        let report = init(&config).await?;
        match self.json {
            true => output::json(&report),
            false => say(&report),
        }
        Ok(())
    }
}

fn say(report: &InitReport) {
    let done =
        |done: bool, what: &str, already: &str| output::line(if done { what } else { already }.to_owned());
    let InitReport { central, schema_version, keyring, host, .. } = report;
    done(
        report.database_created,
        &format!("created the central database {central}"),
        &format!("central database {central} exists"),
    );
    done(
        !report.migrations_applied.is_empty(),
        &format!("upgraded its schema to version {schema_version}: {}", report.migrations_applied.join(", ")),
        &format!("its schema has version {schema_version}"),
    );
    done(
        report.keyring_created,
        &format!("made a key ring: {keyring} (keep a copy in a safe place)"),
        &format!("key ring {keyring} exists"),
    );
    done(
        report.host_registered,
        &format!("registered its cluster as host \"{host}\""),
        &format!("host \"{host}\" is registered"),
    );
}
