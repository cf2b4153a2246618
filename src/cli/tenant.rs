//! `pglobby tenant`: customers, each with a database of its own.

use std::{io::IsTerminal as _, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use crate::{
    cli::{
        Failure, Globals,
        actor::operator,
        admin_command::{carry_out, carry_out_as},
        output,
        table::{self, answer},
    },
    config::units,
    control_path::{
        admin::{
            actor::AdminError,
            commands::AdminCommand,
            tenants::{self, SuspendSessions, TenantSummary},
        },
        onboarding::{
            adopt::AdoptTenant, create::CreateTenant, drop::DropDatabase, move_tenant::MoveTenant,
            schema_files,
        },
    },
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
    Move(Move),
    Rename(Rename),
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

/// Close a tenant to clients; its sessions end at once, or after their transaction
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant suspend acme --reason \"unpaid; call 555-0199\"\n  \
                        pglobby tenant suspend acme --after-transaction")]
struct Suspend {
    /// The tenant
    name: String,
    /// Clients read this
    #[arg(long)]
    reason: Option<String>,
    /// Sessions end at once, with whatever they are doing (the default)
    #[arg(long, conflicts_with = "after_transaction")]
    now: bool,
    /// Sessions end after the transaction they are in; suspend again with --now to end the rest
    #[arg(long)]
    after_transaction: bool,
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

/// Move a tenant to another host; its sessions stay and wait meanwhile
///
/// Where both hosts allow logical replication, the copy is made while clients work, and they are held for its last moment
/// only; elsewhere it is made with pg_dump and pg_restore while every node holds the tenant's sessions still between two
/// transactions; they wait as they do for a busy pool, up to query_wait_timeout. Until the new host serves, whatever fails
/// is undone; a run that died is undone or finished by the next. Adopted databases are not moved.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant move acme --host west --patience 2min")]
struct Move {
    /// The tenant
    name: String,
    /// The host to move to
    #[arg(long)]
    host: String,
    /// How long transactions under way may take before the move is given up
    #[arg(long, default_value = MoveTenant::PATIENCE, value_parser = units::duration)]
    patience: Duration,
    /// Leave the old database where it is, closed
    #[arg(long)]
    keep_source: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Call a tenant something else; its sessions go on, its database and roles keep their names
///
/// From then on clients ask for the new name. Those who ask for the old one are refused, so change both together.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant rename acme acme-gmbh")]
struct Rename {
    /// The tenant
    name: String,
    /// What clients will ask for
    new_name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Drop a tenant, its roles, its logins and its database (an adopted one stays)
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby tenant drop acme --final-dump acme.dump")]
struct Drop {
    /// The tenant
    name: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// The database of an adopted tenant, too
    #[arg(long)]
    with_database: bool,
    /// Touch nothing on the host, which will never be reached again: database and roles stay there
    #[arg(long, conflicts_with_all = ["with_database", "final_dump"])]
    leave_host: bool,
    /// Keep a copy in this new file, made by pg_dump when all sessions have ended; pg_restore reads it
    #[arg(long, value_name = "FILE")]
    final_dump: Option<PathBuf>,
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
            Action::Set(Set { name, settings, json }) => {
                carry_out(globals, AdminCommand::SetTenant { name, settings }, json).await
            }
            Action::Suspend(Suspend { name, reason, after_transaction, json, .. }) => {
                let sessions = if after_transaction {
                    SuspendSessions::EndAfterTransaction
                } else {
                    SuspendSessions::EndNow
                };
                carry_out(globals, AdminCommand::SuspendTenant { name, reason, sessions }, json).await
            }
            Action::Resume(Named { name, json }) => {
                carry_out(globals, AdminCommand::ResumeTenant { name }, json).await
            }
            Action::Rotate(Rotate { name, json }) => {
                carry_out(globals, AdminCommand::RotateTenant { name }, json).await
            }
            Action::Move(Move { name, host, patience, keep_source, json }) => {
                let to = MoveTenant { host, patience, keep_source };
                carry_out(globals, AdminCommand::MoveTenant { name, to }, json).await
            }
            Action::Rename(Rename { name, new_name: to, json }) => {
                carry_out(globals, AdminCommand::RenameTenant { name, to }, json).await
            }
            Action::Drop(command) => command.run(globals).await,
        }
    }
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
        carry_out(globals, AdminCommand::CreateTenant(wanted), self.json).await
    }
}

impl Adopt {
    async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let wanted =
            AdoptTenant { name: self.name, host: self.host, database: self.database, owner: self.owner };
        carry_out(globals, AdminCommand::AdoptTenant(wanted), self.json).await
    }
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

pub(super) fn fields(tenant: &TenantSummary) -> Vec<(&'static str, String)> {
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
        let database = DropDatabase::of(self.leave_host, self.with_database);
        let order = AdminCommand::DropTenant { name: self.name, database, final_dump: self.final_dump };
        carry_out_as(operator, order, self.json).await
    }

    /// Typing the name is what makes one look at it.
    fn ask(&self, tenant: &TenantSummary) -> Result<(), AdminError> {
        if !std::io::stdin().is_terminal() {
            return Err(AdminError::Refused(format!(
                "nobody is there to confirm dropping tenant {:?}; give --yes",
                self.name
            )));
        }
        let stays = self.leave_host || (tenant.adopted && !self.with_database);
        let fate = if stays { "stays" } else { "is deleted with all its data" };
        let refused = |why: &str| AdminError::Refused(format!("{why}; nothing was dropped"));
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
