//! `pglobby host`: PostgreSQL clusters that tenant databases live on.

use std::io::IsTerminal as _;

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    cli::{
        Failure, Globals,
        actor::operator,
        admin_command::carry_out,
        output, secrets,
        table::{self, answer},
        tenant::key_and_value,
    },
    config::TlsMode,
    control_path::{
        admin::{
            commands::AdminCommand,
            hosts::{self, HostReport, NewHost},
        },
        onboarding::names::shell_word,
    },
};

/// The administrator's password, for scripts that have no standard input to spare.
const PASSWORD_VARIABLE: &str = "PGLOBBY_HOST_PASSWORD";

/// Register, list, change and remove hosts
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby host add west --address db-west.internal --admin-user master")]
pub struct HostCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Add(Add),
    /// List hosts
    List(List),
    Set(Set),
    Remove(Remove),
}

/// Register a cluster, after reaching it and finding that its administrator may create databases and roles
///
/// Password: from the terminal, --password-stdin or PGLOBBY_HOST_PASSWORD.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pglobby host add west --address db-west.internal --tls-mode verify-full --max-connections 400"
)]
struct Add {
    /// What it is called here
    name: String,
    /// DNS name, address, or the folder of a Unix socket
    #[arg(long)]
    address: String,
    /// Port
    #[arg(long, default_value_t = 5432)]
    port: u16,
    /// libpq's sslmode
    #[arg(long, default_value = "prefer", value_parser = PossibleValuesParser::new(TlsMode::WORDS))]
    tls_mode: String,
    /// PEM file of certificate authorities, the same path on every node; default: the system's
    #[arg(long, value_name = "FILE")]
    tls_root_ca: Option<String>,
    /// A superuser, or a role with CREATEDB and CREATEROLE
    #[arg(long, default_value = "postgres")]
    admin_user: String,
    /// Where it works from
    #[arg(long, default_value = "postgres")]
    admin_database: String,
    /// Server connections over all tenants at most
    #[arg(long)]
    max_connections: Option<u32>,
    /// New tenants go there only when it is named
    #[arg(long)]
    no_new_tenants: bool,
    /// Take CONNECT and TEMP on postgres and template1 from PUBLIC; for clusters that serve nothing else
    #[arg(long)]
    close_public: bool,
    /// Read the password from standard input, its first line
    #[arg(long)]
    password_stdin: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby host list --json")]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Change a host; it is reached as it will be before anything is kept
#[derive(Debug, Args)]
#[command(
    after_help = "Keys: address, port, tls_mode, tls_root_ca, admin_user, admin_database, max_connections, \
                        accepts_tenants\n\nExample:\n  pglobby host set west address=10.0.0.7 max_connections=400\n  \
                        pglobby host set west --password"
)]
struct Set {
    /// The host
    name: String,
    /// What to change; `KEY=` clears
    #[arg(value_name = "KEY=VALUE", value_parser = key_and_value, required_unless_present_any = ["password", "password_stdin", "close_public"])]
    settings: Vec<(String, String)>,
    /// Ask for another password of the administrator
    #[arg(long)]
    password: bool,
    /// Read it from standard input, its first line
    #[arg(long)]
    password_stdin: bool,
    /// Take CONNECT and TEMP on postgres and template1 from PUBLIC; for clusters that serve nothing else
    #[arg(long)]
    close_public: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Forget a host that no tenant lives on; the cluster itself is left alone
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby host remove west")]
struct Remove {
    /// The host
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl HostCommand {
    /// Does it.
    ///
    /// # Errors
    /// [`Failure`], in one line.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        match self.action {
            Action::Add(command) => command.run(globals).await,
            Action::List(List { json }) => list(globals, json).await,
            Action::Set(command) => command.run(globals).await,
            Action::Remove(Remove { name, json }) => {
                carry_out(globals, AdminCommand::RemoveHost { name }, json).await
            }
        }
    }
}

impl Add {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let operator = operator(globals).await?;
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
        let mut report = hosts::add(&operator, &host).await?;
        if self.close_public {
            close(&operator, &mut report).await?;
        }
        tell(&report, self.json)
    }
}

impl Set {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let operator = operator(globals).await?;
        let asked = self.password || self.password_stdin;
        let password = if asked { password(&self.name, self.password_stdin)? } else { None };
        let mut report = hosts::set(&operator, &self.name, &self.settings, password.as_ref()).await?;
        if self.close_public {
            close(&operator, &mut report).await?;
        }
        tell(&report, self.json)
    }
}

async fn close(
    operator: &crate::control_path::admin::actor::Actor,
    report: &mut HostReport,
) -> Result<(), Failure> {
    let ours = ["postgres".to_owned(), "template1".to_owned()];
    let closed = hosts::close_to_public(operator, &report.name, &ours).await?;
    report.open_to_public.retain(|database| !closed.contains(database));
    Ok(())
}

/// `None`: none is needed (peer, trust, certificate).
fn password(whose: &str, from_stdin: bool) -> std::io::Result<Option<SecretString>> {
    let password = if from_stdin {
        secrets::first_line()?
    } else if let Ok(password) = std::env::var(PASSWORD_VARIABLE) {
        SecretString::from(password)
    } else if std::io::stdin().is_terminal() {
        secrets::prompt(&format!("Password of {whose} (empty: none needed): "))?
    } else {
        return Ok(None);
    };
    Ok(Some(password).filter(|password| !password.expose_secret().is_empty()))
}

fn tell(report: &HostReport, json: bool) -> Result<(), Failure> {
    let major = report.server_version / 10_000;
    let rank = if report.superuser { "a superuser" } else { "CREATEDB and CREATEROLE" };
    answer(json, report, || {
        output::line(format!("host {} is PostgreSQL {major}; its administrator is {rank}", report.name));
        if !report.open_to_public.is_empty() {
            output::line(format!(
                "note: every role of that cluster, tenants' roles included, may connect to {} (PostgreSQL's default \
                 for PUBLIC); where that is not wanted: pglobby host set {} --close-public, or REVOKE CONNECT ON \
                 DATABASE … FROM PUBLIC",
                report.open_to_public.join(", "),
                shell_word(&report.name)
            ));
        }
    });
    Ok(())
}

async fn list(globals: &Globals, json: bool) -> Result<(), Failure> {
    let hosts = hosts::list(&operator(globals).await?).await?;
    let rows: Vec<Vec<String>> = hosts
        .iter()
        .map(|host| {
            vec![
                host.name.clone(),
                format!("{}:{}", host.address, host.port),
                host.tls_mode.clone(),
                host.admin_user.clone(),
                table::or_dash(host.max_connections),
                if host.accepts_tenants { "yes" } else { "no" }.to_owned(),
                host.tenants.to_string(),
            ]
        })
        .collect();
    let headings = ["NAME", "ADDRESS", "TLS", "ADMIN", "MAX CONNECTIONS", "ACCEPTS", "TENANTS"];
    answer(json, &hosts, || table::table("no hosts; `pglobby init` registers the first", &headings, &rows));
    Ok(())
}
