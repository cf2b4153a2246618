//! `pglobby dev`: everything on this machine, from nothing.
//!
//! It calls what `init`, `tenant create`, `login create` and `serve` call; only the PostgreSQL underneath is its own.

pub mod data_folder;
mod demo;
pub mod running;

use std::{net::SocketAddr, path::PathBuf, process::ChildStdout, sync::Arc};

use clap::Args;
use tokio::signal::unix::SignalKind;

use self::{
    data_folder::{DataFolder, must_be_free},
    running::{Announcement, DevNote},
};
use crate::{
    cli::{Failure, logging, output, serve::Signals},
    config::Config,
    control_path::{
        admin::{actor::Actor, hosts},
        central::Central,
        console::Request,
        init::{DEFAULT_HOST, init},
        node::Node,
        secrets::keyring_reload::ReloadableKeyring,
    },
    local_postgres::cluster::Stop,
    shutdown::Ending,
};

/// Run everything on this machine: PostgreSQL, the central database, two demo tenants, the proxy
///
/// The first run makes a PostgreSQL in DIR, tenants acme and globex with a login each, and an administrator's login
/// for the console; later runs find them again. Ctrl-C stops all of it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby dev\n  pglobby dev --data-dir ./lobby --listen 127.0.0.1:7432")]
pub struct Dev {
    /// Where everything is kept [default: /var/lib/pglobby-dev as root, else ~/.local/share/pglobby/dev]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where clients connect [default: 127.0.0.1:6432, later what was said last]; HTTP listens 3000 ports above
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Folder of PostgreSQL's programs, where the usual places do not have the right ones
    #[arg(long, value_name = "DIR")]
    postgres_bin: Option<PathBuf>,
}

impl Dev {
    /// Runs until it is told to stop.
    ///
    /// # Errors
    /// What is in the way, and what to do about it.
    pub async fn run(self) -> Result<(), Failure> {
        let folder = DataFolder::take(&self.data_dir.unwrap_or_else(DataFolder::default_path))?;
        let config = folder.config(self.listen)?;
        config.listen.iter().copied().chain(config.http_listen).try_for_each(must_be_free)?;

        let (mut postgres, config) = folder.start_postgres(config, self.postgres_bin.as_deref())?;
        let postgres_ended = ended(postgres.end_signal());
        init(&config).await?;
        let operator = operator(&config)?;
        follow_postgres(&operator, folder.central(&config)?.0).await?;
        let logins = demo::make(&operator).await?;

        logging::start(&config.log)?;
        let mut signals = Signals::catch()?;
        let serving = Node::start(config.clone()).await?;
        let _note = announce(&folder);
        if let Some(listen) = config.listen.first() {
            output::line("pglobby and its PostgreSQL run.\n");
            output::line(demo::instructions(&logins, *listen, folder.path()));
        }
        tokio::select! {
            () = until_told_to_stop(&mut signals, &serving, &folder) => {}
            () = postgres_ended => {
                let log = folder.path().join("postgres.log");
                return Err(Failure::new(format!("PostgreSQL ended by itself; see {}", log.display())));
            }
        }
        serving.end(Ending::Now, std::future::pending()).await;
        Ok(postgres.stop(Stop::Fast)?)
    }
}

/// HUP and RELOAD read `proxy.toml` again, as they do for `serve`; every other signal, and SHUTDOWN, is the end.
async fn until_told_to_stop(signals: &mut Signals, serving: &Node, folder: &DataFolder) {
    loop {
        let tell = tokio::select! {
            kind = signals.next() => match kind == SignalKind::hangup() {
                true => None,
                false => return,
            },
            request = serving.requested() => match request {
                Request::Reload(tell) => Some(tell),
                Request::Shutdown(_) => return,
            },
        };
        let reloaded = match folder.config(None) {
            Ok(config) => serving.reload(config).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &reloaded {
            output::complain(format!("the configuration was not reloaded: {error}"));
        }
        if let Some(tell) = tell {
            let _ = tell.send(reloaded);
        }
    }
}

fn operator(config: &Config) -> Result<Actor, Failure> {
    let keyring = ReloadableKeyring::load(config)?;
    Ok(Actor::new(Central::open(config)?, Arc::new(keyring), "pglobby dev"))
}

/// The tenants' host is the PostgreSQL that was just started, wherever it listens now.
async fn follow_postgres(operator: &Actor, port: u16) -> Result<(), Failure> {
    let hosts = hosts::list(operator).await?;
    if hosts.iter().any(|host| host.name == DEFAULT_HOST && host.port != i32::from(port)) {
        hosts::set(operator, DEFAULT_HOST, &[("port".to_owned(), port.to_string())], None).await?;
    }
    Ok(())
}

/// Commands typed elsewhere work without it, by `--config`; so a home that cannot be written is no failure.
fn announce(folder: &DataFolder) -> Option<Announcement> {
    let note = DevNote { config: folder.config_path(), started_in: std::env::current_dir().ok()? };
    running::announce(&running::notes_folder()?, &note)
        .inspect_err(|error| output::complain(format!("other commands need --config here: {error}")))
        .ok()
}

/// Waits for PostgreSQL's end: it holds the other end of this pipe and writes nothing to it.
async fn ended(signal: Option<ChildStdout>) {
    if let Some(mut signal) = signal {
        // A thread, since the pipe blocks; it ends with PostgreSQL, which this process never outlives.
        let _ = tokio::task::spawn_blocking(move || std::io::copy(&mut signal, &mut std::io::sink())).await;
    }
}
