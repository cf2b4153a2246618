//! Rotates sealing keys: makes a new key and seals every stored credential again, online, in batches. An
//! interrupted run is continued.
//!
//! Old keys stay in the key ring until nothing is sealed with them, so everything stays readable.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::json;
use tokio_postgres::Client;

use super::{
    keyring::{Keyring, KeyringError},
    seal::SecretLocation,
};
use crate::{
    config::Config,
    control_path::admin::{
        actor::{Actor, AdminError},
        fields::described,
        operations,
    },
};

const BATCH_ROWS: i64 = 100;

/// The columns with credentials: table, key column and its type, column.
const PLACES: [(&str, &str, &str, &str); 3] = [
    ("hosts", "name", "text", "sealed_admin_password"),
    ("tenants", "id", "bigint", "sealed_password"),
    ("tenants", "id", "bigint", "sealed_ro_password"),
];

described! {
    /// A key and its use.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct KeyUse {
        /// Its id.
        pub id: String,
        /// Whether new credentials are sealed with it.
        pub writes: bool,
        /// Whether the ring has it; if not, what it sealed cannot be opened.
        pub in_ring: bool,
        /// Credentials sealed with it.
        pub sealed: u64,
    }
}

described! {
    /// What a rotation did.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct RotatedKeys {
        /// The key that seals everything now.
        pub key: String,
        /// Whether this run made it; otherwise an earlier run or `key generate` did.
        pub generated: bool,
        /// Number of credentials sealed again.
        pub resealed: u64,
        /// Keys removed from the ring.
        pub retired: Vec<String>,
    }
}

/// Every key of the ring, and every key that seals something.
pub async fn list(actor: &Actor) -> Result<Vec<KeyUse>, AdminError> {
    let client = actor.central.client().await?;
    let sealed = count_by_key(&client).await?;
    Ok(uses(&actor.keyring.fresh(), sealed))
}

fn uses(keyring: &Keyring, mut sealed: BTreeMap<String, u64>) -> Vec<KeyUse> {
    let in_ring: Vec<KeyUse> = keyring
        .key_ids()
        .map(|id| KeyUse {
            id: id.to_owned(),
            writes: id == keyring.writing_key(),
            in_ring: true,
            sealed: sealed.remove(id).unwrap_or_default(),
        })
        .collect();
    let lost = sealed.into_iter().map(|(id, sealed)| KeyUse { id, writes: false, in_ring: false, sealed });
    in_ring.into_iter().chain(lost).collect()
}

async fn count_by_key(client: &Client) -> Result<BTreeMap<String, u64>, AdminError> {
    let mut counts = BTreeMap::new();
    for (table, _, _, column) in PLACES {
        let sql = format!("SELECT {column} FROM pglobby.{table} WHERE {column} IS NOT NULL");
        for row in client.query(&sql, &[]).await? {
            let id = Keyring::key_of(row.get(0)).unwrap_or("(unreadable)");
            *counts.entry(id.to_owned()).or_default() += 1;
        }
    }
    Ok(counts)
}

/// Adds a key to the ring's file, or creates the file. The new key seals from now on. Copy the file to the
/// other nodes before they need the key.
///
/// # Errors
/// The ring is not in a file, or the file cannot be written.
pub async fn generate(actor: &Actor, config: &Config) -> Result<String, AdminError> {
    let lock = lock_ring(actor).await?;
    add_key(actor, &lock, config).await
}

/// Seals everything with one key: the present sealing key if something is not sealed with it yet, otherwise
/// a new key. `retire` removes keys from the ring that seal nothing any more.
///
/// # Errors
/// The ring, the central database, or a credential that does not open; what was done stays done, and the next
/// run goes on.
pub async fn rotate(actor: &Actor, config: &Config, retire: bool) -> Result<RotatedKeys, AdminError> {
    ring_file(config)?;
    let mut client = lock_ring(actor).await?;
    let operation = begin(actor, &client).await?;
    let rotated = rotate_recorded(actor, config, retire, &mut client, operation).await;
    match &rotated {
        Ok(_) => {
            let sql = "UPDATE pglobby.operations SET status = 'done', updated_at = now() WHERE id = $1";
            client.execute(sql, &[&operation]).await?;
        }
        Err(error) => operations::note_error(actor, operation, error).await?,
    }
    rotated
}

/// Records the start, and closes the record of an interrupted run, whose work this one continues.
async fn begin(actor: &Actor, client: &Client) -> Result<i64, AdminError> {
    let supersede =
        "UPDATE pglobby.operations SET status = 'undone', error = 'superseded by what came after it',
                            updated_at = now()
                     WHERE kind = 'key_rotate' AND status IN ('running', 'failed')";
    client.execute(supersede, &[]).await?;
    let sql = "INSERT INTO pglobby.operations (kind, actor) VALUES ('key_rotate', $1) RETURNING id";
    let operation = client.query_one(sql, &[&actor.name]).await?.get(0);
    actor.report_begun(operation).await;
    Ok(operation)
}

