//! `pglobby login`: the logins of clients and administrators.

use clap::{Args, Subcommand};
use time::OffsetDateTime;

use crate::{
    cli::{
        Failure, Globals,
        actor::{actor, actor_with},
        admin_command,
        secrets::PasswordSource,
        table::{self, answer},
        tenant::key_and_value,
    },
    control_path::{
        admin::{
            commands::AdminCommand,
            logins::{self, GrantSummary, LoginSummary, NewLogin, NewLoginKind},
        },
        secrets::scram_verifier::LoginPassword,
        timestamp::parse_timestamp,
    },
};

/// Create, list, change and drop logins
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby login create alice --tenant acme\n  pglobby login show alice")]
pub struct LoginCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    List(List),
    /// Show everything about a login
    #[command(after_help = "Example:\n  pglobby login show alice")]
    Show(Named),
    Set(Set),
    SetPassword(SetPassword),
    Grant(Grant),
    Revoke(Revoke),
    /// Disable a login: its sessions end, and new ones are refused
    #[command(after_help = "Example:\n  pglobby login disable alice")]
    Disable(Named),
    /// Enable a disabled login
    #[command(after_help = "Example:\n  pglobby login enable alice")]
    Enable(Named),
    /// Drop a login; its sessions end
    #[command(after_help = "Example:\n  pglobby login drop alice")]
    Drop(Named),
}

/// Create a login for an employee of one tenant, for a service, or for an administrator
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("kind").required(true).args(["tenant", "service", "admin"]),
    after_help = "Example:\n  pglobby login create alice --tenant acme --valid-until 2027-01-31\n  \
                  pglobby login create api --service --tenants acme,globex\n  \
                  pglobby login create root --admin"
)]
struct Create {
    /// Name of the login, unique over all tenants; may be an e-mail address
    name: String,
    /// Employee login: connects to this tenant only
    #[arg(long)]
    tenant: Option<String>,
    /// Service login: connects to several tenants
    #[arg(long)]
    service: bool,
    /// Tenants of the service login
    #[arg(long, requires = "service", value_delimiter = ',', value_name = "A,B")]
    tenants: Vec<String>,
    /// The service login may connect to every tenant, including later ones
    #[arg(long, requires = "service", conflicts_with = "tenants")]
    all_tenants: bool,
    /// Administrator's login for the console
    #[arg(long)]
    admin: bool,
    /// Refuse writes; an administrator may only use SHOW
    #[arg(long)]
    read_only: bool,
    /// When the login expires: 2027-01-31, 2027-01-31 18:00 (UTC) or RFC 3339
    #[arg(long, value_name = "TIME", value_parser = parse_timestamp)]
    valid_until: Option<OffsetDateTime>,
    /// Networks that the login may connect from; without it, any
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
    /// Only logins of this tenant, and services that this tenant is granted to by name
    #[arg(long)]
    tenant: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Named {
    /// Name of the login
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Change the access of a login, when it expires, and where it connects from; affected sessions end
#[derive(Debug, Args)]
#[command(after_help = "Keys: access (read_write, read_only), may_add_logins (true, false), valid_until, \
                  allow_from; `KEY=` removes a limit\n\nExample:\n  \
                  pglobby login set alice access=read_only valid_until=2027-01-31 allow_from=10.0.0.0/8")]
struct Set {
    /// Name of the login
    name: String,
    /// Settings to change
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = key_and_value)]
    settings: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Give a login a new password
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby login set-password alice --generate")]
struct SetPassword {
    /// Name of the login
    name: String,
    #[command(flatten)]
    password: PasswordSource,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Allow a service login to connect to tenants
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("which").required(true).args(["tenants", "all_tenants"]),
    after_help = "Example:\n  pglobby login grant api --tenants acme,globex --read-only\n  \
                  pglobby login grant api --all-tenants"
)]
struct Grant {
    /// Name of the service login
    name: String,
    /// Tenants to add
    #[arg(long, alias = "tenant", value_delimiter = ',', value_name = "A,B")]
    tenants: Vec<String>,
    /// Every tenant, including later ones
    #[arg(long)]
    all_tenants: bool,
    /// Refuse writes in these tenants
    #[arg(long)]
    read_only: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Take tenants from a service login; its sessions in them end
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("which").required(true).args(["tenants", "all_tenants"]),
    after_help = "Example:\n  pglobby login revoke api --tenants acme"
)]
struct Revoke {
    /// Name of the service login
    name: String,
    /// Tenants to remove
    #[arg(long, alias = "tenant", value_delimiter = ',', value_name = "A,B")]
    tenants: Vec<String>,
    /// The right to every tenant; grants by name stay
    #[arg(long)]
    all_tenants: bool,
    /// Without effect; kept for scripts
    #[arg(long, hide = true)]
    read_only: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl LoginCommand {
    /// Runs the command.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let (command, json) = match self.action {
            Action::Create(command) => return command.run(globals).await,
            Action::List(command) => return command.run(globals).await,
            Action::SetPassword(command) => return command.run(globals).await,
            Action::Show(Named { name, json }) => {
                let login = logins::show(&actor(globals).await?, &name).await?;
                answer(json, &login, || show(&login));
                return Ok(());
            }
            Action::Set(Set { name, settings, json }) => (AdminCommand::SetLogin { name, settings }, json),
            Action::Grant(Grant { name, tenants, all_tenants, read_only, json }) => {
                (AdminCommand::Grant { name, tenants, all_tenants, read_only }, json)
            }
            Action::Revoke(Revoke { name, tenants, all_tenants, json, .. }) => {
                (AdminCommand::Revoke { name, tenants, all_tenants }, json)
            }
            Action::Disable(Named { name, json }) => {
                (AdminCommand::DisableLogin { name, disabled: true }, json)
            }
            Action::Enable(Named { name, json }) => {
                (AdminCommand::DisableLogin { name, disabled: false }, json)
            }
            Action::Drop(Named { name, json }) => (AdminCommand::DropLogin { name }, json),
        };
        admin_command::run(globals, command, json).await
    }
}

