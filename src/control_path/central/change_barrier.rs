//! Read-your-writes: an admin command returns only after this node has applied the change.
//!
//! A change reaches pools and sessions by notification, also on the node that made it. After the change
//! this node sends itself a notification of its own, and the command waits until that arrives:
//! notifications arrive in commit order.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::oneshot;
use tracing::warn;

use super::{Central, CentralError};

/// The channel of these notifications.
pub const BARRIER_CHANNEL: &str = "pglobby_mark";

/// Waits of this node for its own notifications. There are no more than admin commands.
#[derive(Debug)]
pub struct ChangeBarrier {
    node: u64,
    sent: AtomicU64,
    waits: Mutex<HashMap<u64, oneshot::Sender<()>>>,
}

impl Default for ChangeBarrier {
    fn default() -> Self {
        Self { node: rand::random(), sent: AtomicU64::new(0), waits: Mutex::default() }
    }
}

impl ChangeBarrier {
    /// Waits until this node has applied all changes that were committed before, for `central_timeout` at
    /// most. After a longer outage the node treats everything as changed anyway.
    pub async fn wait_until_applied(&self, central: &Central) {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        let (sender, arrived) = oneshot::channel();
        self.locked().insert(number, sender);
        let round_trip = async {
            let client = central.client().await?;
            let payload = format!("{:x} {number}", self.node);
            client.execute("SELECT pg_catalog.pg_notify($1, $2)", &[&BARRIER_CHANNEL, &payload]).await?;
            let _ = arrived.await;
            Ok::<_, CentralError>(())
        };
        match tokio::time::timeout(central.timeout(), round_trip).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(side = "central", %error, "cannot confirm that this node has applied a change")
            }
            Err(_) => warn!(side = "central", "change not applied on this node within central_timeout"),
        }
        self.locked().remove(&number);
    }

    /// A barrier notification arrived; all changes before it are applied.
    pub fn arrived(&self, payload: &str) {
        let ours = payload.split_once(' ').filter(|(node, _)| u64::from_str_radix(node, 16) == Ok(self.node));
        let number = ours.and_then(|(_, number)| number.parse().ok());
        if let Some(sender) = number.and_then(|number: u64| self.locked().remove(&number)) {
            let _ = sender.send(());
        }
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<()>>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_is_known_by_node_and_number_and_other_payloads_are_ignored() {
        let barrier = ChangeBarrier::default();
        let (sender, mut arrived) = oneshot::channel();
        barrier.locked().insert(7, sender);
        let others = barrier.node.wrapping_add(1);
        for odd in ["", "7", "x 7", &format!("{others:x} 7"), &format!("{:x} 8", barrier.node)] {
            barrier.arrived(odd);
        }
        assert!(arrived.try_recv().is_err(), "not yet");
        barrier.arrived(&format!("{:x} 7", barrier.node));
        assert_eq!(arrived.try_recv(), Ok(()));
    }
}
