//! The command line: one file per command.
//!
//! A command is an `Args` (or a `Subcommand` of several) with `async fn run(self, &Globals) -> Result<(), Failure>` and
//! a line in [`Command`]. Exit status: 0 done, 1 refused or failed, 2 usage.

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

use clap::{Args, Parser, Subcommand};

use crate::{
    config::{Config, ConfigError},
    control_path::central::causes,
};

/// One PostgreSQL endpoint in front of a database per tenant.
#[derive(Debug, Parser)]
#[command(name = "pglobby", version, arg_required_else_help = true, max_term_width = 110)]
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
    Key(key::KeyCommand),
    ApiKey(api_key::ApiKeyCommand),
    Run(run::Run),
}

/// What every command may be told.
#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// The configuration file. Without one: that of a `pglobby dev` started in this folder, ./proxy.toml, that of any
    /// `pglobby dev` of this user; PGLOBBY_ variables may say everything
    #[arg(long, short, global = true, value_name = "FILE", env = "PGLOBBY_CONFIG")]
    pub config: Option<PathBuf>,
}

/// Why a command did not do what it was asked: one line on stderr, exit status 1.
///
/// Made from any error by `?`. It is no `Error` itself, because then it could not be.
#[derive(Debug)]
pub struct Failure(String);

/// Runs what `argv` says. Usage errors end the process with status 2.
pub fn main() -> ExitCode {
    let Cli { globals, command } = Cli::parse();
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
                Command::Key(command) => command.run(&globals).await,
                Command::ApiKey(command) => command.run(&globals).await,
                Command::Run(command) => command.run(&globals).await,
            }
        })
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::complain(&failure);
            ExitCode::FAILURE
        }
    }
}

impl Globals {
    /// Reads and checks the configuration that is meant; see [`running_dev`] for the order in which it is looked for.
    /// Where there is none, the environment is asked alone.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load_config(&self) -> Result<Config, Failure> {
        self.load(self::dev::running::notes_folder().as_deref())
    }

    /// The same for a command that serves: never the configuration of a dev, which serves it already.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load_own_config(&self) -> Result<Config, Failure> {
        self.load(None)
    }

    fn load(&self, dev_notes: Option<&Path>) -> Result<Config, Failure> {
        let found = || self::dev::running::find_config(&std::env::current_dir().ok()?, dev_notes);
        let path = self.config.clone().or_else(found);
        Config::load(path.as_deref()).map_err(|error: ConfigError| match path {
            Some(_) => error.into(),
            None => Failure(format!(
                "there is no proxy.toml here (name one with --config), and the environment alone does not do: {error}"
            )),
        })
    }
}

impl Failure {
    /// A sentence that says what is wrong and what to do.
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
        // One line, whatever a server put into its message.
        f.write_str(&self.0.replace('\n', " "))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_command_shows_an_example() {
        let mut whole = Cli::command();
        whole.build();
        whole.clone().debug_assert();
        for command in whole.get_subcommands().filter(|command| command.get_name() != "help") {
            let examples = leaves(command)
                .all(|leaf| leaf.get_after_help().is_some_and(|text| text.to_string().contains("pglobby ")));
            assert!(examples, "{} has no example", command.get_name());
        }
    }

    /// A command, or its subcommands where it has some.
    fn leaves(command: &clap::Command) -> Box<dyn Iterator<Item = &clap::Command> + '_> {
        match command.has_subcommands() {
            true => Box::new(command.get_subcommands().filter(|sub| sub.get_name() != "help")),
            false => Box::new(std::iter::once(command)),
        }
    }

    #[test]
    fn a_failure_is_one_line() {
        let failure = Failure::new("refused\nDETAIL: because");
        assert_eq!(failure.to_string(), "refused DETAIL: because");
    }
}
