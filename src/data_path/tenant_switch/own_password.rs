//! A session changes the password of its own login: `ALTER ROLE CURRENT_USER PASSWORD '…'`, psql's `\password`.
//!
//! The servers' roles are shared by all logins of a tenant, so it is the login's verifier in the central database that
//! changes. Other sessions of that login end, as they do when an operator sets its password; this one stays.

use std::time::Instant;

use tracing::{info, warn};

use super::switcher::TenantSwitcher;
use crate::{
    data_path::{
        exchange::ClientSide, login::scram_proof::Verifier, session_state::identity::NewPassword,
        sessions::registry::Registered,
    },
    error::{ClientError, IdentityError},
};

impl TenantSwitcher {
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
            Ok(()) => self.responder.chosen(None, replies),
            Err(client_error) => self.responder.refuse(&client_error, side, replies),
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
