//! Wrong passwords: each is answered later than the one before, whoever is right gets in, and an operator can see it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use futures_util::future::join_all;
use support::{
    Proxy, Wire,
    client::in_time,
    proxy::{login_of, password_of},
    wire::PROTOCOL_3_0,
};

const ELSEWHERE: [u8; 4] = [127, 0, 0, 2];
const LOCAL: [u8; 4] = [127, 0, 0, 1];

async fn braked() -> Proxy {
    Proxy::with_tenant("acme")
        .and_tenant("globex")
        .config("failed_logins_free", "3")
        .config("failed_login_delay_max", "\"1s\"")
        .start()
        .await
}

/// The SQLSTATE that a login is answered with; empty where it is let in.
async fn answer(address: [u8; 4], port: u16, user: &str, password: &str) -> String {
    let mut wire = Wire::open_from(address, port).await;
    wire.startup(PROTOCOL_3_0, &[("user", user), ("database", "acme")]).await;
    wire.authenticate(password).await.err().map(|refusal| refusal.sqlstate()).unwrap_or_default()
}

/// Hundreds a second were judged. Now an address is told of few, whether there is such a login or not.
#[tokio::test]
async fn an_address_that_guesses_is_told_of_few_guesses_and_learns_no_name() {
    let proxy = braked().await;
    let (known, port) = (login_of("acme"), proxy.port());
    // The right password is among them: when its turn comes is chance, and it is not told either.
    for (address, user) in [([127, 0, 0, 3], known.as_str()), ([127, 0, 0, 4], "nobody")] {
        let guesses = (0..60)
            .map(|number| async move { answer(address, port, user, &format!("guess {number}")).await });
        let mut told = BTreeMap::new();
        for answer in join_all(guesses).await {
            *told.entry(answer).or_insert(0) += 1;
        }
        let (wrong, unsaid) = (told.remove("28P01").unwrap_or(0), told.remove("53300").unwrap_or(0));
        assert!(told.is_empty() && wrong + unsaid == 60, "{told:?}");
        assert!((3..=20).contains(&wrong), "{user}: {wrong} of 60 guesses were told");
        assert_eq!(
            answer(address, port, &known, &password_of("acme")).await,
            if unsaid > 0 { "" } else { "?" }
        );
    }
    assert!(proxy.metric("pglobby_logins_delayed_total{reason=\"failures\"}").await >= 80.0);
    assert!(proxy.metric("pglobby_logins_refused_total{reason=\"too_many_failures\"}").await >= 80.0);
    // What fail2ban reads; docs/security.md has the filter.
    let lines = proxy
        .log()
        .lines()
        .filter(|line| line.contains("login failed address=127.0.0.3 login=\"acme_user\""))
        .count();
    assert!((3..=20).contains(&lines), "{lines} lines\n{}", proxy.log());
    assert!(proxy.log().contains("WARN"));
}

/// A name with a line break and an address of its own in it writes no line for somebody else.
#[tokio::test]
async fn a_name_that_looks_like_a_line_of_the_log_accuses_nobody() {
    let proxy = braked().await;
    let name = "x\" reason=\"\nWARN login failed address=10.9.8.7 user=";
    assert_eq!(answer(LOCAL, proxy.port(), name, "wrong").await, "28P01");
    let log = proxy.log();
    let accused: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once(": login failed address="))
        .map(|(_, rest)| rest.split(' ').next().unwrap())
        .collect();
    assert_eq!(accused, ["127.0.0.1"]);
    assert!(!log.lines().any(|line| line.starts_with("WARN login failed")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_right_password_gets_in_while_others_guess() {
    let proxy = braked().await;
    let (known, port) = (login_of("acme"), proxy.port());
    assert_eq!(answer(LOCAL, port, &known, &password_of("acme")).await, "");
    let (over, guessed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let guessers: Vec<_> = (0..10)
        .map(|_| {
            let (over, guessed, known) = (over.clone(), guessed.clone(), known.clone());
            tokio::spawn(async move {
                while !over.load(SeqCst) {
                    assert_ne!(answer(LOCAL, port, &known, "wrong").await, "");
                    guessed.fetch_add(1, SeqCst);
                }
            })
        })
        .collect();
    in_time("some guesses", async {
        while guessed.load(SeqCst) < 20 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for _ in 0..3 {
        // From where it has succeeded, also for the first time since; from elsewhere; and somebody else from here.
        assert_eq!(answer(LOCAL, port, &known, &password_of("acme")).await, "");
        assert_eq!(answer(ELSEWHERE, port, &known, &password_of("acme")).await, "");
        proxy.client("globex").connect().await.leave().await;
    }
    over.store(true, SeqCst);
    for guesser in guessers {
        in_time("a guesser's end", guesser).await.unwrap();
    }
}
