//! The table of routes: role, request, answer and handler of each. Both the router and the OpenAPI document
//! are made from it.

use std::collections::HashMap;

use axum::{
    extract::Path,
    response::Response,
    routing::{self, MethodRouter},
};
use secrecy::SecretString;
use serde_json::{Map, Value};

use super::{
    Caller,
    long_operations::{begin, follow},
    request_bodies::{
        Body, GrantBody, MoveBody, NewHostBody, NewLoginBody, NewTenantBody, PasswordBody, RenameBody,
        RotateKeysBody, SuspendBody, invalid, settings,
    },
    responses::{ApiError, shown},
};
use crate::control_path::{
    admin::{api_keys::Role, audit, commands::AdminCommand, hosts, logins, operations, tenants},
    fleet::nodes,
    onboarding::drop::DropDatabase,
    secrets::{key_rotation, scram_verifier::LoginPassword},
};

/// One route.
pub struct Route {
    /// `get`, `post`, `patch`, `delete`.
    pub method: &'static str,
    /// The path, with `{name}` for a name.
    pub path: &'static str,
    /// Known query parameters.
    pub query: &'static [&'static str],
    /// The lowest role that may use it.
    pub role: Role,
    /// Schema of the body, if there is one.
    pub body: Option<&'static str>,
    /// Status and schema of the answer; brackets mean a list.
    pub answer: (u16, &'static str),
    /// For the document.
    pub summary: &'static str,
    /// What it does.
    pub handler: MethodRouter,
}

impl Route {
    /// Whether the answer may be an operation.
    pub fn takes_long(&self) -> bool {
        self.query.contains(&"wait") && self.method != "get"
    }
}

/// One route: `method path [query parameters] for Role (body) => status answer, summary, handler`.
macro_rules! routes {
    ($($method:ident $path:literal $([$($query:literal),+])? for $role:ident $(($body:literal))?
        => $status:literal $answer:literal, $summary:literal, $handler:expr;)+) => {
        vec![$(Route {
            method: stringify!($method),
            path: $path,
            query: &[$($($query),+)?],
            role: Role::$role,
            body: None$(.or(Some($body)))?,
            answer: ($status, $answer),
            summary: $summary,
            handler: routing::$method($handler),
        },)+]
    };
}

