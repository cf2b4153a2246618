//! How many connections a host's PostgreSQL has for tenants, and the budget that fits into that.
//!
//! A budget (`hosts.max_connections`) is for all nodes together (`fleet/`).

use serde::Serialize;
use tokio_postgres::{GenericClient, Row};
use tracing::{debug, warn};

use super::{
    actor::{Actor, AdminError},
    host_connection::{HostAdmin, HostSession},
};
use crate::control_path::{central::causes, onboarding::names::shell_word};

/// The settings, and the sessions of other roles than the tenants' (`$1`). Which role is connected to which database
/// is visible to every role. Processes that PostgreSQL counts apart (WAL senders, its own workers) have no
/// database, or no role.
pub const SERVER_LIMITS: &str = "
    SELECT pg_catalog.current_setting('max_connections')::int4,
           pg_catalog.current_setting('superuser_reserved_connections')::int4,
           coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::int4,
           (SELECT count(*)::int4 FROM pg_catalog.pg_stat_activity
            WHERE datid IS NOT NULL AND usename::text <> ALL ($1::text[]) AND pid <> pg_catalog.pg_backend_pid())";

/// The names of the tenants' roles on host `$1`.
pub const TENANT_ROLES: &str =
    "SELECT r FROM pglobby.tenants t, unnest(ARRAY[t.username, t.ro_username]) AS r
    WHERE t.host = $1 AND t.status <> 'dropped' AND r IS NOT NULL";

/// One part in so many of the connections stays free for operators, for cancel requests, and for the
/// administrator's own sessions (onboarding, the doctor, dumps).
const SPARE_PART: i32 = 10;
const SPARE_MIN: i32 = 3;
const SPARE_MAX: i32 = 20;

/// Numbers of connections on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ServerLimits {
    /// PostgreSQL's `max_connections`.
    pub max_connections: i32,
    /// `superuser_reserved_connections` and `reserved_connections` (PostgreSQL 16 and newer).
    pub reserved: i32,
    /// Open now, of roles that are not the tenants'.
    pub others: i32,
}

/// What is wrong with a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetTrouble {
    /// There is none.
    Missing,
    /// The server refuses connections before the budget is spent.
    AboveServer {
        /// The budget.
        budget: i32,
    },
}

impl BudgetTrouble {
    /// The event, for the log and the doctor.
    pub fn event(self) -> &'static str {
        match self {
            Self::Missing => "host without a budget: servers are opened until PostgreSQL refuses",
            Self::AboveServer { .. } => "budget of the host above what its PostgreSQL has for tenants",
        }
    }
}

impl ServerLimits {
    /// Of a row of [`SERVER_LIMITS`].
    ///
    /// # Errors
    /// A row of another query.
    pub fn of_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        let (for_superusers, reserved): (i32, i32) = (row.try_get(1)?, row.try_get(2)?);
        Ok(Self {
            max_connections: row.try_get(0)?,
            reserved: for_superusers.saturating_add(reserved),
            others: row.try_get(3)?,
        })
    }

    /// Connections that tenants' roles can have, if no other role is connected.
    pub fn usable(&self) -> i32 {
        self.max_connections.saturating_sub(self.reserved).max(0)
    }

    /// A budget that leaves room for others. At least 1.
    pub fn proposed(&self) -> i32 {
        let spare = (self.usable() / SPARE_PART).clamp(SPARE_MIN, SPARE_MAX);
        self.usable().saturating_sub(spare).saturating_sub(self.others).max(1)
    }

    /// What is wrong with this budget.
    pub fn trouble(&self, budget: Option<i32>) -> Option<BudgetTrouble> {
        match budget {
            None => Some(BudgetTrouble::Missing),
            Some(budget) if budget > self.usable() => Some(BudgetTrouble::AboveServer { budget }),
            Some(_) => None,
        }
    }

    /// The numbers in words: `97 connections for tenants (max_connections = 100, 3 reserved), 2 used by others`.
    pub fn in_words(&self) -> String {
        format!(
            "{} connections for tenants (max_connections = {}, {} reserved), {} used by others now",
            self.usable(),
            self.max_connections,
            self.reserved,
            self.others
        )
    }

    /// The command that sets the proposed budget.
    pub fn remedy(&self, host: &str) -> String {
        format!("pglobby host set {} max_connections={}", shell_word(host), self.proposed())
    }
}

/// Asks the host. `client` is of the central database.
///
/// # Errors
/// Either database.
pub async fn look(
    client: &impl GenericClient,
    session: &HostSession,
    host: &str,
) -> Result<ServerLimits, AdminError> {
    let roles: Vec<String> =
        client.query(TENANT_ROLES, &[&host]).await?.iter().map(|row| row.get(0)).collect();
    let rows = session.query("asking for the server's limits", SERVER_LIMITS, &[&roles]).await?;
    let limits = rows.first().map(ServerLimits::of_row).transpose()?;
    limits.ok_or_else(|| AdminError::Refused(format!("host {host:?} does not know its limits")))
}

/// Logs once for each host what is wrong with its budget. A host that does not answer is left out: its pools
/// log that.
pub async fn warn_at_start(actor: Actor) {
    let hosts = async {
        let client = actor.central.client().await?;
        let sql = "SELECT name, max_connections FROM pglobby.hosts ORDER BY name";
        Ok::<_, AdminError>(client.query(sql, &[]).await?)
    };
    let hosts = match hosts.await {
        Ok(hosts) => hosts,
        Err(error) => {
            debug!(side = "central", error = %causes(&error), "cannot check the budgets of hosts");
            return;
        }
    };
    for row in hosts {
        let (host, budget): (String, Option<i32>) = (row.get(0), row.get(1));
        let limits = async {
            let client = actor.central.client().await?;
            let session = HostAdmin::load(&actor, &**client, &host).await?.connect().await?;
            look(&**client, &session, &host).await
        };
        match limits.await {
            Ok(limits) => {
                let Some(trouble) = limits.trouble(budget) else { continue };
                warn!(
                    side = "server",
                    host,
                    budget,
                    max_connections = limits.max_connections,
                    reserved = limits.reserved,
                    others = limits.others,
                    remedy = limits.remedy(&host),
                    "{}",
                    trouble.event()
                );
            }
            Err(error) => {
                debug!(side = "server", host, error = %causes(&error), "cannot check the budget of a host");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_connections: i32, reserved: i32, others: i32) -> ServerLimits {
        ServerLimits { max_connections, reserved, others }
    }

    #[test]
    fn a_proposed_budget_leaves_the_reserve_a_spare_and_what_others_use() {
        for (server, proposed) in [
            (limits(100, 3, 0), 88),
            (limits(100, 3, 8), 80),
            (limits(100, 8, 0), 83),
            (limits(1000, 3, 50), 927),
            (limits(8, 3, 0), 2),
            (limits(8, 3, 9), 1),
            (limits(3, 3, 0), 1),
        ] {
            assert_eq!(server.proposed(), proposed, "{server:?}");
            assert!(server.usable() < 1 || server.trouble(Some(server.proposed())).is_none());
        }
    }

    #[test]
    fn a_budget_that_is_missing_or_above_the_server_is_named() {
        let server = limits(100, 3, 20);
        assert_eq!(server.trouble(None), Some(BudgetTrouble::Missing));
        assert_eq!(server.trouble(Some(97)), None);
        assert_eq!(server.trouble(Some(98)), Some(BudgetTrouble::AboveServer { budget: 98 }));
        assert_eq!(server.remedy("west end"), "pglobby host set 'west end' max_connections=68");
    }
}
