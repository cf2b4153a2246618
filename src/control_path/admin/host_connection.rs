//! Connections to hosts, for onboarding only: as the host's administrator
//! ([`master_session`](super::tenant_database)), or as a tenant's role to run what the tenant defines
//! (schema files, a dump).
//!
//! Nothing a client sends comes here (invariant 7).

use std::{
    fmt::Display,
    path::PathBuf,
    pin::pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _, TryStreamExt as _};
use secrecy::{ExposeSecret as _, SecretString};
use tokio_postgres::{Client, GenericClient, Row, SimpleQueryMessage, error::SqlState, types::ToSql};

use super::{
    actor::{Actor, AdminError},
    host_addresses,
    host_locks::Waiting,
};
use crate::{
    config::{CentralTls, TlsMode},
    control_path::{
        central::{Central, cluster_cancel, tls::CentralTlsConnector},
        secrets::seal::SecretLocation,
    },
    data_path::{
        host_address::HostAddress,
        server::{AddressRole, AddressRoles},
    },
};

/// Size of the messages with rows.
const COPY_BYTES: usize = 64 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Waits between attempts to connect to a full host, whose idle servers the nodes were asked to close.
const PAUSES_FOR_ROOM: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_millis(1500),
    Duration::from_millis(3000),
];
/// PostgreSQL 16 changed what CREATEROLE may do, and how membership is granted.
const MEMBERSHIP_OPTIONS_SINCE: i32 = 160_000;

/// A host and its administrator's credential.
#[derive(Debug, Clone)]
pub struct HostAdmin {
    /// `hosts.name`.
    pub name: String,
    /// Of its primary and its standbys. At least one.
    pub addresses: Vec<HostAddress>,
    /// Which of them is the primary, as far as this command has found out.
    roles: Arc<AddressRoles>,
    /// libpq's meaning.
    pub tls_mode: TlsMode,
    /// PEM file of authorities; `None`: the system's.
    pub tls_root_ca: Option<PathBuf>,
    /// The administrator's role; it may create databases and roles.
    pub user: String,
    /// Where it does so from.
    pub database: String,
    /// `None`: none needed.
    pub password: Option<SecretString>,
    /// Used to tell nodes that the host is full.
    central: Central,
    /// The administrator's privileges, once they are known.
    pub(in crate::control_path) rights: Arc<OnceLock<AdminRights>>,
}

/// A connection to one database of a host. Its errors name the step that failed.
pub struct HostSession {
    client: Client,
    host: String,
    /// Set for administrators that end tenants' transactions in their way (`host_locks.rs`).
    waiting: Option<Waiting>,
}

/// The result of one statement, as text.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct StatementResult {
    /// Column names; empty if the statement returns no rows.
    pub columns: Vec<String>,
    /// NULL is `None`.
    pub rows: Vec<Vec<Option<String>>>,
    /// Rows returned or changed, dropped ones included.
    pub row_count: u64,
    /// Whether rows were dropped.
    pub truncated: bool,
}

/// The privileges of the administrator on its host.
#[derive(Debug, Clone, Copy)]
pub struct AdminRights {
    /// `server_version_num`.
    pub server_version: i32,
    /// Everything.
    pub superuser: bool,
    /// May create databases.
    pub create_databases: bool,
    /// May create roles.
    pub create_roles: bool,
}

