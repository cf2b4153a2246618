//! A hostile tenant fills every queue, map, cache and buffer that it can. The process lives and stays small, another tenant works
//! all the time, what is too much is refused for that statement only, and when the attackers have left nothing of theirs is kept.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use socket2::{Domain, SockAddr, Socket, Type};
use support::{
    Client, Proxy, Wire,
    client::in_time,
    proxy::{login_of, password_of},
    wire::{
        Message, PROTOCOL_3_0, bind, c_string, execute, message, parse, rows, startup_message, sync, tags,
    },
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinHandle};

/// `max_memory`: the attacker alone gets half of it.
const MEMORY: usize = 24 << 20;

/// What the process may grow by: what is counted, copies that are under way, what the allocator keeps, one read of each session.
const GROWTH: usize = 64 << 20;

/// What may be left of that when the attackers have gone.
const LEFT: usize = 12 << 20;

/// Longer than what is kept of a session's settings, shorter than what is read of a statement.
const LONG: usize = 900_000;

/// What a client is told for whom too much would be kept.
const TOO_MUCH: [&str; 2] = ["53200", "53400"];

async fn attacked() -> Proxy {
    Proxy::with_tenant("acme")
        .and_tenant("globex")
        .pool_size(20)
        .config("max_memory", &format!("\"{MEMORY}B\""))
        .config("server_idle_timeout", "\"1s\"")
        // As it does by itself, in ten times the time.
        .environment("_RJEM_MALLOC_CONF", "dirty_decay_ms:1000")
        .start()
        .await
}

/// A figure of `/proc/PID/status`, in bytes.
fn memory_of(proxy: &Proxy, figure: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("the process lives");
    let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
}

/// Another tenant's client, at work without a pause.
struct Neighbour {
    done: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Neighbour {
    async fn of(proxy: &Proxy) -> Self {
        let client: Client = proxy.client("globex").connect().await;
        let (done, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counts, ends) = (done.clone(), over.clone());
        let task = tokio::spawn(async move {
            while !ends.load(SeqCst) {
                let nonce = counts.fetch_add(1, SeqCst).to_string();
                client.run(&format!("SET my.note = '{nonce}'")).await;
                assert_eq!(client.ask("SELECT current_setting('my.note')").await, nonce);
                let statement = client.prepare("SELECT $1::text").await.unwrap();
                assert_eq!(client.query_one(&statement, &[&nonce]).await.unwrap().get::<_, String>(0), nonce);
            }
        });
        Self { done, over, task }
    }

    /// Returns when it has done some more, from now on.
    async fn goes_on(&self) {
        let before = self.done.load(SeqCst);
        in_time("another tenant works", async {
            while self.done.load(SeqCst) < before + 5 {
                assert!(!self.task.is_finished(), "another tenant's session has ended");
                tokio::time::sleep(Duration::from_millis(2)).await; // A counter wakes nobody.
            }
        })
        .await;
    }

    async fn ends(self) {
        self.over.store(true, SeqCst);
        self.task.await.expect("another tenant's client has had no error");
    }
}

/// A client whose kernel takes as little as may be for it.
async fn wire_that_takes_little(proxy: &Proxy, user: &str, password: &str, database: &str) -> Wire {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address: std::net::SocketAddr = ([127, 0, 0, 1], proxy.port()).into();
    socket.connect(&SockAddr::from(address)).unwrap();
    socket.set_nonblocking(true).unwrap();
    let stream = TcpStream::from_std(socket.into()).unwrap();
    let mut wire = Wire { stream, parameters: HashMap::new(), key: None };
    wire.send_bytes(&startup_message(PROTOCOL_3_0, &[("user", user), ("database", database)])).await;
    wire.authenticate(password).await.unwrap();
    wire
}

/// A text of [`LONG`] bytes that hardly gets shorter by compression.
fn noise(seed: usize) -> String {
    const LETTERS: &[u8; 64] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    let mut state = seed as u64 + 0x9e37_79b9_7f4a_7c15;
    let mut letter = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(LETTERS[(state >> 32) as usize % LETTERS.len()])
    };
    (0..LONG).map(|_| letter()).collect()
}

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