/// All of them.
pub fn all() -> Vec<Route> {
    routes! {
        get "/v1/tenants" ["dropped"] for Viewer => 200 "[Tenant]", "All tenants", list_tenants;
        post "/v1/tenants" ["wait"] for Operator ("NewTenantBody") => 201 "NewTenant",
            "Make or adopt a tenant", create_tenant;
        get "/v1/tenants/{name}" for Viewer => 200 "Tenant", "One tenant", show_tenant;
        patch "/v1/tenants/{name}" for Operator ("TenantSettings") => 200 "Tenant",
            "Change settings; null takes the configuration's default", set_tenant;
        delete "/v1/tenants/{name}" ["wait", "with_database", "leave_host"] for Admin => 200 "DroppedTenant",
            "Drop a tenant, its roles, its logins and its database (an adopted one stays)", drop_tenant;
        post "/v1/tenants/{name}/suspend" for Operator ("SuspendBody") => 200 "Tenant",
            "Close a tenant; its clients read the reason", suspend;
        post "/v1/tenants/{name}/resume" for Operator => 200 "Tenant", "Open a suspended tenant", resume;
        post "/v1/tenants/{name}/rotate" ["wait"] for Operator => 200 "RotatedTenant",
            "New passwords for a tenant's roles", rotate;
        post "/v1/tenants/{name}/rename" for Operator ("RenameBody") => 200 "Tenant", "Another name", rename;
        post "/v1/tenants/{name}/move" ["wait"] for Operator ("MoveBody") => 200 "MovedTenant",
            "Move a tenant to another host", move_tenant;
        get "/v1/logins" ["tenant"] for Viewer => 200 "[Login]", "All logins, or a tenant's", list_logins;
        post "/v1/logins" for Operator ("NewLoginBody") => 201 "MadeLogin", "Make a login", create_login;
        get "/v1/logins/{name}" for Viewer => 200 "Login", "One login", show_login;
        patch "/v1/logins/{name}" for Operator ("LoginSettings") => 200 "Login",
            "Change what a login may do, until when, and from where; null lifts the limit", set_login;
        delete "/v1/logins/{name}" for Operator => 200 "Gone", "Remove a login; its sessions end", drop_login;
        post "/v1/logins/{name}/set-password" for Operator ("PasswordBody") => 200 "MadeLogin",
            "Another password, the caller's or one made here; its sessions end", set_password;
        post "/v1/logins/{name}/grant" for Operator ("GrantBody") => 200 "Login",
            "Let a service enter tenants", grant::<true>;
        post "/v1/logins/{name}/revoke" for Operator ("GrantBody") => 200 "Login",
            "Take tenants from a service", grant::<false>;
        post "/v1/logins/{name}/disable" for Operator => 200 "Login",
            "Refuse a login; its sessions end", disable::<true>;
        post "/v1/logins/{name}/enable" for Operator => 200 "Login", "Refuse it no longer", disable::<false>;
        get "/v1/hosts" for Viewer => 200 "[Host]", "All hosts", list_hosts;
        post "/v1/hosts" for Admin ("NewHostBody") => 201 "HostReport", "Register a host", add_host;
        patch "/v1/hosts/{name}" for Admin ("HostSettings") => 200 "HostReport",
            "Change a host; pglobby connects with the new values before it stores them", set_host;
        delete "/v1/hosts/{name}" for Admin => 200 "Gone", "Forget a host that no tenant lives on", remove_host;
        get "/v1/nodes" for Viewer => 200 "[Node]", "All nodes, and where they differ", list_nodes;
        get "/v1/keys" for Viewer => 200 "[Key]", "Sealing keys, and what uses them", list_keys;
        post "/v1/keys/rotate" ["wait"] for Admin ("RotateKeysBody") => 200 "RotatedKeys",
            "Seal every stored credential anew", rotate_keys;
        get "/v1/operations" ["tenant", "status", "before", "limit"] for Viewer => 200 "[Operation]",
            "Long work, newest first", list_operations;
        get "/v1/operations/{id}" ["wait"] for Viewer => 200 "Operation",
            "One operation; with ?wait= the answer comes when it has ended or the time is over", show_operation;
        get "/v1/audit" ["tenant", "before", "limit"] for Viewer => 200 "[AuditEntry]",
            "Audit log, newest first", list_audit;
    }
}

type Name = Path<String>;
type Query = axum::extract::Query<HashMap<String, String>>;
type Settings = Body<Map<String, Value>>;
type RouteResult = Result<Response, ApiError>;

async fn list_tenants(caller: Caller, query: Query) -> RouteResult {
    Ok(shown(&tenants::list(&caller.actor, truth(&query, "dropped")?).await?))
}

async fn create_tenant(caller: Caller, Body(body): Body<NewTenantBody>) -> RouteResult {
    begin(&caller, body.try_into()?).await
}

async fn show_tenant(Path(name): Name, caller: Caller) -> RouteResult {
    Ok(shown(&tenants::show(&caller.actor, &name).await?))
}

async fn set_tenant(Path(name): Name, caller: Caller, Body(body): Settings) -> RouteResult {
    caller.execute(AdminCommand::SetTenant { name, settings: settings(body)? }).await
}

async fn drop_tenant(Path(name): Name, caller: Caller, query: Query) -> RouteResult {
    let database = DropDatabase::of(truth(&query, "leave_host")?, truth(&query, "with_database")?);
    begin(&caller, AdminCommand::DropTenant { name, database, final_dump: None }).await
}

async fn suspend(Path(name): Name, caller: Caller, Body(body): Body<SuspendBody>) -> RouteResult {
    caller.execute(body.of(name)).await
}

async fn resume(Path(name): Name, caller: Caller) -> RouteResult {
    caller.execute(AdminCommand::ResumeTenant { name }).await
}

async fn rotate(Path(name): Name, caller: Caller) -> RouteResult {
    begin(&caller, AdminCommand::RotateTenant { name }).await
}

async fn rename(Path(name): Name, caller: Caller, Body(body): Body<RenameBody>) -> RouteResult {
    caller.execute(AdminCommand::RenameTenant { name, to: body.to }).await
}

async fn move_tenant(Path(name): Name, caller: Caller, Body(body): Body<MoveBody>) -> RouteResult {
    begin(&caller, body.of(name)?).await
}

async fn list_logins(caller: Caller, query: Query) -> RouteResult {
    Ok(shown(&logins::list(&caller.actor, query.get("tenant").map(String::as_str)).await?))
}

