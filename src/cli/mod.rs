//! The command line: one file per command.
//!
//! A command is an `Args` (or a `Subcommand` of several) with `async fn run(self, &Globals) -> Result<(),
//! Failure>` and a line in [`Command`]. Exit status: 0 done, 1 refused or failed, 2 wrong usage.

mod actor;
mod admin_command;
mod api_key;
mod check;
pub mod dev;
mod doctor;
mod host;
mod init;
mod key;
mod logging;
mod login;
mod node;
pub mod output;
mod process;
mod progress;
mod run;
mod secrets;
mod serve;
mod table;
mod tenant;

use std::{
    fmt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::{
    config::{Config, ConfigError},
    control_path::central::causes,
};

/// One PostgreSQL endpoint in front of a database per tenant.
#[derive(Debug, Parser)]
#[command(name = "pglobby", version, arg_required_else_help = true, max_term_width = 110)]
#[command(after_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Init),
    Check(check::Check),
    Doctor(doctor::Doctor),
    Dev(dev::Dev),
    Serve(serve::Serve),
    Host(host::HostCommand),
    Tenant(tenant::TenantCommand),
    Login(login::LoginCommand),
    Node(node::NodeCommand),
    Key(key::KeyCommand),
    ApiKey(api_key::ApiKeyCommand),
    Run(run::Run),
}

const AFTER_HELP: &str = "\
Configuration: the file of --config or PGLOBBY_CONFIG; without them that of a `pglobby dev` that was \
started in this folder, then ./proxy.toml, then that of any running `pglobby dev` of this user. PGLOBBY_ \
variables override its keys.

Exit status: 0 done, 1 refused or failed, 2 wrong usage.

Example:
  pglobby dev
  pglobby tenant create acme
  pglobby tenant list --json";

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// Configuration file, instead of ./proxy.toml or that of a running `pglobby dev`
    #[arg(
        long,
        short,
        global = true,
        value_name = "FILE",
        env = "PGLOBBY_CONFIG",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub config: Option<PathBuf>,
}

/// Why a command failed: one line on stderr, exit status 1.
///
/// `?` converts any error to it. It does not implement `Error`, because the conversion would then conflict
/// with `From<T> for T`.
#[derive(Debug)]
pub struct Failure(String);

/// Runs the command that `argv` names. Wrong usage ends the process with status 2.
pub fn main() -> ExitCode {
    let matches = command_line().get_matches();
    let Cli { globals, command } = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(Failure::from).and_then(|runtime| {
        runtime.block_on(async {
            match command {
                Command::Init(command) => command.run(&globals).await,
                Command::Check(command) => command.run(&globals).await,
                Command::Doctor(command) => command.run(&globals).await,
                Command::Dev(command) => command.run().await,
                Command::Serve(command) => command.run(&globals).await,
                Command::Host(command) => command.run(&globals).await,
                Command::Tenant(command) => command.run(&globals).await,
                Command::Login(command) => command.run(&globals).await,
                Command::Node(command) => command.run(&globals).await,
                Command::Key(command) => command.run(&globals).await,
                Command::ApiKey(command) => command.run(&globals).await,
                Command::Run(command) => command.run(&globals).await,
            }
        })
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::error_line(&failure);
            ExitCode::FAILURE
        }
    }
}

/// The command line, with usage lines in the order of the examples: arguments, required options, other
/// options.
fn command_line() -> clap::Command {
    let mut whole = Cli::command();
    whole.build();
    options_last(whole)
}

fn options_last(command: clap::Command) -> clap::Command {
    let mut command = command.mut_subcommands(options_last);
    let usage = command.render_usage().to_string();
    let positionals: Vec<String> = command.get_positionals().map(ToString::to_string).collect();
    let positionals = if command.has_subcommands() { "<COMMAND>".to_owned() } else { positionals.join(" ") };
    let split = usage.strip_prefix("Usage: ").and_then(|usage| usage.split_once(" [OPTIONS]"));
    match split.and_then(|(path, rest)| Some((path, rest.strip_suffix(&positionals)?.trim()))) {
        Some((path, required)) => {
            let parts =
                [path, &positionals, required, "[OPTIONS]"].into_iter().filter(|part| !part.is_empty());
            let usage = parts.collect::<Vec<_>>().join(" ");
            command.override_usage(usage)
        }
        None => command,
    }
}

