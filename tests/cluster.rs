//! What `pglobby dev` and all other tests stand on: a PostgreSQL of our own that starts, stops and leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use pglobby::local_postgres::{
    binaries::PostgresBinaries,
    cluster::{ClusterError, LocalCluster, Stop},
    os_user::ClusterOwner,
};
use secrecy::SecretString;
use support::{
    Client, Cluster, Wire,
    cluster::{MASTER, MASTER_PASSWORD},
    wire::{PROTOCOL_3_2, rows, tags},
};
use tempfile::TempDir;

#[tokio::test]
async fn a_cluster_answers_over_tcp_and_socket_and_wants_a_password() {
    let cluster = Cluster::start();
    assert_eq!(cluster.client("postgres").await.ask("SHOW server_encoding").await, "UTF8");

    let mut by_socket = cluster.config("postgres");
    by_socket.host_path(cluster.socket_folder());
    assert_eq!(Client::connect(&by_socket).await.unwrap().ask("SELECT 1").await, "1");

    let mut wrong = cluster.config("postgres");
    wrong.password("wrong");
    let refused = Client::connect(&wrong).await.err().expect("a wrong password");
    assert_eq!(support::client::sqlstate(&refused), "28P01");
}

#[tokio::test]
async fn data_survives_a_stop_and_a_kill() {
    let mut cluster = Cluster::start();
    cluster.client("postgres").await.run("CREATE TABLE kept (x int); INSERT INTO kept VALUES (7)").await;

    cluster.restart();
    assert_eq!(cluster.client("postgres").await.ask("SELECT x FROM kept").await, "7");

    let connected = cluster.client("postgres").await;
    cluster.kill_9();
    cluster.start_again();
    drop(connected);
    assert_eq!(cluster.client("postgres").await.ask("SELECT x FROM kept").await, "7");
}

#[tokio::test]
async fn a_stale_postmaster_pid_with_a_number_that_is_in_use_does_not_matter() {
    let mut cluster = Cluster::start();
    cluster.kill_9();
    // A living process of PostgreSQL's user that is no PostgreSQL: its own postmaster would refuse to start.
    let pid_file = cluster.data().join("postmaster.pid");
    let mut stranger =
        ClusterOwner::current().unwrap().run_as(Command::new("sleep").arg("60")).spawn().unwrap();
    let text = fs::read_to_string(&pid_file).unwrap();
    let rest = text.split_once('\n').unwrap().1;
    fs::write(&pid_file, format!("{}\n{rest}", stranger.id())).unwrap();

    cluster.start_again();

    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert_eq!(cluster.client("postgres").await.ask("SELECT 1").await, "1");
}

#[test]
fn a_second_postmaster_on_the_same_folder_is_refused_in_words() {
    let cluster = Cluster::start();
    let second = LocalCluster::new(PostgresBinaries::find(None).unwrap(), cluster.data()).unwrap();
    let error = second.start(&[]).expect_err("two on one folder");
    assert!(matches!(error, ClusterError::AlreadyRunning { .. }), "{error}");
}

#[test]
fn a_port_in_use_is_said_in_postgresqls_words() {
    let first = Cluster::start();
    let mut second = Cluster::start();
    second.stop();
    let local = LocalCluster::new(PostgresBinaries::find(None).unwrap(), second.data()).unwrap();
    let port = first.port().to_string();
    let error = local
        .start(&[("listen_addresses", "127.0.0.1"), ("port", &port), ("unix_socket_directories", "")])
        .expect_err("one port for two")
        .to_string();
    assert!(error.contains("Address already in use"), "{error}");
}

#[test]
fn a_folder_of_another_version_and_a_folder_of_something_else_are_refused() {
    let mut cluster = Cluster::start();
    cluster.stop();
    fs::write(cluster.data().join("PG_VERSION"), "9.6\n").unwrap();
    let local = LocalCluster::new(PostgresBinaries::find(None).unwrap(), cluster.data()).unwrap();
    assert!(matches!(local.start(&[]), Err(ClusterError::OtherVersion { made_by: 9, .. })));

    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("letters.txt"), "private").unwrap();
    let local = LocalCluster::new(PostgresBinaries::find(None).unwrap(), &data).unwrap();
    let outcome = local.init("master", &SecretString::from("x"), &[]);
    assert!(matches!(outcome, Err(ClusterError::NotADataFolder(_))));
    assert!(data.join("letters.txt").exists());
}

