//! The side of the new process: asks the running one for its sockets, and then receives its sessions.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{net::UnixStream, sync::oneshot, task::JoinHandle};
use tracing::{info, warn};

use super::{
    Inherited,
    link::{Kind, Link, Message},
    require_same_user,
};
use crate::{
    config::Config,
    data_path::{inherited_sockets::InheritedSockets, lock::locked, proxy::Proxy, session_arrival},
};

/// The version of the messages. Another one is refused.
pub(super) const VERSION: u64 = 1;

/// How long the running process may take to answer, beside `shutdown_timeout`: it answers when it has all sessions of the
/// process before itself.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The running process, which goes on until it is told that this one accepts clients.
#[derive(Debug)]
pub struct Predecessor {
    link: Arc<Link>,
    pid: i32,
}

impl Predecessor {
    /// Asks the process that runs with this configuration for its sockets. `None`: there is no such process.
    ///
    /// # Errors
    /// `takeover_socket` is off, or the process runs as another user or does not answer.
    pub async fn ask(config: &Config) -> Result<Option<(Self, Inherited)>, String> {
        let path = config.takeover_socket.path();
        let path = path.ok_or("nothing can be taken over: takeover_socket is off, or has no default")?;
        let stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(error) if is_absent(&error) => {
                warn!(socket = %path.display(), "no process to take over from; starting as the first one");
                return Ok(None);
            }
            Err(error) => return Err(format!("cannot take over at {}: {error}", path.display())),
        };
        let peer = stream.peer_cred().map_err(|error| error.to_string())?;
        require_same_user(&peer)?;
        let (link, pid) = (Arc::new(Link::new(stream)), peer.pid().unwrap_or_default());
        let answer = async {
            link.send(Kind::Hello, VERSION, &[], &[]).await?;
            link.receive().await
        };
        let answered = tokio::time::timeout(ANSWER_WITHIN + config.timeouts.shutdown, answer).await;
        let late = |_| format!("process {pid} does not answer; another process may be taking over from it");
        match answered.map_err(late)? {
            Ok(Some(Message { kind: Kind::Sockets, number, descriptors, .. })) => {
                info!(pid, sockets = descriptors.len(), "taking over from the running process");
                let inherited = Inherited {
                    sockets: InheritedSockets::new(descriptors),
                    process_numbers: u32::try_from(number).ok(),
                };
                Ok(Some((Self { link, pid }, inherited)))
            }
            Ok(Some(Message { kind: Kind::Refused, body, .. })) => {
                Err(format!("process {pid} refuses: {}", String::from_utf8_lossy(&body)))
            }
            Ok(_) => Err(format!("process {pid} does not pass its sockets on")),
            Err(error) => Err(format!("process {pid} does not pass its sockets on: {error}")),
        }
    }

    /// Tells the running process that this one accepts clients, and serves the sessions that come from it. The task
    /// ends when no more come.
    ///
    /// # Errors
    /// The other process has ended meanwhile.
    pub async fn replace(self, proxy: Arc<Proxy>) -> Result<JoinHandle<()>, String> {
        let Self { link, pid } = self;
        let told = link.send(Kind::Accepting, 0, &[], &[]).await;
        told.map_err(|error| format!("process {pid} has ended while this one took over from it: {error}"))?;
        Ok(tokio::spawn(async move {
            let received = receive_sessions(&link, &proxy).await;
            match received {
                Ok(sessions) => info!(pid, sessions, "the process before has passed on all sessions"),
                Err(error) => warn!(pid, %error, "lost the link to the process before"),
            }
        }))
    }
}

/// A file that no process listens at is left by one that was killed.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Sessions that wait for their notifications, by number.
type Waiting = Mutex<HashMap<u64, oneshot::Sender<Vec<u8>>>>;

/// Receives sessions until no more come. Returns how many there were.
async fn receive_sessions(link: &Arc<Link>, proxy: &Arc<Proxy>) -> io::Result<u64> {
    let (waiting, mut sessions) = (Arc::<Waiting>::default(), 0);
    let received = loop {
        let Message { kind, number, body, descriptors } = match link.receive().await {
            Ok(Some(message)) => message,
            Ok(None) => break Ok(sessions),
            Err(error) => break Err(error),
        };
        match (kind, descriptors.into_iter().next()) {
            (Kind::Session, Some(socket)) => {
                sessions += 1;
                tokio::spawn(receive(number, body, socket, link.clone(), proxy.clone(), waiting.clone()));
            }
            (Kind::Notifications, _) => {
                drop(locked(&waiting).remove(&number).map(|session| session.send(body)));
            }
            _ => drop(locked(&waiting).remove(&number)),
        }
    };
    locked(&waiting).clear();
    received
}

/// Receives a session and serves it.
async fn receive(
    number: u64,
    packed: Vec<u8>,
    socket: OwnedFd,
    link: Arc<Link>,
    proxy: Arc<Proxy>,
    waiting: Arc<Waiting>,
) {
    let mut session = match session_arrival::receive(&packed, socket, &proxy).await {
        Ok(session) => session,
        Err(reason) => return drop(link.send(Kind::Refused, number, reason.as_bytes(), &[]).await),
    };
    let (sender, notifications) = oneshot::channel();
    if session.listens() {
        locked(&waiting).insert(number, sender);
    }
    // If the other process is gone, the session is here all the same.
    let told = link.send(Kind::Moved, number, &[], &[]).await;
    if session.listens() {
        let notifications = if told.is_ok() { notifications.await.ok() } else { None };
        session.add_notifications(notifications.as_deref());
    }
    session.serve().await;
}
