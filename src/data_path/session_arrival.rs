//! The arrival of a session from the process before (`relay/move_to_successor.rs`): everything that it may do is looked
//! up again, as at its login.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::oneshot;
use tracing::info;

use crate::{
    config::PoolMode,
    data_path::{
        exchange::{ClientSide, SessionRules},
        login::{
            connection_limits::{ClientAddress, ConnectionPermit},
            tenant_routing::{access_to, admit},
        },
        packed_session::{PackedListening, PackedSession, PackedTenant, SessionV1},
        pool::{Pool, SessionCount},
        prepared::row_description::RowDescription,
        proxy::Proxy,
        relay::{
            Relay,
            change_worker::{Arrival, serve},
            client_session::{ClientSession, Traffic},
        },
        session_start::{apply_missed_changes, rules_at, rules_without_tenant},
        sessions::registry::{NewSession, Registered, Sessions},
        tenant::{Access, Login, allowed_from, verifier_digest},
        tenant_switch::switcher::TenantSwitcher,
        worker::Worker,
    },
    error::ClientError,
    wire::stream::Stream,
};

/// A session that is ready to go on.
pub struct ArrivedSession {
    arrival: Arrival,
    permit: ConnectionPermit,
    /// Of a session without a tenant.
    worker: Arc<Worker>,
    listens: bool,
}

impl ArrivedSession {
    /// Whether the process before has notifications for it.
    pub fn listens(&self) -> bool {
        self.listens
    }

    /// What the process before has got for it. `None`: some are lost, and the session ends.
    pub fn add_notifications(&mut self, notifications: Option<&[u8]>) {
        let Arrival::Pool(relay, _) = &mut self.arrival else { return };
        match notifications {
            Some(notifications) => relay.session.unsent.push(notifications),
            None => relay.session.handle.end(ClientError::ListenerLost),
        }
    }

    /// Serves the session on its worker.
    pub async fn serve(self) {
        let Self { arrival, permit, worker, listens: _ } = self;
        match arrival {
            Arrival::Pool(relay, present) => serve(Arrival::Pool(relay, present), permit).await,
            Arrival::NoTenant(mut session) => worker.spawn(async move {
                if session.client.attach().is_ok() {
                    serve(Arrival::NoTenant(session), permit).await;
                }
            }),
        }
    }
}

/// Unpacks a session and admits it. An error says why not; the process before keeps the session then.
pub async fn receive(packed: &[u8], socket: OwnedFd, proxy: &Arc<Proxy>) -> Result<ArrivedSession, String> {
    let PackedSession::V1(mut session) = serde_json::from_slice(packed).map_err(in_words)?;
    if session.hash_sample != RowDescription::sample() {
        return Err("the hash functions of the two processes differ".to_owned());
    }
    let client = Stream::detached(socket).map_err(in_words)?;
    let peer = session.peer;
    let config = proxy.config.load_full();
    let permit = proxy.connection_limits.enter(peer, &config.limits).ok_or("there are too many clients")?;
    permit.admit(&config.limits).and_then(|()| permit.logged_in(&config.limits)).map_err(in_words)?;
    let login = look_up_login(&session, peer, proxy).await?;
    let entered = match &session.tenant {
        Some(tenant) => Some(enter_pool(tenant, &login, peer, proxy).await?),
        None => None,
    };
    let pool = entered.as_ref().map(|(pool, _)| pool);
    let worker = proxy.workers.iter().min_by_key(|worker| worker.sessions()).ok_or("there is no worker")?;
    let handle = register(&session, &login, pool, worker, proxy)?;
    apply_missed_changes(&permit, &handle, proxy).await;
    if let Some(until) = handle.forwarded_until {
        tokio::spawn(end_at(until, handle.process_id, proxy.sessions.clone()));
    }
    let (tenant, connection) = (pool.map(|pool| pool.tenant.name.clone()), handle.process_id);
    let rules = match pool {
        Some(pool) => rules_at(pool, &config, &login),
        None => rules_without_tenant(&config, proxy),
    };
    let listening = session.listening.take();
    let listens = listening.is_some();
    let session = unpack(*session, client, handle, login.clone(), rules, proxy)?;
    let arrival = match entered {
        Some((pool, present)) => {
            let seat = pool.placement.seat();
            let relay = Box::new(Relay::new(session, pool, seat));
            Arrival::Pool(listen(relay, listening).await?, present)
        }
        None => Arrival::NoTenant(Box::new(session)),
    };
    if config.log.connections {
        info!(tenant, login = login.name, connection, address = %ClientAddress(peer), "session taken over");
    }
    Ok(ArrivedSession { arrival, permit, worker: worker.clone(), listens })
}

