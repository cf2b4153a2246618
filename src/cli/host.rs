//! `pglobby host`: PostgreSQL clusters that tenant databases live on.

use std::io::IsTerminal as _;

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    cli::{
        Failure, Globals,
        actor::actor,
        admin_command,
        output::{self, Json},
        secrets,
        table::{self, answer},
        tenant::key_and_value,
    },
    config::TlsMode,
    control_path::{
        admin::{
            actor::Actor,
            commands::AdminCommand,
            host_budget::ServerLimits,
            hosts::{self, HostReport, NewHost},
        },
        onboarding::names::shell_word,
    },
};

/// The administrator's password, for scripts that cannot use standard input.
const PASSWORD_VARIABLE: &str = "PGLOBBY_HOST_PASSWORD";

/// Register, list, change and remove hosts
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby host list\n  pglobby host set west max_connections=400")]
pub struct HostCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Add(Add),
    /// List hosts
    #[command(after_help = "Example:\n  pglobby host list --json")]
    List(Json),
    Set(Set),
    Remove(Remove),
}

/// Register a PostgreSQL cluster for tenants, after a test that its administrator can create databases and
/// roles
///
/// The password is read from the terminal, with --password-stdin, or from PGLOBBY_HOST_PASSWORD.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pglobby host add west --address db-west.internal --admin-user master \\\n    \
                        --tls-mode verify-full --max-connections 400\n  \
                        pglobby host add east --address pg1.internal,pg2.internal:5433 --admin-user master"
)]
struct Add {
    /// Name of the host in pglobby
    name: String,
    /// DNS name, IP address, or folder of a Unix socket; several, separated by commas, of a primary and its
    /// standbys: pg1,pg2:5433
    #[arg(long)]
    address: String,
    /// TCP port, of each address that names none
    #[arg(long, value_name = "N", default_value_t = 5432)]
    port: u16,
    /// TLS mode, with the meaning of libpq's sslmode
    #[arg(long, value_name = "MODE", default_value = "prefer", 
          value_parser = PossibleValuesParser::new(TlsMode::WORDS))]
    tls_mode: String,
    /// PEM file of certificate authorities, the same path on every node; without it, the system's
    #[arg(long, value_name = "FILE")]
    tls_root_ca: Option<String>,
    /// Role that creates databases and roles: a superuser, or one with CREATEDB and CREATEROLE
    #[arg(long, value_name = "ROLE", default_value = "postgres")]
    admin_user: String,
    /// Database that this role connects to
    #[arg(long, value_name = "DB", default_value = "postgres")]
    admin_database: String,
    /// Limit of server connections of all nodes on this host, over all tenants; without it, what the host's
    /// PostgreSQL allows, less a reserve
    #[arg(long, value_name = "N")]
    max_connections: Option<u32>,
    /// Put a new tenant there only if `tenant create --host` names the host
    #[arg(long)]
    no_new_tenants: bool,
    /// Revoke CONNECT and TEMP on postgres and template1 from PUBLIC; only for clusters without other
    /// applications
    #[arg(long)]
    close_public: bool,
    /// Read the password from the first line of standard input
    #[arg(long)]
    password_stdin: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Change settings of a host, after a test that pglobby can connect with them
#[derive(Debug, Args)]
#[command(
    after_help = "Keys: address, port, tls_mode, tls_root_ca, admin_user, admin_database, max_connections, \
                  accepts_tenants\n\nExample:\n  \
                  pglobby host set west address=10.0.0.7 max_connections=400\n  \
                  pglobby host set west address=pg1.internal,pg2.internal:5433\n  \
                  pglobby host set west --password"
)]
struct Set {
    /// Name of the host
    name: String,
    /// Settings to change; `KEY=` removes a value
    #[arg(value_name = "KEY=VALUE", value_parser = key_and_value,
          required_unless_present_any = ["password", "password_stdin", "close_public"])]
    settings: Vec<(String, String)>,
    /// Ask for a new password of the administrator
    #[arg(long)]
    password: bool,
    /// Read the new password from the first line of standard input
    #[arg(long)]
    password_stdin: bool,
    /// Revoke CONNECT and TEMP on postgres and template1 from PUBLIC; only for clusters without other
    /// applications
    #[arg(long)]
    close_public: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Remove a host that has no tenants; the cluster itself is not changed
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby host remove west")]
struct Remove {
    /// Name of the host
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl HostCommand {
    /// Runs the command.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        match self.action {
            Action::Add(command) => command.run(globals).await,
            Action::List(Json { json }) => list(globals, json).await,
            Action::Set(command) => command.run(globals).await,
            Action::Remove(Remove { name, json }) => {
                admin_command::run(globals, AdminCommand::RemoveHost { name }, json).await
            }
        }
    }
}

