//! `pglobby tenant`: customers, each with a database of its own.

use std::{io::IsTerminal as _, path::PathBuf};

use clap::{Args, Subcommand};

use super::{
    Failure, Globals,
    operating::operator,
    output,
    table::{self, answer},
};
use crate::control_path::{
    onboarding::{
        NewTenant,
        adopt::{AdoptTenant, adopt},
        create::{CreateTenant, create},
        drop::{DropDatabase, drop_tenant},
        rotate::rotate,
        schema_files,
    },
    operator::OperatorError,
    tenants::{self, TenantSummary},
};

/// Make, adopt, list, change, suspend and drop tenants
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pglobby tenant create acme --schema schema.sql\n  pglobby tenant set acme pool_size=40"
)]
pub struct TenantCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    Adopt(Adopt),
    List(List),
    /// Everything about one tenant
    Show(Named),
    Set(Set),
    Suspend(Suspend),
    /// Open a suspended tenant again
    Resume(Named),
    Rotate(Rotate),
    Drop(Drop),
}

/// Make a tenant: roles, a database, credentials; all or nothing
///
/// The database belongs to the tenant's role and is closed to everybody else. A second role can read all of it, now
/// and later, and write nothing, temporary tables included. A run that died is undone by running it again.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pglobby tenant create acme --template app_template --schema schema.sql --json"
)]
struct Create {
    /// What clients will ask for
    name: String,
    /// Where its database goes; default: the accepting host with the fewest tenants
    #[arg(long)]
    host: Option<String>,
    /// Copy this database; everything in it becomes the tenant's
    #[arg(long, value_name = "DB")]
    template: Option<String>,
    /// Name of the database; default: the tenant's
    #[arg(long, value_name = "DB")]
    database: Option<String>,
    /// Run this SQL file in it, as the tenant's role; may be given several times
    #[arg(long, value_name = "FILE.sql")]
    schema: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Take an existing database in as a tenant
///
/// The database keeps its owner. The tenant gets roles of its own; they are granted access to its tables, present
/// and future, when its first pool is made. PUBLIC loses CONNECT and TEMP on it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant adopt acme --database acme_production --owner app")]
struct Adopt {
    /// What clients will ask for
    name: String,
    /// Where the database is
    #[arg(long)]
    host: Option<String>,
    /// The database; default: named as the tenant
    #[arg(long, value_name = "DB")]
    database: Option<String>,
    /// A role whose future tables the tenant may use as well, beside those who own tables now
    #[arg(long, value_name = "ROLE")]
    owner: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List tenants
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant list --json")]
struct List {
    /// Tombstones, too
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant show acme\n  pglobby tenant resume acme")]
struct Named {
    /// The tenant
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Change settings of a tenant; `KEY=` takes the configuration's default again
#[derive(Debug, Args)]
#[command(
    after_help = "Keys: pool_mode, pool_size, min_pool_size, max_clients, statement_timeout, allow_from\n\n\
                        Example:\n  pglobby tenant set acme pool_mode=session statement_timeout=30s allow_from=10.0.0.0/8"
)]
struct Set {
    /// The tenant
    name: String,
    /// What to change
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = key_and_value)]
    settings: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Close a tenant to clients
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant suspend acme --reason \"unpaid; call 555-0199\"")]
struct Suspend {
    /// The tenant
    name: String,
    /// Clients read this
    #[arg(long)]
    reason: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Give a tenant's roles new passwords; its clients notice nothing
///
/// The new passwords are made here, sealed, proved by logging in, and shown to nobody; if they do not let in, the old
/// ones come back. A run that died is repeated by the next.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant rotate acme")]
struct Rotate {
    /// The tenant
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Drop a tenant, its roles, its logins and its database (an adopted one stays)
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant drop acme --yes")]
struct Drop {
    /// The tenant
    name: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// The database of an adopted tenant, too
    #[arg(long)]
    with_database: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `KEY=VALUE`.
pub(super) fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, or KEY= for the default")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}

impl TenantCommand {
    /// Does it.
    ///
    /// # Errors
    /// [`Failure`], in one line.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        match self.action {
            Action::Create(command) => command.run(globals).await,
            Action::Adopt(command) => command.run(globals).await,
            Action::List(command) => command.run(globals).await,
            Action::Show(command) => {
                let tenant = tenants::show(&operator(globals).await?, &command.name).await?;
                answer(command.json, &tenant, || table::fields(&fields(&tenant)));
                Ok(())
            }
            Action::Set(command) => {
                let operator = operator(globals).await?;
                let tenant = tenants::set(&operator, &command.name, &command.settings).await?;
                answer(command.json, &tenant, || table::fields(&fields(&tenant)));
                Ok(())
            }
            Action::Suspend(command) => {
                let operator = operator(globals).await?;
                let tenant = tenants::suspend(&operator, &command.name, command.reason.as_deref()).await?;
                changed(&tenant, command.json);
                Ok(())
            }
            Action::Resume(command) => {
                changed(&tenants::resume(&operator(globals).await?, &command.name).await?, command.json);
                Ok(())
            }
            Action::Rotate(command) => {
                let done = rotate(&operator(globals).await?, &command.name).await?;
                answer(command.json, &done, || {
                    output::line(format!(
                        "tenant {}: new passwords for {}",
                        done.name,
                        done.roles.join(" and ")
                    ));
                });
                Ok(())
            }
            Action::Drop(command) => command.run(globals).await,
        }
    }
}

fn changed(tenant: &TenantSummary, json: bool) {
    answer(json, tenant, || output::line(format!("tenant {} is {}", tenant.name, tenant.status)));
}

impl Create {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let schema = schema_files::read(&self.schema)?;
        let wanted = CreateTenant {
            name: self.name,
            host: self.host,
            database: self.database,
            template: self.template,
            schema,
        };
        made(&create(&operator(globals).await?, &wanted).await?, self.json);
        Ok(())
    }
}

