//! Who gives an order at a node and has the answer finds that this node has heard of it.
//!
//! Changes are carried to pools and sessions by notification, on the node that made them as on all others: one road
//! (`node.rs`). Behind a change that was ordered here goes a mark, and the answer waits until the mark has come round.

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

/// The channel on which marks travel.
pub const BARRIER_CHANNEL: &str = "pglobby_mark";

/// Marks of this node that are under way: no more than orders are.
#[derive(Debug)]
pub struct ChangeBarrier {
    node: u64,
    sent: AtomicU64,
    under_way: Mutex<HashMap<u64, oneshot::Sender<()>>>,
}

impl Default for ChangeBarrier {
    fn default() -> Self {
        Self { node: rand::random(), sent: AtomicU64::new(0), under_way: Mutex::default() }
    }
}

impl ChangeBarrier {
    /// Waits until this node has done what was committed before; `central_timeout` at most, since while nothing is heard of
    /// the central database everything will be looked at anew when it is.
    pub async fn wait_until_applied(&self, central: &Central) {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        self.locked().insert(number, tell);
        let come_round = async {
            let client = central.client().await?;
            let payload = format!("{:x} {number}", self.node);
            client.execute("SELECT pg_catalog.pg_notify($1, $2)", &[&BARRIER_CHANNEL, &payload]).await?;
            let _ = told.await;
            Ok::<_, CentralError>(())
        };
        match tokio::time::timeout(central.timeout(), come_round).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(side = "central", %error, "cannot tell whether this node follows an order")
            }
            Err(_) => warn!(side = "central", "this node has not heard yet of an order that was given here"),
        }
        self.locked().remove(&number);
    }

    /// A mark was heard, and all that came before it is done.
    pub fn arrived(&self, payload: &str) {
        let ours = payload.split_once(' ').filter(|(node, _)| u64::from_str_radix(node, 16) == Ok(self.node));
        let number = ours.and_then(|(_, number)| number.parse().ok());
        if let Some(tell) = number.and_then(|number: u64| self.locked().remove(&number)) {
            let _ = tell.send(());
        }
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<()>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_known_by_node_and_number_and_nonsense_is_not() {
        let barrier = ChangeBarrier::default();
        let (tell, mut told) = oneshot::channel();
        barrier.locked().insert(7, tell);
        let others = barrier.node.wrapping_add(1);
        for odd in ["", "7", "x 7", &format!("{others:x} 7"), &format!("{:x} 8", barrier.node)] {
            barrier.arrived(odd);
        }
        assert!(told.try_recv().is_err(), "not yet");
        barrier.arrived(&format!("{:x} 7", barrier.node));
        assert_eq!(told.try_recv(), Ok(()));
    }
}
