//! A proven client becomes a session: it moves to its tenant's worker, once, is greeted there and served.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tracing::{info, warn};

use crate::{
    config::{Config, PoolMode},
    data_path::{
        exchange::{ClientSide, SessionRules, return_to_tenant::CurrentTenant, startup_charge},
        login::{connection_limits::ConnectionPermit, startup::StartupPacket},
        memory_limit::{Account, Charge},
        pool::{
            Pool, PooledServer,
            startup_parameters::{SessionServer, StartupStatus},
        },
        proxy::Proxy,
        refuse,
        relay::{
            Relay,
            change_tenant::{DetachedSession, run_session},
            no_tenant,
        },
        session_state::{Settings, identity::Identity},
        sessions::registry::{NewSession, Registered},
        tenant::{Access, Login, LoginKind, Tenant},
        tenant_switch::switcher::{SwitchTarget, TenantSwitcher},
    },
    error::{ClientError, Limit},
    wire::{
        message::{backend_key_data, ready_for_query},
        stream::Stream,
    },
};

/// Takes the client to its tenant's worker, where a task of its own serves it from now on.
#[expect(
    clippy::too_many_arguments,
    reason = "everything a login has brought together is handed on here, once"
)]
pub async fn open_session(
    mut stream: Stream,
    permit: ConnectionPermit,
    proxy: Arc<Proxy>,
    packet: StartupPacket,
    login: Arc<Login>,
    tenant: Arc<Tenant>,
    access: Access,
    unsent: Vec<u8>,
) {
    let (pool, present) = match proxy.enter_pool(&tenant, access).await {
        Ok(entered) => entered,
        Err(refusal) => {
            proxy.metrics.login_refused(&refusal);
            return refuse_proven(stream, unsent, &refusal).await;
        }
    };
    let (worker, watcher) = (pool.worker.clone(), proxy.clone());
    if !worker.is_this_thread()
        && let Err(error) = stream.detach()
    {
        return warn!(tenant = tenant.name, side = "client", %error, "cannot move a session to its worker");
    }
    // A future of its own, gone when the session begins: what a login needed is no burden of an idle client's.
    let welcome = Box::pin(async move {
        if let Err(error) = stream.attach() {
            warn!(tenant = tenant.name, side = "client", %error, "cannot move a session to its worker");
            return None;
        }
        greet(stream, &proxy, pool, packet, login, unsent).await
    });
    worker.spawn(async move {
        let Some(relay) = welcome.await else { return };
        if permit.has_missed_changes() {
            Box::pin(watcher.look_again_at(&relay.handle)).await;
        }
        drop(watcher);
        let index = relay.pool.worker.index;
        let gone = relay.run().await;
        drop(present);
        if let Some(transfer) = gone {
            Box::pin(run_session(transfer, permit, Some(index))).await;
        }
    });
}

async fn refuse_proven(stream: Stream, unsent: Vec<u8>, refusal: &ClientError) {
    let mut stream = stream;
    if tokio::io::AsyncWriteExt::write_all(&mut stream, &unsent).await.is_ok() {
        refuse(stream, refusal).await;
    }
}

/// Finds out what the client is to be told, and makes the session. `None`: it was refused.
async fn greet(
    stream: Stream,
    proxy: &Arc<Proxy>,
    pool: Arc<Pool>,
    packet: StartupPacket,
    login: Arc<Login>,
    unsent: Vec<u8>,
) -> Option<Box<Relay>> {
    let config = proxy.config.load_full();
    let addresses = stream.addresses();
    let asked = Settings::new(packet.settings);
    let memory = pool.account(config.limits.client_memory_max);
    let wait = config.timeouts.query_wait;
    let (status, server, began) = match meet(&pool, asked, &memory, wait).await {
        Ok(greeted) => greeted,
        Err(refusal) => {
            info!(tenant = pool.tenant.name, login = login.name, reason = %refusal, "login refused");
            proxy.metrics.login_refused(&refusal);
            refuse_proven(stream, unsent, &refusal).await;
            return None;
        }
    };
    let arrival = NewSession {
        login,
        place: Some(pool.place.clone()),
        peer: packet.peer,
        addresses,
        now_ms: pool.worker.clock.now_ms(),
        tls: packet.tls.is_some(),
        application_name: status.reported.text("application_name").unwrap_or_default().into(),
        known_as: server.as_ref().map(|server| server.process_id),
        secret_bytes: if packet.minor >= 2 { 32 } else { 4 },
    };
    let (handle, secret) = proxy.sessions.register(arrival);
    pool.stats.logins.fetch_add(1, Relaxed);
    if config.log.connections {
        info!(
            tenant = pool.tenant.name, login = handle.login.name, connection = handle.process_id,
            peer = ?handle.peer, tls = handle.tls, "session opened"
        );
    }
    let mut bytes = unsent;
    status.write(&mut bytes);
    backend_key_data(&mut bytes, handle.known_as, &secret);
    ready_for_query(&mut bytes, b'I');
    let is_service = matches!(handle.login.kind, LoginKind::Service { .. });
    let switcher =
        is_service.then(|| TenantSwitcher::new(proxy.clone(), Some(pool.tenant.id), status.reported.clone()));
    let rules = SessionRules {
        follow: pool.rules.mode == PoolMode::Transaction,
        shared_statements: pool.statements.clone(),
        functions: pool.catalogue.clone(),
        identity: Identity { login: Some(handle.login.clone()), tenant_access: Some(pool.place.clone()) },
        memory,
        ..rules(&config, is_service)
    };
    let mut side = ClientSide::new(rules, status.settings, first_serial(&handle));
    (side.told, side.start_settings, side.began) = (status.reported, status.start.into(), began);
    let session = DetachedSession {
        client: stream,
        unsent: bytes.into(),
        side,
        inbox: packet.unread,
        handle,
        query_wait: wait,
        leaving: None,
        switcher: switcher,
        proxy: proxy.clone(),
    };
    let mut relay = Box::new(Relay::new(session, pool));
    if let Some(server) = server {
        relay.engage(server);
    }
    Some(relay)
}

