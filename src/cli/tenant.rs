//! `pglobby tenant`: tenants, each with its own database and roles.

use std::{io::IsTerminal as _, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use crate::{
    cli::{
        Failure, Globals,
        actor::actor_with,
        admin_command, output, secrets,
        table::{self, answer},
    },
    config::{Config, units},
    control_path::{
        admin::{
            commands::AdminCommand,
            tenants::{self, SuspendSessions, TenantSummary},
        },
        onboarding::{
            adopt::AdoptTenant, create::CreateTenant, drop::DropDatabase, move_tenant::MoveTenant,
            ownership::Ownership, schema_files,
        },
    },
};

/// Create, adopt, list, change, suspend, move and drop tenants
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant create acme\n  pglobby tenant set acme pool_size=40")]
pub struct TenantCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    Adopt(Adopt),
    List(List),
    /// Show everything about a tenant
    #[command(after_help = "Example:\n  pglobby tenant show acme")]
    Show(Named),
    Set(Set),
    Suspend(Suspend),
    /// Let clients of a suspended tenant connect again
    #[command(after_help = "Example:\n  pglobby tenant resume acme")]
    Resume(Named),
    /// Give the roles of a tenant new passwords; clients notice nothing
    ///
    /// The passwords are generated, sealed, tested by a login, and never shown. If the test fails, the old
    /// ones are used again. If the command is interrupted, run it again.
    #[command(after_help = "Example:\n  pglobby tenant rotate acme")]
    Rotate(Named),
    Move(Move),
    Rename(Rename),
    Drop(Drop),
}

/// Create a tenant: a database, its roles and their credentials
///
/// The tenant's role owns the database; PUBLIC loses CONNECT on it. A second role can read all of it,
/// including later tables, and can write nothing, not even temporary tables. If the command fails, everything
/// is undone. If it is interrupted, run it again: it undoes what is there and starts again.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant create acme\n  \
                        pglobby tenant create acme --template app_template --schema schema.sql --json")]
