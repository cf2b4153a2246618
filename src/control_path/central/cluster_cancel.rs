//! Cancel requests among several nodes behind a load balancer: a request may reach any node, and only one
//! node has the session.
//!
//! The process number that a client got names its node (`data_path/sessions/registry.rs`), and the node's row has its
//! address: the request is passed on there, marked so that it goes no further. The central database is not needed for that.
//!
//! A node that cannot be reached in this way, or whose number is not known (in session mode the process number is a
//! server's), is told through the central database, which tells all nodes. If that is away as well, all known nodes are asked,
//! one after another.
//!
//! A full host is announced to all nodes through the central database as well.

use std::{fmt::Write as _, io, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::sync::{Semaphore, oneshot};
use tracing::{debug, warn};

use super::{Central, CentralError};
use crate::{
    config::TlsMode,
    control_path::fleet::peers::Peers,
    data_path::{
        host_address::HostAddress,
        proxy::{ClusterCancel, ForeignCancel},
        server::{DialOptions, pass_on_cancel},
        sessions::{passed_on::PassedOn, registry::node_of},
        tenant::Host,
    },
};

/// A node that is not reached in this time is told through the central database.
const REACHED_WITHIN: Duration = Duration::from_secs(1);

/// The channel of cancel requests.
pub const CANCEL_CHANNEL: &str = "pglobby_cancel";
/// The channel of names of full hosts.
pub const FULL_CHANNEL: &str = "pglobby_full";

/// The key in a cancel request.
#[derive(Clone, PartialEq, Eq)]
pub struct CancelKey {
    /// The process number.
    pub process_id: i32,
    /// The secret.
    pub secret: Vec<u8>,
}

impl std::fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelKey").field("process_id", &self.process_id).finish_non_exhaustive()
    }
}

impl CancelKey {
    /// `<process number> <secret in hexadecimal>`.
    fn payload(&self) -> String {
        let mut text = format!("{} ", self.process_id);
        for byte in &self.secret {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    /// Parses a payload; `None` if it is invalid.
    pub fn parse(payload: &str) -> Option<Self> {
        let (process_id, secret) = payload.split_once(' ')?;
        let digits = secret.as_bytes().chunks(2).map(|pair| {
            let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?;
            u8::from_str_radix(pair, 16).ok()
        });
        Some(Self { process_id: process_id.parse().ok()?, secret: digits.collect::<Option<_>>()? })
    }
}

/// Passes cancel requests on to other nodes. At most `requests_max` (`max_cancels`) are under way; more are dropped,
/// since the protocol does not guarantee a cancel.
pub fn messenger(
    central: Central,
    peers: Arc<Peers>,
    dial: Arc<ArcSwap<DialOptions>>,
    requests_max: usize,
) -> ClusterCancel {
    let turns = Arc::new(Semaphore::new(requests_max.max(1)));
    Arc::new(move |cancel| {
        let (done, complete) = oneshot::channel();
        let messenger = Messenger { central: central.clone(), peers: peers.clone(), dial: dial.load_full() };
        match turns.clone().try_acquire_owned() {
            // A task of its own: it goes on if the client does not wait.
            Ok(turn) => drop(tokio::spawn(async move {
                let _held: (_, oneshot::Sender<()>) = (turn, done);
                messenger.pass_on(cancel).await;
            })),
            Err(_) => debug!("cancel for another node dropped: max_cancels are under way"),
        }
        complete
    })
}

struct Messenger {
    central: Central,
    peers: Arc<Peers>,
    dial: Arc<DialOptions>,
}

impl Messenger {
    async fn pass_on(&self, cancel: ForeignCancel) {
        let owner = node_of(cancel.process_id).and_then(|number| self.peers.address_of(number));
        if let Some(owner) = owner.filter(|_| !cancel.was_passed_on) {
            match self.send(&owner, PassedOn::ToOwner, &cancel).await {
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                    debug!(%error, node = ?owner, "cannot reach the node of a cancel request");
                }
                // Otherwise it may have got it. A second one could hit the session's next query.
                _ => return,
            }
        }
        let key = CancelKey { process_id: cancel.process_id, secret: cancel.secret.clone() };
        let Err(error) = tell(&self.central, CANCEL_CHANNEL, &key.payload()).await else { return };
        let peers = if cancel.was_passed_on { Vec::new() } else { self.peers.all() };
        if peers.is_empty() {
            return warn!(side = "central", %error, "cancel request for another node lost");
        }
        // Without the right key it does nothing there.
        for peer in peers {
            let _ = self.send(&peer, PassedOn::ToAll, &cancel).await;
        }
    }

    async fn send(&self, node: &HostAddress, to: PassedOn, cancel: &ForeignCancel) -> io::Result<()> {
        let host = Host {
            name: String::new(),
            addresses: Box::new([node.clone()]),
            tls_mode: TlsMode::Prefer,
            tls_root_ca: None,
            max_connections: None,
        };
        let key = to.marked(&cancel.secret);
        pass_on_cancel(&host, node, REACHED_WITHIN, cancel.process_id, &key, &self.dial).await
    }
}

/// Asks all nodes to close idle servers on a host, to make room for an admin connection. There is no
/// answer; the caller tries to connect again.
pub async fn ask_for_room(central: &Central, host: &str) -> Result<(), CentralError> {
    tell(central, FULL_CHANNEL, host).await
}

async fn tell(central: &Central, channel: &str, payload: &str) -> Result<(), CentralError> {
    let client = central.client().await?;
    client.execute("SELECT pg_catalog.pg_notify($1, $2)", &[&channel, &payload]).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_the_journey_and_nonsense_does_not() {
        let key = CancelKey { process_id: 7, secret: vec![0, 1, 0xab, 255] };
        assert_eq!(CancelKey::parse(&key.payload()), Some(key));
        for odd in ["", "7", "x 00", "7 0", "7 zz", "7 \u{e9}\u{e9}", "99999999999 00"] {
            assert_eq!(CancelKey::parse(odd), None, "{odd}");
        }
    }
}
