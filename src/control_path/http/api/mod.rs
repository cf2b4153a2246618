//! The management API: `/v1`, for programs that look after tenants and logins.
//!
//! A request passes [`guard`] (room, time, key, role: the route's, from the table in `routes.rs`), becomes an order
//! (`request_bodies.rs`), is carried out by `orders.rs` as any order is, and is answered (`answers.rs`); long work is answered
//! with an operation to follow (`long_operations.rs`). The same table makes the OpenAPI document (`openapi.rs`).

mod long_operations;
mod openapi;
mod request_bodies;
mod responses;
mod routes;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{Uri, header::AUTHORIZATION, request::Parts},
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

/// What all requests share.
#[derive(Clone)]
pub struct Api {
    proxy: Arc<Proxy>,
    context: AdminContext,
    requests: Arc<Semaphore>,
    running: Arc<RunningOperations>,
}

/// Who asks, known by a key.
#[derive(Clone)]
pub struct Caller {
    api: Api,
    actor: Actor,
    role: Role,
}

/// What a route asks of every request.
#[derive(Clone)]
struct Rules {
    api: Api,
    role: Role,
    query: &'static [&'static str],
}

/// `?wait=30s`: how long the caller is willing to wait for long work.
#[derive(Clone, Copy)]
struct MaxWait(Duration);

/// Everything below `/v1`, and the words for paths that are nowhere.
pub fn router(proxy: Arc<Proxy>, context: AdminContext) -> Router {
    let config = proxy.config.load_full();
    let api = Api {
        proxy,
        context,
        // A place stays for probes.
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
            ApiError::new("method_not_allowed", "this path knows other methods; see /v1/openapi.json")
        })
        .fallback(async |uri: Uri| {
            ApiError::new("not_found", format!("there is nothing at {}; see /v1/openapi.json", uri.path()))
        })
}

/// Room, time, key, role; only then the route itself.
async fn guard(State(rules): State<Rules>, request: Request, next: Next) -> Response {
    let Rules { api, role, query } = rules;
    let Ok(_place) = api.requests.clone().try_acquire_owned() else {
        let words = "as many requests are under way as max_requests of [http] allows";
        return ApiError::new("too_many_requests", words).into_response();
    };
    if !is_text(request.uri()) {
        let words = "the path or what follows it is no UTF-8, or holds a NUL character, which no name has";
        return ApiError::new("malformed", words).into_response();
    }
    let config = api.proxy.config.load_full();
    let answered = async {
        let (mut parts, body) = request.into_parts();
        let caller = recognise(&api, &parts).await?;
        if caller.role < role {
            return Err(forbidden(role));
        }
        let patience = patience(&parts.uri, query, &config)?;
        parts.extensions.insert(patience);
        parts.extensions.insert(caller);
        Ok((patience, Request::from_parts(parts, body)))
    };
    let limit = config.timeouts.http_request;
    let (patience, request) = match tokio::time::timeout(limit, answered).await {
        Ok(Ok(admitted)) => admitted,
        Ok(Err(error)) => return error.into_response(),
        Err(_) => return timed_out(),
    };
    tokio::time::timeout(limit + patience.0, next.run(request)).await.unwrap_or_else(|_| timed_out())
}

/// Whether what is percent-encoded in it is text as PostgreSQL knows it.
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
    let words = "not answered within request_timeout of [http]; nothing was begun";
    ApiError::new("timeout", words).into_response()
}

fn forbidden(role: Role) -> ApiError {
    ApiError::new("forbidden", format!("this takes a key with role {}", role.name()))
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
    let Some(key) = api_keys::recognise(&**client, &presented).await? else {
        return Err(ApiError::new("unauthorized", "this API key is unknown, expired or revoked"));
    };
    let actor = api.context.actor(format!("api:{}", key.name));
    Ok(Caller { api: api.clone(), actor, role: key.role })
}

/// Refuses what the route does not know behind `?`: a misspelt filter must not answer everything.
fn patience(uri: &Uri, known: &[&str], config: &Config) -> Result<MaxWait, ApiError> {
    let mut patience = Duration::ZERO;
    for pair in uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !known.contains(&key) {
            let words = format!("nothing is called {key:?} here (there are: {})", known.join(", "));
            return Err(ApiError::new("invalid", words));
        }
        if key == "wait" {
            let wait = units::duration(value);
            let wait = wait.map_err(|why| ApiError::new("invalid", format!("wait {why}")))?;
            patience = wait.min(config.timeouts.http_wait);
        }
    }
    Ok(MaxWait(patience))
}

impl Caller {
    /// Whether the caller's role allows the order.
    async fn admit(&self, command: &AdminCommand) -> Result<(), ApiError> {
        let role = command.role(&self.actor).await?;
        if self.role < role { Err(forbidden(role)) } else { Ok(()) }
    }

    /// Has an order carried out that does not take long.
    async fn carry_out(&self, command: AdminCommand) -> Result<Response, ApiError> {
        self.admit(&command).await?;
        let (title, subject, created) = (command.title(), command.subject().to_owned(), creates(&command));
        let outcome = command.execute(&self.actor).await?;
        self.api.context.until_applied().await;
        info!(actor = self.actor.name, command = title, subject, "an operator acts");
        Ok(done(created, &outcome))
    }
}
