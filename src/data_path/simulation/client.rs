//! A simulated client: sends random batches of messages, and compares each reply with its oracle, a session
//! that it has alone.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::{
    io::{AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    time::{Instant, sleep, timeout},
};

use super::{
    backend::Session,
    frames::{self, Frame, Frames, shown},
    world::World,
};
use crate::{
    data_path::{
        lock::locked,
        login::startup::StartupPacket,
        session_start::{AuthenticatedClient, greet},
        tenant::Access,
    },
    wire::frame::cstr,
    wire::message::{append, append_cstr, bind, bind_portal, close_statement, execute, parse},
};

/// A reply that has not come after this (virtual) time never comes.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// A query sleeps for so many seconds; its cancel ends it much earlier.
const LONG_SLEEP: u64 = 300;

/// A client with its session.
pub struct Client {
    world: Arc<World>,
    number: usize,
    random: StdRng,
    count: usize,
    oracle: Session,
    reader: ReadHalf<DuplexStream>,
    writer: WriteHalf<DuplexStream>,
    frames: Frames,
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

/// Messages that are sent at once, and how many ReadyForQuery answer them.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    replies: usize,
}

impl Batch {
    fn query(&mut self, sql: &str) {
        append(&mut self.bytes, b'Q', |out| append_cstr(out, sql.as_bytes()));
        self.replies += 1;
    }

    fn sync(&mut self) {
        append(&mut self.bytes, b'S', |_| {});
        self.replies += 1;
    }

    /// Binds a named portal and executes it, for one row if `limited`.
    fn portal(&mut self, portal: &str, statement: &str, parameters: &[&str], limited: bool) {
        bind_portal(portal.as_bytes(), statement.as_bytes(), parameters, &mut self.bytes);
        self.execute(portal, limited);
    }

    fn execute(&mut self, portal: &str, limited: bool) {
        append(&mut self.bytes, b'E', |out| {
            append_cstr(out, portal.as_bytes());
            out.extend_from_slice(&u32::from(limited).to_be_bytes());
        });
    }

    fn describe(&mut self, kind: u8, name: &str) {
        append(&mut self.bytes, b'D', |out| {
            out.push(kind);
            append_cstr(out, name.as_bytes());
        });
    }
}

impl Client {
    /// Logs in. `None`: the host's faults did not let it.
    pub async fn connect(world: Arc<World>, number: usize, seed: u64) -> Outcome<Self> {
        let mut random = StdRng::seed_from_u64(seed);
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
        let client = AuthenticatedClient {
            stream: far.into(),
            packet,
            login: world.login.clone(),
            unsent: Vec::new(),
        };
        let proxy = world.proxy.clone();
        tokio::spawn(async move {
            let Ok((pool, session_count)) = proxy.enter_pool(&tenant, Access::ReadWrite).await else {
                return;
            };
            if let Some(relay) = greet(client, pool, proxy).await {
                relay.run().await;
            }
            drop(session_count);
        });
        let (reader, writer) = split(near);
        let mut client = Self {
            world,
            number,
            random,
            count: 0,
            oracle,
            reader,
            writer,
            frames: Frames::default(),
            key: (0, Vec::new()),
            status: b'I',
            reported: Default::default(),
            received: None,
            sent: Vec::new(),
        };
        for (tag, body) in client.replies(1).await? {
            match tag {
                b'K' => {
                    let (pid, secret) = body.split_first_chunk::<4>().unwrap_or((&[0; 4], &[]));
                    client.key = (i32::from_be_bytes(*pid), secret.to_vec());
                }
                b'S' => client.report(0, &body),
                b'Z' => {}
                _ => return Err(client.failed(&format!("the login got {}", shown(&(tag, body))))),
            }
        }
        frames::all(reports).iter().for_each(|(_, body)| client.report(1, body));
        client.compare_reports()?;
        Ok(client)
    }

    /// Does its work, and leaves.
    pub async fn work(mut self) -> Outcome<()> {
        for _ in 0..self.random.random_range(3..30) {
            if self.random.random_ratio(1, 3) {
                let millis = self.random.random_range(0..400);
                sleep(Duration::from_millis(millis)).await;
            }
            match self.random.random_range(0..20) {
                0 | 1 => self.sleep_and_cancel().await?,
                2 => self.copy().await?,
                4 => self.flush_between().await?,
                5 if self.status == b'I' && !self.world.is_scarce => self.listen().await?,
                3 if self.random.random_ratio(1, 4) => return self.vanish().await,
                _ => {
                    let mut batch = Batch::default();
                    for _ in 0..self.random.random_range(1..=3) {
                        self.fill(&mut batch);
                    }
                    self.exchange(batch).await?;
                }
            }
        }
        if self.random.random_ratio(2, 3) {
            self.sent.push("Terminate".to_owned());
            let _ = self.writer.write_all(&[b'X', 0, 0, 0, 4]).await;
        }
        Ok(())
    }

