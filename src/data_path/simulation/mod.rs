//! A simulation of the session core: clients, pool, servers, waits, cancels, settings and prepared statements in
//! one process, with a virtual clock and random faults. Test only.
//!
//! Each client compares what it gets with a session of its own, the oracle: every reply reaches the client that
//! asked, once, in order; nothing of a session is seen by another; a cancel ends the query that it is meant for.
//! In the end no session is left, none waits, and each open server is idle and clean.
//!
//! A seed decides everything but the order of hash tables. `scripts/simulate` runs many seeds, and a violation
//! names its seed: `scripts/simulate 1 SEED` repeats it.

mod backend;
mod client;
mod expressions;
mod frames;
mod host;
mod proxy_queries;
mod requests;
mod statements;
mod world;

use std::{
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{Instant, sleep, timeout_at};

use self::{
    client::{Client, End},
    world::{Plan, World},
};
use crate::{config::PoolMode, data_path::lock::locked};

/// Seeds that the tests run.
const SEEDS: u64 = 1000;

/// More than all clients of a seed need, one after another.
const WHOLE_TIME: Duration = Duration::from_secs(4 * 3600);

/// After so many violations, no more seeds are run.
const VIOLATIONS_SHOWN: usize = 5;

#[test]
fn every_client_gets_what_a_server_of_its_own_would_send() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let count = number("PGLOBBY_SIMULATE_SEEDS").unwrap_or(SEEDS);
    let first = number("PGLOBBY_SIMULATE_FIRST").unwrap_or(1);
    if std::env::var_os("PGLOBBY_SIMULATE_TRACE").is_some() {
        let levels = tracing_subscriber::EnvFilter::new("pglobby=debug");
        tracing_subscriber::fmt().with_env_filter(levels).with_writer(std::io::stderr).init();
    }
    let (next, violations) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let run_some = || {
        while locked(&violations).len() < VIOLATIONS_SHOWN {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                break;
            }
            if let Err(violation) = run(seed) {
                locked(&violations).push(format!("seed {seed}: {violation}"));
            }
        }
    };
    thread::scope(|threads| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            threads.spawn(run_some);
        }
    });
    let violations = locked(&violations);
    assert!(violations.is_empty(), "{}\nrepeat one with: scripts/simulate 1 SEED", violations.join("\n\n"));
}

/// Two pools wait for the budget of their host, which sessions of one of them and of a third use up, and only one may connect at a time.
/// They gave each other their turns to connect, without end: the worker did nothing else, and the clock of the
/// simulation, which goes on only when all wait, stood still.
#[test]
fn pools_that_wait_for_a_hosts_budget_do_not_keep_the_worker_busy() {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || done.send(run_one(share_a_spent_budget())));
    let outcome = is_done.recv_timeout(Duration::from_secs(20));
    assert_eq!(outcome.map_err(|_| "the worker is busy without end"), Ok(Ok(())));
}

/// Tenants with pools of two servers, and no faults.
fn calm(tenants: usize) -> Plan {
    Plan {
        connecting_max: 4,
        prepared_max: 200,
        one_fault_in: 0,
        pipe_bytes: 65_536,
        connect_time: Duration::from_secs(1),
        budget: None,
        pools: vec![(2, PoolMode::Transaction); tenants],
    }
}

fn text(end: End) -> String {
    format!("{end:?}")
}

async fn share_a_spent_budget() -> Result<(), String> {
    let plan = Plan { connecting_max: 1, budget: Some(2), ..calm(3) };
    let world = Arc::new(World::new(1, plan)?);
    // At first the budget is spent on a session of the first tenant, and on the third tenant's first server, which
    // is being opened when a session of the first and one of the second tenant ask for theirs.
    let work = |number, [before, during]: [u64; 2]| {
        let world = world.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(before)).await;
            let mut client = Client::connect(world, number, number as u64).await?;
            client.request("BEGIN").await?;
            sleep(Duration::from_secs(during)).await;
            client.request("COMMIT").await
        })
    };
    let works = [work(0, [0, 20]), work(2, [2000, 20]), work(1, [2200, 1]), work(3, [2200, 1])];
    for client in works {
        client.await.map_err(|error| error.to_string())?.map_err(text)?;
    }
    world.settle().await
}

/// A session that was idle kept its pool, and that one its successor, and so on: every change of a tenant cost memory for as
/// long as one of its clients did nothing.
#[test]
fn an_idle_session_keeps_its_own_pool_only() {
    assert_eq!(run_one(stay_idle_while_pools_change()), Ok(()));
}

async fn stay_idle_while_pools_change() -> Result<(), String> {
    let world = Arc::new(World::new(1, calm(1))?);
    let mut client = Client::connect(world.clone(), 0, 0).await.map_err(text)?;
    client.request("SELECT 1").await.map_err(text)?;
    for _ in 0..20 {
        world.change_tenant(0).await;
        world.proxy.pools.maintain().await;
        sleep(Duration::from_secs(1)).await;
    }
    let kept = world.proxy.pools.kept();
    if kept > 1 {
        return Err(format!("{kept} replaced pools are kept"));
    }
    client.request("SELECT 1").await.map_err(text)?;
    drop(client);
    world.settle().await
}

/// A shared listener that had ended was told the next pool and kept it, and the pool kept the listener: a tenant that was
/// suspended, or not used for a while, left its pool with all of its statements in memory.
#[test]
fn a_pool_whose_listener_has_ended_is_freed_when_it_is_closed() {
    assert_eq!(run_one(close_a_pool_that_had_a_listener()), Ok(()));
}

