//! Worker threads: tenants with much work do not share one while another is free, and a tenant that fills one uses
//! several. No session notices that it goes to another thread.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use futures_util::future::join_all;
use support::{
    Client, Proxy,
    client::in_time,
    console::{Row, show},
};
use tokio::task::JoinHandle;
use tokio_postgres::types::ToSql;

const CLIENTS: usize = 8;
/// Queries that a client sends without waiting for replies: the proxy has more to do than the test.
const PIPELINED: usize = 40;

/// Clients of a tenant that work without pause, and check each answer.
struct Load {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<usize>>,
}

impl Load {
    async fn begin(proxy: &Proxy, tenant: &str) -> Self {
        let over = Arc::<AtomicBool>::default();
        let mut clients = Vec::new();
        for number in 0..CLIENTS {
            let client = proxy.client(tenant).connect().await;
            clients.push(tokio::spawn(work(client, format!("{tenant} {number}"), over.clone())));
        }
        Self { over, clients }
    }

    /// Ends it. Returns how many batches were answered.
    async fn end(self) -> usize {
        self.over.store(true, SeqCst);
        join_all(self.clients).await.into_iter().map(Result::unwrap).sum()
    }
}

async fn work(client: Client, name: String, over: Arc<AtomicBool>) -> usize {
    client.run(&format!("SET application_name = '{name}'")).await;
    let own = client.prepare("SELECT current_setting('application_name') || $1::text").await.unwrap();
    let mut batches = 0;
    while !over.load(SeqCst) {
        let suffix = batches.to_string();
        let parameters: [&(dyn ToSql + Sync); 1] = [&suffix];
        let answers = (0..PIPELINED).map(|_| client.query_one(&own, &parameters));
        for row in join_all(answers).await {
            assert_eq!(row.unwrap().get::<_, String>(0), format!("{name}{suffix}"));
        }
        batches += 1;
    }
    batches
}

/// The workers of each tenant's pool.
async fn workers(console: &Client) -> HashMap<String, String> {
    let of = |mut row: Row| (row.remove("database").unwrap(), row.remove("workers").unwrap());
    show(console, "POOLS").await.into_iter().map(of).collect()
}

/// Two tenants with much work had one thread, by their numbers, and the other one had none, as long as the process ran.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_with_much_work_do_not_share_a_worker() {
    let builder = Proxy::with_tenant("amber").and_tenant("birch").and_tenant("cedar");
    let proxy = builder.config("worker_threads", "2").start().await;
    let console = proxy.console().await;
    for tenant in ["amber", "birch", "cedar"] {
        proxy.client(tenant).connect().await.leave().await;
    }
    // Three pools on two workers: two of them share one.
    let placed = workers(&console).await;
    let pairs = [["amber", "birch"], ["birch", "cedar"], ["cedar", "amber"]];
    let shares = pairs.into_iter().find(|[one, other]| placed[*one] == placed[*other]);
    let [one, other] = shares.unwrap_or_else(|| panic!("{placed:?}"));
    let loads = [Load::begin(&proxy, one).await, Load::begin(&proxy, other).await];
    in_time("a worker each", async {
        loop {
            let placed = workers(&console).await;
            if placed[one] != placed[other] {
                break;
            }
        }
    })
    .await;
    assert!(proxy.metric("pglobby_pool_moves_total{reason=\"load\"}").await >= 1.0);
    in_time("two busy workers", async {
        while !show(&console, "WORKERS")
            .await
            .iter()
            .all(|worker| worker["busy_percent"].parse::<u32>().unwrap() > 10 && worker["clients"] != "0")
        {
        }
    })
    .await;
    for load in loads {
        assert!(load.end().await > 0);
    }
}

/// Sessions of every kind go on while their pool gets a second worker, and when it loses it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_that_fills_a_worker_uses_two_until_one_is_enough() {
    let proxy = Proxy::with_tenant("amber").config("worker_threads", "2").pool_size(6).start().await;
    let console = proxy.console().await;
    // More sessions than workers, so that some of each kind change their worker.
    let mut listening = Vec::new();
    let mut pinned = Vec::new();
    let mut open = Vec::new();
    for number in 0..2 {
        let client = proxy.client("amber").connect().await;
        client.run("LISTEN news").await;
        listening.push(client);
        let client = proxy.client("amber").connect().await;
        client.run(&format!("CREATE TEMP TABLE mine AS SELECT {number} AS number")).await;
        pinned.push(client);
    }
    let transaction = proxy.client("amber").connect().await;
    transaction.run("CREATE TABLE written (number int); BEGIN; INSERT INTO written VALUES (1)").await;
    open.push(transaction);
    let load = Load::begin(&proxy, "amber").await;
    let spread = || async { workers(&console).await["amber"].contains(',') };
    in_time("two workers", async { while !spread().await {} }).await;
    for (number, client) in pinned.iter().enumerate() {
        assert_eq!(client.ask("SELECT number FROM mine").await, number.to_string());
    }
    open[0].run("INSERT INTO written VALUES (2); COMMIT").await;
    assert_eq!(open[0].ask("SELECT count(*) FROM written").await, "2");
    // The statement that a cancel ends runs on any worker.
    let sleeper = proxy.client("amber").connect().await;
    let cancel = sleeper.cancel_token();
    let asleep = sleeper.refusal_of("SELECT pg_sleep(60)");
    let cancelled = async {
        in_time("the sleep", async {
            let watcher = proxy.client("amber").connect().await;
            while watcher
                .ask("SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'")
                .await
                == "0"
            {}
        })
        .await;
        cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    };
    assert_eq!(tokio::join!(asleep, cancelled).0, "57014");
    assert!(load.end().await > 0);
    pinned[0].run("NOTIFY news, 'told'").await;
    for client in &mut listening {
        assert_eq!(client.notification().await.payload(), "told");
    }
    in_time("one worker", async { while spread().await {} }).await;
    for (number, client) in pinned.iter().enumerate() {
        assert_eq!(client.ask("SELECT number FROM mine").await, number.to_string());
    }
    pinned[1].run("NOTIFY news, 'again'").await;
    for client in &mut listening {
        assert_eq!(client.notification().await.payload(), "again");
    }
}