impl HostAdmin {
    /// The host called `name`, with its password opened.
    ///
    /// # Errors
    /// No such host, the central database, or a password that does not open.
    pub async fn load(actor: &Actor, client: &impl GenericClient, name: &str) -> Result<Self, AdminError> {
        let sql =
            "SELECT address, port, ARRAY(SELECT
                     pg_catalog.jsonb_array_elements_text(pg_catalog.to_jsonb(h) -> 'more_addresses')) AS more_addresses,
                   tls_mode, tls_root_ca, admin_user, admin_database, sealed_admin_password
             FROM pglobby.hosts h WHERE name = $1";
        let row = client.query_opt(sql, &[&name]).await?;
        let Some(row) = row else {
            return Err(actor.not_found(client, "host", name, "SELECT name FROM pglobby.hosts").await);
        };
        let addresses = host_addresses::of_row(&row).map_err(AdminError::Invalid)?;
        let place = SecretLocation { table: "hosts", row: name, column: "sealed_admin_password" };
        let sealed: Option<Vec<u8>> = row.get("sealed_admin_password");
        let password = sealed.map(|blob| actor.keyring.open(&place, &blob)).transpose()?;
        Ok(Self {
            name: name.to_owned(),
            roles: Arc::new(AddressRoles::new(name, &addresses)),
            addresses,
            tls_mode: row.get::<_, &str>("tls_mode").parse().map_err(AdminError::Invalid)?,
            tls_root_ca: row.get::<_, Option<String>>("tls_root_ca").map(PathBuf::from),
            user: row.get("admin_user"),
            database: row.get("admin_database"),
            password,
            central: actor.central.clone(),
            rights: Arc::default(),
        })
    }

    /// A session of `user` in `database`, with `options` as in a startup message. If the host is full, the
    /// nodes close idle servers of tenants and connecting is retried.
    pub async fn connect_as(
        &self,
        user: &str,
        password: Option<&SecretString>,
        database: &str,
        options: &str,
    ) -> Result<HostSession, AdminError> {
        let mut connected = self.connect_once(user, password, database, options).await;
        for pause in PAUSES_FOR_ROOM {
            match &connected {
                Err(error) if is_host_full(error) => {}
                _ => break,
            }
            if let Err(error) = cluster_cancel::ask_for_room(&self.central, &self.name).await {
                tracing::warn!(host = self.name, side = "central", %error, "cannot ask nodes to close idle servers on a full host");
            }
            tokio::time::sleep(pause).await;
            connected = self.connect_once(user, password, database, options).await;
        }
        connected
    }

    /// Connects to the host's primary. A standby that refuses the role or the database may only lag behind.
    async fn connect_once(
        &self,
        user: &str,
        password: Option<&SecretString>,
        database: &str,
        options: &str,
    ) -> Result<HostSession, AdminError> {
        if let [only] = &*self.addresses {
            return self.connect_at(only, CONNECT_TIMEOUT, (user, password, database, options)).await;
        }
        let within = CONNECT_TIMEOUT / u32::try_from(self.addresses.len()).unwrap_or(1);
        let mut failure = None;
        for (number, role) in self.roles.order() {
            let Some(address) = self.addresses.get(number) else { continue };
            match self.connect_at(address, within, (user, password, database, options)).await {
                Ok(session) => match session.is_standby().await {
                    Ok(true) => drop(self.roles.found(number, AddressRole::Standby)),
                    Ok(false) => {
                        self.roles.found(number, AddressRole::Primary);
                        return Ok(session);
                    }
                    Err(error) => failure = Some(error),
                },
                Err(error) if role != AddressRole::Standby && is_refusal(&error) => return Err(error),
                Err(error) => {
                    self.roles.found(number, AddressRole::Silent);
                    failure = Some(error);
                }
            }
        }
        let why = failure.map_or_else(|| "all are standbys".to_owned(), |error| error.to_string());
        Err(AdminError::Refused(format!("host {:?}: none of its addresses accepts writes: {why}", self.name)))
    }

    async fn connect_at(
        &self,
        address: &HostAddress,
        within: Duration,
        (user, password, database, options): (&str, Option<&SecretString>, &str, &str),
    ) -> Result<HostSession, AdminError> {
        let tls = CentralTls { mode: self.tls_mode, root_ca: self.tls_root_ca.clone() };
        let tls = CentralTlsConnector::new(&tls).map_err(|error| {
            AdminError::Invalid(format!("host {:?}: {error}; see `pglobby host set`", self.name))
        })?;
        let mut config = tokio_postgres::Config::new();
        config
            .host(address.place())
            .port(address.port())
            .user(user)
            .dbname(database)
            .options(options)
            .application_name("pglobby")
            .connect_timeout(within)
            .keepalives_idle(Duration::from_secs(30))
            .ssl_mode(self.tls_mode.for_tokio_postgres());
        if let Some(password) = password {
            config.password(password.expose_secret());
        }
        let place = format!("{address}, database {database:?}, role {user:?}");
        let connected = tokio::time::timeout(within, config.connect(tls)).await;
        let (client, driver) = connected
            .map_err(|_| {
                AdminError::Refused(format!(
                    "host {:?} ({place}) did not answer within {within:?}; see `pglobby host list`",
                    self.name
                ))
            })?
            .map_err(|cause| AdminError::Connect { host: self.name.clone(), place, cause })?;
        // Ends when the client is dropped. Its errors appear at the query that meets them.
        tokio::spawn(driver);
        Ok(HostSession { client, host: self.name.clone(), waiting: None })
    }
}