    fn tag(&mut self) -> String {
        self.count += 1;
        format!("{}-{}", self.number, self.count)
    }

    /// A text that shows what the session has set.
    fn probe(&mut self) -> String {
        let tag = self.tag();
        format!(
            "SELECT '{tag}', current_setting('work_mem'), current_setting('app.user', true), \
             current_setting('application_name'), current_setting('pglobby.tenant')"
        )
    }

    fn statement(&mut self) -> String {
        let (tag, number) = (self.tag(), self.random.random_range(0..3));
        let mut texts = vec![
            format!("SELECT '{tag}'"),
            format!("SELECT 1/0, '{tag}'"),
            format!("SELECT pg_sleep(1), '{tag}'"),
            format!("SET work_mem = '{}MB'", 5 + number),
            format!("SET LOCAL work_mem = '{}MB'", 50 + number),
            format!("SET app.user = '{tag}'"),
            format!("SET LOCAL app.user = 'local {tag}'"),
            format!("SET application_name = 'name {tag}'"),
            format!("SELECT set_config('app.user', '{tag}', false)"),
            "RESET work_mem".to_owned(),
            "RESET ALL".to_owned(),
            "BEGIN".to_owned(),
            "COMMIT".to_owned(),
            "ROLLBACK".to_owned(),
            format!("CREATE TEMP TABLE t{number} (a int)"),
            format!("DROP TABLE t{number}"),
            format!("SELECT '{tag}' FROM t{number}"),
            format!("NOTIFY c{number}, '{tag}'"),
            format!("SELECT pg_notify('c{number}', '{tag}')"),
        ];
        let probe = self.probe();
        texts.extend([probe.clone(), probe.clone(), probe]);
        texts.choose(&mut self.random).cloned().unwrap_or_default()
    }

    /// Adds requests that end in a ReadyForQuery.
    fn fill(&mut self, batch: &mut Batch) {
        let number = self.random.random_range(0..3);
        match self.random.random_range(0..13) {
            0..4 => {
                let sql = self.statement();
                batch.query(&sql);
            }
            4 => {
                // Between the statements of one text, no startup parameter can be set again.
                let mut texts = vec![self.statement(), self.statement(), self.probe()];
                let resets = |sql: &String| ["RESET", "ROLLBACK"].iter().any(|verb| sql.starts_with(verb));
                texts.retain(|sql| !resets(sql));
                batch.query(&texts.join("; "));
            }
            5 => {
                let tag = self.tag();
                let sqls = [
                    format!("PREPARE p{number} AS SELECT '{tag}'"),
                    format!("EXECUTE p{number}"),
                    format!("DEALLOCATE p{number}"),
                    format!("SELECT pg_advisory_lock({number})"),
                    format!("SELECT pg_advisory_unlock({number})"),
                ];
                batch.query(sqls.choose(&mut self.random).map_or("", |sql| sql));
            }
            6 if self.received.is_none() && self.random.random_ratio(1, 3) => batch.query("DISCARD ALL"),
            7 => {
                close_statement(format!("s{number}").as_bytes(), &mut batch.bytes);
                batch.sync();
            }
            8 => {
                // A named statement, used later as well.
                let (name, tag) = (format!("s{number}"), self.tag());
                let sql = format!("SELECT $1, '{tag}', current_setting('work_mem')");
                parse(name.as_bytes(), sql.as_bytes(), &mut batch.bytes);
                if self.random.random() {
                    batch.describe(b'S', &name);
                }
                batch.sync();
            }
            9 => {
                let (name, tag) = (format!("s{number}"), self.tag());
                bind(name.as_bytes(), &[&tag], &mut batch.bytes);
                batch.describe(b'P', "");
                execute(&mut batch.bytes);
                batch.sync();
            }
            10 => {
                // Portals of a transaction, or of one batch.
                let (tag, portal) = (self.tag(), format!("c{number}"));
                let limited = self.random.random();
                match self.random.random_range(0..3) {
                    0 => batch.portal(&portal, &format!("s{number}"), &[&tag], limited),
                    1 => batch.execute(&portal, limited),
                    _ => {
                        let sql = self.statement();
                        parse(b"", sql.as_bytes(), &mut batch.bytes);
                        batch.portal(&portal, "", &[], limited);
                        batch.execute(&portal, limited);
                    }
                }
                if self.random.random_ratio(1, 3) {
                    append(&mut batch.bytes, b'C', |out| {
                        out.push(b'P');
                        append_cstr(out, portal.as_bytes());
                    });
                }
                batch.sync();
            }
            _ => {
                for _ in 0..self.random.random_range(1..=3) {
                    let sql = match self.random.random_range(0..8) {
                        0 => format!("SELEC '{}'", self.tag()),
                        _ => self.statement(),
                    };
                    parse(b"", sql.as_bytes(), &mut batch.bytes);
                    bind(b"", &[], &mut batch.bytes);
                    if self.random.random() {
                        batch.describe(b'P', "");
                    }
                    execute(&mut batch.bytes);
                }
                batch.sync();
            }
        }
    }

