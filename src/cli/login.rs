//! `pglobby login`: who may log in, and where to.

use clap::{Args, Subcommand};
use time::OffsetDateTime;

use crate::{
    cli::{
        Failure, Globals,
        actor::operator,
        admin_command::{carry_out, carry_out_as},
        secrets::PasswordSource,
        table::{self, answer},
        tenant::key_and_value,
    },
    control_path::{
        admin::{
            commands::AdminCommand,
            logins::{self, LoginSummary, NewLogin, NewLoginKind},
        },
        secrets::scram_verifier::LoginPassword,
        timestamp::parse_timestamp,
    },
};

/// Make, list, change and drop logins
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pglobby login create alice --tenant acme\n  pglobby login create billing --service --all-tenants --read-only"
)]
pub struct LoginCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    List(List),
    /// Everything about one login
    Show(Named),
    Set(Set),
    SetPassword(SetPassword),
    /// Let a service login enter tenants
    Grant(Tenants),
    /// Take tenants from a service login
    Revoke(Tenants),
    /// Refuse a login from now on; its sessions end
    Disable(Named),
    /// Refuse it no longer
    Enable(Named),
    /// Remove a login; its sessions end
    Drop(Named),
}

/// Make a login: of one tenant, of a service, or of an administrator
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("kind").required(true).args(["tenant", "service", "admin"]),
    after_help = "Example:\n  pglobby login create alice --tenant acme --valid-until 2027-01-31\n  \
                  pglobby login create api --service --tenants acme,globex\n  pglobby login create root --admin"
)]
struct Create {
    /// Unique over all tenants; may be an e-mail address
    name: String,
    /// An employee's tenant
    #[arg(long)]
    tenant: Option<String>,
    /// May enter several tenants
    #[arg(long)]
    service: bool,
    /// Which ones
    #[arg(long, requires = "service", value_delimiter = ',', value_name = "A,B")]
    tenants: Vec<String>,
    /// Every one, also those to come
    #[arg(long, requires = "service", conflicts_with = "tenants")]
    all_tenants: bool,
    /// For the admin console
    #[arg(long)]
    admin: bool,
    /// May not write; an administrator may only SHOW
    #[arg(long)]
    read_only: bool,
    /// Refused from then on: 2027-01-31, 2027-01-31 18:00 (UTC), or RFC 3339
    #[arg(long, value_name = "TS", value_parser = parse_timestamp)]
    valid_until: Option<OffsetDateTime>,
    /// Networks it may come from
    #[arg(long, value_delimiter = ',', value_name = "CIDR,…")]
    allow_from: Vec<String>,
    #[command(flatten)]
    password: PasswordSource,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List logins
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby login list --tenant acme --json")]
struct List {
    /// Only those that may enter this tenant by name
    #[arg(long)]
    tenant: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby login show alice --json")]
struct Named {
    /// The login
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Change what a login may do, until when, and from where; sessions that this concerns end
#[derive(Debug, Args)]
#[command(
    after_help = "Keys: access (read_write, read_only), may_add_logins (true, false), valid_until, allow_from; `KEY=` lifts the limit\n\n\
                  Example:\n  pglobby login set alice access=read_only valid_until=2027-01-31 allow_from=10.0.0.0/8"
)]
struct Set {
    /// The login
    name: String,
    /// What to change
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = key_and_value)]
    settings: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Give a login another password
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby login set-password alice --generate")]
struct SetPassword {
    /// The login
    name: String,
    #[command(flatten)]
    password: PasswordSource,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("which").required(true).args(["tenants", "all_tenants"]),
    after_help = "Example:\n  pglobby login grant api --tenants acme,globex --read-only\n  pglobby login revoke api --tenants acme"
)]
struct Tenants {
    /// The service login
    name: String,
    /// Which ones
    #[arg(long, alias = "tenant", value_delimiter = ',', value_name = "A,B")]
    tenants: Vec<String>,
    /// The right to every one
    #[arg(long)]
    all_tenants: bool,
    /// (grant) without writing
    #[arg(long)]
    read_only: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl LoginCommand {
    /// Does it.
    ///
    /// # Errors
    /// [`Failure`], in one line.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        match self.action {
            Action::Create(command) => command.run(globals).await,
            Action::List(command) => command.run(globals).await,
            Action::Show(Named { name, json }) => {
                let login = logins::show(&operator(globals).await?, &name).await?;
                answer(json, &login, || table::fields(&fields(&login)));
                Ok(())
            }
            Action::SetPassword(command) => command.run(globals).await,
            Action::Set(Set { name, settings, json }) => {
                carry_out(globals, AdminCommand::SetLogin { name, settings }, json).await
            }
            Action::Grant(Tenants { name, tenants, all_tenants, read_only, json }) => {
                carry_out(globals, AdminCommand::Grant { name, tenants, all_tenants, read_only }, json).await
            }
            Action::Revoke(Tenants { name, tenants, all_tenants, json, .. }) => {
                carry_out(globals, AdminCommand::Revoke { name, tenants, all_tenants }, json).await
            }
            Action::Disable(Named { name, json }) => {
                carry_out(globals, AdminCommand::DisableLogin { name, disabled: true }, json).await
            }
            Action::Enable(Named { name, json }) => {
                carry_out(globals, AdminCommand::DisableLogin { name, disabled: false }, json).await
            }
            Action::Drop(Named { name, json }) => {
                carry_out(globals, AdminCommand::DropLogin { name }, json).await
            }
        }
    }
}

