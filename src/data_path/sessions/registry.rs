//! The registry of sessions, through which other tasks cancel a session's query, end it or show it.
//!
//! Only a session's own task uses its connections. Other tasks leave a signal and wake it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    task::Waker,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use secrecy::SecretString;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::{
    mailbox::{Mailbox, Signals},
    timeouts::millis,
};
use crate::{
    data_path::{
        lock::locked,
        login::password_pace::AT_ONCE,
        session_state::pins::Pins,
        tenant::{Login, TenantAccess},
    },
    error::ClientError,
};

/// A cancel key: four bytes for protocol 3.0, 32 for 3.2.
pub type Secret = Box<[u8]>;

/// A session's activity, for operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Activity {
    /// Between transactions, without a server.
    Idle = 0,
    /// Waiting for a server.
    Waiting = 1,
    /// A server runs its statement.
    Active = 2,
    /// In a transaction, and its server waits for the client.
    InTransaction = 3,
    /// Between transactions, with a pinned server.
    Pinned = 4,
}

const CANCEL: u8 = 1;
const END: u8 = 2;
pub(in crate::data_path) const NOTIFIED: u8 = 4;
const CALLED_BACK: u8 = 8;

/// The part of a session that other tasks use.
#[derive(Debug)]
pub struct SessionHandle {
    /// Its process number; unique in this process.
    pub process_id: i32,
    /// The process number that its client got: in session mode that of its server.
    pub known_as: i32,
    secret: Secret,
    pub login: Arc<Login>,
    /// Its tenant and access; `None`: no tenant is chosen. It changes when the session changes its tenant.
    tenant_access: ArcSwapOption<TenantAccess>,
    /// The client's address; `None`: a Unix socket.
    pub peer: Option<IpAddr>,
    /// The proxy's address and the client's; `None`: a Unix socket.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    pub tls: bool,
    /// Another process has its TLS, and passes the bytes on until then.
    pub forwarded_until: Option<SystemTime>,
    application_name: Mutex<Box<str>>,
    /// When the session began, on the wall clock.
    pub connected_at: SystemTime,
    /// Its server's process number; 0: none.
    pub server_process_id: AtomicU32,
    doing: AtomicU8,
    /// When `doing` changed, in ticks of its worker's coarse clock.
    since_ms: AtomicU32,
    /// When its latest request came, on the same clock.
    asked_ms: AtomicU32,
    /// When its latest transaction began, on the same clock.
    began_ms: AtomicU32,
    /// Its `idle_session_timeout` in milliseconds; 0: none, or its server applies it.
    idle_session_ms: AtomicU32,
    /// When its login expires, in milliseconds since 1970; `u64::MAX`: never. It follows the login's row.
    pub(in crate::data_path) valid_until: AtomicU64,
    /// The verifiers that the session itself has set for its login; it is not ended by these changes.
    pub(in crate::data_path) verifiers: ArcSwapOption<Vec<SecretString>>,
    prepared: AtomicU32,
    pins: AtomicU16,
    pub(in crate::data_path) signals: AtomicU8,
    /// Locked only for signals.
    mailbox: Mutex<Mailbox>,
}

impl SessionHandle {
    /// Its tenant and access; `None`: no tenant is chosen.
    pub fn tenant_access(&self) -> Option<Arc<TenantAccess>> {
        self.tenant_access.load_full()
    }

    /// The name of its present tenant, for the log.
    pub fn tenant_name(&self) -> Option<String> {
        self.tenant_access.load().as_ref().map(|tenant_access| tenant_access.tenant.name.clone())
    }

    /// Whether the session is at the tenant with this id.
    pub fn is_at(&self, tenant: i64) -> bool {
        self.tenant_access.load().as_ref().is_some_and(|tenant_access| tenant_access.tenant.id == tenant)
    }

    /// Sets the tenant and access after a change.
    pub fn enter(&self, tenant_access: Option<Arc<TenantAccess>>) {
        self.tenant_access.store(tenant_access);
    }