    /// Sends a batch in random parts, and checks the replies.
    async fn exchange(&mut self, batch: Batch) -> Outcome<()> {
        self.exchange_and(batch, async {}).await
    }

    /// The same; `then` runs when all is sent.
    async fn exchange_and(&mut self, batch: Batch, then: impl Future<Output = ()>) -> Outcome<()> {
        let frames = frames::all(batch.bytes.clone());
        self.sent.extend(frames.iter().map(shown));
        let parts = self.parts(batch.bytes.len());
        let replies = async {
            let mut replies = Vec::new();
            let mut ready = 0;
            while ready < batch.replies {
                let Ok(Some(frame)) = self.frames.next(&mut self.reader).await else { break };
                ready += usize::from(frame.0 == b'Z');
                replies.push(frame);
            }
            (replies, ready)
        };
        let sending = async {
            send(&mut self.writer, &batch.bytes, &parts).await;
            then.await;
        };
        let both = async { tokio::join!(sending, replies) };
        let Ok((_, (replies, ready))) = timeout(FOR_EVER, both).await else {
            return Err(self.failed(&format!("no reply in an hour: {}", self.world.state())));
        };
        self.check(&frames, replies, ready == batch.replies)
    }

    fn parts(&mut self, bytes: usize) -> Vec<usize> {
        let mut cuts: Vec<_> =
            (0..self.random.random_range(0..4)).map(|_| self.random.random_range(0..=bytes)).collect();
        cuts.push(bytes);
        cuts.sort_unstable();
        cuts
    }

    async fn replies(&mut self, ready: usize) -> Outcome<Vec<Frame>> {
        let mut replies = Vec::new();
        let mut seen = 0;
        while seen < ready {
            match timeout(FOR_EVER, self.frames.next(&mut self.reader)).await {
                Ok(Ok(Some(frame))) => {
                    seen += usize::from(frame.0 == b'Z');
                    replies.push(frame);
                }
                Ok(_) => {
                    return Err(self.failed(&format!(
                        "the connection ended: {:?}",
                        replies.iter().map(shown).collect::<Vec<_>>()
                    )));
                }
                Err(_) => {
                    return Err(self.failed(&format!("no reply in an hour: {}", self.world.state())));
                }
            }
        }
        Ok(replies)
    }

