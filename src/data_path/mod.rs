//! One client connection, in the order things happen to it. Start reading at [`serve_client`].

pub mod directory;
pub mod exchange;
pub mod functions;
pub mod listener;
pub mod log_limit;
pub mod login;
pub mod memory_limit;
pub mod pool;
pub mod prepared;
pub mod proxy;
pub mod relay;
pub mod server;
pub mod session_start;
pub mod session_state;
pub mod sessions;
pub mod sql;
pub mod tenant;
pub mod tenant_switch;
pub mod worker;

use std::sync::Arc;

use self::{
    login::{
        authentication::{AuthContext, Authenticated, authenticate},
        connection_limits::ConnectionPermit,
        startup::{FirstRequest, StartupError, TlsRules},
        tenant_routing::Route,
    },
    proxy::{ConsoleClient, Proxy},
};
use crate::{
    config::{Config, TlsMode},
    error::ClientError,
    wire::{message::Severity, stream::Stream, unsent::Unsent},
};

/// One client, from its first byte to its last. Whatever goes wrong on the way is told to the client, if there is a way.
pub async fn serve_client(mut stream: Stream, permit: ConnectionPermit, proxy: Arc<Proxy>) {
    let config = proxy.config.load_full();
    let in_time = tokio::time::timeout(config.timeouts.client_login, async {
        // Until it says something and has its turn, a connection costs next to nothing.
        stream.readable().await?;
        let (client, origin, at_a_time) = (&mut stream, permit.origin(), config.limits.logins_at_a_time);
        let turns = &proxy.login_turns;
        turns
            .take(origin, at_a_time, || {
                permit.begin_login(&config.limits);
                log_in(client, &permit, &proxy, &config)
            })
            .await
    });
    let login = tokio::select! {
        login = in_time => login.unwrap_or(Err(ClientError::LoginTimeout.into())),
        () = permit.must_leave() => Err(ClientError::TooManyClients.into()),
    };
    match login {
        Ok(Some((packet, Authenticated { login, destination, unsent }))) => match destination {
            Route::Tenant { tenant, access } => {
                session_start::open_session(stream, permit, proxy, packet, login, tenant, access, unsent)
                    .await;
            }
            Route::NoTenant => session_start::open_lobby(stream, permit, proxy, packet, login, unsent).await,
            Route::Console { read_only } => {
                let console = proxy.console.clone();
                console(ConsoleClient { stream, packet, login, read_only, unsent, proxy, permit }).await;
            }
        },
        Ok(None) => {}
        Err(error @ (StartupError::Garbled(_) | StartupError::Io(_))) => {
            tracing::debug!(peer = ?permit.peer(), %error, "a client left before login")
        }
        Err(StartupError::Refused(refusal)) => {
            proxy.metrics.login_refused(&refusal);
            refuse(stream, &refusal).await;
        }
    }
}

/// Startup and proof; `None` where there is nobody to serve: a cancel request, or somebody who left.
async fn log_in(
    stream: &mut Stream,
    permit: &ConnectionPermit,
    proxy: &Proxy,
    config: &Config,
) -> Result<Option<(self::login::startup::StartupPacket, Authenticated)>, StartupError> {
    let door = proxy.tls.load_full();
    let required = !matches!(config.client_tls.mode, TlsMode::Disable | TlsMode::Allow | TlsMode::Prefer);
    let rules = TlsRules { door: door.as_deref(), required };
    let mut packet = match self::login::startup::receive(stream, permit.peer(), rules).await? {
        FirstRequest::Client(packet) => packet,
        FirstRequest::Cancel { process_id, secret } => {
            proxy.cancel(process_id, &secret).await;
            return Ok(None);
        }
        FirstRequest::Gone => return Ok(None),
    };
    permit.admitted(&config.limits)?;
    let gate = AuthContext {
        directory: &*proxy.directory,
        tenant_host_suffixes: &config.tenant_host_suffixes,
        admin_allow_from: &config.admin_allow_from,
        failed_logins: &proxy.failed_logins,
        failed_login_rules: &config.limits.failed_logins,
        metrics: &proxy.metrics,
    };
    let proven = authenticate(stream, &mut packet, gate).await?;
    permit.logged_in(&config.limits)?;
    Ok(Some((packet, proven)))
}

/// Tells a client that has no session why, and closes.
pub async fn refuse(stream: Stream, refusal: &ClientError) {
    let mut words = Vec::new();
    refusal.write(Severity::Fatal, &mut words);
    let mut unsent = Unsent::default();
    unsent.push(&words);
    self::relay::session_end::say_goodbye(stream, unsent).await;
}
