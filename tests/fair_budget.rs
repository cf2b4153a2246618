//! Tenants share a host's budget: who wants more gets its part of what others do not use, whatever they do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use support::{Client, Proxy, client::in_time};
use tokio::task::JoinHandle;

const HEAVY: [&str; 3] = ["amber", "birch", "cedar"];

/// Clients of one tenant that always have a query under way.
struct Load {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<u32>>,
}

impl Load {
    async fn begin(proxy: &Proxy, tenant: &str, clients: usize) -> Self {
        let over = Arc::new(AtomicBool::default());
        let mut working = Vec::new();
        for _ in 0..clients {
            let (client, over) = (proxy.client(tenant).connect().await, over.clone());
            working.push(tokio::spawn(async move {
                let mut done = 0;
                while !over.load(Ordering::Relaxed) {
                    client.ask("SELECT pg_sleep(0.02)").await;
                    done += 1;
                }
                done
            }));
        }
        Self { over, clients: working }
    }

    /// The number of queries of each client.
    async fn end(self) -> Vec<u32> {
        self.over.store(true, Ordering::Relaxed);
        let done = futures_util::future::join_all(self.clients).await;
        done.into_iter().map(|queries| queries.expect("no query failed")).collect()
    }
}

async fn with_budget(tenants: &[&str], pool_size: u32, budget: usize) -> (Proxy, Client) {
    let mut builder = Proxy::with_tenant(tenants[0]);
    for tenant in &tenants[1..] {
        builder = builder.and_tenant(tenant);
    }
    let proxy = builder.pool_size(pool_size).config("query_wait_timeout", "\"5s\"").start().await;
    set_budget(&proxy, budget);
    let central = proxy.cluster.client("central").await;
    (proxy, central)
}

/// A tenant whose clients have not connected yet is looked up with it.
fn set_budget(proxy: &Proxy, budget: usize) {
    proxy.command(&["host", "set", "default", &format!("max_connections={budget}")]);
}

/// The servers of each tenant, at one moment.
async fn servers(central: &Client, tenants: &[&str]) -> Vec<usize> {
    let counts = tenants.iter().map(|tenant| format!("count(*) FILTER (WHERE datname = '{tenant}')"));
    let sql = format!("SELECT {} FROM pg_stat_activity", counts.collect::<Vec<_>>().join(", "));
    let row = central.ask_all(&sql).await.swap_remove(0);
    row.into_iter().map(|count| count.unwrap().parse().unwrap()).collect()
}

/// Two of eight queries of a tenant failed after the whole wait, and with three such neighbours its login was refused: a
/// server went to another tenant only when no client of its own waited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quiet_tenant_is_served_beside_tenants_that_want_all_there_is() {
    let (proxy, central) = with_budget(&[&HEAVY[..], &["quiet"]].concat(), 6, 6).await;
    let mut loads = Vec::new();
    for tenant in HEAVY {
        loads.push(Load::begin(&proxy, tenant, 12).await);
    }
    for _ in 0..8 {
        let client = proxy.client("quiet").connect().await;
        assert_eq!(client.ask("SELECT 'served'").await, "served");
        client.leave().await;
    }
    in_time("equal parts", async { while servers(&central, &HEAVY).await != [2, 2, 2] {} }).await;
    for load in loads {
        assert!(load.end().await.iter().all(|queries| *queries > 0));
    }
    // What the others do not use is there for one.
    let load = Load::begin(&proxy, HEAVY[0], 12).await;
    in_time("all for one", async { while servers(&central, &HEAVY).await != [6, 0, 0] {} }).await;
    load.end().await;
}

/// A weight takes effect on pools that are open, without closing what is not another tenant's part.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_that_want_all_have_parts_by_their_weights() {
    let tenants = ["amber", "birch"];
    let (proxy, central) = with_budget(&tenants, 8, 8).await;
    let keeper = proxy.client("amber").connect().await;
    let server = keeper.ask("BEGIN; SELECT pg_backend_pid()").await;
    let mut loads = Vec::new();
    for tenant in tenants {
        loads.push(Load::begin(&proxy, tenant, 12).await);
    }
    in_time("equal parts", async { while servers(&central, &tenants).await != [4, 4] {} }).await;
    for (tenant, weight, parts) in [("amber", 3, [6, 2]), ("birch", 9, [2, 6]), ("birch", 3, [4, 4])] {
        proxy.command(&["tenant", "set", tenant, &format!("weight={weight}")]);
        in_time("parts by weight", async { while servers(&central, &tenants).await != parts {} }).await;
    }
    let pid = keeper.ask("SELECT pg_backend_pid()").await;
    assert_eq!(pid, server);
    keeper.run("COMMIT").await;
    for load in loads {
        assert!(load.end().await.iter().all(|queries| *queries > 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_tenants_than_servers_take_turns() {
    let tenants = ["amber", "birch", "cedar", "dahlia", "elder", "fir"];
    let (proxy, central) = with_budget(&tenants, 3, 2).await;
    let work = tenants.map(|tenant| {
        let proxy = &proxy;
        async move {
            let load = Load::begin(proxy, tenant, 3).await;
            let client = proxy.client(tenant).connect().await;
            for _ in 0..5 {
                assert_eq!(&client.ask("SELECT current_database()").await, tenant);
            }
            load
        }
    });
    let watch = async {
        for _ in 0..100 {
            let open: usize = servers(&central, &tenants).await.iter().sum();
            assert!(open <= 2, "{open} servers");
        }
    };
    let (loads, ()) = tokio::join!(futures_util::future::join_all(work), watch);
    for load in loads {
        load.end().await;
    }
}

/// A session that keeps its server for `lastval` only returns it to another tenant, too.
#[tokio::test]
async fn a_server_that_is_kept_for_a_sequence_goes_to_the_tenant_that_has_none() {
    let (proxy, _central) = with_budget(&["amber", "birch"], 2, 1).await;
    let keeps = proxy.client("amber").connect().await;
    keeps.run("CREATE TABLE orders (id serial); INSERT INTO orders DEFAULT VALUES").await;
    keeps.ask("SELECT lastval()").await;
    let other = proxy.client("birch").connect().await;
    assert_eq!(other.ask("SELECT current_database()").await, "birch");
    assert_eq!(keeps.ask("SELECT count(*) FROM orders").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_smaller_budget_takes_effect_under_load() {
    let (proxy, central) = with_budget(&["amber"], 6, 6).await;
    let load = Load::begin(&proxy, "amber", 12).await;
    in_time("six servers", async { while servers(&central, &["amber"]).await != [6] {} }).await;
    set_budget(&proxy, 2);
    in_time("two servers", async { while servers(&central, &["amber"]).await != [2] {} }).await;
    load.end().await;
}
