//! `pglobby api-key`: who may use the HTTP management API. (`pglobby key` is about sealing keys.)

use clap::{Args, Subcommand};
use secrecy::ExposeSecret as _;
use serde_json::json;
use time::OffsetDateTime;

use crate::{
    cli::{
        Failure, Globals,
        actor::operator,
        output,
        table::{self, answer},
    },
    control_path::{
        admin::api_keys::{self, ApiKey, Role},
        timestamp::parse_timestamp,
    },
};

/// Make, list and revoke keys for the HTTP management API
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby api-key create deploy --role operator --expires 2027-01-31")]
pub struct ApiKeyCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    List(List),
    Revoke(Revoke),
}

/// Make a key; it is printed once, and stored as a hash
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby api-key create deploy --role operator --expires 2027-01-31")]
struct Create {
    /// Stands in the audit log as api:NAME
    name: String,
    /// What it may do: viewer looks, operator works on tenants and logins, admin does everything
    #[arg(long, value_enum)]
    role: Role,
    /// Refused from then on: 2027-01-31, 2027-01-31 18:00 (UTC), or RFC 3339
    #[arg(long, value_name = "TS", value_parser = parse_timestamp)]
    expires: Option<OffsetDateTime>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List keys, revoked and expired ones, too
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby api-key list --json")]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Refuse a key from now on
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby api-key revoke deploy")]
struct Revoke {
    /// The key's name
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl ApiKeyCommand {
    /// Does it.
    ///
    /// # Errors
    /// [`Failure`], in one line.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let operator = operator(globals).await?;
        match self.action {
            Action::Create(command) => {
                let made = api_keys::create(&operator, &command.name, command.role, command.expires).await?;
                let (made, key) = (made.0, made.1.expose_secret().to_owned());
                let told = json!({
                    "name": made.name, "role": made.role, "expires_at": in_json(made.expires_at), "key": key,
                });
                answer(command.json, &told, || {
                    output::line(format!(
                        "API key {}, role {}; it is shown this once:\n{key}",
                        made.name,
                        made.role.name()
                    ));
                });
            }
            Action::List(command) => {
                let keys = api_keys::list(&operator).await?;
                let rows: Vec<Vec<String>> = keys.iter().map(row).collect();
                answer(command.json, &keys, || {
                    table::table("no API keys", &["NAME", "ROLE", "STATE", "CREATED"], &rows);
                });
            }
            Action::Revoke(command) => {
                let key = api_keys::revoke(&operator, &command.name).await?;
                answer(command.json, &key, || output::line(format!("API key {} is revoked", key.name)));
            }
        }
        Ok(())
    }
}

fn in_json(moment: Option<OffsetDateTime>) -> Option<String> {
    moment.and_then(|moment| moment.format(&time::format_description::well_known::Rfc3339).ok())
}

fn row(key: &ApiKey) -> Vec<String> {
    let state = match (key.revoked_at, key.expires_at) {
        (Some(since), _) => format!("revoked {since}"),
        (None, Some(moment)) if moment <= OffsetDateTime::now_utc() => format!("expired {moment}"),
        (None, Some(moment)) => format!("until {moment}"),
        (None, None) => "good".to_owned(),
    };
    vec![key.name.clone(), key.role.name().to_owned(), state, key.created_at.to_string()]
}
