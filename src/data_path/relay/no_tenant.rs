//! A service login's session that has chosen no tenant: nothing it asks reaches any server.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, ReadBuf};
use tracing::info;

use super::{
    change_tenant::{Departure, Seat},
    session_end::{End, say_goodbye},
};
use crate::{
    data_path::{
        exchange::FIRST_MESSAGE_BYTES,
        session_state::{Settings, parameter_status::Reported},
        tenant_switch::{
            local_answers::Next,
            switcher::{Concierge, Room, room_name},
        },
    },
    wire::message::Severity,
};

/// Serves the client until it chooses a tenant, or leaves.
pub(in crate::data_path) async fn run(mut seat: Seat) -> Option<Departure> {
    let mut concierge = seat.concierge.take()?;
    poll_fn(|cx| {
        seat.handle.wake_with(cx.waker());
        Poll::Ready(())
    })
    .await;
    loop {
        match Box::pin(attend(&mut seat, &mut concierge)).await {
            Ok(Some(room)) => {
                concierge.arrive();
                seat.side.set_stance(concierge.stance());
                room.receive(&mut seat.side);
                seat.concierge = Some(concierge);
                return Some(Box::new((seat, room)));
            }
            Ok(None) => {}
            Err(end) => {
                Box::pin(leave(seat, end)).await;
                return None;
            }
        }
        if let Err(end) = poll_fn(|cx| seat.poll_client(cx)).await {
            Box::pin(leave(seat, end)).await;
            return None;
        }
    }
}

/// Answers what has come. Where a choice leads, if one was made.
async fn attend(seat: &mut Seat, concierge: &mut Concierge) -> Result<Option<Room>, End> {
    loop {
        let mut replies = Vec::new();
        let next = concierge.desk.next(&seat.inbox, &mut seat.side, None, &mut replies);
        let (used, next) = next.map_err(|refusal| End::Refused(refusal.into()))?;
        seat.inbox.drain(..used);
        match next {
            Next::Terminated => return Err(End::Terminated),
            Next::Waits => {
                seat.unsent.push(&replies);
                return Ok(None);
            }
            // Without a tenant nothing is a server's.
            Next::Ended | Next::Server => {}
            Next::SetPassword(password) => {
                concierge.set_password(&seat.handle, password, &mut seat.side, &mut replies).await;
            }
            Next::Choose(wish) => {
                let found = concierge.follow(&wish, &seat.handle, None).await;
                match &found {
                    Ok(room) => concierge.desk.chosen(room_name(room.as_ref(), None), &mut replies),
                    Err(refusal) => concierge.desk.refuse(refusal, &mut seat.side, &mut replies),
                }
                if let Ok(Some(room)) = found {
                    seat.unsent.push(&replies);
                    return Ok(Some(room));
                }
            }
        }
        seat.unsent.push(&replies);
    }
}

impl Seat {
    /// Resolves when the client has sent more, and has been sent everything.
    fn poll_client(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if self.handle.is_signalled() {
            let signals = self.handle.take_signals();
            // Nothing runs here: whoever wants to cancel it is answered by the drop.
            if let Some(reason) = signals.end.or(signals.end_when_free) {
                return Poll::Ready(Err(End::Refused(reason.into())));
            }
        }
        if let Some(reason) = self.leaving.take() {
            return Poll::Ready(Err(End::Refused(reason)));
        }
        if !self.unsent.is_empty() {
            match self.unsent.drain(&mut self.client, cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(End::client_lost(Err(error)))),
            }
        }
        let mut bytes = [0; 4096];
        let mut read = ReadBuf::new(&mut bytes);
        match Pin::new(&mut self.client).poll_read(cx, &mut read) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(())) if !read.filled().is_empty() => {}
            Poll::Ready(lost) => return Poll::Ready(Err(End::client_lost(lost))),
        }
        self.inbox.extend_from_slice(read.filled());
        debug_assert!(self.inbox.len() <= FIRST_MESSAGE_BYTES + bytes.len(), "a long message is refused");
        Poll::Ready(Ok(()))
    }
}

/// What a client is told that has no server: what every driver asks for, as PostgreSQL has it by default. Where the tenant's
/// servers report otherwise, the client is told before its first statement is answered.
pub(in crate::data_path) fn greeting(
    asked: &Settings,
    login: &str,
    server_version: Option<&str>,
) -> Arc<Reported> {
    let reported = [
        ("application_name", ""),
        ("client_encoding", "UTF8"),
        ("DateStyle", "ISO, MDY"),
        ("default_transaction_read_only", "off"),
        ("in_hot_standby", "off"),
        ("integer_datetimes", "on"),
        ("IntervalStyle", "postgres"),
        ("is_superuser", "off"),
        ("server_encoding", "UTF8"),
        ("server_version", server_version.unwrap_or(OLDEST_VERSION)),
        ("session_authorization", login),
        ("standard_conforming_strings", "on"),
        ("TimeZone", "Etc/UTC"),
    ];
    let value = |name: &str, value| asked.get(&name.to_ascii_lowercase()).unwrap_or(value);
    Arc::new(Reported::new(reported.iter().map(|(name, known)| (*name, value(name, known).as_bytes()))))
}

/// Said where no server has been seen yet: drivers use nothing then that is newer.
const OLDEST_VERSION: &str = "13.0";

async fn leave(mut seat: Seat, end: End) {
    let end = end.reported("", &seat.handle);
    info!(login = seat.handle.login.name, connection = seat.handle.process_id, end = ?end, "session ended");
    if let End::Refused(refusal) = &end {
        let mut bytes = Vec::new();
        refusal.write(Severity::Fatal, &mut bytes);
        seat.unsent.push(&bytes);
    }
    if !matches!(end, End::ClientGone | End::Terminated) {
        say_goodbye(seat.client, seat.unsent).await;
    }
}
