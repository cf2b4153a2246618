//! Nodes share each host's budget: together they never open more servers than it allows, whatever becomes of one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use rustix::process::Signal;
use support::{Client, Forwarder, Node, Proxy, client::in_time, forwarder::Fault, proxy::Caller};
use tokio::task::JoinHandle;

const TENANTS: [&str; 2] = ["amber", "birch"];
const BUDGET: usize = 6;

/// What each node has, in the order in which they were started.
const LEASES: &str =
    "SELECT string_agg(granted::text, ' ' ORDER BY node_id) FROM pglobby.node_leases WHERE host = 'default'";

async fn first_node(keys: &[(&str, &str)]) -> (Proxy, Client) {
    let mut builder = Proxy::with_tenant(TENANTS[0]).and_tenant(TENANTS[1]).pool_size(6);
    for (key, value) in [("query_wait_timeout", "\"15s\""), ("node_name", "\"one\"")].iter().chain(keys) {
        builder = builder.config(key, value);
    }
    let proxy = builder.start().await;
    proxy.command(&["host", "set", "default", &format!("max_connections={BUDGET}")]);
    let central = proxy.cluster.client("central").await;
    (proxy, central)
}

async fn becomes(central: &Client, sql: &str, wanted: &str) {
    in_time(wanted, async { while central.ask(sql).await != wanted {} }).await;
}

async fn servers(central: &Client) -> usize {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname IN ('amber', 'birch')";
    central.ask(sql).await.parse().unwrap()
}

/// Another node, which reaches the central database by a forwarder.
async fn node_by_forwarder(proxy: &Proxy, way: &Forwarder) -> Node {
    let url = format!("{:?}", proxy.cluster.url("central"));
    let port = proxy.cluster.port().to_string();
    assert!(url.contains(&port), "{url}");
    let url = url.replace(&port, &way.port.to_string());
    Node::beside(proxy, &[("node_name", "\"two\""), ("central.url", &url)]).await
}

/// The first node has the whole budget; how many servers another one has left depends on the moment.
async fn has_whole_budget(proxy: &Proxy) {
    let own = r#"pglobby_host_servers{host="default"}"#;
    in_time("the whole budget", async { while proxy.metric(own).await != 6.0 {} }).await;
}

