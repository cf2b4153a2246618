//! `pglobby serve`.

use std::{ffi::OsString, pin::pin, process::Stdio};

use clap::Args;
use sd_notify::NotifyState;
use tokio::{
    process::Command,
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};
use tracing::{error, info, warn};

use crate::{
    cli::{Failure, Globals, logging, process},
    control_path::{
        console::Request,
        node::Node,
        takeover::{asking_place, predecessor::Predecessor, successor::Successor},
    },
    data_path::unix_socket::UnixSocket,
    shutdown::Ending,
};

/// Run the proxy
///
/// Signals: HUP reloads the configuration; USR2 starts another process that takes over from this one; TERM
/// drains, for shutdown_timeout at most (a second TERM ends at once); INT waits until all transactions have
/// ended; QUIT ends at once.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pglobby serve\n  pglobby serve --config /etc/pglobby/proxy.toml\n  pglobby serve --take-over"
)]
pub struct Serve {
    /// Take over from the process that serves this configuration: its listening sockets, and its sessions. Without
    /// such a process, start as the first one
    #[arg(long)]
    take_over: bool,
}

/// The option of [`Serve::take_over`].
const TAKE_OVER: &str = "--take-over";

impl Serve {
    /// Serves until a signal ends it, or another process takes over.
    ///
    /// # Errors
    /// The configuration cannot be used, a port is taken, or a file cannot be read.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_own_config()?;
        logging::start(&config.log)?;
        process::prepare(&config);
        let mut signals = Signals::catch()?;
        let mut upgrades = signal(SignalKind::user_defined2())?;
        let taken =
            if self.take_over { Predecessor::ask(&config).await.map_err(Failure::new)? } else { None };
        let (predecessor, inherited) = taken.unzip();
        let mut inherited = inherited.unwrap_or_default();
        let mut place = asking_place(&config, &mut inherited.sockets).map_err(Failure::new)?;
        let mut node = tokio::select! {
            started = Node::start(config, &mut inherited) => started?,
            // Starting takes as long as the central database cannot be reached.
            () = signals.end_requested() => return Ok(()),
        };
        let (mut states, mut receiving) = (vec![NotifyState::Ready], None);
        if let Some(predecessor) = predecessor {
            receiving = Some(predecessor.replace(node.proxy.clone()).await.map_err(Failure::new)?);
            node.own_socket_files();
            place.iter_mut().for_each(UnixSocket::own_file);
            inherited.sockets.close_rest();
            states.push(NotifyState::MainPid(std::process::id()));
        }
        let _ = sd_notify::notify(false, &states);
        let successor = next_process(receiving, place.as_mut(), &node);
        let ending = until_end(globals, &node, &mut signals, &mut upgrades, successor).await;
        // The service goes on with the other process.
        if !matches!(ending, Ending::Replaced { .. }) {
            let _ = sd_notify::notify(false, &[NotifyState::Stopping]);
        }
        info!(shutdown_mode = ending_name(ending), "stopping");
        node.end(ending, signals.end_requested()).await;
        Ok(())
    }
}

/// The process that takes over from this one, once this one has all sessions of the process before.
async fn next_process(
    receiving: Option<JoinHandle<()>>,
    place: Option<&mut UnixSocket>,
    node: &Node,
) -> Successor {
    if let Some(receiving) = receiving {
        let _ = receiving.await;
    }
    match place {
        Some(place) => Successor::of(place, node).await,
        None => std::future::pending().await,
    }
}

/// Serves until a signal, an administrator or another process ends it; returns how.
async fn until_end(
    globals: &Globals,
    node: &Node,
    signals: &mut Signals,
    upgrades: &mut Signal,
    successor: impl Future<Output = Successor>,
) -> Ending {
    let at_most = || node.proxy.config.load().timeouts.shutdown;
    let mut successor = pin!(successor);
    loop {
        tokio::select! {
            kind = signals.next() => match kind {
                kind if kind == SignalKind::hangup() => drop(reload(globals, node).await),
                kind if kind == SignalKind::terminate() => return Ending::Drain { at_most: Some(at_most()) },
                kind if kind == SignalKind::interrupt() => return Ending::Drain { at_most: None },
                _ => return Ending::Now,
            },
            request = node.requested() => match request {
                Request::Reload(reply) => drop(reply.send(reload(globals, node).await)),
                Request::Shutdown(ending) => return ending,
            },
            successor = &mut successor => {
                successor.receive_from(&node.proxy);
                return Ending::Replaced { at_most: at_most() };
            }
            _ = upgrades.recv() => start_successor(),
        }
    }
}

/// Starts the program anew, as it was started, to take over from this process. The program's file may be a newer
/// one by now.
fn start_successor() {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if !arguments.iter().any(|argument| argument == TAKE_OVER) {
        arguments.push(TAKE_OVER.into());
    }
    let mut arguments = arguments.into_iter();
    let Some(program) = arguments.next() else { return };
    match Command::new(&program).args(arguments).stdin(Stdio::null()).spawn() {
        Ok(mut process) => {
            info!(pid = process.id(), program = %program.display(), "starting a process that takes over");
            tokio::spawn(async move {
                let status =
                    process.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
                warn!(status, "the process that was to take over has ended");
            });
        }
        Err(error) => error!(program = %program.display(), %error, "cannot start a process that takes over"),
    }
}

async fn reload(globals: &Globals, node: &Node) -> Result<(), String> {
    let _ = sd_notify::notify(false, &[NotifyState::Reloading]);
    let reloaded = match globals.load_own_config() {
        Ok(config) => node.reload(config).await.map_err(|error| error.to_string()),
        Err(failure) => Err(failure.to_string()),
    };
    if let Err(error) = &reloaded {
        error!(%error, "configuration not reloaded");
    }
    let _ = sd_notify::notify(false, &[NotifyState::Ready]);
    reloaded
}

fn ending_name(ending: Ending) -> &'static str {
    match ending {
        Ending::Drain { at_most: Some(_) } => "drain within shutdown_timeout",
        Ending::Drain { at_most: None } => "wait for transactions",
        Ending::Replaced { .. } => "another process has taken over",
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
