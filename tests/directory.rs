//! The directory and the notifications that keep it honest, against a real PostgreSQL that is slow, down and changed
//! behind its back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use pglobby::{
    config::PoolMode,
    control_path::{
        central::{
            Central,
            change_feed::{self, FeedEvent},
        },
        directory::CentralDirectory,
        init::init,
        secrets::{keyring::Keyring, seal::SecretLocation},
    },
    data_path::{
        directory::{Directory as _, DirectoryError},
        host_address::HostAddress,
        tenant::{Access, DirectoryChange, LoginKind},
    },
};
use secrecy::{ExposeSecret, SecretString};
use support::{
    Cluster, Installation,
    client::{PATIENCE, in_time},
    installation::VERIFIER,
};
use tokio::{net::TcpListener, sync::mpsc};

#[tokio::test]
async fn a_tenant_is_read_whole_with_its_credentials_opened() {
    let installation = Installation::initialised().await;
    let id = installation.add_tenant("acme").await;
    let config = installation.config("");
    let keyring = Keyring::load(&config).unwrap();
    let place = SecretLocation { table: "tenants", row: &id.to_string(), column: "sealed_ro_password" };
    let sealed = keyring.seal(&place, &SecretString::from("reader's")).unwrap();
    let client = installation.central().await;
    let update = "UPDATE pglobby.tenants SET ro_username = 'acme_ro', sealed_ro_password = $1, pool_mode = 'session',
        pool_size = 7, statement_timeout = '1 min 500 ms', allow_from = '{10.0.0.0/8, ::1/128}', max_clients = 9, weight = 3";
    client.execute(update, &[&sealed]).await.unwrap();
    client
        .run("UPDATE pglobby.hosts SET max_connections = 50, tls_mode = 'verify-ca', tls_root_ca = '/ca.pem'")
        .await;

    let (directory, _) = installation.directory(&config);
    let tenant = directory.tenant("acme").await.unwrap().unwrap();

    assert_eq!((tenant.id, tenant.name.as_str(), tenant.database.as_str()), (id, "acme", "acme"));
    assert_eq!(tenant.read_write.username, "acme_owner");
    assert_eq!(tenant.read_write.password.expose_secret(), "acme's password");
    let read_only = tenant.read_only.as_ref().unwrap();
    assert_eq!((read_only.username.as_str(), read_only.password.expose_secret()), ("acme_ro", "reader's"));
    assert_eq!(
        (tenant.pool_mode, tenant.pool_size, tenant.max_clients, tenant.weight),
        (Some(PoolMode::Session), Some(7), Some(9), 3)
    );
    assert_eq!(tenant.statement_timeout, Some(Duration::from_millis(60_500)));
    assert_eq!(tenant.allow_from, ["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]);
    let address = HostAddress::of("127.0.0.1", installation.cluster.port());
    assert_eq!((&*tenant.host.addresses, tenant.host.max_connections), (&[address][..], Some(50)));
    assert_eq!(tenant.host.tls_root_ca.as_deref(), Some(Path::new("/ca.pem")));
    assert!(!format!("{tenant:?}").contains("password\""), "{tenant:?}");
}

#[tokio::test]
async fn logins_of_every_kind_are_read_with_their_grants() {
    let installation = Installation::initialised().await;
    let (acme, beta) = (installation.add_tenant("acme").await, installation.add_tenant("beta").await);
    installation.add_login("alice@acme", acme).await;
    let client = installation.central().await;
    let insert = "INSERT INTO pglobby.logins (name, kind, verifier, access, all_tenants, valid_until, disabled_at) VALUES";
    client
        .run(&format!(
            "{insert} ('etl', 'service', '{VERIFIER}', 'read_only', false, '2030-01-02 03:04:05 UTC', NULL),
                ('boss', 'service', '{VERIFIER}', 'read_only', true, 'infinity', NULL),
                ('root', 'admin', '{VERIFIER}', 'read_only', false, '-infinity', now());
             INSERT INTO pglobby.login_tenants SELECT id, {acme}, 'read_write' FROM pglobby.logins WHERE name = 'etl';
             INSERT INTO pglobby.login_tenants SELECT id, {beta}, 'read_only' FROM pglobby.logins WHERE name = 'etl'"
        ))
        .await;
    let (directory, _) = installation.directory(&installation.config(""));
    let login = |name: &'static str| {
        let directory = directory.clone();
        async move { directory.login(name).await.unwrap().unwrap() }
    };

    let alice = login("alice@acme").await;
    let LoginKind::Employee { tenant_id, tenant_name, access } = &alice.kind else { panic!("{alice:?}") };
    assert_eq!((*tenant_id, tenant_name.as_str(), *access), (acme, "acme", Access::ReadWrite));
    assert_eq!((alice.verifier.expose_secret(), alice.valid_until, alice.disabled), (VERIFIER, None, false));

    let etl = login("etl").await;
    let LoginKind::Service { all_tenants: None, granted } = &etl.kind else { panic!("{etl:?}") };
    let granted: Vec<_> = granted.iter().map(|grant| (grant.tenant_id, grant.access)).collect();
    assert_eq!(granted, [(acme, Access::ReadWrite), (beta, Access::ReadOnly)]);
    let until = etl.valid_until.unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(until.as_secs(), 1_893_553_445);

    let boss = login("boss").await;
    assert_eq!(boss.kind, LoginKind::Service { all_tenants: Some(Access::ReadOnly), granted: vec![] });
    assert_eq!(boss.valid_until, None);
    let root = login("root").await;
    assert_eq!((&root.kind, root.disabled), (&LoginKind::Admin { read_only: true }, true));
    assert_eq!(root.valid_until, Some(std::time::UNIX_EPOCH), "long expired");
}

#[tokio::test]
async fn names_of_strangers_find_nothing_and_break_nothing() {
    let installation = Installation::initialised().await;
    let (directory, _) = installation.directory(&installation.config(""));
    let long = "x".repeat(100_000);
    for name in ["", "nobody", "' OR true --", "a\0b", "Ünïcode", "%", long.as_str()] {
        assert!(directory.login(name).await.unwrap().is_none(), "{name}");
        assert!(directory.tenant(name).await.unwrap().is_none(), "{name}");
    }
    assert!(directory.tenant_by_id(-1).await.unwrap().is_none());
}

#[tokio::test]
async fn a_hundred_clients_of_one_name_are_one_look_up() {
    let installation = Installation::initialised().await;
    let acme = installation.add_tenant("acme").await;
    installation.add_login("alice", acme).await;
    let (directory, _) = installation.directory(&installation.config(""));
    let blocker = installation.central().await;
    blocker.run("BEGIN; LOCK TABLE pglobby.logins IN ACCESS EXCLUSIVE MODE").await;

    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let directory = directory.clone();
            tokio::spawn(async move { directory.login("alice").await.unwrap().unwrap() })
        })
        .collect();
    // The one that asks is there once it waits for the lock; by then all the others have had their turn as well.
    let asking = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby' AND wait_event_type = 'Lock'";
    let observer = installation.central().await;
    in_time("a look-up", async { while observer.ask(asking).await == "0" {} }).await;
    assert_eq!(observer.ask(asking).await, "1");
    let connected = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby'";
    assert_eq!(observer.ask(connected).await, "1");
    blocker.run("COMMIT").await;

    let mut logins = Vec::new();
    for task in waiting {
        logins.push(task.await.unwrap());
    }
    assert!(logins.iter().all(|login| Arc::ptr_eq(login, &logins[0])));
}