/// The error among some answers, if it says that too much would be kept; any other fails the test.
fn refused(answers: &[Message]) -> bool {
    let error = answers.iter().find(|answer| answer.tag == b'E');
    error.inspect(|error| assert!(TOO_MUCH.contains(&error.sqlstate().as_str()), "{error:?}")).is_some()
}

async fn send(wire: &mut Wire, messages: &[Vec<u8>]) -> Vec<Message> {
    wire.send_bytes(&messages.concat()).await;
    wire.until_ready().await
}

async fn works(wire: &mut Wire) {
    assert_eq!(tags(&wire.query("SELECT 1").await), "TDCZ", "the session goes on");
}

/// 200 SETs of 900 kB came to 515 MiB: names were counted, not bytes.
async fn sets_long_values(proxy: &Proxy) {
    let mut wire = proxy.wire("acme").await;
    let long = "x".repeat(LONG);
    for at in 0..12 {
        assert!(refused(&wire.query(&format!("SET my.a{at} = '{long}'")).await));
        assert!(refused(&send(&mut wire, &[parse("", &format!("SET my.a{at} = '{long}'")), sync()]).await));
        works(&mut wire).await;
    }
    // Small ones add up as well, and what a server has already stays there, with its client.
    for at in 0..20 {
        wire.query(&format!("SET my.b{at} = '{}'", "y".repeat(40_000))).await;
        let set = "SELECT length(set_config($1, $2, false))";
        let name = format!("my.c{at}");
        let sets = [parse("", set), bind("", "", &[Some(&name), Some(&long)]), execute("", 0), sync()];
        assert_eq!(rows(&send(&mut wire, &sets).await), [[Some(LONG.to_string())]]);
    }
    let sum = "SELECT length(current_setting('my.c3')) + length(current_setting('my.c19'))";
    assert_eq!(rows(&wire.query(sum).await), [[Some((2 * LONG).to_string())]], "nothing is lost");
    wire.query("DISCARD ALL").await;
    works(&mut wire).await;
}

/// Ten sessions with 15 statements of a megabyte came to 285 MiB, which were kept when they had left.
async fn prepares_long_statements(proxy: &Proxy) {
    let mut wires = Vec::new();
    let mut refusals = 0;
    for session in 0..6 {
        let mut wire = proxy.wire("acme").await;
        for at in 0..8 {
            let text = format!("SELECT /* {} */ 1", noise(8 * session + at));
            let answers = match at % 2 {
                0 => send(&mut wire, &[parse(&format!("s{at}"), &text), sync()]).await,
                _ => wire.query(&format!("PREPARE s{at} AS {text}")).await,
            };
            refusals += usize::from(refused(&answers));
        }
        works(&mut wire).await;
        wires.push(wire);
    }
    assert!(refusals > 24, "{refusals}");
    // And many long names of no text at all: 63 bytes of each are kept.
    let name = "n".repeat(8000);
    let mut wire = proxy.wire("acme").await;
    for at in 0..2000 {
        let answers = send(&mut wire, &[parse(&format!("{at}{name}"), ""), sync()]).await;
        assert_eq!(tags(&answers), "1Z", "{at}");
    }
}

/// Unnamed statements follow their client as well, and the beginnings of long messages wait for their ends.
async fn leaves_texts_lying_about(proxy: &Proxy) {
    let mut wires = Vec::new();
    let mut refusals = 0;
    for _ in 0..24 {
        let mut wire = proxy.wire("acme").await;
        let text = format!("SELECT /* {} */ 1", "x".repeat(LONG));
        refusals += usize::from(refused(&send(&mut wire, &[parse("", &text), sync()]).await));
        works(&mut wire).await;
        // The next one comes with half of another.
        let half = query(&text);
        let (half, rest) = half.split_at(half.len() - 10);
        wire.send_bytes(&[&query("SELECT 1")[..], half].concat()).await;
        wire.until_ready().await;
        wires.push((wire, rest.to_vec()));
    }
    assert!(refusals > 2, "{refusals}");
    for (wire, rest) in &mut wires {
        wire.send_bytes(rest).await;
        refused(&wire.until_ready().await);
        works(wire).await;
    }
}

