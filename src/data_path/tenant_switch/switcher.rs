//! What a service login's session has chosen, and who may go where: the one place beside the login where the directory is
//! asked. A query never waits for it; a choice may, once for each tenant and login, until their rows change. A change of
//! one's own password waits as well, and any session has a concierge for as long as it makes one.

use std::sync::Arc;

use tracing::{info, warn};

use super::{TenantRequest, local_answers::LocalResponder};
use crate::{
    config::PoolMode,
    data_path::{
        exchange::{ClientSide, return_to_tenant::CurrentTenant},
        login::tenant_routing::{access_to, admit},
        pool::{Pool, PoolRules, Present},
        proxy::Proxy,
        session_state::{identity::NewPassword, parameter_status::ReportedParameters},
        sessions::registry::Registered,
        tenant::{Access, Tenant, allowed_from},
    },
    error::{ClientError, TenantSwitchError},
};

/// What a service login's session has chosen.
#[derive(Debug)]
pub struct TenantSwitcher {
    /// Answers while no server is held.
    pub responder: LocalResponder,
    pub(in crate::data_path) proxy: Arc<Proxy>,
    /// The tenant that the session began with, by id: RESET leads there.
    pub(in crate::data_path) first: Option<i64>,
    /// The tenant that it has chosen for longer than a transaction.
    chosen: Option<i64>,
    /// It is somewhere else for one transaction.
    for_transaction: bool,
    /// RESET ALL or DISCARD ALL has been run: it goes back to where it began.
    resetting: bool,
    /// Why what is in the inbox waits for the replies to what came before.
    pub(in crate::data_path) wait: SwitchWait,
    /// A choice that is yet to be decided on.
    pub(in crate::data_path) request: Option<TenantRequest>,
    /// A password that is yet to be set.
    pub(in crate::data_path) password: Option<NewPassword>,
    /// It has not held a server of this tenant yet.
    pub(in crate::data_path) is_new: bool,
}

/// Where a session is.
#[derive(Debug)]
pub enum SwitchTarget {
    /// In a tenant's pool, and counted there.
    Tenant(Arc<Pool>, Present),
    /// Nowhere: no tenant is chosen.
    NoTenant,
}

impl SwitchTarget {
    /// A session's statements become those of the pool that it goes to.
    pub(in crate::data_path) fn receive(&self, side: &mut ClientSide) {
        match self {
            Self::Tenant(pool, _) => {
                let follow = pool.rules.mode == PoolMode::Transaction;
                let (statements, functions) = (pool.statements.clone(), pool.functions.clone());
                let memory = pool.account(side.rules().memory.max());
                side.move_to(Some(pool.place.clone()), statements, functions, memory, follow);
            }
            // What the session has counts where it was, until it chooses another tenant.
            Self::NoTenant => {
                side.move_to(None, Arc::default(), Arc::default(), side.rules().memory.clone(), true);
            }
        }
    }
}

/// The name of the tenant where a choice has led.
pub(in crate::data_path) fn target_name<'a>(
    target: Option<&'a SwitchTarget>,
    here: Option<&'a str>,
) -> Option<&'a str> {
    match target {
        Some(SwitchTarget::Tenant(pool, _)) => Some(&pool.tenant.name),
        Some(SwitchTarget::NoTenant) => None,
        None => here,
    }
}

/// Why nothing more is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data_path) enum SwitchWait {
    No,
    /// At the front of the inbox is a choice.
    Choice,
    /// It may be meant for another tenant.
    Pause,
}

impl TenantSwitcher {
    /// Of a session that begins at a tenant, or at none, and is `told` these parameters.
    pub fn new(proxy: Arc<Proxy>, first: Option<i64>, told: Arc<ReportedParameters>) -> Box<Self> {
        let desk = LocalResponder::new(told);
        Box::new(Self {
            responder: desk,
            proxy,
            first,
            chosen: first,
            for_transaction: false,
            resetting: false,
            wait: SwitchWait::No,
            request: None,
            password: None,
            is_new: false,
        })
    }

    /// Nothing waits for it, and nothing was said to it that no server knows.
    pub fn is_idle(&self) -> bool {
        self.wait == SwitchWait::No
            && self.request.is_none()
            && self.password.is_none()
            && !self.is_to_leave()
            && self.responder.is_clear()
    }

    /// The session is new to its tenant's servers: see [`Relay::settle_in`].
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// It goes on in another room.
    pub fn arrive(&mut self) {
        (self.wait, self.is_new) = (SwitchWait::No, true);
    }

    /// How the session stands to the tenant it is in.
    pub fn stance(&self) -> CurrentTenant {
        match () {
            () if self.for_transaction => CurrentTenant::ForTransaction,
            () if self.chosen == self.first => CurrentTenant::First,
            () => CurrentTenant::Chosen,
        }
    }

    /// RESET ALL or DISCARD ALL has been run.
    pub fn reset(&mut self) {
        self.resetting = true;
    }

