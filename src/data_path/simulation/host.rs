//! The simulated host: takes connections, logs them in, serves each with a [`Session`] of its own, and has faults.

use std::{
    collections::BTreeMap,
    io,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    sync::Notify,
    time::sleep,
};

use super::{backend::Session, frames};
use crate::{
    data_path::{lock::locked, relay::notifications::READY, session_state::channels::Notification},
    wire::{
        message::{
            CANCEL_REQUEST, Severity, authentication_ok, backend_key_data, error_response, ready_for_query,
        },
        message_reader::{Message, MessageReader},
    },
};

/// A host with its backends.
#[derive(Debug)]
pub struct Host {
    random: Mutex<StdRng>,
    backends: Mutex<BTreeMap<i32, Arc<Backend>>>,
    next: AtomicI32,
    /// One frame in so many meets a fault; 0: none.
    one_fault_in: u32,
    /// Bytes that a connection holds in each direction.
    pipe_bytes: usize,
    /// How long it takes to answer a new connection.
    connect_time: Duration,
    traces: bool,
    /// How many faults there were.
    pub faults: AtomicUsize,
    /// All notifications: database, channel, payload.
    pub notifications: Mutex<Vec<[String; 3]>>,
    /// Questions that the model does not know.
    pub unknown: Mutex<Vec<String>>,
}

#[derive(Debug)]
struct Backend {
    pid: i32,
    secret: Vec<u8>,
    session: Mutex<Session>,
    cancel: Notify,
    /// NotificationResponse messages that it has yet to send.
    notifications: Mutex<Vec<u8>>,
    notified: Notify,
}

/// What goes wrong with a connection.
enum Fault {
    /// It is lost, before the reply or within it.
    Lost,
    /// The server ends the session.
    Ended,
    /// The server is slow, by so many seconds: the proxy gives up a question of its own after ten.
    Slow(u64),
}

impl Host {
    pub fn new(seed: u64, one_fault_in: u32, pipe_bytes: usize, connect_time: Duration) -> Arc<Self> {
        Arc::new(Self {
            random: Mutex::new(StdRng::seed_from_u64(seed ^ 0x5eed)),
            backends: Mutex::default(),
            next: AtomicI32::new(100),
            one_fault_in,
            pipe_bytes,
            connect_time,
            traces: std::env::var_os("PGLOBBY_SIMULATE_TRACE").is_some(),
            faults: AtomicUsize::default(),
            notifications: Mutex::default(),
            unknown: Mutex::default(),
        })
    }

    /// A connection to it.
    pub fn connect(self: &Arc<Self>) -> io::Result<DuplexStream> {
        if matches!(self.fault(), Some(Fault::Lost)) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = duplex(self.pipe_bytes);
        let host = self.clone();
        tokio::spawn(async move {
            let mut far = far;
            let _ = host.serve(&mut far).await;
        });
        Ok(near)
    }

    /// What each open session has left.
    pub fn leftovers(&self) -> Vec<(i32, Vec<&'static str>)> {
        let backends = locked(&self.backends);
        backends.iter().map(|(pid, backend)| (*pid, locked(&backend.session).leftovers())).collect()
    }

    fn chance(&self, one_in: u32) -> bool {
        one_in > 0 && locked(&self.random).random_ratio(1, one_in)
    }

    fn fault(&self) -> Option<Fault> {
        if !self.chance(self.one_fault_in) {
            return None;
        }
        self.faults.fetch_add(1, Ordering::Relaxed);
        Some(match locked(&self.random).random_range(0..4) {
            0 => Fault::Lost,
            1 => Fault::Ended,
            2 => Fault::Slow(2),
            _ => Fault::Slow(12),
        })
    }

    async fn pause(&self) {
        if self.chance(4) {
            let millis = locked(&self.random).random_range(0..30);
            sleep(Duration::from_millis(millis)).await;
        }
    }

