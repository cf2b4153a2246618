//! HTTP: metrics and health for those who watch a node, and the management API.
//!
//! - `/healthz`: the process is alive; restart it if not.
//! - `/readyz`: it takes in clients; send them elsewhere if not. A node that drains is not ready.
//! - `/metrics`: OpenMetrics text, as Prometheus reads it.
//! - `/v1/…`: management, for those who have an API key; see `api/`.

mod api;
mod exposition;
mod process;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tracing::{debug, info, warn};

use self::exposition::Exposition;
use crate::{control_path::operator::Office, data_path::proxy::Proxy};

/// Binds, so that an address in use is known before any client is served.
///
/// # Errors
/// The address and why.
pub fn bind(address: SocketAddr) -> Result<std::net::TcpListener, String> {
    let bound = std::net::TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    bound.map_err(|error| format!("cannot listen on {address} for HTTP: {error}"))
}

/// Serves until it is dropped.
pub async fn serve(listener: std::net::TcpListener, proxy: Arc<Proxy>, office: Office) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return warn!(%error, "HTTP is not served"),
    };
    info!(address = ?listener.local_addr().ok(), "serving metrics, health and management");
    let config = proxy.config.load_full();
    let places = Arc::new(Semaphore::new(config.limits.http_connections_max));
    let head_timeout = config.timeouts.http_head;
    let router = router(proxy, office);
    // Who finds no place waits in the system's queue: whoever holds one loses it after `header_timeout` of silence.
    while let Ok(place) = places.clone().acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(head_timeout).max_buf_size(HEAD_BYTES_MAX);
            if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
                debug!(%error, "an HTTP connection broke");
            }
            drop(place);
        });
    }
}

/// A request's head, and what is read of its body at once.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Descriptors may have run out; some come back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

fn router(proxy: Arc<Proxy>, office: Office) -> Router {
    let exposition = Arc::new(Exposition::new(proxy.clone()));
    Router::new()
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(ready).with_state(proxy.clone()))
        .route("/metrics", get(metrics).with_state(exposition))
        .merge(api::router(proxy, office))
}

/// The central database may be away for a while: what is remembered serves on. It only must have been seen once, and
/// without it the process would not have started.
async fn ready(State(proxy): State<Arc<Proxy>>) -> impl IntoResponse {
    if proxy.door.is_closed() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else if proxy.door.clients() >= proxy.config.load().limits.max_client_conn {
        (StatusCode::SERVICE_UNAVAILABLE, "full: max_client_conn is reached\n")
    } else {
        (StatusCode::OK, "ready\n")
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
