//! `/readyz`: whether clients that are sent here can be served.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;

use crate::{
    control_path::{central::CentralError, keyring::Keyring, operator::Office},
    data_path::proxy::Proxy,
};

/// How often the keys that tenants' passwords are sealed with are compared with the key ring.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// As many tenants, the newest ones, stand for all: a rotation seals every one anew.
const SAMPLE: &str = "SELECT sealed_password FROM pglobby.tenants
    WHERE status = 'active' AND sealed_password IS NOT NULL ORDER BY id DESC LIMIT 100";

/// What is known of it.
pub struct Readiness {
    proxy: Arc<Proxy>,
    office: Office,
    /// The key that seals most tenants' passwords, where the key ring lacks it.
    missing_key: ArcSwapOption<String>,
}

impl Readiness {
    /// Of this node.
    pub fn new(proxy: Arc<Proxy>, office: Office) -> Arc<Self> {
        Arc::new(Self { proxy, office, missing_key: ArcSwapOption::empty() })
    }

    /// Why no clients should be sent here; `None`: they should.
    pub fn obstacle(&self) -> Option<String> {
        let (door, directory) = (&self.proxy.door, &self.proxy.directory);
        if door.is_closed() {
            Some("draining".to_owned())
        } else if door.sessions() >= self.proxy.config.load().limits.max_client_conn {
            Some("full: max_client_conn is reached".to_owned())
        } else if !directory.in_touch() && !directory.remembers_anybody() {
            // What is remembered serves on, else.
            Some("the central database is away and no login is remembered".to_owned())
        } else {
            let key = self.missing_key.load_full()?;
            Some(format!("the key ring lacks key {key}, which tenants' passwords are sealed with"))
        }
    }

    /// Looks now, and again and again; ends only by being dropped.
    pub async fn watch(&self) {
        let mut told = None;
        loop {
            // While nobody can say, nothing has changed.
            if let Ok(missing) = self.look().await {
                if missing != told
                    && let Some(key) = &missing
                {
                    tracing::error!(
                        key,
                        "the key ring lacks the key that tenants' passwords are sealed with"
                    );
                }
                self.missing_key.store(missing.clone().map(Arc::new));
                told = missing;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self) -> Result<Option<String>, CentralError> {
        let rows = self.office.central.client().await?.query(SAMPLE, &[]).await?;
        let keyring = self.office.keyring.fresh();
        let ids = rows.iter().filter_map(|row| Keyring::key_of(row.get(0)));
        Ok(missing_key(ids, |id| keyring.key_ids().any(|known| known == id)))
    }
}

/// The key that seals most, if it is not known: a single row that somebody has spoilt takes no node out.
fn missing_key<'a>(ids: impl Iterator<Item = &'a str>, is_known: impl Fn(&str) -> bool) -> Option<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for id in ids {
        *counts.entry(id).or_default() += 1;
    }
    let (most, _) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    (!is_known(most)).then(|| most.to_owned())
}

#[cfg(test)]
mod tests {
    use super::missing_key;

    #[test]
    fn the_key_that_seals_most_decides() {
        let missing = |ids: &[&'static str]| missing_key(ids.iter().copied(), |id| id == "known");
        assert_eq!(missing(&[]), None);
        assert_eq!(missing(&["known", "known", "other"]), None);
        assert_eq!(missing(&["known", "other", "other"]), Some("other".to_owned()));
    }
}
