//! `tenant rotate`: gives a tenant's roles new passwords while its clients work.
//!
//! An open server survives a change of its role's password. A new server must not be opened between the
//! change on the host and the change in the row. So both changes are prepared in transactions and committed
//! one right after the other. A trigger increases the row's generation, and the nodes replace their pools.
//!
//! ```text
//! begun ──both prepared──▶ prepared ──host commits──▶ roles ──row commits──▶ stored ──both log in──▶ rotated
//!                                                                            └── they do not ──▶ undone
//! ```
//!
//! After a run that died the next one starts again; its passwords replace those left behind.

use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde_json::json;

use super::{
    adopt, enter_host, grants,
    names::{ident, literal, shell_word},
    operation::{Operation, Passwords, TenantLock},
    role_attributes::{self, Belongings},
    roles::{self, Roles},
};
use crate::{
    control_path::{
        admin::{
            actor::{Actor, AdminError},
            fields::{described, from_row},
            host_connection::{HostAdmin, HostSession},
            tenants::missing,
        },
        secrets::{scram_verifier::scram_verifier, seal::SecretLocation},
    },
    data_path::server::{IdentityTrouble, TroubleKind},
};

described! {
    /// The answer of `tenant rotate`.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct RotatedTenant {
        /// The tenant's name.
        pub name: String,
        /// Unchanged: `active` or `suspended`.
        pub status: String,
        /// Roles with new passwords.
        pub roles: Vec<String>,
    }
}

struct Before {
    id: i64,
    status: String,
    host: String,
    database: String,
    read_write: String,
    read_only: Option<String>,
    sealed: Option<Vec<u8>>,
    sealed_ro: Option<Vec<u8>>,
    generation: i64,
    adopted: bool,
    grants_pending: bool,
    role_given: bool,
}

/// Gives the tenant's roles new passwords, or leaves the old ones.
///
/// # Errors
/// [`AdminError`]; changes are undone, or the error says that they could not be.
pub async fn rotate(actor: &Actor, name: &str) -> Result<RotatedTenant, AdminError> {
    let rotated = rotate_if(actor, name, None).await;
    // Forbids a suspended tenant's roles to log in again.
    role_attributes::follow_status(actor, name).await;
    rotated?.ok_or_else(|| AdminError::Refused(format!("nothing was rotated for tenant {name:?}")))
}

/// The same as a repair, after a host refused the tenant's role or database. `false`: the tenant's
/// credentials are not of `generation` any more, it is closed, or nothing was changed.
pub async fn rotate_in_trouble(
    actor: &Actor,
    name: &str,
    generation: i64,
    trouble: &IdentityTrouble,
) -> Result<bool, AdminError> {
    Ok(rotate_if(actor, name, Some((generation, trouble))).await?.is_some())
}

async fn rotate_if(
    actor: &Actor,
    name: &str,
    trouble: Option<(i64, &IdentityTrouble)>,
) -> Result<Option<RotatedTenant>, AdminError> {
    let mut lock = TenantLock::take(actor, name).await?;
    if Operation::left(&lock, "move").await?.is_some() {
        Operation::refuse_unfinished(&lock).await?;
    }
    let before = load(actor, &lock).await?;
    if let Some((generation, _)) = trouble
        && (before.generation != generation || before.status != "active")
    {
        return Ok(None);
    }
    let admin = HostAdmin::load(actor, &lock.client, &before.host).await?;
    let (session, _) = enter_host(&admin, before.id).await?;
    for role in before.roles() {
        // A given role's password is changed where an operator asks, never as a repair.
        let asked = before.role_given && role == before.read_write && trouble.is_none();
        if !asked && !roles::ours(&session, role).await? {
            // Other settings are the owner's choice, as long as sessions can start.
            if trouble.is_some_and(|(_, trouble)| trouble.is_silent()) {
                return Ok(None);
            }
            let how = match before.role_given {
                true => format!("; `pglobby tenant rotate {}` gives it another", shell_word(name)),
                false => String::new(),
            };
            return Err(AdminError::Refused(format!(
                "role {role:?} on host {:?} was not made by pglobby (its comment says so), so its password is left alone{how}",
                before.host
            )));
        }
    }

    if let Some((_, trouble)) = trouble
        && trouble.kind != TroubleKind::Password
        && !before.belongings().are_changed(&session).await?
    {
        return Ok(None);
    }

    let operation = begin(actor, &mut lock, before.id).await?;
    let passwords = Passwords::generate();
    let done = async {
        change(actor, &mut lock, &operation, &session, &before, &passwords).await?;
        verify(&lock, &admin, &session, &before, &passwords).await?;
        finish(actor, &mut lock, &operation, &before, "done").await
    };
    match done.await {
        Ok(()) => {
            actor.report(name, "rotated").await;
            let roles = before.roles().map(str::to_owned).collect();
            Ok(Some(RotatedTenant { name: name.to_owned(), status: before.status, roles }))
        }
        Err(error) => Err(undo_after(actor, &mut lock, &operation, &admin, &before, error).await),
    }
}

