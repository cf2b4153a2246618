//! The nodes that share a central database: each has a row there, and a lease on a part of each host's budget.
//!
//! No node is in charge. Each writes its own rows, reads those of the others, and decides by the same rules. No
//! query of a client waits for any of it.
//!
//! `membership.rs` renews; `lease_keeper.rs` decides, from who lives (`presence.rs`) and what each wants
//! (`allocation.rs`, `lease_decision.rs`); `lease_rows.rs` has the statements.
//!
//! What an administrator asks of all nodes goes through rows as well: `pauses.rs`, `requests.rs`, `answers.rs`.

mod allocation;
pub mod answers;
pub mod identity;
mod lease_decision;
mod lease_keeper;
mod lease_rows;
pub mod membership;
pub mod nodes;
pub mod pauses;
mod peak;
pub mod peers;
mod presence;
pub mod registration;
pub mod requests;
#[cfg(test)]
mod simulation;
mod waiting;

use std::sync::{
    Arc, Mutex, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::{Semaphore, watch};

use self::{answers::Handler, pauses::FleetPauses, peers::Peers, registration::Registration};
use crate::{
    control_path::{
        central::{Central, CentralError},
        directory::snapshot::About,
    },
    data_path::pool::{TenantPools, host_lease::HostLease},
};

/// The channel on which nodes are told of pauses, requests and answers.
pub const FLEET_CHANNEL: &str = "pglobby_fleet";

/// This node among the others.
pub struct Fleet {
    central: Central,
    pools: Arc<TenantPools>,
    /// Its row.
    pub registration: Arc<Registration>,
    /// Where the others are.
    pub peers: Arc<Peers>,
    /// What is paused and disabled on all nodes.
    pub pauses: FleetPauses,
    /// Changes when any node has answered any request.
    answered: watch::Sender<()>,
    /// Nodes that have a row and are gone, with their last beats, as of the last renewal.
    pub gone: Arc<Mutex<Vec<(i64, i64)>>>,
    /// No other node was there at the last renewal.
    is_alone: AtomicBool,
    handler: OnceLock<Handler>,
    running: Arc<Semaphore>,
}

/// Why other nodes could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// Steps of the schema are missing.
    #[error("the central schema is older than this pglobby; run `pglobby init`")]
    OlderSchema,
    /// This node has no row now.
    #[error("this node is not registered in the central database yet")]
    NotRegistered,
    /// The central database.
    #[error(transparent)]
    Central(#[from] CentralError),
}

impl Fleet {
    /// Answers no request before [`Self::answer_with`].
    pub fn new(central: Central, registration: Arc<Registration>, pools: Arc<TenantPools>) -> Self {
        Self {
            peers: Arc::new(Peers::new(registration.identity.process.clone())),
            pauses: FleetPauses::new(central.clone(), pools.clone()),
            pools,
            central,
            registration,
            answered: watch::Sender::new(()),
            gone: Arc::default(),
            is_alone: AtomicBool::default(),
            handler: OnceLock::new(),
            running: Arc::new(Semaphore::new(answers::RUNNING_MAX)),
        }
    }

    /// Runs requests of other nodes with `handler` from now on.
    pub fn answer_with(&self, handler: Handler) {
        let _ = self.handler.set(handler);
    }

    /// Registers this node and reads what is paused, before clients are accepted: a command to all nodes either
    /// waits for this node or is read here. An error is logged; both are repeated later.
    pub async fn join(&self) {
        let registered = async {
            let client = self.central.client().await?;
            self.registration.insert(&**client).await?;
            Ok::<_, FleetError>(())
        };
        if let Err(error) = registered.await {
            tracing::warn!(side = "central", %error, "cannot register this node; retrying");
        }
        self.pauses.follow().await;
    }

    /// The same where only a snapshot is there. Each node that served when it was taken, and this one, have an equal part
    /// of each host's budget: none can see what the others have.
    pub fn begin_without_central(&self, about: &About) {
        let is_known = about.nodes.iter().any(|node| self.is_this_node(&node.name));
        let nodes = about.nodes.len() + usize::from(!is_known);
        self.is_alone.store(nodes == 1, Ordering::Relaxed);
        self.pools.lease_requests.set_of_new_hosts(HostLease::Share { nodes });
        self.pauses.begin_with(&about.pauses);
        self.peers.set(&about.nodes);
        tracing::warn!(
            nodes,
            "this node uses an equal part of each host's budget until it can read its leases"
        );
    }

    /// Whether `name` is this node's.
    pub fn is_this_node(&self, name: &str) -> bool {
        self.registration.identity.name.eq_ignore_ascii_case(name)
    }

    /// The name of this node.
    pub fn name(&self) -> &str {
        &self.registration.identity.name
    }
}
