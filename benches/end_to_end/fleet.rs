//! Many connections of one process: logins, clients that idle, tenants by the thousand.

use std::{io, time::Instant};

use futures_util::future::{join_all, try_join_all};

use crate::{
    Plan,
    accounting::{Window, clients_max, resident_kib},
    client::{Client, tls_config},
    sample::{Metric, Outcome, of_requests},
    stand::{Pooler, Stand, Target, numbered},
    streams::in_words,
};

/// Who asks or logs in at the same time.
const AT_A_TIME: usize = 16;
/// Logins at the same time where only the clients that result matter.
const LOGINS_AT_A_TIME: usize = 64;

#[derive(Debug, Clone, Copy)]
pub enum Fleet {
    Logins,
    Idle { tls: bool },
    Tenants(usize),
}

impl Fleet {
    pub async fn run(self, stand: &mut Stand, pooler: Pooler, plan: &Plan) -> Outcome {
        match self {
            Self::Logins => logins(&stand.target(pooler), plan).await.map_err(in_words)?,
            Self::Tenants(count) => {
                let count = if plan.quick { count.min(20) } else { count };
                stand.need_tenants(count).await;
                tenants(&stand.target(pooler), count, plan).await.map_err(in_words)?
            }
            Self::Idle { tls } => {
                if pooler == Pooler::Direct {
                    return Err("no pooler".to_owned());
                }
                stand.restart().await;
                idle(stand, pooler, tls, plan).await.map_err(in_words)
            }
        }
    }
}

async fn logins(target: &Target, plan: &Plan) -> io::Result<Outcome> {
    let log_in = || async {
        let mut client = Client::connect(target, None).await?;
        client.query("SELECT 1").await?;
        client.leave().await
    };
    try_join_all((0..AT_A_TIME).map(|_| log_in())).await?; // Servers are open, the key is derived.
    let window = Window::open(target.pid);
    let results = try_join_all((0..AT_A_TIME).map(|_| async {
        let mut latencies = Vec::new();
        while window.begun.elapsed() < plan.window {
            let start = Instant::now();
            log_in().await?;
            latencies.push(start.elapsed().as_secs_f64() * 1e6);
        }
        io::Result::Ok(latencies)
    }))
    .await?;
    Ok(of_requests(results.concat(), window.close()))
}

/// Each tenant has a connection; each of [`AT_A_TIME`] goes round its share of them.
async fn tenants(target: &Target, count: usize, plan: &Plan) -> io::Result<Outcome> {
    let mut shares: Vec<Vec<Client>> = (0..AT_A_TIME).map(|_| Vec::new()).collect();
    for number in 0..count.max(AT_A_TIME) {
        let mut client = Client::connect(&target.at(&numbered(number % count)), None).await?;
        client.query("SELECT 1").await?;
        shares[number % AT_A_TIME].push(client);
    }
    let window = Window::open(target.pid);
    let results = join_all(shares.iter_mut().map(|share| async {
        let mut latencies = Vec::new();
        for at in (0..share.len()).cycle() {
            if window.begun.elapsed() > plan.window {
                break;
            }
            let start = Instant::now();
            share[at].query("SELECT 1").await?;
            latencies.push(start.elapsed().as_secs_f64() * 1e6);
        }
        io::Result::Ok(latencies)
    }))
    .await;
    let measured = window.close();
    let latencies = results.into_iter().collect::<io::Result<Vec<_>>>()?.concat();
    let outcome = of_requests(latencies, measured);
    for client in shares.into_iter().flatten() {
        client.leave().await?;
    }
    Ok(outcome)
}

async fn idle(stand: &Stand, pooler: Pooler, tls: bool, plan: &Plan) -> io::Result<super::sample::Sample> {
    let target = stand.target(pooler);
    let pid = target.pid.ok_or(io::ErrorKind::NotFound)?;
    let count = if plan.quick { 500 } else { 10_000 }.min(clients_max());
    let tls = tls.then(|| tls_config(stand.authority.pem()));
    // What the first clients bring about once is no idle client's.
    let first = connect_many(&target, tls.as_ref(), LOGINS_AT_A_TIME).await?;
    let before = resident_kib(pid);
    let clients = connect_many(&target, tls.as_ref(), count).await?;
    let memory = (resident_kib(pid) - before) / count as f64;
    drop((first, clients));
    Ok(vec![(Metric::Memory, memory)])
}

async fn connect_many(
    target: &Target,
    tls: Option<&std::sync::Arc<rustls::ClientConfig>>,
    count: usize,
) -> io::Result<Vec<Client>> {
    let mut clients = Vec::new();
    while clients.len() < count {
        let some = LOGINS_AT_A_TIME.min(count - clients.len());
        let connecting = (0..some).map(|_| async {
            let mut client = Client::connect(target, tls).await?;
            client.query("SELECT 1").await?;
            io::Result::Ok(client)
        });
        clients.extend(try_join_all(connecting).await?);
    }
    Ok(clients)
}

/// Memory that stays when a tenant was used once and its pool is gone.
pub async fn used_tenants(stand: &mut Stand, pooler: Pooler, plan: &Plan) -> Outcome {
    if pooler == Pooler::Direct {
        return Err("no pooler".to_owned());
    }
    let count = if plan.quick { 20 } else { 1000 };
    stand.need_tenants(count).await;
    stand.restart().await;
    let target = stand.target(pooler);
    let pid = target.pid.ok_or("no pooler")?;
    let first = count / 20;
    use_once(stand, &target, 0..first).await.map_err(in_words)?;
    let before = resident_kib(pid);
    use_once(stand, &target, first..count).await.map_err(in_words)?;
    Ok(vec![(Metric::Memory, (resident_kib(pid) - before) / (count - first) as f64)])
}

async fn use_once(stand: &Stand, target: &Target, numbers: std::ops::Range<usize>) -> io::Result<()> {
    for number in numbers {
        let mut client = Client::connect(&target.at(&numbered(number)), None).await?;
        client.query("SELECT 1").await?;
        client.leave().await?;
    }
    stand.servers_are_gone().await;
    // A pool goes a second after its last server, and nothing outside tells when.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    Ok(())
}