impl Before {
    fn belongings(&self) -> Belongings<'_> {
        Belongings {
            database: &self.database,
            read_write: &self.read_write,
            read_only: self.read_only.as_deref(),
            role_given: self.role_given,
        }
    }

    fn roles(&self) -> impl Iterator<Item = &str> {
        [Some(self.read_write.as_str()), self.read_only.as_deref()].into_iter().flatten()
    }

    /// The present passwords; `None` if they do not open.
    fn passwords(&self, actor: &Actor) -> Option<Passwords> {
        let row = self.id.to_string();
        let open = |column, blob: &Option<Vec<u8>>| match blob {
            Some(blob) => {
                actor.keyring.open(&SecretLocation { table: "tenants", row: &row, column }, blob).ok()
            }
            None => None,
        };
        let read_write = open("sealed_password", &self.sealed)?;
        let read_only = match self.read_only {
            Some(_) => open("sealed_ro_password", &self.sealed_ro)?,
            None => SecretString::default(),
        };
        Some(Passwords { read_write, read_only })
    }
}

async fn load(actor: &Actor, lock: &TenantLock) -> Result<Before, AdminError> {
    let sql = "SELECT id, status, host, database, username AS read_write, ro_username AS read_only,
                      sealed_password AS sealed, sealed_ro_password AS sealed_ro, generation, adopted, grants_pending,
                      role_given
               FROM pglobby.tenants WHERE name = $1 AND status <> 'dropped'";
    let Some(row) = lock.client.query_opt(sql, &[&lock.name]).await? else {
        return Err(missing(actor, &lock.client, &lock.name).await);
    };
    let status: String = row.get("status");
    if !matches!(status.as_str(), "active" | "suspended") {
        return Err(AdminError::Refused(format!(
            "tenant {:?} is {status}; only one that is active or suspended has passwords to rotate",
            lock.name
        )));
    }
    Ok(from_row!(row => Before {
        id, status, host, database, read_write, read_only, sealed, sealed_ro, generation, adopted, grants_pending,
        role_given
    }))
}

/// Records the start. Closes an interrupted rotation, because this one repeats it.
async fn begin(actor: &Actor, lock: &mut TenantLock, id: i64) -> Result<Operation, AdminError> {
    let name = lock.name.clone();
    let transaction = lock.client.transaction().await?;
    Operation::supersede(&transaction, id, &["rotate"]).await?;
    let operation = Operation::begin(&transaction, actor, "rotate", id, json!({ "name": name })).await?;
    transaction.commit().await?;
    actor.report_begun(operation.id).await;
    actor.report(&name, "begun").await;
    Ok(operation)
}

async fn change(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
    session: &HostSession,
    before: &Before,
    passwords: &Passwords,
) -> Result<(), AdminError> {
    let name = lock.name.clone();
    let sealed = passwords.seal(actor, before.id)?;
    for statement in before.belongings().database_as_made(session).await? {
        session.run("putting the tenant's database right", &statement).await?;
    }
    let transaction = lock.client.transaction().await?;
    session
        .run("preparing the new passwords", &format!("BEGIN;\n{}", alter_roles(before, passwords)))
        .await?;
    let sealed_ro = before.read_only.as_ref().map(|_| &sealed.read_only);
    let stored = async {
        store(&transaction, before.id, Some(&sealed.read_write), sealed_ro).await?;
        let step = "UPDATE pglobby.operations SET step = 'stored', updated_at = now() WHERE id = $1";
        transaction.execute(step, &[&operation.id]).await?;
        Ok(())
    };
    if let Err(error) = stored.await {
        // Otherwise undoing would wait for the open transaction on the host.
        let _ = session.run("giving up the new passwords", "ROLLBACK").await;
        return Err(error);
    }
    actor.report(&name, "prepared").await;

    session.run("changing the passwords", "COMMIT").await?;
    actor.report(&name, "roles").await;
    transaction.commit().await?;
    actor.report(&name, "stored").await;
    Ok(())
}

