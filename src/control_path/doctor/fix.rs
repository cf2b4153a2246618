//! Applies the fixes of `pglobby doctor --fix`, and records them in the audit log.

use serde_json::json;

use super::{Finding, Fix};
use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        host_connection::HostAdmin,
    },
    onboarding::rotate::rotate,
};

/// Applies the fix of a finding; nothing if there is no safe fix.
pub(super) async fn apply(actor: &Actor, finding: &Finding) -> Result<(), AdminError> {
    let Some(fix) = &finding.fix else { return Ok(()) };
    match fix {
        Fix::OnHost { host, database, sql } => {
            let client = actor.central.client().await?;
            let admin = HostAdmin::load(actor, &**client, host).await?;
            drop(client);
            let session = match database {
                Some(database) => admin.connect_to(database).await?,
                None => admin.connect().await?,
            };
            session.run(format!("correcting {}", finding.check), sql).await?;
        }
        Fix::Central { sql } => actor.central.client().await?.batch_execute(sql).await?,
        Fix::Rotate { tenant } => {
            rotate(actor, tenant).await?;
        }
    }
    let client = actor.central.client().await?;
    let detail = json!({ "check": finding.check, "detail": finding.detail, "host": finding.host });
    actor.audit(&**client, "doctor.fix", finding.tenant.as_deref(), &detail).await
}
