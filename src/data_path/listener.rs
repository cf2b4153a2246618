//! Accepts clients. Every worker accepts from the same sockets and serves the logins that it accepts.

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, UnixListener};
use tracing::warn;

use crate::{
    config::Config,
    data_path::{
        inherited_sockets::{InheritedSockets, duplicate},
        lock::locked,
        port_in_use::listener_of,
        proxy::Proxy,
        refuse, serve_client,
        unix_socket::UnixSocket,
    },
    error::ClientError,
    wire::{self, stream::Stream},
};

/// Connections the kernel holds until they are accepted.
const BACKLOG: i32 = 4096;

/// Rights on the file of the Unix socket: a client proves its password.
const EVERYBODY: u32 = 0o777;

/// The pause after `accept` has failed, so that a worker without free descriptors does not spin.
const PAUSE: Duration = Duration::from_millis(50);

/// The listening sockets, bound before the first client is served.
#[derive(Debug)]
pub struct Listeners {
    tcp: Vec<std::net::TcpListener>,
    unix: Option<UnixSocket>,
}

impl Listeners {
    /// Takes or binds everything that the configuration names. The error has the address.
    pub fn bind(config: &Config, inherited: &mut InheritedSockets) -> Result<Self, String> {
        let tcp = config.listen.iter().map(|address| match inherited.take_tcp(*address) {
            Some(listener) => {
                set_options(SockRef::from(&listener), config);
                Ok(listener)
            }
            None => bind_tcp(*address, config)
                .map_err(|error| format!("cannot listen on {address}: {}", why_not(*address, &error))),
        });
        let tcp = tcp.collect::<Result<_, _>>()?;
        let unix = match &config.unix_socket_dir {
            None => None,
            Some(folder) => {
                let path = folder.join(format!(".s.PGSQL.{}", config.listen_port));
                let words = format!("cannot listen on {}", path.display());
                let socket = UnixSocket::open(path, EVERYBODY, inherited);
                Some(socket.map_err(|error| format!("{words}: {error}"))?)
            }
        };
        Ok(Self { tcp, unix })
    }

    /// Second descriptors of all sockets, for another process.
    pub fn duplicates(&self) -> io::Result<Vec<OwnedFd>> {
        let tcp = self.tcp.iter().map(duplicate);
        tcp.chain(self.unix.iter().map(|socket| duplicate(&socket.listener))).collect()
    }

    /// The TCP addresses in use; a configured port 0 is replaced by the real one.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.tcp.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Closes the sockets. The kernel then refuses new clients, or gives them to another process that listens
    /// there. An open socket without `accept` would let clients wait until this process ends.
    pub fn close(&mut self) {
        self.tcp.clear();
        self.unix = None;
    }

    /// Closes this process's descriptors of the sockets, on which another process accepts now. No client in the
    /// backlog is lost.
    pub fn leave_to_successor(&mut self) {
        if let Some(socket) = &mut self.unix {
            socket.leave_file();
        }
        self.close();
    }

    /// The process that these sockets were taken from has stopped accepting.
    pub fn own_files(&mut self) {
        if let Some(socket) = &mut self.unix {
            socket.own_file();
        }
    }

    /// Accepts on every worker until the result is dropped.
    pub fn serve(&self, proxy: &Arc<Proxy>) -> io::Result<Accepting> {
        let spare = Arc::new(Spare::new());
        let (stop, stopped) = tokio::sync::watch::channel(());
        for worker in &proxy.workers {
            let start = |open: Box<dyn FnOnce() -> io::Result<Listener> + Send>| {
                let (proxy, spare, mut stopped) = (proxy.clone(), spare.clone(), stopped.clone());
                worker.spawn(async move {
                    let accepting = async {
                        match open() {
                            Ok(listener) => accept(listener, proxy, &spare).await,
                            Err(error) => warn!(%error, "cannot accept clients"),
                        }
                    };
                    tokio::select! { () = accepting => {}, _ = stopped.changed() => {} }
                });
            };
            // Opened on the worker, whose reactor has it then.
            for listener in &self.tcp {
                let listener = listener.try_clone()?;
                start(Box::new(|| TcpListener::from_std(listener).map(Listener::Tcp)));
            }
            if let Some(socket) = &self.unix {
                let listener = socket.listener.try_clone()?;
                start(Box::new(|| UnixListener::from_std(listener).map(Listener::Unix)));
            }
        }
        Ok(Accepting { _stop: stop })
    }
}

