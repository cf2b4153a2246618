//! The table of routes: role, request, answer and handler of each. Both the router and the OpenAPI document
//! are made from it.

use std::collections::HashMap;

use axum::{
    Extension,
    extract::Path,
    response::Response,
    routing::{MethodRouter, delete, get, patch, post},
};
use secrecy::SecretString;
use serde_json::{Map, Value};

use super::{
    Caller, MaxWait,
    long_operations::{begin, follow},
    request_bodies::{
        Body, GrantBody, MoveBody, NewHostBody, NewLoginBody, NewTenantBody, PasswordBody, RenameBody,
        RotateKeysBody, SuspendBody, invalid, settings,
    },
    responses::{ApiError, shown},
};
use crate::control_path::{
    admin::{api_keys::Role, audit, commands::AdminCommand, hosts, logins, operations, tenants},
    onboarding::drop::DropDatabase,
    secrets::{key_rotation, scram_verifier::LoginPassword},
};

/// One route.
pub struct Route {
    /// `GET`, `POST`, `PATCH`, `DELETE`.
    pub method: &'static str,
    /// The path, with `{name}` for a name.
    pub path: &'static str,
    /// The lowest role that may use it.
    pub role: Role,
    /// For the document.
    pub summary: &'static str,
    /// Known query parameters.
    pub query: &'static [&'static str],
    /// Schema of the body, if there is one.
    pub body: Option<&'static str>,
    /// Status and schema of the answer; brackets mean a list.
    pub answer: (u16, &'static str),
    /// What it does.
    pub handler: MethodRouter,
}

impl Route {
    const fn new(
        (method, path): (&'static str, &'static str),
        role: Role,
        answer: (u16, &'static str),
        summary: &'static str,
        handler: MethodRouter,
    ) -> Self {
        Self { method, path, role, summary, query: &[], body: None, answer, handler }
    }

    fn query(self, query: &'static [&'static str]) -> Self {
        Self { query, ..self }
    }

    fn body(self, body: &'static str) -> Self {
        Self { body: Some(body), ..self }
    }

    /// Whether the answer may be an operation.
    pub fn takes_long(&self) -> bool {
        self.query.contains(&"wait") && self.method != "GET"
    }
}

/// All of them.
pub fn all() -> Vec<Route> {
    [tenants_routes(), logins_routes(), estate_routes(), record_routes()].into_iter().flatten().collect()
}

type Query = axum::extract::Query<HashMap<String, String>>;
type RouteResult = Result<Response, ApiError>;

fn tenants_routes() -> Vec<Route> {
    use Role::{Admin, Operator, Viewer};
    vec![
        Route::new(("GET", "/v1/tenants"), Viewer, (200, "[Tenant]"), "All tenants", get(list_tenants))
            .query(&["dropped"]),
        Route::new(
            ("POST", "/v1/tenants"),
            Operator,
            (201, "NewTenant"),
            "Make or adopt a tenant",
            post(create_tenant),
        )
        .query(&["wait"])
        .body("NewTenantBody"),
        Route::new(("GET", "/v1/tenants/{name}"), Viewer, (200, "Tenant"), "One tenant", get(show_tenant)),
        Route::new(
            ("PATCH", "/v1/tenants/{name}"),
            Operator,
            (200, "Tenant"),
            "Change settings; null takes the configuration's default",
            patch(set_tenant),
        )
        .body("TenantSettings"),
        Route::new(
            ("DELETE", "/v1/tenants/{name}"),
            Admin,
            (200, "DroppedTenant"),
            "Drop a tenant, its roles, its logins and its database (an adopted one stays)",
            delete(drop_tenant),
        )
        .query(&["wait", "with_database", "leave_host"]),
        Route::new(
            ("POST", "/v1/tenants/{name}/suspend"),
            Operator,
            (200, "Tenant"),
            "Close a tenant; its clients read the reason",
            post(suspend),
        )
        .body("SuspendBody"),
        Route::new(
            ("POST", "/v1/tenants/{name}/resume"),
            Operator,
            (200, "Tenant"),
            "Open a suspended tenant",
            post(async |Path(name), Extension(caller): Extension<Caller>| -> RouteResult {
                caller.execute(AdminCommand::ResumeTenant { name }).await
            }),
        ),
        Route::new(
            ("POST", "/v1/tenants/{name}/rotate"),
            Operator,
            (200, "RotatedTenant"),
            "New passwords for a tenant's roles",
            post(rotate),
        )
        .query(&["wait"]),
        Route::new(
            ("POST", "/v1/tenants/{name}/rename"),
            Operator,
            (200, "Tenant"),
            "Another name",
            post(rename),
        )
        .body("RenameBody"),
        Route::new(
            ("POST", "/v1/tenants/{name}/move"),
            Operator,
            (200, "MovedTenant"),
            "Move a tenant to another host",
            post(move_tenant),
        )
        .query(&["wait"])
        .body("MoveBody"),
    ]
}

