//! What all clients share: configuration, directory, pools, sessions, and the limits at the door.

use std::{
    collections::HashMap,
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tracing::warn;

use super::{
    destination::{access_to, admit},
    pool::TenantPools,
    session::{SessionHandle, Sessions},
    startup::Hello,
    tenant::{Change, Directory, Login, allowed_from},
    worker::Worker,
};
use crate::{
    config::{Config, Limits},
    error::Refusal,
    metrics::Metrics,
    wire::{stream::Stream, tls::towards_clients::ClientTlsAcceptor},
};

/// An administrator who has logged in.
#[derive(Debug)]
pub struct ConsoleVisit {
    /// The connection, on the runtime that accepted it.
    pub stream: Stream,
    /// What it said at startup; `leftover` is what it has sent since.
    pub hello: Hello,
    /// Who.
    pub login: Arc<Login>,
    /// May only SHOW.
    pub read_only: bool,
    /// To be sent with the first write.
    pub unsent: Vec<u8>,
    /// What there is to see.
    pub proxy: Arc<Proxy>,
    /// Its place among the clients.
    pub visitor: Visitor,
}

/// The admin console; the control path has it.
pub type Console = Arc<dyn Fn(ConsoleVisit) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Passes a cancel request for another node's session on; the control path knows how.
pub type ForeignCancel = Arc<dyn Fn(i32, Vec<u8>) + Send + Sync>;

/// What all clients share.
pub struct Proxy {
    /// Swapped by a reload.
    pub config: Arc<ArcSwap<Config>>,
    /// TLS towards clients; `None`: off.
    pub tls: ArcSwapOption<ClientTlsAcceptor>,
    /// Logins and tenants.
    pub directory: Arc<Directory>,
    /// Pools.
    pub pools: Arc<TenantPools>,
    /// Sessions.
    pub sessions: Arc<Sessions>,
    /// Threads.
    pub workers: Vec<Arc<Worker>>,
    /// The admin console.
    pub console: Console,
    /// Cancels that are not ours.
    pub foreign_cancel: ForeignCancel,
    /// Who is at the door.
    pub door: Arc<Door>,
    /// Counters that belong to no pool.
    pub metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy").field("sessions", &self.sessions.len()).finish_non_exhaustive()
    }
}

/// How many are here, and how many of them have not logged in yet.
#[derive(Debug, Default)]
pub struct Door {
    clients: AtomicUsize,
    unproven: AtomicUsize,
    by_address: Mutex<HashMap<IpAddr, usize>>,
    closed: AtomicBool,
    /// Changes of the central database that were heard of since the start.
    changes: AtomicU64,
}

/// A client's place; given back by drop.
#[derive(Debug)]
pub struct Visitor {
    door: Arc<Door>,
    peer: Option<IpAddr>,
    unproven: AtomicBool,
    /// What the door counted when the client came, before anything was looked up for it.
    changes: u64,
    /// There was no room: the client is told once it has said hello.
    surplus: bool,
}

impl Door {
    /// A client has been accepted. `None`: so many are waiting to log in that it must be turned away at once.
    pub fn enter(self: &Arc<Self>, peer: Option<IpAddr>, limits: &Limits) -> Option<Visitor> {
        let unproven = self.unproven.fetch_add(1, Ordering::AcqRel);
        let of_address = peer.map_or(0, |peer| {
            let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
            let count = by_address.entry(peer).or_default();
            *count += 1;
            *count
        });
        let clients = self.clients.fetch_add(1, Ordering::AcqRel);
        let surplus = clients >= limits.max_client_conn;
        let visitor = Visitor {
            door: self.clone(),
            peer,
            unproven: AtomicBool::new(true),
            changes: self.changes.load(Ordering::Acquire),
            surplus,
        };
        let crowded = unproven >= limits.max_unauthenticated_conn
            || of_address > limits.max_unauthenticated_per_address;
        (!crowded).then_some(visitor)
    }

    /// Nobody is let in from now on; those who say hello are told.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether nobody is let in any more.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Clients here, logged in or not.
    pub fn clients(&self) -> usize {
        self.clients.load(Ordering::Acquire)
    }

    /// Clients that have not logged in.
    pub fn unproven(&self) -> usize {
        self.unproven.load(Ordering::Acquire)
    }
}

impl Visitor {
    /// Whether something has changed since the client came. A session that is registered hears of what comes later.
    pub fn has_missed_changes(&self) -> bool {
        self.changes != self.door.changes.load(Ordering::Acquire)
    }

    /// Where the client is; `None`: a Unix socket.
    pub fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// Whether there is room; asked when the client has said hello and can be told.
    ///
    /// # Errors
    /// [`Refusal::TooManyClients`], [`Refusal::AdminShutdown`].
    pub fn admitted(&self) -> Result<(), Refusal> {
        if self.door.closed.load(Ordering::Acquire) {
            return Err(Refusal::AdminShutdown);
        }
        if self.surplus { Err(Refusal::TooManyClients) } else { Ok(()) }
    }

