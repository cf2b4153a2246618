//! Logs on standard error, as text or JSON.

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use super::Failure;
use crate::config::Log;

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
    let registry = tracing_subscriber::registry().with(filter);
    let started = if log.json {
        registry.with(fmt::layer().json().flatten_event(true).with_writer(std::io::stderr)).try_init()
    } else {
        registry.with(fmt::layer().with_writer(std::io::stderr).with_ansi(false)).try_init()
    };
    started.map_err(|error| Failure::new(format!("cannot start logging: {error}")))
}
