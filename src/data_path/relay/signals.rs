//! What others want of a session at work: that it cancels what runs, that it ends, that its client is told of something.

use std::{future::Future, pin::Pin, task::Context, time::Instant};

use super::{Relay, Step, session_end::End};

impl Relay {
    /// Attends to signals and to a cancel that is under way.
    #[cold]
    pub(in crate::data_path) fn attend(&mut self, cx: &mut Context<'_>) -> Option<Step> {
        if let Some(cancelling) = self.cancelling.as_mut()
            && Pin::new(cancelling).poll(cx).is_ready()
        {
            self.cancelling = None;
            if let Some(step) = self.after_reply(Instant::now()) {
                return Some(step);
            }
        }
        if self.handle.is_notified() {
            self.tell_heard();
        }
        if self.handle.is_signalled() {
            let called_back = self.handle.is_called_back();
            let signals = self.handle.take_signals();
            if let Some(reason) = signals.end {
                return Some(Step::End(End::Refused(reason.into())));
            }
            if let Some(reason) = signals.end_when_free {
                let free = self.server.as_ref().is_none_or(|server| server.side.lease.is_over());
                if free && self.inbox.is_empty() {
                    return Some(Step::End(End::Refused(reason.into())));
                }
                self.leaving = Some(reason.into());
            }
            if called_back && let Some(step) = self.yield_server() {
                return Some(step);
            }
            // Other signals come this way as well: what runs when a drain begins must not be cancelled.
            if !signals.cancels.is_empty() {
                self.cancel(signals.cancels);
            }
            if let Some(cancelling) = self.cancelling.as_mut() {
                let _ = Pin::new(cancelling).poll(cx);
            }
        }
        None
    }
}
