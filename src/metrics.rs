//! Counters of the process that belong to no pool.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::error::ClientError;

/// Reasons why a client got no session: values of the metric's label.
pub const REASONS: [&str; 11] = [
    "password",
    "database",
    "too_many_failures",
    "tenant_closed",
    "too_many_clients",
    "directory_unavailable",
    "server_unreachable",
    "pool_busy",
    "timeout",
    "shutdown",
    "other",
];

/// What became of an operation whose process was gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// Finished by this node.
    Finished,
    /// Undone by this node.
    Undone,
    /// The attempt failed; there will be another one.
    Failed,
}

impl Adoption {
    const ALL: [Self; 3] = [Self::Finished, Self::Undone, Self::Failed];

    /// The label in metrics and the word in the log.
    pub fn word(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Undone => "undone",
            Self::Failed => "failed",
        }
    }
}

/// Counters since the process started.
#[derive(Debug, Default)]
pub struct Metrics {
    refused: [AtomicU64; REASONS.len()],
    delayed: AtomicU64,
    central_reachable: AtomicBool,
    roles_repaired: AtomicU64,
    role_repairs_failed: AtomicU64,
    adoptions: [AtomicU64; Adoption::ALL.len()],
}

impl Metrics {
    /// Counts a client that got no session.
    pub fn login_refused(&self, client_error: &ClientError) {
        let reason = reason(client_error);
        let at = REASONS.iter().position(|known| *known == reason);
        if let Some(counter) = at.and_then(|at| self.refused.get(at)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// The number of refused clients for each of [`REASONS`].
    pub fn logins_refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(self.refused.iter().map(|counter| counter.load(Relaxed)))
    }

    /// Counts a repair of a tenant's roles (`onboarding/repair.rs`).
    pub fn roles_repaired(&self, well: bool) {
        let counter = if well { &self.roles_repaired } else { &self.role_repairs_failed };
        counter.fetch_add(1, Relaxed);
    }

    /// The number of repairs that succeeded and that failed.
    pub fn role_repairs(&self) -> [(&'static str, u64); 2] {
        [("mended", self.roles_repaired.load(Relaxed)), ("failed", self.role_repairs_failed.load(Relaxed))]
    }

    /// Counts an attempt to end an operation whose process was gone (`onboarding/abandoned.rs`).
    pub fn operation_adopted(&self, adoption: Adoption) {
        let counters = Adoption::ALL.into_iter().zip(&self.adoptions);
        counters.filter(|(each, _)| *each == adoption).for_each(|(_, counter)| {
            counter.fetch_add(1, Relaxed);
        });
    }

    /// The number of attempts by outcome.
    pub fn operations_adopted(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Adoption::ALL
            .into_iter()
            .zip(&self.adoptions)
            .map(|(each, counter)| (each.word(), counter.load(Relaxed)))
    }

    /// Counts a login that is delayed because of earlier failures.
    pub fn login_delayed(&self) {
        self.delayed.fetch_add(1, Relaxed);
    }

    /// The number of delayed logins.
    pub fn logins_delayed(&self) -> u64 {
        self.delayed.load(Relaxed)
    }

    /// Sets whether the connection that reports changes of the central database is up.
    pub fn set_central_reachable(&self, reachable: bool) {
        self.central_reachable.store(reachable, Relaxed);
    }

    /// Whether that connection is up.
    pub fn central_reachable(&self) -> bool {
        self.central_reachable.load(Relaxed)
    }
}

fn reason(client_error: &ClientError) -> &'static str {
    match client_error {
        ClientError::LoginFailed { .. } => "password",
        ClientError::NoDatabase { .. } => "database",
        ClientError::TooManyFailedLogins => "too_many_failures",
        ClientError::Suspended { .. }
        | ClientError::Dropped { .. }
        | ClientError::NotReady { .. }
        | ClientError::Moving { .. }
        | ClientError::NoReadOnlyRole => "tenant_closed",
        ClientError::TooManyClients | ClientError::TooManyClientsOfTenant { .. } => "too_many_clients",
        ClientError::DirectoryUnavailable => "directory_unavailable",
        ClientError::ServerUnreachable { .. } | ClientError::Server { .. } | ClientError::ServerLost => {
            "server_unreachable"
        }
        ClientError::PoolBusy { .. } => "pool_busy",
        ClientError::LoginTimeout => "timeout",
        ClientError::AdminShutdown => "shutdown",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_a_reason_that_is_listed() {
        let metrics = Metrics::default();
        let refusals = [
            ClientError::LoginFailed { user: "alice".into() },
            ClientError::NoDatabase { database: "acme".into() },
            ClientError::TooManyFailedLogins,
            ClientError::NoTenantChosen,
            ClientError::TooManyClients,
            ClientError::LoginTimeout,
            ClientError::AdminShutdown,
            ClientError::ServerLost,
            ClientError::DirectoryUnavailable,
            ClientError::NoReadOnlyRole,
            ClientError::PoolBusy { waited: std::time::Duration::ZERO },
        ];
        for client_error in &refusals {
            metrics.login_refused(client_error);
        }
        assert!(metrics.logins_refused().all(|(_, count)| count == 1));
    }
}
