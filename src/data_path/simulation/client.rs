//! A simulated client: sends random batches of messages, and compares each reply with its oracle, a session
//! that it has alone.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rand::{Rng as _, seq::IndexedRandom as _};
use tokio::{
    io::{AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    time::{Instant, sleep, timeout},
};

use super::{
    backend::Session,
    frames::{self, shown},
    requests::{Batch, Requests},
    world::World,
};
use crate::{
    data_path::{
        lock::locked,
        login::startup::StartupPacket,
        relay::change_worker::Departure,
        session_start::{AuthenticatedClient, greet},
        session_state::channels::Notification,
        tenant::{Access, Tenant},
    },
    wire::{
        frame::cstr,
        message_reader::{Message, MessageReader},
    },
};

/// A reply that has not come after this (virtual) time never comes.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// A query sleeps for so many seconds; its cancel ends it much earlier.
const LONG_SLEEP: u64 = 300;

/// A client with its session.
pub struct Client {
    world: Arc<World>,
    number: usize,
    requests: Requests,
    oracle: Session,
    reader: ReadHalf<DuplexStream>,
    writer: WriteHalf<DuplexStream>,
    messages: MessageReader,
    key: (i32, Vec<u8>),
    /// Of the last ReadyForQuery.
    status: u8,
    /// The parameters that the proxy and the oracle have reported.
    reported: [BTreeMap<Vec<u8>, Vec<u8>>; 2],
    /// Notifications: channel and payload. None may come where it is `None`.
    received: Option<Vec<(String, String)>>,
    /// What was sent, for the report of a violation.
    sent: Vec<String>,
}

/// Why a client ends before its time.
#[derive(Debug)]
pub enum End {
    /// A fault of the host explains it.
    Fault,
    /// A broken promise.
    Violation(String),
}

type Outcome<T> = Result<T, End>;

impl Client {
    /// Logs in.
    pub async fn connect(world: Arc<World>, number: usize, seed: u64) -> Outcome<Self> {
        let mut requests = Requests::new(number, seed);
        let random = &mut requests.random;
        let (near, far) = duplex(random.random_range(16..20_000));
        let mut settings = Vec::new();
        if random.random() {
            settings.push(("application_name".to_owned(), format!("client {number}")));
        }
        if random.random_ratio(1, 4) {
            settings.push(("work_mem".to_owned(), "16MB".to_owned()));
        }
        let tenant = world.tenant(number);
        let of_tenant = ("pglobby.tenant".to_owned(), tenant.name.clone());
        let (oracle, reports) = Session::start(settings.iter().cloned().chain([of_tenant]).collect());
        tokio::spawn(serve(far, settings, tenant, world.clone()));
        let (reader, writer) = split(near);
        let mut client = Self {
            world,
            number,
            requests,
            oracle,
            reader,
            writer,
            messages: MessageReader::default(),
            key: (0, Vec::new()),
            status: b'I',
            reported: Default::default(),
            received: None,
            sent: Vec::new(),
        };
        for message in client.replies(1).await? {
            match message.tag() {
                b'K' => {
                    let (pid, secret) = message.body().split_first_chunk::<4>().unwrap_or((&[0; 4], &[]));
                    client.key = (i32::from_be_bytes(*pid), secret.to_vec());
                }
                b'S' => client.report(0, message.body()),
                b'Z' => {}
                _ => return Err(client.failed(&format!("the login got {}", shown(&message)))),
            }
        }
        frames::all(&reports).iter().for_each(|message| client.report(1, message.body()));
        client.compare_reports()?;
        Ok(client)
    }

    /// Does its work, and leaves.
    pub async fn work(mut self) -> Outcome<()> {
        for _ in 0..self.requests.random.random_range(3..30) {
            if self.requests.random.random_ratio(1, 3) {
                let millis = self.requests.random.random_range(0..400);
                sleep(Duration::from_millis(millis)).await;
            }
            match self.requests.random.random_range(0..20) {
                0 | 1 => self.sleep_and_cancel().await?,
                2 => self.copy().await?,
                4 => self.flush_between().await?,
                5 if self.status == b'I' && !self.world.is_scarce => self.listen().await?,
                3 if self.requests.random.random_ratio(1, 4) => return self.vanish().await,
                _ => {
                    let batch = self.requests.batches(true);
                    self.exchange(batch).await?;
                }
            }
        }
        if self.requests.random.random_ratio(2, 3) {
            self.sent.push("Terminate".to_owned());
            let _ = self.writer.write_all(&[b'X', 0, 0, 0, 4]).await;
        }
        Ok(())
    }

    /// Sends a batch in random parts, and checks the replies.
    async fn exchange(&mut self, batch: Batch) -> Outcome<()> {
        self.exchange_and(batch, async {}).await
    }

    /// The same; `then` runs when all is sent.
    async fn exchange_and(&mut self, batch: Batch, then: impl Future<Output = ()>) -> Outcome<()> {
        let messages = self.sends(&batch);
        let cuts = self.requests.cuts(batch.bytes.len());
        let replies = async {
            let mut replies = Vec::new();
            let mut ready = 0;
            while ready < batch.replies {
                let Ok(message) = frames::next(&mut self.messages, &mut self.reader).await else { break };
                ready += usize::from(message.tag() == b'Z');
                replies.push(message);
            }
            (replies, ready)
        };
        let sending = async {
            send(&mut self.writer, &batch.bytes, &cuts).await;
            then.await;
        };
        let both = async { tokio::join!(sending, replies) };
        let Ok((_, (replies, ready))) = timeout(FOR_EVER, both).await else {
            return Err(self.stuck("no reply"));
        };
        self.check(&messages, replies, ready == batch.replies)
    }

    /// Notes what is sent.
    fn sends(&mut self, batch: &Batch) -> Vec<Message> {
        let messages = frames::all(&batch.bytes);
        self.sent.extend(messages.iter().map(shown));
        messages
    }

    async fn reply(&mut self) -> Outcome<Message> {
        match timeout(FOR_EVER, frames::next(&mut self.messages, &mut self.reader)).await {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(_)) => Err(self.failed("the connection ended before a reply")),
            Err(_) => Err(self.stuck("no reply")),
        }
    }

    /// The replies up to so many ReadyForQuery.
    async fn replies(&mut self, ready: usize) -> Outcome<Vec<Message>> {
        let mut replies = Vec::new();
        while replies.iter().filter(|reply: &&Message| reply.tag() == b'Z').count() < ready {
            replies.push(self.reply().await?);
        }
        Ok(replies)
    }

    /// A long query and its cancel, which comes while it waits, begins or runs. The cancel hits this query or
    /// nothing.
    async fn sleep_and_cancel(&mut self) -> Outcome<()> {
        let tag = self.requests.tag();
        let mut batch = Batch::default();
        batch.query(&format!("SELECT pg_sleep({LONG_SLEEP}), '{tag}'"));
        let delay =
            Duration::from_millis(*[0, 0, 1, 30, 200].choose(&mut self.requests.random).unwrap_or(&0));
        let (proxy, (pid, secret)) = (self.world.proxy.clone(), self.key.clone());
        let began = Instant::now();
        let cancel = async move {
            sleep(delay).await;
            proxy.cancel(pid, &secret).await;
        };
        self.exchange_and(batch, cancel).await?;
        if began.elapsed() >= Duration::from_secs(LONG_SLEEP) {
            return Err(self.failed("a cancel was lost"));
        }
        Ok(())
    }

    /// Listens for a while. From its own first notification to its last, the client gets all of the channel, once, in
    /// the order in which they were committed; its own before the end of its own request; none after UNLISTEN.
    async fn listen(&mut self) -> Outcome<()> {
        let channel = format!("c{}", self.requests.random.random_range(0..3));
        self.received = Some(Vec::new());
        self.request(&format!("LISTEN {channel}")).await?;
        let first = self.notify_itself(&channel).await?;
        for _ in 0..self.requests.random.random_range(0..4) {
            let millis = self.requests.random.random_range(0..200);
            sleep(Duration::from_millis(millis)).await;
            let mut batch = Batch::default();
            self.requests.add(&mut batch, false);
            self.exchange(batch).await?;
        }
        if self.status != b'I' {
            self.request("ROLLBACK").await?;
        }
        let last = self.notify_itself(&channel).await?;
        let received: Vec<_> = self.received.iter().flatten().cloned().collect();
        let of_channel = received.iter().filter(|(of, _)| *of == channel).map(|(_, payload)| payload.clone());
        let got = between(of_channel, &first, &last);
        let database = self.world.tenant(self.number).database.clone();
        let all = locked(&self.world.host.notifications).clone();
        let sent = all.into_iter().filter(|[of, on, _]| *of == database && *on == channel);
        let sent = between(sent.map(|[_, _, payload]| payload), &first, &last);
        if got != sent || received.iter().any(|(of, _)| *of != channel) {
            return Err(self.failed(&format!("notifications {received:?}, expected {sent:?}")));
        }
        self.request("UNLISTEN *").await?;
        self.received = None;
        Ok(())
    }

    async fn send_all(&mut self, bytes: &[u8]) -> Outcome<()> {
        let sent = timeout(FOR_EVER, send(&mut self.writer, bytes, &[bytes.len()])).await;
        sent.map_err(|_| self.stuck("nothing is read"))
    }

    /// Runs a simple query.
    pub async fn request(&mut self, sql: &str) -> Outcome<()> {
        let mut batch = Batch::default();
        batch.query(sql);
        self.exchange(batch).await
    }

    /// Sends a notification that it receives itself, with the reply; returns the payload.
    async fn notify_itself(&mut self, channel: &str) -> Outcome<String> {
        let tag = self.requests.tag();
        self.request(&format!("NOTIFY {channel}, '{tag}'")).await?;
        match self.received.iter().flatten().any(|(_, payload)| *payload == tag) {
            true => Ok(tag),
            false => Err(self.failed(&format!("its own notification {tag} did not come with the reply"))),
        }
    }

    /// Sends a Flush and waits for what it brings before it goes on with the batch, as some drivers do.
    async fn flush_between(&mut self) -> Outcome<()> {
        let (mut first, mut rest) = (Batch::default(), Batch::default());
        first.parse("", &self.requests.statement());
        first.describe(b'S', "");
        first.flush();
        let mut sent = self.sends(&first);
        self.send_all(&first.bytes).await?;
        let mut replies = Vec::new();
        while !replies.iter().any(|reply: &Message| matches!(reply.tag(), b'T' | b'n' | b'E')) {
            replies.push(self.reply().await?);
        }
        rest.bind("", &[]);
        rest.execute("", false);
        rest.sync();
        sent.extend(self.sends(&rest));
        self.send_all(&rest.bytes).await?;
        replies.extend(self.replies(1).await?);
        self.check(&sent, replies, true)
    }

    async fn copy(&mut self) -> Outcome<()> {
        if self.status == b'E' {
            return self.request("COPY t FROM STDIN").await;
        }
        let batch = self.requests.copy();
        self.exchange(batch).await
    }

    /// Leaves in the middle of something.
    async fn vanish(mut self) -> Outcome<()> {
        let mut batch = Batch::default();
        self.requests.add(&mut batch, self.received.is_none());
        let kept = self.requests.random.random_range(0..=batch.bytes.len());
        let _ = timeout(Duration::from_millis(50), self.writer.write_all(&batch.bytes[..kept])).await;
        Ok(())
    }

    /// Compares replies with those of the oracle.
    fn check(&mut self, sent: &[Message], mut replies: Vec<Message>, complete: bool) -> Outcome<()> {
        self.take_notifications(&mut replies)?;
        let is_cancelled = |reply: &Message| shown(reply).starts_with("E 57014 canceling");
        let cancelled = replies.iter().any(is_cancelled);
        let mut replies = replies.into_iter();
        for message in sent {
            let sleeps = self.oracle.sleep_ms(message) >= LONG_SLEEP * 1000;
            for expected in frames::all(&self.oracle.run(message, sleeps && cancelled)) {
                if expected.tag() == b'S' {
                    self.report(1, expected.body());
                    continue;
                }
                let reply = loop {
                    match replies.next() {
                        Some(reply) if reply.tag() == b'S' => self.report(0, reply.body()),
                        other => break other,
                    }
                };
                let Some(reply) = reply else {
                    return Err(self.failed(&format!("the connection ended before {}", shown(&expected))));
                };
                // In front of a request the proxy may set a startup parameter again, which fails where an earlier
                // request of the pipeline has failed the transaction: this request would have failed as well.
                let both_fail = expected.tag() == b'E' && shown(&reply).starts_with("E 25P02");
                if shown(&reply) != shown(&expected) && !both_fail {
                    return Err(self.failed(&format!(
                        "got {}, expected {}",
                        shown(&reply),
                        shown(&expected)
                    )));
                }
                if reply.tag() == b'Z' {
                    self.status = reply.body().first().copied().unwrap_or_default();
                }
            }
        }
        if let Some(sql) = self.oracle.unknown.take() {
            return Err(End::Violation(format!("the model does not know {sql}")));
        }
        match (replies.next(), complete) {
            // Within a transaction or a pipeline, a startup parameter that was reset is set again before the
            // next request.
            (None, true) if self.status == b'I' => self.compare_reports(),
            (None, true) => Ok(()),
            (extra, _) => Err(self.failed(&format!("more replies: {:?}", extra.as_ref().map(shown)))),
        }
    }

    /// Takes notifications out of the replies.
    fn take_notifications(&mut self, replies: &mut Vec<Message>) -> Outcome<()> {
        for reply in replies.extract_if(.., |reply| reply.tag() == b'A') {
            let Some(Notification { channel, payload, .. }) = Notification::read(&reply.bytes) else {
                continue;
            };
            let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
            match &mut self.received {
                Some(received) => received.push((text(channel), text(payload))),
                None => return Err(self.failed(&format!("{} without LISTEN", shown(&reply)))),
            }
        }
        Ok(())
    }

    fn report(&mut self, of: usize, mut body: &[u8]) {
        let mut next = || cstr(&mut body).unwrap_or_default().to_vec();
        let (name, value) = (next(), next());
        self.reported[of].insert(name, value);
    }

    fn compare_reports(&mut self) -> Outcome<()> {
        let [proxy, oracle] = &self.reported;
        if proxy == oracle {
            return Ok(());
        }
        let text = |map: &BTreeMap<Vec<u8>, Vec<u8>>| {
            let pairs = map.iter().map(|(name, value)| {
                [String::from_utf8_lossy(name), String::from_utf8_lossy(value)].join("=")
            });
            pairs.collect::<Vec<_>>().join(", ")
        };
        let what = format!("reported {}, expected {}", text(proxy), text(oracle));
        Err(self.failed(&what))
    }

    /// Something has not come in an hour.
    fn stuck(&self, what: &str) -> End {
        self.failed(&format!("{what} in an hour: {}", self.world.state()))
    }

    /// A broken promise, unless the host had a fault.
    fn failed(&self, what: &str) -> End {
        let explained = self.world.host.faults.load(Ordering::Relaxed) > 0
            && (EXPLAINED.iter().any(|words| what.starts_with(words))
                || INFRASTRUCTURE.iter().any(|code| what.contains(code)));
        match explained {
            true => End::Fault,
            false => {
                let from = self.sent.len().saturating_sub(30);
                End::Violation(format!(
                    "client {}: {what}\n  after {}",
                    self.number,
                    self.sent[from..].join("\n        ")
                ))
            }
        }
    }
}

