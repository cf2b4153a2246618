//! `pglobby dev`: runs everything on one machine, with a PostgreSQL of its own.
//!
//! It calls the functions behind `init`, `tenant create`, `login create` and `serve`.

pub mod data_folder;
mod demo;
pub mod running;

use std::{net::SocketAddr, path::PathBuf, process::ChildStdout, sync::Arc};

use clap::Args;
use tokio::signal::unix::SignalKind;

use self::{
    data_folder::{CentralAddress, DataFolder, must_be_free},
    running::{Announcement, RunningDev},
};
use crate::{
    cli::{Failure, logging, output, serve::Signals},
    config::Config,
    control_path::{
        admin::{
            actor::Actor,
            hosts::{self, HostSummary},
        },
        central::Central,
        console::Request,
        init::{DEFAULT_HOST, init},
        node::Node,
        secrets::keyring_reload::ReloadableKeyring,
        takeover::Inherited,
    },
    local_postgres::cluster::Stop,
    shutdown::Ending,
};

/// Run everything on this machine: PostgreSQL, central database, two demo tenants, proxy
///
/// The first run creates a PostgreSQL in DIR, the tenants acme and globex with a login each, and an
/// administrator's login for the console. Later runs use them again. Ctrl-C stops everything.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pglobby dev\n  pglobby dev --data-dir ./dev-data --listen 127.0.0.1:7432"
)]
pub struct Dev {
    /// Folder for all data [default: /var/lib/pglobby-dev as root, else ~/.local/share/pglobby/dev]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address for clients; HTTP listens 3000 ports above [default: that of the last run, at first
    /// 127.0.0.1:6432]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Folder with PostgreSQL's programs, if they are not in a usual place
    #[arg(long, value_name = "DIR")]
    postgres_bin: Option<PathBuf>,
}

impl Dev {
    /// Runs until a signal or the console's SHUTDOWN.
    ///
    /// # Errors
    /// Why it cannot start, and what to do; or PostgreSQL has ended.
    pub async fn run(self) -> Result<(), Failure> {
        let folder = DataFolder::take(&self.data_dir.unwrap_or_else(DataFolder::default_path))?;
        let config = folder.config(self.listen)?;
        config.listen.iter().copied().chain(config.http_listen).try_for_each(must_be_free)?;

        let (mut postgres, config) = folder.start_postgres(config, self.postgres_bin.as_deref())?;
        let postgres_ended = ended(postgres.end_signal());
        init(&config).await?;
        let actor = actor(&config)?;
        update_host(&actor, &folder.central(&config)?).await?;
        let logins = demo::create(&actor).await?;

        logging::start(&config.log)?;
        let mut signals = Signals::catch()?;
        let node = Node::start(config.clone(), &mut Inherited::default()).await?;
        let _announcement = announce(&folder);
        if let Some(listen) = config.listen.first() {
            output::line("pglobby and its PostgreSQL are running.\n");
            let has_socket = config.unix_socket_dir.is_some();
            output::line(demo::instructions(&logins, *listen, folder.path(), has_socket));
        }
        tokio::select! {
            () = until_stopped(&mut signals, &node, &folder) => {}
            () = postgres_ended => {
                let log = folder.path().join("postgres.log");
                return Err(Failure::new(format!("PostgreSQL has ended; see {}", log.display())));
            }
        }
        node.end(Ending::Now, std::future::pending()).await;
        Ok(postgres.stop(Stop::Fast)?)
    }
}

/// Reloads `proxy.toml` at HUP and RELOAD, as `serve` does; returns at any other signal and at SHUTDOWN.
async fn until_stopped(signals: &mut Signals, node: &Node, folder: &DataFolder) {
    loop {
        let reply = tokio::select! {
            kind = signals.next() => match kind == SignalKind::hangup() {
                true => None,
                false => return,
            },
            request = node.requested() => match request {
                Request::Reload(reply) => Some(reply),
                Request::Shutdown(_) => return,
            },
        };
        let reloaded = match folder.config(None) {
            Ok(config) => node.reload(config).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &reloaded {
            output::error_line(format!("configuration not reloaded: {error}"));
        }
        if let Some(reply) = reply {
            let _ = reply.send(reloaded);
        }
    }
}

fn actor(config: &Config) -> Result<Actor, Failure> {
    let keyring = ReloadableKeyring::load(config)?;
    Ok(Actor::new(Central::open(config)?, Arc::new(keyring), "pglobby dev"))
}

/// PostgreSQL may have another port or socket than in the last run: updates the tenants' host.
async fn update_host(actor: &Actor, central: &CentralAddress<'_>) -> Result<(), Failure> {
    let (address, port) = (central.host_address(), i32::from(central.port));
    let hosts = hosts::list(actor).await?;
    let is_old = |host: &HostSummary| host.address != address || host.port != port;
    if hosts.iter().any(|host| host.name == DEFAULT_HOST && is_old(host)) {
        let settings = [("address".to_owned(), address.clone()), ("port".to_owned(), port.to_string())];
        hosts::set(actor, DEFAULT_HOST, &settings, None).await?;
    }
    Ok(())
}

/// Lets other commands find this process without `--config`. A state folder that cannot be written is no
/// failure.
fn announce(folder: &DataFolder) -> Option<Announcement> {
    let dev = RunningDev { config: folder.config_path(), started_in: std::env::current_dir().ok()? };
    running::announce(&running::state_folder()?, &dev)
        .inspect_err(|error| {
            output::error_line(format!("other commands need --config to find this process: {error}"))
        })
        .ok()
}

/// Returns when PostgreSQL has ended: it holds the other end of this pipe and writes nothing to it.
async fn ended(signal: Option<ChildStdout>) {
    if let Some(mut signal) = signal {
        // Reading blocks a thread; it ends with PostgreSQL.
        let _ = tokio::task::spawn_blocking(move || std::io::copy(&mut signal, &mut std::io::sink())).await;
    }
}
