//! Admin commands in the test's process: the functions behind `pglobby tenant|login|host`, stopped at any step.

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

use super::{Client, Cluster, cluster::Builder, installation::Installation};

/// The password that [`Admin::login`] gives a role.
pub const KNOWN_PASSWORD: &str = "known to the test";

/// The rights of the host's administrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Master {
    Superuser,
    /// CREATEDB and CREATEROLE, as in managed services.
    Createrole,
}

pub struct Admin {
    pub installation: Installation,
    pub actor: Actor,
    pub config: pglobby::config::Config,
}

impl Admin {
    pub async fn new() -> Self {
        Self::on(Cluster::build(), Master::Superuser).await
    }

    pub async fn on(cluster: Builder, master: Master) -> Self {
        let installation = Installation::on(cluster.start());
        let url = match master {
            Master::Superuser => installation.cluster.url("central"),
            Master::Createrole => {
                let superuser = installation.cluster.client("postgres").await;
                superuser.run("CREATE ROLE modest LOGIN CREATEDB CREATEROLE PASSWORD 'modest'").await;
                format!("postgres://modest:modest@127.0.0.1:{}/central", installation.cluster.port())
            }
        };
        let config = installation.config_with_url("", &url);
        init(&config).await.unwrap();
        let actor = Self::actor_with(&config);
        Self { installation, actor, config }
    }

    fn actor_with(config: &pglobby::config::Config) -> Actor {
        let keyring = ReloadableKeyring::load(config).unwrap();
        Actor::new(Central::open(config).unwrap(), Arc::new(keyring), "test")
    }

    /// An actor with connections of its own, as another process has.
    pub fn another_actor(&self) -> Actor {
        Self::actor_with(&self.config)
    }

    /// A connection of the superuser.
    pub async fn superuser(&self, database: &str) -> Client {
        self.installation.cluster.client(database).await
    }

    /// Sets the password of `role`, and connects to `database` as it.
    pub async fn login(&self, role: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
        let sql = format!("ALTER ROLE \"{}\" PASSWORD '{KNOWN_PASSWORD}'", role.replace('"', "\"\""));
        self.superuser("postgres").await.run(&sql).await;
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.installation.cluster.port());
        config.user(role).password(KNOWN_PASSWORD).dbname(database);
        Client::connect(&config).await
    }

    /// Databases and roles of the cluster, tenants and unfinished operations: an undone command leaves them unchanged.
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

/// Stops a command after one step for good; servers see a killed process.
pub struct StopAfter {
    step: String,
    reached: tokio::sync::Notify,
}

impl StopAfter {
    pub fn step(step: &str) -> Arc<Self> {
        Arc::new(Self { step: step.to_owned(), reached: tokio::sync::Notify::new() })
    }

    /// Runs `work` until the step, and drops it there, so that its connections break.
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

/// Records the steps.
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
