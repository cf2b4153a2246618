//! `pglobby key`: the keys that seal (encrypt) stored credentials.

use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::json;

use crate::{
    cli::{
        Failure, Globals,
        actor::actor,
        admin_command,
        output::{self, Json},
        table::{self, answer},
    },
    control_path::{admin::commands::AdminCommand, secrets::key_rotation},
};

/// Generate, list and rotate the keys that seal stored credentials
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby key list\n  pglobby key rotate --retire")]
pub struct KeyCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Add a key to the key ring; new credentials are sealed with it
    ///
    /// With several nodes: generate, copy the key ring to every node, reload them (SIGHUP), then rotate.
    #[command(after_help = "Example:\n  pglobby key generate")]
    Generate(Json),
    /// List keys, with the number of credentials that each has sealed
    #[command(after_help = "Example:\n  pglobby key list --json")]
    List(Json),
    Rotate(Rotate),
}

/// Seal all stored credentials with the newest key
///
/// Generates a key first if all credentials are sealed with the newest one already. Clients notice nothing.
/// If the command is interrupted, run it again: it continues where it stopped.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby key rotate --retire")]
struct Rotate {
    /// Remove keys that no credential is sealed with from the key ring
    #[arg(long)]
    retire: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl KeyCommand {
    /// Runs the command.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        match self.action {
            Action::Generate(command) => {
                let key = key_rotation::generate(&actor(globals).await?, &globals.load_config()?).await?;
                answer(command.json, &json!({ "key": key }), || {
                    output::line(format!("key {key} is generated; new credentials are sealed with it"));
                });
            }
            Action::List(command) => {
                let keys = key_rotation::list(&actor(globals).await?).await?;
                let row = |key: &key_rotation::KeyUse| {
                    let state = match (key.writes, key.in_ring) {
                        (true, _) => "current",
                        (false, true) => "old",
                        (false, false) => "MISSING from the key ring",
                    };
                    vec![key.id.clone(), state.to_owned(), key.sealed.to_string()]
                };
                let rows: Vec<Vec<String>> = keys.iter().map(row).collect();
                answer(command.json, &keys, || {
                    table::table("no keys", &["KEY", "STATE", "CREDENTIALS"], &rows)
                });
            }
            Action::Rotate(command) => {
                let config = Arc::new(globals.load_config()?);
                let rotate = AdminCommand::RotateKeys { retire: command.retire, config };
                admin_command::run(globals, rotate, command.json).await?;
            }
        }
        Ok(())
    }
}
