//! Logins: employees of one tenant, services that may enter several tenants, administrators of the console.
//!
//! A password becomes a verifier here and is not stored.

mod grants;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde_json::json;
use time::OffsetDateTime;
use tokio_postgres::{Client, GenericClient, Row, error::SqlState, types::ToSql};

use self::grants::grant_each;
pub use self::grants::{grant, revoke};
use super::{
    actor::{Actor, AdminError},
    fields::{FieldKind, FieldType, described, from_row},
    hosts::unknown_setting,
    tenants::{id_of, parse_networks},
};
use crate::{
    control_path::{
        onboarding::names::check_text, secrets::scram_verifier::scram_verifier, timestamp::parse_timestamp,
    },
    data_path::tenant::{Login, LoginKind},
};

/// Limit of the schema; e-mail addresses fit.
pub const LOGIN_NAME_BYTES_MAX: usize = 255;
/// PostgreSQL's own limit on what a client may send as a password.
pub const PASSWORD_BYTES_MAX: usize = 1024;

/// The tenants that a new login may enter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewLoginKind {
    /// One tenant.
    Employee {
        /// Its name.
        tenant: String,
    },
    /// Several tenants, or all.
    Service {
        /// By name.
        tenants: Vec<String>,
        /// All tenants, present and future.
        all_tenants: bool,
    },
    /// The admin console.
    Admin,
}

/// A login to make.
#[derive(Debug, Clone)]
pub struct NewLogin {
    /// Unique over all logins; may be an e-mail address.
    pub name: String,
    /// Where it may go.
    pub kind: NewLoginKind,
    /// Read-only access; an administrator may only SHOW.
    pub read_only: bool,
    /// The password.
    pub password: SecretString,
    /// Refused from then on.
    pub valid_until: Option<OffsetDateTime>,
    /// Networks it may come from; empty: all.
    pub allow_from: Vec<String>,
}

described! {
    /// One row of `pglobby.logins`, without its verifier.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct LoginSummary {
        /// `logins.name`.
        pub name: String,
        /// An employee's tenant.
        pub tenant: Option<String>,
        /// `employee`, `service` or `admin`.
        pub kind: String,
        /// `read_write` or `read_only`.
        pub access: String,
        /// An employee that may create logins of the tenant. Applications read it; pglobby does not.
        pub may_add_logins: bool,
        /// A service that may enter all tenants.
        pub all_tenants: bool,
        /// Tenants granted to a service, each with its access.
        pub tenants: Vec<GrantSummary>,
        /// Refused from then on.
        #[serde(with = "time::serde::rfc3339::option")]
        pub valid_until: Option<OffsetDateTime>,
        /// Refused since.
        #[serde(with = "time::serde::rfc3339::option")]
        pub disabled_at: Option<OffsetDateTime>,
        /// Networks it may come from; empty: all.
        pub allow_from: Vec<String>,
        /// When it was made.
        #[serde(with = "time::serde::rfc3339")]
        pub created_at: OffsetDateTime,
    }
}

described! {
    /// One tenant granted to a service.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
    pub struct GrantSummary {
        /// Its name.
        pub tenant: String,
        /// `read_write` or `read_only`.
        pub access: String,
    }
}

impl FieldType for Vec<GrantSummary> {
    const KIND: FieldKind = FieldKind::List("Grant");
}

const SUMMARY: &str = "SELECT l.name, t.name AS tenant, l.kind, l.access, l.may_add_logins, l.all_tenants,
    coalesce((SELECT jsonb_agg(jsonb_build_object('tenant', g.name, 'access', lt.access) ORDER BY g.name)
              FROM pglobby.login_tenants lt JOIN pglobby.tenants g ON g.id = lt.tenant_id
              WHERE lt.login_id = l.id AND g.status <> 'dropped'), '[]') AS tenants,
    l.valid_until, l.disabled_at, l.allow_from::text[] AS allow_from, l.created_at
    FROM pglobby.logins l LEFT JOIN pglobby.tenants t ON t.id = l.tenant_id";

/// Condition on a row of `pglobby.logins`: not an employee of a dropped tenant. Such a login is kept only
/// to tell its client that the tenant was dropped; its name is free.
pub(in crate::control_path) const LIVING: &str =
    "NOT EXISTS (SELECT FROM pglobby.tenants b WHERE b.id = tenant_id AND b.status = 'dropped')";

/// All logins by name, or those of one tenant, services with a grant for it included.
pub async fn list(actor: &Actor, tenant: Option<&str>) -> Result<Vec<LoginSummary>, AdminError> {
    let client = actor.central.client().await?;
    let sql = format!(
        "{SUMMARY} WHERE {LIVING} AND ($1::text IS NULL OR t.name = $1 OR EXISTS (
            SELECT FROM pglobby.login_tenants lt JOIN pglobby.tenants g ON g.id = lt.tenant_id
            WHERE lt.login_id = l.id AND g.name = $1 AND g.status <> 'dropped'))
         ORDER BY l.name"
    );
    Ok(client.query(&sql, &[&tenant]).await?.iter().map(summary).collect())
}

