//! Creates, adopts, rotates, moves, renames and drops tenants: role, database, privileges, credentials.
//! Each either completes or leaves nothing behind, even if the process dies.
//!
//! Each piece of work is a recorded [`operation`] under a lock on the tenant:
//! - [`create`](create::create): roles; a database, closed to others and owned by the tenant; schema files;
//!   test logins; active;
//! - [`adopt`](adopt::adopt): the same for an existing database; the tenant's role becomes a member of the
//!   owners or the owner itself ([`ownership`]); other access to its tables is granted with its first pool
//!   ([`adopt::complete_grants`]);
//! - [`rotate`](rotate::rotate): new passwords on the host and in the row, verified by test logins;
//! - [`move`](self::move_tenant::move_tenant): roles and database on another host: paused, copied,
//!   verified, switched;
//! - [`rename`](rename::rename): another name;
//! - [`drop`](drop::drop_tenant): refuses clients, ends servers, drops the database, keeps a tombstone.
//!
//! If a run dies while it creates or adopts, the next run undoes its work and starts again. A drop is
//! always continued. If no operator runs the command again, a node does the same ([`abandoned`]).

pub mod abandoned;
pub mod adopt;
mod carried_roles;
mod copy_database;
pub mod create;
pub mod drop;
mod extensions;
pub mod grants;
pub mod move_tenant;
pub mod names;
pub mod operation;
pub mod ownership;
pub mod rename;
pub mod reown;
pub mod repair;
mod replication;
mod replication_checks;
pub mod role_attributes;
pub mod roles;
pub mod rotate;
pub mod schema_files;
mod source_host;
mod subscriptions;
mod undo;

use async_trait::async_trait;
use secrecy::SecretString;
use serde::Serialize;
use serde_json::Value;
use tokio_postgres::{GenericClient, error::SqlState};

use self::{
    names::{check_database_name, check_tenant_name, shell_word},
    operation::{Operation, Passwords, SealedPasswords, TenantLock},
    undo::{forget, undo_after},
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    fields::described,
    host_connection::{AdminRights, HostAdmin, HostSession},
};

pub use self::undo::undo_remains;

described! {
    /// The answer of `tenant create` and `tenant adopt`.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct NewTenant {
        /// `tenants.name`.
        pub name: String,
        /// `active`.
        pub status: String,
        /// Its host.
        pub host: String,
        /// Its database there.
        pub database: String,
        /// Its own role there.
        pub username: String,
        /// Of an adopted database: its read-only role.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub ro_username: Option<String>,
        /// Of an adopted database: owners of its objects that its role is a member of, and acts as.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub member_of: Option<Vec<String>>,
        /// Of an adopted database: how many objects its role was made the owner of.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub transferred: Option<i64>,
        /// Of an adopted database: what its role may not do, and what to do about it.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub notes: Option<Vec<String>>,
    }
}

/// Work in progress: the lock, the record, and the host.
struct Work<'a> {
    actor: &'a Actor,
    lock: TenantLock,
    operation: Operation,
    admin: HostAdmin,
    session: HostSession,
    rights: AdminRights,
}

/// Roles and credentials for the row of the finished tenant.
struct Made {
    roles: roles::Roles,
    sealed: SealedPasswords,
    /// Of an adopted database.
    adoption: Option<ownership::Owned>,
    /// The role existed before.
    role_given: bool,
}

struct NewRow<'a> {
    host: &'a str,
    database: &'a str,
    adopted: bool,
}