struct Create {
    /// Name of the tenant, which clients connect to
    name: String,
    /// Host of its database; without it, the host with the fewest tenants that takes new ones
    #[arg(long)]
    host: Option<String>,
    /// Database to copy; the tenant's role owns all objects of the copy
    #[arg(long, value_name = "DB")]
    template: Option<String>,
    /// Name of the database; without it, that of the tenant
    #[arg(long, value_name = "DB")]
    database: Option<String>,
    /// SQL file to run in the database as the tenant's role, by psql if it is installed; may be repeated
    #[arg(long, value_name = "FILE.sql")]
    schema: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make a tenant of an existing database
///
/// The tenant gets roles of its own; with --username an existing role of the application becomes the
/// tenant's and stays when the tenant is dropped. So that migrations work, the tenant's role becomes a member
/// of the owners of what is in the database, if these are ordinary roles that have to do with this database
/// alone. Otherwise the answer says what it may not do; --ownership transfer makes it the owner of everything.
/// Privileges on all tables, including later ones, are granted when the first client connects. PUBLIC loses
/// CONNECT and TEMP on the database.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant adopt acme --database acme_production --owner app\n  \
                        pglobby tenant adopt acme --database acme_production --ownership transfer\n  \
                        pglobby tenant adopt acme --username acme_app --password-stdin")]
struct Adopt {
    /// Name of the tenant, which clients connect to
    name: String,
    /// Host of the database
    #[arg(long)]
    host: Option<String>,
    /// Name of the database; without it, that of the tenant
    #[arg(long, value_name = "DB")]
    database: Option<String>,
    /// Role that will own later tables; owners of present tables need not be named
    #[arg(long, value_name = "ROLE")]
    owner: Option<String>,
    /// What the tenant's role becomes to the owners: a member of them (membership), the owner itself
    /// (transfer), or nothing (none: it reads and writes rows). Without it, a member where that is safe
    #[arg(long, value_name = "HOW")]
    ownership: Option<Ownership>,
    /// Existing role that becomes the tenant's; it gets a new password, unless --password-stdin gives its own
    #[arg(long, value_name = "ROLE")]
    username: Option<String>,
    /// Read the present password of --username from the first line of standard input, and keep it
    #[arg(long, requires = "username")]
    password_stdin: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List tenants
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant list --json")]
struct List {
    /// Include dropped tenants
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Named {
    /// Name of the tenant
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Change settings of a tenant; `KEY=` returns to the default of the configuration
#[derive(Debug, Args)]
#[command(after_help = "Keys: pool_mode, pool_size, min_pool_size, max_clients, weight, \
                  statement_timeout, allow_from\n\nExample:\n  \
                  pglobby tenant set acme pool_size=40 statement_timeout=30s allow_from=10.0.0.0/8\n  \
                  pglobby tenant set acme pool_mode=session\n  \
                  pglobby tenant set acme weight=3")]
struct Set {
    /// Name of the tenant
    name: String,
    /// Settings to change
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = key_and_value)]
    settings: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Suspend a tenant: its sessions end, and new ones are refused
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant suspend acme --reason \"unpaid; call 555-0199\"\n  \
                        pglobby tenant suspend acme --after-transaction")]
struct Suspend {
    /// Name of the tenant
    name: String,
    /// Reason, which clients read in the error
    #[arg(long)]
    reason: Option<String>,
    /// End sessions at once, in the middle of a transaction too (the default)
    #[arg(long, conflicts_with = "after_transaction")]
    now: bool,
    /// End sessions after their transaction; suspend again with --now to end those that are left
    #[arg(long)]
    after_transaction: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Move a tenant to another host; its sessions stay connected and wait
///
/// If both hosts allow logical replication, the copy is made while clients work, and sessions wait only for
/// the switch. Otherwise pg_dump and pg_restore make the copy, and sessions wait for all of it, up to
/// query_wait_timeout. A move that fails before the switch is undone. If the command is interrupted, run it
/// again: it undoes or completes the move. An adopted database can be moved if the
/// tenant's role owns everything in it (adopt --ownership transfer) and pglobby made that role.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant move acme --host west --patience 2min")]
struct Move {
    /// Name of the tenant
    name: String,
    /// Host to move to
    #[arg(long)]
    host: String,
    /// How long to wait for open transactions before the move is cancelled
    #[arg(long, value_name = "TIME", default_value = MoveTenant::PATIENCE, value_parser = units::duration)]
    patience: Duration,
    /// Keep the old database, closed to clients
    #[arg(long)]
    keep_source: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Rename a tenant; its sessions stay connected, its database and roles keep their names
///
/// New connections must use the new name; the old one is refused.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant rename acme acme-gmbh")]
struct Rename {
    /// Name of the tenant
    name: String,
    /// New name
    new_name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Drop a tenant with its roles, logins and database (an adopted database is kept)
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant drop acme --final-dump acme.dump\n  \
                  pglobby tenant drop acme --yes")]
struct Drop {
    /// Name of the tenant
    name: String,
    /// Do not ask for confirmation
    #[arg(long)]
    yes: bool,
    /// Drop the database of an adopted tenant too
    #[arg(long)]
    with_database: bool,
    /// For a host that is lost: do not connect to it; database and roles stay there
    #[arg(long, conflicts_with_all = ["with_database", "final_dump"])]
    leave_host: bool,
    /// Write a dump to this new file (for pg_restore) when all sessions have ended
    #[arg(long, value_name = "FILE")]
    final_dump: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Reads `KEY=VALUE`.
pub(super) fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, or KEY= for the default")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}

impl TenantCommand {
    /// Runs the command.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let (command, json) = match self.action {
            Action::Create(Create { name, host, template, database, schema, json }) => {
                let schema = schema_files::read(&schema)?;
                (AdminCommand::CreateTenant(CreateTenant { name, host, database, template, schema }), json)
            }
            Action::Adopt(Adopt {
                name,
                host,
                database,
                owner,
                ownership,
                username,
                password_stdin,
                json,
            }) => {
                let password = if password_stdin { Some(secrets::first_line()?) } else { None };
                let wanted = AdoptTenant { name, host, database, owner, ownership, username, password };
                (AdminCommand::AdoptTenant(wanted), json)
            }
            Action::List(command) => return command.run(globals).await,
            Action::Drop(command) => return command.run(globals).await,
            Action::Show(Named { name, json }) => {
                let config = globals.load_config()?;
                let tenant = tenants::show(&actor_with(&config).await?, &name).await?;
                answer(json, &tenant, || show(&tenant, &config));
                return Ok(());
            }
            Action::Set(Set { name, settings, json }) => (AdminCommand::SetTenant { name, settings }, json),
            Action::Suspend(Suspend { name, reason, after_transaction, json, .. }) => {
                let sessions = SuspendSessions::ending(after_transaction);
                (AdminCommand::SuspendTenant { name, reason, sessions }, json)
            }
            Action::Resume(Named { name, json }) => (AdminCommand::ResumeTenant { name }, json),
            Action::Rotate(Named { name, json }) => (AdminCommand::RotateTenant { name }, json),
            Action::Move(Move { name, host, patience, keep_source, json }) => {
                (AdminCommand::MoveTenant { name, to: MoveTenant { host, patience, keep_source } }, json)
            }
            Action::Rename(Rename { name, new_name: to, json }) => {
                (AdminCommand::RenameTenant { name, to }, json)
            }
        };
        admin_command::run(globals, command, json).await
    }
}

impl List {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_config()?;
        let tenants = tenants::list(&actor_with(&config).await?, self.all).await?;
        let row = |tenant: &TenantSummary| {
            vec![
                tenant.name.clone(),
                tenant.status.clone(),
                tenant.host.clone(),
                tenant.database.clone(),
                tenant.pool_mode.clone().unwrap_or_else(|| config.pool.pool_mode.word().to_owned()),
                table::or_default(tenant.pool_size, config.pool.default_pool_size),
                tenant.logins.to_string(),
            ]
        };
        let rows: Vec<Vec<String>> = tenants.iter().map(row).collect();
        let headings = ["NAME", "STATUS", "HOST", "DATABASE", "POOL MODE", "POOL SIZE", "LOGINS"];
        answer(self.json, &tenants, || {
            table::table("no tenants; create one with: pglobby tenant create NAME", &headings, &rows);
        });
        Ok(())
    }
}

/// Prints everything about a tenant, with the defaults of `config`.
pub(super) fn show(tenant: &TenantSummary, config: &Config) {
    let max_clients = match config.limits.max_db_client_connections {
        0 => "no limit".to_owned(),
        limit => limit.to_string(),
    };
    table::show(tenant, |field| match field {
        "pool_mode" => Some(table::or_default(tenant.pool_mode.as_ref(), config.pool.pool_mode.word())),
        "pool_size" => Some(table::or_default(tenant.pool_size, config.pool.default_pool_size)),
        "min_pool_size" => Some(table::or_default(tenant.min_pool_size, config.pool.min_pool_size)),
        "max_clients" => Some(table::or_default(tenant.max_clients, &max_clients)),
        "statement_timeout" => {
            Some(table::or_default(tenant.statement_timeout.as_ref(), "that of the server"))
        }
        "allow_from" => Some(table::networks(&tenant.allow_from)),
        _ => None,
    });
}

impl Drop {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let config = globals.load_config()?;
        let actor = actor_with(&config).await?;
        if !self.yes {
            self.confirm(&tenants::show(&actor, &self.name).await?)?;
        }
        let database = DropDatabase::of(self.leave_host, self.with_database);
        let command = AdminCommand::DropTenant { name: self.name, database, final_dump: self.final_dump };
        admin_command::run_as(actor, &config, command, self.json).await
    }

    /// Asks for the tenant's name: a habitual `y` would not make the user look at it.
    fn confirm(&self, tenant: &TenantSummary) -> Result<(), Failure> {
        let name = &self.name;
        if !std::io::stdin().is_terminal() {
            return Err(Failure::new(format!(
                "dropping tenant {name:?} needs a confirmation, and standard input is no terminal; add --yes"
            )));
        }
        let kept = self.leave_host || (tenant.adopted && !self.with_database);
        let database = if kept { "is kept" } else { "is dropped with all its data" };
        output::line(format!(
            "Tenant {name} and its {} logins are dropped. Database {} on host {} {database}.\n\
             Type the name of the tenant to confirm:",
            tenant.logins, tenant.database, tenant.host
        ));
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        match answer.trim_end_matches(['\r', '\n']) == name {
            true => Ok(()),
            false => Err(Failure::new(format!("the answer is not {name:?}, so nothing was dropped"))),
        }
    }
}