async fn create_login(caller: Caller, Body(body): Body<NewLoginBody>) -> RouteResult {
    caller.execute(body.try_into()?).await
}

async fn show_login(Path(name): Name, caller: Caller) -> RouteResult {
    Ok(shown(&logins::show(&caller.actor, &name).await?))
}

async fn set_login(Path(name): Name, caller: Caller, Body(body): Settings) -> RouteResult {
    caller.execute(AdminCommand::SetLogin { name, settings: settings(body)? }).await
}

async fn drop_login(Path(name): Name, caller: Caller) -> RouteResult {
    caller.execute(AdminCommand::DropLogin { name }).await
}

async fn set_password(Path(name): Name, caller: Caller, Body(body): Body<PasswordBody>) -> RouteResult {
    let password = LoginPassword::given_or_generated(body.password);
    caller.execute(AdminCommand::SetPassword { name, password }).await
}

async fn grant<const GRANT: bool>(
    Path(name): Name,
    caller: Caller,
    Body(body): Body<GrantBody>,
) -> RouteResult {
    caller.execute(body.of(name, GRANT)?).await
}

async fn disable<const DISABLED: bool>(Path(name): Name, caller: Caller) -> RouteResult {
    caller.execute(AdminCommand::DisableLogin { name, disabled: DISABLED }).await
}

async fn list_hosts(caller: Caller) -> RouteResult {
    Ok(shown(&hosts::list(&caller.actor).await?))
}

async fn add_host(caller: Caller, Body(body): Body<NewHostBody>) -> RouteResult {
    caller.execute(body.into()).await
}

async fn set_host(Path(name): Name, caller: Caller, Body(mut body): Settings) -> RouteResult {
    let password = match body.remove("admin_password") {
        None => None,
        Some(Value::String(password)) => Some(SecretString::from(password)),
        Some(_) => return Err(invalid("admin_password is a text")),
    };
    let settings = if body.is_empty() && password.is_some() { Vec::new() } else { settings(body)? };
    caller.execute(AdminCommand::SetHost { name, settings, password }).await
}

async fn remove_host(Path(name): Name, caller: Caller) -> RouteResult {
    caller.execute(AdminCommand::RemoveHost { name }).await
}

async fn list_nodes(caller: Caller) -> RouteResult {
    Ok(shown(&nodes::list(&caller.actor.central).await?))
}

async fn list_keys(caller: Caller) -> RouteResult {
    Ok(shown(&key_rotation::list(&caller.actor).await?))
}

async fn rotate_keys(caller: Caller, Body(body): Body<RotateKeysBody>) -> RouteResult {
    let config = caller.api.proxy.config.load_full();
    begin(&caller, AdminCommand::RotateKeys { retire: body.retire, config }).await
}

async fn list_operations(caller: Caller, query: Query) -> RouteResult {
    let (tenant, status) = (query.get("tenant"), query.get("status"));
    let (tenant, status) = (tenant.map(String::as_str), status.map(String::as_str));
    let (before, limit) = page(&query)?;
    Ok(shown(&operations::list(&caller.actor, tenant, status, before, limit).await?))
}

async fn show_operation(Path(id): Name, caller: Caller) -> RouteResult {
    let id = id.parse().map_err(|_| ApiError::new("not_found", format!("there is no operation {id:?}")))?;
    Ok(shown(&follow(&caller, id).await?))
}

async fn list_audit(caller: Caller, query: Query) -> RouteResult {
    let (before, limit) = page(&query)?;
    Ok(shown(&audit::list(&caller.actor, query.get("tenant").map(String::as_str), before, limit).await?))
}

/// Default and maximum of rows in one answer.
const PAGE_ROWS: i64 = 100;
const PAGE_ROWS_MAX: i64 = 1000;

fn page(query: &Query) -> Result<(Option<i64>, i64), ApiError> {
    let number = |key: &str| {
        let wrong = |_| invalid(&format!("{key} is a whole number"));
        query.get(key).map(|text| text.parse::<i64>().map_err(wrong)).transpose()
    };
    Ok((number("before")?, number("limit")?.unwrap_or(PAGE_ROWS).clamp(1, PAGE_ROWS_MAX)))
}

fn truth(query: &Query, key: &str) -> Result<bool, ApiError> {
    match query.get(key).map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err(invalid(&format!("{key} is true or false"))),
    }
}
