//! Counters of the process that belong to no pool.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::error::ClientError;

/// Why a client was refused before it had a session, as a metric's label has it.
pub const REASONS: [&str; 10] = [
    "password",
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

/// Counted since the process started.
#[derive(Debug, Default)]
pub struct Metrics {
    refused: [AtomicU64; REASONS.len()],
    delayed: AtomicU64,
    central_reachable: AtomicBool,
    roles_mended: AtomicU64,
    roles_not_mended: AtomicU64,
}

impl Metrics {
    /// A client was told that it gets no session.
    pub fn login_refused(&self, refusal: &ClientError) {
        let reason = reason(refusal);
        let at = REASONS.iter().position(|known| *known == reason);
        if let Some(counter) = at.and_then(|at| self.refused.get(at)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// How many clients were refused, for each of [`REASONS`].
    pub fn logins_refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(self.refused.iter().map(|counter| counter.load(Relaxed)))
    }

    /// Roles or a database that their host refused were put right, or could not be.
    pub fn roles_mended(&self, well: bool) {
        let counter = if well { &self.roles_mended } else { &self.roles_not_mended };
        counter.fetch_add(1, Relaxed);
    }

    /// How often roles were put right, and how often they could not be.
    pub fn roles_mendings(&self) -> [(&'static str, u64); 2] {
        [("mended", self.roles_mended.load(Relaxed)), ("failed", self.roles_not_mended.load(Relaxed))]
    }

    /// A login's answer waits because others have failed.
    pub fn login_delayed(&self) {
        self.delayed.fetch_add(1, Relaxed);
    }

    /// How many logins were answered late.
    pub fn logins_delayed(&self) -> u64 {
        self.delayed.load(Relaxed)
    }

    /// The connection on which the central database tells of changes has been made, or lost.
    pub fn set_central_reachable(&self, reachable: bool) {
        self.central_reachable.store(reachable, Relaxed);
    }

    /// Whether the central database tells of changes now.
    pub fn central_reachable(&self) -> bool {
        self.central_reachable.load(Relaxed)
    }
}

fn reason(refusal: &ClientError) -> &'static str {
    match refusal {
        ClientError::LoginFailed { .. } => "password",
        ClientError::TooManyFailedLogins => "too_many_failures",
        ClientError::Suspended { .. }
        | ClientError::Dropped { .. }
        | ClientError::NotReady { .. }
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
        for refusal in &refusals {
            metrics.login_refused(refusal);
        }
        assert!(metrics.logins_refused().all(|(_, count)| count == 1));
    }
}
