//! Changes the tenant of a service login's session. Beside the login, only this asks the directory: a choice
//! of tenant may wait for it, once for each tenant and login until their rows change. A query never waits. A
//! session that changes its own password has a switcher meanwhile.

use std::sync::Arc;

use tracing::{info, warn};

use super::{TenantRequest, local_answers::LocalResponder};
use crate::{
    config::PoolMode,
    data_path::{
        exchange::{ClientSide, return_to_tenant::CurrentTenant},
        login::tenant_routing::{access_to, admit},
        packed_session::PackedSwitcher,
        pool::{Pool, PoolRules, SessionCount},
        proxy::Proxy,
        session_state::{identity::NewPassword, parameter_status::ReportedParameters},
        sessions::registry::Registered,
        tenant::{Access, Tenant, allowed_from},
    },
    error::{ClientError, TenantSwitchError},
};

/// The state of a session that may change its tenant.
#[derive(Debug)]
pub struct TenantSwitcher {
    /// Answers while no server is held.
    pub responder: LocalResponder,
    pub(in crate::data_path) proxy: Arc<Proxy>,
    /// The id of the session's first tenant; RESET returns to it.
    pub(in crate::data_path) first: Option<i64>,
    /// The tenant chosen for longer than a transaction.
    chosen: Option<i64>,
    /// The session is at another tenant for one transaction.
    for_transaction: bool,
    /// RESET ALL or DISCARD ALL was run: the session returns to its first tenant.
    pub resetting: bool,
    /// Why the messages in the inbox wait for the replies to earlier ones.
    pub(in crate::data_path) wait: SwitchWait,
    /// A request that waits for its decision.
    pub(in crate::data_path) request: Option<TenantRequest>,
    /// A password that has to be set.
    pub(in crate::data_path) password: Option<NewPassword>,
    /// The session has not held a server of this tenant yet.
    pub(in crate::data_path) is_new: bool,
}

/// Where a session goes.
#[derive(Debug)]
pub enum SwitchTarget {
    /// To a tenant's pool, where it is counted.
    Tenant(Arc<Pool>, SessionCount),
    NoTenant,
}

impl SwitchTarget {
    /// Moves the client's side to the target's pool, with its prepared statements.
    pub(in crate::data_path) fn receive(&self, side: &mut ClientSide) {
        match self {
            Self::Tenant(pool, _) => {
                let follow = pool.rules.mode == PoolMode::Transaction;
                let (statements, functions) = (pool.statements.clone(), pool.functions.clone());
                let memory = pool.account(side.rules().memory.max());
                side.move_to(Some(pool.tenant_access.clone()), statements, functions, memory, follow);
            }
            // The memory stays charged to the last tenant until the session chooses another.
            Self::NoTenant => {
                side.move_to(None, Arc::default(), Arc::default(), side.rules().memory.clone(), true);
            }
        }
    }
}

/// The name of the tenant after a choice; `None`: no tenant.
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

/// Why no more messages are forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data_path) enum SwitchWait {
    No,
    /// A choice is at the front of the inbox.
    Choice,
    /// The messages may be meant for another tenant.
    Pause,
}

