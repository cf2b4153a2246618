//! `pglobby api-key`: keys for the HTTP management API. (`pglobby key` is about sealing keys.)

use clap::{Args, Subcommand};
use secrecy::ExposeSecret as _;
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    cli::{
        Failure, Globals,
        actor::actor,
        output::{self, Json},
        table::{self, answer},
    },
    control_path::{
        admin::api_keys::{self, ApiKey, Role},
        timestamp::parse_timestamp,
    },
};

/// Create, list and revoke keys for the HTTP management API
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby api-key create deploy --role operator\n  pglobby api-key list")]
pub struct ApiKeyCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    /// List keys, including revoked and expired ones
    #[command(after_help = "Example:\n  pglobby api-key list --json")]
    List(Json),
    Revoke(Revoke),
}

/// Create a key and print it once; pglobby stores only a hash
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby api-key create deploy --role operator --expires 2027-01-31")]
struct Create {
    /// Name of the key; the audit log has it as api:NAME
    name: String,
    /// What the key may do: viewer reads, operator manages tenants and logins, admin does everything
    #[arg(long, value_enum)]
    role: Role,
    /// When the key expires: 2027-01-31, 2027-01-31 18:00 (UTC) or RFC 3339
    #[arg(long, value_name = "TIME", value_parser = parse_timestamp)]
    expires: Option<OffsetDateTime>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Revoke a key; requests with it are refused from now on
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby api-key revoke deploy")]
struct Revoke {
    /// Name of the key
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl ApiKeyCommand {
    /// Runs the command.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let actor = actor(globals).await?;
        match self.action {
            Action::Create(command) => {
                let (made, key) =
                    api_keys::create(&actor, &command.name, command.role, command.expires).await?;
                let key = key.expose_secret();
                let expires_at = made.expires_at.and_then(|time| time.format(&Rfc3339).ok());
                let result =
                    json!({ "name": made.name, "role": made.role, "expires_at": expires_at, "key": key });
                answer(command.json, &result, || {
                    let until = made.expires_at.map(|time| format!(", expires {}", table::time(time)));
                    let (name, role, until) = (&made.name, made.role.name(), until.unwrap_or_default());
                    output::line(format!("API key {name} is created, role {role}{until}"));
                    output::line(format!("key (shown only now): {key}"));
                });
            }
            Action::List(command) => {
                let keys = api_keys::list(&actor).await?;
                let rows: Vec<Vec<String>> = keys.iter().map(row).collect();
                answer(command.json, &keys, || {
                    let nothing = "no API keys; create one with: pglobby api-key create NAME --role ROLE";
                    table::table(nothing, &["NAME", "ROLE", "STATE", "EXPIRES", "CREATED"], &rows);
                });
            }
            Action::Revoke(command) => {
                let key = api_keys::revoke(&actor, &command.name).await?;
                answer(command.json, &key, || output::line(format!("API key {} is revoked", key.name)));
            }
        }
        Ok(())
    }
}

fn row(key: &ApiKey) -> Vec<String> {
    let state = match (key.revoked_at, key.expires_at) {
        (Some(_), _) => "revoked",
        (None, Some(time)) if time <= OffsetDateTime::now_utc() => "expired",
        _ => "active",
    };
    vec![
        key.name.clone(),
        key.role.name().to_owned(),
        state.to_owned(),
        table::or_dash(key.expires_at.map(table::time)),
        table::time(key.created_at),
    ]
}