    /// The client has logged in: it no longer counts among those at the door.
    pub fn logged_in(&self) {
        if !self.unproven.swap(false, Ordering::AcqRel) {
            return;
        }
        self.door.unproven.fetch_sub(1, Ordering::AcqRel);
        if let Some(peer) = self.peer {
            let mut by_address = self.door.by_address.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(count) = by_address.get_mut(&peer) {
                *count -= 1;
                if *count == 0 {
                    by_address.remove(&peer);
                }
            }
        }
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        self.logged_in();
        self.door.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Proxy {
    /// Serves a cancel request: here, or by whichever node has the session. Returns when it has settled here; an unknown key
    /// is not told apart. In session mode clients name their servers' process numbers, which do not tell the node.
    pub async fn cancel(&self, process_id: i32, secret: &[u8]) {
        if let Some(session) = self.sessions.find(process_id, secret) {
            let _ = session.cancel().await;
        } else if !self.sessions.is_ours(process_id) {
            (self.foreign_cancel)(process_id, secret.to_vec());
        }
    }

    /// Something changed in the central database: pools and sessions it concerns follow.
    pub async fn apply(&self, change: Change) {
        self.directory.forget(&change);
        // Between the two: whoever logs in meanwhile either is among the sessions when they are walked, or sees this.
        self.door.changes.fetch_add(1, Ordering::AcqRel);
        match change {
            Change::Tenant(id) => self.tenant_changed(id).await,
            Change::Login(id) => self.logins_changed(|session| session.login.id == id).await,
            // Nobody can be there by a name that was not.
            Change::TenantName(_) | Change::LoginName(_) => {}
            Change::Host(name) => self.tenants_changed(|host| host == name).await,
            Change::Everything => {
                self.tenants_changed(|_| true).await;
                self.logins_changed(|_| true).await;
            }
        }
    }

    async fn tenants_changed(&self, on_host: impl Fn(&str) -> bool) {
        let pools = self.pools.all().into_iter().filter(|pool| on_host(&pool.tenant.host.name));
        let mut ids: Vec<i64> = pools.map(|pool| pool.tenant.id).collect();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            self.tenant_changed(id).await;
        }
    }

    async fn tenant_changed(&self, id: i64) {
        let tenant = match self.directory.tenant_by_id(id).await {
            Ok(tenant) => tenant,
            // Sessions go on; the next notice, or the reconnect, tells again.
            Err(error) => {
                return warn!(tenant = id, side = "central", %error, "cannot look up a changed tenant");
            }
        };
        let refusal = match &tenant {
            Some(tenant) => {
                self.pools.refresh(tenant).await;
                admit(tenant).err()
            }
            None => Some(Refusal::AdminShutdown),
        };
        if let Some(tenant) = &tenant {
            let reason = Refusal::Ended("the networks that may enter this tenant were changed".into());
            self.sessions
                .end(&reason, |session| session.is_at(id) && !allowed_from(&tenant.allow_from, session.peer));
        }
        let Some(refusal) = refusal else { return };
        let reason = Refusal::Ended(refusal.to_string());
        if tenant.is_some_and(|tenant| tenant.drain) {
            for session in self.sessions.all().into_iter().filter(|session| session.is_at(id)) {
                session.end_when_free(reason.clone());
            }
        } else {
            self.sessions.end(&reason, |session| session.is_at(id));
        }
    }

    async fn logins_changed(&self, concerns: impl Fn(&SessionHandle) -> bool) {
        for session in self.sessions.all().into_iter().filter(|session| concerns(session)) {
            self.login_changed(&session).await;
        }
    }

    async fn login_changed(&self, session: &SessionHandle) {
        let Ok(login) = self.directory.login(&session.login.name).await else { return };
        let stays = login.filter(|login| {
            let place = session.place();
            session.is_admitted_by(login)
                && place.is_none_or(|place| access_to(&login.kind, place.tenant.id) == Some(place.access))
        });
        match stays {
            Some(login) => self.sessions.set_valid_until(session, login.valid_until),
            None => session.end(Refusal::Ended("the login was changed".into())),
        }
    }

    /// A session that has just begun, while something changed between the look-up of its login and its registration: it
    /// was not among those that were told.
    pub async fn look_again_at(&self, session: &SessionHandle) {
        self.login_changed(session).await;
        let Some(place) = session.place() else { return };
        if let Ok(tenant) = self.directory.tenant_by_id(place.tenant.id).await
            && let Some(refusal) = tenant.map_or(Some(Refusal::AdminShutdown), |tenant| admit(&tenant).err())
        {
            session.end(Refusal::Ended(refusal.to_string()));
        }
    }
}