impl Create {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let operator = operator(globals).await?;
        let LoginPassword { password, generated } = self.password.obtain(&self.name)?;
        let kind = match self.tenant {
            Some(tenant) => NewLoginKind::Employee { tenant },
            None if self.admin => NewLoginKind::Admin,
            None => NewLoginKind::Service { tenants: self.tenants, all_tenants: self.all_tenants },
        };
        let login = NewLogin {
            name: self.name,
            kind,
            read_only: self.read_only,
            password,
            valid_until: self.valid_until,
            allow_from: self.allow_from,
        };
        carry_out_as(operator, AdminCommand::CreateLogin { login, generated }, self.json).await
    }
}

impl SetPassword {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let operator = operator(globals).await?;
        logins::show(&operator, &self.name).await?; // before anybody types a password for nobody
        let password = self.password.obtain(&self.name)?;
        carry_out_as(operator, AdminCommand::SetPassword { name: self.name, password }, self.json).await
    }
}

impl List {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let logins = logins::list(&operator(globals).await?, self.tenant.as_deref()).await?;
        let rows: Vec<Vec<String>> = logins
            .iter()
            .map(|login| {
                vec![
                    login.name.clone(),
                    login.kind.clone(),
                    entrances(login),
                    login.access.clone(),
                    table::or_dash(login.valid_until),
                    if login.disabled_at.is_some() { "disabled" } else { "enabled" }.to_owned(),
                ]
            })
            .collect();
        let headings = ["NAME", "KIND", "TENANTS", "ACCESS", "VALID UNTIL", "STATE"];
        answer(self.json, &logins, || {
            table::table("no logins; make one with: pglobby login create NAME --tenant T", &headings, &rows)
        });
        Ok(())
    }
}

fn entrances(login: &LoginSummary) -> String {
    let granted = login.tenants.iter().map(|grant| match grant.access.as_str() {
        "read_only" => format!("{} (read_only)", grant.tenant),
        _ => grant.tenant.clone(),
    });
    let all = login.all_tenants.then(|| "all".to_owned());
    let names: Vec<String> = login.tenant.clone().into_iter().chain(all).chain(granted).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(", ") }
}

/// A login, for people.
pub(super) fn fields(login: &LoginSummary) -> Vec<(&'static str, String)> {
    let networks = if login.allow_from.is_empty() { "all".to_owned() } else { login.allow_from.join(", ") };
    vec![
        ("name", login.name.clone()),
        ("kind", login.kind.clone()),
        ("tenants", entrances(login)),
        ("access", login.access.clone()),
        ("may_add_logins", login.may_add_logins.to_string()),
        ("valid_until", table::or_dash(login.valid_until)),
        ("disabled_at", table::or_dash(login.disabled_at)),
        ("allow_from", networks),
        ("created_at", login.created_at.to_string()),
    ]
}
