//! One client connection, in the order things happen to it. Start reading at [`serve_client`].

pub mod directory;
pub mod exchange;
pub mod functions;
pub mod listener;
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
        authentication::{Gate, Proven, prove},
        connection_limits::Visitor,
        startup::{Arrival, StartupError, TlsRules},
        tenant_routing::Destination,
    },
    proxy::{ConsoleVisit, Proxy},
};
use crate::{
    config::{Config, TlsMode},
    error::ClientError,
    wire::{message::Severity, stream::Stream, unsent::Unsent},
};

/// One client, from its first byte to its last. Whatever goes wrong on the way is told to the client, if there is a way.
pub async fn serve_client(mut stream: Stream, visitor: Visitor, proxy: Arc<Proxy>) {
    let config = proxy.config.load_full();
    let in_time = tokio::time::timeout(config.timeouts.client_login, async {
        // Until it says something and has its turn, a connection costs next to nothing.
        stream.readable().await?;
        let (client, origin, at_a_time) = (&mut stream, visitor.origin(), config.limits.logins_at_a_time);
        let turns = &proxy.turns;
        turns
            .take(origin, at_a_time, || {
                visitor.begin_login(&config.limits);
                log_in(client, &visitor, &proxy, &config)
            })
            .await
    });
    let login = tokio::select! {
        login = in_time => login.unwrap_or(Err(ClientError::LoginTimeout.into())),
        () = visitor.must_leave() => Err(ClientError::TooManyClients.into()),
    };
    match login {
        Ok(Some((hello, Proven { login, destination, unsent }))) => match destination {
            Destination::Tenant { tenant, access } => {
                session_start::open_session(stream, visitor, proxy, hello, login, tenant, access, unsent)
                    .await;
            }
            Destination::Lobby => {
                session_start::open_lobby(stream, visitor, proxy, hello, login, unsent).await
            }
            Destination::Console { read_only } => {
                let console = proxy.console.clone();
                console(ConsoleVisit { stream, hello, login, read_only, unsent, proxy, visitor }).await;
            }
        },
        Ok(None) => {}
        Err(error @ (StartupError::Garbled(_) | StartupError::Io(_))) => {
            tracing::debug!(peer = ?visitor.peer(), %error, "a client left before login")
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
    visitor: &Visitor,
    proxy: &Proxy,
    config: &Config,
) -> Result<Option<(self::login::startup::Hello, Proven)>, StartupError> {
    let door = proxy.tls.load_full();
    let required = !matches!(config.client_tls.mode, TlsMode::Disable | TlsMode::Allow | TlsMode::Prefer);
    let rules = TlsRules { door: door.as_deref(), required };
    let mut hello = match self::login::startup::receive(stream, visitor.peer(), rules).await? {
        Arrival::Client(hello) => hello,
        Arrival::Cancel { process_id, secret } => {
            proxy.cancel(process_id, &secret).await;
            return Ok(None);
        }
        Arrival::Gone => return Ok(None),
    };
    visitor.admitted(&config.limits)?;
    let gate = Gate {
        directory: &*proxy.directory,
        tenant_host_suffixes: &config.tenant_host_suffixes,
        admin_allow_from: &config.admin_allow_from,
        failed_logins: &proxy.failed_logins,
        failed_login_rules: &config.limits.failed_logins,
        metrics: &proxy.metrics,
    };
    let proven = prove(stream, &mut hello, gate).await?;
    visitor.logged_in(&config.limits)?;
    Ok(Some((hello, proven)))
}

/// Tells a client that has no session why, and closes.
pub async fn refuse(stream: Stream, refusal: &ClientError) {
    let mut words = Vec::new();
    refusal.write(Severity::Fatal, &mut words);
    let mut unsent = Unsent::default();
    unsent.push(&words);
    self::relay::session_end::say_goodbye(stream, unsent).await;
}
