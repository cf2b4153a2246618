//! Extensions of a moving tenant. They are created in its new database while that is empty, so that their
//! scripts meet nothing the tenant defined. The administrator creates those that the tenant's role may not
//! (untrusted extensions) here and never later.

use super::{
    names::{ident, literal},
    roles::Roles,
    source_host::Source,
};
use crate::control_path::admin::{
    actor::AdminError,
    host_connection::{AdminRights, HostSession},
};

/// In order of creation, because one may need another.
const EXTENSIONS: &str = r"
SELECT e.extname::text, n.nspname::text, n.oid, pg_catalog.pg_get_userbyid(e.extowner)::text
FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
WHERE e.extname <> 'plpgsql' ORDER BY e.oid";

/// Tables and sequences of extensions that hold user data: name, whether it is a sequence, columns, and the
/// condition for rows.
const CONTENT: &str = r"
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), c.relkind = 'S', coalesce(u.condition, ''),
       (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY a.attnum)
        FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '')
FROM pg_catalog.pg_extension e, unnest(e.extconfig, e.extcondition) AS u (relation, condition)
JOIN pg_catalog.pg_class c ON c.oid = u.relation JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'S') AND e.extname <> 'plpgsql' ORDER BY e.oid, c.oid";

/// Foreign data wrappers of extensions that `$1` may use.
const WRAPPERS: &str = r"
SELECT pg_catalog.quote_ident(w.fdwname) FROM pg_catalog.pg_foreign_data_wrapper w
WHERE pg_catalog.has_foreign_data_wrapper_privilege($1, w.oid, 'USAGE') AND EXISTS (
    SELECT FROM pg_catalog.pg_depend d
    WHERE d.classid = 'pg_catalog.pg_foreign_data_wrapper'::regclass AND d.objid = w.oid AND d.deptype = 'e')";

/// Whether the extension is available on the new host, and whether creating it needs a superuser.
const AVAILABLE: &str = r"
SELECT a.name::text, v.superuser AND NOT v.trusted
FROM pg_catalog.pg_available_extensions a
JOIN pg_catalog.pg_available_extension_versions v ON v.name = a.name AND v.version = a.default_version
WHERE a.name = ANY ($1)";

/// Schemas that exist in every database.
const ALWAYS_THERE: [&str; 2] = ["public", "pg_catalog"];

/// The extensions of a tenant's database on the old host.
pub(super) struct Extensions {
    all: Vec<Extension>,
    content: Vec<Content>,
    wrappers: Vec<String>,
}

struct Extension {
    name: String,
    schema: String,
    /// On the old host.
    schema_oid: u32,
    /// Its owner, if the tenant's role can create it or act as its owner.
    maker: Option<Maker>,
}

enum Maker {
    Tenant,
    /// A role that the tenant's role may act as.
    Other(String),
}

struct Content {
    /// Quoted.
    relation: String,
    is_sequence: bool,
    condition: String,
    columns: String,
}

impl Extensions {
    /// Finds the extensions of the old database, and checks that the new host can have them.
    ///
    /// # Errors
    /// A host; or [`AdminError::Refused`] where the new one cannot have it.
    pub async fn look(
        source: &Source,
        origin: &HostSession,
        target: &HostSession,
        rights: AdminRights,
        host: &str,
    ) -> Result<Self, AdminError> {
        let owner = &source.roles.read_write;
        let found = origin.query("listing extensions", EXTENSIONS, &[]).await?;
        let names: Vec<String> = found.iter().map(|row| row.get(0)).collect();
        let available = target.query("looking for extensions", AVAILABLE, &[&names]).await?;
        let mut all = Vec::with_capacity(found.len());
        for row in &found {
            let name: String = row.get(0);
            let there = available.iter().find(|there| there.get::<_, String>(0) == name);
            let Some(needs_superuser) = there.map(|there| there.get::<_, bool>(1)) else {
                return Err(AdminError::Refused(format!(
                    "extension {name:?} of the tenant is not installed on host {host:?}"
                )));
            };
            if needs_superuser && !rights.superuser {
                return Err(AdminError::Refused(format!(
                    "extension {name:?} of the tenant takes a superuser to make, and the administrator of host {host:?} \
                     is none; register one with `pglobby host set`, or drop the extension"
                )));
            }
            let maker: String = row.get(3);
            let maker = if maker == *owner { Maker::Tenant } else { Maker::Other(maker) };
            let maker = Some(maker).filter(|_| !needs_superuser);
            all.push(Extension { name, schema: row.get(1), schema_oid: row.get(2), maker });
        }
        let content = origin.query("listing what extensions keep", CONTENT, &[]).await?;
        let content = content.iter().map(|row| Content {
            relation: row.get(0),
            is_sequence: row.get(1),
            condition: row.get(2),
            columns: row.get(3),
        });
        let wrappers = origin.texts("listing foreign data wrappers", WRAPPERS, &[owner]).await?;
        Ok(Self { all, content: content.collect(), wrappers })
    }

