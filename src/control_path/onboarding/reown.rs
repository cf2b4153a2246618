//! Gives everything in a database to its tenant: in a cloned one, and in an adopted one if the operator asks.
//!
//! `REASSIGN OWNED` cannot do it, because it would also take the old owner's databases. So each object is
//! named by `pg_identify_object` and altered.

use super::names::ident;
use crate::control_path::admin::{actor::AdminError, host_connection::HostSession};

/// Objects of other owners than `$1`, except those of the system, of extensions, and parts of another
/// object, which follow their table. `$2`: multirange types, instead of all others.
const OWNED: &str = r"
WITH new_owner AS (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = $1),
own_schemas AS (
    SELECT oid FROM pg_catalog.pg_namespace
    WHERE nspname NOT LIKE 'pg\_%' AND nspname <> 'information_schema'
),
owned (classid, objid, owner) AS (
    SELECT 'pg_namespace'::regclass, oid, nspowner FROM pg_catalog.pg_namespace
    WHERE oid IN (SELECT oid FROM own_schemas)
      -- `grants` handles schema public: its owner depends on the PostgreSQL version.
      AND nspname <> 'public'
    UNION ALL
    SELECT 'pg_class'::regclass, oid, relowner FROM pg_catalog.pg_class
    WHERE relnamespace IN (SELECT oid FROM own_schemas) AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    UNION ALL
    SELECT 'pg_proc'::regclass, oid, proowner FROM pg_catalog.pg_proc f
    WHERE pronamespace IN (SELECT oid FROM own_schemas)
      -- An event trigger's function runs as the role that causes the event, maybe a superuser: its owner stays.
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger e WHERE e.evtfoid = f.oid)
    UNION ALL
    SELECT 'pg_type'::regclass, t.oid, typowner FROM pg_catalog.pg_type t
    WHERE typnamespace IN (SELECT oid FROM own_schemas) AND (typtype = 'm') = $2 AND typtype IN ('b', 'c', 'd', 'e', 'r', 'm')
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_type e WHERE e.typarray = t.oid)
      AND (typrelid = 0 OR EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = typrelid AND c.relkind = 'c'))
    {others}
    UNION ALL
    SELECT 'pg_foreign_server'::regclass, oid, srvowner FROM pg_catalog.pg_foreign_server
    UNION ALL
    SELECT 'pg_publication'::regclass, oid, pubowner FROM pg_catalog.pg_publication
    UNION ALL
    SELECT 'pg_largeobject'::regclass, oid, lomowner FROM pg_catalog.pg_largeobject_metadata
), others AS (
    SELECT * FROM owned WHERE owned.owner IS DISTINCT FROM (SELECT oid FROM new_owner)
  AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_depend d
    WHERE d.classid = owned.classid AND d.objid = owned.objid AND d.objsubid = 0
      -- An extension's; a range type's own functions; a column's sequence, which follows its table. (A partition
      -- depends on its parent in the same way, but does not follow it.)
      AND (d.deptype = 'e'
           OR (d.deptype = 'i' AND owned.classid = 'pg_proc'::regclass)
           OR (d.deptype IN ('a', 'i') AND owned.classid = 'pg_class'::regclass AND d.refobjsubid > 0)))
)";

/// One `ALTER … OWNER TO` for each, without the owner; schemas first, because the new owner needs them. And
/// the present owner.
const STATEMENTS: &str = r"
SELECT pg_catalog.format('ALTER %s %s OWNER TO',
           CASE thing.type WHEN 'statistics object' THEN 'statistics' WHEN 'composite type' THEN 'type'
                           ELSE thing.type END,
           thing.identity), pg_catalog.pg_get_userbyid(others.owner)::text
FROM others, pg_catalog.pg_identify_object(others.classid, others.objid, 0) AS thing
ORDER BY others.classid <> 'pg_namespace'::regclass, others.classid, others.objid";

/// Catalogs of which every object in a schema counts: owner and schema.
const OTHERS: [(&str, &str, &str); 8] = [
    ("pg_operator", "oprowner", "oprnamespace"),
    ("pg_opclass", "opcowner", "opcnamespace"),
    ("pg_opfamily", "opfowner", "opfnamespace"),
    ("pg_collation", "collowner", "collnamespace"),
    ("pg_conversion", "conowner", "connamespace"),
    ("pg_ts_dict", "dictowner", "dictnamespace"),
    ("pg_ts_config", "cfgowner", "cfgnamespace"),
    ("pg_statistic_ext", "stxowner", "stxnamespace"),
];

/// An object that `owner` does not own.
pub struct Foreign {
    /// `ALTER TABLE public.t OWNER TO`.
    statement: String,
    /// Its owner.
    pub owner: String,
}

impl Foreign {
    /// The statement that gives it to `owner`.
    pub fn given_to(&self, owner: &str) -> String {
        format!("{} {}", self.statement, ident(owner))
    }
}

/// What other roles than `owner` own in the database of `session`.
pub async fn foreign(session: &HostSession, owner: &str) -> Result<Vec<Foreign>, AdminError> {
    foreign_of(session, owner, false).await
}

async fn foreign_of(
    session: &HostSession,
    owner: &str,
    multiranges: bool,
) -> Result<Vec<Foreign>, AdminError> {
    let others = OTHERS.map(|(catalog, owner, schema)| {
        format!(
            "UNION ALL SELECT '{catalog}'::regclass, oid, {owner} FROM pg_catalog.{catalog}
             WHERE {schema} IN (SELECT oid FROM own_schemas)\n"
        )
    });
    let sql = OWNED.replace("{others}", &others.concat()) + STATEMENTS;
    let rows = session.query("listing what others own", &sql, &[&owner, &multiranges]).await?;
    Ok(rows.iter().map(|row| Foreign { statement: row.get(0), owner: row.get(1) }).collect())
}

/// Makes `owner` the owner of everything in the database of `session`. Returns how many objects were
/// others'.
///
/// # Errors
/// The host, naming the objects that are not the administrator's to give.
pub async fn reown(session: &HostSession, owner: &str) -> Result<usize, AdminError> {
    let mut count = 0;
    // In newer versions multirange types follow their range types and must not be altered here; in older
    // ones they must.
    for multiranges in [false, true] {
        let found = foreign_of(session, owner, multiranges).await?;
        if !found.is_empty() {
            count += found.len();
            let statements: Vec<String> = found.iter().map(|object| object.given_to(owner)).collect();
            let sql = format!("BEGIN;\n{};\nCOMMIT", statements.join(";\n"));
            session.run("making the tenant's role the owner of what is in its database", &sql).await?;
        }
    }
    Ok(count)
}