impl Globals {
    /// Reads and checks the configuration; [`dev::running`] has the order in which the file is looked for.
    /// Without a file, the environment alone must be enough.
    pub fn load_config(&self) -> Result<Config, Failure> {
        self.load(self::dev::running::state_folder().as_deref())
    }

    /// The same for `serve`, without the file of a `pglobby dev`: that process serves it already.
    pub fn load_own_config(&self) -> Result<Config, Failure> {
        self.load(None)
    }

    fn load(&self, dev_state: Option<&Path>) -> Result<Config, Failure> {
        let found = || self::dev::running::find_config(&std::env::current_dir().ok()?, dev_state);
        let path = self.config.clone().or_else(found);
        Config::load(path.as_deref()).map_err(|error: ConfigError| match path {
            Some(_) => error.into(),
            None => Failure(format!(
                "there is no proxy.toml here (name one with --config), and the environment is not enough: \
                 {error}"
            )),
        })
    }
}

impl Failure {
    /// `sentence` says what is wrong and what to do.
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

impl<E: std::error::Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(causes(&error))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A message of a server may have several lines.
        f.write_str(&self.0.replace('\n', " "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_shows_examples_of_itself_that_can_be_parsed() {
        let whole = command_line();
        whole.clone().debug_assert();
        let commands = all(&whole, "pglobby");
        assert!(commands.len() > 40, "{}", commands.len());
        for (path, command) in commands {
            let help =
                command.get_after_help().unwrap_or_else(|| panic!("{path} has no example")).to_string();
            let (_, examples) = help.split_once("Example:\n").unwrap_or_else(|| panic!("{path}: {help}"));
            for example in examples.replace("\\\n", "").lines() {
                assert!(
                    example.trim().starts_with(&path),
                    "{path} shows an example of another command: {example}"
                );
                let words = shlex::split(example.trim()).unwrap();
                whole
                    .clone()
                    .try_get_matches_from(words)
                    .unwrap_or_else(|error| panic!("{example}: {error}"));
            }
        }
    }

    /// The command and all that are below it, with what is typed to run them.
    fn all<'a>(command: &'a clap::Command, path: &str) -> Vec<(String, &'a clap::Command)> {
        let below = command.get_subcommands().filter(|command| command.get_name() != "help");
        let below = below.flat_map(|command| all(command, &format!("{path} {}", command.get_name())));
        std::iter::once((path.to_owned(), command)).chain(below).collect()
    }

    #[test]
    fn usage_has_arguments_first_and_options_last() {
        let whole = command_line();
        let usage = |path: &[&str]| {
            let command = path.iter().fold(&whole, |command, name| command.find_subcommand(name).unwrap());
            command.clone().render_usage().to_string()
        };
        assert_eq!(usage(&[]), "Usage: pglobby <COMMAND> [OPTIONS]");
        assert_eq!(usage(&["tenant"]), "Usage: pglobby tenant <COMMAND> [OPTIONS]");
        assert_eq!(usage(&["tenant", "move"]), "Usage: pglobby tenant move <NAME> --host <HOST> [OPTIONS]");
        let create = "Usage: pglobby login create <NAME> <--tenant <TENANT>|--service|--admin> [OPTIONS]";
        assert_eq!(usage(&["login", "create"]), create);
        assert_eq!(usage(&["init"]), "Usage: pglobby init [OPTIONS]");
    }

    #[test]
    fn a_failure_is_one_line() {
        let failure = Failure::new("refused\nDETAIL: because");
        assert_eq!(failure.to_string(), "refused DETAIL: because");
    }
}
