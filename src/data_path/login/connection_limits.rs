//! Limits the clients of this process: sessions (`max_client_conn`), and connections that have not logged in,
//! by count, address and memory.
//!
//! If there is no room for a new connection, the oldest connection without a login of the address with the
//! most of them is closed. So a few addresses with half-open connections cannot keep other clients out.
//!
//! A tenant's `max_clients` is in `pool/stats.rs`; `listener.rs` sends the error of a full process (53300).

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use crate::{config::Limits, data_path::lock::locked, error::ClientError};

/// Memory of a connection that has sent nothing or waits for its login turn: its task, socket and entry here.
const WAITING_BYTES: usize = 4 << 10;
/// Memory that a login may need in addition: a startup packet, a SASL response, look-ups, the state of TLS.
const LOGIN_BYTES: usize = 60 << 10;

/// The unit by which clients are limited: an IPv4 address, or a /64 network of IPv6 (one client may own it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientNetwork(Option<IpAddr>);

impl ClientNetwork {
    /// `None`: a Unix socket.
    pub fn of(peer: Option<IpAddr>) -> Self {
        Self(peer.map(|peer| match peer.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
            address => address,
        }))
    }
}

/// A client's address for a log line: bare, `local` for a Unix socket.
#[derive(Debug, Clone, Copy)]
pub struct ClientAddress(pub Option<IpAddr>);

impl std::fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("local"),
        }
    }
}

/// The clients of this process.
#[derive(Debug, Default)]
pub struct ConnectionLimits {
    held: Mutex<Held>,
    unauthenticated: AtomicUsize,
    sessions: AtomicUsize,
    /// Connections that are being closed with an error because there is no room.
    rejected: AtomicUsize,
    closed: AtomicBool,
    /// Changes of the central database since the start of the process.
    changes: AtomicU64,
}

/// Connections that have not logged in.
#[derive(Debug, Default)]
struct Held {
    next: u64,
    count: usize,
    bytes: usize,
    by_origin: HashMap<ClientNetwork, BTreeMap<u64, HeldConnection>>,
}

#[derive(Debug)]
struct HeldConnection {
    bytes: usize,
    /// Notified when the connection has to make room.
    leave: Arc<Notify>,
}

/// A client's permit to be connected. Drop returns it.
#[derive(Debug)]
pub struct ConnectionPermit {
    clients: Arc<ConnectionLimits>,
    peer: Option<IpAddr>,
    number: u64,
    leave: Arc<Notify>,
    is_session: AtomicBool,
    /// The count of changes when the client was accepted, before any look-up for it.
    changes: u64,
}

/// A connection that is being closed because there is no room. It counts until it is dropped.
#[derive(Debug)]
pub struct Rejected(Arc<ConnectionLimits>);

