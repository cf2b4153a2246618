//! API keys of the HTTP management API: create, list, revoke, check.
//!
//! A key is 256 random bits and cannot be guessed, so a plain hash is stored. The key itself is shown once.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use tokio_postgres::{Client, GenericClient, Row, error::SqlState};

use super::{
    actor::{Actor, AdminError},
    fields::from_row,
};
use crate::control_path::onboarding::names::check_identifier;

/// Prefix of every key, so that secret scanners recognise it.
pub const PREFIX: &str = "pglobby_";
/// `PREFIX` and 32 bytes in base64.
const KEY_BYTES: usize = PREFIX.len() + 43;

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Read.
    Viewer,
    /// Create, change, suspend and rotate. Not: drop tenants, manage keys and hosts.
    Operator,
    /// Everything.
    Admin,
}

/// One row of `pglobby.api_keys`, without the hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ApiKey {
    /// Its name. The actor in the audit log is `api:<name>`.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Creation time.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// Invalid from then on.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// Revocation time.
    #[serde(with = "time::serde::rfc3339::option")]
    pub revoked_at: Option<OffsetDateTime>,
}

const SUMMARY: &str = "SELECT name, role, created_at, expires_at, revoked_at FROM pglobby.api_keys";

impl Role {
    /// The word in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

fn summary(row: &Row) -> ApiKey {
    let role = match row.get("role") {
        "admin" => Role::Admin,
        "operator" => Role::Operator,
        _ => Role::Viewer,
    };
    from_row!(row => ApiKey { name, created_at, expires_at, revoked_at; role: role })
}

fn hash_of(key: &str) -> Vec<u8> {
    Sha256::digest(key.as_bytes()).to_vec()
}

/// All keys by name, revoked and expired ones included.
pub async fn list(actor: &Actor) -> Result<Vec<ApiKey>, AdminError> {
    let client = actor.central.client().await?;
    Ok(client.query(&format!("{SUMMARY} ORDER BY name"), &[]).await?.iter().map(summary).collect())
}

/// Creates a key. The key is returned here and cannot be read again.
///
/// # Errors
/// The name is taken. Names of revoked keys stay taken, so that a name in the audit log means one key.
pub async fn create(
    actor: &Actor,
    name: &str,
    role: Role,
    expires_at: Option<OffsetDateTime>,
) -> Result<(ApiKey, SecretString), AdminError> {
    check_identifier("API key", name)?;
    if expires_at.is_some_and(|moment| moment <= OffsetDateTime::now_utc()) {
        return Err(AdminError::Invalid("expires_at is in the past".to_owned()));
    }
    let random: [u8; 32] = rand::rng().random();
    let key = SecretString::from(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random)));
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let sql = "INSERT INTO pglobby.api_keys (name, key_hash, role, expires_at) VALUES ($1, $2, $3, $4)
               RETURNING name, role, created_at, expires_at, revoked_at";
    let inserted =
        transaction.query_one(sql, &[&name, &hash_of(key.expose_secret()), &role.name(), &expires_at]).await;
    let made = match inserted {
        Ok(row) => summary(&row),
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
            return Err(AdminError::Exists(format!(
                "there is an API key {name:?} already, perhaps revoked; choose another name (see `pglobby api-key list`)"
            )));
        }
        Err(error) => return Err(error.into()),
    };
    let detail = json!({ "key": name, "role": role });
    actor.commit(transaction, "api_key.create", None, &detail).await?;
    Ok((made, key))
}

/// Revokes a key for good. A second call keeps the time of the first.
pub async fn revoke(actor: &Actor, name: &str) -> Result<ApiKey, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let sql = "UPDATE pglobby.api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE name = $1
               RETURNING name, role, created_at, expires_at, revoked_at";
    let Some(row) = transaction.query_opt(sql, &[&name]).await? else {
        let names = "SELECT name FROM pglobby.api_keys";
        return Err(actor.not_found(&transaction, "API key", name, names).await);
    };
    actor.commit(transaction, "api_key.revoke", None, &json!({ "key": name })).await?;
    Ok(summary(&row))
}

/// The API key that `presented` is, if it is valid now. It is looked up by its hash, so the time tells
/// nothing about existing keys. Text that cannot be a key is not looked up.
pub async fn authenticate(
    client: &impl GenericClient,
    presented: &SecretString,
) -> Result<Option<ApiKey>, AdminError> {
    let presented = presented.expose_secret();
    if presented.len() != KEY_BYTES || !presented.starts_with(PREFIX) {
        return Ok(None);
    }
    let sql = format!(
        "{SUMMARY} WHERE key_hash = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"
    );
    Ok(client.query_opt(&sql, &[&hash_of(presented)]).await?.as_ref().map(summary))
}
