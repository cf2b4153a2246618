//! `tenant adopt`: makes an existing database a tenant's. The database keeps its owner. The tenant gets
//! roles of its own, or keeps the application's role, and acts as the owners of what is in the database
//! ([`ownership`]). Other access to the tables is granted when its first pool is made.

use async_trait::async_trait;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio_postgres::GenericClient;

use super::{
    DatabaseSource, Made, Names, NewTenant, Work, grants, make_tenant,
    names::{check_identifier, ident, literal, shell_word},
    operation::{Passwords, TenantLock},
    ownership::{self, Ownership},
    roles::{OwnRole, Roles},
};
use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        host_connection::{HostAdmin, HostSession},
    },
    secrets::scram_verifier::scram_verifier,
};

/// A request to adopt a database.
#[derive(Debug, Clone, Default)]
pub struct AdoptTenant {
    /// Name of the tenant.
    pub name: String,
    /// Host of the database; `None`: see [`choose_host`](super::choose_host).
    pub host: Option<String>,
    /// `None`: the tenant's name.
    pub database: Option<String>,
    /// Another role whose future tables the tenant may use, besides the present owners.
    pub owner: Option<String>,
    /// `None`: a member of the owners for which that is safe and possible.
    pub ownership: Option<Ownership>,
    /// An existing role that becomes the tenant's. `None`: one is made.
    pub username: Option<String>,
    /// Its present password, which stays. `None`: it gets a generated one.
    pub password: Option<SecretString>,
}

/// Makes an existing database a tenant's, or changes nothing.
///
/// # Errors
/// [`AdminError`]; all that was made is undone again.
pub async fn adopt(actor: &Actor, wanted: &AdoptTenant) -> Result<NewTenant, AdminError> {
    make_tenant(actor, wanted).await
}

#[async_trait]
impl DatabaseSource for AdoptTenant {
    const KIND: &'static str = "adopt";
    const ADOPTED: bool = true;

    fn names(&self) -> Names<'_> {
        Names { tenant: &self.name, host: self.host.as_deref(), database: self.database.as_deref() }
    }

    fn check(&self, _: &str) -> Result<(), AdminError> {
        if self.password.is_some() && self.username.is_none() {
            return Err(AdminError::Invalid("a password is for an existing role (username)".to_owned()));
        }
        for role in [&self.owner, &self.username].into_iter().flatten() {
            check_identifier("role", role)?;
        }
        Ok(())
    }

    fn arguments(&self) -> Value {
        let ownership = ownership::recorded(self.ownership);
        json!({ "owner": self.owner, "ownership": ownership, "username": self.username })
    }

    fn password(&self) -> Option<&SecretString> {
        self.password.as_ref()
    }

    async fn build(
        &self,
        work: &mut Work<'_>,
        database: &str,
        passwords: &Passwords,
    ) -> Result<Made, AdminError> {
        let taken = inspect(work, database).await?;
        let inside = work.admin.connect_to(database).await?;
        let given = self.username.as_deref();
        grants::refuse_out_of_reach(&inside).await?;
        if let Some(owner) = &self.owner {
            refuse_foreign_owner(work, owner).await?;
        }
        if let Some(role) = given {
            ownership::check_given(work, &inside, role, self.password.is_some()).await?;
        }
        ownership::refuse_shared(&inside, given).await?;
        let roles = work.make_roles(passwords, given.map_or(OwnRole::Derived, OwnRole::Existing)).await?;
        // Recorded before it is revoked, so that undoing restores exactly this.
        work.operation.arguments["taken_from_public"] = taken.into();
        work.record("roles").await?;

        for statement in grants::close_database(database, &roles).split(";\n") {
            work.session.run("revoking access of other roles", statement).await?;
        }
        work.record("closed").await?;
        let owner = self.owner.as_deref();
        let reset = ownership::reset_identity(work, database).await?;
        let mut owned = ownership::take(work, &inside, &roles.read_write, owner, self.ownership).await?;
        owned.notes.extend(reset);
        drop(inside);
        work.record("owned").await?;
        if given.is_some() && self.password.is_none() {
            // Last, because it cannot be taken back.
            let verifier = scram_verifier(&passwords.read_write);
            let (role, verifier) = (ident(&roles.read_write), literal(verifier.expose_secret()));
            let sql = format!("ALTER ROLE {role} PASSWORD {verifier}");
            work.session.run("giving the tenant's role a new password", &sql).await?;
        }
        work.verify_logins(database, &roles, passwords).await?;
        work.record("verified").await?;
        let sealed = passwords.seal(work.actor, work.operation.tenant_id)?;
        Ok(Made { roles, sealed, adoption: Some(owned), role_given: given.is_some() })
    }
}

