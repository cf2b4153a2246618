//! Opens servers for a pool, and closes those it no longer needs.
//!
//! Sessions only ever wait in the pool's line; servers are opened by tasks of their own. So a server that comes back
//! early serves whoever waited longest, a client that leaves cancels no connect, and a connect that fails is told to all.
//! When an attempt may begin is said by `host_connecting.rs` for all pools of a host, and after failures that are the tenant's
//! own by the pool's `connect_backoff.rs`.

use std::{
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use deadpool::unmanaged::Object;
use tokio::io::AsyncWriteExt;
use tracing::{debug, info, warn};

use super::{
    Counted, Pool,
    connect_backoff::{Attempt, ConnectBackoff},
    host_budget::Permit,
    host_connecting::Turn,
};
use crate::{
    data_path::{
        server::{self, DialError, OnAnswer, Opened, Target, connection::Server},
        session_state::Settings,
    },
    error::ClientError,
};

/// Between attempts to connect to a host that is full, each after an idle connection of another pool was closed.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
];

impl Pool {
    /// Opens servers for sessions that wait, as far as pool, host, budget and earlier failures allow. Runs on the pool's worker.
    pub(super) fn open_wanted(self: &Arc<Self>) {
        while self.waiting() > self.opening() && self.open_one_more() {}
        if self.live() > 0 {
            return; // one may come back
        }
        let now = Instant::now();
        let own = self.backoff().told_at_once(now);
        if let Some(reason) = own.or_else(|| self.connects.told_at_once(now)) {
            self.refuse_waiting(&reason);
        }
    }

    /// Tells all who wait why they get no server, unless one is open that may come back, or is being opened.
    pub(super) fn refuse_waiting(&self, reason: &ClientError) {
        if self.live() == 0 && !self.is_paused() {
            self.line.refuse_all(reason);
        }
    }

    /// [`Self::open_wanted`], from any thread.
    pub(super) fn ask_again(self: &Arc<Self>) {
        let pool = self.clone();
        self.worker.spawn(async move { pool.open_wanted() });
    }

