//! What a service login's session has chosen, and who may go where: the one place beside the login where the directory is
//! asked. A query never waits for it; a choice may, once for each tenant and login, until their rows change. A change of
//! one's own password waits as well, and any session has a concierge for as long as it makes one.

use std::sync::Arc;

use tracing::{info, warn};

use super::{Wish, local_answers::Desk};
use crate::{
    config::PoolMode,
    data_path::{
        exchange::{ClientSide, return_to_tenant::Stance},
        login::tenant_routing::{access_to, admit},
        pool::{Pool, PoolRules, Present},
        proxy::Proxy,
        session_state::{identity::NewPassword, parameter_status::Reported},
        sessions::registry::Registered,
        tenant::{Access, Tenant, allowed_from},
    },
    error::{ClientError, TenantSwitchError},
};

/// What a service login's session has chosen.
#[derive(Debug)]
pub struct Concierge {
    /// Answers while no server is held.
    pub desk: Desk,
    pub(in crate::data_path) proxy: Arc<Proxy>,
    /// The tenant that the session began with, by id: RESET leads there.
    pub(in crate::data_path) first: Option<i64>,
    /// The tenant that it has chosen for longer than a transaction.
    chosen: Option<i64>,
    /// It is somewhere else for one transaction.
    visiting: bool,
    /// RESET ALL or DISCARD ALL has been run: it goes back to where it began.
    resetting: bool,
    /// Why what is in the inbox waits for the replies to what came before.
    pub(in crate::data_path) waits: Waits,
    /// A choice that is yet to be decided on.
    pub(in crate::data_path) wish: Option<Wish>,
    /// A password that is yet to be set.
    pub(in crate::data_path) password: Option<NewPassword>,
    /// It has not held a server of this tenant yet.
    pub(in crate::data_path) is_new: bool,
}

/// Where a session is.
#[derive(Debug)]
pub enum Room {
    /// In a tenant's pool, and counted there.
    Tenant(Arc<Pool>, Present),
    /// Nowhere: no tenant is chosen.
    Lobby,
}

impl Room {
    /// A session's statements become those of the pool that it goes to.
    pub(in crate::data_path) fn receive(&self, side: &mut ClientSide) {
        match self {
            Self::Tenant(pool, _) => {
                let follow = pool.rules.mode == PoolMode::Transaction;
                let (statements, catalogue) = (pool.statements.clone(), pool.catalogue.clone());
                let memory = pool.account(side.rules().memory.max());
                side.move_to(Some(pool.place.clone()), statements, catalogue, memory, follow);
            }
            // What the session has counts where it was, until it chooses another tenant.
            Self::Lobby => {
                side.move_to(None, Arc::default(), Arc::default(), side.rules().memory.clone(), true);
            }
        }
    }
}

/// The name of the tenant where a choice has led.
pub(in crate::data_path) fn room_name<'a>(room: Option<&'a Room>, here: Option<&'a str>) -> Option<&'a str> {
    match room {
        Some(Room::Tenant(pool, _)) => Some(&pool.tenant.name),
        Some(Room::Lobby) => None,
        None => here,
    }
}

/// Why nothing more is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data_path) enum Waits {
    No,
    /// At the front of the inbox is a choice.
    Choice,
    /// It may be meant for another tenant.
    Pause,
}

impl Concierge {
    /// Of a session that begins at a tenant, or at none, and is `told` these parameters.
    pub fn new(proxy: Arc<Proxy>, first: Option<i64>, told: Arc<Reported>) -> Box<Self> {
        let desk = Desk::new(told);
        Box::new(Self {
            desk,
            proxy,
            first,
            chosen: first,
            visiting: false,
            resetting: false,
            waits: Waits::No,
            wish: None,
            password: None,
            is_new: false,
        })
    }

    /// Nothing waits for it, and nothing was said to it that no server knows.
    pub fn is_idle(&self) -> bool {
        self.waits == Waits::No
            && self.wish.is_none()
            && self.password.is_none()
            && !self.is_to_leave()
            && self.desk.is_clear()
    }

    /// The session is new to its tenant's servers: see [`Relay::settle_in`].
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// It goes on in another room.
    pub fn arrive(&mut self) {
        (self.waits, self.is_new) = (Waits::No, true);
    }

    /// How the session stands to the tenant it is in.
    pub fn stance(&self) -> Stance {
        match () {
            () if self.visiting => Stance::Visiting,
            () if self.chosen == self.first => Stance::AtHome,
            () => Stance::Away,
        }
    }

