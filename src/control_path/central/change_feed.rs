//! What changed in the central database, and which sessions other nodes are asked to cancel: heard over a connection of
//! its own that LISTENs.
//!
//! Notices are not replayed: after every connect, also the first, everything may have changed. A network that swallows
//! packets says nothing, so the connection is asked something once in a while.

use std::{convert::Infallible, future::poll_fn, pin::pin, time::Duration};

use rand::Rng as _;
use tokio_postgres::{AsyncMessage, Connection, Socket};

use super::{
    Central, causes,
    change_barrier::BARRIER_CHANNEL,
    cluster_cancel::{CANCEL_CHANNEL, CancelKey, FULL_CHANNEL},
    tls::CentralTlsStream,
};
use crate::data_path::tenant::Change;

/// How often a silent connection is asked whether it lives.
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// Waits between two connection tries. The shortest, less its jitter, keeps us under 10 tries a second; the longest
/// decides how late changes are heard after the central database is back.
const RETRY_SHORTEST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(1);

/// What is heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedEvent {
    /// A row changed.
    Changed(Change),
    /// A client asked some node to cancel a session that is not its own.
    Cancel(CancelKey),
    /// A host, by name, had no connection left for an operator.
    HostFull(String),
    /// Some node wants to know when it has heard what came before.
    Barrier(String),
}

/// Listens for ever, and calls `on_notice` for each notice in the order they were committed. After every (re)connect
/// it says [`Change::Everything`]. `on_state` hears whether it listens now. Ends only by being dropped.
pub async fn follow(central: Central, mut on_notice: impl FnMut(FeedEvent), on_state: impl Fn(bool)) {
    let mut retry = RETRY_SHORTEST;
    let mut lost_before = false;
    loop {
        let mut listening = false;
        let ended = listen(&central, |notice| {
            if !listening {
                listening = true;
                on_state(true);
                if lost_before {
                    tracing::info!("hearing of changes in the central database again");
                }
            }
            on_notice(notice);
        })
        .await;
        on_state(false);
        if listening {
            retry = RETRY_SHORTEST;
        }
        // Once for each outage; the tries that follow are not news.
        if listening || !lost_before {
            tracing::warn!(cause = %ended, "not hearing of changes in the central database; trying again");
        }
        lost_before = true;
        let pause = rand::rng().random_range(retry / 2..retry);
        tokio::time::sleep(pause).await;
        retry = (retry * 2).min(RETRY_LONGEST);
    }
}

/// One connection, from LISTEN to its end; returns why it ended.
async fn listen(central: &Central, mut on_notice: impl FnMut(FeedEvent)) -> String {
    match listen_until_lost(central, &mut on_notice).await {
        Ok(never) => match never {},
        Err(why) => why,
    }
}

async fn listen_until_lost(
    central: &Central,
    on_notice: &mut impl FnMut(FeedEvent),
) -> Result<Infallible, String> {
    let (client, mut connection) = central.connect_undriven().await.map_err(|error| error.to_string())?;
    let subscribe = answered(
        central,
        client.batch_execute(
            "LISTEN pglobby_changed; LISTEN pglobby_cancel; LISTEN pglobby_full; LISTEN pglobby_mark",
        ),
    );
    // Whatever arrives meanwhile is covered by what is said next.
    hear_while(&mut connection, subscribe, &mut |_| {}).await??;
    on_notice(FeedEvent::Changed(Change::Everything));
    loop {
        hear_while(&mut connection, tokio::time::sleep(PROBE_EVERY), on_notice).await?;
        hear_while(&mut connection, answered(central, client.batch_execute("SELECT 1")), on_notice).await??;
    }
}

async fn answered(
    central: &Central,
    question: impl Future<Output = Result<(), tokio_postgres::Error>>,
) -> Result<(), String> {
    match tokio::time::timeout(central.timeout(), question).await {
        Ok(answer) => answer.map_err(|error| causes(&error)),
        Err(_) => Err(format!("no answer within {:?} (central_timeout)", central.timeout())),
    }
}

/// Does `work` while hearing what the connection says; the connection has to be polled for the client's own questions
/// to proceed.
async fn hear_while<T>(
    connection: &mut Connection<Socket, CentralTlsStream<Socket>>,
    work: impl Future<Output = T>,
    on_notice: &mut impl FnMut(FeedEvent),
) -> Result<T, String> {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Ok(done),
            message = poll_fn(|cx| connection.poll_message(cx)) => match message {
                Some(Ok(AsyncMessage::Notification(told))) => {
                    if let Some(notice) = notice(told.channel(), told.payload()) {
                        on_notice(notice);
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(causes(&error)),
                None => return Err("the connection was closed".to_owned()),
            },
        }
    }
}

/// What is told on a channel; `None`: nothing that can be read.
fn notice(channel: &str, payload: &str) -> Option<FeedEvent> {
    match channel {
        CANCEL_CHANNEL => CancelKey::parse(payload).map(FeedEvent::Cancel),
        FULL_CHANNEL => Some(FeedEvent::HostFull(payload.to_owned())),
        BARRIER_CHANNEL => Some(FeedEvent::Barrier(payload.to_owned())),
        _ => Some(FeedEvent::Changed(parse(payload))),
    }
}

/// Reads a payload of `pglobby.tell_changed()`. One that is none of ours may stand for anything, and is taken so.
fn parse(payload: &str) -> Change {
    let id = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| text.parse::<i64>().ok()).flatten()
    };
    let change = match payload.split_once(' ') {
        Some(("tenant", key)) => id(key).map(Change::Tenant),
        Some(("login", key)) => id(key).map(Change::Login),
        Some(("tenant_name", name)) => Some(Change::TenantName(name.to_owned())),
        Some(("login_name", name)) => Some(Change::LoginName(name.to_owned())),
        Some(("host", name)) if !name.is_empty() => Some(Change::Host(name.to_owned())),
        None if payload == "everything" => Some(Change::Everything),
        _ => None,
    };
    change.unwrap_or_else(|| {
        let start: String = payload.chars().take(40).collect();
        tracing::warn!(
            payload = start,
            "a notification in a form unknown to this pglobby; taken as: everything"
        );
        Change::Everything
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_read_strictly_and_doubt_means_everything() {
        assert_eq!(parse("tenant 17"), Change::Tenant(17));
        assert_eq!(parse("login 9223372036854775807"), Change::Login(i64::MAX));
        assert_eq!(parse("login_name a b "), Change::LoginName("a b ".to_owned()));
        assert_eq!(parse("tenant_name 7"), Change::TenantName("7".to_owned()));
        assert_eq!(parse("host my host"), Change::Host("my host".to_owned()));
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
            assert_eq!(parse(odd), Change::Everything, "{odd}");
        }
    }
}
