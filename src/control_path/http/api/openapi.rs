//! The OpenAPI 3 document of `/v1`, made from the table of routes and the types of the answers.

use serde_json::{Map, Value, json};

use super::{responses::CODES, routes::Route};
use crate::control_path::{
    admin::{
        audit::AuditEntry,
        commands::{MadeLogin, Removed},
        fields::{Described, FieldKind},
        hosts::{HostReport, HostSummary},
        logins::{GrantSummary, LoginSummary},
        operations::OperationSummary,
        tenants::TenantSummary,
    },
    fleet::nodes::NodeSummary,
    onboarding::{NewTenant, drop::Dropped, move_tenant::Moved, rotate::RotatedTenant},
    secrets::key_rotation::{KeyUse, RotatedKeys},
};

/// Its path. It needs no API key, because it says nothing about this installation.
pub const PATH: &str = "/v1/openapi.json";

/// The document.
pub fn document(routes: &[Route]) -> Value {
    let mut paths = Map::new();
    for route in routes {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method] = operation(route);
    }
    json!({
        "openapi": "3.0.3",
        "info": {
            "title": "pglobby management API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Tenants, logins, hosts and keys. Every request needs an API key (pglobby api-key create).",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "security": [{ "key": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
            "schemas": schemas(),
            "responses": { "Error": {
                "description": errors(),
                "content": { "application/json": { "schema": reference("Error") } },
            } },
        },
    })
}

fn operation(route: &Route) -> Value {
    let in_path =
        route.path.split(['{', '}']).skip(1).step_by(2).map(
            |name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }),
        );
    let in_query = route.query.iter().map(
        |name| json!({ "name": name, "in": "query", "description": parameter(name), "schema": { "type": "string" } }),
    );
    let (status, answer) = route.answer;
    let schema = match answer.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(item) => json!({ "type": "array", "items": reference(item) }),
        None => reference(answer),
    };
    let content = |schema: Value| json!({ "application/json": { "schema": schema } });
    let mut responses = json!({ "default": { "$ref": "#/components/responses/Error" } });
    responses[status.to_string()] = json!({ "description": "Done.", "content": content(schema) });
    if route.takes_long() {
        responses["202"] = json!({
            "description": "Started; follow the operation at Location.",
            "headers": { "Location": { "schema": { "type": "string" } } },
            "content": content(reference("Operation")),
        });
    }
    let mut operation = json!({
        "summary": route.summary,
        "operationId": operation_id(route),
        "description": format!("Needs an API key with role {} or higher.", route.role.name()),
        "parameters": in_path.chain(in_query).collect::<Vec<_>>(),
        "responses": responses,
    });
    if let Some(body) = route.body {
        operation["requestBody"] = json!({ "content": content(reference(body)) });
    }
    operation
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

/// `post_tenants_name_suspend`.
fn operation_id(route: &Route) -> String {
    let path = route.path.trim_start_matches("/v1/").replace(['{', '}'], "").replace(['/', '-'], "_");
    format!("{}_{path}", route.method)
}

fn parameter(name: &str) -> &'static str {
    match name {
        "wait" => "How long to wait for the outcome, as 30s; without it, long work is answered with 202",
        "dropped" => "true: dropped tenants too",
        "leave_host" => "true: the host is lost for good; nothing on it is changed",
        "with_database" => "true: drop the database of an adopted tenant too",
        "tenant" => "Only of this tenant",
        "status" => "running, done, failed or undone",
        "before" => "Only those with a smaller id: the next page",
        "limit" => "How many, 100 by default and 1000 at most",
        _ => "",
    }
}

fn errors() -> String {
    let codes = CODES.iter().map(|(code, status, meaning)| format!("{} {code}: {meaning}", status.as_u16()));
    codes.collect::<Vec<_>>().join("; ")
}

/// The schema of a request body: `name:type` each, `?` if it may be null or missing, `[]` for a list.
fn object(fields: &str) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for field in fields.split_whitespace() {
        let (name, kind) = field.split_once(':').unwrap_or((field, "string"));
        let (kind, optional) = kind.strip_suffix('?').map_or((kind, false), |kind| (kind, true));
        let mut schema = match kind.strip_suffix("[]") {
            Some(item) => json!({ "type": "array", "items": typed(item) }),
            None => typed(kind),
        };
        if optional {
            schema["nullable"] = true.into();
        } else {
            required.push(name);
        }
        properties.insert(name.to_owned(), schema);
    }
    json!({ "type": "object", "properties": properties, "required": required })
}