#[tokio::test]
async fn a_row_whose_seal_does_not_open_takes_nobody_else_down() {
    let installation = Installation::initialised().await;
    let (good, bad) = (installation.add_tenant("good").await, installation.add_tenant("bad").await);
    let client = installation.central().await;
    client
        .run(&format!(
            "UPDATE pglobby.tenants SET sealed_password =
                (SELECT sealed_password FROM pglobby.tenants WHERE id = {good}) WHERE id = {bad}"
        ))
        .await;
    let (directory, _) = installation.directory(&installation.config(""));

    let error = directory.tenant("bad").await.unwrap_err();
    assert!(matches!(&error, DirectoryError::Broken(cause) if cause.contains("does not open")), "{error}");
    assert!(directory.tenant_by_id(bad).await.is_err());
    assert!(directory.tenant("good").await.unwrap().is_some());
}

#[tokio::test]
async fn while_the_central_database_is_down_known_names_work_and_unknown_ones_fail_at_once() {
    let mut installation = Installation::initialised().await;
    let acme = installation.add_tenant("acme").await;
    installation.add_login("alice", acme).await;
    let (directory, _) = installation.directory(&installation.config("directory_fresh = \"1ms\""));
    assert!(directory.login("alice").await.unwrap().is_some());
    assert!(directory.tenant("acme").await.unwrap().is_some());

    installation.cluster.stop();
    directory.forget(&DirectoryChange::Everything);
    for _ in 0..50 {
        let asked = Instant::now();
        assert!(directory.login("alice").await.unwrap().is_some());
        assert!(directory.tenant("acme").await.unwrap().is_some());
        let error = directory.login("stranger").await.unwrap_err();
        assert!(matches!(error, DirectoryError::Unavailable(_)), "{error}");
        assert!(asked.elapsed() < Duration::from_secs(2));
    }
    // What is known to have changed is not used, whatever else there is.
    directory.forget(&DirectoryChange::Tenant(acme));
    assert!(directory.tenant("acme").await.is_err());

    installation.cluster.start_again();
    let up = Instant::now();
    while directory.login("stranger").await.is_err() {
        assert!(up.elapsed() < Duration::from_secs(2), "two seconds after its return");
        tokio::task::yield_now().await;
    }
    assert!(directory.tenant("acme").await.unwrap().is_some());
}