    async fn serve(&self, pipe: &mut DuplexStream) -> io::Result<()> {
        let length = pipe.read_u32().await? as usize;
        let mut packet = vec![0; length - 4];
        pipe.read_exact(&mut packet).await?;
        sleep(self.connect_time).await;
        self.pause().await;
        if packet[..4] == CANCEL_REQUEST.to_be_bytes() {
            let pid = i32::from_be_bytes([packet[4], packet[5], packet[6], packet[7]]);
            let backend = locked(&self.backends).get(&pid).cloned();
            self.trace(|| format!("{pid}: cancel"));
            if let Some(backend) = backend.filter(|backend| backend.secret == packet[8..]) {
                // A session that runs nothing does not notice.
                backend.cancel.notify_waiters();
            }
            return Ok(());
        }
        let fields: Vec<_> = packet[4..].split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let pairs = fields.chunks_exact(2).filter(|pair| !pair[0].is_empty());
        let startup = pairs.map(|pair| (pair[0].to_string(), pair[1].to_string())).collect();
        let mut out = Vec::new();
        if self.fault().is_some() {
            error_response(&mut out, Severity::Fatal, "57P03", "the database system is starting up", &[]);
            return pipe.write_all(&out).await;
        }
        let (session, reports) = Session::start(startup);
        let pid = self.next.fetch_add(1, Ordering::Relaxed);
        let secret = locked(&self.random).random::<[u8; 4]>().to_vec();
        authentication_ok(&mut out);
        out.extend(reports);
        backend_key_data(&mut out, pid, &secret);
        ready_for_query(&mut out, b'I');
        let backend = Arc::new(Backend {
            pid,
            secret,
            session: Mutex::new(session),
            cancel: Notify::new(),
            notifications: Mutex::default(),
            notified: Notify::new(),
        });
        locked(&self.backends).insert(pid, backend.clone());
        let served = async {
            pipe.write_all(&out).await?;
            self.converse(pipe, &backend).await
        };
        let ended = served.await;
        locked(&self.backends).remove(&pid);
        ended
    }

    async fn converse(&self, pipe: &mut DuplexStream, backend: &Backend) -> io::Result<()> {
        let mut reader = MessageReader::default();
        loop {
            let message = tokio::select! {
                next = frames::next(&mut reader, pipe) => next?,
                () = backend.notified.notified() => {
                    if locked(&backend.session).is_idle() {
                        let messages = std::mem::take(&mut *locked(&backend.notifications));
                        pipe.write_all(&messages).await?;
                    }
                    continue;
                }
            };
            if message.tag() == b'X' {
                return Ok(());
            }
            let fault = self.fault();
            let slow = if let Some(Fault::Slow(seconds)) = fault { seconds } else { 0 };
            let cancelled = self.is_cancelled(backend, &message, slow).await;
            let mut out = locked(&backend.session).run(&message, cancelled);
            self.deliver(backend);
            if locked(&backend.session).is_idle() && out.ends_with(READY) {
                let messages = std::mem::take(&mut *locked(&backend.notifications));
                out.splice(out.len() - READY.len()..out.len() - READY.len(), messages);
            }
            self.trace(|| {
                let replies: Vec<_> = frames::all(&out).iter().map(frames::shown).collect();
                format!("{}: {} -> {}", backend.pid, frames::shown(&message), replies.join(" | "))
            });
            if let Some(sql) = locked(&backend.session).unknown.take() {
                locked(&self.unknown).push(sql);
            }
            match fault {
                Some(Fault::Lost) => {
                    let kept = locked(&self.random).random_range(0..=out.len());
                    return pipe.write_all(&out[..kept]).await;
                }
                Some(Fault::Ended) => {
                    let mut last = Vec::new();
                    let message = "terminating connection due to administrator command";
                    error_response(&mut last, Severity::Fatal, "57P01", message, &[]);
                    return pipe.write_all(&last).await;
                }
                _ => pipe.write_all(&out).await?,
            }
        }
    }

    /// Delivers the notifications that the session has committed, in one order for all.
    fn deliver(&self, sender: &Backend) {
        let (database, notified) = {
            let mut session = locked(&sender.session);
            (session.startup("database").unwrap_or_default(), std::mem::take(&mut session.notified))
        };
        for (channel, payload) in notified {
            for backend in locked(&self.backends).values() {
                let session = locked(&backend.session);
                if session.startup("database").as_ref() == Some(&database)
                    && session.listening.contains(&channel)
                {
                    let (channel, payload) = (channel.as_bytes(), payload.as_bytes());
                    Notification { process_id: sender.pid, channel, payload }
                        .write(&mut locked(&backend.notifications));
                    backend.notified.notify_one();
                }
            }
            locked(&self.notifications).push([database.clone(), channel, payload]);
        }
    }

    /// Shows what servers get and say, with `PGLOBBY_SIMULATE_TRACE=1`.
    #[allow(clippy::print_stderr, reason = "asked for")]
    fn trace(&self, event: impl FnOnce() -> String) {
        if self.traces {
            eprintln!("{}", event());
        }
    }

    /// Waits as long as the statement takes, or until it is cancelled.
    async fn is_cancelled(&self, backend: &Backend, message: &Message, slow: u64) -> bool {
        let mut cancel = pin!(backend.cancel.notified());
        cancel.as_mut().enable();
        self.pause().await;
        sleep(Duration::from_secs(slow)).await;
        let millis = locked(&backend.session).sleep_ms(message);
        if millis == 0 {
            return false;
        }
        tokio::select! {
            biased;
            () = cancel => true,
            () = sleep(Duration::from_millis(millis)) => false,
        }
    }
}
