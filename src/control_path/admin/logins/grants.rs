//! The tenants that a service login may enter.

use serde_json::json;
use tokio_postgres::{Client, GenericClient};

use super::{LIVING, LoginSummary, access, missing, show};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    tenants::id_of,
};

/// Grants `tenants`, or all tenants, to a service login. A second grant changes the access.
pub async fn grant(
    actor: &Actor,
    name: &str,
    tenants: &[String],
    all_tenants: bool,
    read_only: bool,
) -> Result<LoginSummary, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let login_id = service_id(actor, &transaction, name).await?;
    grant_each(actor, &transaction, login_id, tenants, read_only).await?;
    if all_tenants {
        let sql = "UPDATE pglobby.logins SET all_tenants = true, access = $2 WHERE id = $1";
        transaction.execute(sql, &[&login_id, &access(read_only)]).await?;
    }
    let detail = json!({
        "login": name, "tenants": tenants, "all_tenants": all_tenants, "access": access(read_only),
    });
    actor.commit(transaction, "login.grant", None, &detail).await?;
    drop(client);
    show(actor, name).await
}

/// Revokes `tenants`, or the right to all tenants, from a service login. Single grants stay.
pub async fn revoke(
    actor: &Actor,
    name: &str,
    tenants: &[String],
    all_tenants: bool,
) -> Result<LoginSummary, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let login_id = service_id(actor, &transaction, name).await?;
    for tenant in tenants {
        let tenant_id = id_of(actor, &transaction, tenant).await?;
        let sql = "DELETE FROM pglobby.login_tenants WHERE login_id = $1 AND tenant_id = $2";
        transaction.execute(sql, &[&login_id, &tenant_id]).await?;
    }
    if all_tenants {
        let sql = "UPDATE pglobby.logins SET all_tenants = false WHERE id = $1";
        transaction.execute(sql, &[&login_id]).await?;
    }
    let detail = json!({ "login": name, "tenants": tenants, "all_tenants": all_tenants });
    actor.commit(transaction, "login.revoke", None, &detail).await?;
    drop(client);
    show(actor, name).await
}

pub(super) async fn grant_each(
    actor: &Actor,
    client: &impl GenericClient,
    login_id: i64,
    tenants: &[String],
    read_only: bool,
) -> Result<(), AdminError> {
    for tenant in tenants {
        let tenant_id = id_of(actor, client, tenant).await?;
        let sql = "INSERT INTO pglobby.login_tenants (login_id, tenant_id, access) VALUES ($1, $2, $3)
                   ON CONFLICT (login_id, tenant_id) DO UPDATE SET access = excluded.access";
        client.execute(sql, &[&login_id, &tenant_id, &access(read_only)]).await?;
    }
    Ok(())
}

async fn service_id(actor: &Actor, client: &impl GenericClient, name: &str) -> Result<i64, AdminError> {
    let sql = format!("SELECT id, kind FROM pglobby.logins WHERE name = $1 AND {LIVING} FOR UPDATE");
    let Some(row) = client.query_opt(&sql, &[&name]).await? else {
        return Err(missing(actor, client, name).await);
    };
    let kind: String = row.get(1);
    if kind != "service" {
        return Err(AdminError::Refused(format!(
            "login {name:?} is an {kind} login; only a service login may be granted tenants (make one with `pglobby login \
             create … --service`)"
        )));
    }
    Ok(row.get(0))
}