async fn close_a_pool_that_had_a_listener() -> Result<(), String> {
    let world = Arc::new(World::new(1, calm(1))?);
    let mut client = Client::connect(world.clone(), 0, 0).await.map_err(text)?;
    client.request("LISTEN news").await.map_err(text)?;
    drop(client);
    world.settle().await?;
    for _ in 0..3 {
        world.change_tenant(0).await;
    }
    let replaced = world.proxy.pools.all().iter().any(|pool| pool.tenant.generation > 1);
    world.suspend_tenant(0).await;
    world.settle().await?;
    world.proxy.pools.maintain().await;
    match world.proxy.pools.kept() {
        _ if !replaced => Err("the pool was not replaced".to_owned()),
        0 => Ok(()),
        kept => Err(format!("{kept} closed pools are kept")),
    }
}

/// Two sessions on different workers found room for a last server at the same time, and the pool opened both.
#[test]
fn a_pool_has_no_more_servers_than_its_size() {
    assert_eq!(run_one(take_all_places_of_a_pool()), Ok(()));
}

async fn take_all_places_of_a_pool() -> Result<(), String> {
    let world = Arc::new(World::new(1, calm(1))?);
    let mut client = Client::connect(world.clone(), 0, 0).await.map_err(text)?;
    client.request("SELECT 1").await.map_err(text)?;
    let (pools, budgets) = (world.proxy.pools.all(), world.proxy.pools.budgets());
    let (pool, budget) = (&pools[0], &budgets[0].1);
    let room = pool.rules.size - pool.live();
    let more: Vec<_> = (0..=room).filter_map(|_| budget.acquire(pool)).collect();
    if (more.len(), pool.live(), budget.live()) != (room, pool.rules.size, pool.rules.size) {
        return Err(format!(
            "{} places for {room}, {} and {} servers",
            more.len(),
            pool.live(),
            budget.live()
        ));
    }
    drop(more);
    drop(client);
    world.settle().await
}

/// Each pool cost a task and a visit once a second, also when nobody used it.
#[test]
fn a_pool_that_is_not_used_is_visited_only_when_a_server_is_due() {
    assert_eq!(run_one(leave_a_pool_alone()), Ok(()));
}

async fn leave_a_pool_alone() -> Result<(), String> {
    let world = Arc::new(World::new(1, calm(1))?);
    let pools = world.proxy.pools.clone();
    let maintain_for = async |seconds| {
        let mut visits = 0;
        for _ in 0..seconds {
            pools.maintain().await;
            sleep(Duration::from_secs(1)).await;
            visits += pools.visited();
        }
        visits
    };
    let mut client = Client::connect(world.clone(), 0, 0).await.map_err(text)?;
    client.request("BEGIN").await.map_err(text)?;
    let in_use = maintain_for(20).await;
    client.request("COMMIT").await.map_err(text)?;
    drop(client);
    world.settle().await?;
    maintain_for(2).await;
    let unused = maintain_for(60).await;
    // Twice its server is asked whether it is still there, and is missing meanwhile.
    if in_use != 20 || unused > 4 {
        return Err(format!("{in_use} visits while it was used, {unused} without rest when it was not"));
    }
    // A new session finds the server, and both end when they are due.
    let mut client = Client::connect(world.clone(), 0, 0).await.map_err(text)?;
    client.request("SELECT 1").await.map_err(text)?;
    drop(client);
    world.settle().await?;
    maintain_for(650).await;
    match (pools.all().len(), world.host.leftovers().len()) {
        (0, 0) => Ok(()),
        left => Err(format!("pools and servers that are left: {left:?}")),
    }
}

fn run(seed: u64) -> Result<(), String> {
    run_one(simulate(seed))
}

fn run_one(simulation: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(simulation)
}

async fn simulate(seed: u64) -> Result<(), String> {
    let mut random = StdRng::seed_from_u64(seed);
    let world = Arc::new(World::new(seed, Plan::of(&mut random))?);
    let maintained = world.proxy.clone();
    tokio::spawn(async move {
        loop {
            sleep(Duration::from_secs(5)).await;
            maintained.pools.maintain().await;
        }
    });
    if random.random_ratio(1, 3) {
        let (world, mut random) = (world.clone(), StdRng::seed_from_u64(random.random()));
        tokio::spawn(async move {
            for _ in 0..random.random_range(1..5) {
                sleep(Duration::from_millis(random.random_range(10..1000))).await;
                world.change_tenant(random.random_range(0..3)).await;
            }
        });
    }
    if random.random_ratio(1, 3) {
        let (world, mut random) = (world.clone(), StdRng::seed_from_u64(random.random()));
        tokio::spawn(async move {
            for _ in 0..random.random_range(1..12) {
                sleep(Duration::from_millis(random.random_range(5..300))).await;
                world.place_tenant(random.random_range(0..3));
            }
        });
    }
    let mut clients = Vec::new();
    for number in 0..random.random_range(2..8) {
        let (world, seed) = (world.clone(), random.random());
        let delay = Duration::from_millis(random.random_range(0..300));
        clients.push(tokio::spawn(async move {
            sleep(delay).await;
            Client::connect(world, number, seed).await?.work().await
        }));
    }
    let last = Instant::now() + WHOLE_TIME;
    for (number, client) in clients.into_iter().enumerate() {
        let Ok(ended) = timeout_at(last, client).await else {
            return Err(format!("client {number} is not done after four hours: {}", world.state()));
        };
        match ended {
            Ok(Ok(()) | Err(End::Fault)) => {}
            Ok(Err(End::Violation(what))) => return Err(what),
            Err(error) => return Err(format!("a client failed: {error}")),
        }
    }
    world.settle().await
}
