//! Many clients at once that have not logged in: they wait for their turn, and keep nobody else out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use support::{
    Proxy, Wire,
    client::in_time,
    proxy::{login_of, password_of},
    wire::PROTOCOL_3_0,
};
use tokio::task::JoinSet;

const CROWD: usize = 2000;
const ELSEWHERE: [u8; 4] = [127, 0, 0, 2];

async fn log_in(mut wire: Wire) -> Result<Wire, String> {
    wire.startup(PROTOCOL_3_0, &[("user", &login_of("acme")), ("database", "acme")]).await;
    match wire.authenticate(&password_of("acme")).await {
        Ok(_) => Ok(wire),
        Err(refusal) => Err(refusal.sqlstate()),
    }
}

/// Waits until so many are connected and have not logged in.
async fn logging_in(proxy: &Proxy, count: f64) {
    let counted = async {
        while proxy.metric("pglobby_clients_logging_in").await != count {
            tokio::task::yield_now().await;
        }
    };
    in_time("clients that log in", counted).await;
}

/// An application restarts behind a NAT: 1,800 of its 2,000 connections were refused, though there was CPU for all of them.
/// Those here dawdle besides, each for as long as it may keep its turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_from_one_address_waits_for_its_turn_and_one_from_elsewhere_does_not_wait_behind_it() {
    let proxy = Proxy::with_tenant("acme")
        .config("client_login_timeout", "\"1min\"")
        .config("max_logins_at_a_time", "32")
        .start()
        .await;
    let port = proxy.port();
    let asked = Arc::new(AtomicUsize::new(0));
    let mut crowd = JoinSet::new();
    for _ in 0..CROWD {
        let asked = asked.clone();
        crowd.spawn(async move {
            let mut wire = Wire::open(port).await;
            wire.startup(PROTOCOL_3_0, &[("user", &login_of("acme")), ("database", "acme")]).await;
            let word = wire.receive().await;
            assert_eq!(
                (char::from(word.tag), word.authentication_code()),
                ('R', Some(10)),
                "{}",
                word.sqlstate()
            );
            asked.fetch_add(1, SeqCst);
            (wire, word)
        });
    }
    in_time("the crowd", async {
        while asked.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut alone = log_in(Wire::open_from(ELSEWHERE, port).await).await.unwrap();
    let before = asked.load(SeqCst);
    assert!(before < CROWD, "it waited behind the whole crowd");
    assert_eq!(alone.query("SELECT 1").await.len(), 4);

    let mut here = Vec::new();
    while let Some(wire) = in_time("the crowd", crowd.join_next()).await {
        here.push(wire.unwrap());
    }
    assert_eq!(here.len(), CROWD);
    // And whoever of them goes on is let in.
    for (mut wire, word) in here.split_off(CROWD - 5) {
        assert_eq!(wire.authenticate_as_asked(word, &password_of("acme")).await.map(drop), Ok(()));
    }
}

#[tokio::test]
async fn half_open_connections_keep_no_other_address_out_and_take_no_place_of_a_session() {
    let proxy = Proxy::with_tenant("acme")
        .config("max_unauthenticated_conn", "20")
        .config("max_client_conn", "5")
        .config("client_login_timeout", "\"1min\"")
        .start()
        .await;
    logging_in(&proxy, 0.0).await; // whoever looked whether it has started
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(Wire::open(proxy.port()).await);
    }
    logging_in(&proxy, 20.0).await;
    // Who has most of them gets no more.
    let more = Wire::open(proxy.port()).await.until_end().await;
    assert_eq!(more.last().expect("a word").sqlstate(), "53300");
    // Others get in at the first try, in the place of the one that has been silent for longest.
    let mut sessions = Vec::new();
    for _ in 0..5 {
        sessions.push(log_in(Wire::open_from(ELSEWHERE, proxy.port()).await).await.unwrap());
    }
    let gone = silent.remove(0).until_end().await;
    assert_eq!(gone.last().expect("a word").sqlstate(), "53300");
    // Sessions have a limit of their own.
    let sixth = log_in(Wire::open_from(ELSEWHERE, proxy.port()).await).await.map(drop);
    assert_eq!(sixth, Err("53300".to_owned()));
    logging_in(&proxy, 19.0).await;
    for session in &mut sessions {
        session.query("SELECT 1").await;
    }
}
