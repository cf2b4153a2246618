//! Starts the log on standard error, as text or JSON, one line for each event.

use tracing::Metadata;
use tracing_subscriber::{
    EnvFilter, filter::filter_fn, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::{cli::Failure, config::Log};

/// Starts logging as the configuration says; `RUST_LOG` overrides the level.
pub fn start(log: &Log) -> Result<(), Failure> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) if !filter.is_empty() => filter,
        _ => log.filter.clone(),
    };
    let filter = EnvFilter::try_new(&filter)
        .map_err(|error| Failure::new(format!("log level {filter:?}: {error}")))?;
    let registry = tracing_subscriber::registry().with(filter).with(filter_fn(is_own));
    let started = if log.json {
        registry.with(fmt::layer().json().flatten_event(true).with_writer(std::io::stderr)).try_init()
    } else {
        registry.with(fmt::layer().with_writer(std::io::stderr).with_ansi(false)).try_init()
    };
    started.map_err(|error| Failure::new(format!("cannot start logging: {error}")))
}

/// Only pglobby's own events are logged, whatever the filter says: libraries log statements, parameters and
/// verifiers of passwords below `info`, and above it events without tenant and login that pglobby reports in
/// its own words.
fn is_own(event: &Metadata<'_>) -> bool {
    event.target().split("::").next() == Some(env!("CARGO_PKG_NAME"))
}