impl Drop for Rejected {
    fn drop(&mut self) {
        self.0.rejected.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Held {
    /// Adds a connection. `None`: its origin is at its limit, or no other one has more and there is no room.
    fn enter(&mut self, origin: ClientNetwork, limits: &Limits) -> Option<(u64, Arc<Notify>)> {
        let own = self.by_origin.get(&origin).map_or(0, BTreeMap::len);
        if own >= limits.max_unauthenticated_per_address {
            return None;
        }
        while self.count >= limits.max_unauthenticated_conn
            || self.bytes + WAITING_BYTES > limits.unauthenticated_bytes_max
        {
            let (largest, connections) =
                self.by_origin.iter().max_by_key(|(_, connections)| connections.len())?;
            if connections.len() <= own {
                return None;
            }
            let (largest, oldest) = (*largest, *connections.first_key_value()?.0);
            self.leave(largest, oldest)?.leave.notify_one();
        }
        let (number, leave) = (self.next, Arc::new(Notify::new()));
        self.next += 1;
        self.count += 1;
        self.bytes += WAITING_BYTES;
        let connection = HeldConnection { bytes: WAITING_BYTES, leave: leave.clone() };
        self.by_origin.entry(origin).or_default().insert(number, connection);
        Some((number, leave))
    }

    /// Charges the memory of a login. Other connections are closed if it exceeds the limit.
    fn begin_login(&mut self, origin: ClientNetwork, number: u64, limits: &Limits) {
        let connection = self.by_origin.get_mut(&origin).and_then(|connections| connections.get_mut(&number));
        let Some(connection) = connection else { return };
        self.bytes += WAITING_BYTES + LOGIN_BYTES - connection.bytes;
        connection.bytes = WAITING_BYTES + LOGIN_BYTES;
        while self.bytes > limits.unauthenticated_bytes_max {
            let sizes = self.by_origin.iter().map(|(origin, connections)| {
                let others = connections.iter().filter(|(other, _)| **other != number);
                (
                    *origin,
                    others.clone().map(|(_, connection)| connection.bytes).sum::<usize>(),
                    others.map(|(other, _)| *other).next(),
                )
            });
            let largest = sizes.max_by_key(|(_, bytes, _)| *bytes);
            let Some((largest, _, Some(oldest))) = largest else { return };
            let Some(connection) = self.leave(largest, oldest) else { return };
            connection.leave.notify_one();
        }
    }

    /// Removes a connection; `None` if it was removed before.
    fn leave(&mut self, origin: ClientNetwork, number: u64) -> Option<HeldConnection> {
        let connections = self.by_origin.get_mut(&origin)?;
        let connection = connections.remove(&number)?;
        if connections.is_empty() {
            self.by_origin.remove(&origin);
        }
        self.count -= 1;
        self.bytes -= connection.bytes;
        Some(connection)
    }
}

impl ConnectionLimits {
    /// Admits an accepted connection. `None`: there is no room for it.
    pub fn enter(self: &Arc<Self>, peer: Option<IpAddr>, limits: &Limits) -> Option<ConnectionPermit> {
        let changes = self.changes.load(Ordering::Acquire);
        let (number, leave) = locked(&self.held).enter(ClientNetwork::of(peer), limits)?;
        self.unauthenticated.fetch_add(1, Ordering::AcqRel);
        let is_session = AtomicBool::new(false);
        Some(ConnectionPermit { clients: self.clone(), peer, number, leave, is_session, changes })
    }

    /// Counts a connection that is to be closed with an error. `None`: too many are, it is closed without.
    pub fn reject(self: &Arc<Self>, limits: &Limits) -> Option<Rejected> {
        let counted = Rejected(self.clone());
        let others = self.rejected.fetch_add(1, Ordering::AcqRel);
        (others < limits.max_unauthenticated_conn).then_some(counted)
    }

    /// Refuses all logins from now on, with an error.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether all logins are refused.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Counts a change in the central database.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Connections, logged in or not.
    pub fn count(&self) -> usize {
        self.sessions() + self.unauthenticated()
    }

    /// Connections that have logged in.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Acquire)
    }

    pub fn unauthenticated(&self) -> usize {
        self.unauthenticated.load(Ordering::Acquire)
    }
}

impl ConnectionPermit {
    /// Whether the directory has changed since it was accepted. Later changes reach a registered session.
    pub fn has_missed_changes(&self) -> bool {
        self.changes != self.clients.changes.load(Ordering::Acquire)
    }

    /// The client's address; `None`: a Unix socket.
    pub fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// The address for log lines.
    pub fn address(&self) -> ClientAddress {
        ClientAddress(self.peer)
    }

    /// The unit by which the client is limited.
    pub fn origin(&self) -> ClientNetwork {
        ClientNetwork::of(self.peer)
    }

    /// Runs a login until its time limit ends or the connection has to make room for others. Errors: those
    /// of the login, [`ClientError::LoginTimeout`], [`ClientError::TooManyClients`].
    pub async fn limit_login<T, E: From<ClientError>>(
        &self,
        timeout: Duration,
        login: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        tokio::select! {
            login = tokio::time::timeout(timeout, login) => {
                login.unwrap_or_else(|_| Err(ClientError::LoginTimeout.into()))
            }
            () = self.leave.notified() => Err(ClientError::TooManyClients.into()),
        }
    }

    /// Charges the memory of the client's login, which begins now.
    pub fn begin_login(&self, limits: &Limits) {
        locked(&self.clients.held).begin_login(self.origin(), self.number, limits);
    }

    /// Returns whether a session may begin. Called after the startup packet, when the client can read an
    /// error. Errors: [`ClientError::TooManyClients`], [`ClientError::AdminShutdown`].
    pub fn admit(&self, limits: &Limits) -> Result<(), ClientError> {
        if self.clients.is_closed() {
            return Err(ClientError::AdminShutdown);
        }
        if self.clients.sessions() >= limits.max_client_conn {
            Err(ClientError::TooManyClients)
        } else {
            Ok(())
        }
    }

    /// Counts the client as a session from now on.
    pub fn logged_in(&self, limits: &Limits) -> Result<(), ClientError> {
        let counted = self.clients.sessions.fetch_update(Ordering::AcqRel, Ordering::Acquire, |sessions| {
            (sessions < limits.max_client_conn).then_some(sessions + 1)
        });
        counted.map_err(|_| ClientError::TooManyClients)?;
        self.is_session.store(true, Ordering::Release);
        self.leave_unauthenticated();
        Ok(())
    }

