//! SHOW CONFIG: every key of `proxy.toml` with its present value and its default.

use std::fmt::Display;

use super::table::{Cell, Table};
use crate::config::{Config, Setting, Shown as _, Timeouts};

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

fn entries(config: &Config) -> Vec<Setting> {
    let groups = [
        places(config),
        config.pool.settings(),
        config.limits.settings(),
        config.limits.failed_logins.settings(),
        config.timeouts.settings(),
        keepalives(&config.timeouts),
    ];
    groups.into_iter().flatten().collect()
}

fn places(config: &Config) -> Vec<Setting> {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    };
    let listen: Vec<String> = config.listen.iter().map(|address| address.ip().to_string()).collect();
    let http = config.http_listen.map_or("off".to_owned(), |address| address.to_string());
    vec![
        ("listen_addr", listen.join(","), AT_START),
        ("listen_port", config.listen_port.to_string(), AT_START),
        ("unix_socket_dir", path(&config.unix_socket_dir), AT_START),
        ("so_reuseport", config.so_reuseport.to_string(), AT_START),
        ("takeover_socket", takeover_socket(config), AT_START),
        ("node_name", config.node_name.clone().unwrap_or_default(), AT_START),
        ("node_address", config.node_address.clone().unwrap_or_default(), AT_START),
        ("directory_snapshot", path(&config.directory_snapshot), AT_START),
        ("worker_threads", config.worker_threads.to_string(), AT_START),
        ("tenant_host_suffixes", config.tenant_host_suffixes.join(","), CHANGEABLE),
        ("maintenance_databases", config.maintenance_databases.join(","), CHANGEABLE),
        ("admin_allow_from", join(&config.admin_allow_from), CHANGEABLE),
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

fn takeover_socket(config: &Config) -> String {
    config.takeover_socket.path().map_or("off".to_owned(), |path| path.display().to_string())
}

fn keepalives(timeouts: &Timeouts) -> Vec<Setting> {
    let (client, server) = (&timeouts.client_keepalive, &timeouts.server_keepalive);
    vec![
        ("tcp_keepidle", client.idle.shown(), CHANGEABLE),
        ("tcp_keepintvl", client.interval.shown(), CHANGEABLE),
        ("tcp_user_timeout", client.user_timeout.shown(), CHANGEABLE),
        ("server_tcp_keepidle", server.idle.shown(), CHANGEABLE),
        ("server_tcp_keepintvl", server.interval.shown(), CHANGEABLE),
        ("server_tcp_user_timeout", server.user_timeout.shown(), CHANGEABLE),
    ]
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
