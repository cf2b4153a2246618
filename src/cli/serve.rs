//! `pglobby serve`.

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info};

use crate::{
    cli::{Failure, Globals, logging, process},
    control_path::{console::Request, node::Node},
    shutdown::Ending,
};

/// Run the proxy
///
/// Signals: HUP reloads the configuration; TERM drains, for shutdown_timeout at most (a second TERM ends at
/// once); INT waits until all transactions have ended; QUIT ends at once.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby serve\n  pglobby serve --config /etc/pglobby/proxy.toml")]
pub struct Serve {}

impl Serve {
    /// Serves until a signal ends it.
    ///
    /// # Errors
    /// The configuration cannot be used, a port is taken, or a file cannot be read.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_own_config()?;
        logging::start(&config.log)?;
        process::prepare(&config);
        let mut signals = Signals::catch()?;
        let grace = config.timeouts.shutdown;
        let node = tokio::select! {
            started = Node::start(config) => started?,
            // Starting takes as long as the central database cannot be reached.
            () = signals.end_requested() => return Ok(()),
        };
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
        let ending = loop {
            tokio::select! {
                kind = signals.next() => match kind {
                    kind if kind == SignalKind::hangup() => drop(reload(globals, &node).await),
                    kind if kind == SignalKind::terminate() => break Ending::Drain { at_most: Some(grace) },
                    kind if kind == SignalKind::interrupt() => break Ending::Drain { at_most: None },
                    _ => break Ending::Now,
                },
                request = node.requested() => match request {
                    Request::Reload(reply) => drop(reply.send(reload(globals, &node).await)),
                    Request::Shutdown(ending) => break ending,
                },
            }
        };
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        info!(shutdown_mode = ending_name(ending), "stopping");
        node.end(ending, signals.end_requested()).await;
        Ok(())
    }
}

async fn reload(globals: &Globals, node: &Node) -> Result<(), String> {
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Reloading]);
    let reloaded = match globals.load_own_config() {
        Ok(config) => node.reload(config).await.map_err(|error| error.to_string()),
        Err(failure) => Err(failure.to_string()),
    };
    if let Err(error) = &reloaded {
        error!(%error, "configuration not reloaded");
    }
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
    reloaded
}

fn ending_name(ending: Ending) -> &'static str {
    match ending {
        Ending::Drain { at_most: Some(_) } => "drain within shutdown_timeout",
        Ending::Drain { at_most: None } => "wait for transactions",
        Ending::Now => "at once",
    }
}

/// The signals that `serve` and `dev` act on.
pub(super) struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
}

impl Signals {
    pub(super) fn catch() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    pub(super) async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.hangup.recv() => SignalKind::hangup(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.quit.recv() => SignalKind::quit(),
        }
    }

    /// Returns at the next signal that asks to end.
    async fn end_requested(&mut self) {
        while self.next().await == SignalKind::hangup() {}
    }
}