    /// Whether the session must leave its tenant now that no transaction is open.
    pub fn is_to_leave(&self) -> bool {
        self.resetting || self.for_transaction && !self.responder.has_begun()
    }

    /// The tenant that a wish names, if this login may go there. A tenant that does not exist, one that is not granted and
    /// one that is closed to the client's address get the same words.
    async fn resolve(
        &self,
        handle: &Registered,
        goal: TenantRef<'_>,
    ) -> Result<(Arc<Tenant>, Access), ClientError> {
        let directory = &self.proxy.directory;
        let unavailable = |error| {
            warn!(login = handle.login.name, side = "central", %error, "cannot look up a chosen tenant");
            ClientError::DirectoryUnavailable
        };
        let login = directory.login(&handle.login.name).await.map_err(unavailable)?;
        let tenant = match goal {
            TenantRef::Name(name) => directory.tenant(name).await,
            TenantRef::Id(id) => directory.tenant_by_id(id).await,
        };
        let tenant = tenant.map_err(unavailable)?;
        let login = login.filter(|login| handle.is_admitted_by(login));
        let place = login.zip(tenant).and_then(|(login, tenant)| {
            let access = access_to(&login.kind, tenant.id)?;
            allowed_from(&tenant.allow_from, handle.peer).then_some((tenant, access))
        });
        let denied = match goal {
            TenantRef::Name(name) => name.to_owned(),
            TenantRef::Id(_) => String::new(),
        };
        let (tenant, access) = place.ok_or(ClientError::TenantDenied { tenant: denied })?;
        admit(&tenant)?;
        Ok((tenant, access))
    }

    /// Takes a place among the sessions of a tenant. Whoever closes the tenant meanwhile either finds the session there, or
    /// is found by it.
    async fn enter(
        &self,
        handle: &Registered,
        tenant: Arc<Tenant>,
        access: Access,
    ) -> Result<SwitchTarget, ClientError> {
        let (pool, present) = self.proxy.enter_pool(&tenant, access).await?;
        let before = handle.place();
        handle.enter(Some(pool.place.clone()));
        match self.resolve(handle, TenantRef::Id(tenant.id)).await {
            Ok((_, still)) if still == access => Ok(SwitchTarget::Tenant(pool, present)),
            other => {
                handle.enter(before);
                Err(other.err().unwrap_or(ClientError::TenantDenied { tenant: tenant.name.clone() }))
            }
        }
    }

    /// Where a wish leads from `here`; `None`: the session is there already.
    pub async fn follow(
        &mut self,
        request: &TenantRequest,
        handle: &Registered,
        here: Option<(i64, Access)>,
    ) -> Result<Option<SwitchTarget>, ClientError> {
        let goal = match (&request.tenant, self.first) {
            (Some(name), _) => TenantRef::Name(name),
            (None, Some(first)) => TenantRef::Id(first),
            (None, None) => {
                self.note(request, None);
                return Ok(here.map(|_| SwitchTarget::NoTenant));
            }
        };
        let (tenant, access) = self.resolve(handle, goal).await?;
        let id = tenant.id;
        // There nothing is read, so that nobody would see the end of the transaction.
        if request.local && PoolRules::of(&tenant, &self.proxy.config.load()).mode == PoolMode::Session {
            return Err(TenantSwitchError::SessionMode.into());
        }
        if here == Some((id, access)) {
            self.note(request, Some(id));
            return Ok(None);
        }
        let target = self.enter(handle, tenant, access).await?;
        self.note(request, Some(id));
        Ok(Some(target))
    }

    fn note(&mut self, request: &TenantRequest, tenant: Option<i64>) {
        if request.local {
            self.for_transaction = true;
        } else {
            (self.chosen, self.for_transaction) = (tenant, false);
        }
    }

    /// Where a session belongs whose transaction, or whose user, is gone; `None`: it is there already. Where it may not go
    /// any more, it is nowhere.
    pub async fn back(&mut self, handle: &Registered, here: (i64, Access)) -> Option<SwitchTarget> {
        if std::mem::take(&mut self.resetting) {
            self.chosen = self.first;
        }
        self.for_transaction = false;
        let Some(id) = self.chosen else { return Some(SwitchTarget::NoTenant) };
        let gone = match self.resolve(handle, TenantRef::Id(id)).await {
            Ok((tenant, access)) if here == (tenant.id, access) => return None,
            Ok((tenant, access)) => match self.enter(handle, tenant, access).await {
                Ok(target) => return Some(target),
                Err(client_error) => client_error,
            },
            Err(client_error) => client_error,
        };
        info!(login = handle.login.name, tenant = id, reason = %gone, "a session cannot go back to its tenant");
        self.chosen = None;
        Some(SwitchTarget::NoTenant)
    }
}

/// A tenant, as it is asked for.
#[derive(Debug, Clone, Copy)]
enum TenantRef<'a> {
    Name(&'a str),
    Id(i64),
}