impl Work<'_> {
    async fn record(&mut self, step: &str) -> Result<(), AdminError> {
        self.operation.record(self.actor, &self.lock, step).await
    }

    /// Creates the tenant's two roles with the operation's mark, or only the read-only one if the other
    /// exists. Retries with other names if a role of that name was created meanwhile.
    async fn make_roles(
        &self,
        passwords: &Passwords,
        own: roles::OwnRole<'_>,
    ) -> Result<roles::Roles, AdminError> {
        loop {
            let mut chosen = roles::choose(&self.session, &self.lock.name).await?;
            if let Some(name) = own.name() {
                name.clone_into(&mut chosen.read_write);
            }
            let mark = self.operation.argument("mark");
            let exists = matches!(own, roles::OwnRole::Existing(_));
            match roles::create(&self.session, &self.rights, &chosen, passwords, mark, exists).await {
                Err(error @ AdminError::Exists(_)) => {
                    // Ends: each round means one more existing role, and `choose` has a limit.
                    if let roles::OwnRole::Named(name) = own
                        && roles::exists(&self.session, name).await?
                    {
                        return Err(error);
                    }
                }
                made => return made.map(|()| chosen),
            }
        }
    }

    /// Logs in as both roles like a pool does.
    async fn verify_logins(
        &self,
        database: &str,
        roles: &roles::Roles,
        passwords: &Passwords,
    ) -> Result<(), AdminError> {
        for (role, password) in
            [(&roles.read_write, &passwords.read_write), (&roles.read_only, &passwords.read_only)]
        {
            self.admin.prove_login(role, password, database).await?;
        }
        Ok(())
    }

    /// Activates the tenant and closes the operation in one transaction.
    async fn open_tenant(mut self, made: Made, row: &NewRow<'_>) -> Result<NewTenant, AdminError> {
        let transaction = self.lock.client.transaction().await?;
        transaction
            .execute(
                "UPDATE pglobby.tenants SET status = 'active', username = $2, ro_username = $3, grants_pending = $4,
                    sealed_password = $5, sealed_ro_password = $6, role_given = $7
                 WHERE id = $1 AND status = 'provisioning'",
                &[
                    &self.operation.tenant_id,
                    &made.roles.read_write,
                    &made.roles.read_only,
                    &row.adopted,
                    &made.sealed.read_write,
                    &made.sealed.read_only,
                    &made.role_given,
                ],
            )
            .await?;
        // Only undoing needs it, and it may be long.
        self.operation.arguments["give_back"].take();
        self.operation.remember_in(&transaction, &self.lock.name).await?;
        self.operation.close(&transaction, "done", &self.lock.name).await?;
        let mut new = NewTenant {
            name: self.lock.name.clone(),
            status: "active".to_owned(),
            host: row.host.to_owned(),
            database: row.database.to_owned(),
            username: made.roles.read_write.clone(),
            ro_username: None,
            member_of: None,
            transferred: None,
            notes: None,
        };
        if let Some(owned) = made.adoption {
            new.ro_username = Some(made.roles.read_only);
            new.member_of = Some(owned.member_of);
            new.transferred = Some(owned.transferred);
            new.notes = Some(owned.notes);
        }
        let detail = serde_json::json!({
            "host": new.host, "database": new.database, "username": new.username, "operation": self.operation.id,
            "role_given": made.role_given, "member_of": new.member_of, "transferred": new.transferred,
        });
        let action = format!("tenant.{}", self.operation.kind);
        self.actor.commit(transaction, &action, Some(&self.lock.name), &detail).await?;
        self.actor.report(&self.lock.name, "active").await;
        Ok(new)
    }
}

/// Where a new tenant's database comes from: `create` makes it, `adopt` finds it.
#[async_trait]
trait DatabaseSource: Sync {
    /// `operations.kind`.
    const KIND: &'static str;
    /// The database exists before the tenant does.
    const ADOPTED: bool;

    fn names(&self) -> Names<'_>;

    /// Checks what is not a name of [`Names`].
    fn check(&self, central_database: &str) -> Result<(), AdminError>;

    /// What is recorded of the request beside its names.
    fn arguments(&self) -> Value;

    /// The password of a role that exists already.
    fn password(&self) -> Option<&SecretString> {
        None
    }

    /// Makes roles and database and verifies them; records each step.
    async fn build(
        &self,
        work: &mut Work<'_>,
        database: &str,
        passwords: &Passwords,
    ) -> Result<Made, AdminError>;
}

struct Names<'a> {
    tenant: &'a str,
    /// `None`: see [`choose_host`].
    host: Option<&'a str>,
    /// `None`: the tenant's name.
    database: Option<&'a str>,
}

