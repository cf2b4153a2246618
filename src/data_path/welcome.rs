//! A proven client becomes a session: it moves to its tenant's worker, once, is greeted there and served.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use tracing::{info, warn};

use super::{
    exchange::{ClientSide, Rules},
    pool::{Pool, Present},
    proxy::{Proxy, Visitor},
    refuse,
    relay::Relay,
    session::Arrival,
    session_state::Settings,
    startup::Hello,
    tenant::{Access, Login, PoolMode, Tenant},
};
use crate::{
    error::Refusal,
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
    visitor: Visitor,
    proxy: Arc<Proxy>,
    hello: Hello,
    login: Arc<Login>,
    tenant: Arc<Tenant>,
    access: Access,
    unsent: Vec<u8>,
) {
    let (pool, present) = match enter(&proxy, &tenant, access).await {
        Ok(entered) => entered,
        Err(refusal) => {
            proxy.metrics.login_refused(&refusal);
            return refuse_proven(stream, unsent, &refusal).await;
        }
    };
    if let Err(error) = stream.detach() {
        return warn!(tenant = tenant.name, side = "client", %error, "cannot move a session to its worker");
    }
    let worker = pool.worker.clone();
    // A future of its own, gone when the session begins: what a login needed is no burden of an idle client's.
    let welcome = Box::pin(async move {
        if let Err(error) = stream.attach() {
            warn!(tenant = tenant.name, side = "client", %error, "cannot move a session to its worker");
            return None;
        }
        greet(stream, &proxy, pool, hello, login, access, unsent).await
    });
    worker.spawn(async move {
        let Some((relay, greeting)) = welcome.await else { return };
        visitor.logged_in();
        relay.run(greeting).await;
        drop((visitor, present));
    });
}

/// The tenant's pool and a place in it, if there is room for one more session.
async fn enter(proxy: &Proxy, tenant: &Arc<Tenant>, access: Access) -> Result<(Arc<Pool>, Present), Refusal> {
    let pool = proxy.pools.of(tenant, access).await?;
    let limit = match tenant.max_clients {
        Some(limit) => limit as usize,
        None => proxy.config.load().limits.max_db_client_connections,
    };
    match pool.enter(limit) {
        Some(present) => Ok((pool, present)),
        None => Err(Refusal::TooManyClientsOfTenant { tenant: tenant.name.clone() }),
    }
}

async fn refuse_proven(stream: Stream, unsent: Vec<u8>, refusal: &Refusal) {
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
    hello: Hello,
    login: Arc<Login>,
    access: Access,
    unsent: Vec<u8>,
) -> Option<(Box<Relay>, Vec<u8>)> {
    let config = proxy.config.load_full();
    let addresses = stream.addresses();
    let asked = Settings::new(hello.settings);
    let application_name = asked.get("application_name").unwrap_or_default().into();
    let greeting = match pool.greet(asked, config.timeouts.query_wait).await {
        Ok(greeting) => greeting,
        Err(refusal) => {
            info!(tenant = pool.tenant.name, login = login.name, reason = %refusal, "login refused");
            proxy.metrics.login_refused(&refusal);
            refuse_proven(stream, unsent, &refusal).await;
            return None;
        }
    };
    let arrival = Arrival {
        login,
        tenant: pool.tenant.clone(),
        access,
        peer: hello.peer,
        addresses,
        now_ms: pool.worker.clock.now_ms(),
        tls: hello.tls.is_some(),
        application_name,
        secret_bytes: if hello.minor >= 2 { 32 } else { 4 },
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
    bytes.extend_from_slice(&greeting.messages);
    backend_key_data(&mut bytes, handle.process_id, &secret);
    ready_for_query(&mut bytes, b'I');
    let rules = Rules {
        follow: pool.rules.mode == PoolMode::Transaction,
        table: pool.statements.clone(),
        catalogue: pool.catalogue.clone(),
        inspect_bytes_max: config.limits.statement_inspect_bytes_max,
        statements_max: config.limits.client_prepared_statements_max,
        settings_max: config.limits.tracked_parameters_max,
    };
    let serial = u64::from(handle.process_id.unsigned_abs()) << 32;
    let side = ClientSide::new(rules, greeting.settings, serial);
    let relay = Relay::new(stream, side, pool, handle, hello.leftover, config.timeouts.query_wait);
    Some((Box::new(relay), bytes))
}
