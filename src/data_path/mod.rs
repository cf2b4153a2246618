//! One client connection, in the order things happen to it. Start reading at [`serve_client`].

pub mod directory;
pub mod exchange;
pub mod functions;
pub mod host_address;
pub(crate) mod inherited_sockets;
pub(crate) mod listener;
pub(crate) mod lock;
pub(crate) mod log_limit;
pub(crate) mod login;
pub(crate) mod memory_limit;
pub(crate) mod packed_session;
pub(crate) mod pool;
pub(crate) mod port_in_use;
pub mod prepared;
pub(crate) mod proxy;
pub(crate) mod relay;
pub mod server;
pub(crate) mod session_arrival;
pub(crate) mod session_start;
pub mod session_state;
pub(crate) mod sessions;
#[cfg(test)]
mod simulation;
pub mod sql;
pub mod tenant;
pub(crate) mod tenant_switch;
pub(crate) mod unix_socket;
pub(crate) mod worker;

use std::sync::Arc;

use self::{
    login::{
        authentication,
        connection_limits::ConnectionPermit,
        login_result,
        startup::{self, FirstRequest, StartupError, TlsRules},
        tenant_routing::{self, Route},
    },
    proxy::{ConsoleClient, Proxy},
    relay::change_worker::{Arrival, serve},
    session_start::AuthenticatedClient,
};
use crate::{
    error::ClientError,
    wire::{message::Severity, stream::Stream, unsent::Unsent},
};

/// Serves one client from its first byte to its last. A stage that fails ends the connection, with an error
/// for the client if it can still read one.
pub async fn serve_client(mut stream: Stream, permit: ConnectionPermit, proxy: Arc<Proxy>) {
    let config = proxy.config.load_full();
    let login = permit.limit_login(config.timeouts.client_login, async {
        // The future is made when the login has its turn, so that a silent connection uses little memory.
        stream.readable().await?;
        let (stream, permit, proxy, config) = (&mut stream, &permit, &*proxy, &*config);
        let stages = || async move {
            permit.begin_login(&config.limits);
            let acceptor = proxy.tls.load_full();
            let rules = TlsRules::new(acceptor.as_deref(), config.client_tls.mode);
            let mut packet = match startup::receive(stream, permit.peer(), rules).await? {
                FirstRequest::Login(packet) => packet,
                FirstRequest::Cancel { process_id, secret } => {
                    proxy.cancel(process_id, &secret).await;
                    return Ok(None);
                }
                FirstRequest::Closed => return Ok(None),
            };
            permit.admit(&config.limits)?;
            let context = proxy.auth_context(config);
            let names = tenant_routing::look_up(&packet, &context).await;
            let proof = authentication::authenticate(stream, &mut packet, &names, &context).await?;
            let routed = tenant_routing::route(&packet, &names, &proof, &context).await;
            let (login, route) = login_result::log_and_delay(&packet, &names, routed, &context).await?;
            permit.logged_in(&config.limits)?;
            Ok(Some((packet, login, proof.into_replies(), route)))
        };
        proxy.login_turns.take(permit.origin(), config.limits.logins_at_a_time, stages).await
    });
    let (packet, login, unsent, route) = match login.await {
        Ok(Some(login)) => login,
        Ok(None) => return,
        Err(error) => return refuse_login(stream, &permit, error, &proxy).await,
    };
    let client = AuthenticatedClient { stream, packet, login, unsent };
    match route {
        Route::Console { read_only } => {
            let AuthenticatedClient { stream, packet, login, unsent } = client;
            let console = proxy.console.clone();
            console(ConsoleClient { stream, packet, login, read_only, unsent, proxy, permit }).await;
        }
        Route::NoTenant => session_start::start_without_tenant(client, permit, proxy).await,
        Route::Tenant { tenant, access } => {
            let (pool, session_count) = match proxy.enter_pool(&tenant, access).await {
                Ok(entered) => entered,
                Err(client_error) => return client.refuse(&client_error, Some(&tenant.name), &proxy).await,
            };
            let seat = pool.placement.seat();
            let worker = seat.worker.clone();
            let Some(client) = client.detach_for(&pool, &worker) else { return };
            // Boxed, so that the memory of this stage is freed when the session begins.
            let session = Box::pin(session_start::greet(client, pool, seat, proxy));
            worker.spawn(async move {
                let Some(relay) = session.await else { return };
                session_start::apply_missed_changes(&permit, &relay.session.handle, &relay.session.proxy)
                    .await;
                serve(Arrival::Pool(relay, session_count), permit).await;
            });
        }
    }
}

/// Logs a login that failed before its result was known, and sends the client the error.
async fn refuse_login(stream: Stream, permit: &ConnectionPermit, error: StartupError, proxy: &Proxy) {
    match error {
        StartupError::Refused(error) => {
            proxy.metrics.login_refused(&error);
            refuse(stream, &error).await;
        }
        StartupError::Garbled(_) | StartupError::Io(_) => {
            tracing::debug!(address = %permit.address(), %error, "connection closed before login");
        }
    }
}

/// Sends an error to a client that has no session, and closes the connection.
pub async fn refuse(stream: Stream, error: &ClientError) {
    let mut message = Vec::new();
    error.write(Severity::Fatal, &mut message);
    let mut unsent = Unsent::default();
    unsent.push(&message);
    self::relay::session_end::flush_and_close(stream, unsent).await;
}