/// One login.
pub async fn show(actor: &Actor, name: &str) -> Result<LoginSummary, AdminError> {
    let client = actor.central.client().await?;
    match client.query_opt(&format!("{SUMMARY} WHERE l.name = $1 AND {LIVING}"), &[&name]).await? {
        Some(row) => Ok(summary(&row)),
        None => Err(missing(actor, &**client, name).await),
    }
}

fn summary(row: &Row) -> LoginSummary {
    from_row!(row => LoginSummary {
        name, tenant, kind, access, may_add_logins, all_tenants, valid_until, disabled_at, allow_from,
        created_at; tenants: serde_json::from_value(row.get("tenants")).unwrap_or_default()
    })
}

/// Creates a login.
///
/// # Errors
/// The name is taken or invalid, the password is invalid, or the tenant does not exist.
pub async fn create(actor: &Actor, login: &NewLogin) -> Result<LoginSummary, AdminError> {
    check_text("login", &login.name, LOGIN_NAME_BYTES_MAX)?;
    let verifier = verifier_of(&login.password)?;
    let networks = parse_networks(login.allow_from.iter().map(String::as_str))?;
    let (kind, all_tenants) = match &login.kind {
        NewLoginKind::Employee { .. } => ("employee", false),
        NewLoginKind::Service { all_tenants, .. } => ("service", *all_tenants),
        NewLoginKind::Admin => ("admin", false),
    };

    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let tenant = match &login.kind {
        NewLoginKind::Employee { tenant } => Some(tenant.as_str()),
        _ => None,
    };
    let tenant_id = match tenant {
        Some(tenant) => Some(id_of(actor, &transaction, tenant).await?),
        None => None,
    };
    let buried = format!("DELETE FROM pglobby.logins WHERE name = $1 AND NOT {LIVING}");
    transaction.execute(&buried, &[&login.name]).await?;
    let inserted = transaction
        .query_one(
            "INSERT INTO pglobby.logins (name, kind, tenant_id, access, all_tenants, verifier, valid_until, allow_from)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8::text[]::cidr[]) RETURNING id",
            &[
                &login.name,
                &kind,
                &tenant_id,
                &access(login.read_only),
                &all_tenants,
                &verifier.expose_secret(),
                &login.valid_until,
                &networks,
            ],
        )
        .await;
    let login_id: i64 = match inserted {
        Ok(row) => row.get(0),
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
            return Err(AdminError::Exists(format!(
                "login {:?} exists already; names are unique over all tenants (try an e-mail address, or `pglobby login \
                 set-password`)",
                login.name
            )));
        }
        Err(error) => return Err(error.into()),
    };
    if let NewLoginKind::Service { tenants, .. } = &login.kind {
        grant_each(actor, &transaction, login_id, tenants, login.read_only).await?;
    }
    let detail = json!({ "login": login.name, "kind": kind, "access": access(login.read_only) });
    actor.commit(transaction, "login.create", tenant, &detail).await?;
    drop(client);
    show(actor, &login.name).await
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read_only" } else { "read_write" }
}

fn verifier_of(password: &SecretString) -> Result<SecretString, AdminError> {
    let text = password.expose_secret();
    if text.is_empty() {
        return Err(AdminError::Invalid("the password is empty; give one, or --generate".to_owned()));
    }
    if text.len() > PASSWORD_BYTES_MAX || text.contains('\0') {
        return Err(AdminError::Invalid(format!(
            "a password has at most {PASSWORD_BYTES_MAX} bytes, and no NUL among them"
        )));
    }
    Ok(scram_verifier(password))
}

/// Sets a login's password.
pub async fn set_password(
    actor: &Actor,
    name: &str,
    password: &SecretString,
) -> Result<LoginSummary, AdminError> {
    let verifier = verifier_of(password)?;
    let set = "verifier = $2";
    change(actor, name, "login.set_password", set, &verifier.expose_secret()).await
}

/// Sets a login's own verifier if its present one is among `before`; `false`: it is not, or the login is
/// refused. So a session that an operator is about to end cannot take the login back.
pub(in crate::control_path) async fn change_own_verifier(
    actor: &Actor,
    login: &Login,
    before: &[SecretString],
    verifier: &SecretString,
) -> Result<bool, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let before: Vec<_> = before.iter().map(|verifier| verifier.expose_secret()).collect();
    let sql = format!(
        "UPDATE pglobby.logins SET verifier = $2 WHERE id = $1 AND verifier = ANY ($3) AND disabled_at IS NULL
         AND (valid_until IS NULL OR valid_until > now()) AND {LIVING}"
    );
    let changed = transaction.execute(&sql, &[&login.id, &verifier.expose_secret(), &before]).await? > 0;
    if changed {
        let tenant = match &login.kind {
            LoginKind::Employee { tenant_name, .. } => Some(tenant_name.as_str()),
            _ => None,
        };
        let detail = json!({ "login": login.name, "by": "itself" });
        actor.audit(&transaction, "login.set_password", tenant, &detail).await?;
    }
    transaction.commit().await?;
    Ok(changed)
}