    fn backoff(&self) -> MutexGuard<'_, ConnectBackoff> {
        self.backoff.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) -> Attempt {
        self.backoff().begin()
    }

    /// Whether the last attempt of its own, or of its host's, failed.
    pub(super) fn is_failing(&self) -> bool {
        // One lock after the other: whoever gives out turns holds the host's and takes the pool's.
        let own = self.backoff().is_failing();
        own || self.connects.is_failing()
    }

    /// Why the last attempt since then failed, if none has succeeded after it.
    pub(super) fn reason_since(&self, since: Instant) -> Option<ClientError> {
        let own = self.backoff().reason_since(since);
        own.or_else(|| self.connects.reason_since(since))
    }

    /// What those are told who have waited for [`TOLD_WITHIN`](super::connect_backoff::TOLD_WITHIN), and have no server to wait for.
    pub(super) fn silent(&self, now: Instant) -> Option<ClientError> {
        let hopeless = self.live() <= self.opening() && !self.is_paused();
        if hopeless { self.connects.silent(now) } else { None }
    }

    /// Whether it has room for another server, and its own failures allow an attempt now.
    fn has_room(&self) -> bool {
        !self.is_retired()
            && !self.is_paused()
            && self.live() < self.rules.size
            && self.opening() < self.backoff().at_a_time(Instant::now())
    }

    /// Whether it would open another server now for those who wait, or to have as many as it keeps open.
    pub(super) fn wants_more(&self) -> bool {
        (self.waiting() > self.opening() || self.live() < self.rules.min_size) && self.has_room()
    }

    /// Starts opening a server; `false` if pool, host or budget have no room, or earlier failures forbid it for now.
    fn open_one_more(self: &Arc<Self>) -> bool {
        self.has_room() && self.connects.take(self).is_some_and(|turn| self.begin_to_open(turn))
    }

    /// Its turn on the host has come. Runs on the pool's worker.
    pub(super) fn open_by(self: &Arc<Self>, turn: Turn) {
        if self.wants_more() {
            self.begin_to_open(turn);
        }
        self.open_wanted();
    }

    /// `false` if the budget has no room.
    fn begin_to_open(self: &Arc<Self>, turn: Turn) -> bool {
        let Some(permit) = self.budget.acquire(self) else { return false };
        let pool = self.clone();
        let opening = Counted::new(self, |pool| &pool.opening);
        self.worker.spawn(async move {
            pool.open(turn, permit).await;
            drop(opening);
        });
        true
    }

    /// A server for one session, started with what its client asks for; `None` if pool or budget have no room, or the host
    /// takes no more connections while this pool has others.
    ///
    /// # Errors
    /// [`ClientError::Server`] with the server's own words where it refuses a parameter, [`ClientError::ServerUnreachable`].
    pub(super) async fn open_for(
        self: &Arc<Self>,
        startup: &Settings,
    ) -> Result<Option<Box<Server>>, ClientError> {
        if !self.has_room() {
            return Ok(None);
        }
        let turn = match self.connects.wait(self.tenant.id).await {
            Ok(turn) => turn,
            Err(refusal) => return if self.live() > 0 { Ok(None) } else { Err(refusal) },
        };
        let permit = if self.has_room() { self.budget.acquire(self) } else { None };
        let Some(permit) = permit else { return Ok(None) };
        let _opening = Counted::new(self, |pool| &pool.opening);
        let attempt = self.begin();
        match self.connect_making_room(&turn, startup).await {
            Ok(opened) => Ok(Some(self.started(opened, turn, permit, startup.clone()))),
            Err(error) => {
                if let Some(refusal) = error.about_parameter() {
                    turn.succeeded();
                    return Err(refusal);
                }
                let refusal = self.cannot_open(turn, attempt, &error);
                drop(permit);
                if self.renew(&error, startup).await {
                    return Ok(None);
                }
                self.refuse_waiting(&refusal);
                if self.live() > 0 { Ok(None) } else { Err(refusal) }
            }
        }
    }

    async fn open(self: &Arc<Self>, turn: Turn, permit: Permit) {
        let attempt = self.begin();
        match self.connect_making_room(&turn, &Settings::default()).await {
            Ok(opened) => {
                let mut server = self.started(opened, turn, permit, Settings::default());
                match self.is_as_begun(&mut server).await {
                    Ok(true) if !self.is_paused() => self.offer(server),
                    // Those who wait go on with the pool's successor; or the pool was paused meanwhile, and nobody is to have it.
                    Ok(_) => {}
                    Err(error) => {
                        warn!(tenant = self.tenant.name, side = "server", %error, "a new server is lost");
                        drop(server);
                        if self.put_right_if_changed(&error).await {
                            return; // as below
                        }
                        let lost = ClientError::ServerLost;
                        self.own_failure(attempt, &lost);
                        self.refuse_waiting(&lost);
                    }
                }
            }
            // The budget is what is open now: a permit that comes free wakes this pool's wish.
            Err(error) if error.is_host_full() && self.budget.live() > 1 => {
                self.stats.connect_failures.fetch_add(1, Ordering::Relaxed);
                self.report(&error);
                turn.succeeded();
            }
            Err(error) => {
                let refusal = self.cannot_open(turn, attempt, &error);
                drop(permit);
                if self.renew(&error, &Settings::default()).await {
                    return; // those who wait go on with the pool's successor
                }
                self.refuse_waiting(&refusal);
            }
        }
    }

    /// A server that serves no session; it counts in the host's budget, and not in the pool's size.
    ///
    /// # Errors
    /// [`ClientError::PoolBusy`] if the budget is spent, [`ClientError::ServerUnreachable`] if none can be opened.
    pub(super) async fn open_apart(self: &Arc<Self>) -> Result<Box<Server>, ClientError> {
        let busy = ClientError::PoolBusy { waited: std::time::Duration::ZERO };
        let permit = self.budget.acquire_apart(self).ok_or(busy)?;
        // Others may fail meanwhile; one that is wanted apart is not waited for any longer.
        let pause = self.backoff().pause(Instant::now());
        tokio::time::sleep(pause).await;
        let turn = self.connects.wait(self.tenant.id).await?;
        let attempt = self.begin();
        let mut opened = self.connect_making_room(&turn, &Settings::default()).await;
        match &opened {
            Ok(_) => turn.succeeded(),
            Err(error) => {
                self.cannot_open(turn, attempt, error);
                // As in `open`: a password that is being changed is nobody's failure. Whoever replaced us knows the new one.
                if self.renew(error, &Settings::default()).await
                    && let Some(successor) = self.current()
                {
                    let turn = successor.connects.wait(successor.tenant.id).await?;
                    opened = successor.connect(&turn, &Settings::default()).await;
                }
            }
        }
        let opened = opened.map_err(|error| error.to_refusal())?;
        let (owner, now) = ((self.tenant.id, self.access), self.worker.clock.now());
        let mut server = Server::new(opened, owner, permit, self.rules.prepared_max, now, &self.roster);
        self.hear(&mut server);
        Ok(Box::new(server))
    }

    /// Whether the tenant has other credentials by now than this pool was made with, and so another pool. Its passwords
    /// change on the host a moment before they change in its row; a server opened in between is nobody's failure.
    /// Roles that somebody has changed behind our back get others as well; who waits goes on waiting for that.
    async fn renew(self: &Arc<Self>, error: &DialError, startup: &Settings) -> bool {
        match error.identity_trouble(startup) {
            Some(trouble) => self.put_right(trouble).await,
            None => false,
        }
    }

    /// Another server in the place of this one, started with what a client asks for.
    ///
    /// # Errors
    /// [`ClientError::Server`] with the server's own words where it refuses a parameter, [`ClientError::ServerUnreachable`].
    pub(super) async fn restart(
        &self,
        server: Box<Server>,
        startup: Settings,
    ) -> Result<Box<Server>, ClientError> {
        let Server { mut stream, permit, entry, .. } = *server;
        drop(entry);
        let _ = stream.write_all(&[b'X', 0, 0, 0, 4]).await;
        drop(stream);
        let turn = self.connects.wait(self.tenant.id).await?;
        let attempt = self.begin();
        match self.connect(&turn, &startup).await {
            Ok(opened) => Ok(self.started(opened, turn, permit, startup)),
            Err(error) => match error.about_parameter() {
                Some(refusal) => {
                    turn.succeeded();
                    Err(refusal)
                }
                None => Err(self.cannot_open(turn, attempt, &error)),
            },
        }
    }

    fn started(&self, opened: Opened, turn: Turn, permit: Permit, startup: Settings) -> Box<Server> {
        turn.succeeded();
        let (owner, now) = ((self.tenant.id, self.access), self.worker.clock.now());
        let mut server = Server::new(opened, owner, permit, self.rules.prepared_max, now, &self.roster);
        server.startup = startup;
        server.changes_seen = self.greetings.changes();
        self.hear(&mut server);
        debug!(tenant = self.tenant.name, server = server.process_id, "server opened");
        self.stats.servers_opened.fetch_add(1, Ordering::Relaxed);
        let mut backoff = self.backoff();
        if backoff.is_failing() {
            info!(tenant = self.tenant.name, host = self.tenant.host.name, "servers can be opened again");
        }
        backoff.succeeded();
        Box::new(server)
    }

    /// Says so to operators, and pauses: this pool, or all of the host's where the failure is the host's. What clients are told.
    fn cannot_open(&self, turn: Turn, attempt: Attempt, error: &DialError) -> ClientError {
        let refusal = error.to_refusal();
        // A host that is full of ours as well has servers that come free.
        let full_of_ours = error.is_host_full() && self.budget.live() > 1;
        let is_news = if error.is_of_host(turn.is_answered()) && !full_of_ours {
            turn.failed(&refusal)
        } else {
            turn.succeeded();
            self.own_failure(attempt, &refusal)
        };
        if is_news {
            self.report(error);
        } else {
            debug!(tenant = self.tenant.name, host = self.tenant.host.name, side = "server", %error, "cannot open a server");
        }
        self.stats.connect_failures.fetch_add(1, Ordering::Relaxed);
        refusal
    }

    /// A failure that concerns no other tenant. Returns whether it is worth a line in the log.
    fn own_failure(&self, attempt: Attempt, reason: &ClientError) -> bool {
        self.backoff().failed(attempt, reason, Instant::now(), rand::random())
    }

    fn report(&self, error: &DialError) {
        warn!(tenant = self.tenant.name, host = self.tenant.host.name, side = "server", %error, "cannot open a server");
    }

    /// As [`Self::connect`]; where the host takes no more connections, idle ones of other pools are closed for this one.
    async fn connect_making_room(
        self: &Arc<Self>,
        turn: &Turn,
        startup: &Settings,
    ) -> Result<Opened, DialError> {
        // Where nothing else of ours is open there, closing makes no room: after a failure, it is tried once.
        let alone = self.connects.is_failing() && self.budget.live() <= 1;
        let mut opened = self.connect(turn, startup).await;
        let pauses = if alone { &[] } else { &PAUSES[..] };
        for &pause in pauses {
            let Some(error) = opened.as_ref().err().filter(|error| error.is_host_full()) else { break };
            if pause == PAUSES[0] {
                warn!(tenant = self.tenant.name, host = self.tenant.host.name, side = "server", %error, "the host is full");
            }
            self.budget.make_room(Some(self));
            // PostgreSQL counts a connection until its process is gone.
            tokio::time::sleep(pause).await;
            opened = self.connect(turn, startup).await;
        }
        opened
    }

    async fn connect(&self, turn: &Turn, startup: &Settings) -> Result<Opened, DialError> {
        let answered = || turn.answered();
        let target = Target {
            host: &self.tenant.host,
            tenant: &self.tenant.name,
            database: &self.tenant.database,
            credential: &self.credential,
            statement_timeout: self.tenant.statement_timeout,
            startup,
            on_answer: OnAnswer(&answered),
        };
        server::open(&target, &self.dial).await
    }

    /// Asks a server that nobody has heard of for long whether it is still there; puts it back if so. Where the network has
    /// swallowed a connection (a failover, a firewall that forgets), no client is to find that out.
    async fn check(&self, mut server: Box<Server>) {
        let answer = tokio::time::timeout(self.dial.connect_timeout, server.run("")).await;
        match answer.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into())) {
            Ok(_) if !self.is_paused() => {
                server.heard_at = self.worker.clock.now();
                self.offer(server);
            }
            Ok(_) => {}
            Err(error) => {
                warn!(tenant = self.tenant.name, host = self.tenant.host.name, side = "server", %error, "an idle server is gone");
            }
        }
    }

    /// Looks after the idle servers; called now and then on the pool's worker. Nothing here yields, so nobody finds the
    /// pool empty meanwhile; a server that is asked whether it is still there is missing for as long as it takes to answer.
    pub fn keep_house(self: &Arc<Self>) {
        let now = self.worker.clock.now();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let checked_ms = self.functions_checked_ms.load(Ordering::Relaxed);
        let due = Duration::from_millis(now_ms.saturating_sub(checked_ms)) >= self.rules.functions_check;
        if due && self.last_used() >= checked_ms {
            self.functions_checked_ms.store(now_ms, Ordering::Relaxed);
            self.catalogue.check(self.rules.functions_check);
        }
        self.call_back_unread();
        let mut idle = Vec::new();
        while let Ok(object) = self.servers.try_get() {
            idle.push(object);
        }
        let mut spare = self.live().saturating_sub(self.rules.min_size);
        // Popped newest first: the oldest go first, and the newest are put back last, to be lent first.
        while let Some(mut object) = idle.pop() {
            let unused = now.saturating_sub(object.idle_since) >= self.rules.server_idle && spare > 0;
            let aged = now.saturating_sub(object.opened_at) >= self.rules.server_lifetime;
            if unused || aged || !object.is_quiet(&self.tenant.name) {
                spare = spare.saturating_sub(1);
                drop(Object::take(object));
            } else if now.saturating_sub(object.heard_at) >= self.rules.server_check {
                let pool = self.clone();
                self.worker.spawn(async move { pool.check(Object::take(object)).await });
            }
        }
        self.open_wanted();
        while self.live() < self.rules.min_size && self.open_one_more() {}
    }
}