impl Add {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let actor = actor(globals).await?;
        let admin_password = password(&self.admin_user, self.password_stdin)?;
        let host = NewHost {
            name: self.name.clone(),
            address: self.address,
            port: self.port,
            tls_mode: self.tls_mode,
            tls_root_ca: self.tls_root_ca,
            admin_user: self.admin_user,
            admin_database: self.admin_database,
            admin_password,
            max_connections: self.max_connections,
            accepts_tenants: !self.no_new_tenants,
        };
        let mut report = hosts::add(&actor, &host).await?;
        if self.close_public {
            close(&actor, &mut report).await?;
        }
        print(&report, self.json);
        Ok(())
    }
}

impl Set {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let actor = actor(globals).await?;
        let asked = self.password || self.password_stdin;
        let password = if asked { password(&self.name, self.password_stdin)? } else { None };
        let mut report = hosts::set(&actor, &self.name, &self.settings, password.as_ref()).await?;
        if self.close_public {
            close(&actor, &mut report).await?;
        }
        print(&report, self.json);
        Ok(())
    }
}

async fn close(actor: &Actor, report: &mut HostReport) -> Result<(), Failure> {
    let databases = ["postgres".to_owned(), "template1".to_owned()];
    let closed = hosts::close_to_public(actor, &report.name, &databases).await?;
    report.open_to_public.retain(|database| !closed.contains(database));
    Ok(())
}

/// Reads the administrator's password. `None` if the host asks for none (peer, trust, certificate).
fn password(user: &str, from_stdin: bool) -> std::io::Result<Option<SecretString>> {
    let password = if from_stdin {
        secrets::first_line()?
    } else if let Ok(password) = std::env::var(PASSWORD_VARIABLE) {
        SecretString::from(password)
    } else if std::io::stdin().is_terminal() {
        secrets::prompt(&format!("Password of {user} (empty if the host asks for none): "))?
    } else {
        return Ok(None);
    };
    Ok(Some(password).filter(|password| !password.expose_secret().is_empty()))
}

fn print(report: &HostReport, json: bool) {
    let major = report.server_version / 10_000;
    let rights = if report.superuser { "is a superuser" } else { "has CREATEDB and CREATEROLE" };
    answer(json, report, || {
        output::line(format!("host {}: PostgreSQL {major}; its administrator {rights}", report.name));
        output::line(budget(report));
        if !report.open_to_public.is_empty() {
            let (databases, name) = (report.open_to_public.join(", "), shell_word(&report.name));
            output::line(format!(
                "note: PUBLIC may connect to {databases}, so the tenants' roles may too.\n      \
                 To revoke that on postgres and template1: pglobby host set {name} --close-public"
            ));
        }
    });
}

fn budget(report: &HostReport) -> String {
    let limits = ServerLimits {
        max_connections: report.server_max_connections,
        reserved: report.server_reserved_connections,
        others: report.other_connections,
    };
    let server = limits.in_words();
    match (report.max_connections, limits.trouble(report.max_connections)) {
        (Some(budget), None) => format!("budget of all nodes together: {budget} (the server has {server})"),
        (budget, _) => format!(
            "note: the budget of all nodes together is {}, and the server has {server}.\n      To change that: {}",
            budget.map_or_else(|| "not limited".to_owned(), |budget| budget.to_string()),
            limits.remedy(&report.name)
        ),
    }
}

async fn list(globals: &Globals, json: bool) -> Result<(), Failure> {
    let hosts = hosts::list(&actor(globals).await?).await?;
    let rows: Vec<Vec<String>> = hosts
        .iter()
        .map(|host| {
            vec![
                host.name.clone(),
                std::iter::once(format!("{}:{}", host.address, host.port))
                    .chain(host.more_addresses.iter().cloned())
                    .collect::<Vec<_>>()
                    .join(","),
                host.tls_mode.clone(),
                host.admin_user.clone(),
                host.max_connections.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string()),
                if host.accepts_tenants { "yes" } else { "no" }.to_owned(),
                host.tenants.to_string(),
            ]
        })
        .collect();
    let headings = ["NAME", "ADDRESS", "TLS", "ADMIN", "MAX CONN", "NEW TENANTS", "TENANTS"];
    answer(json, &hosts, || {
        table::table("no hosts; register the first with: pglobby init", &headings, &rows)
    });
    Ok(())
}