#[tokio::test]
async fn while_the_central_database_is_slow_known_names_do_not_wait_for_it() {
    let installation = Installation::initialised().await;
    let acme = installation.add_tenant("acme").await;
    installation.add_login("alice", acme).await;
    installation.add_login("bob", acme).await;
    let (directory, _) =
        installation.directory(&installation.config("directory_fresh = \"1ms\"\ncentral_timeout = \"1s\""));
    assert!(directory.login("alice").await.unwrap().is_some());
    let blocker = installation.central().await;
    blocker.run("BEGIN; LOCK TABLE pglobby.logins IN ACCESS EXCLUSIVE MODE").await;
    directory.forget(&DirectoryChange::Everything);

    let asked = Instant::now();
    assert!(directory.login("alice").await.unwrap().is_some());
    assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());

    let asked = Instant::now();
    let error = directory.login("bob").await.unwrap_err();
    assert!(matches!(error, DirectoryError::Unavailable(_)), "{error}");
    assert!(
        (Duration::from_millis(900)..Duration::from_secs(3)).contains(&asked.elapsed()),
        "{:?}",
        asked.elapsed()
    );
}

#[tokio::test]
async fn no_look_up_fails_because_its_pooled_connection_died() {
    let installation = Installation::initialised().await;
    let acme = installation.add_tenant("acme").await;
    let alice = installation.add_login("alice", acme).await;
    let (directory, _) = installation.directory(&installation.config(""));
    let killer = installation.central().await;
    for _ in 0..30 {
        // Replaces a connection that the last kill hit behind its answer, so that the next one hits a pooled
        // connection and not that of a retry.
        directory.forget(&DirectoryChange::Login(alice));
        assert!(directory.login("alice").await.unwrap().is_some());
        directory.forget(&DirectoryChange::Login(alice));
        let kill =
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pglobby'";
        let (_, login) = tokio::join!(killer.ask_all(kill), directory.login("alice"));
        assert!(login.unwrap().is_some());
    }
}

