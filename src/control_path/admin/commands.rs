//! Every admin command. The command line, the console's SQL and the HTTP API parse their input into an
//! [`AdminCommand`], execute it here, and show its [`CommandOutcome`].
//!
//! This file says which role may run a command, its name in logs, and the type of its answer. The work is
//! in `tenants.rs`, `logins.rs`, `hosts.rs`, `onboarding/` and `key_rotation.rs`.

use std::{path::PathBuf, sync::Arc};

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Serialize, Serializer};

use super::{
    actor::{Actor, AdminError},
    api_keys::Role,
    fields::described,
    hosts::{self, HostReport, NewHost},
    logins::{self, LoginSummary, NewLogin, NewLoginKind},
    tenants::{self, SuspendSessions, TenantSummary},
};
use crate::{
    config::Config,
    control_path::{
        onboarding::{
            NewTenant,
            adopt::{AdoptTenant, adopt},
            create::{CreateTenant, create},
            drop::{DropDatabase, Dropped, drop_tenant},
            move_tenant::{MoveTenant, Moved, move_tenant},
            rename::rename,
            rotate::{RotatedTenant, rotate},
        },
        secrets::{key_rotation, scram_verifier::LoginPassword},
    },
};

/// An admin command. Not `Debug`, because it may contain passwords. An empty value among `settings` restores
/// the default.
#[expect(missing_docs, reason = "a field is what it is called; what it does stands where the work is done")]
pub enum AdminCommand {
    /// Create a tenant with a new database.
    CreateTenant(CreateTenant),
    /// Make an existing database a tenant's.
    AdoptTenant(AdoptTenant),
    /// Change settings of a tenant.
    SetTenant { name: String, settings: Vec<(String, String)> },
    /// Refuse clients, which read the reason.
    SuspendTenant { name: String, reason: Option<String>, sessions: SuspendSessions },
    /// Accept clients again.
    ResumeTenant { name: String },
    /// Give its roles new passwords.
    RotateTenant { name: String },
    /// Move to another host.
    MoveTenant { name: String, to: MoveTenant },
    /// Rename.
    RenameTenant { name: String, to: String },
    /// Drop a tenant, after a last dump into a file of the machine that runs the command.
    DropTenant { name: String, database: DropDatabase, final_dump: Option<PathBuf> },
    /// Create a login. A generated password is in the outcome.
    CreateLogin { login: NewLogin, generated: bool },
    /// Change settings of a login.
    SetLogin { name: String, settings: Vec<(String, String)> },
    /// Set a login's password.
    SetPassword { name: String, password: LoginPassword },
    /// Grant tenants to a service login.
    Grant { name: String, tenants: Vec<String>, all_tenants: bool, read_only: bool },
    /// Revoke tenants from a service login.
    Revoke { name: String, tenants: Vec<String>, all_tenants: bool },
    /// Disable or enable a login.
    DisableLogin { name: String, disabled: bool },
    /// Drop a login.
    DropLogin { name: String },
    /// Register a host.
    AddHost(NewHost),
    /// Change a host, or its administrator's password.
    SetHost { name: String, settings: Vec<(String, String)>, password: Option<SecretString> },
    /// Forget a host.
    RemoveHost { name: String },
    /// Rotate the sealing keys; `retire` removes those that seal nothing any more. `config` names the ring.
    RotateKeys { retire: bool, config: Arc<Config> },
}

/// The outcome. As JSON it is the same object everywhere.
#[derive(Debug, Serialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "each variant is what its type is")]
pub enum CommandOutcome {
    NewTenant(NewTenant),
    Tenant(Box<TenantSummary>),
    RotatedTenant(RotatedTenant),
    MovedTenant(Moved),
    DroppedTenant(Dropped),
    MadeLogin(MadeLogin),
    Login(Box<LoginSummary>),
    Host(HostReport),
    RotatedKeys(key_rotation::RotatedKeys),
    Removed(Removed),
}

