//! Opens servers for a pool, as far as its size, its host's budget and earlier failures allow.
//!
//! Sessions only wait in the queue; servers are opened in tasks of their own. So a server that comes back
//! early serves the session that has waited longest, a client that leaves cancels no attempt, and a failure
//! ends all waits, unless the host is only away for a while (`hold_during_outage`).

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{
    Pool, PooledServer,
    connect_backoff::{Attempt, FailedAttempt},
    connector::Opening,
    host_budget::Permit,
    host_connecting::Turn,
};
use crate::{
    data_path::{
        server::{
            DialError, NewConnection,
            connection::{AskError, Server},
        },
        session_state::Settings,
        worker,
    },
    error::ClientError,
};

impl Pool {
    /// Opens servers for waiting sessions. Runs on the pool's worker.
    pub(super) fn open_wanted(self: &Arc<Self>) {
        self.must_be_visited();
        while self.waiting() > self.opening() && self.open_one_more() {}
        if self.live() > 0 {
            return; // one may come back
        }
        if let Some(reason) = self.connector.error_at_once(Instant::now()) {
            self.refuse_waiting(&reason);
        }
    }

    /// [`Self::open_wanted`], from any thread.
    pub(super) fn open_wanted_soon(self: &Arc<Self>) {
        let pool = self.clone();
        self.spawn(async move { pool.open_wanted() });
    }

    /// Ends all waits with this reason, unless a server is open that may come back, or is being opened.
    pub(super) fn refuse_waiting(&self, reason: &ClientError) {
        if self.live() == 0 && !self.is_paused() {
            self.queue.refuse_all(reason);
        }
    }

    /// Whether the pool may open another server now.
    fn has_room(&self) -> bool {
        !self.is_retired() && !self.is_paused() && self.live() < self.rules.size && self.connector.may_open()
    }

    /// Whether it would open another server now, for waiting sessions or for `min_pool_size`.
    pub(super) fn wants_more(&self) -> bool {
        (self.waiting() > self.opening() || self.live() < self.rules.min_size) && self.has_room()
    }

    /// Servers that it would have besides those that it has, if its host had room.
    pub(super) fn wanted_beyond_live(&self) -> usize {
        if self.is_retired() || self.is_paused() {
            return 0;
        }
        let room = self.rules.size.saturating_sub(self.live());
        let to_min = self.rules.min_size.saturating_sub(self.live());
        self.waiting().saturating_sub(self.opening()).max(to_min).min(room)
    }

    /// Starts opening a server; `false`: not now.
    pub(super) fn open_one_more(self: &Arc<Self>) -> bool {
        self.has_room() && self.connector.host.take(self).is_some_and(|turn| self.start_opening(turn))
    }

    /// Its turn on the host has come. Runs on the pool's worker.
    pub(super) fn open_by(self: &Arc<Self>, turn: Turn) {
        // Without a permit it leaves the turns to other pools, and is called when a permit is free. If it asked
        // for another turn at once, pools that wait for permits would give each other turns without end.
        if !self.wants_more() || self.start_opening(turn) {
            self.open_wanted();
        }
    }

    /// `false`: the budget has no room.
    fn start_opening(self: &Arc<Self>, turn: Turn) -> bool {
        let Some(permit) = self.connector.budget.acquire(self) else { return false };
        let pool = self.clone();
        let opening = Opening::of(self);
        self.spawn(async move {
            pool.open(turn, permit).await;
            drop(opening);
        });
        true
    }

    async fn open(self: &Arc<Self>, turn: Turn, permit: Permit) {
        let attempt = self.connector.begin();
        match self.connector.connect_making_room(self, &turn, &Settings::default()).await {
            Ok(opened) => {
                let mut server = self.opened(opened, turn, permit, Settings::default());
                match self.has_same_start(&mut server).await {
                    Ok(true) => {
                        self.connector.lost_at_start.store(false, Ordering::Relaxed);
                        self.put_to_rest(server);
                    }
                    Ok(false) => {} // waiting sessions go on with the pool's successor
                    Err(error) => {
                        warn!(tenant = self.tenant.name, side = "server", %error, "new server lost");
                        drop(server);
                        self.lost_at_start(attempt, &error).await;
                    }
                }
            }
            // The budget is now what is open: the next permit that comes free is offered to this pool.
            Err(error) if self.connector.is_full_of_ours(&error) => {
                self.connector.count_failure(&error, true);
                turn.succeeded();
            }
            Err(error) => {
                let failed = self.connector.failed(turn, attempt, &error);
                drop(permit);
                if !self.repair(&error, &Settings::default()).await && !failed.holds {
                    self.refuse_waiting(&failed.reason);
                }
            }
        }
    }

    /// A server was lost at its start, and no session had it yet.
    async fn lost_at_start(self: &Arc<Self>, attempt: Attempt, error: &AskError) {
        let holds = matches!(error, AskError::Lost(_)) && self.connector.holds_after_loss();
        if !holds && self.repair_role_after(error).await {
            return; // waiting sessions go on with the pool's successor
        }
        let failed = FailedAttempt { reason: ClientError::ServerLost, holds };
        self.connector.failed_for_tenant(attempt, &failed);
        if !holds {
            self.refuse_waiting(&failed.reason);
        }
    }