    fn leave_unauthenticated(&self) {
        locked(&self.clients.held).leave(self.origin(), self.number);
        self.clients.unauthenticated.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        if *self.is_session.get_mut() {
            self.clients.sessions.fetch_sub(1, Ordering::AcqRel);
        } else {
            self.leave_unauthenticated();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(count: usize, of_address: usize, bytes: usize) -> Limits {
        let text = format!(
            "max_unauthenticated_conn = {count}\nmax_unauthenticated_per_address = {of_address}\n\
             max_unauthenticated_memory = \"{bytes}B\"\n[central]\nurl = \"postgres://m@127.0.0.1/c\"\n"
        );
        crate::config::Config::read(&text, None, &|_| None).unwrap().limits
    }

    fn at(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn is_gone(permit: &ConnectionPermit) -> bool {
        !locked(&permit.clients.held)
            .by_origin
            .get(&permit.origin())
            .is_some_and(|held| held.contains_key(&permit.number))
    }

    #[test]
    fn a_new_connection_replaces_the_oldest_of_the_largest_origin() {
        let (clients, limits) = (Arc::<ConnectionLimits>::default(), limits(4, 3, 1 << 20));
        let crowd: Vec<_> = (0..3).map(|_| clients.enter(at(1), &limits).unwrap()).collect();
        assert!(clients.enter(at(1), &limits).is_none(), "an address has its own limit");
        let second = clients.enter(at(2), &limits).unwrap();
        let third = clients.enter(at(3), &limits).unwrap();
        assert!(is_gone(&crowd[0]) && !is_gone(&crowd[1]) && !is_gone(&second) && !is_gone(&third));
        assert!(clients.enter(at(1), &limits).is_none(), "the largest origin gets no more");
        drop((crowd, second, third));
        let held = locked(&clients.held);
        assert_eq!((clients.count(), held.bytes, held.count), (0, 0, 0));
    }

    #[test]
    fn logins_take_memory_and_others_make_room_for_them() {
        let (clients, limits) =
            (Arc::<ConnectionLimits>::default(), limits(1000, 1000, 4 * WAITING_BYTES + LOGIN_BYTES));
        let silent: Vec<_> = (0..4).map(|_| clients.enter(at(1), &limits).unwrap()).collect();
        silent[0].begin_login(&limits);
        assert!(silent.iter().all(|permit| !is_gone(permit)));
        let other = clients.enter(at(2), &limits).unwrap();
        assert!(is_gone(&silent[0]));
        other.begin_login(&limits);
        assert!(!is_gone(&other) && locked(&clients.held).bytes <= limits.unauthenticated_bytes_max);
    }

    #[test]
    fn connections_without_a_login_do_not_count_as_sessions() {
        let (clients, mut limits) = (Arc::<ConnectionLimits>::default(), limits(10, 10, 1 << 20));
        limits.max_client_conn = 1;
        let connected: Vec<_> = (0..5).map(|_| clients.enter(at(1), &limits).unwrap()).collect();
        assert!(connected.iter().all(|permit| permit.admit(&limits).is_ok()));
        assert!(connected[0].logged_in(&limits).is_ok());
        assert!(connected[1].logged_in(&limits).is_err() && connected[1].admit(&limits).is_err());
        assert_eq!((clients.sessions(), clients.unauthenticated(), clients.count()), (1, 4, 5));
        drop(connected);
        assert_eq!((clients.sessions(), clients.unauthenticated()), (0, 0));
    }

    #[test]
    fn an_ipv6_network_is_one_origin() {
        let origin = |text: &str| ClientNetwork::of(Some(text.parse().unwrap()));
        assert_eq!(origin("2001:db8::1"), origin("2001:db8::ffff:1"));
        assert_ne!(origin("2001:db8::1"), origin("2001:db8:0:1::1"));
        assert_eq!(origin("::ffff:10.0.0.1"), origin("10.0.0.1"));
        assert_ne!(origin("10.0.0.1"), origin("10.0.0.2"));
    }

    proptest! {
        /// Counts and bytes match the connections and never exceed their limits.
        #[test]
        fn what_is_held_stays_within_its_limits(steps in proptest::collection::vec((0u8..4, 0u8..6, any::<prop::sample::Index>()), 1..120)) {
            let limits = limits(12, 6, 8 * WAITING_BYTES + 2 * LOGIN_BYTES);
            let (clients, mut here) = (Arc::<ConnectionLimits>::default(), Vec::new());
            for (step, address, which) in steps {
                match step {
                    0 | 1 => here.extend(clients.enter(at(address), &limits)),
                    _ if here.is_empty() => {}
                    2 => which.get(&here).begin_login(&limits),
                    _ => drop(here.swap_remove(which.index(here.len()))),
                }
                let held = locked(&clients.held);
                let connections = || held.by_origin.values().flat_map(BTreeMap::values);
                prop_assert_eq!(held.count, connections().count());
                prop_assert_eq!(held.bytes, connections().map(|connection| connection.bytes).sum::<usize>());
                prop_assert!(held.count <= 12 && held.bytes <= limits.unauthenticated_bytes_max);
                prop_assert!(held.by_origin.values().all(|connections| (1..=6).contains(&connections.len())));
            }
            drop(here);
            prop_assert_eq!((clients.count(), locked(&clients.held).bytes), (0, 0));
        }
    }
}
