//! Reads what the central database reports by NOTIFY, over a connection of its own: changed rows, cancel
//! requests of other nodes, full hosts, barriers, what administrators ask of all nodes.
//!
//! PostgreSQL does not repeat notifications. After every connect, the first one included, everything may have
//! changed. A probe at intervals finds a connection that broke without an error.

use std::{convert::Infallible, future::poll_fn, pin::pin, time::Duration};

use rand::Rng as _;
use tokio::sync::mpsc::Sender;
use tokio_postgres::{AsyncMessage, Connection, Socket};

use super::{
    Central, causes,
    change_barrier::BARRIER_CHANNEL,
    cluster_cancel::{CANCEL_CHANNEL, CancelKey, FULL_CHANNEL},
    tls::CentralTlsStream,
};
use crate::{control_path::fleet::FLEET_CHANNEL, data_path::tenant::DirectoryChange};

/// The channel on which nodes tell each other to look at the leases of a host: `<number of the node> <host>`.
pub const LEASES_CHANNEL: &str = "pglobby_leases";

/// Interval between probes of a silent connection.
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// Waits between two attempts to connect. The shortest, less its jitter, keeps a node below 10 attempts a
/// second. The longest decides how late a node sees changes after the central database is back.
const RETRY_SHORTEST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(1);

/// One notification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedEvent {
    /// A row changed.
    Changed(DirectoryChange),
    /// A node received a cancel request for a session of another node.
    Cancel(CancelKey),
    /// The host of this name had no connection left for an admin command.
    HostFull(String),
    /// The node of this number lacks servers, or has handed some back.
    Leases {
        /// `nodes.id`.
        node: i64,
    },
    /// A node waits until it has applied all earlier changes (`change_barrier.rs`).
    Barrier(String),
    /// Of pauses, requests and answers of nodes (`fleet/`).
    Fleet(String),
}

/// Sends each notification to `events`, in commit order, and [`Change::Everything`] after every connect.
/// Waits while `events` is full: no event is lost. `on_state` is called with whether the connection
/// listens. Returns only if it is dropped.
pub async fn follow(central: Central, events: Sender<FeedEvent>, on_state: impl Fn(bool)) {
    let mut retry = RETRY_SHORTEST;
    let mut lost_before = false;
    loop {
        let mut listening = false;
        let on_listening = || {
            listening = true;
            on_state(true);
            if lost_before {
                tracing::info!(side = "central", "following changes again");
            }
        };
        let Err(cause) = listen(&central, &events, on_listening).await;
        on_state(false);
        if listening {
            retry = RETRY_SHORTEST;
        }
        // Once for each outage, not for each attempt.
        if listening || !lost_before {
            tracing::warn!(side = "central", cause, "cannot follow changes; retrying");
        }
        lost_before = true;
        let pause = rand::rng().random_range(retry / 2..retry);
        tokio::time::sleep(pause).await;
        retry = (retry * 2).min(RETRY_LONGEST);
    }
}

/// One connection, from LISTEN to its end. The error is the reason of the end.
async fn listen(
    central: &Central,
    events: &Sender<FeedEvent>,
    on_listening: impl FnOnce(),
) -> Result<Infallible, String> {
    let (client, mut connection) = central.connect_undriven().await.map_err(|error| error.to_string())?;
    let subscribe = answered(
        central,
        client.batch_execute(
            "LISTEN pglobby_changed; LISTEN pglobby_cancel; LISTEN pglobby_full; LISTEN pglobby_mark; \
             LISTEN pglobby_leases; LISTEN pglobby_fleet",
        ),
    );
    // Notifications before the end of LISTEN are covered by `Everything`.
    drive(&mut connection, subscribe, None).await??;
    on_listening();
    let _ = events.send(FeedEvent::Changed(DirectoryChange::Everything)).await;
    loop {
        drive(&mut connection, tokio::time::sleep(PROBE_EVERY), Some(events)).await?;
        drive(&mut connection, answered(central, client.batch_execute("SELECT 1")), Some(events)).await??;
    }
}