/// What a client that asks for these parameters has set and is told; in session mode, the server that it has from now on; and what
/// that takes.
async fn meet(
    pool: &Arc<Pool>,
    asked: Settings,
    memory: &Arc<Account>,
    wait: Duration,
) -> Result<(StartupStatus, Option<Box<PooledServer>>, Charge), ClientError> {
    let began = startup_charge(&asked, memory)?;
    if pool.rules.mode == PoolMode::Transaction {
        return Ok((pool.startup_status(asked, wait).await?, None, began));
    }
    let SessionServer { server, status } = pool.session_server(asked, wait).await?;
    Ok((status, Some(server), began))
}

/// What holds for a session that is in no pool.
fn rules(config: &Config, chooses: bool) -> SessionRules {
    SessionRules {
        follow: true,
        may_switch_tenant: chooses,
        current_tenant: CurrentTenant::First,
        identity: Identity::default(),
        sees_binds: chooses,
        shared_statements: Arc::default(),
        functions: Arc::default(),
        inspect_bytes_max: config.limits.statement_inspect_bytes_max,
        statements_max: config.limits.client_prepared_statements_max,
        statements_bytes_max: config.limits.client_prepared_bytes_max,
        unanswered_max: config.limits.pipelined_requests_max,
        settings_max: config.limits.tracked_parameters_max,
        settings_bytes_max: config.limits.tracked_bytes_max,
        memory: Arc::default(),
    }
}

/// Unique over the process, with 32 bits of room above it.
fn first_serial(handle: &Registered) -> u64 {
    u64::from(handle.process_id.unsigned_abs()) << 32
}

/// A service login that names no tenant: a session on this worker, until it chooses one.
pub async fn open_lobby(
    stream: Stream,
    permit: ConnectionPermit,
    proxy: Arc<Proxy>,
    packet: StartupPacket,
    login: Arc<Login>,
    unsent: Vec<u8>,
) {
    let config = proxy.config.load_full();
    let asked = Settings::new(packet.settings);
    let nowhere = &proxy.pools.accounts.nowhere;
    let memory = Account::new(Limit::Client, config.limits.client_memory_max, &[nowhere]);
    let began = match startup_charge(&asked, &memory) {
        Ok(began) => began,
        Err(refusal) => {
            info!(login = login.name, reason = %refusal, "login refused");
            proxy.metrics.login_refused(&refusal);
            return refuse_proven(stream, unsent, &refusal).await;
        }
    };
    let arrival = NewSession {
        login,
        place: None,
        peer: packet.peer,
        addresses: stream.addresses(),
        now_ms: proxy.workers.first().map_or(0, |worker| worker.clock.now_ms()),
        tls: packet.tls.is_some(),
        application_name: asked.get("application_name").unwrap_or_default().into(),
        known_as: None,
        secret_bytes: if packet.minor >= 2 { 32 } else { 4 },
    };
    let (handle, secret) = proxy.sessions.register(arrival);
    if config.log.connections {
        info!(
            login = handle.login.name, connection = handle.process_id, peer = ?handle.peer, tls = handle.tls,
            "session opened, no tenant chosen"
        );
    }
    let told = no_tenant::greeting(&asked, &handle.login.name, proxy.pools.server_version().as_deref());
    let mut bytes = unsent;
    told.write(&mut bytes);
    backend_key_data(&mut bytes, handle.process_id, &secret);
    ready_for_query(&mut bytes, b'I');
    let identity = Identity { login: Some(handle.login.clone()), tenant_access: None };
    let rules = SessionRules { identity, memory, ..rules(&config, true) };
    let mut side = ClientSide::new(rules, Arc::new(asked), first_serial(&handle));
    (side.told, side.began) = (told.clone(), began);
    let session = DetachedSession {
        client: stream,
        unsent: bytes.into(),
        side,
        inbox: packet.unread,
        handle,
        query_wait: config.timeouts.query_wait,
        leaving: None,
        switcher: Some(TenantSwitcher::new(proxy.clone(), None, told)),
        proxy: proxy.clone(),
    };
    if permit.has_missed_changes() {
        proxy.look_again_at(&session.handle).await;
    }
    tokio::spawn(run_session(Box::new((session, SwitchTarget::NoTenant)), permit, None));
}
