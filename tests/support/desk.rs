//! An operator at a lobby, in process: the functions beneath `pglobby tenant|login|host`, with a hand on their steps.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use pglobby::control_path::{
    admin::actor::{Actor, Progress},
    central::Central,
    init::init,
    onboarding::create::CreateTenant,
    secrets::keyring_reload::ReloadableKeyring,
};
use tokio_postgres::Config;

use super::{Client, Cluster, cluster::Builder, lobby::Lobby};

/// Of a role that tests log in as, set by the superuser.
pub const KNOWN_PASSWORD: &str = "known to the test";

/// What the host's administrator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Master {
    Superuser,
    /// CREATEDB and CREATEROLE, as managed services give it.
    Modest,
}

pub struct Desk {
    pub lobby: Lobby,
    pub operator: Actor,
    pub config: pglobby::config::Config,
}

impl Desk {
    pub async fn new() -> Self {
        Self::on(Cluster::build(), Master::Superuser).await
    }

    pub async fn on(cluster: Builder, master: Master) -> Self {
        let lobby = Lobby::on(cluster.start());
        let url = match master {
            Master::Superuser => lobby.cluster.url("central"),
            Master::Modest => {
                let superuser = lobby.cluster.client("postgres").await;
                superuser.run("CREATE ROLE modest LOGIN CREATEDB CREATEROLE PASSWORD 'modest'").await;
                format!("postgres://modest:modest@127.0.0.1:{}/central", lobby.cluster.port())
            }
        };
        let config = lobby.config_with_url("", &url);
        init(&config).await.unwrap();
        let operator = Self::operator_of(&config);
        Self { lobby, operator, config }
    }

    fn operator_of(config: &pglobby::config::Config) -> Actor {
        let keyring = ReloadableKeyring::load(config).unwrap();
        Actor::new(Central::open(config).unwrap(), Arc::new(keyring), "test")
    }

    /// Another process, as far as the servers can tell: connections of its own.
    pub fn another_operator(&self) -> Actor {
        Self::operator_of(&self.config)
    }

    /// The superuser.
    pub async fn superuser(&self, database: &str) -> Client {
        self.lobby.cluster.client(database).await
    }

    /// `role`, logging in to `database` with a password of its own.
    pub async fn login(&self, role: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
        let sql = format!("ALTER ROLE \"{}\" PASSWORD '{KNOWN_PASSWORD}'", role.replace('"', "\"\""));
        self.superuser("postgres").await.run(&sql).await;
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.lobby.cluster.port());
        config.user(role).password(KNOWN_PASSWORD).dbname(database);
        Client::connect(&config).await
    }

    /// Databases and roles of the cluster, tenants and unfinished operations: what must be as it was after something
    /// was undone.
    pub async fn remains(&self) -> String {
        let cluster = self.superuser("postgres").await;
        let central = self.superuser("central").await;
        let mut all = Vec::new();
        for (client, sql) in [
            (&cluster, "SELECT datname || coalesce(datacl::text, '') FROM pg_database ORDER BY datname"),
            (&cluster, "SELECT rolname FROM pg_roles ORDER BY rolname"),
            (&cluster, "SELECT member::regrole || ' in ' || roleid::regrole FROM pg_auth_members ORDER BY 1"),
            (&central, "SELECT name || ' ' || status FROM pglobby.tenants ORDER BY id"),
            (
                &central,
                "SELECT id::text FROM pglobby.operations WHERE status IN ('running', 'failed') ORDER BY id",
            ),
        ] {
            all.extend(client.ask_all(sql).await.into_iter().flatten().flatten());
        }
        all.join("\n")
    }
}

pub fn tenant(name: &str) -> CreateTenant {
    CreateTenant { name: name.to_owned(), ..CreateTenant::default() }
}

/// Stops whoever reports to it for good after one step: to the servers, a process killed there.
pub struct StopAfter {
    step: String,
    reached: tokio::sync::Notify,
}

impl StopAfter {
    pub fn step(step: &str) -> Arc<Self> {
        Arc::new(Self { step: step.to_owned(), reached: tokio::sync::Notify::new() })
    }

    /// Runs `work` until it has reached the step, and drops it there: no line of it runs any more, and its
    /// connections break.
    pub async fn kill(self: Arc<Self>, work: impl Future<Output = ()>) {
        tokio::select! {
            () = self.reached.notified() => {}
            () = work => panic!("ended without step {:?}", self.step),
        }
    }
}

#[async_trait]
impl Progress for StopAfter {
    async fn part(&self, what: &str, _: u64, _: u64) {
        self.step("", what).await;
    }

    async fn step(&self, _: &str, step: &str) {
        if step == self.step {
            self.reached.notify_one();
            std::future::pending::<()>().await;
        }
    }
}

/// Remembers the steps.
#[derive(Default)]
pub struct Steps(Mutex<Vec<String>>);

impl Steps {
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

#[async_trait]
impl Progress for Steps {
    async fn step(&self, _: &str, step: &str) {
        self.0.lock().unwrap().push(step.to_owned());
    }
}
