//! The state that all clients share: configuration, directory, pools, sessions, connection limits.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use crate::{
    config::Config,
    data_path::{
        directory::{Directory, DirectoryError},
        login::{
            authentication::AuthContext,
            connection_limits::{ConnectionLimits, ConnectionPermit},
            failed_logins::FailedLogins,
            login_turns::LoginTurns,
            password_pace::PasswordPace,
            startup::StartupPacket,
            tenant_routing::{access_to, admit},
        },
        packed_session::MovingSession,
        pool::{Pool, SessionCount, TenantPools},
        sessions::{
            passed_on::PassedOn,
            registry::{SessionHandle, Sessions},
        },
        tenant::{Access, DirectoryChange, Login, Tenant, allowed_from},
        worker::Worker,
    },
    error::ClientError,
    metrics::Metrics,
    wire::{stream::Stream, tls::towards_clients::ClientTlsAcceptor},
};

/// An authenticated administrator.
#[derive(Debug)]
pub struct ConsoleClient {
    /// The connection, on the runtime that accepted it.
    pub stream: Stream,
    /// The startup packet; `unread` has the bytes received after it.
    pub packet: StartupPacket,
    pub login: Arc<Login>,
    /// May only SHOW.
    pub read_only: bool,
    /// Bytes for the first write.
    pub unsent: Vec<u8>,
    pub proxy: Arc<Proxy>,
    /// The client's permit.
    pub permit: ConnectionPermit,
}

/// The admin console; the control path implements it.
pub type Console = Arc<dyn Fn(ConsoleClient) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Passes on a cancel request that no session of this node has; the control path implements it. The receiver resolves,
/// with an error, when the cancel is complete as far as this node can know.
pub type ClusterCancel = Arc<dyn Fn(ForeignCancel) -> oneshot::Receiver<()> + Send + Sync>;

/// A cancel request for a session of another node.
#[derive(Clone, PartialEq, Eq)]
pub struct ForeignCancel {
    pub process_id: i32,
    pub secret: Vec<u8>,
    /// Another node has passed it on to this one, which it took for the session's.
    pub was_passed_on: bool,
}

/// What all clients share.
pub struct Proxy {
    /// Swapped by a reload.
    pub config: Arc<ArcSwap<Config>>,
    /// TLS towards clients; `None`: off.
    pub tls: ArcSwapOption<ClientTlsAcceptor>,
    pub directory: Arc<dyn Directory>,
    pub pools: Arc<TenantPools>,
    pub sessions: Arc<Sessions>,
    /// Threads.
    pub workers: Vec<Arc<Worker>>,
    pub console: Console,
    /// For cancel requests of other nodes' sessions.
    pub foreign_cancel: ClusterCancel,
    /// The way to the process that takes over, from when it accepts clients until no session is left to move.
    pub successor: Mutex<Option<mpsc::Sender<MovingSession>>>,
    pub connection_limits: Arc<ConnectionLimits>,
    /// The limit of logins at a time.
    pub login_turns: Arc<LoginTurns>,
    /// Recent failures of logins.
    pub failed_logins: FailedLogins,
    /// The limit of password changes.
    pub password_pace: PasswordPace,
    /// Counters of no pool.
    pub metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy").field("sessions", &self.sessions.len()).finish_non_exhaustive()
    }
}

impl Proxy {
    /// The shared state that a login needs.
    pub fn auth_context<'a>(&'a self, config: &'a Config) -> AuthContext<'a> {
        AuthContext {
            directory: &*self.directory,
            tenant_host_suffixes: &config.tenant_host_suffixes,
            maintenance_databases: &config.maintenance_databases,
            admin_allow_from: &config.admin_allow_from,
            failed_logins: &self.failed_logins,
            failed_login_rules: &config.limits.failed_logins,
            metrics: &self.metrics,
        }
    }

    /// Serves a cancel request, or passes it on to the node that has the session. Returns when the cancel is
    /// complete. An unknown key makes no difference. In session mode the process number is a server's
    /// and does not tell the node.
    pub async fn cancel(&self, process_id: i32, secret: &[u8]) {
        let Some((secret, passed_on)) = PassedOn::of(secret) else { return };
        // The session itself is not kept: if it ends first, its mailbox goes, and this resolves.
        let cancelled = self.sessions.find(process_id, secret).map(|session| session.cancel());
        let cancelled = match (cancelled, passed_on) {
            (Some(cancelled), _) => cancelled,
            (None, Some(PassedOn::ToAll)) => return,
            (None, _) if self.sessions.is_ours(process_id) => return,
            (None, passed_on) => {
                let was_passed_on = passed_on.is_some();
                (self.foreign_cancel)(ForeignCancel { process_id, secret: secret.to_vec(), was_passed_on })
            }
        };
        let _ = cancelled.await;
    }