async fn list_tenants(Extension(caller): Extension<Caller>, query: Query) -> RouteResult {
    Ok(shown(&tenants::list(&caller.actor, truth(&query, "dropped")?).await?))
}

async fn create_tenant(
    Extension(caller): Extension<Caller>,
    Extension(patience): Extension<MaxWait>,
    Body(body): Body<NewTenantBody>,
) -> RouteResult {
    begin(&caller, body.try_into()?, patience.0).await
}

async fn show_tenant(Path(name): Path<String>, Extension(caller): Extension<Caller>) -> RouteResult {
    Ok(shown(&tenants::show(&caller.actor, &name).await?))
}

async fn set_tenant(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<Map<String, Value>>,
) -> RouteResult {
    caller.execute(AdminCommand::SetTenant { name, settings: settings(body)? }).await
}

async fn drop_tenant(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Extension(patience): Extension<MaxWait>,
    query: Query,
) -> RouteResult {
    let database = DropDatabase::of(truth(&query, "leave_host")?, truth(&query, "with_database")?);
    begin(&caller, AdminCommand::DropTenant { name, database, final_dump: None }, patience.0).await
}

async fn suspend(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<SuspendBody>,
) -> RouteResult {
    caller.execute(body.of(name)).await
}

async fn rotate(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Extension(patience): Extension<MaxWait>,
) -> RouteResult {
    begin(&caller, AdminCommand::RotateTenant { name }, patience.0).await
}

async fn rename(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<RenameBody>,
) -> RouteResult {
    caller.execute(AdminCommand::RenameTenant { name, to: body.to }).await
}

async fn move_tenant(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Extension(patience): Extension<MaxWait>,
    Body(body): Body<MoveBody>,
) -> RouteResult {
    begin(&caller, body.of(name)?, patience.0).await
}

fn logins_routes() -> Vec<Route> {
    use Role::{Operator, Viewer};
    let login = (200, "Login");
    let action = |path, summary, handler| Route::new(("POST", path), Operator, login, summary, handler);
    vec![
        Route::new(
            ("GET", "/v1/logins"),
            Viewer,
            (200, "[Login]"),
            "All logins, or a tenant's",
            get(list_logins),
        )
        .query(&["tenant"]),
        Route::new(("POST", "/v1/logins"), Operator, (201, "MadeLogin"), "Make a login", post(create_login))
            .body("NewLoginBody"),
        Route::new(("GET", "/v1/logins/{name}"), Viewer, login, "One login", get(show_login)),
        Route::new(
            ("PATCH", "/v1/logins/{name}"),
            Operator,
            login,
            "Change what a login may do, until when, and from where; null lifts the limit",
            patch(set_login),
        )
        .body("LoginSettings"),
        Route::new(
            ("DELETE", "/v1/logins/{name}"),
            Operator,
            (200, "Gone"),
            "Remove a login; its sessions end",
            delete(async |Path(name), Extension(caller): Extension<Caller>| -> RouteResult {
                caller.execute(AdminCommand::DropLogin { name }).await
            }),
        ),
        Route::new(
            ("POST", "/v1/logins/{name}/set-password"),
            Operator,
            (200, "MadeLogin"),
            "Another password, the caller's or one made here; its sessions end",
            post(set_password),
        )
        .body("PasswordBody"),
        action("/v1/logins/{name}/grant", "Let a service enter tenants", post(grant::<true>))
            .body("GrantBody"),
        action("/v1/logins/{name}/revoke", "Take tenants from a service", post(grant::<false>))
            .body("GrantBody"),
        action("/v1/logins/{name}/disable", "Refuse a login; its sessions end", post(disable::<true>)),
        action("/v1/logins/{name}/enable", "Refuse it no longer", post(disable::<false>)),
    ]
}

async fn list_logins(Extension(caller): Extension<Caller>, query: Query) -> RouteResult {
    Ok(shown(&logins::list(&caller.actor, query.get("tenant").map(String::as_str)).await?))
}

async fn create_login(Extension(caller): Extension<Caller>, Body(body): Body<NewLoginBody>) -> RouteResult {
    caller.execute(body.try_into()?).await
}

async fn show_login(Path(name): Path<String>, Extension(caller): Extension<Caller>) -> RouteResult {
    Ok(shown(&logins::show(&caller.actor, &name).await?))
}

async fn set_login(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<Map<String, Value>>,
) -> RouteResult {
    caller.execute(AdminCommand::SetLogin { name, settings: settings(body)? }).await
}

async fn set_password(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<PasswordBody>,
) -> RouteResult {
    caller
        .execute(AdminCommand::SetPassword {
            name,
            password: LoginPassword::given_or_generated(body.password),
        })
        .await
}

