//! A storm: clients of several tenants work without pause while one fault follows another. Whoever is hit gets an error that
//! says so and goes on when it is over; nobody else notices; nobody ever sees what is another's; nothing is half done; and
//! when the storm is over, nothing is left of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use rustix::process::Signal;
use support::{
    Client, Cluster, Forwarder, Proxy,
    client::in_time,
    console::show,
    forwarder::Fault,
    proxy::{Caller, login_of, password_of},
};
use tokio::task::JoinHandle;
use tokio_postgres::{Error, Statement};

/// Tenants on the host that nothing happens to, and on the one that everything happens to.
const CALM: [&str; 2] = ["calm", "mild"];
const STORMY: [&str; 2] = ["gale", "gust"];
const CLIENTS: usize = 5;

/// What may be told to a client whose server, host or session was lost.
const LOSSES: [&str; 9] = ["57P01", "57P02", "57P03", "57P05", "08001", "08006", "08007", "57014", "28P01"];

/// What a client knows of a transaction that writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Committed,
    Undone,
    /// The answer to COMMIT was lost.
    Unknown,
}

/// How far everybody is. One for each tenant.
#[derive(Default)]
struct Board {
    over: AtomicBool,
    done: [AtomicUsize; CLIENTS],
    errors: AtomicUsize,
    fates: Mutex<HashMap<(usize, usize), Fate>>,
}

impl Board {
    /// Returns when every client has done some more.
    async fn goes_on(&self, what: &str) {
        let before: Vec<usize> = self.done.iter().map(|done| done.load(SeqCst)).collect();
        in_time(what, async {
            while self.done.iter().zip(&before).any(|(done, before)| done.load(SeqCst) < before + 4) {
                tokio::time::sleep(Duration::from_millis(2)).await; // A counter wakes nobody.
            }
        })
        .await;
    }

    fn errors(&self) -> usize {
        self.errors.load(SeqCst)
    }
}

/// A connection with what it has made for itself: all of it must follow.
struct Session {
    client: Client,
    select: Statement,
    insert: Statement,
}

impl Session {
    async fn open(caller: &Caller, nonce: usize) -> Result<Self, Error> {
        let client = caller.try_connect().await?;
        client.try_run(&format!("SET my.nonce = '{nonce}'")).await?;
        let prepare = async {
            let select = client.prepare("SELECT current_setting('my.nonce') || '/' || $1::text").await?;
            let insert = client.prepare("INSERT INTO ledger VALUES ($1, $2, $3)").await?;
            Ok((select, insert))
        };
        let (select, insert) = in_time("preparing", prepare).await?;
        Ok(Self { client, select, insert })
    }

    /// One transaction of one of four kinds. The fate is that of one that writes.
    async fn transaction(&self, nonce: usize, number: usize) -> Result<Option<Fate>, (Error, Option<Fate>)> {
        let lost = |error| (error, None);
        match number % 4 {
            0 => {
                let sql = format!("SELECT current_setting('my.nonce') || '/{number}'");
                let rows = in_time(&sql, self.client.query(&sql, &[])).await.map_err(lost)?;
                assert_eq!(rows[0].get::<_, String>(0), format!("{nonce}/{number}"));
            }
            1 => {
                let parameter = number.to_string();
                let query = async { self.client.query_one(&self.select, &[&parameter]).await };
                let row = in_time("a prepared statement", query).await.map_err(lost)?;
                assert_eq!(row.get::<_, String>(0), format!("{nonce}/{number}"));
            }
            2 => {
                let error = self.client.try_run("BEGIN; SET LOCAL my.nonce = 'another'; SELECT 1/0").await;
                let error = error.expect_err("a division by zero");
                if error.code().is_none_or(|code| code.code() != "22012") {
                    return Err(lost(error));
                }
                self.client.try_run("ROLLBACK").await.map_err(lost)?;
            }
            _ => {
                let undone = |error| (error, Some(Fate::Undone));
                let (nonce, number) = (i32::try_from(nonce).unwrap(), i32::try_from(number).unwrap());
                self.client.try_run("BEGIN").await.map_err(undone)?;
                for half in ["a", "b"] {
                    let insert = async { self.client.execute(&self.insert, &[&nonce, &number, &half]).await };
                    in_time("an insert", insert).await.map_err(undone)?;
                }
                let committed = self.client.try_run("COMMIT").await;
                committed.map_err(|error| (error, Some(Fate::Unknown)))?;
                return Ok(Some(Fate::Committed));
            }
        }
        Ok(None)
    }
}

