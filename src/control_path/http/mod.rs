//! HTTP: metrics and health for those who watch a node, and the management API.
//!
//! - `/healthz`: the process is alive; restart it if not.
//! - `/readyz`: it takes in clients; send them elsewhere if not. A node that drains is not ready.
//! - `/metrics`: OpenMetrics text, as Prometheus reads it.
//! - `/v1/…`: management, for those who have an API key; see `api/`.

mod api;
mod exposition;
mod process;

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;
use tracing::{info, warn};

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
    let served = async {
        let listener = TcpListener::from_std(listener)?;
        info!(address = %listener.local_addr()?, "serving metrics, health and management");
        axum::serve(listener, router(proxy, office)).await
    };
    if let Err(error) = served.await {
        warn!(%error, "HTTP is no longer served");
    }
}

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