/// Keys of `login set`.
pub const SETTINGS: [&str; 4] = ["access", "may_add_logins", "valid_until", "allow_from"];

/// Changes access, validity or networks of a login; an empty value removes a limit. Sessions that the
/// change excludes end.
///
/// # Errors
/// Unknown key (naming the nearest), bad value, no such login; then nothing is changed.
pub async fn set(
    actor: &Actor,
    name: &str,
    settings: &[(String, String)],
) -> Result<LoginSummary, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    for (key, value) in settings {
        if set_one(&transaction, name, key, value.trim()).await? == 0 {
            return Err(missing(actor, &transaction, name).await);
        }
    }
    let mut detail: serde_json::Map<_, _> =
        settings.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    detail.insert("login".to_owned(), name.into());
    actor.commit(transaction, "login.set", None, &detail.into()).await?;
    drop(client);
    show(actor, name).await
}

async fn set_one(client: &impl GenericClient, name: &str, key: &str, value: &str) -> Result<u64, AdminError> {
    let run = async |assignment: &str, value: &(dyn ToSql + Sync)| {
        let sql = format!("UPDATE pglobby.logins SET {assignment} WHERE name = $1 AND {LIVING}");
        client.execute(&sql, &[&name, value]).await.map_err(AdminError::from)
    };
    match key {
        "access" => match value {
            "read_write" | "read_only" => run("access = $2", &value).await,
            _ => Err(AdminError::Invalid(format!("access is read_write or read_only, not {value:?}"))),
        },
        "may_add_logins" => {
            let may = match value {
                "true" => true,
                "false" | "" => false,
                _ => {
                    return Err(AdminError::Invalid(format!("{key} is true or false, not {value:?}")));
                }
            };
            let run = run("may_add_logins = $2", &may).await;
            run.map_err(|error| match error.code() {
                Some(code) if *code == SqlState::CHECK_VIOLATION => AdminError::Refused(format!(
                    "login {name:?} belongs to no tenant; {key} is for a tenant's employees"
                )),
                _ => error,
            })
        }
        "valid_until" => {
            let given = Some(value).filter(|value| !value.is_empty());
            let timestamp = given.map(parse_timestamp).transpose();
            let timestamp = timestamp.map_err(|why| AdminError::Invalid(format!("valid_until: {why}")))?;
            run("valid_until = $2", &timestamp).await
        }
        "allow_from" => run("allow_from = $2::text[]::cidr[]", &parse_networks(value.split(','))?).await,
        _ => Err(unknown_setting(key, &SETTINGS)),
    }
}

/// Whether the login `name` is an administrator's.
pub async fn is_admin(actor: &Actor, name: &str) -> Result<bool, AdminError> {
    let sql = "SELECT kind = 'admin' FROM pglobby.logins WHERE name = $1";
    let row = actor.central.client().await?.query_opt(sql, &[&name]).await?;
    Ok(row.is_some_and(|row| row.get(0)))
}

/// Disables or enables a login.
pub async fn set_disabled(actor: &Actor, name: &str, disabled: bool) -> Result<LoginSummary, AdminError> {
    let action = if disabled { "login.disable" } else { "login.enable" };
    // A second call keeps the time of the first.
    let set = "disabled_at = CASE WHEN $2 THEN coalesce(disabled_at, now()) END";
    change(actor, name, action, set, &disabled).await
}

async fn change<T>(
    actor: &Actor,
    name: &str,
    action: &str,
    assignment: &str,
    value: &T,
) -> Result<LoginSummary, AdminError>
where
    T: ToSql + Sync,
{
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let sql = format!("UPDATE pglobby.logins SET {assignment} WHERE name = $1 AND {LIVING}");
    if transaction.execute(&sql, &[&name, value]).await? == 0 {
        return Err(missing(actor, &transaction, name).await);
    }
    actor.commit(transaction, action, None, &json!({ "login": name })).await?;
    drop(client);
    show(actor, name).await
}

/// Removes a login and its grants.
pub async fn drop_login(actor: &Actor, name: &str) -> Result<(), AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let sql = format!("DELETE FROM pglobby.logins WHERE name = $1 AND {LIVING}");
    if transaction.execute(&sql, &[&name]).await? == 0 {
        return Err(missing(actor, &transaction, name).await);
    }
    actor.commit(transaction, "login.drop", None, &json!({ "login": name })).await
}

async fn missing(actor: &Actor, client: &impl GenericClient, name: &str) -> AdminError {
    actor.not_found(client, "login", name, &format!("SELECT name FROM pglobby.logins WHERE {LIVING}")).await
}