impl Adopt {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let wanted =
            AdoptTenant { name: self.name, host: self.host, database: self.database, owner: self.owner };
        made(&adopt(&operator(globals).await?, &wanted).await?, self.json);
        Ok(())
    }
}

fn made(tenant: &NewTenant, json: bool) {
    let NewTenant { name, status, host, database, username } = tenant;
    answer(json, tenant, || {
        output::line(format!(
            "tenant {name} is {status}: database {database} on host {host}, role {username}\n\
             next: pglobby login create NAME --tenant {name}"
        ));
    });
}

impl List {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let tenants = tenants::list(&operator(globals).await?, self.all).await?;
        let rows: Vec<Vec<String>> = tenants
            .iter()
            .map(|tenant| {
                vec![
                    tenant.name.clone(),
                    tenant.status.clone(),
                    tenant.host.clone(),
                    tenant.database.clone(),
                    tenant.username.clone(),
                    table::or_dash(tenant.pool_mode.as_ref()),
                    table::or_dash(tenant.pool_size),
                    tenant.logins.to_string(),
                ]
            })
            .collect();
        let headings = ["NAME", "STATUS", "HOST", "DATABASE", "USERNAME", "POOL MODE", "POOL SIZE", "LOGINS"];
        answer(self.json, &tenants, || {
            table::table("no tenants yet; make one with: pglobby tenant create NAME", &headings, &rows)
        });
        Ok(())
    }
}

fn fields(tenant: &TenantSummary) -> Vec<(&'static str, String)> {
    vec![
        ("name", tenant.name.clone()),
        ("status", tenant.status.clone()),
        ("reason", table::or_dash(tenant.status_reason.as_ref())),
        ("host", tenant.host.clone()),
        ("database", tenant.database.clone()),
        ("username", tenant.username.clone()),
        ("ro_username", table::or_dash(tenant.ro_username.as_ref())),
        ("pool_mode", table::or_dash(tenant.pool_mode.as_ref())),
        ("pool_size", table::or_dash(tenant.pool_size)),
        ("min_pool_size", table::or_dash(tenant.min_pool_size)),
        ("max_clients", table::or_dash(tenant.max_clients)),
        ("statement_timeout", table::or_dash(tenant.statement_timeout.as_ref())),
        (
            "allow_from",
            if tenant.allow_from.is_empty() { "all".to_owned() } else { tenant.allow_from.join(", ") },
        ),
        ("adopted", if tenant.adopted { "yes" } else { "no" }.to_owned()),
        ("logins", tenant.logins.to_string()),
        ("created_at", tenant.created_at.to_string()),
        ("updated_at", tenant.updated_at.to_string()),
    ]
}

impl Drop {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let operator = operator(globals).await?;
        if !self.yes {
            self.ask(&tenants::show(&operator, &self.name).await?)?;
        }
        let database = if self.with_database { DropDatabase::Always } else { DropDatabase::IfOurs };
        let dropped = drop_tenant(&operator, &self.name, database).await?;
        answer(self.json, &dropped, || {
            output::line(match dropped.database_dropped {
                true => format!("tenant {} and its database are gone", dropped.name),
                false => format!("tenant {} is gone; database {} stays", dropped.name, dropped.database),
            });
        });
        Ok(())
    }

    /// Typing the name is what makes one look at it.
    fn ask(&self, tenant: &TenantSummary) -> Result<(), OperatorError> {
        if !std::io::stdin().is_terminal() {
            return Err(OperatorError::Refused(format!(
                "nobody is there to confirm dropping tenant {:?}; give --yes",
                self.name
            )));
        }
        let fate =
            if tenant.adopted && !self.with_database { "stays" } else { "is deleted with all its data" };
        let refused = |why: &str| OperatorError::Refused(format!("{why}; nothing was dropped"));
        output::line(format!(
            "Tenant {} goes, with {} logins. Its database {} on host {} {fate}.\nType the tenant's name to drop it:",
            tenant.name, tenant.logins, tenant.database, tenant.host
        ));
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map_err(|error| refused(&error.to_string()))?;
        if answer.trim_end_matches(['\r', '\n']) == self.name {
            Ok(())
        } else {
            Err(refused("that is another name"))
        }
    }
}