#[test]
fn what_an_interrupted_init_left_is_made_anew() {
    let folder = folder_for_postgres();
    let local =
        LocalCluster::new(PostgresBinaries::find(None).unwrap(), &folder.path().join("data")).unwrap();
    fs::create_dir(folder.path().join("data.unfinished")).unwrap();
    fs::write(folder.path().join("data.unfinished/PG_VERSION"), "15").unwrap();

    local.init("master", &SecretString::from("secret"), &["--no-sync"]).unwrap();

    let socket = folder.path().to_str().unwrap();
    let running = local.start(&[("listen_addresses", ""), ("unix_socket_directories", socket)]).unwrap();
    running.stop(Stop::Fast).unwrap();
    let mut left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["data", "data.log"], "no password file, no socket");
}

/// Its starter has no chance to clean up: the watcher must stop PostgreSQL all the same.
#[test]
fn postgresql_ends_when_its_starter_is_killed() {
    if let Some(folder) = std::env::var_os(STARTER) {
        start_and_hang(Path::new(&folder));
    }
    let folder = folder_for_postgres();
    let mut starter = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "postgresql_ends_when_its_starter_is_killed", "--nocapture"])
        .env(STARTER, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(starter.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("PostgreSQL runs")), "it never ran");

    starter.kill().unwrap();
    starter.wait().unwrap();

    // Removing this file is PostgreSQL's last act.
    let begun = std::time::Instant::now();
    while folder.path().join("data/postmaster.pid").exists() {
        assert!(begun.elapsed() < support::client::PATIENCE, "PostgreSQL still runs");
        std::thread::yield_now();
    }
}

fn start_and_hang(folder: &Path) -> ! {
    let local = LocalCluster::new(PostgresBinaries::find(None).unwrap(), &folder.join("data")).unwrap();
    local.init("master", &SecretString::from("secret"), &["--no-sync"]).unwrap();
    let socket = folder.to_str().unwrap();
    let _running = local.start(&[("listen_addresses", ""), ("unix_socket_directories", socket)]).unwrap();
    println!("PostgreSQL runs");
    loop {
        std::thread::park();
    }
}

const STARTER: &str = "PGLOBBY_TEST_STARTER";

/// A temporary folder that PostgreSQL's user can reach.
fn folder_for_postgres() -> TempDir {
    let folder = tempfile::Builder::new().prefix("pgl").tempdir_in("/tmp").unwrap();
    ClusterOwner::current().unwrap().give(folder.path()).unwrap();
    folder
}

#[test]
fn tls_md5_and_trust_clusters_start() {
    for builder in [Cluster::build().tls(), Cluster::build().md5(), Cluster::build().trust()] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let cluster = builder.start();
        runtime.block_on(async {
            assert_eq!(cluster.client("postgres").await.ask("SELECT 1").await, "1");
        });
    }
}

/// What `scripts/test` installs for the newer protocol: 3.2 is spoken, and its cancel keys are long.
#[tokio::test]
async fn postgresql_18_speaks_protocol_3_2() {
    let cluster = Cluster::postgres_18().start();
    let mut wire = Wire::open(cluster.port()).await;
    wire.startup(PROTOCOL_3_2, &[("user", MASTER), ("database", "postgres")]).await;
    wire.authenticate(MASTER_PASSWORD).await.unwrap();

    assert!(wire.parameters["server_version"].starts_with("18"));
    assert_eq!(wire.key.as_ref().unwrap().1.len(), 32);
    let answers = wire.query("SELECT 'a', NULL").await;
    assert_eq!(tags(&answers), "TDCZ");
    assert_eq!(rows(&answers), [[Some("a".to_owned()), None]]);
}
