//! Ends a subscription that a tenant owns.

use tokio_postgres::error::SqlState;

use crate::control_path::admin::{actor::AdminError, host_connection::HostAdmin};

/// Maximum of renames of a subscription while it is dropped.
const RENAMED_MAX: u32 = 20;

/// Drops subscription `oid` of `database`, without connecting to its publisher. Its workers run code of the
/// tenant, which may lock or rename it meanwhile; so this retries.
pub(super) async fn end_subscription(admin: &HostAdmin, database: &str, oid: u32) -> Result<(), AdminError> {
    let inside = admin.connect_to(database).await?.before_tenants(admin).await?;
    let doing = "ending the subscription";
    let workers = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_subscription
                   WHERE subid = $1 AND pid IS NOT NULL";
    let mut tries = 0;
    loop {
        let sql = "SELECT pg_catalog.quote_ident(subname) FROM pg_catalog.pg_subscription WHERE oid = $1";
        let Some(name) = inside.texts(doing, sql, &[&oid]).await?.pop() else { return Ok(()) };
        // DROP SUBSCRIPTION would connect to its publisher, which may never answer.
        let nowhere = "'host=127.0.0.1 port=1 password=none connect_timeout=2'";
        let disable =
            format!("ALTER SUBSCRIPTION {name} DISABLE; ALTER SUBSCRIPTION {name} CONNECTION {nowhere}");
        let drop = format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE); DROP SUBSCRIPTION {name}");
        let ended = async {
            inside.run(doing, &disable).await?;
            inside.query(doing, workers, &[&oid]).await?;
            inside.run(doing, &drop).await
        };
        tries += 1;
        match ended.await {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_OBJECT) && tries < RENAMED_MAX => {}
            ended => return ended,
        }
    }
}