/// A client at work, until the storm is over; it connects again whenever it has lost its session.
async fn work(caller: Caller, index: usize, nonce: usize, board: Arc<Board>) {
    let mut session = None;
    let mut number = 0;
    while !board.over.load(SeqCst) {
        number += 1;
        let outcome = match &session {
            None => Session::open(&caller, nonce).await.map(|opened| session = Some(opened)),
            Some(open) => {
                let (outcome, fate) = match open.transaction(nonce, number).await {
                    Ok(fate) => (Ok(()), fate),
                    Err((error, fate)) => (Err(error), fate),
                };
                if let Some(fate) = fate {
                    board.fates.lock().unwrap().insert((nonce, number), fate);
                }
                outcome
            }
        };
        match outcome {
            Ok(()) => drop(board.done[index].fetch_add(1, SeqCst)),
            Err(error) => {
                let code = error.code().map(|code| code.code().to_owned());
                assert!(
                    code.as_ref().is_none_or(|code| LOSSES.contains(&code.as_str())),
                    "{}",
                    support::client::in_words(&error)
                );
                board.errors.fetch_add(1, SeqCst);
                session = None;
            }
        }
    }
    if let Some(session) = session {
        session.client.leave().await;
    }
}

/// The proxy, the two hosts, and everybody at work.
struct Storm {
    proxy: Proxy,
    host: Cluster,
    forwarder: Forwarder,
    boards: HashMap<&'static str, Arc<Board>>,
    workers: Vec<JoinHandle<()>>,
}

impl Storm {
    async fn begin() -> Self {
        let hba = "local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";
        let hba = format!("host all onboarder 127.0.0.1/32 trust\n{hba}");
        let host = Cluster::build().hba(&hba).setting("synchronous_commit", "on").start();
        host.client("postgres").await.run("CREATE ROLE onboarder LOGIN CREATEDB CREATEROLE").await;
        let forwarder = Forwarder::to(host.port()).await;
        // On a machine that others use as well, a connect may take long: nobody must be told that it failed.
        let proxy = Proxy::with_tenant(CALM[0])
            .and_tenant(CALM[1])
            .pool_size(2)
            .config("server_connect_timeout", "\"20s\"")
            .config("central_timeout", "\"20s\"")
            .config("query_wait_timeout", "\"25s\"")
            .start()
            .await;
        let (name, port) = ("stormy", forwarder.port.to_string());
        proxy.command(&[
            "host",
            "add",
            name,
            "--address",
            "127.0.0.1",
            "--port",
            &port,
            "--admin-user",
            "onboarder",
        ]);
        for tenant in STORMY {
            proxy.command(&["tenant", "create", tenant, "--host", name]);
            proxy.create_login(&login_of(tenant), &password_of(tenant), &["--tenant", tenant]);
        }
        for tenant in CALM.iter().chain(&STORMY) {
            let sql = "CREATE TABLE ledger (nonce int, number int, half text)";
            proxy.client(tenant).run(sql).then_leave().await;
        }
        Self { proxy, host, forwarder, boards: HashMap::new(), workers: Vec::new() }
    }

    /// The clients of every tenant begin to work, with empty ledgers.
    async fn start_work(&mut self) {
        for (tenant, first) in CALM.iter().chain(&STORMY).zip((0..).step_by(100)) {
            let caller = self.proxy.client(tenant);
            caller.run("TRUNCATE ledger").then_leave().await;
            let board: Arc<Board> = Arc::default();
            self.boards.insert(tenant, board.clone());
            for index in 0..CLIENTS {
                self.workers.push(tokio::spawn(work(caller.clone(), index, first + index, board.clone())));
            }
        }
        self.all_go_on("the start").await;
    }

    async fn all_go_on(&self, what: &str) {
        // A worker that panicked has said why; its board would stand still.
        assert!(!self.workers.iter().any(JoinHandle::is_finished), "a client gave up: {what}");
        for tenant in CALM.iter().chain(&STORMY) {
            self.boards[tenant].goes_on(&format!("{tenant} after {what}")).await;
        }
        for tenant in CALM {
            assert_eq!(self.boards[tenant].errors(), 0, "{tenant} noticed {what}");
        }
    }

    async fn calm_goes_on(&self, what: &str) {
        for tenant in CALM {
            self.boards[tenant].goes_on(&format!("{tenant} during {what}")).await;
        }
    }