    /// Creates them in the empty database: `inside` is a session of the administrator, `tenant` one of the
    /// tenant's role, which acts as the `carried` ones. Copies their user data from `origin`.
    pub async fn make(
        &self,
        origin: &HostSession,
        inside: &HostSession,
        tenant: &HostSession,
        roles: &Roles,
        carried: &[&str],
    ) -> Result<(), AdminError> {
        let owner = ident(&roles.read_write);
        for extension in &self.all {
            let (name, schema) = (ident(&extension.name), ident(&extension.schema));
            let doing = format!("making extension {name}");
            if !ALWAYS_THERE.contains(&extension.schema.as_str()) {
                let sql = format!("CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {owner}");
                inside.run(&doing, &sql).await?;
            }
            let sql = format!("CREATE EXTENSION IF NOT EXISTS {name} SCHEMA {schema}");
            match &extension.maker {
                Some(Maker::Tenant) => tenant.run(&doing, &sql).await?,
                Some(Maker::Other(role)) if carried.contains(&role.as_str()) => {
                    tenant.run(&doing, &format!("SET ROLE {}", ident(role))).await?;
                    tenant.run(&doing, &sql).await?;
                    tenant.run(&doing, "RESET ROLE").await?;
                }
                Some(Maker::Other(_)) | None => inside.run(&doing, &sql).await?,
            }
        }
        for content in &self.content {
            content.copy(origin, inside).await?;
        }
        for wrapper in &self.wrappers {
            let owners = carried.iter().map(|role| format!(", {}", ident(role))).collect::<String>();
            let sql = format!("GRANT USAGE ON FOREIGN DATA WRAPPER {wrapper} TO {owner}{owners}");
            inside.run("letting the tenant use a foreign data wrapper", &sql).await?;
        }
        Ok(())
    }

    /// Schemas that [`Extensions::make`] creates, by oid on the old host.
    pub fn schemas(&self) -> Vec<u32> {
        let made = self.all.iter().filter(|extension| !ALWAYS_THERE.contains(&extension.schema.as_str()));
        made.map(|extension| extension.schema_oid).collect()
    }

    /// Tables whose rows [`Extensions::make`] copies.
    pub fn filled(&self) -> Vec<String> {
        self.content.iter().map(|content| content.relation.clone()).collect()
    }
}

impl Content {
    /// As the administrator on both sides: table and condition belong to the extension.
    async fn copy(&self, origin: &HostSession, inside: &HostSession) -> Result<(), AdminError> {
        let Self { relation, condition, columns, .. } = self;
        let doing = format!("copying what {relation} keeps");
        if self.is_sequence {
            let sql = format!("SELECT last_value, is_called FROM {relation}");
            for row in origin.query(&doing, &sql, &[]).await? {
                let (value, called): (i64, bool) = (row.get(0), row.get(1));
                let name = literal(relation);
                let sql = format!("SELECT pg_catalog.setval({name}::pg_catalog.regclass, {value}, {called})");
                inside.run(&doing, &sql).await?;
            }
            return Ok(());
        }
        let out = format!("COPY (SELECT {columns} FROM ONLY {relation} {condition}) TO STDOUT");
        origin.copy_to(inside, &doing, &out, &format!("COPY {relation} ({columns}) FROM STDIN")).await
    }
}