impl TenantSwitcher {
    /// For a session that begins at the tenant `first`, or at none, and was sent the parameters `reported`.
    pub fn new(proxy: Arc<Proxy>, first: Option<i64>, reported: Arc<ReportedParameters>) -> Box<Self> {
        let responder = LocalResponder::new(reported);
        Box::new(Self {
            responder,
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

    /// For another process. `None`: something waits for it.
    pub fn pack(&self) -> Option<PackedSwitcher> {
        self.is_idle().then(|| PackedSwitcher {
            first: self.first,
            chosen: self.chosen,
            is_new: self.is_new,
            first_reported: self.responder.first_reported().pack(),
        })
    }

    /// Of a session that has come from another process.
    pub fn unpack(packed: PackedSwitcher, proxy: Arc<Proxy>) -> Box<Self> {
        let mut switcher = Self::new(proxy, packed.first, ReportedParameters::unpack(&packed.first_reported));
        (switcher.chosen, switcher.is_new) = (packed.chosen, packed.is_new);
        switcher
    }

    /// Whether nothing waits for it and nothing has begun that a server does not know.
    pub fn is_idle(&self) -> bool {
        self.wait == SwitchWait::No
            && self.request.is_none()
            && self.password.is_none()
            && !self.is_to_leave()
            && self.responder.is_clear()
    }

    /// The session has moved to another tenant.
    pub fn tenant_entered(&mut self) {
        (self.wait, self.is_new) = (SwitchWait::No, true);
    }

    /// Why the session is at its present tenant.
    pub fn current_tenant(&self) -> CurrentTenant {
        match () {
            () if self.for_transaction => CurrentTenant::ForTransaction,
            () if self.chosen == self.first => CurrentTenant::First,
            () => CurrentTenant::Chosen,
        }
    }

    /// Whether the session must leave its tenant now that no transaction is open.
    pub fn is_to_leave(&self) -> bool {
        self.resetting || self.for_transaction && !self.responder.has_begun()
    }

    /// Returns the requested tenant if the login has access to it. The error is the same for an unknown
    /// tenant, for one without access, and for one that does not allow the client's address.
    async fn resolve(
        &self,
        handle: &Registered,
        requested: TenantRef<'_>,
    ) -> Result<(Arc<Tenant>, Access), ClientError> {
        let directory = &self.proxy.directory;
        let unavailable = |error| {
            warn!(
                tenant = handle.tenant_name(), login = handle.login.name, connection = handle.process_id,
                side = "central", %error, "cannot look up a chosen tenant"
            );
            ClientError::DirectoryUnavailable
        };
        let login = directory.login(&handle.login.name).await.map_err(unavailable)?;
        let tenant = match requested {
            TenantRef::Name(name) => directory.tenant(name).await,
            TenantRef::Id(id) => directory.tenant_by_id(id).await,
        };
        let tenant = tenant.map_err(unavailable)?;
        let login = login.filter(|login| handle.is_admitted_by(login));
        let tenant_access = login.zip(tenant).and_then(|(login, tenant)| {
            let access = access_to(&login.kind, tenant.id)?;
            allowed_from(&tenant.allow_from, handle.peer).then_some((tenant, access))
        });
        let name = match requested {
            TenantRef::Name(name) => name.to_owned(),
            TenantRef::Id(_) => String::new(),
        };
        let (tenant, access) = tenant_access.ok_or(ClientError::TenantDenied { tenant: name })?;
        admit(&tenant)?;
        Ok((tenant, access))
    }

    /// Enters a tenant's pool. The session is registered there before the second look-up, so that a tenant
    /// that is closed meanwhile is noticed by one of the two.
    async fn enter(
        &self,
        handle: &Registered,
        tenant: Arc<Tenant>,
        access: Access,
    ) -> Result<SwitchTarget, ClientError> {
        let (pool, present) = self.proxy.enter_pool(&tenant, access).await?;
        let before = handle.tenant_access();
        handle.enter(Some(pool.tenant_access.clone()));
        match self.resolve(handle, TenantRef::Id(tenant.id)).await {
            Ok((_, still)) if still == access => Ok(SwitchTarget::Tenant(pool, present)),
            other => {
                handle.enter(before);
                Err(other.err().unwrap_or(ClientError::TenantDenied { tenant: tenant.name.clone() }))
            }
        }
    }

    /// Returns where a request leads from `here`; `None`: the session stays.
    pub async fn follow(
        &mut self,
        request: &TenantRequest,
        handle: &Registered,
        here: Option<(i64, Access)>,
    ) -> Result<Option<SwitchTarget>, ClientError> {
        let requested = match (&request.tenant, self.first) {
            (Some(name), _) => TenantRef::Name(name),
            (None, Some(first)) => TenantRef::Id(first),
            (None, None) => {
                self.set_chosen(request, None);
                return Ok(here.map(|_| SwitchTarget::NoTenant));
            }
        };
        let (tenant, access) = self.resolve(handle, requested).await?;
        let id = tenant.id;
        // In session mode the texts are not read: the end of the transaction would not be seen.
        if request.local && PoolRules::of(&tenant, &self.proxy.config.load()).mode == PoolMode::Session {
            return Err(TenantSwitchError::SessionMode.into());
        }
        if here == Some((id, access)) {
            self.set_chosen(request, Some(id));
            return Ok(None);
        }
        let target = self.enter(handle, tenant, access).await?;
        self.set_chosen(request, Some(id));
        Ok(Some(target))
    }

    /// Answers a request that leads to `found` from the tenant `here`. Returns where the session goes.
    pub fn answer(
        &mut self,
        found: Result<Option<SwitchTarget>, ClientError>,
        here: Option<&str>,
        side: &mut ClientSide,
        replies: &mut Vec<u8>,
    ) -> Option<SwitchTarget> {
        match found {
            Ok(target) => {
                self.responder.chosen(target_name(target.as_ref(), here), replies);
                target
            }
            Err(client_error) => {
                self.responder.refuse(&client_error, side, replies);
                None
            }
        }
    }

    fn set_chosen(&mut self, request: &TenantRequest, tenant: Option<i64>) {
        if request.local {
            self.for_transaction = true;
        } else {
            (self.chosen, self.for_transaction) = (tenant, false);
        }
    }

    /// Returns where the session goes after its transaction or a reset; `None`: it stays. It has no tenant if
    /// it lost access to the one it chose.
    pub async fn back(&mut self, handle: &Registered, here: (i64, Access)) -> Option<SwitchTarget> {
        if std::mem::take(&mut self.resetting) {
            self.chosen = self.first;
        }
        self.for_transaction = false;
        let Some(id) = self.chosen else { return Some(SwitchTarget::NoTenant) };
        let refused = match self.resolve(handle, TenantRef::Id(id)).await {
            Ok((tenant, access)) if here == (tenant.id, access) => return None,
            Ok((tenant, access)) => match self.enter(handle, tenant, access).await {
                Ok(target) => return Some(target),
                Err(client_error) => client_error,
            },
            Err(client_error) => client_error,
        };
        info!(
            tenant = handle.tenant_name(), login = handle.login.name, connection = handle.process_id,
            returns_to = id, reason = %refused, "session cannot return to its tenant"
        );
        self.chosen = None;
        Some(SwitchTarget::NoTenant)
    }
}

#[derive(Debug, Clone, Copy)]
enum TenantRef<'a> {
    Name(&'a str),
    Id(i64),
}
