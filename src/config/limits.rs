//! The limits: keys and defaults.

use std::time::Duration;

use crate::config::{FailedLoginRules, Limits, machine, written::Written};

pub(super) fn limits(w: &mut Written<'_>) -> Limits {
    Limits {
        max_client_conn: w.count("max_client_conn", 10_000, 1),
        max_db_client_connections: w.count("max_db_client_connections", 0, 0),
        max_unauthenticated_conn: w.count("max_unauthenticated_conn", 10_000, 1),
        max_unauthenticated_per_address: w.count("max_unauthenticated_per_address", 5_000, 1),
        unauthenticated_bytes_max: w.bytes("max_unauthenticated_memory", 128 << 20),
        logins_at_a_time: w.count("max_logins_at_a_time", 64, 1),
        failed_logins: FailedLoginRules {
            free: w.count("failed_logins_free", 10, 0),
            delay_max: w.duration("failed_login_delay_max", Duration::from_secs(5)),
            remembered: w.duration("failed_logins_remembered", Duration::from_secs(600)),
            success_remembered: w.duration("login_success_remembered", Duration::from_secs(86_400)),
            tracked_max: w.count("max_failed_logins_tracked", 20_000, 1),
            logged_max: w.count("max_failed_login_lines", 100, 0),
        },
        statement_inspect_bytes_max: w.bytes("statement_inspect_max", 1 << 20),
        functions_inspect_bytes_max: w.bytes("functions_inspect_max", 16 << 20),
        client_prepared_statements_max: w.count("max_client_prepared_statements", 10_000, 1),
        client_prepared_bytes_max: w.bytes("max_client_prepared_bytes", 16 << 20),
        prepared_bytes_max: w.bytes("max_prepared_bytes_total", 1 << 30),
        pipelined_requests_max: w.count("max_pipelined_requests", 1000, 2),
        tracked_parameters_max: w.count("max_tracked_parameters", 256, 1),
        tracked_bytes_max: w.bytes("max_tracked_bytes", 256 << 10),
        client_memory_max: w.bytes("max_client_memory", 16 << 20),
        tenant_memory_max: w.bytes("max_tenant_memory", 256 << 20),
        memory_max: w.bytes_or_auto("max_memory").unwrap_or_else(machine::memory_share),
        listening_channels_max: w.count("max_listening_channels", 1000, 1),
        queued_notifications_bytes_max: w.bytes("max_queued_notifications", 4 << 20),
        connecting_servers_max: w.count("max_connecting_servers", 16, 1),
        cancels_max: w.count("max_cancels", 64, 1),
        directory_cache_max: w.count("directory_cache_max", 100_000, 1),
        directory_look_ups_max: w.count("max_directory_look_ups", 50, 1),
        http_connections_max: w.count("http.max_connections", 64, 1),
        http_requests_max: w.count("http.max_requests", 32, 1),
        http_operations_max: w.count("http.max_operations", 8, 1),
        http_body_bytes_max: w.bytes("http.max_body", 1 << 20),
        central_connections_max: w.count("max_central_connections", 4, 1),
        metrics_tenants_max: w.count("metrics_tenants_max", 100, 0),
    }
}
