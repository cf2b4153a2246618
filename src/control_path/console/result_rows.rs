//! The answer to an admin command in SQL: the object that the command line prints as JSON, as one row.

use serde_json::Value;

use super::table::{Cell, Table, columns_of};
use crate::control_path::{
    admin::{
        commands::{AdminCommand, CommandOutcome, MadeLogin, Removed},
        logins::LoginSummary,
        tenants::TenantSummary,
    },
    onboarding::{NewTenant, drop::Dropped, move_tenant::Moved, rotate::RotatedTenant},
};

const TENANT: &str = "name status status_reason host database username pool_mode pool_size
    min_pool_size max_clients weight statement_timeout allow_from";
const LOGIN: &str = "name tenant kind access all_tenants tenants valid_until disabled_at allow_from
    may_add_logins";

/// The columns of a command's answer. A client may describe the statement before it runs.
pub(super) fn columns(command: &AdminCommand) -> Table {
    let columns = match command {
        AdminCommand::CreateTenant(_) | AdminCommand::AdoptTenant(_) => columns_of::<NewTenant>("", true),
        AdminCommand::SetTenant { .. }
        | AdminCommand::SuspendTenant { .. }
        | AdminCommand::ResumeTenant { .. }
        | AdminCommand::RenameTenant { .. } => columns_of::<TenantSummary>(TENANT, true),
        AdminCommand::RotateTenant { .. } => columns_of::<RotatedTenant>("", true),
        AdminCommand::MoveTenant { .. } => columns_of::<Moved>("", true),
        AdminCommand::DropTenant { .. } => columns_of::<Dropped>("", true),
        AdminCommand::CreateLogin { .. } | AdminCommand::SetPassword { .. } => {
            columns_of::<MadeLogin>("", true)
        }
        AdminCommand::SetLogin { .. }
        | AdminCommand::Grant { .. }
        | AdminCommand::Revoke { .. }
        | AdminCommand::DisableLogin { .. } => columns_of::<LoginSummary>(LOGIN, true),
        AdminCommand::DropLogin { .. }
        | AdminCommand::AddHost(_)
        | AdminCommand::SetHost { .. }
        | AdminCommand::RemoveHost { .. }
        | AdminCommand::RotateKeys { .. } => columns_of::<Removed>("", true),
    };
    Table { columns, rows: Vec::new() }
}

/// The outcome in these columns.
pub(super) fn in_columns(mut table: Table, outcome: &CommandOutcome) -> Table {
    let object = serde_json::to_value(outcome).unwrap_or_default();
    let row = table
        .columns
        .iter()
        .map(|(name, _)| Cell::of_json(object.get(*name).unwrap_or(&Value::Null), ", "))
        .collect();
    table.rows.push(row);
    table
}