described! {
    /// The answer of `login create` and `login set-password`.
    #[derive(Debug, Serialize)]
    pub struct MadeLogin {
        /// Its name.
        pub name: String,
        /// An employee's tenant.
        pub tenant: Option<String>,
        /// `employee`, `service` or `admin`.
        pub kind: String,
        /// `read_write` or `read_only`.
        pub access: String,
        /// Only if it was generated. It is shown once.
        #[serde(skip_serializing_if = "Option::is_none", serialize_with = "shown_once")]
        pub password: Option<SecretString>,
    }
}

fn shown_once<S: Serializer>(password: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(password.as_ref().map_or("", |password| password.expose_secret()))
}

described! {
    /// A dropped login or removed host.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct Removed {
        /// Its name.
        pub name: String,
        /// `dropped` or `removed`.
        pub status: &'static str,
    }
}

impl AdminCommand {
    /// The SQL command tag, also used in logs.
    pub fn title(&self) -> &'static str {
        match self {
            Self::CreateTenant(_) => "CREATE TENANT",
            Self::AdoptTenant(_) => "ADOPT TENANT",
            Self::SetTenant { .. } => "ALTER TENANT",
            Self::SuspendTenant { .. } => "SUSPEND TENANT",
            Self::ResumeTenant { .. } => "RESUME TENANT",
            Self::RotateTenant { .. } => "ROTATE TENANT",
            Self::MoveTenant { .. } => "MOVE TENANT",
            Self::RenameTenant { .. } => "RENAME TENANT",
            Self::DropTenant { .. } => "DROP TENANT",
            Self::CreateLogin { .. } => "CREATE LOGIN",
            Self::SetLogin { .. } | Self::SetPassword { .. } | Self::DisableLogin { .. } => "ALTER LOGIN",
            Self::Grant { .. } => "GRANT",
            Self::Revoke { .. } => "REVOKE",
            Self::DropLogin { .. } => "DROP LOGIN",
            Self::AddHost(_) => "CREATE HOST",
            Self::SetHost { .. } => "ALTER HOST",
            Self::RemoveHost { .. } => "DROP HOST",
            Self::RotateKeys { .. } => "ROTATE KEYS",
        }
    }

    /// The name of the tenant, login or host.
    pub fn subject(&self) -> &str {
        match self {
            Self::CreateTenant(CreateTenant { name, .. })
            | Self::AdoptTenant(AdoptTenant { name, .. })
            | Self::SetTenant { name, .. }
            | Self::SuspendTenant { name, .. }
            | Self::ResumeTenant { name }
            | Self::RotateTenant { name }
            | Self::MoveTenant { name, .. }
            | Self::RenameTenant { name, .. }
            | Self::DropTenant { name, .. }
            | Self::CreateLogin { login: NewLogin { name, .. }, .. }
            | Self::SetLogin { name, .. }
            | Self::SetPassword { name, .. }
            | Self::Grant { name, .. }
            | Self::Revoke { name, .. }
            | Self::DisableLogin { name, .. }
            | Self::DropLogin { name }
            | Self::AddHost(NewHost { name, .. })
            | Self::SetHost { name, .. }
            | Self::RemoveHost { name } => name,
            Self::RotateKeys { .. } => "",
        }
    }

    /// Whether it may take minutes: it copies a database or seals all credentials again.
    pub fn takes_long(&self) -> bool {
        match self {
            Self::CreateTenant(wanted) => wanted.template.is_some() || !wanted.schema.is_empty(),
            Self::MoveTenant { .. } | Self::RotateKeys { .. } => true,
            Self::DropTenant { final_dump, .. } => final_dump.is_some(),
            _ => false,
        }
    }

    /// The role that an API key needs. Commands on an administrator's login need `admin`, because that
    /// login opens the console, where every command is allowed.
    pub async fn role(&self, actor: &Actor) -> Result<Role, AdminError> {
        Ok(match self {
            Self::DropTenant { .. }
            | Self::AddHost(_)
            | Self::SetHost { .. }
            | Self::RemoveHost { .. }
            | Self::RotateKeys { .. }
            | Self::CreateLogin { login: NewLogin { kind: NewLoginKind::Admin, .. }, .. } => Role::Admin,
            Self::SetLogin { name, .. }
            | Self::SetPassword { name, .. }
            | Self::DisableLogin { name, .. }
            | Self::DropLogin { name }
                if logins::is_admin(actor, name).await? =>
            {
                Role::Admin
            }
            _ => Role::Operator,
        })
    }

    /// Runs the command.
    pub async fn execute(self, actor: &Actor) -> Result<CommandOutcome, AdminError> {
        let tenant = |tenant| CommandOutcome::Tenant(Box::new(tenant));
        let login = |login| CommandOutcome::Login(Box::new(login));
        Ok(match self {
            Self::CreateTenant(wanted) => CommandOutcome::NewTenant(create(actor, &wanted).await?),
            Self::AdoptTenant(wanted) => CommandOutcome::NewTenant(adopt(actor, &wanted).await?),
            Self::SetTenant { name, settings } => tenant(tenants::set(actor, &name, &settings).await?),
            Self::SuspendTenant { name, reason, sessions } => {
                tenant(tenants::suspend(actor, &name, reason.as_deref(), sessions).await?)
            }
            Self::ResumeTenant { name } => tenant(tenants::resume(actor, &name).await?),
            Self::RotateTenant { name } => CommandOutcome::RotatedTenant(rotate(actor, &name).await?),
            Self::MoveTenant { name, to } => {
                CommandOutcome::MovedTenant(move_tenant(actor, &name, &to).await?)
            }
            Self::RenameTenant { name, to } => tenant(rename(actor, &name, &to).await?),
            Self::DropTenant { name, database, final_dump } => CommandOutcome::DroppedTenant(
                drop_tenant(actor, &name, database, final_dump.as_deref()).await?,
            ),
            Self::CreateLogin { login, generated } => {
                let made = logins::create(actor, &login).await?;
                CommandOutcome::MadeLogin(MadeLogin::of(made, generated.then_some(login.password)))
            }
            Self::SetLogin { name, settings } => login(logins::set(actor, &name, &settings).await?),
            Self::SetPassword { name, password: LoginPassword { password, generated } } => {
                let changed = logins::set_password(actor, &name, &password).await?;
                CommandOutcome::MadeLogin(MadeLogin::of(changed, generated.then_some(password)))
            }
            Self::Grant { name, tenants, all_tenants, read_only } => {
                login(logins::grant(actor, &name, &tenants, all_tenants, read_only).await?)
            }
            Self::Revoke { name, tenants, all_tenants } => {
                login(logins::revoke(actor, &name, &tenants, all_tenants).await?)
            }
            Self::DisableLogin { name, disabled } => {
                login(logins::set_disabled(actor, &name, disabled).await?)
            }
            Self::DropLogin { name } => {
                logins::drop_login(actor, &name).await?;
                CommandOutcome::Removed(Removed { name, status: "dropped" })
            }
            Self::AddHost(host) => CommandOutcome::Host(hosts::add(actor, &host).await?),
            Self::SetHost { name, settings, password } => {
                CommandOutcome::Host(hosts::set(actor, &name, &settings, password.as_ref()).await?)
            }
            Self::RemoveHost { name } => {
                hosts::remove(actor, &name).await?;
                CommandOutcome::Removed(Removed { name, status: "removed" })
            }
            Self::RotateKeys { retire, config } => {
                CommandOutcome::RotatedKeys(key_rotation::rotate(actor, &config, retire).await?)
            }
        })
    }
}

impl MadeLogin {
    fn of(login: LoginSummary, password: Option<SecretString>) -> Self {
        let LoginSummary { name, tenant, kind, access, .. } = login;
        Self { name, tenant, kind, access, password }
    }
}
