//! The central database: a small pool of connections for queries, and single connections for long work.
//!
//! What a client sends arrives here as a bound parameter only (invariant 7). Every query is
//! schema-qualified.

pub mod change_barrier;
pub mod change_feed;
pub mod cluster_cancel;
pub mod move_pause;
pub mod servers;
pub mod tls;

use std::{error::Error, sync::Arc, time::Duration};

use deadpool_postgres::{
    Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, Timeouts,
};
use secrecy::ExposeSecret as _;
use tokio_postgres::{Client, Connection, Socket, error::DbError};

use self::tls::{CentralTlsConnector, CentralTlsStream};
use crate::{
    config::{Config, Keepalive},
    control_path::migrations,
    wire::tls::TlsError,
};

/// The central database. Cheap to clone; connects on first use.
#[derive(Clone)]
pub struct Central {
    pool: Pool,
    shared: Arc<Shared>,
}

struct Shared {
    /// With password and session settings; for connections outside the pool.
    connection: tokio_postgres::Config,
    /// The same to be shown, without a password.
    url: String,
    tls: CentralTlsConnector,
    timeout: Duration,
}

/// Errors of the central database. Logged; never sent to a client.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum CentralError {
    /// Certificates.
    #[error("central database: {0}")]
    Tls(#[from] TlsError),
    /// The pool could not be created.
    #[error("central database: {0}")]
    Setup(String),
    /// No connection.
    #[error("cannot connect to the central database {url}: {}", causes(cause))]
    Connect { url: String, cause: tokio_postgres::Error },
    /// All connections stayed busy, or the server did not answer.
    #[error("the central database {url} did not answer within {waited:?} (central_timeout)")]
    TimedOut { url: String, waited: Duration },
    /// A query failed.
    #[error("central database: {}{}", causes(.0), if migrations::is_older(.0) { "; if its schema is older than this pglobby, run `pglobby init`" } else { "" })]
    Query(#[from] tokio_postgres::Error),
    /// A result that the schema does not allow.
    #[error("central database: {0}")]
    Nonsense(String),
}

impl CentralError {
    /// The SQLSTATE of the central database, if it sent one.
    pub fn code(&self) -> Option<&tokio_postgres::error::SqlState> {
        match self {
            Self::Connect { cause, .. } | Self::Query(cause) => cause.code(),
            _ => None,
        }
    }

    /// Whether a retry may succeed soon: no answer, or a server that starts, stops or has no connection
    /// left.
    pub fn passes(&self) -> bool {
        let starting = ["53300", "57P01", "57P02", "57P03"];
        match self {
            Self::TimedOut { .. } => true,
            Self::Connect { .. } => self.code().is_none_or(|code| starting.contains(&code.code())),
            _ => false,
        }
    }

    /// Whether the database refused a value (data exception or constraint).
    pub fn is_about_a_value(&self) -> bool {
        self.code().is_some_and(|code| ["22", "23"].iter().any(|class| code.code().starts_with(class)))
    }
}

impl Central {
    /// Prepares the pool without connecting.
    pub fn open(config: &Config) -> Result<Self, CentralError> {
        let tls = CentralTlsConnector::new(&config.central.tls)?;
        let timeout = config.timeouts.central;
        let connection = session_settings(config);

        let mut pooled = connection.clone();
        let own = pooled.get_options().unwrap_or_default();
        pooled.options(format!("{own} -c statement_timeout={}", timeout.as_millis()));
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let pool = Pool::builder(Manager::from_config(pooled, tls.clone(), recycling))
            .max_size(config.limits.central_connections_max)
            .timeouts(Timeouts { wait: Some(timeout), create: Some(timeout), recycle: Some(timeout) })
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| CentralError::Setup(error.to_string()))?;
        let shared = Shared { connection, url: config.central.url.clone(), tls, timeout };
        Ok(Self { pool, shared: Arc::new(shared) })
    }

    /// A pooled connection. Its statements are cancelled after `central_timeout`.
    ///
    /// # Errors
    /// [`CentralError::Connect`] or [`CentralError::TimedOut`], after `central_timeout` at most.
    pub async fn client(&self) -> Result<Object, CentralError> {
        // One deadline for waiting and connecting, which the pool counts separately.
        let got = tokio::time::timeout(self.shared.timeout, self.pool.get()).await;
        match got.map_err(|_| self.timed_out())? {
            Ok(client) => Ok(client),
            Err(PoolError::Backend(cause)) => Err(self.connect_error(cause)),
            Err(PoolError::Timeout(_)) => Err(self.timed_out()),
            Err(error) => Err(CentralError::Setup(error.to_string())),
        }
    }

    /// A connection outside the pool to `database` on the central cluster, without a statement timeout: for
    /// long work such as creating or migrating a database. A task on the current runtime drives it until it
    /// is dropped.
    pub async fn connect_to(&self, database: &str) -> Result<Client, CentralError> {
        let mut connection = self.shared.connection.clone();
        connection.dbname(database);
        let (client, driver) = self.connect(&connection).await?;
        tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::warn!(side = "central", cause = %causes(&error), "connection to the central database lost");
            }
        });
        Ok(client)
    }

    /// A connection outside the pool for LISTEN, and its driver, which the caller polls.
    pub async fn connect_undriven(
        &self,
    ) -> Result<(Client, Connection<Socket, CentralTlsStream<Socket>>), CentralError> {
        self.connect(&self.shared.connection).await
    }

    async fn connect(
        &self,
        connection: &tokio_postgres::Config,
    ) -> Result<(Client, Connection<Socket, CentralTlsStream<Socket>>), CentralError> {
        let connected = connection.connect(self.shared.tls.clone());
        tokio::time::timeout(self.shared.timeout, connected)
            .await
            .map_err(|_| self.timed_out())?
            .map_err(|cause| self.connect_error(cause))
    }

    /// Name of the central database.
    pub fn database(&self) -> &str {
        self.shared.connection.get_dbname().unwrap_or_default()
    }

    /// The master login.
    pub fn user(&self) -> &str {
        self.shared.connection.get_user().unwrap_or_default()
    }

    /// Its URL without a password.
    pub fn url(&self) -> &str {
        &self.shared.url
    }

    /// `central_timeout`.
    pub fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    fn timed_out(&self) -> CentralError {
        CentralError::TimedOut { url: self.shared.url.clone(), waited: self.shared.timeout }
    }

    fn connect_error(&self, cause: tokio_postgres::Error) -> CentralError {
        CentralError::Connect { url: self.shared.url.clone(), cause }
    }
}