/// The server gets verifiers instead of passwords, because statements may be logged. Other changes of the
/// roles are undone too: a setting or a limit could keep sessions out.
fn alter_roles(before: &Before, passwords: &Passwords) -> String {
    let alter = |(role, password): (&str, &SecretString)| {
        format!(
            "ALTER ROLE {} PASSWORD {};\n",
            ident(role),
            literal(scram_verifier(password).expose_secret())
        )
    };
    let passwords: String =
        before.roles().zip([&passwords.read_write, &passwords.read_only]).map(alter).collect();
    before.belongings().roles_as_made() + &passwords
}

async fn store(
    client: &impl tokio_postgres::GenericClient,
    id: i64,
    sealed: Option<&Vec<u8>>,
    sealed_ro: Option<&Vec<u8>>,
) -> Result<(), AdminError> {
    let sql = "UPDATE pglobby.tenants SET sealed_password = $2, sealed_ro_password = $3 WHERE id = $1";
    client.execute(sql, &[&id, &sealed, &sealed_ro]).await?;
    Ok(())
}

/// Logs in like a pool does, and restores the read-only role's privileges after DROP OWNED.
async fn verify(
    lock: &TenantLock,
    admin: &HostAdmin,
    session: &HostSession,
    before: &Before,
    passwords: &Passwords,
) -> Result<(), AdminError> {
    if !before.grants_pending && before.belongings().reader_has_lost(session).await? {
        let read_only = before.read_only.clone().unwrap_or_default();
        let roles = Roles { read_write: before.read_write.clone(), read_only };
        let inside = admin.connect_to(&before.database).await?;
        match before.adopted {
            true => adopt::grant(&lock.client, before.id, &inside, &roles).await?,
            false => grants::grant_inside(&inside, &roles).await?,
        }
    }
    for (role, password) in before.roles().zip([&passwords.read_write, &passwords.read_only]) {
        admin.prove_login(role, password, &before.database).await?;
    }
    Ok(())
}

async fn finish(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
    before: &Before,
    status: &str,
) -> Result<(), AdminError> {
    let name = lock.name.clone();
    let transaction = lock.client.transaction().await?;
    operation.close(&transaction, status, &name).await?;
    let action = if status == "done" { "tenant.rotate" } else { "tenant.rotate.undone" };
    let roles: Vec<&str> = before.roles().collect();
    let detail = json!({ "operation": operation.id, "roles": roles });
    actor.commit(transaction, action, Some(&name), &detail).await
}

/// Restores host and row over new connections; it does not matter which commit failed.
async fn undo_after(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
    admin: &HostAdmin,
    before: &Before,
    error: AdminError,
) -> AdminError {
    let undone = async {
        let old = before.passwords(actor).ok_or_else(|| {
            AdminError::Refused("the old passwords do not open with any key of the ring".to_owned())
        })?;
        let session = admin.connect().await?;
        session
            .run("restoring the old passwords", &format!("BEGIN;\n{}COMMIT", alter_roles(before, &old)))
            .await?;
        store(&lock.client, before.id, before.sealed.as_ref(), before.sealed_ro.as_ref()).await?;
        finish(actor, lock, operation, before, "undone").await
    };
    match undone.await {
        Ok(()) => {
            actor.report(&lock.name, "undone").await;
            AdminError::Refused(format!("{error}. The old passwords are in use again"))
        }
        Err(second) => AdminError::Refused(format!(
            "{error}. Going back to the old passwords failed as well ({second}); fix it and run `pglobby tenant rotate {}` \
             again, which makes new ones",
            shell_word(&lock.name)
        )),
    }
}