/// What has been asked and not been answered is remembered, one by one.
async fn pipelines_without_reading(proxy: &Proxy) {
    const SYNCS: usize = 400_000;
    let holder = proxy.client("acme").connect().await;
    holder.run("SELECT pg_advisory_lock(7)").await;
    let wire = proxy.wire("acme").await;
    let (mut reads, mut writes) = wire.stream.into_split();
    let writer = tokio::spawn(async move {
        let sent = [query("SELECT pg_advisory_xact_lock(7)"), sync().repeat(SYNCS)].concat();
        writes.write_all(&sent).await.unwrap();
        writes
    });
    let waits = "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    in_time("the query waits", async { while proxy.client("acme").ask(waits).await != "t" {} }).await;
    holder.run("SELECT pg_advisory_unlock(7)").await;
    let mut answers = 0;
    let mut bytes = [0; 64 * 1024];
    let replies = in_time("all are answered", async {
        // The query's row, and ReadyForQuery for it and for each Sync.
        while answers < (SYNCS + 1) * 6 {
            match tokio::io::AsyncReadExt::read(&mut reads, &mut bytes).await.unwrap() {
                0 => break,
                read => answers += read,
            }
        }
        answers
    });
    assert!(replies.await >= (SYNCS + 1) * 6);
    writer.await.unwrap();
}

/// A hundred listeners that read nothing came to 143 MiB.
async fn listens_without_reading(proxy: &Proxy, neighbour: &Neighbour) {
    let mut wires = Vec::new();
    for _ in 0..12 {
        let mut wire = wire_that_takes_little(proxy, &login_of("acme"), &password_of("acme"), "acme").await;
        wire.query("LISTEN noise").await;
        wires.push(wire);
    }
    let shouts = proxy.client("acme").connect().await;
    for at in 0..15 {
        let sql = format!(
            "SELECT pg_notify('noise', {at} || ' ' || i || repeat('x', 7900)) FROM generate_series(1, 40) AS i"
        );
        shouts.run(&sql).await;
        neighbour.goes_on().await;
    }
    let mut ended = 0;
    for mut wire in wires {
        // Those who were ended have been told why, behind what they were sent before.
        wire.send_bytes(&query("UNLISTEN *")).await;
        let last = in_time("an end or an answer", async {
            loop {
                match wire.receive_or_end().await {
                    Some(message) if matches!(message.tag, b'E' | b'Z') => break Some(message),
                    Some(_) => {}
                    None => break None,
                }
            }
        });
        match last.await {
            Some(message) if message.tag == b'E' => ended += usize::from(refused(&[message])),
            Some(_) => {}
            None => ended += 1,
        }
    }
    assert!(ended > 0, "somebody was ended");
}

/// What is answered without a server was answered whether anybody read the answers or not.
async fn asks_for_what_no_server_answers(proxy: &Proxy, neighbour: &Neighbour) {
    const ASKED: usize = 100_000;
    let wire = wire_that_takes_little(proxy, "roamer", "secret", "acme").await;
    let (mut reads, mut writes) = wire.stream.into_split();
    let writer = tokio::spawn(async move {
        writes.write_all(&query("SHOW pglobby.tenant").repeat(ASKED)).await.unwrap();
        writes
    });
    neighbour.goes_on().await;
    let (mut seen, mut bytes) = (0, [0; 64 * 1024]);
    in_time("all are answered", async {
        while seen < ASKED * 60 {
            match tokio::io::AsyncReadExt::read(&mut reads, &mut bytes).await.unwrap() {
                0 => panic!("ended after {seen} bytes"),
                read => seen += read,
            }
        }
    })
    .await;
    writer.await.unwrap();
}

