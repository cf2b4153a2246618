//! SHOW CONFIG: every key of `proxy.toml` with its present value and its default.

use std::{fmt::Display, time::Duration};

use super::table::{Cell, Table};
use crate::config::Config;

/// Whether RELOAD applies a change; otherwise a restart does.
const CHANGEABLE: bool = true;
const AT_START: bool = false;

/// SHOW CONFIG. Contains no secrets.
pub fn show(config: &Config) -> Table {
    let mut table = Table::new("key value default changeable");
    let default = Config::read("[central]\nurl = \"postgres://master@127.0.0.1/central\"", None, &|_| None);
    let defaults = default.as_ref().map(entries).unwrap_or_default();
    for (at, (key, value, changeable)) in entries(config).into_iter().enumerate() {
        let default = defaults.get(at).map_or(Cell::Null, |(_, value, _)| value.clone().into());
        table.rows.push(vec![
            key.into(),
            value.into(),
            default,
            if changeable { "yes" } else { "no" }.into(),
        ]);
    }
    table
}

type Entry = (&'static str, String, bool);

fn entries(config: &Config) -> Vec<Entry> {
    let mut entries = places(config);
    entries.extend(limits(config));
    entries.extend(timeouts(config));
    entries
}

fn places(config: &Config) -> Vec<Entry> {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    };
    let listen: Vec<String> = config.listen.iter().map(|address| address.ip().to_string()).collect();
    let http = config.http_listen.map_or("off".to_owned(), |address| address.to_string());
    vec![
        ("listen_addr", listen.join(","), AT_START),
        ("listen_port", config.listen_port.to_string(), AT_START),
        ("unix_socket_dir", path(&config.unix_socket_dir), AT_START),
        ("worker_threads", config.worker_threads.to_string(), AT_START),
        ("tenant_host_suffixes", config.tenant_host_suffixes.join(","), CHANGEABLE),
        ("admin_allow_from", join(&config.admin_allow_from), CHANGEABLE),
        ("pool_mode", config.pool.pool_mode.word().into(), CHANGEABLE),
        ("client_tls_sslmode", config.client_tls.mode.word().into(), CHANGEABLE),
        ("client_tls_key_file", path(&config.client_tls.key_file), CHANGEABLE),
        ("client_tls_cert_file", path(&config.client_tls.cert_file), CHANGEABLE),
        ("client_tls_ca_file", path(&config.client_tls.ca_file), CHANGEABLE),
        ("server_tls_sslmode", config.server_tls.mode.word().into(), CHANGEABLE),
        ("server_require_auth", require_auth(config.server_proves_itself).into(), CHANGEABLE),
        ("server_tls_ca_file", path(&config.server_tls.ca_file), CHANGEABLE),
        ("server_tls_cert_file", path(&config.server_tls.cert_file), CHANGEABLE),
        ("server_tls_key_file", path(&config.server_tls.key_file), CHANGEABLE),
        ("central.url", config.central.url.clone(), AT_START),
        ("keys.file", path(&config.keys_file), CHANGEABLE),
        ("http.listen", http, AT_START),
        ("log.level", config.log.filter.clone(), AT_START),
        ("log.format", if config.log.json { "json" } else { "text" }.into(), AT_START),
        ("log.connections", config.log.connections.to_string(), CHANGEABLE),
    ]
}

fn limits(config: &Config) -> Vec<Entry> {
    let (pool, limits) = (&config.pool, &config.limits);
    let entry = |key, value: &dyn Display| (key, value.to_string(), CHANGEABLE);
    let fixed = |key, value: &dyn Display| (key, value.to_string(), AT_START);
    vec![
        entry("default_pool_size", &pool.default_pool_size),
        entry("min_pool_size", &pool.min_pool_size),
        entry("max_pinned_servers", &pool.max_pinned_servers),
        entry("max_prepared_statements", &pool.max_prepared_statements),
        entry("max_prepared_bytes", &pool.max_prepared_bytes),
        entry("max_client_conn", &limits.max_client_conn),
        entry("max_db_client_connections", &limits.max_db_client_connections),
        entry("max_unauthenticated_conn", &limits.max_unauthenticated_conn),
        entry("max_unauthenticated_per_address", &limits.max_unauthenticated_per_address),
        entry("max_unauthenticated_memory", &limits.unauthenticated_bytes_max),
        entry("max_logins_at_a_time", &limits.logins_at_a_time),
        entry("failed_logins_free", &limits.failed_logins.free),
        entry("max_failed_logins_tracked", &limits.failed_logins.tracked_max),
        entry("max_failed_login_lines", &limits.failed_logins.logged_max),
        entry("statement_inspect_max", &limits.statement_inspect_bytes_max),
        entry("functions_inspect_max", &limits.functions_inspect_bytes_max),
        entry("max_client_prepared_statements", &limits.client_prepared_statements_max),
        entry("max_client_prepared_bytes", &limits.client_prepared_bytes_max),
        entry("max_prepared_bytes_total", &limits.prepared_bytes_max),
        entry("max_pipelined_requests", &limits.pipelined_requests_max),
        entry("max_tracked_parameters", &limits.tracked_parameters_max),
        entry("max_tracked_bytes", &limits.tracked_bytes_max),
        entry("max_client_memory", &limits.client_memory_max),
        entry("max_tenant_memory", &limits.tenant_memory_max),
        entry("max_memory", &limits.memory_max),
        entry("max_listening_channels", &limits.listening_channels_max),
        entry("max_queued_notifications", &limits.queued_notifications_bytes_max),
        entry("max_connecting_servers", &limits.connecting_servers_max),
        entry("max_cancels", &limits.cancels_max),
        fixed("directory_cache_max", &limits.directory_cache_max),
        fixed("max_directory_look_ups", &limits.directory_look_ups_max),
        fixed("max_central_connections", &limits.central_connections_max),
        fixed("http.max_connections", &limits.http_connections_max),
        fixed("http.max_requests", &limits.http_requests_max),
        fixed("http.max_operations", &limits.http_operations_max),
        fixed("http.max_body", &limits.http_body_bytes_max),
        entry("metrics_tenants_max", &limits.metrics_tenants_max),
    ]
}

