//! Logs the result of a login and delays its answer: the more logins have failed, the longer the client
//! waits.

use std::{sync::Arc, time::Instant};

use tracing::{info, warn};

use super::{
    authentication::AuthContext,
    connection_limits::{ClientAddress, ClientNetwork},
    failed_logins::Outcome,
    startup::StartupPacket,
    tenant_routing::{LoginError, LookedUp, Route},
};
use crate::{data_path::tenant::Login, error::ClientError};

/// Returns the result of a login when the client may receive it. Errors: the error of the login;
/// [`ClientError::TooManyFailedLogins`] if the delay would be too long, for right passwords too.
pub async fn log_and_delay(
    packet: &StartupPacket,
    names: &LookedUp,
    result: Result<(Arc<Login>, Route), LoginError>,
    context: &AuthContext<'_>,
) -> Result<(Arc<Login>, Route), ClientError> {
    let outcome = match &result {
        Err(LoginError::Hidden(_)) => Outcome::Wrong,
        Err(LoginError::Shown(ClientError::DirectoryUnavailable)) => Outcome::Unknown,
        _ => Outcome::Right,
    };
    // Failures of `alice@acme` count for `alice`, whatever the tenant is.
    let login = packet.user.rsplit_once('@').map_or(packet.user.as_str(), |(login, _)| login);
    let origin = ClientNetwork::of(packet.peer);
    let delay =
        context.failed_logins.judge(origin, login, outcome, Instant::now(), context.failed_login_rules);
    if let Err(reason) = &result {
        let (address, tenant) = (ClientAddress(packet.peer), names.tenant_name());
        let (login, database) = (&*packet.user, packet.database.as_deref());
        // The address is the first field, before anything that a client chooses; docs/security.md has the
        // filter for fail2ban.
        if delay.is_logged {
            warn!(%address, login, tenant, database, reason = reason.to_string(), "login failed");
        } else if outcome != Outcome::Wrong {
            info!(%address, login, tenant, database, reason = reason.to_string(), "login refused");
        }
    }
    if !delay.wait.is_zero() {
        context.metrics.login_delayed();
        tokio::time::sleep(delay.wait).await;
    }
    if delay.is_refused {
        return Err(ClientError::TooManyFailedLogins);
    }
    result.map_err(|error| error.into_client_error(&packet.user))
}
