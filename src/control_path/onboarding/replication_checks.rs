//! Checks whether a tenant can be moved by logical replication, before anything is made.
//!
//! Each reason against it is a sentence for the operator, who then knows why a dump was used.

use super::{replication::Stopped, source_host::Source};
use crate::control_path::admin::{
    actor::AdminError,
    host_connection::{AdminRights, HostAdmin, HostSession},
};

/// The tables to publish, as `CREATE PUBLICATION … FOR TABLE` takes them: each partition, and no table of
/// an extension.
pub(super) const PUBLISHED: &str = r"
SELECT pg_catalog.string_agg(pg_catalog.format('ONLY %I.%I', n.nspname, c.relname), ', ')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                  WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
HAVING count(*) > 0";

/// Checks in the tenant's database on the old host. `$1`: the administrator is a superuser; `$2`: the tenant's
/// role.
const HERE: &str = r"
WITH tables AS (
    SELECT c.*, pg_catalog.format('%I.%I', n.nspname, c.relname) AS named
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema' AND c.relpersistence <> 't'
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
)
SELECT why FROM (
    SELECT 1, 'wal_level is ' || pg_catalog.current_setting('wal_level')
    WHERE pg_catalog.current_setting('wal_level') <> 'logical'
    UNION ALL SELECT 2, 'fewer than two of max_replication_slots are free'
    WHERE (SELECT count(*) FROM pg_catalog.pg_replication_slots) + 2
        > pg_catalog.current_setting('max_replication_slots')::int
    UNION ALL SELECT 3, 'fewer than two of max_wal_senders are free'
    WHERE (SELECT count(*) FROM pg_catalog.pg_stat_replication) + 2
        > pg_catalog.current_setting('max_wal_senders')::int
    UNION ALL SELECT 4, 'the old host''s administrator is no superuser and may not replicate'
    WHERE NOT $1 AND NOT (SELECT rolreplication FROM pg_catalog.pg_roles WHERE rolname = current_user)
    UNION ALL SELECT 5, 'it takes part in replication already'
    WHERE EXISTS (SELECT FROM pg_catalog.pg_publication)
       OR EXISTS (SELECT subdbid FROM pg_catalog.pg_subscription
                  WHERE subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
    UNION ALL SELECT 6, 'it has large objects' WHERE EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)
    UNION ALL (SELECT 7, pg_catalog.format('table %s has no primary key or other replica identity', named) FROM tables t
    WHERE relkind = 'r' AND relpersistence = 'p' AND relreplident <> 'f' AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = t.oid AND i.indisvalid AND i.indimmediate
          AND CASE t.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END)
    ORDER BY named LIMIT 1)
    UNION ALL (SELECT 8, pg_catalog.format('table %s is unlogged', named) FROM tables
    WHERE relkind = 'r' AND relpersistence = 'u' ORDER BY named LIMIT 1)
    UNION ALL (SELECT 9, pg_catalog.format('%s is a materialized view', named) FROM tables
    WHERE relkind = 'm' ORDER BY named LIMIT 1)
    UNION ALL (SELECT 10, pg_catalog.format('trigger %I of %s fires on replicas as well', g.tgname, named)
    FROM pg_catalog.pg_trigger g JOIN tables t ON t.oid = g.tgrelid WHERE g.tgenabled IN ('A', 'R') LIMIT 1)
    UNION ALL (SELECT 11, pg_catalog.format('extension %I keeps data of its own', extname)
    FROM pg_catalog.pg_extension WHERE extconfig IS NOT NULL LIMIT 1)
    UNION ALL (SELECT 12, pg_catalog.format('table %s has row security, and the old host''s administrator is no superuser', named)
    FROM tables WHERE NOT $1 AND relrowsecurity ORDER BY named LIMIT 1)
    UNION ALL (SELECT 13, pg_catalog.format('table %s may not be read by the tenant''s role, as which it is copied', named)
    FROM tables WHERE relkind = 'r' AND NOT pg_catalog.has_table_privilege($2, oid, 'SELECT') ORDER BY named LIMIT 1)
) AS obstacles (place, why) ORDER BY place LIMIT 1";

/// Tables of which a dump would miss rows.
const HIDDEN: &str = r"
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relrowsecurity AND c.relforcerowsecurity
  AND NOT (SELECT r.rolsuper OR r.rolbypassrls FROM pg_catalog.pg_roles r WHERE r.rolname = current_user) LIMIT 1";

/// Checks on the new host. `$1`: the administrator is a superuser. Before version 16 changes are applied
/// with the administrator's rights, although constraints and triggers are the tenant's.
const THERE: &str = r"
SELECT why FROM (
    SELECT 0, 'the new host is PostgreSQL ' || pg_catalog.current_setting('server_version')
        || ', where a subscription cannot be left to the tenant''s own role (16 and newer)'
    WHERE pg_catalog.current_setting('server_version_num')::int < 160000
    UNION ALL SELECT 1, 'the new host''s administrator may not subscribe (no superuser, no member of pg_create_subscription)'
    WHERE NOT $1 AND NOT coalesce(
        (SELECT pg_catalog.pg_has_role(oid, 'USAGE') FROM pg_catalog.pg_roles WHERE rolname = 'pg_create_subscription'), false)
    UNION ALL SELECT 2, 'max_logical_replication_workers of the new host is less than two'
    WHERE pg_catalog.current_setting('max_logical_replication_workers')::int < 2
) AS obstacles (place, why) ORDER BY place LIMIT 1";

/// Refuses a tenant that a dump could not copy, before clients wait for it.
pub(super) async fn refuse_hidden(source: &Source, origin: &HostSession) -> Result<(), AdminError> {
    match origin.texts("looking for hidden rows", HIDDEN, &[]).await?.first() {
        None => Ok(()),
        Some(table) => Err(AdminError::Refused(format!(
            "policies of table {table} bind its owner, too (FORCE ROW LEVEL SECURITY), and hide rows from the administrator \
             of host {:?}; move it with an administrator that has BYPASSRLS, or ALTER TABLE … NO FORCE",
            source.admin.name
        ))),
    }
}

/// Checks everything; the first obstacle is the error.
pub(super) async fn look(
    source: &Source,
    origin: &HostSession,
    target: &HostAdmin,
    there: &HostSession,
) -> Result<(), Stopped> {
    if source.admin.tls_mode.verifies() {
        return Err(Stopped::Unsuitable(format!(
            "host {:?} must be reached with a verified certificate, and pglobby does not know whether host {:?} can do that",
            source.admin.name, target.name
        )));
    }
    let doing = "looking for what is in the way";
    let AdminRights { superuser, .. } = origin.rights().await?;
    let here = origin.texts(doing, HERE, &[&superuser, &source.roles.read_write]).await?;
    let AdminRights { superuser, .. } = there.rights().await?;
    let there = there.texts(doing, THERE, &[&superuser]).await?;
    match here.into_iter().chain(there).next() {
        Some(why) => Err(Stopped::Unsuitable(why)),
        None => Ok(()),
    }
}