#[tokio::test]
async fn a_stale_row_is_asked_for_again_before_it_is_used() {
    let installation = Installation::initialised().await;
    let acme = installation.add_tenant("acme").await;
    installation.add_login("alice", acme).await;
    let (directory, _) = installation.directory(&installation.config("directory_fresh = \"1ms\""));
    assert!(!directory.login("alice").await.unwrap().unwrap().disabled);

    installation.central().await.run("UPDATE pglobby.logins SET disabled_at = now()").await;

    let begun = Instant::now();
    while !directory.login("alice").await.unwrap().unwrap().disabled {
        assert!(begun.elapsed() < PATIENCE);
    }
}

// ---- notifications --------------------------------------------------------------------------------------------------

/// Follows in a task; its changes arrive in the channel.
fn follow(
    central: Central,
    directory: Option<Arc<CentralDirectory>>,
) -> mpsc::UnboundedReceiver<DirectoryChange> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let (events, mut received) = mpsc::channel(1);
    tokio::spawn(change_feed::follow(central, events, |_| {}));
    tokio::spawn(async move {
        while let Some(event) = received.recv().await {
            let FeedEvent::Changed(change) = event else { continue };
            if let Some(directory) = &directory {
                directory.forget(&change);
            }
            let _ = sender.send(change);
        }
    });
    receiver
}

async fn next(changes: &mut mpsc::UnboundedReceiver<DirectoryChange>) -> DirectoryChange {
    loop {
        match in_time("a change", changes.recv()).await.unwrap() {
            DirectoryChange::TenantName(_) | DirectoryChange::LoginName(_) => {}
            change => return change,
        }
    }
}

async fn heard(changes: &mut mpsc::UnboundedReceiver<DirectoryChange>, wanted: DirectoryChange) {
    while in_time("a change", changes.recv()).await.unwrap() != wanted {}
}

/// How often the central database was asked for a name tells nothing about it, whatever else changes there.
#[tokio::test]
async fn unknown_names_are_looked_up_as_often_as_known_ones() {
    let installation = Installation::on(Cluster::build().setting("log_statement", "all").start());
    init(&installation.config("")).await.unwrap();
    let acme = installation.add_tenant("acme").await;
    installation.add_login("alice", acme).await;
    let (directory, central) = installation.directory(&installation.config(""));
    let mut changes = follow(central, Some(directory.clone()));
    heard(&mut changes, DirectoryChange::Everything).await;
    let asked = |name: &str| installation.cluster.log().matches(&format!("$1 = '{name}'")).count();
    let before = ["alice", "acme"].map(asked);
    for round in 0..5 {
        for _ in 0..4 {
            assert!(directory.login("alice").await.unwrap().is_some());
            assert!(directory.login("nobody").await.unwrap().is_none());
            assert!(directory.tenant("acme").await.unwrap().is_some());
            assert!(directory.tenant("nowhere").await.unwrap().is_none());
        }
        let other = installation.add_login(&format!("other-{round}"), acme).await;
        heard(&mut changes, DirectoryChange::Login(other)).await;
        let other = installation.add_tenant(&format!("other-{round}")).await;
        heard(&mut changes, DirectoryChange::Tenant(other)).await;
    }
    for (known, before, unknown) in [("alice", before[0], "nobody"), ("acme", before[1], "nowhere")] {
        assert_eq!(asked(known) - before, asked(unknown), "{known}, {unknown}");
    }
    assert_eq!(asked("nobody"), 1);
}

#[tokio::test]
async fn changes_are_heard_and_after_a_loss_everything_may_have_changed() {
    let mut installation = Installation::initialised().await;
    let mut changes = follow(Central::open(&installation.config("")).unwrap(), None);
    assert_eq!(next(&mut changes).await, DirectoryChange::Everything);

    let acme = installation.add_tenant("acme").await;
    assert_eq!(next(&mut changes).await, DirectoryChange::Tenant(acme));
    assert_eq!(next(&mut changes).await, DirectoryChange::Tenant(acme));

    // A backend killed alone, then the whole server.
    let client = installation.central().await;
    client.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'").await;
    assert_eq!(next(&mut changes).await, DirectoryChange::Everything);
    installation.cluster.restart();
    assert_eq!(next(&mut changes).await, DirectoryChange::Everything);

    let login = installation.add_login("alice", acme).await;
    assert_eq!(next(&mut changes).await, DirectoryChange::Login(login));
}