async fn rotate_recorded(
    actor: &Actor,
    config: &Config,
    retire: bool,
    client: &mut Client,
    operation: i64,
) -> Result<RotatedKeys, AdminError> {
    let ring = Keyring::load(config)?;
    let outdated = count_by_key(client).await?.keys().any(|key| key != ring.writing_key());
    if !outdated {
        add_key(actor, client, config).await?;
    }
    let mut ring = Keyring::load(config)?;
    let all: u64 = count_by_key(client).await?.values().sum();
    let (mut resealed, mut looked_at) = (0, 0);
    for place in PLACES {
        resealed += reseal(actor, client, &ring, place, (&mut looked_at, all)).await?;
        let step = format!("{}.{}", place.0, place.3);
        let sql = "UPDATE pglobby.operations SET step = $2, updated_at = now() WHERE id = $1";
        client.execute(sql, &[&operation, &step]).await?;
    }

    let mut retired = Vec::new();
    if retire {
        let used = count_by_key(client).await?;
        let unused: Vec<String> =
            ring.key_ids().filter(|id| !used.contains_key(*id)).map(str::to_owned).collect();
        retired.extend(unused.into_iter().filter(|id| ring.remove_key(id)));
        if !retired.is_empty() {
            ring.replace_file(ring_file(config)?)?;
        }
    }
    let key = ring.writing_key().to_owned();
    let detail = json!({ "key": key, "resealed": resealed, "retired": retired, "operation": operation });
    actor.audit(client, "key.rotate", None, &detail).await?;
    Ok(RotatedKeys { key, generated: !outdated, resealed, retired })
}

/// Only one rotation at a time: if two wrote the ring, one key would be lost with all that it sealed.
async fn lock_ring(actor: &Actor) -> Result<Client, AdminError> {
    let client = actor.central.connect_to(actor.central.database()).await?;
    let sql = "SELECT pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended('pglobby key ring', 0))";
    client.execute(sql, &[]).await?;
    Ok(client)
}

fn ring_file(config: &Config) -> Result<&std::path::Path, AdminError> {
    match (&config.keys_text, &config.keys_file) {
        (None, Some(path)) => Ok(path),
        _ => Err(AdminError::Refused(
            "the key ring is in PGLOBBY_KEYS, which cannot be written; put it into a file ([keys] file) for as long as \
             keys change"
                .to_owned(),
        )),
    }
}

async fn add_key(actor: &Actor, lock: &Client, config: &Config) -> Result<String, AdminError> {
    let path = ring_file(config)?;
    let id = match Keyring::load(config) {
        Ok(mut ring) => {
            let id = ring.add_key();
            ring.replace_file(path)?;
            id
        }
        Err(KeyringError::Missing { .. }) => {
            let ring = Keyring::generate();
            ring.create_file(path)?;
            ring.writing_key().to_owned()
        }
        Err(error) => return Err(error.into()),
    };
    actor.audit(lock, "key.generate", None, &json!({ "key": id })).await?;
    Ok(id)
}

async fn reseal(
    actor: &Actor,
    client: &mut Client,
    ring: &Keyring,
    (table, key, key_type, column): (&'static str, &str, &str, &'static str),
    (looked_at, all): (&mut u64, u64),
) -> Result<u64, AdminError> {
    let batch = format!(
        "SELECT {key}::text, {column} FROM pglobby.{table}
         WHERE {column} IS NOT NULL AND {key}::text COLLATE \"C\" > $1
         ORDER BY {key}::text COLLATE \"C\" LIMIT {BATCH_ROWS} FOR UPDATE"
    );
    let update = format!("UPDATE pglobby.{table} SET {column} = $2 WHERE {key} = $1::text::{key_type}");
    let (mut after, mut resealed) = (String::new(), 0);
    loop {
        let transaction = client.transaction().await?;
        let rows = transaction.query(&batch, &[&after]).await?;
        for row in &rows {
            let (id, blob): (String, Vec<u8>) = (row.get(0), row.get(1));
            if Keyring::key_of(&blob) != Some(ring.writing_key()) {
                let place = SecretLocation { table, row: &id, column };
                let sealed = ring.seal(&place, &ring.open(&place, &blob)?)?;
                resealed += transaction.execute(&update, &[&id, &sealed]).await?;
            }
            after = id;
        }
        transaction.commit().await?;
        if rows.is_empty() {
            return Ok(resealed);
        }
        *looked_at += rows.len() as u64;
        actor.report_part("credentials", *looked_at, all).await;
    }
}
