//! Applies what the central database reports to pools, sessions and the directory, in commit order.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep, sleep_until},
};
use tracing::warn;

use super::{
    central::{
        Central,
        change_barrier::ChangeBarrier,
        change_feed::{self, FeedEvent},
        move_pause::MovePauses,
    },
    directory::CentralDirectory,
    fleet::{Fleet, pauses::PAUSES},
};
use crate::data_path::{proxy::Proxy, tenant::DirectoryChange};

/// Notifications read and not yet applied. Beyond this the connection is not read until some are applied.
const EVENTS_MAX: usize = 4096;

/// When what could not be read or compared is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What follows the changes.
pub struct Follower {
    proxy: Arc<Proxy>,
    directory: Arc<CentralDirectory>,
    barrier: Arc<ChangeBarrier>,
    fleet: Arc<Fleet>,
    /// Wakes the renewal of leases.
    leases_told: Arc<Notify>,
    move_pauses: MovePauses,
    /// When to compare all sessions with the central database, because some may have been admitted without it.
    confirm_at: Option<Instant>,
}

/// Receives changes and applies them. Returns only if it is dropped.
pub async fn follow(central: Central, mut follower: Follower) {
    let (sender, mut events) = mpsc::channel(EVENTS_MAX);
    let (metrics, directory) = (follower.proxy.metrics.clone(), follower.directory.clone());
    let listening = change_feed::follow(central, sender, move |listening| {
        metrics.set_central_reachable(listening);
        directory.set_listening(listening);
    });
    let applying = async { while follower.step(&mut events).await {} };
    tokio::join!(listening, applying);
    warn!(side = "central", "stopped following changes");
}

impl Follower {
    /// Has followed nothing yet. `leases_told` wakes the renewal of leases.
    pub fn new(
        central: &Central,
        proxy: &Arc<Proxy>,
        directory: &Arc<CentralDirectory>,
        barrier: Arc<ChangeBarrier>,
        fleet: &Arc<Fleet>,
        leases_told: Arc<Notify>,
    ) -> Self {
        Self {
            move_pauses: MovePauses::new(central.clone(), proxy.clone()),
            proxy: proxy.clone(),
            directory: directory.clone(),
            barrier,
            fleet: fleet.clone(),
            leases_told,
            confirm_at: None,
        }
    }

    /// One event, or one thing that has waited. `false`: no more will come.
    async fn step(&mut self, events: &mut mpsc::Receiver<FeedEvent>) -> bool {
        let now = Instant::now;
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => self.apply(event).await,
                None => return false,
            },
            () = self.fleet.peers.changed() => self.directory.snapshot().outdated(),
            () = self.directory.used_unconfirmed(), if self.confirm_at.is_none() => self.confirm_soon(),
            () = sleep_until(self.confirm_at.unwrap_or_else(now)), if self.confirm_at.is_some() => {
                let is_done = self.directory.is_listening() && self.proxy.confirm_all().await;
                self.confirm_at = None;
                if !is_done {
                    self.confirm_soon();
                }
            }
            () = sleep(RETRY), if self.move_pauses.must_retry() => self.move_pauses.apply().await,
            () = sleep(RETRY), if self.fleet.pauses.must_retry() => self.fleet.pauses.follow().await,
        }
        true
    }

    fn confirm_soon(&mut self) {
        self.confirm_at = Some(Instant::now() + RETRY);
    }

    async fn apply(&mut self, event: FeedEvent) {
        match event {
            FeedEvent::Changed(change) => self.apply_change(change).await,
            FeedEvent::Leases { node } if self.fleet.registration.id() != Some(node) => {
                self.leases_told.notify_one()
            }
            FeedEvent::Leases { .. } => {}
            FeedEvent::HostFull(host) => self.proxy.pools.make_room(&host),
            FeedEvent::Barrier(payload) => self.barrier.arrived(&payload),
            FeedEvent::Fleet(payload) => {
                if payload == PAUSES {
                    self.directory.snapshot().outdated();
                }
                self.fleet.notified(&payload).await;
            }
            // Without waiting for its end: the client that asked is at another node.
            FeedEvent::Cancel(key) => {
                let session = self.proxy.sessions.find(key.process_id, &key.secret);
                drop(session.map(|session| session.cancel()));
            }
        }
    }

    async fn apply_change(&mut self, change: DirectoryChange) {
        let may_move = matches!(change, DirectoryChange::Tenant(_) | DirectoryChange::Everything);
        let may_have_missed_others = change == DirectoryChange::Everything;
        if !self.proxy.apply(change).await {
            self.confirm_soon();
        }
        if may_move {
            self.move_pauses.apply().await;
        }
        if may_have_missed_others {
            self.fleet.catch_up().await;
        }
    }
}