/// Clients of both tenants at one node, which always have a query under way.
struct Load {
    over: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    async fn begin(client: impl Fn(&str) -> Caller) -> Self {
        let (over, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut clients = Vec::new();
        for tenant in TENANTS.iter().cycle().take(8) {
            let (client, over, done) = (client(tenant).connect().await, over.clone(), done.clone());
            clients.push(tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    client.ask("SELECT pg_sleep(0.02)").await;
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Self { over, done, clients }
    }

    /// Waits until more queries are done, all of them without an error.
    async fn goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        in_time("more queries", async {
            while self.done.load(Ordering::Relaxed) < before + 20 {
                assert!(self.clients.iter().all(|client| !client.is_finished()), "a client has failed");
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    async fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.expect("no query failed");
        }
    }

    /// Its node is about to be killed.
    fn abandon(self) {
        self.clients.iter().for_each(JoinHandle::abort);
    }
}

/// Counts the servers all the time.
struct Watch {
    allowed: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Watch {
    async fn begin(proxy: &Proxy) -> Self {
        let central = proxy.cluster.client("central").await;
        let allowed = Arc::new(AtomicUsize::new(BUDGET));
        let most = allowed.clone();
        let task = tokio::spawn(async move {
            loop {
                // What is allowed may change while the servers are counted.
                let before = most.load(Ordering::SeqCst);
                let open = servers(&central).await;
                let allowed = before.max(most.load(Ordering::SeqCst));
                assert!(open <= allowed, "{open} servers, {allowed} are allowed");
            }
        });
        Self { allowed, task }
    }

    /// A node that cannot be reached may have kept so many.
    fn allow_beyond_budget(&self, servers: usize) {
        assert!(!self.task.is_finished(), "too many servers");
        self.allowed.store(BUDGET + servers, Ordering::SeqCst);
    }

    async fn end(self) {
        if self.task.is_finished() {
            self.task.await.unwrap();
        } else {
            self.task.abort();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_share_a_budget_and_one_is_killed_and_comes_back() {
    let (proxy, central) = first_node(&[]).await;
    let one = Load::begin(|tenant| proxy.client(tenant)).await;
    let watch = Watch::begin(&proxy).await;
    becomes(&central, LEASES, "6").await;
    let mut second = Node::beside(&proxy, &[("node_name", "\"two\"")]).await;
    let two = Load::begin(|tenant| second.client(tenant)).await;
    becomes(&central, LEASES, "3 3").await;
    let third = Node::beside(&proxy, &[("node_name", "\"three\"")]).await;
    let three = Load::begin(|tenant| third.client(tenant)).await;
    becomes(&central, LEASES, "2 2 2").await;
    for load in [&one, &two, &three] {
        load.goes_on().await;
    }

    two.abandon();
    second.kill_9();
    becomes(&central, LEASES, "3 3").await;
    proxy.logged("another node is gone").await;
    second.start_again().await;
    let two = Load::begin(|tenant| second.client(tenant)).await;
    becomes(&central, LEASES, "2 2 2").await;

    // Whoever has nothing to do leaves the others what they want, but a floor.
    two.end().await;
    three.end().await;
    becomes(&central, LEASES, "4 1 1").await;
    assert_eq!(proxy.metric(r#"pglobby_host_leased{host="default"}"#).await, 4.0);
    assert!(proxy.metric(r#"pglobby_host_wanted{host="default"}"#).await > 4.0);

    // A clean end leaves nothing behind.
    second.stop_with(Signal::TERM).await;
    becomes(&central, LEASES, "5 1").await;
    one.end().await;
    watch.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_stopped_closes_what_others_have_got_meanwhile() {
    let (proxy, central) = first_node(&[]).await;
    let second = Node::beside(&proxy, &[("node_name", "\"two\"")]).await;
    let one = Load::begin(|tenant| proxy.client(tenant)).await;
    let two = Load::begin(|tenant| second.client(tenant)).await;
    let watch = Watch::begin(&proxy).await;
    becomes(&central, LEASES, "3 3").await;

    watch.allow_beyond_budget(3);
    second.signal(Signal::STOP);
    becomes(&central, LEASES, "6").await;
    has_whole_budget(&proxy).await;
    one.goes_on().await;

    second.signal(Signal::CONT);
    becomes(&central, LEASES, "3 3").await;
    watch.allow_beyond_budget(0);
    two.goes_on().await;
    one.goes_on().await;
    one.end().await;
    two.end().await;
    watch.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_from_the_central_database_serves_on_with_what_it_has() {
    let (proxy, central) = first_node(&[]).await;
    let way = Forwarder::to(proxy.cluster.port()).await;
    let second = node_by_forwarder(&proxy, &way).await;
    let one = Load::begin(|tenant| proxy.client(tenant)).await;
    let two = Load::begin(|tenant| second.client(tenant)).await;
    let watch = Watch::begin(&proxy).await;
    becomes(&central, LEASES, "3 3").await;

    watch.allow_beyond_budget(3);
    way.set(Fault::CutAfter(0));
    second.logged("leases have run out").await;
    becomes(&central, LEASES, "6").await;
    has_whole_budget(&proxy).await;
    two.goes_on().await;
    one.goes_on().await;

    way.set(Fault::None);
    second.logged("leases are renewed again").await;
    becomes(&central, LEASES, "3 3").await;
    watch.allow_beyond_budget(0);
    two.goes_on().await;
    one.end().await;
    two.end().await;
    watch.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_alone_has_the_whole_budget_however_long_the_central_database_is_away() {
    let (proxy, central) = first_node(&[]).await;
    becomes(&central, "SELECT count(*) FROM pglobby.nodes", "1").await;
    let way = Forwarder::to(proxy.cluster.port()).await;
    let mut proxy = proxy;
    proxy.stop_with(Signal::TERM).await;
    let only = node_by_forwarder(&proxy, &way).await;
    let client = only.client(TENANTS[0]).connect().await;
    assert_eq!(client.ask("SELECT 'served'").await, "served");
    becomes(&central, LEASES, "6").await;
    let waiting: Vec<_> = futures_util::future::join_all(
        (0..BUDGET - 1).map(|_| async { only.client(TENANTS[1]).connect().await }),
    )
    .await;
    way.set(Fault::CutAfter(0));
    only.logged("leases are kept").await;
    client.run("BEGIN; SELECT 1").await;
    for other in &waiting {
        other.run("BEGIN; SELECT 1").await;
    }
    assert_eq!(servers(&central).await, BUDGET);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_limit_takes_effect_on_all_nodes() {
    let (proxy, central) = first_node(&[]).await;
    let second = Node::beside(&proxy, &[("node_name", "\"two\"")]).await;
    let one = Load::begin(|tenant| proxy.client(tenant)).await;
    let two = Load::begin(|tenant| second.client(tenant)).await;
    becomes(&central, LEASES, "3 3").await;
    proxy.command(&["host", "set", "default", "max_connections=2"]);
    becomes(&central, LEASES, "1 1").await;
    in_time("two servers", async { while servers(&central).await != 2 {} }).await;
    proxy.command(&["host", "set", "default", "max_connections=8"]);
    becomes(&central, LEASES, "4 4").await;
    in_time("eight servers", async { while servers(&central).await != 8 {} }).await;
    one.end().await;
    two.end().await;
}

/// A central database that was not upgraded yet.
#[tokio::test]
async fn without_the_tables_a_node_uses_the_whole_budget() {
    let (proxy, central) = first_node(&[]).await;
    central.run("DROP TABLE pglobby.node_answers, pglobby.node_requests, pglobby.node_leases, pglobby.host_leases, pglobby.nodes").await;
    let second = Node::beside(&proxy, &[("node_name", "\"two\"")]).await;
    let client = second.client(TENANTS[0]).connect().await;
    assert_eq!(client.ask("SELECT current_database()").await, "amber");
}