async fn answered(
    central: &Central,
    query: impl Future<Output = Result<(), tokio_postgres::Error>>,
) -> Result<(), String> {
    match tokio::time::timeout(central.timeout(), query).await {
        Ok(answer) => answer.map_err(|error| causes(&error)),
        Err(_) => Err(format!("no answer within {:?} (central_timeout)", central.timeout())),
    }
}

/// Runs `work` and forwards notifications meanwhile. The connection must be polled for the client's own
/// queries to proceed. `events: None` drops the notifications.
async fn drive<T>(
    connection: &mut Connection<Socket, CentralTlsStream<Socket>>,
    work: impl Future<Output = T>,
    events: Option<&Sender<FeedEvent>>,
) -> Result<T, String> {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Ok(done),
            message = poll_fn(|cx| connection.poll_message(cx)) => match message {
                Some(Ok(AsyncMessage::Notification(notification))) => {
                    let event = event(notification.channel(), notification.payload());
                    if let (Some(event), Some(events)) = (event, events) {
                        let _ = events.send(event).await;
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(causes(&error)),
                None => return Err("the connection was closed".to_owned()),
            },
        }
    }
}

/// `None`: a payload that is invalid, of a message whose loss does no harm.
fn event(channel: &str, payload: &str) -> Option<FeedEvent> {
    match channel {
        CANCEL_CHANNEL => CancelKey::parse(payload).map(FeedEvent::Cancel),
        FULL_CHANNEL => Some(FeedEvent::HostFull(payload.to_owned())),
        LEASES_CHANNEL => {
            let node = payload.split(' ').next().and_then(|node| node.parse().ok());
            node.map(|node| FeedEvent::Leases { node })
        }
        BARRIER_CHANNEL => Some(FeedEvent::Barrier(payload.to_owned())),
        FLEET_CHANNEL => Some(FeedEvent::Fleet(payload.to_owned())),
        _ => Some(FeedEvent::Changed(parse(payload))),
    }
}

/// Reads a payload of `pglobby.tell_changed()`. An unknown payload counts as [`Change::Everything`].
fn parse(payload: &str) -> DirectoryChange {
    let id = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| text.parse::<i64>().ok()).flatten()
    };
    let change = match payload.split_once(' ') {
        Some(("tenant", key)) => id(key).map(DirectoryChange::Tenant),
        Some(("login", key)) => id(key).map(DirectoryChange::Login),
        Some(("tenant_name", name)) => Some(DirectoryChange::TenantName(name.to_owned())),
        Some(("login_name", name)) => Some(DirectoryChange::LoginName(name.to_owned())),
        Some(("host", name)) if !name.is_empty() => Some(DirectoryChange::Host(name.to_owned())),
        None if payload == "everything" => Some(DirectoryChange::Everything),
        _ => None,
    };
    change.unwrap_or_else(|| {
        let start: String = payload.chars().take(40).collect();
        tracing::warn!(
            side = "central",
            payload = start,
            "unknown notification; all cached rows count as changed"
        );
        DirectoryChange::Everything
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_read_strictly_and_doubt_means_everything() {
        assert_eq!(parse("tenant 17"), DirectoryChange::Tenant(17));
        assert_eq!(parse("login 9223372036854775807"), DirectoryChange::Login(i64::MAX));
        assert_eq!(parse("login_name a b "), DirectoryChange::LoginName("a b ".to_owned()));
        assert_eq!(parse("tenant_name 7"), DirectoryChange::TenantName("7".to_owned()));
        assert_eq!(parse("host my host"), DirectoryChange::Host("my host".to_owned()));
        for odd in [
            "everything",
            "",
            "tenant",
            "tenant ",
            "tenant -1",
            "tenant +1",
            "tenant 9223372036854775808",
            "host ",
            "pool 3",
        ] {
            assert_eq!(parse(odd), DirectoryChange::Everything, "{odd}");
        }
    }
}