/// A tenant's functions are read; what they say is the tenant's to choose.
async fn has_functions_of_many_words(proxy: &Proxy) {
    let behind = proxy.behind("acme").await;
    behind
        .run(
            "DO $do$ BEGIN EXECUTE format('CREATE FUNCTION wordy() RETURNS void LANGUAGE plpgsql AS %L', \
             'BEGIN PERFORM pg_advisory_xact_lock(1); END --' || \
             (SELECT string_agg('w' || i, ' ') FROM generate_series(1, 800000) AS i)); END $do$",
        )
        .await;
    let mut wire = proxy.wire("acme").await;
    for _ in 0..3 {
        wire.query("CREATE OR REPLACE FUNCTION other() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
        works(&mut wire).await;
    }
}

#[tokio::test]
async fn a_hostile_tenant_takes_no_memory_without_limit() {
    let proxy = attacked().await;
    proxy.create_login("roamer", "secret", &["--service", "--all-tenants"]);
    let neighbour = Neighbour::of(&proxy).await;
    neighbour.goes_on().await;
    works(&mut proxy.wire("acme").await).await;
    let before = memory_of(&proxy, "VmRSS");
    let stays_small = async |attack: &str| {
        neighbour.goes_on().await;
        let most = memory_of(&proxy, "VmHWM");
        assert!(most < before + GROWTH, "{attack}: from {before} to {most} bytes");
    };
    sets_long_values(&proxy).await;
    stays_small("settings").await;
    prepares_long_statements(&proxy).await;
    stays_small("prepared statements").await;
    leaves_texts_lying_about(&proxy).await;
    stays_small("texts").await;
    pipelines_without_reading(&proxy).await;
    stays_small("pipelines").await;
    listens_without_reading(&proxy, &neighbour).await;
    stays_small("notifications").await;
    asks_for_what_no_server_answers(&proxy, &neighbour).await;
    stays_small("answers of our own").await;
    has_functions_of_many_words(&proxy).await;
    stays_small("functions").await;
    neighbour.ends().await;

    in_time("what attackers had is given up", async {
        while proxy.metric("pglobby_memory_kept_bytes").await > 0.0 {
            tokio::time::sleep(Duration::from_millis(20)).await; // A metric wakes nobody.
        }
    })
    .await;
    assert_eq!(proxy.metric("pglobby_prepared_bytes").await, 0.0);
    in_time("what attackers had is given back to the system", async {
        while memory_of(&proxy, "VmRSS") > before + LEFT {
            tokio::time::sleep(Duration::from_millis(100)).await; // The allocator tells nobody.
        }
    })
    .await;
}

/// Sessions that keep 9 kB of startup parameters each came to 25 kB each, uncounted: a few thousand of one tenant filled a control
/// group, and the process was killed.
#[tokio::test]
async fn startup_parameters_count_for_as_long_as_their_session_lasts() {
    let proxy = Proxy::with_tenant("acme").config("max_tenant_memory", "\"1MB\"").start().await;
    proxy.create_login("roamer", "secret", &["--service", "--all-tenants"]);
    let options = format!("-c my.x={}", "x".repeat(9000));
    let login = async |user: &str, password: &str, database: &str, options: &str| {
        let mut wire = Wire::open(proxy.port()).await;
        let parameters = [("user", user), ("database", database), ("options", options)];
        wire.startup(PROTOCOL_3_0, &parameters).await;
        wire.authenticate(password).await.map(|_| wire)
    };
    let (user, password) = (login_of("acme"), password_of("acme"));
    for (user, password, database) in [(&*user, &*password, "acme"), ("roamer", "secret", "roamer")] {
        let mut sessions = Vec::new();
        let refusal = loop {
            match login(user, password, database, &options).await {
                Ok(session) => sessions.push(session),
                Err(refusal) => break refusal,
            }
            assert!(sessions.len() < 100, "{user}: nothing counts");
        };
        assert_eq!(
            (refusal.sqlstate().as_str(), sessions.len() > 40),
            ("53200", true),
            "{user}: {refusal:?}"
        );
        login(user, password, database, "-c my.x=short").await.expect("little is refused to nobody");
        drop(sessions);
        in_time("what sessions had is given up", async {
            while login(user, password, database, &options).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await; // A counter wakes nobody.
            }
        })
        .await;
    }
}
