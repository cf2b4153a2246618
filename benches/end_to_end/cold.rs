//! The first query of a tenant that has no server open.

use std::{
    io,
    time::{Duration, Instant},
};

use crate::{
    Plan,
    accounting::Window,
    client::Client,
    sample::{Metric, Outcome, median, quantile},
    stand::{Pooler, Stand, Target, numbered},
    streams::in_words,
};

/// Tenants for each run.
const TENANTS: usize = 15;

/// Somebody's first query comes alone.
const BETWEEN: Duration = Duration::from_millis(50);

pub async fn first_query(
    stand: &mut Stand,
    pooler: Pooler,
    known: bool,
    plan: &Plan,
    round: usize,
) -> Outcome {
    let tenants = if plan.quick { 3 } else { TENANTS };
    // Nobody else has ever asked for these; the two scenarios do not share any either.
    let poolers = stand.poolers();
    let place = poolers.iter().position(|it| *it == pooler).unwrap_or_default();
    let run = (round * poolers.len() + place) * 2 + usize::from(known);
    let numbers = run * tenants..(run + 1) * tenants;
    let runs = plan.rounds.min(3) * poolers.len() * 2;
    stand.need_tenants(runs * tenants).await;
    measure(stand, pooler, known, numbers).await.map_err(in_words)
}

async fn measure(
    stand: &Stand,
    pooler: Pooler,
    known: bool,
    numbers: std::ops::Range<usize>,
) -> io::Result<super::sample::Sample> {
    let (direct, target) = (stand.target(Pooler::Direct), stand.target(pooler));
    for number in numbers.clone() {
        // The first connection to a database ever fills PostgreSQL's own caches.
        connect_and_ask(&direct.at(&numbered(number))).await?;
        if known {
            connect_and_ask(&target.at(&numbered(number))).await?;
        }
    }
    stand.servers_are_gone().await;
    let mut latencies = Vec::new();
    let window = Window::open(target.pid);
    for number in numbers {
        // What is still done behind the reply to the last tenant is not this one's.
        tokio::time::sleep(BETWEEN).await;
        let start = Instant::now();
        connect_and_ask(&target.at(&numbered(number))).await?;
        latencies.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let others = window.close().others_percent;
    latencies.sort_by(f64::total_cmp);
    Ok(vec![
        (Metric::Others, others),
        (Metric::P50, median(latencies.clone())),
        (Metric::P99, quantile(&latencies, 0.99)),
    ])
}

async fn connect_and_ask(target: &Target) -> io::Result<()> {
    let mut client = Client::connect(target, None).await?;
    client.query("SELECT 1").await?;
    client.leave().await
}
