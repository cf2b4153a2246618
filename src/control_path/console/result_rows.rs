//! What an order answers in SQL: the object that the command line prints as JSON, as a row.

use serde_json::Value;

use super::table::{Cell, Column, Kind, Table};
use crate::control_path::admin::commands::{AdminCommand, CommandOutcome};

const NEW_TENANT: &[Column] = &[
    ("name", Kind::Text),
    ("status", Kind::Text),
    ("host", Kind::Text),
    ("database", Kind::Text),
    ("username", Kind::Text),
];
const TENANT: &[Column] = &[
    ("name", Kind::Text),
    ("status", Kind::Text),
    ("status_reason", Kind::Text),
    ("host", Kind::Text),
    ("database", Kind::Text),
    ("username", Kind::Text),
    ("pool_mode", Kind::Text),
    ("pool_size", Kind::BigInt),
    ("min_pool_size", Kind::BigInt),
    ("max_clients", Kind::BigInt),
    ("statement_timeout", Kind::Text),
    ("allow_from", Kind::Text),
];
const ROTATED_TENANT: &[Column] = &[("name", Kind::Text), ("status", Kind::Text), ("roles", Kind::Text)];
const MOVED_TENANT: &[Column] = &[
    ("name", Kind::Text),
    ("from", Kind::Text),
    ("host", Kind::Text),
    ("database", Kind::Text),
    ("source_dropped", Kind::Truth),
    ("copied_by", Kind::Text),
    ("dumped_because", Kind::Text),
    ("held_ms", Kind::BigInt),
];
const DROPPED_TENANT: &[Column] = &[
    ("name", Kind::Text),
    ("status", Kind::Text),
    ("database", Kind::Text),
    ("database_dropped", Kind::Truth),
];
/// The password only where it was made here; it is shown this once.
const MADE_LOGIN: &[Column] = &[
    ("name", Kind::Text),
    ("tenant", Kind::Text),
    ("kind", Kind::Text),
    ("access", Kind::Text),
    ("password", Kind::Text),
];
const LOGIN: &[Column] = &[
    ("name", Kind::Text),
    ("tenant", Kind::Text),
    ("kind", Kind::Text),
    ("access", Kind::Text),
    ("all_tenants", Kind::Truth),
    ("tenants", Kind::Text),
    ("valid_until", Kind::Text),
    ("disabled_at", Kind::Text),
    ("allow_from", Kind::Text),
    ("may_add_logins", Kind::Truth),
];
const GONE: &[Column] = &[("name", Kind::Text), ("status", Kind::Text)];

/// The columns that an order answers, which a client may ask for before there is an answer.
pub(super) fn columns(command: &AdminCommand) -> Table {
    Table::new(match command {
        AdminCommand::CreateTenant(_) | AdminCommand::AdoptTenant(_) => NEW_TENANT,
        AdminCommand::SetTenant { .. }
        | AdminCommand::SuspendTenant { .. }
        | AdminCommand::ResumeTenant { .. }
        | AdminCommand::RenameTenant { .. } => TENANT,
        AdminCommand::RotateTenant { .. } => ROTATED_TENANT,
        AdminCommand::MoveTenant { .. } => MOVED_TENANT,
        AdminCommand::DropTenant { .. } => DROPPED_TENANT,
        AdminCommand::CreateLogin { .. } | AdminCommand::SetPassword { .. } => MADE_LOGIN,
        AdminCommand::SetLogin { .. }
        | AdminCommand::Grant { .. }
        | AdminCommand::Revoke { .. }
        | AdminCommand::DisableLogin { .. } => LOGIN,
        AdminCommand::DropLogin { .. }
        | AdminCommand::AddHost(_)
        | AdminCommand::SetHost { .. }
        | AdminCommand::RemoveHost { .. }
        | AdminCommand::RotateKeys { .. } => GONE,
    })
}

/// The outcome in these columns.
pub(super) fn in_columns(mut table: Table, outcome: &CommandOutcome) -> Table {
    let object = serde_json::to_value(outcome).unwrap_or_default();
    let row = table.columns.iter().map(|(name, _)| cell(object.get(*name).unwrap_or(&Value::Null))).collect();
    table.rows.push(row);
    table
}

fn cell(value: &Value) -> Cell {
    match value {
        Value::Null => Cell::Null,
        Value::Bool(truth) => Cell::Truth(*truth),
        Value::Number(number) => number.as_i64().map_or(Cell::Null, Cell::Number),
        other => Cell::Text(words(other)),
    }
}

/// A list's elements, an object's values.
fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(words).collect::<Vec<_>>().join(", "),
        Value::Object(object) => object.values().map(words).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}