    /// RESET ALL or DISCARD ALL has been run.
    pub fn reset(&mut self) {
        self.resetting = true;
    }

    /// Whether the session must leave its tenant now that no transaction is open.
    pub fn is_to_leave(&self) -> bool {
        self.resetting || self.visiting && !self.desk.has_begun()
    }

    /// The tenant that a wish names, if this login may go there. A tenant that does not exist, one that is not granted and
    /// one that is closed to the client's address get the same words.
    async fn resolve(
        &self,
        handle: &Registered,
        goal: Goal<'_>,
    ) -> Result<(Arc<Tenant>, Access), ClientError> {
        let directory = &self.proxy.directory;
        let unavailable = |error| {
            warn!(login = handle.login.name, side = "central", %error, "cannot look up a chosen tenant");
            ClientError::DirectoryUnavailable
        };
        let login = directory.login(&handle.login.name).await.map_err(unavailable)?;
        let tenant = match goal {
            Goal::Name(name) => directory.tenant(name).await,
            Goal::Id(id) => directory.tenant_by_id(id).await,
        };
        let tenant = tenant.map_err(unavailable)?;
        let login = login.filter(|login| handle.is_admitted_by(login));
        let place = login.zip(tenant).and_then(|(login, tenant)| {
            let access = access_to(&login.kind, tenant.id)?;
            allowed_from(&tenant.allow_from, handle.peer).then_some((tenant, access))
        });
        let denied = match goal {
            Goal::Name(name) => name.to_owned(),
            Goal::Id(_) => String::new(),
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
    ) -> Result<Room, ClientError> {
        let (pool, present) = self.proxy.enter_pool(&tenant, access).await?;
        let before = handle.place();
        handle.enter(Some(pool.place.clone()));
        match self.resolve(handle, Goal::Id(tenant.id)).await {
            Ok((_, still)) if still == access => Ok(Room::Tenant(pool, present)),
            other => {
                handle.enter(before);
                Err(other.err().unwrap_or(ClientError::TenantDenied { tenant: tenant.name.clone() }))
            }
        }
    }

    /// Where a wish leads from `here`; `None`: the session is there already.
    pub async fn follow(
        &mut self,
        wish: &Wish,
        handle: &Registered,
        here: Option<(i64, Access)>,
    ) -> Result<Option<Room>, ClientError> {
        let goal = match (&wish.tenant, self.first) {
            (Some(name), _) => Goal::Name(name),
            (None, Some(first)) => Goal::Id(first),
            (None, None) => {
                self.note(wish, None);
                return Ok(here.map(|_| Room::Lobby));
            }
        };
        let (tenant, access) = self.resolve(handle, goal).await?;
        let id = tenant.id;
        // There nothing is read, so that nobody would see the end of the transaction.
        if wish.local && PoolRules::of(&tenant, &self.proxy.config.load()).mode == PoolMode::Session {
            return Err(TenantSwitchError::SessionMode.into());
        }
        if here == Some((id, access)) {
            self.note(wish, Some(id));
            return Ok(None);
        }
        let room = self.enter(handle, tenant, access).await?;
        self.note(wish, Some(id));
        Ok(Some(room))
    }

    fn note(&mut self, wish: &Wish, tenant: Option<i64>) {
        if wish.local {
            self.visiting = true;
        } else {
            (self.chosen, self.visiting) = (tenant, false);
        }
    }

    /// Where a session belongs whose transaction, or whose user, is gone; `None`: it is there already. Where it may not go
    /// any more, it is nowhere.
    pub async fn back(&mut self, handle: &Registered, here: (i64, Access)) -> Option<Room> {
        if std::mem::take(&mut self.resetting) {
            self.chosen = self.first;
        }
        self.visiting = false;
        let Some(id) = self.chosen else { return Some(Room::Lobby) };
        let gone = match self.resolve(handle, Goal::Id(id)).await {
            Ok((tenant, access)) if here == (tenant.id, access) => return None,
            Ok((tenant, access)) => match self.enter(handle, tenant, access).await {
                Ok(room) => return Some(room),
                Err(refusal) => refusal,
            },
            Err(refusal) => refusal,
        };
        info!(login = handle.login.name, tenant = id, reason = %gone, "a session cannot go back to its tenant");
        self.chosen = None;
        Some(Room::Lobby)
    }
}

/// A tenant, as it is asked for.
#[derive(Debug, Clone, Copy)]
enum Goal<'a> {
    Name(&'a str),
    Id(i64),
}