    /// A server for one session, started with what its client asks for. `None`: pool or budget have no room,
    /// or the host takes no more connections while this pool has others. Errors: [`ClientError::Server`]
    /// with the server's own words where it refuses a parameter, [`ClientError::ServerUnreachable`].
    pub(super) async fn open_for(
        self: &Arc<Self>,
        startup: &Settings,
    ) -> Result<Option<Box<PooledServer>>, ClientError> {
        if !self.has_room() {
            return Ok(None);
        }
        let turn = match self.connector.host.wait(self.tenant.id).await {
            Ok(turn) => turn,
            Err(client_error) => return if self.live() > 0 { Ok(None) } else { Err(client_error) },
        };
        let permit = if self.has_room() { self.connector.budget.acquire(self) } else { None };
        let Some(permit) = permit else { return Ok(None) };
        let _opening = Opening::of(self);
        let attempt = self.connector.begin();
        match self.connector.connect_making_room(self, &turn, startup).await {
            Ok(opened) => Ok(Some(self.opened(opened, turn, permit, startup.clone()))),
            Err(error) => {
                if let Some(client_error) = error.about_parameter(startup) {
                    turn.succeeded();
                    return Err(client_error);
                }
                let failed = self.connector.failed(turn, attempt, &error);
                drop(permit);
                if self.repair(&error, startup).await {
                    return Ok(None);
                }
                if !failed.holds {
                    self.refuse_waiting(&failed.reason);
                }
                if self.live() > 0 { Ok(None) } else { Err(failed.reason) }
            }
        }
    }

    /// A server beside the pool: it counts in the host's budget, not in the pool's size, and is never given
    /// back. Errors: [`ClientError::PoolBusy`] if the budget is spent, [`ClientError::ServerUnreachable`].
    pub(super) async fn open_beside(self: &Arc<Self>) -> Result<Box<PooledServer>, ClientError> {
        let busy = ClientError::PoolBusy { waited: Duration::ZERO };
        let permit = self.connector.budget.acquire_beside(self).ok_or(busy)?;
        self.connector.pause().await;
        let turn = self.connector.host.wait(self.tenant.id).await?;
        let attempt = self.connector.begin();
        let mut opened = self.connector.connect_making_room(self, &turn, &Settings::default()).await;
        match &opened {
            Ok(_) => turn.succeeded(),
            Err(error) => {
                self.connector.failed(turn, attempt, error);
                // The successor knows a password that was being changed.
                if self.repair(error, &Settings::default()).await
                    && let Some(successor) = self.current()
                {
                    let turn = successor.connector.host.wait(successor.tenant.id).await?;
                    opened = successor.connector.connect(&turn, &Settings::default()).await;
                }
            }
        }
        let opened = opened.map_err(|error| error.client_error())?;
        let mut server = self.wrap(Server::new(opened, self.rules.prepared_max), permit);
        self.note_reported(&mut server);
        Ok(server)
    }

    /// Closes a server and opens another one with its permit, started with what a client asks for. Errors:
    /// As [`Self::open_for`].
    pub(super) async fn restart(
        &self,
        server: Box<PooledServer>,
        startup: Settings,
    ) -> Result<Box<PooledServer>, ClientError> {
        let (mut server, permit) = server.into_parts();
        let _ = server.stream.write_all(&[b'X', 0, 0, 0, 4]).await;
        drop(server);
        let turn = self.connector.host.wait(self.tenant.id).await?;
        let attempt = self.connector.begin();
        match self.connector.connect(&turn, &startup).await {
            Ok(opened) => Ok(self.opened(opened, turn, permit, startup)),
            Err(error) => match error.about_parameter(&startup) {
                Some(client_error) => {
                    turn.succeeded();
                    Err(client_error)
                }
                None => Err(self.connector.failed(turn, attempt, &error).reason),
            },
        }
    }

    fn opened(
        &self,
        opened: NewConnection,
        turn: Turn,
        permit: Permit,
        startup: Settings,
    ) -> Box<PooledServer> {
        let mut server = Server::new(opened, self.rules.prepared_max);
        server.startup = startup;
        let mut server = self.wrap(server, permit);
        server.changes_seen = self.status_cache.changes();
        self.note_reported(&mut server);
        debug!(tenant = self.tenant.name, server_pid = server.process_id, "server opened");
        self.connector.succeeded(turn);
        server
    }

    fn wrap(&self, server: Server, permit: Permit) -> Box<PooledServer> {
        let now = self.clock.now();
        let listed = self.server_list.add(&server.stream, server.process_id, now.as_millis() as u32);
        Box::new(PooledServer {
            server,
            owner: (self.tenant.id, self.access),
            changes_seen: 0,
            home: worker::here().unwrap_or_default(),
            opened_at: now,
            idle_since: now,
            answered_at: now,
            permit,
            renewed: None,
            listed,
        })
    }

    /// After a failure that a changed password, role or database may explain: has the row read again, and the
    /// role repaired. `true`: the pool was replaced, and waiting sessions go on with its successor. A
    /// tenant's passwords change on the host a moment before they change in its row.
    async fn repair(self: &Arc<Self>, error: &DialError, startup: &Settings) -> bool {
        match error.identity_trouble(startup) {
            Some(trouble) => self.repair_role(trouble).await,
            None => false,
        }
    }
}
