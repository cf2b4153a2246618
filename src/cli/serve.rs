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
/// HUP reloads the configuration, TERM drains (a second TERM ends at once), INT waits for transactions, QUIT ends at once.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby serve --config proxy.toml")]
pub struct Serve {}

impl Serve {
    /// Serves until a signal ends it.
    ///
    /// # Errors
    /// Whatever keeps it from starting.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_own_config()?;
        logging::start(&config.log)?;
        process::prepare(&config);
        let mut signals = Signals::catch()?;
        let grace = config.timeouts.shutdown;
        let serving = tokio::select! {
            started = Node::start(config) => started?,
            // While it waits for the central database.
            () = signals.impatience() => return Ok(()),
        };
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
        let ending = loop {
            tokio::select! {
                kind = signals.next() => match kind {
                    kind if kind == SignalKind::hangup() => drop(reload(globals, &serving).await),
                    kind if kind == SignalKind::terminate() => break Ending::Drain { at_most: Some(grace) },
                    kind if kind == SignalKind::interrupt() => break Ending::Drain { at_most: None },
                    _ => break Ending::Now,
                },
                request = serving.requested() => match request {
                    Request::Reload(tell) => drop(tell.send(reload(globals, &serving).await)),
                    Request::Shutdown(ending) => break ending,
                },
            }
        };
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        info!(?ending, "stopping");
        serving.end(ending, signals.impatience()).await;
        Ok(())
    }
}

async fn reload(globals: &Globals, serving: &Node) -> Result<(), String> {
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Reloading]);
    let reloaded = match globals.load_own_config() {
        Ok(config) => serving.reload(config).await.map_err(|error| error.to_string()),
        Err(failure) => Err(failure.to_string()),
    };
    if let Err(error) = &reloaded {
        error!(%error, "the configuration was not reloaded");
    }
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
    reloaded
}

/// The signals that mean something to us.
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

    /// Another signal to end, while ending.
    async fn impatience(&mut self) {
        while self.next().await == SignalKind::hangup() {}
    }
}