    fn stormy_errors(&self) -> usize {
        STORMY.iter().map(|tenant| self.boards[tenant].errors()).sum()
    }

    /// Everybody leaves; then what each of them knows is compared with what is in the tables.
    async fn end_work(&mut self) {
        for board in self.boards.values() {
            board.over.store(true, SeqCst);
        }
        for worker in self.workers.drain(..) {
            in_time("a client's end", worker).await.expect("a client that saw nothing wrong");
        }
        for (tenant, board) in &self.boards {
            let client = self.proxy.client(tenant).connect().await;
            let rows = client.query("SELECT nonce, number, count(*) FROM ledger GROUP BY 1, 2", &[]);
            let halves: HashMap<(usize, usize), i64> = rows
                .await
                .unwrap()
                .iter()
                .map(|row| {
                    let number = |at| usize::try_from(row.get::<_, i32>(at)).unwrap();
                    ((number(0), number(1)), row.get(2))
                })
                .collect();
            let fates = board.fates.lock().unwrap().clone();
            assert!(fates.values().any(|fate| *fate == Fate::Committed), "{tenant} did nothing");
            for (of, fate) in fates {
                let expected: &[i64] = match fate {
                    Fate::Committed => &[2],
                    Fate::Undone => &[0],
                    Fate::Unknown => &[0, 2],
                };
                let found = halves.get(&of).copied().unwrap_or(0);
                assert!(expected.contains(&found), "{tenant} {of:?}: {fate:?}, and {found} halves are there");
            }
            client.leave().await;
        }
    }

    /// Waits until all sessions have ended and no server is in use.
    async fn is_calm(&self) {
        let console = self.proxy.console().await;
        in_time("an empty house", async {
            loop {
                let pools = show(&console, "POOLS").await;
                let busy = ["cl_active", "cl_waiting", "sv_active", "sv_active_cancel", "sv_login"];
                let sum =
                    |column| pools.iter().map(|pool| pool[column].parse::<usize>().unwrap()).sum::<usize>();
                if busy.into_iter().map(sum).sum::<usize>() <= 1 {
                    break; // The console is a client as well.
                }
            }
        })
        .await;
        assert!(show(&console, "PINS").await.is_empty());
        console.leave().await;
        for tenant in CALM.iter().chain(&STORMY) {
            let desyncs = format!("pglobby_desyncs_total{{tenant=\"{tenant}\"}}");
            assert_eq!(self.proxy.metric(&desyncs).await, 0.0, "{tenant}");
        }
        assert!(!self.proxy.log().contains("panicked"), "{}", self.proxy.log());
    }
}

/// Resident memory of a process, in KiB.
fn resident_kb(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Open descriptors of a process.
fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// One round of all faults; with `PGLOBBY_SOAK_SECONDS` (`scripts/soak`) as many rounds as begin within that time, each in
/// an order of its own. What a round has left in memory and descriptors must not add up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_only_those_it_concerns_notice_and_nothing_is_left_of_it() {
    let seconds = std::env::var("PGLOBBY_SOAK_SECONDS").map_or(0, |seconds| seconds.parse().unwrap());
    let (began, soak) = (std::time::Instant::now(), Duration::from_secs(seconds));
    let mut storm = Storm::begin().await;
    let pid = storm.proxy.pid();
    let mut first = None;
    for round in 0u64.. {
        storm.start_work().await;
        let before = resident_kb(pid);
        let mut order = [0, 1, 2, 3, 4, 5];
        order.shuffle(&mut StdRng::seed_from_u64(round));
        for fault in order {
            match fault {
                0 => servers_end(&storm).await,
                1 => networks_fail(&storm).await,
                2 => hosts_fail(&mut storm).await,
                3 => clients_vanish(&storm).await,
                4 => operators_work(&storm).await,
                _ => the_proxy_is_stopped_for_a_while(&storm).await,
            }
        }
        let grown = resident_kb(pid).saturating_sub(before);
        assert!(grown < 64 * 1024, "round {round}: grown by {grown} KiB");
        storm.end_work().await;
        storm.is_calm().await;
        let (memory, files) = (resident_kb(pid), descriptors(pid));
        println!(
            "round {round} after {:?}: {memory} KiB, {files} descriptors, order {order:?}",
            began.elapsed()
        );
        let (memory_first, files_first) = *first.get_or_insert((memory, files));
        assert!(
            memory < memory_first + 24 * 1024,
            "round {round}: {memory} KiB, {memory_first} after the first"
        );
        assert!(
            files < files_first + 16,
            "round {round}: {files} descriptors, {files_first} after the first"
        );
        if began.elapsed() >= soak {
            break;
        }
    }
}

