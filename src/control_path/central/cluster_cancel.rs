//! Cancel requests among several nodes behind a load balancer: a request may reach any node, and only one
//! node has the session.
//!
//! The process number that a client got names its node (`data_path/sessions/registry.rs`). A request for
//! another node is sent to all nodes through the central database, which only the master login may enter.
//! The node that has the session acts. The client's cancel connection does not wait for that.
//!
//! A full host is announced to all nodes in the same way.

use std::{fmt::Write as _, sync::Arc};

use tokio::sync::mpsc;
use tracing::warn;

use super::{Central, CentralError};
use crate::data_path::proxy::ClusterCancel;

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

/// Forwards cancel requests to other nodes. At most `queue_max` (`max_cancels`) wait; more are dropped,
/// since the protocol does not guarantee a cancel.
pub fn messenger(central: Central, queue_max: usize) -> ClusterCancel {
    let (queue, mut queued) = mpsc::channel::<CancelKey>(queue_max.max(1));
    tokio::spawn(async move {
        while let Some(key) = queued.recv().await {
            if let Err(error) = tell(&central, CANCEL_CHANNEL, &key.payload()).await {
                warn!(side = "central", %error, "cancel request for another node lost");
            }
        }
    });
    Arc::new(move |process_id, secret| drop(queue.try_send(CancelKey { process_id, secret })))
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
