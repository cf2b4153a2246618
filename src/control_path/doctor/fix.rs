//! The part of the doctor that changes something, and writes down that it did.

use serde_json::json;

use super::{Cure, Finding};
use crate::control_path::{
    admin::{
        actor::{Operator, OperatorError},
        host_connection::HostAdmin,
    },
    onboarding::rotate::rotate,
};

/// Does what mends a finding; nothing, where nobody should do it unasked.
pub(super) async fn apply(operator: &Operator, finding: &Finding) -> Result<(), OperatorError> {
    let Some(cure) = &finding.cure else { return Ok(()) };
    match cure {
        Cure::OnHost { host, database, sql } => {
            let client = operator.central.client().await?;
            let admin = HostAdmin::load(operator, &**client, host).await?;
            drop(client);
            let session = match database {
                Some(database) => admin.connect_to(database).await?,
                None => admin.connect().await?,
            };
            session.run(sql, sql).await?;
        }
        Cure::Central { sql } => operator.central.client().await?.batch_execute(sql).await?,
        Cure::Rotate { tenant } => {
            rotate(operator, tenant).await?;
        }
    }
    let client = operator.central.client().await?;
    let detail = json!({ "check": finding.check, "detail": finding.detail, "host": finding.host });
    operator.audit(&**client, "doctor.fix", finding.tenant.as_deref(), &detail).await
}