    /// A long query and its cancel, which comes while it waits, begins or runs. The cancel hits this query or
    /// nothing.
    async fn sleep_and_cancel(&mut self) -> Outcome<()> {
        let tag = self.tag();
        let mut batch = Batch::default();
        batch.query(&format!("SELECT pg_sleep({LONG_SLEEP}), '{tag}'"));
        let delay = Duration::from_millis(*[0, 0, 1, 30, 200].choose(&mut self.random).unwrap_or(&0));
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
        let channel = format!("c{}", self.random.random_range(0..3));
        self.received = Some(Vec::new());
        self.request(&format!("LISTEN {channel}")).await?;
        let first = self.notify_itself(&channel).await?;
        for _ in 0..self.random.random_range(0..4) {
            let millis = self.random.random_range(0..200);
            sleep(Duration::from_millis(millis)).await;
            let mut batch = Batch::default();
            self.fill(&mut batch);
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
        sent.map_err(|_| self.failed(&format!("nothing is read in an hour: {}", self.world.state())))
    }

    /// Runs a simple query.
    pub async fn request(&mut self, sql: &str) -> Outcome<()> {
        let mut batch = Batch::default();
        batch.query(sql);
        self.exchange(batch).await
    }

    /// Sends a notification that it receives itself, with the reply; returns the payload.
    async fn notify_itself(&mut self, channel: &str) -> Outcome<String> {
        let tag = self.tag();
        self.request(&format!("NOTIFY {channel}, '{tag}'")).await?;
        match self.received.iter().flatten().any(|(_, payload)| *payload == tag) {
            true => Ok(tag),
            false => Err(self.failed(&format!("its own notification {tag} did not come with the reply"))),
        }
    }

    /// Sends a Flush and waits for what it brings before it goes on with the batch, as some drivers do.
    async fn flush_between(&mut self) -> Outcome<()> {
        let mut first = Batch::default();
        let sql = self.statement();
        parse(b"", sql.as_bytes(), &mut first.bytes);
        first.describe(b'S', "");
        append(&mut first.bytes, b'H', |_| {});
        let mut sent = frames::all(first.bytes.clone());
        self.sent.extend(sent.iter().map(shown));
        let mut replies = Vec::new();
        self.send_all(&first.bytes).await?;
        while !replies.iter().any(|(tag, _)| matches!(tag, b'T' | b'n' | b'E')) {
            match timeout(FOR_EVER, self.frames.next(&mut self.reader)).await {
                Ok(Ok(Some(frame))) => replies.push(frame),
                Ok(_) => return Err(self.failed("the connection ended before the reply to a Flush")),
                Err(_) => {
                    return Err(self.failed(&format!("no reply in an hour: {}", self.world.state())));
                }
            }
        }
        let mut rest = Batch::default();
        bind(b"", &[], &mut rest.bytes);
        execute(&mut rest.bytes);
        rest.sync();
        let others = frames::all(rest.bytes.clone());
        self.sent.extend(others.iter().map(shown));
        sent.extend(others);
        self.send_all(&rest.bytes).await?;
        replies.extend(self.replies(1).await?);
        self.check(&sent, replies, true)
    }

    async fn copy(&mut self) -> Outcome<()> {
        let mut batch = Batch::default();
        batch.query("COPY t FROM STDIN");
        if self.status == b'E' {
            return self.exchange(batch).await;
        }
        for _ in 0..self.random.random_range(0..5) {
            append(&mut batch.bytes, b'd', |out| out.extend_from_slice(b"1\n"));
        }
        match self.random.random_ratio(4, 5) {
            true => append(&mut batch.bytes, b'c', |_| {}),
            false => append(&mut batch.bytes, b'f', |out| append_cstr(out, b"no more")),
        }
        self.exchange(batch).await
    }

    /// Leaves in the middle of something.
    async fn vanish(mut self) -> Outcome<()> {
        let mut batch = Batch::default();
        self.fill(&mut batch);
        let kept = self.random.random_range(0..=batch.bytes.len());
        let _ = timeout(Duration::from_millis(50), self.writer.write_all(&batch.bytes[..kept])).await;
        Ok(())
    }

    /// Compares replies with those of the oracle.
    fn check(&mut self, sent: &[Frame], mut replies: Vec<Frame>, complete: bool) -> Outcome<()> {
        self.take_notifications(&mut replies)?;
        let is_cancelled = |frame: &Frame| frame.0 == b'E' && shown(frame).starts_with("E 57014 canceling");
        let cancelled = replies.iter().any(is_cancelled);
        let mut replies = replies.into_iter();
        for (tag, body) in sent {
            let sleeps = self.oracle.sleep_ms(*tag, body) >= LONG_SLEEP * 1000;
            for expected in frames::all(self.oracle.run(*tag, body, sleeps && cancelled)) {
                if expected.0 == b'S' {
                    self.report(1, &expected.1);
                    continue;
                }
                let reply = loop {
                    match replies.next() {
                        Some((b'S', body)) => self.report(0, &body),
                        other => break other,
                    }
                };
                let Some(reply) = reply else {
                    return Err(self.failed(&format!("the connection ended before {}", shown(&expected))));
                };
                // In front of a request the proxy may set a startup parameter again, which fails where an earlier
                // request of the pipeline has failed the transaction: this request would have failed as well.
                let both_fail = expected.0 == b'E' && shown(&reply).starts_with("E 25P02");
                if shown(&reply) != shown(&expected) && !both_fail {
                    return Err(self.failed(&format!(
                        "got {}, expected {}",
                        shown(&reply),
                        shown(&expected)
                    )));
                }
                if reply.0 == b'Z' {
                    self.status = reply.1.first().copied().unwrap_or_default();
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
    fn take_notifications(&mut self, replies: &mut Vec<Frame>) -> Outcome<()> {
        for (_, body) in replies.extract_if(.., |(tag, _)| *tag == b'A') {
            let mut rest = body.get(4..).unwrap_or_default();
            let mut next = || String::from_utf8_lossy(cstr(&mut rest).unwrap_or_default()).into_owned();
            let (channel, payload) = (next(), next());
            match &mut self.received {
                Some(received) => received.push((channel, payload)),
                None => return Err(self.failed(&format!("notification {payload} without LISTEN"))),
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