fn timeouts(config: &Config) -> Vec<Entry> {
    let timeouts = &config.timeouts;
    let entry = |key, value: Duration| (key, seconds(value), CHANGEABLE);
    let or_off = |key, value: Option<Duration>| (key, value.map_or("0".into(), seconds), CHANGEABLE);
    let fixed = |key, value: Duration| (key, seconds(value), AT_START);
    vec![
        entry("client_login_timeout", timeouts.client_login),
        entry("failed_login_delay_max", config.limits.failed_logins.delay_max),
        entry("failed_logins_remembered", config.limits.failed_logins.remembered),
        entry("login_success_remembered", config.limits.failed_logins.success_remembered),
        entry("server_connect_timeout", timeouts.server_connect),
        entry("server_login_retry", timeouts.server_login_retry),
        entry("query_wait_timeout", timeouts.query_wait),
        or_off("query_timeout", timeouts.query),
        or_off("transaction_timeout", timeouts.transaction),
        or_off("idle_transaction_timeout", timeouts.idle_transaction),
        or_off("client_idle_timeout", timeouts.client_idle),
        entry("server_idle_timeout", timeouts.server_idle),
        entry("server_lifetime", timeouts.server_lifetime),
        entry("server_check_delay", timeouts.server_check_delay),
        entry("functions_check_delay", timeouts.functions_check_delay),
        entry("pool_idle_timeout", timeouts.pool_idle),
        entry("shutdown_timeout", timeouts.shutdown),
        entry("cancel_timeout", timeouts.cancel),
        entry("http.request_timeout", timeouts.http_request),
        entry("http.max_wait", timeouts.http_wait),
        fixed("http.header_timeout", timeouts.http_head),
        fixed("directory_fresh", timeouts.directory_fresh),
        fixed("directory_stale", timeouts.directory_stale),
        fixed("central_timeout", timeouts.central),
        fixed("central_start_timeout", timeouts.central_start),
        entry("tcp_keepidle", timeouts.client_keepalive.idle),
        entry("tcp_keepintvl", timeouts.client_keepalive.interval),
        or_off("tcp_user_timeout", timeouts.client_keepalive.user_timeout),
        entry("server_tcp_keepidle", timeouts.server_keepalive.idle),
        entry("server_tcp_keepintvl", timeouts.server_keepalive.interval),
        or_off("server_tcp_user_timeout", timeouts.server_keepalive.user_timeout),
    ]
}

/// Seconds as a bare number, as PgBouncer shows them.
fn seconds(duration: Duration) -> String {
    duration.as_secs_f64().to_string()
}

fn join<T: Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn require_auth(proves_itself: bool) -> &'static str {
    if proves_itself { "scram-sha-256" } else { "any" }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../../proxy.toml");

    /// Keys of the shipped proxy.toml with their sections.
    fn shipped_keys() -> Vec<String> {
        let mut section = String::new();
        let mut keys = Vec::new();
        for line in SHIPPED.lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                section = format!("{name}.");
            } else if let Some((key, _)) = line.trim_start_matches('#').split_once(" = ")
                && key.chars().all(|character| character.is_ascii_lowercase() || character == '_')
            {
                keys.push(format!("{section}{key}"));
            }
        }
        keys
    }

    #[test]
    fn every_key_of_the_shipped_file_is_shown() {
        let config = Config::read(SHIPPED, None, &|_| None).unwrap();
        let shown: Vec<_> = entries(&config).into_iter().map(|(key, ..)| key).collect();
        let keys = shipped_keys();
        assert!(keys.len() > 40, "{keys:?}");
        for key in keys {
            assert!(shown.contains(&key.as_str()), "{key} is missing from SHOW CONFIG");
        }
    }
}