    /// Applies a change in the central database to the pools and sessions that it affects. `false`: some of them could
    /// not be looked up, so that [`Self::confirm_all`] must be called when the central database answers.
    pub async fn apply(&self, change: DirectoryChange) -> bool {
        self.directory.forget(&change);
        // Before the sessions are visited: a login in progress is among them, or sees this count.
        self.connection_limits.changed();
        match change {
            DirectoryChange::Tenant(id) => self.tenant_changed(id).await,
            DirectoryChange::Login(id) => self.logins_changed(|session| session.login.id == id).await,
            // No session can use a name that is new.
            DirectoryChange::TenantName(_) | DirectoryChange::LoginName(_) => true,
            DirectoryChange::Host(name) => self.tenants_changed(|host| host == name).await,
            DirectoryChange::Everything => self.confirm_all().await,
        }
    }

    /// Compares all pools and sessions with the central database. Logins first, because they may have been revoked.
    /// `false`: some of them could not be looked up. A row that is there and invalid counts as looked up.
    pub async fn confirm_all(&self) -> bool {
        self.logins_changed(|_| true).await && self.tenants_changed(|_| true).await
    }

    async fn tenants_changed(&self, on_host: impl Fn(&str) -> bool) -> bool {
        let pools = self.pools.all().into_iter().filter(|pool| on_host(&pool.tenant.host.name));
        let mut ids: Vec<i64> = pools.map(|pool| pool.tenant.id).collect();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            if !self.tenant_changed(id).await {
                return false;
            }
        }
        true
    }

    async fn tenant_changed(&self, id: i64) -> bool {
        let tenant = match self.directory.confirmed_tenant(id).await {
            Ok(tenant) => tenant,
            // Sessions go on; the next notification or the reconnect repeats the change.
            Err(error) => {
                warn!(tenant = id, side = "central", %error, "cannot look up a changed tenant");
                return matches!(error, DirectoryError::Broken(_));
            }
        };
        let client_error = match &tenant {
            Some(tenant) => {
                self.pools.refresh(tenant).await;
                admit(tenant).err()
            }
            None => Some(ClientError::AdminShutdown),
        };
        if let Some(tenant) = &tenant {
            let reason = ClientError::Ended("the networks that may enter this tenant were changed".into());
            self.sessions
                .end(&reason, |session| session.is_at(id) && !allowed_from(&tenant.allow_from, session.peer));
        }
        let Some(client_error) = client_error else { return true };
        let reason = ClientError::Ended(client_error.to_string());
        if tenant.is_some_and(|tenant| tenant.drain) {
            for session in self.sessions.all().into_iter().filter(|session| session.is_at(id)) {
                session.end_when_free(reason.clone());
            }
        } else {
            self.sessions.end(&reason, |session| session.is_at(id));
        }
        true
    }

    async fn logins_changed(&self, concerns: impl Fn(&SessionHandle) -> bool) -> bool {
        for session in self.sessions.all().into_iter().filter(|session| concerns(session)) {
            match self.directory.confirmed_login(&session.login.name).await {
                Ok(login) => self.login_changed(&session, login),
                Err(DirectoryError::Broken(_)) => {}
                // The others would have to wait as long for no answer.
                Err(DirectoryError::Unavailable(_) | DirectoryError::NotInSnapshot(_)) => return false,
            }
        }
        true
    }

    fn login_changed(&self, session: &SessionHandle, login: Option<Arc<Login>>) {
        let stays = login.filter(|login| {
            let tenant_access = session.tenant_access();
            session.is_admitted_by(login)
                && tenant_access.is_none_or(|tenant_access| {
                    access_to(&login.kind, tenant_access.tenant.id) == Some(tenant_access.access)
                })
        });
        match stays {
            Some(login) => self.sessions.set_valid_until(session, login.valid_until),
            None => session.end(ClientError::Ended("the login was changed".into())),
        }
    }

    /// Applies the changes that a session missed between the look-up of its login and its registration.
    pub async fn look_again_at(&self, session: &SessionHandle) {
        if let Ok(login) = self.directory.login(&session.login.name).await {
            self.login_changed(session, login);
        }
        let Some(tenant_access) = session.tenant_access() else { return };
        if let Ok(tenant) = self.directory.tenant_by_id(tenant_access.tenant.id).await
            && let Some(client_error) =
                tenant.map_or(Some(ClientError::AdminShutdown), |tenant| admit(&tenant).err())
        {
            session.end(ClientError::Ended(client_error.to_string()));
        }
    }

    /// Enters the tenant's pool. The session counts there until the returned guard is dropped. Errors:
    /// [`ClientError::TooManyClientsOfTenant`], or the pool cannot be made.
    pub(in crate::data_path) async fn enter_pool(
        &self,
        tenant: &Arc<Tenant>,
        access: Access,
    ) -> Result<(Arc<Pool>, SessionCount), ClientError> {
        let pool = self.pools.of(tenant, access).await?;
        let limit = match tenant.max_clients {
            Some(limit) => limit as usize,
            None => self.config.load().limits.max_db_client_connections,
        };
        match pool.stats.enter(limit) {
            Some(present) => Ok((pool, present)),
            None => Err(ClientError::TooManyClientsOfTenant { tenant: tenant.name.clone() }),
        }
    }
}