fn typed(kind: &str) -> Value {
    match kind {
        "string" | "integer" | "boolean" => json!({ "type": kind }),
        "secret" => json!({ "type": "string", "format": "password" }),
        schema => reference(schema),
    }
}

fn answer<T: Described>() -> Value {
    let properties = T::FIELDS.iter().map(|field| {
        let mut schema = match field.kind {
            FieldKind::Text => json!({ "type": "string" }),
            FieldKind::Int | FieldKind::BigInt => json!({ "type": "integer" }),
            FieldKind::Truth => json!({ "type": "boolean" }),
            FieldKind::Time => json!({ "type": "string", "format": "date-time" }),
            FieldKind::Secret => json!({ "type": "string", "format": "password" }),
            FieldKind::Object => json!({ "type": "object" }),
            FieldKind::Texts => json!({ "type": "array", "items": { "type": "string" } }),
            FieldKind::List(item) => json!({ "type": "array", "items": reference(item) }),
        };
        if field.optional {
            schema["nullable"] = true.into();
        }
        (field.name.to_owned(), schema)
    });
    let properties: Map<_, _> = properties.collect();
    let required: Vec<_> = T::FIELDS.iter().filter(|field| !field.optional).map(|field| field.name).collect();
    json!({ "type": "object", "properties": properties, "required": required })
}

/// Request bodies, each a name and fields as [`object`] reads them.
const BODIES: &str = "
    NewTenantBody name host:string? database:string? template:string? schema:string[]? adopt:boolean?
        owner:string? ownership:string? username:string? password:secret?;
    TenantSettings pool_mode:string? pool_size:integer? min_pool_size:integer? max_clients:integer?
        weight:integer? statement_timeout:string? allow_from:string[]?;
    SuspendBody reason:string? after_transaction:boolean?;
    RenameBody to;
    MoveBody host patience:string? keep_source:boolean?;
    NewLoginBody name tenant:string? service:boolean? tenants:string[]? all_tenants:boolean? admin:boolean?
        read_only:boolean? password:secret? valid_until:string? allow_from:string[]?;
    LoginSettings access:string? may_add_logins:boolean? valid_until:string? allow_from:string[]?;
    PasswordBody password:secret?;
    GrantBody tenants:string[]? all_tenants:boolean? read_only:boolean?;
    NewHostBody name address port:integer? tls_mode:string? tls_root_ca:string? admin_user:string?
        admin_database:string? admin_password:secret? max_connections:integer? accepts_tenants:boolean?;
    HostSettings address:string? port:integer? tls_mode:string? tls_root_ca:string? admin_user:string?
        admin_database:string? admin_password:secret? max_connections:integer? accepts_tenants:boolean?;
    RotateKeysBody retire:boolean?;
    Error error:ErrorWords;
    ErrorWords code message";

fn schemas() -> Value {
    let answers = [
        ("Tenant", answer::<TenantSummary>()),
        ("NewTenant", answer::<NewTenant>()),
        ("RotatedTenant", answer::<RotatedTenant>()),
        ("MovedTenant", answer::<Moved>()),
        ("DroppedTenant", answer::<Dropped>()),
        ("Login", answer::<LoginSummary>()),
        ("Grant", answer::<GrantSummary>()),
        ("MadeLogin", answer::<MadeLogin>()),
        ("Gone", answer::<Removed>()),
        ("Host", answer::<HostSummary>()),
        ("HostReport", answer::<HostReport>()),
        ("Node", answer::<NodeSummary>()),
        ("Key", answer::<KeyUse>()),
        ("RotatedKeys", answer::<RotatedKeys>()),
        ("Operation", answer::<OperationSummary>()),
        ("AuditEntry", answer::<AuditEntry>()),
    ];
    let bodies = BODIES.split(';').filter_map(|body| body.trim().split_once(' '));
    let bodies = bodies.map(|(name, fields)| (name, object(fields)));
    bodies.chain(answers).map(|(name, schema)| (name.to_owned(), schema)).collect::<Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::control_path::http::api::routes;

    #[test]
    fn every_schema_that_is_referred_to_is_there_and_every_operation_has_a_name_of_its_own() {
        let document = document(&routes::all());
        let text = document.to_string();
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let referred: BTreeSet<&str> =
            text.split("#/components/schemas/").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        let there: BTreeSet<&str> = schemas.keys().map(String::as_str).collect();
        assert_eq!(referred, there);
        let ids: Vec<String> = routes::all().iter().map(operation_id).collect();
        assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len());
        for route in routes::all() {
            assert!(route.query.iter().all(|name| !parameter(name).is_empty()), "{}", route.path);
        }
    }
}
