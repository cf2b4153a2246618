//! `tenant create`: makes a tenant with a new database.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use super::{
    DatabaseSource, Made, Names, NewTenant, Work, grants, make_tenant,
    names::{check_identifier, ident, shell_word},
    operation::Passwords,
    reown,
    roles::{OwnRole, Roles},
    schema_files::SchemaFile,
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    pg_dump::Restorer,
};

/// A template with connections cannot be copied. The server waits 5 s at each attempt.
const TEMPLATE_WAIT: Duration = Duration::from_secs(60);
const TEMPLATE_PAUSE: Duration = Duration::from_millis(250);

/// A request to create a tenant.
#[derive(Debug, Clone, Default)]
pub struct CreateTenant {
    /// Name of the tenant.
    pub name: String,
    /// `None`: the accepting host with the fewest tenants.
    pub host: Option<String>,
    /// `None`: the tenant's name, so that `current_database()` returns what the client asked for.
    pub database: Option<String>,
    /// The database to copy; `None`: the server's `template1`.
    pub template: Option<String>,
    /// SQL files, run in this order in the new database as the tenant's role.
    pub schema: Vec<SchemaFile>,
}

/// Makes a tenant, or nothing. What an interrupted run left of it is undone first.
///
/// # Errors
/// [`AdminError`]; all that was made is undone again.
pub async fn create(actor: &Actor, wanted: &CreateTenant) -> Result<NewTenant, AdminError> {
    make_tenant(actor, wanted).await
}

#[async_trait]
impl DatabaseSource for CreateTenant {
    const KIND: &'static str = "create";
    const ADOPTED: bool = false;

    fn names(&self) -> Names<'_> {
        Names { tenant: &self.name, host: self.host.as_deref(), database: self.database.as_deref() }
    }

    fn check(&self, central_database: &str) -> Result<(), AdminError> {
        let Some(template) = &self.template else { return Ok(()) };
        check_identifier("template database", template)?;
        match template == central_database {
            true => Err(AdminError::Invalid("the central database cannot be a template".to_owned())),
            false => Ok(()),
        }
    }

    fn arguments(&self) -> Value {
        json!({ "template": self.template })
    }

    async fn build(
        &self,
        work: &mut Work<'_>,
        database: &str,
        passwords: &Passwords,
    ) -> Result<Made, AdminError> {
        refuse_taken(work, database).await?;
        let roles = work.make_roles(passwords, OwnRole::Derived).await?;
        work.record("roles").await?;

        create_database(work, database, self.template.as_deref(), &roles).await?;
        work.record("database").await?;

        let open = format!(
            "{};\nALTER DATABASE {} ALLOW_CONNECTIONS true",
            grants::close_database(database, &roles),
            ident(database)
        );
        for statement in open.split(";\n") {
            work.session.run("revoking access of other roles", statement).await?;
        }
        work.record("closed").await?;

        let inside = work.admin.connect_to(database).await?;
        reown::reown(&inside, &roles.read_write).await?;
        work.record("owned").await?;
        grants::grant_inside(&inside, &roles).await?;
        drop(inside);
        work.record("granted").await?;

        for (index, file) in self.schema.iter().enumerate() {
            let (role, password) = (&roles.read_write, &passwords.read_write);
            file.load(&Restorer { host: &work.admin, database, role, password }).await?;
            work.record(&format!("schema {}", index + 1)).await?;
        }
        work.verify_logins(database, &roles, passwords).await?;
        work.record("verified").await?;
        let sealed = passwords.seal(work.actor, work.operation.tenant_id)?;
        Ok(Made { roles, sealed, adoption: None, role_given: false })
    }
}

async fn refuse_taken(work: &Work<'_>, database: &str) -> Result<(), AdminError> {
    let sql = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = $1";
    if work.session.query("looking for the database", sql, &[&database]).await?.is_empty() {
        return Ok(());
    }
    let (name, host) = (&work.lock.name, &work.admin.name);
    Err(AdminError::Exists(format!(
        "database {database:?} exists already on host {host:?}; take it in with `pglobby tenant adopt {}`, or give \
         --database another name",
        shell_word(name)
    )))
}

/// The tenant's role owns the database from its creation; by that an interrupted run's database is
/// recognised. It accepts no connections until PUBLIC's access is revoked.
async fn create_database(
    work: &Work<'_>,
    database: &str,
    template: Option<&str>,
    roles: &Roles,
) -> Result<(), AdminError> {
    let template = template.map(|template| format!(" TEMPLATE {}", ident(template))).unwrap_or_default();
    let sql = format!(
        "CREATE DATABASE {} OWNER {}{template} ALLOW_CONNECTIONS false",
        ident(database),
        ident(&roles.read_write)
    );
    let give_up = Instant::now() + TEMPLATE_WAIT;
    loop {
        match work.session.run("creating the database", &sql).await {
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) && Instant::now() < give_up => {
                tracing::info!(database, "template in use; retrying");
                tokio::time::sleep(TEMPLATE_PAUSE).await;
            }
            result => return result,
        }
    }
}
