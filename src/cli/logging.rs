//! Logs on standard error, as text or JSON.

use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, filter::filter_fn, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::{cli::Failure, config::Log};

/// Starts logging as the configuration says; `RUST_LOG` overrides the level.
///
/// # Errors
/// A filter that cannot be read.
pub fn start(log: &Log) -> Result<(), Failure> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) if !filter.is_empty() => filter,
        _ => log.filter.clone(),
    };
    let filter = EnvFilter::try_new(&filter)
        .map_err(|error| Failure::new(format!("log level {filter:?}: {error}")))?;
    let registry = tracing_subscriber::registry().with(filter).with(filter_fn(keeps_secrets));
    let started = if log.json {
        registry.with(fmt::layer().json().flatten_event(true).with_writer(std::io::stderr)).try_init()
    } else {
        registry.with(fmt::layer().with_writer(std::io::stderr).with_ansi(false)).try_init()
    };
    started.map_err(|error| Failure::new(format!("cannot start logging: {error}")))
}

/// Below `info`, libraries log what passes through them: tokio-postgres the texts and parameters of statements, verifiers and
/// passwords of roles among them. No filter lets that through.
fn keeps_secrets(event: &Metadata<'_>) -> bool {
    let crate_name = event.target().split("::").next();
    crate_name == Some(env!("CARGO_PKG_NAME")) || *event.level() <= Level::INFO
}