impl Create {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_config()?;
        let actor = actor_with(&config).await?;
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
        admin_command::run_as(actor, &config, AdminCommand::CreateLogin { login, generated }, self.json).await
    }
}

impl SetPassword {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_config()?;
        let actor = actor_with(&config).await?;
        // An unknown login is an error before the prompt, not after it.
        logins::show(&actor, &self.name).await?;
        let password = self.password.obtain(&self.name)?;
        let command = AdminCommand::SetPassword { name: self.name, password };
        admin_command::run_as(actor, &config, command, self.json).await
    }
}

impl List {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let logins = logins::list(&actor(globals).await?, self.tenant.as_deref()).await?;
        let row = |login: &LoginSummary| {
            vec![
                login.name.clone(),
                login.kind.clone(),
                first_few(&tenants(login)),
                login.access.clone(),
                table::or_dash(login.valid_until.map(table::time)),
                if login.disabled_at.is_some() { "disabled" } else { "enabled" }.to_owned(),
            ]
        };
        let rows: Vec<Vec<String>> = logins.iter().map(row).collect();
        let headings = ["NAME", "KIND", "TENANTS", "ACCESS", "VALID UNTIL", "STATE"];
        answer(self.json, &logins, || {
            table::table(
                "no logins; create one with: pglobby login create NAME --tenant T",
                &headings,
                &rows,
            );
        });
        Ok(())
    }
}

fn tenants(login: &LoginSummary) -> Vec<String> {
    let all = login.all_tenants.then(|| "all".to_owned());
    login.tenant.clone().into_iter().chain(all).chain(granted(login)).collect()
}

/// The tenants that are granted by name, with `(read_only)` where writes are refused.
fn granted(login: &LoginSummary) -> Vec<String> {
    let name = |grant: &GrantSummary| match grant.access.as_str() {
        "read_only" => format!("{} (read_only)", grant.tenant),
        _ => grant.tenant.clone(),
    };
    login.tenants.iter().map(name).collect()
}

/// As many names as fit a column of a listing; `login show` has all.
fn first_few(names: &[String]) -> String {
    const WIDTH_MAX: usize = 18;
    let mut shown = names.len();
    while shown > 1 && names[..shown].join(", ").chars().count() > WIDTH_MAX {
        shown -= 1;
    }
    match names.len() - shown {
        0 => all_of(names),
        more => format!("{}, +{more}", names[..shown].join(", ")),
    }
}

fn all_of(names: &[String]) -> String {
    if names.is_empty() { "-".to_owned() } else { names.join(", ") }
}

/// Prints everything about a login.
pub(super) fn show(login: &LoginSummary) {
    table::show(login, |field| match field {
        "tenants" => Some(all_of(&granted(login))),
        "allow_from" => Some(table::networks(&login.allow_from)),
        _ => None,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_names_the_first_tenants_and_counts_the_others() {
        let names: Vec<String> = ["acme", "globex", "initech", "umbrella"].map(str::to_owned).into();
        assert_eq!(first_few(&names), "acme, globex, +2");
        assert_eq!(first_few(&names[..2]), "acme, globex");
        assert_eq!(first_few(&[]), "-");
    }
}
