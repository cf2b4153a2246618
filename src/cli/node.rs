//! `pglobby node`: the running nodes.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::{
    cli::{
        Failure, Globals,
        actor::actor,
        output::{self, Json},
        table::{self, answer, time},
    },
    control_path::{
        directory::snapshot,
        fleet::nodes::{self, NodeSummary},
    },
};

/// List the running nodes, the pglobby processes that share the central database
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby node list")]
pub struct NodeCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List nodes: version, since when they run, and where those that serve differ from each other
    #[command(after_help = "Example:\n  pglobby node list --json")]
    List(Json),
    /// Write the snapshot of the directory for a new node, which starts with it while the central database is away
    #[command(after_help = "Example:\n  pglobby node snapshot --file directory.snapshot")]
    Snapshot(Snapshot),
}

#[derive(Debug, Args)]
struct Snapshot {
    /// File to write, mode 0600; an existing one is replaced
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
}

impl NodeCommand {
    /// Runs the command.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let actor = actor(globals).await?;
        match self.action {
            Action::List(command) => {
                let nodes = nodes::list(&actor.central).await?;
                answer(command.json, &nodes, || print(&nodes));
            }
            Action::Snapshot(command) => {
                let file = &command.file;
                let (logins, tenants) =
                    snapshot::write_file(&actor.central, &actor.keyring, &actor.name, file).await?;
                output::line(format!("{}: {logins} logins, {tenants} tenants", file.display()));
            }
        }
        Ok(())
    }
}

fn print(nodes: &[NodeSummary]) {
    let row = |node: &NodeSummary| {
        vec![
            node.id.to_string(),
            node.name.clone(),
            node.address.clone(),
            node.state.clone(),
            node.version.clone(),
            node.schema_version.to_string(),
            time(node.started_at),
            time(node.seen_at),
            node.differs.join(", "),
        ]
    };
    let headings = ["ID", "NAME", "ADDRESS", "STATE", "VERSION", "SCHEMA", "STARTED", "SEEN", "DIFFERS"];
    let rows: Vec<Vec<String>> = nodes.iter().map(row).collect();
    table::table("no nodes", &headings, &rows);
    if let Some(differences) = nodes::differences(nodes) {
        output::line(format!("nodes differ: {differences}"));
    }
}