/// Makes a tenant from `source`, or undoes all that was made.
async fn make_tenant<S: DatabaseSource>(actor: &Actor, source: &S) -> Result<NewTenant, AdminError> {
    let names = source.names();
    let database = names.database.unwrap_or(names.tenant);
    check_tenant_name(names.tenant, actor.central.database())?;
    check_database_name(database, actor.central.database())?;
    source.check(actor.central.database())?;

    let mut lock = TenantLock::take(actor, names.tenant).await?;
    undo_remains(actor, &mut lock).await?;
    let admin = choose_host(actor, &lock.client, names.host).await?;
    let row = NewRow { host: &admin.name.clone(), database, adopted: S::ADOPTED };
    let mut passwords = Passwords::generate();
    if let Some(password) = source.password() {
        passwords.read_write = password.clone();
    }
    let operation = begin_new(actor, &mut lock, S::KIND, &row, source.arguments()).await?;

    let (session, rights) = match enter_host(&admin, operation.tenant_id).await {
        Ok(entered) => entered,
        Err(error) => {
            forget(actor, &mut lock, &operation).await?;
            return Err(error);
        }
    };
    let mut work = Work { actor, lock, operation, admin, session, rights };
    match source.build(&mut work, database, &passwords).await {
        Ok(made) => work.open_tenant(made, &row).await,
        Err(error) => {
            let Work { mut lock, operation, session, .. } = work;
            drop(session); // with it the lock on the host, which `undo_after` takes
            Err(undo_after(actor, &mut lock, &operation, error).await)
        }
    }
}

/// Inserts a new tenant's row (`provisioning`) and its operation.
async fn begin_new(
    actor: &Actor,
    lock: &mut TenantLock,
    kind: &str,
    row: &NewRow<'_>,
    mut arguments: Value,
) -> Result<Operation, AdminError> {
    arguments["name"] = lock.name.clone().into();
    arguments["host"] = row.host.into();
    arguments["database"] = row.database.into();
    arguments["mark"] = roles::new_mark(kind, &lock.name).into();
    let name = lock.name.clone();
    let transaction = lock.client.transaction().await?;
    let inserted = transaction
        .query_one(
            "INSERT INTO pglobby.tenants (name, host, database, username, adopted) VALUES ($1, $2, $3, $4, $5)
             RETURNING id",
            // The role is named when it is created; until then the mark stands here, which is unique.
            &[&name, &row.host, &row.database, &arguments["mark"].as_str(), &row.adopted],
        )
        .await;
    let tenant_id: i64 = match inserted {
        Ok(inserted) => inserted.get(0),
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
            let of_name = error.as_db_error().and_then(|said| said.constraint()) == Some("tenants_name");
            return Err(AdminError::Exists(match of_name {
                true => {
                    let word = shell_word(&name);
                    format!("tenant {name:?} exists already; see `pglobby tenant show {word}`")
                }
                false => format!(
                    "database {:?} on host {:?} is another tenant's already; see `pglobby tenant list`",
                    row.database, row.host
                ),
            }));
        }
        Err(error) => return Err(error.into()),
    };
    let operation = Operation::begin(&transaction, actor, kind, tenant_id, arguments).await?;
    transaction.commit().await?;
    actor.report_begun(operation.id).await;
    actor.report(&name, "begun").await;
    Ok(operation)
}

/// The administrator's session on the host, under a lock against an interrupted run: a server completes a
/// running CREATE DATABASE even if its client is gone.
async fn enter_host(admin: &HostAdmin, tenant_id: i64) -> Result<(HostSession, AdminRights), AdminError> {
    let session = admin.connect().await?;
    let key = format!("'pglobby tenant {tenant_id}'");
    let lock = format!("SELECT pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended({key}, 0))");
    session.run("waiting for statements of an earlier run", &lock).await?;
    let rights = session.rights().await?;
    match rights.missing() {
        None => Ok((session, rights)),
        Some(missing) => Err(AdminError::Refused(format!(
            "role {:?} on host {:?} lacks {missing}; grant it (ALTER ROLE … {missing}), or register another with \
             `pglobby host set {} admin_user=…`",
            admin.user,
            admin.name,
            shell_word(&admin.name)
        ))),
    }
}

/// The host `wanted`, or the host with the fewest tenants of those that accept tenants.
async fn choose_host(
    actor: &Actor,
    client: &impl GenericClient,
    wanted: Option<&str>,
) -> Result<HostAdmin, AdminError> {
    let fewest = "SELECT name FROM pglobby.hosts h WHERE accepts_tenants ORDER BY
        (SELECT count(*) FROM pglobby.tenants t WHERE t.host = h.name AND t.status <> 'dropped'), name LIMIT 1";
    let name: String = match wanted {
        Some(name) => name.to_owned(),
        None => match client.query_opt(fewest, &[]).await? {
            Some(row) => row.get(0),
            None => {
                return Err(AdminError::Refused(
                    "no host accepts tenants; add one with `pglobby host add`".to_owned(),
                ));
            }
        },
    };
    HostAdmin::load(actor, client, &name).await
}