/// Checks that the database can be a tenant's. Returns PUBLIC's privileges on it.
async fn inspect(work: &Work<'_>, database: &str) -> Result<Vec<String>, AdminError> {
    let sql = "SELECT datistemplate, datallowconn, pg_catalog.pg_has_role(datdba, 'USAGE'),
                      pg_catalog.pg_get_userbyid(datdba)::text,
                      ARRAY(SELECT DISTINCT a.privilege_type FROM pg_catalog.aclexplode(
                                coalesce(datacl, pg_catalog.acldefault('d', datdba))) a
                            WHERE a.grantee = 0 ORDER BY 1)
               FROM pg_catalog.pg_database WHERE datname = $1";
    let rows = work.session.query("looking at the database", sql, &[&database]).await?;
    let (name, host) = (&work.lock.name, &work.admin.name);
    let Some(row) = rows.first() else {
        return Err(AdminError::Refused(format!(
            "there is no database {database:?} on host {host:?}; make a new one with `pglobby tenant create {}`, or \
             name an existing one with --database",
            shell_word(name)
        )));
    };
    let (template, connections, reachable, owner): (bool, bool, bool, String) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    if template || !connections {
        return Err(AdminError::Refused(format!(
            "database {database:?} is a template or takes no connections; a tenant needs an ordinary database"
        )));
    }
    if !reachable {
        return Err(AdminError::Refused(format!(
            "database {database:?} belongs to {owner:?}, and the host's administrator {:?} is no member of that role; GRANT the one \
             to the other, or register a superuser with `pglobby host set {}`",
            work.admin.user,
            shell_word(host)
        )));
    }
    Ok(row.get(4))
}

async fn refuse_foreign_owner(work: &Work<'_>, owner: &str) -> Result<(), AdminError> {
    let sql = "SELECT pg_catalog.pg_has_role(oid, 'USAGE') FROM pg_catalog.pg_roles WHERE rolname = $1";
    let rows = work.session.query("looking at the owner", sql, &[&owner]).await?;
    match rows.first().map(|row| row.get::<_, bool>(0)) {
        Some(true) => Ok(()),
        Some(false) => Err(AdminError::Refused(format!(
            "the host's administrator {:?} cannot act for {owner:?}; GRANT the one to the other first",
            work.admin.user
        ))),
        None => Err(AdminError::Refused(format!("there is no role {owner:?} on host {:?}", work.admin.name))),
    }
}

/// Grants an adopted tenant's roles access to its tables. Called before its first pool is made. Idempotent;
/// a second call waits for the first. Does nothing unless `grants_pending`.
///
/// # Errors
/// The host or the central database; then the grants stay pending.
pub async fn complete_grants(actor: &Actor, tenant_id: i64) -> Result<(), AdminError> {
    let pending = "SELECT name, host, database, username, ro_username FROM pglobby.tenants
                   WHERE id = $1 AND grants_pending AND status IN ('active', 'suspended')";
    let client = actor.central.client().await?;
    let Some(row) = client.query_opt(pending, &[&tenant_id]).await? else { return Ok(()) };
    drop(client);

    let mut lock = TenantLock::take(actor, row.get("name")).await?;
    let Some(row) = lock.client.query_opt(pending, &[&tenant_id]).await? else { return Ok(()) };
    let admin = HostAdmin::load(actor, &lock.client, row.get("host")).await?;
    let read_only: Option<String> = row.get("ro_username");
    let roles = Roles { read_write: row.get("username"), read_only: read_only.unwrap_or_default() };
    let inside = admin.connect_to(row.get("database")).await?;
    grant(&lock.client, tenant_id, &inside, &roles).await?;

    let name = lock.name.clone();
    let transaction = lock.client.transaction().await?;
    let sql = "UPDATE pglobby.tenants SET grants_pending = false WHERE id = $1";
    transaction.execute(sql, &[&tenant_id]).await?;
    actor.commit(transaction, "tenant.grants", Some(&name), &json!({})).await
}

/// Grants the roles of an adopted tenant what its adoption promised.
pub(super) async fn grant(
    client: &impl GenericClient,
    tenant_id: i64,
    inside: &HostSession,
    roles: &Roles,
) -> Result<(), AdminError> {
    let asked = "SELECT arguments ->> 'owner', arguments ->> 'ownership' FROM pglobby.operations
                 WHERE tenant_id = $1 AND kind = 'adopt' ORDER BY id DESC LIMIT 1";
    let asked = client.query_opt(asked, &[&tenant_id]).await?;
    let text = |column| asked.as_ref().and_then(|row| row.get::<_, Option<String>>(column));
    let transferred = text(1).as_deref() == Some("transfer");
    grants::grant_adopted(inside, roles, text(0).as_deref(), transferred).await
}