async fn grant<const GRANT: bool>(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<GrantBody>,
) -> RouteResult {
    caller.execute(body.of(name, GRANT)?).await
}

async fn disable<const DISABLED: bool>(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
) -> RouteResult {
    caller.execute(AdminCommand::DisableLogin { name, disabled: DISABLED }).await
}

fn estate_routes() -> Vec<Route> {
    use Role::{Admin, Viewer};
    vec![
        Route::new(("GET", "/v1/hosts"), Viewer, (200, "[Host]"), "All hosts", get(list_hosts)),
        Route::new(("POST", "/v1/hosts"), Admin, (201, "HostReport"), "Register a host", post(add_host))
            .body("NewHostBody"),
        Route::new(
            ("PATCH", "/v1/hosts/{name}"),
            Admin,
            (200, "HostReport"),
            "Change a host; it is reached as it will be before anything is kept",
            patch(set_host),
        )
        .body("HostSettings"),
        Route::new(
            ("DELETE", "/v1/hosts/{name}"),
            Admin,
            (200, "Gone"),
            "Forget a host that no tenant lives on",
            delete(async |Path(name), Extension(caller): Extension<Caller>| -> RouteResult {
                caller.execute(AdminCommand::RemoveHost { name }).await
            }),
        ),
        Route::new(
            ("GET", "/v1/keys"),
            Viewer,
            (200, "[Key]"),
            "Sealing keys, and what uses them",
            get(list_keys),
        ),
        Route::new(
            ("POST", "/v1/keys/rotate"),
            Admin,
            (200, "RotatedKeys"),
            "Seal every stored credential anew",
            post(rotate_keys),
        )
        .query(&["wait"])
        .body("RotateKeysBody"),
    ]
}

async fn list_hosts(Extension(caller): Extension<Caller>) -> RouteResult {
    Ok(shown(&hosts::list(&caller.actor).await?))
}

async fn add_host(Extension(caller): Extension<Caller>, Body(body): Body<NewHostBody>) -> RouteResult {
    caller.execute(body.into()).await
}

async fn set_host(
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    Body(mut body): Body<Map<String, Value>>,
) -> RouteResult {
    let password = match body.remove("admin_password") {
        None => None,
        Some(Value::String(password)) => Some(SecretString::from(password)),
        Some(_) => return Err(invalid("admin_password is a text")),
    };
    let settings = if body.is_empty() && password.is_some() { Vec::new() } else { settings(body)? };
    caller.execute(AdminCommand::SetHost { name, settings, password }).await
}

async fn list_keys(Extension(caller): Extension<Caller>) -> RouteResult {
    Ok(shown(&key_rotation::list(&caller.actor).await?))
}

async fn rotate_keys(
    Extension(caller): Extension<Caller>,
    Extension(patience): Extension<MaxWait>,
    Body(body): Body<RotateKeysBody>,
) -> RouteResult {
    let config = caller.api.proxy.config.load_full();
    begin(&caller, AdminCommand::RotateKeys { retire: body.retire, config }, patience.0).await
}

fn record_routes() -> Vec<Route> {
    use Role::Viewer;
    vec![
        Route::new(
            ("GET", "/v1/operations"),
            Viewer,
            (200, "[Operation]"),
            "Long work, newest first",
            get(list_operations),
        )
        .query(&["tenant", "status", "before", "limit"]),
        Route::new(
            ("GET", "/v1/operations/{id}"),
            Viewer,
            (200, "Operation"),
            "One of them; with ?wait= when it is over, or the time is",
            get(show_operation),
        )
        .query(&["wait"]),
        Route::new(
            ("GET", "/v1/audit"),
            Viewer,
            (200, "[AuditEntry]"),
            "Audit log, newest first",
            get(list_audit),
        )
        .query(&["tenant", "before", "limit"]),
    ]
}

async fn list_operations(Extension(caller): Extension<Caller>, query: Query) -> RouteResult {
    let (tenant, status) = (query.get("tenant"), query.get("status"));
    let (before, limit) = page(&query)?;
    let text = |value: Option<&'_ String>| value.map(|text| text.as_str().to_owned());
    let (tenant, status) = (text(tenant), text(status));
    Ok(shown(&operations::list(&caller.actor, tenant.as_deref(), status.as_deref(), before, limit).await?))
}

async fn show_operation(
    Path(id): Path<String>,
    Extension(caller): Extension<Caller>,
    Extension(patience): Extension<MaxWait>,
) -> RouteResult {
    let id = id.parse().map_err(|_| ApiError::new("not_found", format!("there is no operation {id:?}")))?;
    Ok(shown(&follow(&caller, id, patience.0).await?))
}

async fn list_audit(Extension(caller): Extension<Caller>, query: Query) -> RouteResult {
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
