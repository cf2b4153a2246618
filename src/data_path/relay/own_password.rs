//! A session changes the password of its own login: `ALTER ROLE CURRENT_USER PASSWORD '…'`, psql's `\password`.
//!
//! The servers' roles are shared by all logins of a tenant, so it is the login's verifier in the central database that
//! changes. Other sessions of that login end, as they do when an operator sets its password; this one stays.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use secrecy::SecretString;
use tracing::{info, warn};

use crate::{
    data_path::{
        exchange::ClientSide,
        login::scram_proof::Verifier,
        session_state::identity::NewPassword,
        sessions::registry::{Registered, SessionHandle},
        tenant::Login,
        tenant_switch::switcher::Concierge,
    },
    error::{ClientError, IdentityError},
};

/// A login changes its password so often at once, and then once in each interval: every change is a row in the audit log and a
/// message to all nodes, made by whoever likes to. A person mistypes, a script sets a handful.
const AT_ONCE: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(60);

/// How fast logins change their own passwords, at this node.
#[derive(Debug, Default)]
pub struct PasswordPace {
    /// By `logins.id`: when all changes so far would be over, had they been made one in each interval.
    busy_until: Mutex<HashMap<i64, Instant>>,
}

impl PasswordPace {
    /// Counts a change that is about to be tried, whatever becomes of it.
    ///
    /// # Errors
    /// After how long it may be tried, if not now; it is not counted then.
    fn begin(&self, login: i64, now: Instant) -> Result<(), Duration> {
        let mut all = self.busy_until.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that may make all of their changes again are swept when the map would have to grow.
        if all.len() == all.capacity() {
            all.retain(|_, until| *until > now);
        }
        let until = all.get(&login).map_or(now, |until| (*until).max(now));
        let wait = until.saturating_duration_since(now).saturating_sub(INTERVAL * (AT_ONCE - 1));
        if !wait.is_zero() {
            return Err(wait);
        }
        all.insert(login, until + INTERVAL);
        Ok(())
    }
}

impl Concierge {
    /// Gives the session's login another password, and answers. The one statement of a session that waits for the central
    /// database, besides a choice of tenant.
    pub(in crate::data_path) async fn set_password(
        &mut self,
        handle: &Registered,
        password: NewPassword,
        side: &mut ClientSide,
        replies: &mut Vec<u8>,
    ) {
        match self.store_password(handle, password).await {
            Ok(()) => self.desk.chosen(None, replies),
            Err(refusal) => self.desk.refuse(&refusal, side, replies),
        }
    }

    async fn store_password(&self, handle: &Registered, password: NewPassword) -> Result<(), ClientError> {
        let directory = &self.proxy.directory;
        let begun = self.proxy.password_pace.begin(handle.login.id, Instant::now());
        begun.map_err(|wait| ClientError::PasswordTooOften { wait })?;
        let verifier = match Verifier::read(password.expose()) {
            Some(_) => password.to_secret(),
            None => directory.verifier_of(password.to_secret()).await,
        };
        drop(password);
        let before = handle.verifiers();
        // Known before it is stored: word of the change may come back before the answer to it.
        handle.expect_verifier(&before, &verifier);
        match directory.set_verifier(&handle.login, &before, &verifier).await {
            Ok(true) => {
                info!(login = handle.login.name, "a login has changed its own password");
                Ok(())
            }
            Ok(false) => {
                info!(
                    login = handle.login.name,
                    "a login that was changed meanwhile cannot change its password"
                );
                Err(IdentityError::LoginChanged.into())
            }
            // It may have been stored all the same, so both count.
            Err(error) => {
                warn!(login = handle.login.name, side = "central", %error, "cannot change a login's password");
                Err(ClientError::PasswordNotStored)
            }
        }
    }
}

impl SessionHandle {
    /// Whether the session may stay, its login being like this now.
    pub fn is_admitted_by(&self, login: &Login) -> bool {
        let own = self.verifiers.load();
        let own = own.iter().flat_map(|all| all.iter());
        login.still_admits(&self.login, self.peer)
            || own.into_iter().any(|verifier| login.still_admits_by(&self.login, verifier, self.peer))
    }

    /// What its login's verifier may be as far as the session knows; the last one, unless that could not be stored.
    pub fn verifiers(&self) -> Vec<SecretString> {
        let own = self.verifiers.load_full();
        own.map_or_else(|| vec![self.login.verifier.clone()], |own| own.to_vec())
    }

    /// The session changes its login's verifier, which was one of `before`.
    pub fn expect_verifier(&self, before: &[SecretString], verifier: &SecretString) {
        // Also those that were replaced: a node may have read the row before, and judge the session by it only now.
        let kept = before.iter().skip(before.len().saturating_sub(AT_ONCE as usize));
        let all = kept.chain([verifier]).cloned().collect();
        self.verifiers.store(Some(Arc::new(all)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_changes_its_password_some_times_at_once_and_then_at_a_pace() {
        let (pace, mut now) = (PasswordPace::default(), Instant::now());
        for _ in 0..AT_ONCE {
            assert_eq!(pace.begin(1, now), Ok(()));
        }
        assert_eq!(pace.begin(1, now), Err(INTERVAL));
        assert_eq!(pace.begin(2, now), Ok(()), "others have a pace of their own");
        now += INTERVAL / 4;
        assert_eq!(pace.begin(1, now), Err(INTERVAL * 3 / 4), "a refusal costs nothing");
        now += INTERVAL * 3 / 4;
        assert_eq!(pace.begin(1, now), Ok(()));
        assert_eq!(pace.begin(1, now), Err(INTERVAL));
        now += INTERVAL * AT_ONCE;
        for _ in 0..AT_ONCE {
            assert_eq!(pace.begin(1, now), Ok(()));
        }
        assert_eq!(pace.begin(1, now), Err(INTERVAL));
    }

    #[test]
    fn what_is_over_is_not_kept() {
        let (pace, mut now) = (PasswordPace::default(), Instant::now());
        for login in 0..10_000 {
            pace.begin(login, now).unwrap();
            now += INTERVAL;
        }
        assert!(pace.busy_until.lock().unwrap().len() < 100);
    }
}
