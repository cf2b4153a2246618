//! `/readyz`: whether this node can serve new clients.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;

use crate::{
    control_path::{
        admin::actor::AdminContext,
        central::CentralError,
        directory::CentralDirectory,
        secrets::{
            keyring::Keyring,
            seal::{SealError, SecretLocation},
        },
    },
    data_path::{directory::Directory as _, proxy::Proxy},
};

/// Interval between checks of the key ring.
const CHECK_EVERY: Duration = Duration::from_secs(2);

/// The newest tenants as a sample: a rotation seals all tenants again.
const SAMPLE: &str = "SELECT id::text, sealed_password FROM pglobby.tenants
    WHERE status = 'active' AND sealed_password IS NOT NULL ORDER BY tenants.id DESC LIMIT 100";

/// Why the key ring cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum KeyringProblem {
    /// The key of most tenants' passwords is missing.
    #[error("the key ring lacks key {0}, which tenants' passwords are sealed with")]
    Lacks(String),
    /// A key of that id is there, but opens none of the passwords.
    #[error(
        "the key ring's key {0} opens none of the tenants' passwords that are sealed with a key of that name"
    )]
    HasAnother(String),
}

/// The readiness of this node.
pub struct Readiness {
    proxy: Arc<Proxy>,
    directory: Arc<CentralDirectory>,
    context: AdminContext,
    /// The problem with the key ring.
    problem: ArcSwapOption<KeyringProblem>,
}

impl Readiness {
    /// Not checked yet.
    pub fn new(proxy: Arc<Proxy>, directory: Arc<CentralDirectory>, context: AdminContext) -> Arc<Self> {
        Arc::new(Self { proxy, directory, context, problem: ArcSwapOption::empty() })
    }

    /// Whether this node is ready, in words that also say what it does without.
    pub async fn state(&self) -> Result<String, String> {
        let (limits, directory) = (&self.proxy.connection_limits, &self.directory);
        if limits.is_closed() {
            return Err("draining".to_owned());
        }
        if limits.sessions() >= self.proxy.config.load().limits.max_client_conn {
            return Err("full: max_client_conn is reached".to_owned());
        }
        if let Some(problem) = self.problem.load_full() {
            return Err(problem.to_string());
        }
        if directory.is_current() {
            return Ok("ready".to_owned());
        }
        let away = "the central database does not answer";
        match directory.snapshot().usable().await.and_then(|_| directory.snapshot().age()) {
            Some(age) => Ok(format!(
                "ready: {away}; logins are admitted from the cache, and from a snapshot that is {} s old",
                age.as_secs()
            )),
            None if directory.has_usable_entries() => {
                Ok(format!("ready: {away}; cached logins are admitted"))
            }
            None => Err("the central database is down and no login is cached".to_owned()),
        }
    }

    /// Checks the key ring at intervals. Returns only if it is dropped.
    pub async fn watch(&self) {
        let mut last = None;
        loop {
            // While the central database is down, the last result stays.
            if let Ok(problem) = self.look().await {
                if problem != last
                    && let Some(reason) = &problem
                {
                    tracing::error!(%reason, "this node cannot open the tenants' passwords");
                }
                self.problem.store(problem.clone().map(Arc::new));
                last = problem;
            }
            tokio::time::sleep(CHECK_EVERY).await;
        }
    }

    async fn look(&self) -> Result<Option<KeyringProblem>, CentralError> {
        let rows = self.context.central.client().await?.query(SAMPLE, &[]).await?;
        let keyring = self.context.keyring.fresh();
        let looked_at = rows.iter().filter_map(|row| {
            let (id, blob) = (row.get(0), row.get(1));
            let place = SecretLocation { table: "tenants", row: id, column: "sealed_password" };
            let outcome = match keyring.open(&place, blob) {
                Ok(_) => OpenResult::Opens,
                Err(SealError::UnknownKey { .. }) => OpenResult::Unknown,
                Err(_) => OpenResult::Fails,
            };
            Some((Keyring::key_of(blob)?, outcome))
        });
        Ok(problem(looked_at))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OpenResult {
    Opens,
    Unknown,
    Fails,
}

/// The key of most passwords decides, so that a single damaged row does not make a node unready.
fn problem<'a>(rows: impl Iterator<Item = (&'a str, OpenResult)>) -> Option<KeyringProblem> {
    let mut keys: BTreeMap<&str, Vec<OpenResult>> = BTreeMap::new();
    for (key, outcome) in rows {
        keys.entry(key).or_default().push(outcome);
    }
    let (most, outcomes) = keys.into_iter().max_by_key(|(_, outcomes)| outcomes.len())?;
    if outcomes.contains(&OpenResult::Opens) {
        None
    } else if outcomes.contains(&OpenResult::Unknown) {
        Some(KeyringProblem::Lacks(most.to_owned()))
    } else {
        Some(KeyringProblem::HasAnother(most.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_that_seals_most_decides() {
        use OpenResult::{Fails, Opens, Unknown};
        let of = |rows: &[(&'static str, OpenResult)]| problem(rows.iter().copied());
        let (old, new) = ("old", "new");
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[(old, Opens), (old, Opens), (new, Unknown)]), None);
        assert_eq!(of(&[(old, Opens), (old, Fails), (old, Fails)]), None, "rows that are spoilt");
        assert_eq!(
            of(&[(old, Opens), (new, Unknown), (new, Unknown)]),
            Some(KeyringProblem::Lacks(new.to_owned()))
        );
        assert_eq!(of(&[(old, Fails), (old, Fails)]), Some(KeyringProblem::HasAnother(old.to_owned())));
    }
}