impl std::fmt::Debug for Central {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Central").field("url", &self.shared.url).finish_non_exhaustive()
    }
}

fn session_settings(config: &Config) -> tokio_postgres::Config {
    let mut connection = config.central.connection.clone();
    if let Some(password) = &config.central.password {
        connection.password(password.expose_secret());
    }
    // The last option wins, so options in the URL cannot change the search path.
    let theirs = connection.get_options().unwrap_or_default();
    connection.options(format!("{theirs} -c search_path=pg_catalog -c client_min_messages=warning"));
    connection.application_name("pglobby");
    connection.connect_timeout(config.timeouts.central);
    connection.keepalives(true);
    let Keepalive { idle, interval, user_timeout } = config.timeouts.server_keepalive;
    connection.keepalives_idle(idle);
    connection.keepalives_interval(interval);
    connection.keepalives_retries(Keepalive::PROBES);
    if let Some(user_timeout) = user_timeout {
        connection.tcp_user_timeout(user_timeout);
    }
    connection
}

/// Classes of SQLSTATE whose DETAIL names objects, connections and privileges. Other DETAILs may quote rows
/// ("Failing row contains …", "Key (name)=(…) already exists"), and so sealed passwords and verifiers.
const DETAIL_SHOWN: [&str; 14] =
    ["08", "0A", "0L", "0P", "25", "28", "2B", "3D", "42", "53", "54", "55", "57", "58"];

/// Whether DETAIL and HINT of an error with this SQLSTATE are free of row contents.
pub fn detail_is_shown(sqlstate: &str) -> bool {
    sqlstate.get(..2).is_some_and(|class| DETAIL_SHOWN.contains(&class))
}

/// The text of a server error without row contents. Every error of PostgreSQL that is printed, logged,
/// recorded or answered goes through here.
pub fn said(error: &DbError) -> String {
    let mut words = error.message().to_owned();
    let is_shown = detail_is_shown(error.code().code());
    for (title, more) in [("DETAIL", error.detail()), ("HINT", error.hint())] {
        if let Some(more) = more.filter(|_| is_shown) {
            words.push_str(&format!("\n{title}: {more}"));
        }
    }
    words
}

/// An error with all its causes, which the `Display` of tokio-postgres leaves out.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        let of_server = |server: &DbError| format!("{}: {}", server.severity(), said(server));
        let words = error.downcast_ref().map_or_else(|| error.to_string(), of_server);
        // tokio-postgres says "db error"; the message of the server is its source.
        if words != "db error" && !text.contains(&words) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&words);
        }
        next = error.source();
    }
    // DETAIL and HINT are on separate lines; a log event has one line.
    text.replace('\n', "; ")
}
