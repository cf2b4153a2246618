//! The management API `/v1`, for programs that manage tenants and logins.
//!
//! [`guard`] checks each request: limit, time, API key, role of the route (`routes.rs`). The body becomes
//! an admin command (`request_bodies.rs`), which `admin/commands.rs` executes; `responses.rs` writes the
//! answer. Long work is answered with an operation to follow (`long_operations.rs`). The table of routes
//! also makes the OpenAPI document (`openapi.rs`).

mod long_operations;
mod openapi;
pub(super) mod request_bodies;
mod responses;
mod routes;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, FromRequestParts, Request, State},
    http::{StatusCode, Uri, header::AUTHORIZATION, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::get,
};
use secrecy::SecretString;
use tokio::sync::Semaphore;
use tracing::info;

use self::{
    long_operations::RunningOperations,
    responses::{ApiError, creates, done, shown},
};
use crate::{
    config::{Config, units},
    control_path::admin::{
        actor::{Actor, AdminContext, AdminError},
        api_keys::{self, Role},
        commands::AdminCommand,
    },
    data_path::proxy::Proxy,
};

/// Shared by all requests.
#[derive(Clone)]
pub struct Api {
    proxy: Arc<Proxy>,
    context: AdminContext,
    requests: Arc<Semaphore>,
    running: Arc<RunningOperations>,
}

/// The caller, authenticated by an API key.
#[derive(Clone)]
pub struct Caller {
    api: Api,
    actor: Actor,
    role: Role,
    /// `?wait=30s`: how long the caller waits for long work.
    wait: Duration,
}

#[derive(Clone)]
struct Rules {
    api: Api,
    role: Role,
    query: &'static [&'static str],
}

/// Routes below `/v1`, and the answers for unknown paths.
pub fn router(proxy: Arc<Proxy>, context: AdminContext) -> Router {
    let config = proxy.config.load_full();
    let api = Api {
        proxy,
        context,
        // One connection stays free for health probes.
        requests: Arc::new(Semaphore::new(
            config.limits.http_requests_max.min(config.limits.http_connections_max.saturating_sub(1)).max(1),
        )),
        running: Arc::new(RunningOperations::new(config.limits.http_operations_max)),
    };
    let document = openapi::document(&routes::all());
    let mut router = Router::new().route(openapi::PATH, get(async move || shown(&document)));
    for route in routes::all() {
        let rules = Rules { api: api.clone(), role: route.role, query: route.query };
        let handler = route.handler.layer(middleware::from_fn_with_state(rules, guard));
        router = router.route(route.path, handler);
    }
    router
        .layer(DefaultBodyLimit::max(config.limits.http_body_bytes_max))
        .method_not_allowed_fallback(async || {
            ApiError::new("method_not_allowed", "method not allowed for this path; see /v1/openapi.json")
        })
        .fallback(async |uri: Uri| {
            ApiError::new("not_found", format!("there is nothing at {}; see /v1/openapi.json", uri.path()))
        })
}

/// Checks limit, time, key and role before the handler runs.
async fn guard(State(rules): State<Rules>, request: Request, next: Next) -> Response {
    let Rules { api, role, query } = rules;
    let Ok(_place) = api.requests.clone().try_acquire_owned() else {
        let words = "max_requests of [http] is reached";
        return ApiError::new("too_many_requests", words).into_response();
    };
    if !is_text(request.uri()) {
        let words = "the path or query is not valid UTF-8 or contains a NUL character";
        return ApiError::new("malformed", words).into_response();
    }
    let config = api.proxy.config.load_full();
    let answered = async {
        let (mut parts, body) = request.into_parts();
        let mut caller = recognise(&api, &parts).await?;
        if caller.role < role {
            return Err(forbidden(role));
        }
        let wait = wait(&parts.uri, query, &config)?;
        caller.wait = wait;
        parts.extensions.insert(caller);
        Ok((wait, Request::from_parts(parts, body)))
    };
    let limit = config.timeouts.http_request;
    let (wait, request) = match tokio::time::timeout(limit, answered).await {
        Ok(Ok(admitted)) => admitted,
        Ok(Err(error)) => return error.into_response(),
        Err(_) => return timed_out(),
    };
    tokio::time::timeout(limit + wait, next.run(request)).await.unwrap_or_else(|_| timed_out())
}

/// Whether the decoded path and query are UTF-8 without NUL, as PostgreSQL's text.
fn is_text(uri: &Uri) -> bool {
    let mut parts = uri.path_and_query().map_or("", |whole| whole.as_str()).split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let Some(byte) = code else { continue };
        bytes.push(byte);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    std::str::from_utf8(&bytes).is_ok() && !bytes.contains(&0)
}

fn timed_out() -> Response {
    let words = "not answered within request_timeout of [http]; nothing was started";
    ApiError::new("timeout", words).into_response()
}

fn forbidden(role: Role) -> ApiError {
    ApiError::new("forbidden", format!("this needs an API key with role {}", role.name()))
}

async fn recognise(api: &Api, parts: &Parts) -> Result<Caller, ApiError> {
    let header = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let presented = header.and_then(|header| {
        let (scheme, key) = header.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| SecretString::from(key.trim()))
    });
    let Some(presented) = presented else {
        let words = "an API key is needed: Authorization: Bearer …; `pglobby api-key create` makes one";
        return Err(ApiError::new("unauthorized", words));
    };
    let client = api.context.central.client().await.map_err(AdminError::from)?;
    let Some(key) = api_keys::authenticate(&**client, &presented).await? else {
        return Err(ApiError::new("unauthorized", "this API key is unknown, expired or revoked"));
    };
    let actor = api.context.actor(format!("api:{}", key.name));
    Ok(Caller { api: api.clone(), actor, role: key.role, wait: Duration::ZERO })
}

/// [`Caller::wait`]. Refuses unknown query parameters: a misspelt filter must not return everything.
fn wait(uri: &Uri, known: &[&str], config: &Config) -> Result<Duration, ApiError> {
    let mut longest = Duration::ZERO;
    for pair in uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !known.contains(&key) {
            let words = format!("unknown query parameter {key:?} (known: {})", known.join(", "));
            return Err(ApiError::new("invalid", words));
        }
        if key == "wait" {
            let wait = units::duration(value);
            let wait = wait.map_err(|why| ApiError::new("invalid", format!("wait {why}")))?;
            longest = wait.min(config.timeouts.http_wait);
        }
    }
    Ok(longest)
}

/// [`guard`] has put it there.
impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        parts.extensions.remove().ok_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl Caller {
    async fn admit(&self, command: &AdminCommand) -> Result<(), ApiError> {
        let role = command.role(&self.actor).await?;
        if self.role < role { Err(forbidden(role)) } else { Ok(()) }
    }

    /// Runs a command that does not take long.
    async fn execute(&self, command: AdminCommand) -> Result<Response, ApiError> {
        self.admit(&command).await?;
        let (title, subject, created) = (command.title(), command.subject().to_owned(), creates(&command));
        let outcome = command.execute(&self.actor).await?;
        self.api.context.until_applied().await;
        info!(actor = self.actor.name, command = title, subject, "admin command");
        Ok(done(created, &outcome))
    }
}