impl HostAdmin {
    /// The host for a program of libpq: names and ports, separated by commas, and whether it must find the primary
    /// among them (`target_session_attrs=read-write`).
    pub fn for_libpq(&self) -> (String, String, bool) {
        let joined = |part: &dyn Fn(&HostAddress) -> String| {
            self.addresses.iter().map(part).collect::<Vec<_>>().join(",")
        };
        let (names, ports) = (joined(&HostAddress::place), joined(&|address| address.port().to_string()));
        (names, ports, self.addresses.len() > 1)
    }

    /// Logs in as `role` like a pool does, and checks that the server reports this role and this database.
    ///
    /// # Errors
    /// [`AdminError::Connect`], or [`AdminError::Refused`] if the role or the database differs.
    pub async fn prove_login(
        &self,
        role: &str,
        password: &SecretString,
        database: &str,
    ) -> Result<HostSession, AdminError> {
        let session = self.connect_as(role, Some(password), database, "").await?;
        let found = session.identity().await?;
        if found != (database.to_owned(), role.to_owned()) {
            return Err(AdminError::Refused(format!(
                "host {:?} lets role {role:?} into database {database:?} as {:?} in {:?}; is a pooler in between?",
                self.name, found.1, found.0
            )));
        }
        Ok(session)
    }
}

/// Whether the server has refused the role, the database or the connection, and does not only start or shut down.
fn is_refusal(error: &AdminError) -> bool {
    let AdminError::Connect { cause, .. } = error else { return false };
    cause.code().is_some_and(|code| !code.code().starts_with("57P"))
}

/// Whether the host has no connection left. A CONNECTION LIMIT of a role or a database has the same
/// SQLSTATE from another routine; closing servers does not help there.
fn is_host_full(error: &AdminError) -> bool {
    let AdminError::Connect { cause, .. } = error else { return false };
    let routine = cause.as_db_error().and_then(|error| error.routine());
    cause.code() == Some(&SqlState::TOO_MANY_CONNECTIONS)
        && !matches!(routine, Some("InitializeSessionUserId" | "CheckMyDatabase"))
}

/// Whether the database's own CONNECTION LIMIT refused the connection.
pub(in crate::control_path) fn is_database_full(error: &AdminError) -> bool {
    let AdminError::Connect { cause, .. } = error else { return false };
    cause.code() == Some(&SqlState::TOO_MANY_CONNECTIONS)
        && cause.as_db_error().and_then(|error| error.routine()) == Some("CheckMyDatabase")
}

impl HostSession {
    /// The same session of `admin`. A tenant's transaction in the way of its statements is ended after
    /// [`host_locks`](super::host_locks)' patience.
    pub(in crate::control_path) async fn before_tenants(
        mut self,
        admin: &HostAdmin,
    ) -> Result<Self, AdminError> {
        self.waiting = Some(Waiting::of(admin, &self).await?);
        Ok(self)
    }

