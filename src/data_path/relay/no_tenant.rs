//! A service login's session without a tenant: the proxy answers it, and no server gets its messages.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, ReadBuf};

use super::{
    change_tenant::SessionTransfer,
    client_session::ClientSession,
    session_end::{SessionEnd, flush_and_close, log_end},
};
use crate::{
    data_path::{
        exchange::FIRST_MESSAGE_BYTES,
        session_state::{Settings, parameter_status::ReportedParameters},
        tenant_switch::{
            local_answers::LocalStep,
            switcher::{SwitchTarget, TenantSwitcher},
        },
    },
    wire::message::Severity,
};

/// Serves the client until it chooses a tenant, or leaves.
pub(super) async fn run(mut session: ClientSession) -> Option<SessionTransfer> {
    let mut switcher = session.switcher.take()?;
    poll_fn(|cx| {
        session.handle.wake_with(cx.waker());
        Poll::Ready(())
    })
    .await;
    loop {
        match Box::pin(attend(&mut session, &mut switcher)).await {
            Ok(Some(target)) => {
                switcher.tenant_entered();
                session.side.set_current_tenant(switcher.current_tenant());
                target.receive(&mut session.side);
                session.switcher = Some(switcher);
                return Some(Box::new((session, target)));
            }
            Ok(None) => {}
            Err(end) => {
                Box::pin(leave(session, end)).await;
                return None;
            }
        }
        if let Err(end) = poll_fn(|cx| session.poll_client(cx)).await {
            session.switcher = Some(switcher);
            if !(end.is_for_successor() && Box::pin(session.moves_to_successor(None, None)).await) {
                Box::pin(leave(session, end)).await;
            }
            return None;
        }
    }
}

/// Answers the client's messages. Returns the target if the client has chosen a tenant.
async fn attend(
    session: &mut ClientSession,
    switcher: &mut TenantSwitcher,
) -> Result<Option<SwitchTarget>, SessionEnd> {
    loop {
        let mut replies = Vec::new();
        let next = switcher.responder.next(&session.inbox, &mut session.side, None, &mut replies);
        let (used, next) = next?;
        session.inbox.drain(..used);
        match next {
            LocalStep::Terminated => return Err(SessionEnd::Terminated),
            LocalStep::Waits => {
                session.unsent.push(&replies);
                return Ok(None);
            }
            // Without a tenant there is no server: the responder has refused the message.
            LocalStep::Ended | LocalStep::Server => {}
            LocalStep::SetPassword(password) => {
                switcher.set_password(&session.handle, password, &mut session.side, &mut replies).await;
            }
            LocalStep::Choose(request) => {
                let found = switcher.follow(&request, &session.handle, None).await;
                let target = switcher.answer(found, None, &mut session.side, &mut replies);
                if target.is_some() {
                    session.unsent.push(&replies);
                    return Ok(target);
                }
            }
        }
        session.unsent.push(&replies);
    }
}

impl ClientSession {
    /// Resolves when all replies are sent and the client has sent more.
    fn poll_client(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionEnd>> {
        if self.handle.is_signalled() {
            let signals = self.handle.take_signals();
            // No query runs here; dropping the senders answers the cancel requests.
            if let Some(reason) = signals.end.or(signals.end_when_free) {
                return Poll::Ready(Err(reason.into()));
            }
        }
        if let Some(reason) = self.leaving.take() {
            return Poll::Ready(Err(SessionEnd::Refused(reason)));
        }
        if !self.unsent.is_empty() {
            match self.unsent.drain(&mut self.client, cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(SessionEnd::client_lost(Err(error)))),
            }
        }
        let mut bytes = [0; 4096];
        let mut read = ReadBuf::new(&mut bytes);
        match Pin::new(&mut self.client).poll_read(cx, &mut read) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(())) if !read.filled().is_empty() => {}
            Poll::Ready(lost) => return Poll::Ready(Err(SessionEnd::client_lost(lost))),
        }
        self.inbox.extend_from_slice(read.filled());
        debug_assert!(self.inbox.len() <= FIRST_MESSAGE_BYTES + bytes.len(), "a long message is refused");
        Poll::Ready(Ok(()))
    }
}

/// The ParameterStatus of a session without a server: PostgreSQL's defaults, with what the client asked for.
/// Values of the tenant's servers that differ are reported before its first reply.
pub fn startup_status(
    asked: &Settings,
    login: &str,
    server_version: Option<&str>,
) -> Arc<ReportedParameters> {
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
    Arc::new(ReportedParameters::new(
        reported.iter().map(|(name, known)| (*name, value(name, known).as_bytes())),
    ))
}

/// Reported while no server's version is known: drivers then use no newer feature.
const OLDEST_VERSION: &str = "13.0";

async fn leave(mut session: ClientSession, end: SessionEnd) {
    log_end(&session.proxy, None, &session.handle, &session.traffic, &end);
    if let SessionEnd::Refused(client_error) = &end {
        let mut bytes = Vec::new();
        client_error.write(Severity::Fatal, &mut bytes);
        session.unsent.push(&bytes);
    }
    if !matches!(end, SessionEnd::ClientLost(_) | SessionEnd::Terminated) {
        flush_and_close(session.client, session.unsent).await;
    }
}
