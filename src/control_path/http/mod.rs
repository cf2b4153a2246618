//! HTTP: metrics, health, and the management API.
//!
//! - `/healthz`: 200 while the process is alive; otherwise restart it.
//! - `/readyz`: 200 if this node can serve new clients; otherwise 503 with the reason.
//! - `/metrics`: OpenMetrics text for Prometheus.
//! - `/v1/…`: management, with an API key; see `api/`.

mod api;
mod connections;
mod metrics;
mod process_metrics;
mod readiness;

#[cfg(any(test, fuzzing))]
pub(crate) use self::api::request_bodies::read_any as read_any_body;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use hyper::{server::conn::http1, service::Service as _};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, info, warn};

use self::{
    connections::{Activity, Connections, TrackedStream},
    metrics::Exposition,
    readiness::Readiness,
};
use crate::{
    control_path::{admin::actor::AdminContext, directory::CentralDirectory},
    data_path::{inherited_sockets::InheritedSockets, listener::why_not, proxy::Proxy},
};

/// Takes the socket of the process before, or binds: before any client is served, so that an address in use is an
/// error at the start.
pub fn bind(address: SocketAddr, inherited: &mut InheritedSockets) -> Result<std::net::TcpListener, String> {
    if let Some(listener) = inherited.take_tcp(address) {
        return Ok(listener);
    }
    let bound = std::net::TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    bound.map_err(|error| format!("cannot listen on {address} for HTTP: {}", why_not(address, &error)))
}

/// Serves until it is dropped.
pub async fn serve(
    listener: std::net::TcpListener,
    proxy: Arc<Proxy>,
    directory: Arc<CentralDirectory>,
    context: AdminContext,
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return warn!(%error, "HTTP is not served"),
    };
    info!(address = listener.local_addr().ok().map(tracing::field::display), "serving HTTP");
    let config = proxy.config.load_full();
    let readiness = Readiness::new(proxy.clone(), directory.clone(), context.clone());
    let router = router(proxy, directory, context, readiness.clone());
    let connections = Connections::new(config.limits.http_connections_max);
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let activity = Activity::new();
                    let serving =
                        converse(stream, activity.clone(), router.clone(), config.timeouts.http_head);
                    connections.serve(activity, serving).await;
                }
                Err(error) => {
                    warn!(%error, "cannot accept an HTTP connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::join!(accepting, readiness.watch());
}

async fn converse(stream: TcpStream, activity: Arc<Activity>, router: Router, head_timeout: Duration) {
    let stream = TokioIo::new(TrackedStream { stream, activity: activity.clone() });
    let service = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |request| {
        let (answer, request) = (service.call(request), activity.request());
        async move {
            let answer = answer.await;
            drop(request);
            answer
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head_timeout).max_buf_size(HEAD_BYTES_MAX);
    if let Err(error) = http.serve_connection(stream, service).await {
        debug!(%error, "HTTP connection lost");
    }
}

/// Maximum of a request's head, and of one read of its body.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// File descriptors may be used up; some become free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

fn router(
    proxy: Arc<Proxy>,
    directory: Arc<CentralDirectory>,
    context: AdminContext,
    readiness: Arc<Readiness>,
) -> Router {
    let exposition = Arc::new(Exposition::new(proxy.clone(), directory));
    Router::new()
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(ready).with_state(readiness))
        .route("/metrics", get(metrics).with_state(exposition))
        .merge(api::router(proxy, context))
}

async fn ready(State(readiness): State<Arc<Readiness>>) -> impl IntoResponse {
    match readiness.state().await {
        Ok(state) => (StatusCode::OK, state + "\n"),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n"),
    }
}

async fn metrics(State(exposition): State<Arc<Exposition>>) -> impl IntoResponse {
    match exposition.text() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(CONTENT_TYPE, kind)], text)
        }
        Err(error) => {
            let kind = "text/plain; charset=utf-8";
            (StatusCode::INTERNAL_SERVER_ERROR, [(CONTENT_TYPE, kind)], format!("{error}\n"))
        }
    }
}
