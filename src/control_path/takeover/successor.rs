//! The side of the running process: passes its sockets to a new one, and its sessions once the new one accepts clients.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use tracing::{info, warn};

use super::{
    link::{BODY_BYTES_MAX, Kind, Link, Message},
    predecessor::VERSION,
    require_same_user,
};
use crate::{
    control_path::node::Node,
    data_path::{
        inherited_sockets::duplicate,
        lock::locked,
        packed_session::{MoveOutcome, MovingSession},
        proxy::Proxy,
        unix_socket::UnixSocket,
    },
};

/// How long a process that has connected may take to ask.
const ASK_WITHIN: Duration = Duration::from_secs(5);

/// The pause after `accept` has failed.
const PAUSE: Duration = Duration::from_millis(100);

/// Sessions on their way into the link.
const MOVING_MAX: usize = 64;

/// A process that accepts clients in place of this one.
#[derive(Debug)]
pub struct Successor {
    link: Link,
    pid: i32,
}

impl Successor {
    /// Waits for a process that takes over. Resolves when it accepts clients; then the socket's file is its own.
    /// One that fails before changes nothing.
    pub async fn of(place: &mut UnixSocket, node: &Node) -> Self {
        let listener = match place.listener.try_clone().and_then(UnixListener::from_std) {
            Ok(listener) => listener,
            Err(error) => {
                warn!(%error, "no process can take over from this one");
                return std::future::pending().await;
            }
        };
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match hand_over(stream, place, node).await {
                    Ok(Some(successor)) => {
                        place.leave_file();
                        return successor;
                    }
                    Ok(None) => {}
                    Err(error) => warn!(%error, "take-over failed; this process goes on"),
                },
                Err(error) => {
                    warn!(%error, "cannot accept a process that takes over");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Passes on the sessions that [`Proxy::successor`] gets.
    pub fn receive_from(self, proxy: &Proxy) {
        let (sender, moving) = mpsc::channel(MOVING_MAX);
        *locked(&proxy.successor) = Some(sender);
        tokio::spawn(self.pass_on(moving));
    }

    /// Passes sessions on until none is left.
    async fn pass_on(self, mut moving: mpsc::Receiver<MovingSession>) {
        let Self { link, pid } = self;
        let link = Arc::new(link);
        let (sender, mut answers) = mpsc::channel(MOVING_MAX);
        let reading = tokio::spawn(read_answers(link.clone(), sender));
        let (mut sent, mut last) = (HashMap::<u64, SentSession>::new(), 0);
        loop {
            tokio::select! {
                answer = answers.recv() => match answer {
                    Some((number, outcome)) => {
                        if let Some(session) = sent.remove(&number) {
                            session.decided(number, outcome, &link);
                        }
                    }
                    None => break warn!(pid, "lost the link to the process that takes over"),
                },
                session = moving.recv() => {
                    let Some(session) = session else { break };
                    last += 1;
                    if let Err(error) = send(&link, last, session, &mut sent).await {
                        break warn!(pid, %error, "lost the link to the process that takes over");
                    }
                }
            }
        }
        reading.abort();
        // What was sent may have arrived; nobody else has the rest.
        drop(sent);
        moving.close();
        while let Some(session) = moving.recv().await {
            let _ = session.outcome.send(MoveOutcome::Refused("the other process is gone".to_owned()));
        }
    }
}

/// A session that the other process may have.
struct SentSession {
    outcome: oneshot::Sender<MoveOutcome>,
    notifications: Option<oneshot::Receiver<Vec<u8>>>,
}

impl SentSession {
    /// The other process has it or not. If it has it and the session listens, the notifications follow.
    fn decided(self, number: u64, outcome: MoveOutcome, link: &Arc<Link>) {
        let notifications = self.notifications.filter(|_| outcome == MoveOutcome::Moved);
        let _ = self.outcome.send(outcome);
        if let Some(notifications) = notifications {
            let link = link.clone();
            tokio::spawn(async move {
                let sent = match notifications.await {
                    Ok(notifications) => link.send(Kind::Notifications, number, &notifications, &[]).await,
                    Err(_) => link.send(Kind::Refused, number, &[], &[]).await,
                };
                // The other process ends the session if it gets neither.
                drop(sent);
            });
        }
    }
}

/// Reads what the other process has done with sessions.
async fn read_answers(link: Arc<Link>, answers: mpsc::Sender<(u64, MoveOutcome)>) {
    while let Ok(Some(Message { kind, number, body, .. })) = link.receive().await {
        let outcome = match kind {
            Kind::Moved => MoveOutcome::Moved,
            Kind::Refused => MoveOutcome::Refused(String::from_utf8_lossy(&body).into_owned()),
            _ => return,
        };
        if answers.send((number, outcome)).await.is_err() {
            return;
        }
    }
}

/// Sends a session. After an error it is unknown whether it has arrived.
async fn send(
    link: &Link,
    number: u64,
    session: MovingSession,
    sent: &mut HashMap<u64, SentSession>,
) -> io::Result<()> {
    let MovingSession { packed, socket, outcome, notifications } = session;
    if packed.len() > BODY_BYTES_MAX {
        let _ = outcome.send(MoveOutcome::Refused("the session is too large".to_owned()));
        return Ok(());
    }
    sent.insert(number, SentSession { outcome, notifications });
    link.send(Kind::Session, number, &packed, &[socket.as_fd()]).await
}

/// Passes the sockets on and waits until the other process accepts clients. `None`: it has asked for nothing.
async fn hand_over(stream: UnixStream, place: &UnixSocket, node: &Node) -> Result<Option<Successor>, String> {
    let peer = stream.peer_cred().map_err(|error| error.to_string())?;
    require_same_user(&peer)?;
    let (link, pid) = (Link::new(stream), peer.pid().unwrap_or_default());
    let lost = |error: io::Error| format!("process {pid}: {error}");
    let asked = tokio::time::timeout(ASK_WITHIN, link.receive()).await;
    match asked.map_err(|_| format!("process {pid} has connected and asks for nothing"))?.map_err(lost)? {
        None => return Ok(None),
        Some(Message { kind: Kind::Hello, number: VERSION, .. }) => {}
        Some(_) => {
            let reason = "this version passes nothing on to that one";
            let _ = link.send(Kind::Refused, 0, reason.as_bytes(), &[]).await;
            return Err(format!("process {pid} speaks another version"));
        }
    }
    let sockets = sockets(place, node).map_err(|error| error.to_string())?;
    let descriptors: Vec<_> = sockets.iter().map(OwnedFd::as_fd).collect();
    let number = node.proxy.sessions.node().into();
    link.send(Kind::Sockets, number, &[], &descriptors).await.map_err(lost)?;
    info!(pid, sockets = descriptors.len(), "another process is taking over");
    match link.receive().await.map_err(lost)? {
        Some(Message { kind: Kind::Accepting, .. }) => Ok(Some(Successor { link, pid })),
        _ => Err(format!("process {pid} has ended before it accepted clients")),
    }
}

fn sockets(place: &UnixSocket, node: &Node) -> io::Result<Vec<OwnedFd>> {
    let mut sockets = node.listening_sockets()?;
    sockets.push(duplicate(&place.listener)?);
    Ok(sockets)
}
