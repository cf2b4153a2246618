//! Clients that keep a tenant's servers busy and dirty: whoever borrows one after them must notice nothing.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::task::JoinSet;

use super::support::{Proxy, proxy::Caller};

/// More than the pool has servers.
const CLIENTS: u64 = 4;

/// What is left in a session, each in transactions of its own. What pins is undone after a while, so that others get
/// a server; the rest stays. `#` becomes a number of the client's own.
const DIRT: [&[&str]; 16] = [
    &["SET work_mem = '1#MB'; SET search_path = stirred, pg_catalog"],
    &["SET DateStyle = 'German, DMY'", "SET TimeZone = 'Asia/Katmandu'", "SET IntervalStyle = 'iso_8601'"],
    &["SET client_min_messages = error; SET extra_float_digits = -3; SET bytea_output = 'escape'"],
    &[
        "SET default_transaction_isolation = 'serializable'",
        "SET default_transaction_read_only = on",
        "RESET ALL",
    ],
    &["SET ROLE stirring_role", "SELECT current_user", "RESET ROLE"],
    &["SET ROLE stirring_role; SET stirred.note = 'client #'"],
    &["SET enable_hashjoin = off; SET enable_seqscan = off; SET enable_indexscan = off; SET geqo = off"],
    &[
        "SET statement_timeout = '100s'; SET standard_conforming_strings = off; SET plpgsql.extra_warnings = 'all'",
    ],
    &[
        "BEGIN",
        "SET LOCAL work_mem = '2#MB'",
        "SAVEPOINT a",
        "SELECT 1/0",
        "ROLLBACK TO a",
        "SELECT 1",
        "COMMIT",
    ],
    &["BEGIN", "SELECT nonsense", "COMMIT"],
    &["CREATE TEMP TABLE onek AS SELECT 1 AS stirred", "SELECT * FROM onek", "DROP TABLE pg_temp.onek"],
    &["CREATE TEMP TABLE tenk1 (stirred int) ON COMMIT DROP", "SELECT 1"],
    &["PREPARE q1 AS SELECT 'of client #'", "EXECUTE q1", "DEALLOCATE q1"],
    &["DECLARE foo CURSOR WITH HOLD FOR VALUES (1), (2)", "FETCH foo", "CLOSE foo"],
    &["SELECT random(), set_config('application_name', 'client #', false)"],
    &["DISCARD ALL"],
];

/// At work until it is stopped.
pub struct Stirring {
    stopped: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

pub async fn start(proxy: &Proxy, tenant: &str) -> Stirring {
    let owner = proxy.client(tenant).ask("SELECT current_user").await;
    proxy
        .behind(tenant)
        .await
        .run(&format!("CREATE ROLE stirring_role; GRANT stirring_role TO \"{owner}\""))
        .await;
    let stopped = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        clients.spawn(stir(proxy.client(tenant), number, stopped.clone()));
    }
    Stirring { stopped, clients }
}

impl Stirring {
    pub async fn stop(self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.clients.join_all().await;
    }
}

async fn stir(caller: Caller, number: u64, stopped: Arc<AtomicBool>) {
    let mut random = StdRng::seed_from_u64(number);
    let mut client = caller.connect().await;
    while !stopped.load(Ordering::Relaxed) {
        for sql in *DIRT.choose(&mut random).unwrap() {
            let _ = client.try_run(&sql.replace('#', &number.to_string())).await; // some fail on purpose
        }
        if random.random_bool(0.05) {
            client = caller.connect().await;
        }
        // A machine with two cores has something else to do as well.
        tokio::time::sleep(std::time::Duration::from_millis(random.random_range(0..5))).await;
    }
}
