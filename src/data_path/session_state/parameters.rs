//! Parameters that need special treatment: those that never change what a text means, and those that cannot
//! be restored.
//! Pure.

use std::time::Duration;

/// Parameters that never change the meaning of a text; sorted. All others may change it, also those of
/// extensions and of output formats, because PostgreSQL evaluates constant expressions at planning time.
#[rustfmt::skip]
pub const HARMLESS: [&str; 81] = [
    "application_name", "auto_explain.log_analyze", "auto_explain.log_min_duration",
    "backend_flush_after", "client_connection_check_interval", "client_min_messages", "commit_delay",
    "commit_siblings", "cpu_index_tuple_cost", "cpu_operator_cost", "cpu_tuple_cost",
    "cursor_tuple_fraction", "deadlock_timeout", "debug_pretty_print", "debug_print_parse",
    "debug_print_plan", "debug_print_rewritten", "default_statistics_target",
    "default_transaction_deferrable", "default_transaction_isolation", "default_transaction_read_only",
    "effective_cache_size", "effective_io_concurrency", "enable_async_append", "enable_bitmapscan",
    "enable_gathermerge", "enable_hashagg", "enable_hashjoin", "enable_incremental_sort",
    "enable_indexonlyscan", "enable_indexscan", "enable_material", "enable_memoize", "enable_mergejoin",
    "enable_nestloop", "enable_parallel_append", "enable_parallel_hash", "enable_partition_pruning",
    "enable_partitionwise_aggregate", "enable_partitionwise_join", "enable_seqscan", "enable_sort",
    "enable_tidscan", "from_collapse_limit", "geqo", "geqo_effort", "geqo_threshold",
    "gin_fuzzy_search_limit", "hash_mem_multiplier", "idle_in_transaction_session_timeout",
    "idle_session_timeout", "jit", "jit_above_cost", "jit_inline_above_cost", "jit_optimize_above_cost",
    "join_collapse_limit", "lock_timeout", "log_duration", "log_lock_waits", "log_min_duration_statement",
    "log_min_error_statement", "log_min_messages", "log_statement", "log_temp_files",
    "logical_decoding_work_mem", "maintenance_work_mem", "max_parallel_maintenance_workers",
    "max_parallel_workers", "max_parallel_workers_per_gather", "min_parallel_index_scan_size",
    "min_parallel_table_scan_size", "parallel_leader_participation", "parallel_setup_cost",
    "parallel_tuple_cost", "random_page_cost", "seq_page_cost", "statement_timeout", "synchronous_commit",
    "temp_buffers", "transaction_timeout", "work_mem",
];

/// Returns whether the parameter may change the meaning of a text. `name` is in lower case.
pub fn affects_parsing(name: &str) -> bool {
    let ends = NOT_RESTORABLE.contains(&name) && name != "session_authorization";
    HARMLESS.binary_search(&name).is_err() && !ends && !name.starts_with("pglobby.")
}

/// Parameters that end with their transaction, cannot be set from the value they show, or not at all.
#[rustfmt::skip]
pub const NOT_RESTORABLE: [&str; 10] = [
    "transaction_isolation", "transaction_read_only", "transaction_deferrable", "seed",
    "session_authorization", "is_superuser", "in_hot_standby", "server_version", "server_encoding",
    "integer_datetimes",
];

/// Ends a session that idles outside a transaction.
pub const IDLE_SESSION_TIMEOUT: &str = "idle_session_timeout";

/// Reads the value of a parameter that is a time in milliseconds. `None`: it is 0, which switches it off, or
/// no time.
pub fn duration(value: &str) -> Option<Duration> {
    let value = value.trim();
    let end = value.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(value.len());
    let (number, unit) = value.split_at(end);
    let ms = match unit.trim_start() {
        "us" => 0.001,
        "" | "ms" => 1.0,
        "s" => 1_000.0,
        "min" => 60_000.0,
        "h" => 3_600_000.0,
        "d" => 86_400_000.0,
        _ => return None,
    };
    let ms = (number.parse::<f64>().ok()? * ms).round();
    (ms >= 1.0 && ms <= f64::from(i32::MAX)).then(|| Duration::from_millis(ms as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_postgresql_reads_them() {
        let ms = |value| duration(value).map_or(0, |time| time.as_millis());
        assert_eq!(["300ms", "300", " 2 min", "1.5s", "2d"].map(ms), [300, 300, 120_000, 1_500, 172_800_000]);
        assert_eq!(["0", "", "-1", "5 parsecs", "99999999999"].map(ms), [0; 5]);
    }

    #[test]
    fn unlisted_parameters_affect_parsing() {
        assert!(HARMLESS.is_sorted());
        for name in ["timezone", "search_path", "role", "my.note", "bytea_output", "session_authorization"] {
            assert!(affects_parsing(name), "{name}");
        }
        for name in ["application_name", "work_mem", "transaction_deferrable", "pglobby.tenant"] {
            assert!(!affects_parsing(name), "{name}");
        }
    }
}