/// A session that listens goes on to do so.
async fn listen(relay: Box<Relay>, listening: Option<PackedListening>) -> Result<Box<Relay>, String> {
    let Some(listening) = listening else { return Ok(relay) };
    let (entered, outcome) = oneshot::channel();
    let worker = relay.worker();
    worker.spawn(async move {
        let mut relay = relay;
        let listens = relay.enter_listener(listening).await;
        let _ = entered.send(listens.map(|()| relay));
    });
    outcome.await.unwrap_or_else(|_| Err("it cannot listen".to_owned()))
}

/// Ends a session between two transactions before the process that has its TLS ends.
async fn end_at(until: SystemTime, process_id: i32, sessions: Arc<Sessions>) {
    tokio::time::sleep(until.duration_since(SystemTime::now()).unwrap_or_default()).await;
    if let Some(session) = sessions.numbered(process_id) {
        session.end_when_free(ClientError::AdminShutdown);
    }
}

fn in_words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn register(
    session: &SessionV1,
    login: &Arc<Login>,
    pool: Option<&Arc<Pool>>,
    worker: &Worker,
    proxy: &Proxy,
) -> Result<Registered, String> {
    let moment = |ms| UNIX_EPOCH + Duration::from_millis(ms);
    let new = NewSession {
        login: login.clone(),
        tenant_access: pool.map(|pool| pool.tenant_access.clone()),
        peer: session.peer,
        addresses: session.addresses,
        now_ms: worker.clock.now_ms(),
        tls: session.tls,
        forwarded_until: session.forwarded_until_ms.map(moment),
        application_name: session.application_name.as_str().into(),
        known_as: None,
        secret_bytes: session.secret.len(),
    };
    let connected_at = moment(session.connected_at_ms);
    let registered = proxy.sessions.register_arrived(new, session.process_id, &session.secret, connected_at);
    registered.ok_or_else(|| "its process number is in use here".to_owned())
}

/// The login as it is now. The session must have proved the password that it has now.
async fn look_up_login(
    session: &SessionV1,
    peer: Option<std::net::IpAddr>,
    proxy: &Proxy,
) -> Result<Arc<Login>, String> {
    let proved = &session.login;
    let found = proxy.directory.login(&proved.name).await.map_err(in_words)?;
    let stays = found.filter(|login| {
        login.id == proved.id
            && proved.verifier_digests.contains(&verifier_digest(&login.verifier))
            && login.still_admits(login, peer)
    });
    stays.ok_or_else(|| "the login was changed".to_owned())
}

async fn enter_pool(
    tenant: &PackedTenant,
    login: &Login,
    peer: Option<std::net::IpAddr>,
    proxy: &Proxy,
) -> Result<(Arc<Pool>, SessionCount), String> {
    let access = if tenant.read_only { Access::ReadOnly } else { Access::ReadWrite };
    if access_to(&login.kind, tenant.id) != Some(access) {
        return Err("the login has other rights".to_owned());
    }
    let found = proxy.directory.tenant_by_id(tenant.id).await.map_err(in_words)?;
    let tenant = found.ok_or("there is no such tenant")?;
    admit(&tenant).map_err(in_words)?;
    if !allowed_from(&tenant.allow_from, peer) {
        return Err("the client's network may not enter the tenant".to_owned());
    }
    let entered = proxy.enter_pool(&tenant, access).await.map_err(in_words)?;
    match entered.0.rules.mode {
        PoolMode::Transaction => Ok(entered),
        PoolMode::Session => Err("the tenant has pool_mode = session".to_owned()),
    }
}

fn unpack(
    session: SessionV1,
    client: Stream,
    handle: Registered,
    login: Arc<Login>,
    mut rules: SessionRules,
    proxy: &Arc<Proxy>,
) -> Result<ClientSession, String> {
    rules.identity.login = Some(login);
    let mut side = ClientSide::unpack(session.side, rules, first_serial()).map_err(in_words)?;
    let switcher = session.switcher.map(|switcher| TenantSwitcher::unpack(switcher, proxy.clone()));
    if let Some(switcher) = &switcher {
        side.set_current_tenant(switcher.current_tenant());
    }
    Ok(ClientSession {
        client,
        unsent: session.unsent.into(),
        side,
        inbox: session.inbox,
        end_of_input: None,
        handle,
        leaving: None,
        switcher,
        traffic: Traffic {
            transactions: session.transactions,
            bytes_in: session.bytes_in,
            bytes_out: session.bytes_out,
        },
        proxy: proxy.clone(),
    })
}

/// The first of 2^32 serial numbers that only one session uses. Those of sessions that began here are below 2^63.
fn first_serial() -> u64 {
    static ARRIVED: AtomicU64 = AtomicU64::new(0);
    1 << 63 | (ARRIVED.fetch_add(1, Ordering::Relaxed) & 0x7fff_ffff) << 32
}
