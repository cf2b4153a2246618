//! A session changes the password of its own login: `ALTER ROLE CURRENT_USER PASSWORD '…'`, psql's
//! `\password`.
//!
//! All logins of a tenant share the servers' roles, so the login's verifier in the central database changes.
//! Other sessions of the login end, as when an operator sets its password; this session stays.

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
    /// Sets the password of the session's login and answers. Only this and a choice of tenant let a statement
    /// wait for the central database.
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
        // Before it is stored, because the notification of the change may arrive before the answer.
        handle.expect_verifier(&before, &verifier);
        match directory.set_verifier(&handle.login, &before, &verifier).await {
            Ok(true) => {
                info!(
                    tenant = handle.tenant_name(),
                    login = handle.login.name,
                    connection = handle.process_id,
                    "login changed its own password"
                );
                Ok(())
            }
            Ok(false) => {
                info!(
                    tenant = handle.tenant_name(),
                    login = handle.login.name,
                    connection = handle.process_id,
                    "password not changed: the login was changed after the session began"
                );
                Err(IdentityError::LoginChanged.into())
            }
            // The verifier may have been stored nevertheless, so the session accepts both.
            Err(error) => {
                warn!(
                    tenant = handle.tenant_name(), login = handle.login.name, connection = handle.process_id,
                    side = "central", %error, "cannot change a login's password"
                );
                Err(ClientError::PasswordNotStored)
            }
        }
    }
}