/// Every server of the stormy host is ended, again and again.
async fn servers_end(storm: &Storm) {
    let superuser = storm.host.client("postgres").await;
    for _ in 0..3 {
        superuser
            .run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IN ('gale', 'gust')")
            .await;
        storm.all_go_on("servers that were ended").await;
    }
}

/// A stall that passes is a delay and no error; a network that breaks connections is.
async fn networks_fail(storm: &Storm) {
    let errors = storm.stormy_errors();
    storm.forwarder.set(Fault::Stall);
    storm.calm_goes_on("a stall").await;
    storm.forwarder.set(Fault::None);
    storm.all_go_on("a stall").await;
    assert_eq!(storm.stormy_errors(), errors, "a stall was more than a delay");
    for bytes in [0, 3, 30, 200] {
        storm.forwarder.set(Fault::CutAfter(bytes));
        storm.calm_goes_on("a network that cuts").await;
        storm.forwarder.set(Fault::None);
        storm.all_go_on("a network that cut").await;
    }
}

/// The stormy host restarts, and crashes.
async fn hosts_fail(storm: &mut Storm) {
    tokio::task::block_in_place(|| storm.host.stop());
    storm.calm_goes_on("a host that is down").await;
    tokio::task::block_in_place(|| storm.host.start_again());
    storm.all_go_on("a host that was down").await;
    tokio::task::block_in_place(|| {
        storm.host.kill_9();
        storm.host.start_again();
    });
    storm.all_go_on("a host that crashed").await;
}

/// Clients of every tenant vanish in the middle of whatever they do.
async fn clients_vanish(storm: &Storm) {
    for round in 0..3 {
        for tenant in CALM.iter().chain(&STORMY) {
            let caller = storm.proxy.client(tenant);
            for sql in [
                "BEGIN; INSERT INTO ledger VALUES (-1, 1, 'lost')",
                "SET my.nonce = 'stranger'; SET search_path = nowhere; CREATE TEMP TABLE ledger (x int)",
                "SELECT pg_advisory_lock(1); LISTEN storm; DECLARE c CURSOR WITH HOLD FOR SELECT 1",
            ] {
                caller.run(sql).then_vanish().await;
            }
            let running = caller.connect().await;
            let mut query = Box::pin(running.batch_execute("BEGIN; SELECT pg_sleep(600)"));
            assert!(futures_util::poll!(&mut query).is_pending());
            tokio::task::yield_now().await;
            drop(query);
            running.vanish().await;
        }
        storm.all_go_on(&format!("clients that vanished, {round}")).await;
    }
}

/// Reloads, changed pools, new passwords, a suspension, and a central database that loses its connections.
async fn operators_work(storm: &Storm) {
    let errors = storm.stormy_errors();
    for _ in 0..20 {
        storm.proxy.signal(Signal::HUP);
    }
    let central = storm.proxy.cluster.client("central").await;
    for size in [1, 3, 2] {
        central.run(&format!("UPDATE pglobby.tenants SET pool_size = {size}")).await;
        central.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'central' AND pid <> pg_backend_pid()").await;
        storm.all_go_on("a change of all pools and a loss of all notifications").await;
    }
    assert_eq!(storm.stormy_errors(), errors, "operators' work was noticed");
    let command = |arguments: &[&str]| drop(tokio::task::block_in_place(|| storm.proxy.command(arguments)));
    command(&["tenant", "rotate", "gale"]);
    storm.all_go_on("new passwords").await;
    command(&["tenant", "suspend", "gust", "--reason", "for a moment"]);
    storm.calm_goes_on("a suspended tenant").await;
    command(&["tenant", "resume", "gust"]);
    storm.all_go_on("a tenant that was suspended").await;
}

/// SIGSTOP and SIGCONT: no timers that all fire at once.
async fn the_proxy_is_stopped_for_a_while(storm: &Storm) {
    let errors = storm.stormy_errors();
    storm.proxy.signal(Signal::STOP);
    tokio::time::sleep(Duration::from_secs(1)).await; // How long the fault lasts; nothing waits for it.
    storm.proxy.signal(Signal::CONT);
    storm.all_go_on("a proxy that was stopped").await;
    assert_eq!(storm.stormy_errors(), errors, "the stop was noticed");
}
