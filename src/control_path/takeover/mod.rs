//! A new process takes over from the running one, on the same machine and for the same configuration: no client is
//! refused meanwhile, and sessions go on.
//!
//! ```text
//!   new process                        running process
//!   connects to takeover_socket ─────▶ looks whether it is the same user
//!   Hello ───────────────────────────▶
//!         ◀─────────────────────────── Sockets: all listening ones
//!   starts as always, and accepts clients on them
//!   Accepting ───────────────────────▶ stops accepting
//!         ◀─────────────────────────── Session: each, when it is between two transactions
//!   Moved, or Refused ───────────────▶ closes its side of the session, or ends the session
//!                                      ends when all have left, after shutdown_timeout at the latest; where it
//!                                      has the TLS of sessions that have moved, after takeover_tls_timeout
//! ```
//!
//! Until Accepting, the running process goes on whatever becomes of the new one. `link.rs` has the messages,
//! `predecessor.rs` the side of the new process, `successor.rs` that of the running one.

mod link;
pub mod predecessor;
pub mod successor;

use std::{io, os::unix::net::UnixStream, path::Path};

use tokio::net::unix::UCred;
use tracing::info;

use crate::{
    config::{Config, TakeoverSocket},
    data_path::{inherited_sockets::InheritedSockets, unix_socket::UnixSocket},
};

/// What a process gets from the one before.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The listening sockets.
    pub sockets: InheritedSockets,
    /// The upper bits of the process numbers that the process before has given out; `None`: there is none.
    pub process_numbers: Option<u32>,
}

/// Takes the socket at which the next process asks from the process before, or makes it. `None`: it is off, or cannot
/// be made at its default place.
///
/// # Errors
/// Another process serves this configuration, or the socket cannot be made at the configured place.
pub fn asking_place(config: &Config, inherited: &mut InheritedSockets) -> Result<Option<UnixSocket>, String> {
    let Some(path) = config.takeover_socket.path() else { return Ok(None) };
    let error = match UnixSocket::open(path.to_owned(), OWNER_ONLY, inherited) {
        Ok(socket) => return Ok(Some(socket)),
        Err(error) => error,
    };
    if error.kind() == io::ErrorKind::AddrInUse {
        return Err(serves_already(path));
    }
    match config.takeover_socket {
        TakeoverSocket::Path(_) => {
            Err(format!("cannot listen on {} (takeover_socket): {error}", path.display()))
        }
        _ => {
            info!(socket = %path.display(), %error, "no process can take over from this one");
            Ok(None)
        }
    }
}

/// Rights on the file of that socket.
const OWNER_ONLY: u32 = 0o600;

/// The error of a process that finds another one at its socket.
fn serves_already(path: &Path) -> String {
    let holder = UnixStream::connect(path).and_then(|stream| {
        stream.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(stream)?.peer_cred()
    });
    let pid = holder.ok().and_then(|holder| holder.pid());
    let holder = pid.map_or("another process".to_owned(), |pid| format!("process {pid}"));
    format!(
        "{holder} serves this configuration already. `pglobby serve --take-over` takes over from it; another \
         installation needs another takeover_socket (this one is {})",
        path.display()
    )
}

/// Only processes of the same user may take over from each other. An error says so.
fn require_same_user(peer: &UCred) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    match peer.uid() {
        uid if uid == own => Ok(()),
        uid => Err(format!("the other process runs as user {uid}, and this one as user {own}")),
    }
}
