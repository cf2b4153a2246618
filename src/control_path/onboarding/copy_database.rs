//! Copies a moving tenant's database: creates an empty one on the new host, then definitions, then rows, by
//! replication ([`replication`](super::replication)) or by a dump.
//!
//! Code that the tenant defined runs only in a session of the tenant's role on the new host. The
//! administrator creates the empty database and its extensions, and grants privileges.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Work,
    carried_roles::Carried,
    extensions::Extensions,
    grants,
    move_tenant::hold,
    operation::Passwords,
    replication::{self, Following, Schema, Stopped},
    roles::Roles,
    source_host::Source,
    undo::drop_database,
};
use crate::control_path::admin::{
    actor::AdminError,
    host_connection::{HostAdmin, HostSession},
    pg_dump::{CopyPrograms, Definitions, Part, Restorer},
};

/// The source and the roles of a copy.
pub(super) struct Copy<'a> {
    pub source: &'a Source,
    /// The administrator in the tenant's database on the old host.
    pub origin: HostSession,
    pub programs: &'a CopyPrograms,
    pub extensions: Extensions,
    pub carried: &'a Carried,
    pub made: Roles,
    pub passwords: Passwords,
}

impl Copy<'_> {
    /// Creates an empty database on the new host, closed to other roles, with the extensions it needs.
    pub async fn make_database(&self, work: &Work<'_>) -> Result<(), AdminError> {
        let (source, made) = (self.source, &self.made);
        let close = grants::close_database(&source.database, made);
        let close = close.split(";\n").map(str::to_owned);
        let admit = self.carried.admit(&source.database);
        for statement in source.create_database(made).into_iter().chain(close).chain(admit) {
            work.session.run("making the database on the new host", &statement).await?;
        }
        let inside = work.admin.connect_to(&source.database).await?;
        grants::grant_inside(&inside, made).await?;
        let tenant = self.tenant(work).await?;
        self.extensions.make(&self.origin, &inside, &tenant, made, &self.carried.names()).await
    }

    /// A session of the tenant's role in its new database.
    async fn tenant(&self, work: &Work<'_>) -> Result<HostSession, AdminError> {
        let (role, password) = (&self.made.read_write, &self.passwords.read_write);
        work.admin.prove_login(role, password, &self.source.database).await
    }

    fn restorer<'b>(&'b self, host: &'b HostAdmin) -> Restorer<'b> {
        Restorer {
            host,
            database: &self.source.database,
            role: &self.made.read_write,
            password: &self.passwords.read_write,
        }
    }

    async fn define(&self, work: &Work<'_>, definitions: &Definitions) -> Result<(), AdminError> {
        let made = self.extensions.schemas();
        self.programs.define(&self.restorer(&work.admin), definitions, &made).await
    }

    /// Creates all definitions, without rows, and tries whether their owners can have them. Returns the source's
    /// schema.
    pub async fn make_schema(&self, work: &Work<'_>) -> Result<Schema, AdminError> {
        let (programs, source) = (self.programs, self.source);
        let (schema, definitions) = Schema::look(programs, source, &self.origin).await?;
        self.define(work, &definitions).await.map_err(|error| {
            AdminError::Refused(format!(
                "host {:?} does not let the tenant's role create all objects of the tenant: {error}. pglobby creates \
                 nothing of a tenant with the administrator's rights. Drop the object on host {:?}, or make it part of an extension",
                work.admin.name, source.admin.name
            ))
        })?;
        self.carried.give(work, source, &self.origin, &self.made, true).await?;
        Ok(schema)
    }

    /// Gives owners what is theirs, and the tenant's roles their settings.
    pub async fn give_owners(&self, work: &Work<'_>) -> Result<(), AdminError> {
        self.carried.give(work, self.source, &self.origin, &self.made, false).await
    }

    /// The copied objects belong to the tenant; this grants its read-only role access.
    async fn grant(&self, work: &Work<'_>) -> Result<(), AdminError> {
        let inside = work.admin.connect_to(&self.source.database).await?;
        grants::grant_inside(&inside, &self.made).await
    }

    /// Copies by replication while clients work, and pauses them for the last changes. Returns when the
    /// pause began.
    pub async fn follow(
        &self,
        work: &mut Work<'_>,
        schema: Schema,
        patience: Duration,
    ) -> Result<Instant, Stopped> {
        let tenant = self.tenant(work).await?;
        let before = (schema, &self.origin);
        let after = (&self.made, &tenant);
        let mut following = Following::begin(work, self.source, self.programs, before, after).await?;
        self.grant(work).await?;
        work.record("owned").await?;
        following.subscribe(work).await?;
        let held = hold(work, self.source, patience).await.map_err(Stopped::Failed)?;
        following.catch_up(patience).await?;
        work.record("caught up").await?;
        replication::sweep(work.actor, &work.lock, &mut work.operation).await.map_err(Stopped::Failed)?;
        work.record("copied").await?;
        Ok(held)
    }

    /// Pauses clients and copies by a dump. Returns when the pause began.
    pub async fn dump(&self, work: &mut Work<'_>, patience: Duration) -> Result<Instant, AdminError> {
        replication::sweep(work.actor, &work.lock, &mut work.operation).await?;
        let held = hold(work, self.source, patience).await?;
        // The new database has constraints and triggers already, and its schema may be outdated.
        drop_database(&work.admin, &work.session, &self.source.database).await?;
        self.make_database(work).await?;
        work.record("database").await?;
        let (programs, admin, database) = (self.programs, &self.source.admin, &self.source.database);
        let before = programs.definitions(admin, database, Part::BeforeRows).await?;
        self.define(work, &before).await?;
        let filled = self.extensions.filled();
        programs.copy_rows(admin, &self.restorer(&work.admin), &filled).await?;
        let after = programs.definitions(admin, database, Part::AfterRows).await?;
        self.define(work, &after).await?;
        work.record("copied").await?;
        self.grant(work).await?;
        work.record("owned").await?;
        Ok(held)
    }
}