#[tokio::test]
async fn what_plain_sql_changes_is_known_to_the_directory_once_it_is_heard() {
    let installation = Installation::initialised().await;
    let acme = installation.add_tenant("acme").await;
    let alice = installation.add_login("alice", acme).await;
    let (directory, central) = installation.directory(&installation.config("directory_fresh = \"10min\""));
    let mut changes = follow(central, Some(directory.clone()));
    assert_eq!(next(&mut changes).await, DirectoryChange::Everything);
    assert!(!directory.login("alice").await.unwrap().unwrap().disabled);
    assert!(directory.tenant("acme").await.unwrap().unwrap().pool_size.is_none());
    assert!(directory.login("bob").await.unwrap().is_none());
    let client = installation.central().await;

    client.run("UPDATE pglobby.logins SET disabled_at = now()").await;
    assert_eq!(next(&mut changes).await, DirectoryChange::Login(alice));
    assert!(directory.login("alice").await.unwrap().unwrap().disabled);

    client.run("UPDATE pglobby.hosts SET max_connections = 5").await;
    assert_eq!(next(&mut changes).await, DirectoryChange::Host("default".to_owned()));
    assert_eq!(directory.tenant("acme").await.unwrap().unwrap().host.max_connections, Some(5));

    // A renamed tenant: the login that names it, and both names.
    client.run("UPDATE pglobby.tenants SET name = 'acme2'").await;
    assert_eq!(next(&mut changes).await, DirectoryChange::Tenant(acme));
    let login = directory.login("alice").await.unwrap().unwrap();
    assert!(
        matches!(&login.kind, LoginKind::Employee { tenant_name, .. } if tenant_name == "acme2"),
        "{login:?}"
    );
    assert!(directory.tenant("acme").await.unwrap().is_none());

    // Names that were asked for before they existed.
    let bob = installation.add_login("bob", acme).await;
    assert_eq!(next(&mut changes).await, DirectoryChange::Login(bob));
    heard(&mut changes, DirectoryChange::LoginName("bob".to_owned())).await;
    assert!(directory.login("bob").await.unwrap().is_some());
    for (sql, change) in [
        (
            "UPDATE pglobby.logins SET name = 'rob' WHERE name = 'bob'",
            DirectoryChange::LoginName("rob".to_owned()),
        ),
        ("UPDATE pglobby.tenants SET name = 'ac me'", DirectoryChange::TenantName("ac me".to_owned())),
    ] {
        assert!(
            directory.login("rob").await.unwrap().is_none()
                || directory.tenant("ac me").await.unwrap().is_none()
        );
        client.run(sql).await;
        heard(&mut changes, change).await;
    }
    assert!(
        directory.login("rob").await.unwrap().is_some() && directory.login("bob").await.unwrap().is_none()
    );
    assert!(directory.tenant("ac me").await.unwrap().is_some());
}

#[tokio::test]
async fn a_central_database_that_is_down_is_not_hammered() {
    let installation = Installation::initialised().await;
    // Somebody who answers every try with a closed door, and counts.
    let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://master@{}/central", door.local_addr().unwrap());
    let (directory, central) = installation.directory(&installation.config_with_url("", &url));
    let (knock, mut knocks) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((visitor, _)) = door.accept().await {
            drop(visitor);
            let _ = knock.send(Instant::now());
        }
    });
    let _changes = follow(central, Some(directory.clone()));

    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        for client in 0..20 {
            assert!(directory.login(&format!("client{client}")).await.is_err());
        }
    }

    let mut at = Vec::new();
    while let Ok(instant) = knocks.try_recv() {
        at.push(instant);
    }
    assert!(at.len() > 3, "it is tried again: {}", at.len());
    for window in at.windows(11) {
        assert!(window[10] - window[0] >= Duration::from_secs(1), "more than ten tries within a second");
    }
}