    pub(in crate::data_path) fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        locked(&self.mailbox)
    }

    /// Sets the waker of the session's task; once, because a task's waker stays the same.
    pub fn wake_with(&self, waker: &Waker) {
        self.mailbox().waker = Some(waker.clone());
    }

    /// Whether a signal waits. Costs one load.
    #[inline]
    pub fn is_signalled(&self) -> bool {
        self.signals.load(Ordering::Acquire) != 0
    }

    pub fn take_signals(&self) -> Signals {
        let mut mailbox = self.mailbox();
        self.signals.fetch_and(NOTIFIED, Ordering::AcqRel);
        mailbox.signals.take().map_or_else(Signals::default, |signals| *signals)
    }

    /// Whether notifications wait. Costs one load.
    #[inline]
    pub fn is_notified(&self) -> bool {
        self.signals.load(Ordering::Acquire) & NOTIFIED != 0
    }

    /// Ends the session after its current message, with an ErrorResponse. The first reason counts.
    pub fn end(&self, reason: ClientError) {
        self.signal(END, |mailbox| _ = mailbox.signals().end.get_or_insert(reason));
    }

    /// Ends the session when no transaction is open.
    pub fn end_when_free(&self, reason: ClientError) {
        self.signal(END, |mailbox| _ = mailbox.signals().end_when_free.get_or_insert(reason));
    }

    /// Ends the session if it is still idle when the signal arrives.
    pub fn end_if_idle(&self, reason: ClientError) {
        self.signal(END, |mailbox| _ = mailbox.signals().end_if_idle.get_or_insert(reason));
    }

    fn signal(&self, signal: u8, note: impl FnOnce(&mut Mailbox)) {
        let waker = {
            let mut mailbox = self.mailbox();
            note(&mut mailbox);
            self.signals.fetch_or(signal, Ordering::AcqRel);
            mailbox.waker.clone()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Asks the session to return its pinned server, because another session waits for one.
    pub fn call_back(&self) {
        self.signal(CALLED_BACK, |_| {});
    }

    /// Whether the session has not handled that request yet.
    pub fn is_called_back(&self) -> bool {
        self.signals.load(Ordering::Acquire) & CALLED_BACK != 0
    }

    /// Asks the session's task to cancel the running statement. The receiver resolves with an error (the
    /// sender is dropped) when the cancel is complete or there was nothing to cancel.
    pub fn cancel(&self) -> oneshot::Receiver<()> {
        let (done, receiver) = oneshot::channel();
        self.signal(CANCEL, |mailbox| mailbox.signals().cancels.push(done));
        receiver
    }

    /// The session's cancel key.
    pub(in crate::data_path) fn secret(&self) -> &[u8] {
        &self.secret
    }

    /// Whether `secret` is the session's cancel key. Takes constant time.
    pub fn has_secret(&self, secret: &[u8]) -> bool {
        self.secret.ct_eq(secret).into()
    }

    #[inline]
    pub fn set_doing(&self, doing: Activity, now_ms: u32) {
        self.doing.store(doing as u8, Ordering::Relaxed);
        self.since_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Notes that a request has arrived.
    #[inline]
    pub fn set_asked(&self, now_ms: u32) {
        self.set_doing(Activity::Active, now_ms);
        self.asked_ms.store(now_ms, Ordering::Relaxed);
    }

    /// When its latest request came, by its worker's coarse clock (milliseconds); at first the login.
    pub fn asked_ms(&self) -> u32 {
        self.asked_ms.load(Ordering::Relaxed)
    }

    /// Notes that a transaction begins.
    #[inline]
    pub fn set_began(&self, now_ms: u32) {
        self.began_ms.store(now_ms, Ordering::Relaxed);
    }

    /// When its latest transaction began, by its worker's coarse clock (milliseconds).
    pub fn began_ms(&self) -> u32 {
        self.began_ms.load(Ordering::Relaxed)
    }

    /// Its `idle_session_timeout`, which the proxy applies while the session has no server.
    pub fn idle_session_timeout(&self) -> Option<Duration> {
        let ms = self.idle_session_ms.load(Ordering::Relaxed);
        (ms > 0).then(|| Duration::from_millis(ms.into()))
    }

    /// `application_name` now.
    pub fn application_name(&self) -> Box<str> {
        locked(&self.application_name).clone()
    }

    /// The client has changed its `application_name`.
    pub fn set_application_name(&self, name: &str) {
        *locked(&self.application_name) = name.into();
    }

    #[inline]
    pub fn set_prepared(&self, statements: usize) {
        self.prepared.store(u32::try_from(statements).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// Statements it had prepared at the end of its last transaction.
    pub fn prepared(&self) -> u32 {
        self.prepared.load(Ordering::Relaxed)
    }

    /// The present activity and its start on the worker's coarse clock, in milliseconds.
    pub fn doing(&self) -> (Activity, u32) {
        let doing = match self.doing.load(Ordering::Relaxed) {
            1 => Activity::Waiting,
            2 => Activity::Active,
            3 => Activity::InTransaction,
            4 => Activity::Pinned,
            _ => Activity::Idle,
        };
        (doing, self.since_ms.load(Ordering::Relaxed))
    }

    /// The reasons why its server is pinned.
    pub fn pins(&self) -> Pins {
        Pins::from_bits_retain(self.pins.load(Ordering::Relaxed))
    }

    pub fn set_pins(&self, pins: Pins) {
        self.pins.store(pins.bits(), Ordering::Relaxed);
    }
}

/// The data of a session that begins.
#[derive(Debug)]
pub struct NewSession {
    pub login: Arc<Login>,
    /// Tenant and access; `None`: no tenant is chosen.
    pub tenant_access: Option<Arc<TenantAccess>>,
    pub peer: Option<IpAddr>,
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    /// The time on its worker's coarse clock.
    pub now_ms: u32,
    pub tls: bool,
    /// As in [`SessionHandle::forwarded_until`].
    pub forwarded_until: Option<SystemTime>,
    /// `application_name` at startup.
    pub application_name: Box<str>,
    /// In session mode, the process number of its server.
    pub known_as: Option<i32>,
    /// Length of its cancel key, in bytes.
    pub secret_bytes: usize,
}

/// Every session of this process.
#[derive(Debug)]
pub struct Sessions {
    pub(super) registry: Mutex<Registry>,
    /// No session's login expires before this; milliseconds since 1970.
    pub(in crate::data_path) first_end: AtomicU64,
    /// A session may have an `idle_session_timeout`.
    pub(in crate::data_path) has_idle_timeouts: AtomicBool,
    /// A session may exceed a limit sooner than was known: one is set, or the configuration has changed.
    pub limits_changed: Notify,
    /// Sessions that have moved to the process that takes over.
    pub moved: AtomicU64,
    /// Those of them whose bytes this process passes on.
    pub(super) forwarded: AtomicUsize,
    next: AtomicU32,
    /// The upper bits of every process number. They differ between pglobby processes, so that a cancel that
    /// reaches the wrong process is recognised.
    pub(super) node: u32,
    pub started: Instant,
}

/// The registered sessions.
#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) by_process_id: HashMap<i32, Arc<SessionHandle>>,
    /// The sessions whose clients got a server's process number, by that number. Servers of different hosts
    /// may have the same number.
    known_as: HashMap<i32, Vec<i32>>,
}

/// Bits of a process number that count sessions; the 11 above them name the node (the number stays positive).
const NODE_SHIFT: u32 = 20;

/// PostgreSQL's own process numbers end below 2^22 (Linux), so none of ours is one of them.
pub(super) const NODES: std::ops::Range<u32> = 1 << (22 - NODE_SHIFT)..1 << (31 - NODE_SHIFT);

/// The number of a node in the process numbers of its clients, made of what identifies its process, so that other nodes
/// can tell it as well. `None`: the process is not identified.
pub fn node_number(process: &str) -> Option<u32> {
    let [first, second, third, fourth, ..] = <[u8; 32]>::from(Sha256::digest(process.as_bytes()));
    let number = u32::from_be_bytes([first, second, third, fourth]);
    (!process.is_empty()).then(|| NODES.start + number % (NODES.end - NODES.start))
}

/// The number of the node that has given out a process number. In session mode it is a server's, and no node has its number.
pub fn node_of(process_id: i32) -> Option<u32> {
    u32::try_from(process_id).ok().map(|number| number >> NODE_SHIFT).filter(|node| NODES.contains(node))
}

/// A registered session. Drop removes it from the registry, with its cancel key.
#[derive(Debug)]
pub struct Registered {
    sessions: Arc<Sessions>,
    handle: Arc<SessionHandle>,
}

impl Registered {
    /// All sessions, this one among them.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Sets the session's `idle_session_timeout`.
    pub fn set_idle_session_timeout(&self, timeout: Option<Duration>) {
        let ms = timeout.map_or(0, |timeout| u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX));
        let before = self.idle_session_ms.swap(ms, Ordering::Relaxed);
        if ms > 0 && ms != before {
            self.sessions.has_idle_timeouts.store(true, Ordering::Release);
            self.sessions.limits_changed.notify_one();
        }
    }
}

impl std::ops::Deref for Registered {
    type Target = Arc<SessionHandle>;

    fn deref(&self) -> &Self::Target {
        &self.handle
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut registry = locked(&self.sessions.registry);
        registry.by_process_id.remove(&self.handle.process_id);
        if let Some(numbers) = registry.known_as.get_mut(&self.handle.known_as) {
            numbers.retain(|number| *number != self.handle.process_id);
            if numbers.is_empty() {
                registry.known_as.remove(&self.handle.known_as);
            }
        }
    }
}

impl Default for Sessions {
    fn default() -> Self {
        Self::of_process("")
    }
}

impl Sessions {
    /// None yet. `process`: what identifies this process ([`node_number`]).
    pub fn of_process(process: &str) -> Self {
        Self {
            registry: Mutex::default(),
            first_end: AtomicU64::new(u64::MAX),
            has_idle_timeouts: AtomicBool::new(false),
            limits_changed: Notify::new(),
            moved: AtomicU64::new(0),
            forwarded: AtomicUsize::new(0),
            next: AtomicU32::new(1),
            node: node_number(process).unwrap_or_else(|| rand::random_range(NODES)),
            started: Instant::now(),
        }
    }

    /// The upper bits of the process numbers of sessions that begin here.
    pub fn node(&self) -> u32 {
        self.node
    }

    /// Registers a session with a new process number and cancel key.
    pub fn register(self: &Arc<Self>, new: NewSession) -> (Registered, Secret) {
        let mut secret = vec![0; new.secret_bytes].into_boxed_slice();
        rand::fill(&mut secret[..]);
        let mut registry = locked(&self.registry);
        let process_id = loop {
            let count = self.next.fetch_add(1, Ordering::Relaxed) & ((1 << NODE_SHIFT) - 1);
            let number = i32::try_from(self.node << NODE_SHIFT | count).unwrap_or(i32::MAX);
            if number != 0 && !registry.by_process_id.contains_key(&number) {
                break number;
            }
        };
        let registered = self.insert(&mut registry, new, process_id, secret.clone(), SystemTime::now());
        (registered, secret)
    }

    pub(super) fn insert(
        self: &Arc<Self>,
        registry: &mut Registry,
        new: NewSession,
        process_id: i32,
        secret: Secret,
        connected_at: SystemTime,
    ) -> Registered {
        let handle = Arc::new(SessionHandle {
            process_id,
            known_as: new.known_as.unwrap_or(process_id),
            secret,
            idle_session_ms: AtomicU32::new(0),
            valid_until: AtomicU64::new(millis(new.login.valid_until)),
            login: new.login,
            tenant_access: ArcSwapOption::new(new.tenant_access),
            peer: new.peer,
            addresses: new.addresses,
            tls: new.tls,
            forwarded_until: new.forwarded_until,
            application_name: Mutex::new(new.application_name),
            connected_at,
            server_process_id: AtomicU32::new(0),
            doing: AtomicU8::new(Activity::Idle as u8),
            since_ms: AtomicU32::new(new.now_ms),
            asked_ms: AtomicU32::new(new.now_ms),
            began_ms: AtomicU32::new(new.now_ms),
            verifiers: ArcSwapOption::empty(),
            prepared: AtomicU32::new(0),
            pins: AtomicU16::new(0),
            signals: AtomicU8::new(0),
            mailbox: Mutex::default(),
        });
        self.note_end(handle.valid_until.load(Ordering::Relaxed));
        registry.by_process_id.insert(process_id, handle.clone());
        if handle.known_as != process_id {
            registry.known_as.entry(handle.known_as).or_default().push(process_id);
        }
        Registered { sessions: self.clone(), handle }
    }

    /// Whether a process number was given out by this node.
    pub fn is_ours(&self, process_id: i32) -> bool {
        node_of(process_id) == Some(self.node)
    }

    /// The session that a cancel key names.
    pub fn find(&self, process_id: i32, secret: &[u8]) -> Option<Arc<SessionHandle>> {
        let registry = locked(&self.registry);
        let known = registry.known_as.get(&process_id).into_iter().flatten();
        let candidates = [process_id].into_iter().chain(known.copied());
        let mut found = candidates.filter_map(|number| registry.by_process_id.get(&number));
        found.find(|handle| handle.known_as == process_id && handle.has_secret(secret)).cloned()
    }

    /// The session that knows itself by this number.
    pub fn numbered(&self, process_id: i32) -> Option<Arc<SessionHandle>> {
        locked(&self.registry).by_process_id.get(&process_id).cloned()
    }

    pub fn all(&self) -> Vec<Arc<SessionHandle>> {
        locked(&self.registry).by_process_id.values().cloned().collect()
    }

    pub fn len(&self) -> usize {
        locked(&self.registry).by_process_id.len()
    }

    pub fn is_empty(&self) -> bool {
        locked(&self.registry).by_process_id.is_empty()
    }

    /// Ends those that `which` picks; how many there were.
    pub fn end(&self, reason: &ClientError, which: impl Fn(&SessionHandle) -> bool) -> usize {
        let ended: Vec<_> = self.all().into_iter().filter(|handle| which(handle)).collect();
        for handle in &ended {
            handle.end(reason.clone());
        }
        ended.len()
    }
}

impl SessionHandle {
    /// Whether the session may stay, its login being like this now.
    pub fn is_admitted_by(&self, login: &Login) -> bool {
        let own = self.verifiers.load();
        let own = own.iter().flat_map(|all| all.iter());
        login.still_admits(&self.login, self.peer)
            || own.into_iter().any(|verifier| login.still_admits_by(&self.login, verifier, self.peer))
    }

    /// What its login's verifier may be as far as the session knows; the last one if that was stored.
    pub fn verifiers(&self) -> Vec<SecretString> {
        let own = self.verifiers.load_full();
        own.map_or_else(|| vec![self.login.verifier.clone()], |own| own.to_vec())
    }

    /// The session changes its login's verifier, which was one of `before`.
    pub fn expect_verifier(&self, before: &[SecretString], verifier: &SecretString) {
        // Also those that were replaced: a node may have read the row before, and judge the session by it
        // only now.
        let kept = before.iter().skip(before.len().saturating_sub(AT_ONCE as usize));
        let all = kept.chain([verifier]).cloned().collect();
        self.verifiers.store(Some(Arc::new(all)));
    }
}
