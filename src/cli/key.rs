//! `pglobby key`: what stored credentials are sealed with.

use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::json;

use crate::{
    cli::{
        Failure, Globals,
        actor::operator,
        admin_command::carry_out,
        output,
        table::{self, answer},
    },
    control_path::{admin::commands::AdminCommand, secrets::key_rotation},
};

/// Make, list and rotate sealing keys
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby key list\n  pglobby key rotate --retire")]
pub struct KeyCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Generate(Generate),
    List(List),
    Rotate(Rotate),
}

/// Add a key to the ring; it seals from now on
///
/// Where several nodes serve: generate, copy the ring to every node and reload them (HUP), then rotate.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby key generate")]
struct Generate {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List keys, and how many credentials are sealed with each
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby key list --json")]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Seal every stored credential with the newest key, made now if all are sealed with the newest already
///
/// Online and in batches; a run that died is finished by the next.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby key rotate --retire")]
struct Rotate {
    /// Take keys from the ring that nothing is sealed with any more
    #[arg(long)]
    retire: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl KeyCommand {
    /// Does it.
    ///
    /// # Errors
    /// [`Failure`], in one line.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        match self.action {
            Action::Generate(command) => {
                let key = key_rotation::generate(&operator(globals).await?, &globals.load_config()?).await?;
                answer(command.json, &json!({ "key": key }), || {
                    output::line(format!("key {key} seals from now on"))
                });
            }
            Action::List(command) => {
                let keys = key_rotation::list(&operator(globals).await?).await?;
                let row = |key: &key_rotation::KeyUse| {
                    let state = match (key.writes, key.in_ring) {
                        (true, _) => "writes",
                        (false, true) => "reads",
                        (false, false) => "MISSING from the ring",
                    };
                    vec![key.id.clone(), state.to_owned(), key.sealed.to_string()]
                };
                let rows: Vec<Vec<String>> = keys.iter().map(row).collect();
                answer(command.json, &keys, || table::table("no keys", &["KEY", "STATE", "SEALED"], &rows));
            }
            Action::Rotate(command) => {
                let config = Arc::new(globals.load_config()?);
                carry_out(globals, AdminCommand::RotateKeys { retire: command.retire, config }, command.json)
                    .await?;
            }
        }
        Ok(())
    }
}
