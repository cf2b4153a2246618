//! Signals of other tasks to a session at a pool: cancel the query, end, return the server, send
//! notifications.

use std::{future::Future, pin::Pin, task::Context};

use tokio::time::Instant;

use super::{Relay, Step};

impl Relay {
    /// Takes signals, and looks whether a cancel under way is complete.
    #[cold]
    pub(super) fn take_signals(&mut self, cx: &mut Context<'_>) -> Option<Step> {
        if let Some(cancelling) = self.cancelling.as_mut()
            && Pin::new(cancelling).poll(cx).is_ready()
        {
            self.cancelling = None;
            if let Some(step) = self.after_reply(Instant::now()) {
                return Some(step);
            }
        }
        if self.session.handle.is_notified() {
            self.send_notifications();
        }
        if self.session.handle.is_signalled() {
            let called_back = self.session.handle.is_called_back();
            let signals = self.session.handle.take_signals();
            if let Some(reason) = signals.end {
                return Some(reason.into());
            }
            if let Some(reason) = signals.end_when_free {
                let free = self.server.as_ref().is_none_or(|server| server.side.replies.is_over());
                if free && (self.session.inbox.is_empty() || self.takes_inbox_along(&reason)) {
                    return Some(reason.into());
                }
                self.session.leaving = Some(reason.into());
            }
            if let Some(reason) = signals.end_if_idle
                && self.server.is_none()
                && self.session.inbox.is_empty()
            {
                return Some(reason.into());
            }
            if called_back && let Some(step) = self.return_pinned_server() {
                return Some(step);
            }
            self.wanted_cancels.add(signals.cancels);
        }
        None
    }
}
