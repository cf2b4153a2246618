//! The limits on memory that is kept for clients, and their errors.

/// A limit on memory kept for clients (`data_path/memory_limit.rs`). Kept small, because every request to a
/// server may carry one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Limit {
    /// `max_client_prepared_statements`.
    Statements,
    /// `max_client_prepared_bytes`.
    StatementBytes,
    /// `max_prepared_bytes_total`.
    StatementsInAll,
    /// `max_tracked_bytes`.
    SettingBytes,
    /// `max_client_memory`.
    Client,
    /// `max_tenant_memory`.
    Tenant,
    /// `max_memory`.
    Process,
}

impl Limit {
    /// The key in the configuration.
    pub fn setting(self) -> &'static str {
        match self {
            Self::Statements => "max_client_prepared_statements",
            Self::StatementBytes => "max_client_prepared_bytes",
            Self::StatementsInAll => "max_prepared_bytes_total",
            Self::SettingBytes => "max_tracked_bytes",
            Self::Client => "max_client_memory",
            Self::Tenant => "max_tenant_memory",
            Self::Process => "max_memory",
        }
    }

    /// The message.
    pub(super) fn message(self, max: usize) -> String {
        let setting = self.setting();
        match self {
            Self::Statements => format!("a session may have at most {max} prepared statements ({setting})"),
            Self::StatementBytes => {
                format!("the prepared statements of a session may take at most {max} bytes ({setting})")
            }
            Self::StatementsInAll => format!(
                "the prepared statements of all sessions may take at most {max} bytes, and this database has reached its share ({setting})"
            ),
            Self::SettingBytes => {
                format!("the parameters that a session has SET may take at most {max} bytes ({setting})")
            }
            Self::Client => format!("a session may use at most {max} bytes of memory ({setting})"),
            Self::Tenant | Self::Process => format!(
                "out of memory: the sessions of this database have reached their share of {max} bytes ({setting})"
            ),
        }
    }

    /// 53200 (out of memory) if other sessions used the memory up; otherwise 53400 (configuration limit).
    pub(super) fn sqlstate(self) -> &'static str {
        match self {
            Self::Tenant | Self::Process => "53200",
            _ => "53400",
        }
    }
}