    async fn done<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.waiting {
            Some(waiting) => waiting.see_through(work).await,
            None => work.await,
        }
    }

    /// Runs one or several statements and ignores rows.
    pub async fn run(&self, doing: impl Display, sql: &str) -> Result<(), AdminError> {
        self.done(self.client.batch_execute(sql)).await.map_err(|cause| self.refused(doing, cause))
    }

    /// Rows of one statement.
    pub async fn query(
        &self,
        doing: impl Display,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, AdminError> {
        self.done(self.client.query(sql, parameters)).await.map_err(|cause| self.refused(doing, cause))
    }

    /// The first column of all rows; `sql` makes it text.
    pub async fn texts(
        &self,
        doing: impl Display,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<String>, AdminError> {
        Ok(self.query(doing, sql, parameters).await?.iter().map(|row| row.get(0)).collect())
    }

    /// Whether the server is in recovery.
    async fn is_standby(&self) -> Result<bool, AdminError> {
        let rows = self.query("asking for its role", "SELECT pg_catalog.pg_is_in_recovery()", &[]).await?;
        Ok(rows.first().is_some_and(|row| row.get(0)))
    }

    /// The privileges of the administrator.
    pub async fn rights(&self) -> Result<AdminRights, AdminError> {
        let sql = "SELECT pg_catalog.current_setting('server_version_num')::int4, rolsuper, rolcreatedb, rolcreaterole
                   FROM pg_catalog.pg_roles WHERE rolname = current_user";
        let rows = self.query("asking for the administrator's rights", sql, &[]).await?;
        let Some(row) = rows.first() else {
            return Err(AdminError::Refused(format!("host {:?} does not know its own user", self.host)));
        };
        Ok(AdminRights {
            server_version: row.get(0),
            superuser: row.get(1),
            create_databases: row.get(2),
            create_roles: row.get(3),
        })
    }

    /// Runs a text of the tenant or operator as a simple query.
    pub async fn run_text(&self, sql: &str) -> Result<(), tokio_postgres::Error> {
        self.client.batch_execute(sql).await
    }

    /// Runs a COPY … FROM STDIN with its rows.
    pub async fn copy_text(&self, sql: &str, rows: &str) -> Result<(), tokio_postgres::Error> {
        let mut sink = pin!(self.client.copy_in(sql).await?);
        for chunk in rows.as_bytes().chunks(COPY_BYTES) {
            sink.send(Bytes::copy_from_slice(chunk)).await?;
        }
        sink.close().await
    }

    /// Runs a text of the operator and appends the result of each statement, `rows_max` rows at most in
    /// all.
    ///
    /// # Errors
    /// [`AdminError::Host`], naming `doing`; what was answered before is there.
    pub async fn answers(
        &self,
        doing: impl Display,
        sql: &str,
        rows_max: usize,
        answers: &mut Vec<StatementResult>,
    ) -> Result<(), AdminError> {
        let refused = |cause| self.refused(&doing, cause);
        let mut messages = pin!(self.client.simple_query_raw(sql).await.map_err(refused)?);
        let (mut answer, mut kept) = (StatementResult::default(), 0);
        while let Some(message) = messages.next().await {
            match message.map_err(refused)? {
                SimpleQueryMessage::RowDescription(columns) => {
                    answer.columns = columns.iter().map(|column| column.name().to_owned()).collect();
                }
                SimpleQueryMessage::Row(row) if kept < rows_max => {
                    kept += 1;
                    answer.rows.push((0..row.len()).map(|index| row.get(index).map(str::to_owned)).collect());
                }
                SimpleQueryMessage::Row(_) => answer.truncated = true,
                SimpleQueryMessage::CommandComplete(count) => {
                    answer.row_count = count;
                    answers.push(std::mem::take(&mut answer));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Copies the rows of `out` (a COPY … TO STDOUT) to `into` (a COPY … FROM STDIN) at `other`.
    pub async fn copy_to(
        &self,
        other: &Self,
        doing: impl Display,
        out: &str,
        into: &str,
    ) -> Result<(), AdminError> {
        let rows = self.client.copy_out(out).await.map_err(|cause| self.refused(&doing, cause))?;
        let rows = rows.map_err(|cause| self.refused(&doing, cause));
        let sink = other.client.copy_in(into).await.map_err(|cause| other.refused(&doing, cause))?;
        let mut sink = pin!(sink.sink_map_err(|cause| other.refused(&doing, cause)));
        sink.send_all(&mut pin!(rows)).await?;
        sink.close().await
    }

    /// `current_database` and `session_user`, as the server reports them.
    pub async fn identity(&self) -> Result<(String, String), AdminError> {
        let said = self
            .client
            .simple_query("SELECT CURRENT_CATALOG, SESSION_USER")
            .await
            .map_err(|cause| self.refused("asking for the current role", cause))?;
        let row = said.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let column = |index| row.and_then(|row| row.get(index)).unwrap_or_default().to_owned();
        Ok((column(0), column(1)))
    }

    fn refused(&self, doing: impl Display, cause: tokio_postgres::Error) -> AdminError {
        AdminError::Host { host: self.host.clone(), doing: doing.to_string(), cause }
    }
}

impl AdminRights {
    /// The privilege that is missing for onboarding; `None`: nothing.
    pub fn missing(&self) -> Option<&'static str> {
        match (self.superuser, self.create_databases, self.create_roles) {
            (true, _, _) | (_, true, true) => None,
            (_, false, true) => Some("CREATEDB"),
            (_, true, false) => Some("CREATEROLE"),
            (_, false, false) => Some("CREATEDB and CREATEROLE"),
        }
    }

    /// GRANT that makes the administrator a member of a role it created, so that it may give the role a
    /// database and act on its objects.
    pub fn join(&self, quoted_role: &str) -> String {
        match self.superuser {
            true => String::new(),
            false => format!("GRANT {quoted_role} TO CURRENT_USER{};\n", self.membership_options()),
        }
    }

    /// The end of a GRANT of a role by which the member has its privileges and may SET ROLE.
    pub fn membership_options(&self) -> &'static str {
        match self.server_version >= MEMBERSHIP_OPTIONS_SINCE {
            true => " WITH INHERIT TRUE, SET TRUE",
            false => "",
        }
    }
}