/// The proxy's side of a client that has logged in.
async fn serve(pipe: DuplexStream, settings: Vec<(String, String)>, tenant: Arc<Tenant>, world: Arc<World>) {
    let packet = StartupPacket {
        unread: Vec::new(),
        minor: 0,
        user: "alice".to_owned(),
        database: None,
        settings,
        tenant_hint: None,
        tls: None,
        peer: None,
        unsent: Vec::new(),
    };
    let client =
        AuthenticatedClient { stream: pipe.into(), packet, login: world.login.clone(), unsent: Vec::new() };
    let proxy = world.proxy.clone();
    let Ok((pool, session_count)) = proxy.enter_pool(&tenant, Access::ReadWrite).await else { return };
    let seat = pool.placement.seat();
    let mut next = greet(client, pool, seat, proxy).await;
    while let Some(relay) = next {
        next = match relay.run().await {
            Some(Departure::Worker(relay)) => Some(relay),
            Some(Departure::Tenant(_)) | None => None,
        };
    }
    drop(session_count);
}

/// The payloads from the first one to the last one.
fn between(payloads: impl Iterator<Item = String>, first: &str, last: &str) -> Vec<String> {
    let from_first: Vec<_> = payloads.skip_while(|payload| payload != first).collect();
    let count = from_first.iter().position(|payload| payload == last).map_or(0, |at| at + 1);
    from_first.into_iter().take(count).collect()
}

/// Beginnings of violations that a fault of the host explains.
const EXPLAINED: [&str; 5] =
    ["the connection ended", "reported ", "a cancel was lost", "its own notification", "notifications"];

/// Errors that a fault of the host explains.
const INFRASTRUCTURE: [&str; 6] =
    ["got E 08006", "got E 08007", "got E 57P01", "got E 57P03", "got E 53300", "got E 08001"];

async fn send(writer: &mut WriteHalf<DuplexStream>, bytes: &[u8], parts: &[usize]) {
    let mut from = 0;
    for to in parts {
        if writer.write_all(&bytes[from..*to]).await.is_err() {
            return;
        }
        from = *to;
        tokio::task::yield_now().await;
    }
}