/// Accepting ends when this is dropped.
#[derive(Debug)]
pub struct Accepting {
    _stop: tokio::sync::watch::Sender<()>,
}

fn bind_tcp(address: SocketAddr, config: &Config) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if config.so_reuseport {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Before the first client is in the backlog.
    set_options(SockRef::from(&socket), config);
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Why a TCP address cannot be bound, with the process that has it.
pub fn why_not(address: SocketAddr, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!("{error}{}", listener_of(address)),
        _ => error.to_string(),
    }
}

/// Sets the options of a client's socket. A client's socket inherits those of the listening one, which saves
/// six system calls for each client.
fn set_options(socket: SockRef<'_>, config: &Config) {
    let _ = socket.set_tcp_nodelay(true);
    let _ = config.timeouts.client_keepalive.apply(&socket);
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// The next client and its address; `None`: a Unix socket.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Stream, Option<IpAddr>)>> {
        match self {
            Self::Tcp(listener) => listener
                .poll_accept(cx)
                .map_ok(|(socket, address)| (socket.into(), Some(address.ip().to_canonical()))),
            Self::Unix(listener) => listener.poll_accept(cx).map_ok(|(socket, _)| (socket.into(), None)),
        }
    }

    /// One `accept` without waiting.
    fn accept_now(&self) -> Option<Stream> {
        match self.poll_accept(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok((stream, _))) => Some(stream),
            _ => None,
        }
    }
}

async fn accept(listener: Listener, proxy: Arc<Proxy>, spare: &Spare) {
    let mut inherited = proxy.config.load_full();
    loop {
        match poll_fn(|cx| listener.poll_accept(cx)).await {
            Ok((stream, peer)) => {
                let config = proxy.config.load();
                // The configuration was reloaded. Sockets in the backlog have inherited the old options.
                if let Listener::Tcp(listener) = &listener
                    && let Stream::Plain(wire::stream::Socket::Tcp(socket)) = &stream
                    && !Arc::ptr_eq(&config, &inherited)
                {
                    inherited = config.clone();
                    set_options(SockRef::from(listener), &config);
                    set_options(SockRef::from(socket), &config);
                }
                spawn_client(stream, peer, &proxy);
            }
            Err(error) => recover(error, spare.with(|| listener.accept_now())).await,
        }
    }
}

fn spawn_client(stream: Stream, peer: Option<IpAddr>, proxy: &Arc<Proxy>) {
    let config = proxy.config.load();
    match proxy.connection_limits.enter(peer, &config.limits) {
        Some(permit) => drop(tokio::spawn(serve_client(stream, permit, proxy.clone()))),
        None => {
            proxy.metrics.login_refused(&ClientError::TooManyClients);
            let Some(counted) = proxy.connection_limits.reject(&config.limits) else { return };
            drop(tokio::spawn(async move {
                refuse(stream, &ClientError::TooManyClients).await;
                drop(counted);
            }));
        }
    }
}

/// Handles a failed `accept`; accepting goes on after any error.
async fn recover(error: io::Error, rejected: Option<Stream>) {
    if let Some(stream) = rejected {
        refuse(stream, &ClientError::TooManyClients).await;
    }
    // After a client that left before it was accepted, no pause is needed.
    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        warn!(%error, "cannot accept clients");
        tokio::time::sleep(PAUSE).await;
    }
}

/// A reserved file descriptor, so that a client can be refused with an error when all others are in use.
#[derive(Debug)]
struct Spare(Mutex<Option<std::fs::File>>);

impl Spare {
    fn new() -> Self {
        Self(Mutex::new(std::fs::File::open("/dev/null").ok()))
    }

    /// Runs `what` with the reserved descriptor free.
    fn with<T>(&self, what: impl FnOnce() -> Option<T>) -> Option<T> {
        let mut spare = locked(&self.0);
        drop(spare.take().or_else(|| std::fs::File::open("/dev/null").ok())?);
        let done = what();
        if done.is_none() {
            *spare = std::fs::File::open("/dev/null").ok();
        }
        done
    }
}
