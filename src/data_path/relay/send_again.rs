//! Sends a request to another server that its first one has certainly not read (`exchange/unread_request.rs`).

use std::sync::atomic::Ordering;

use tracing::{debug, info};

use super::{Relay, session_end::SessionEnd};
use crate::data_path::session_state::pins::Pins;

impl Relay {
    /// The server has ended, and `last_words` is all that it has said since it was borrowed. Either the session goes on
    /// with its request in the inbox, or it ends with these words.
    #[cold]
    pub(super) async fn send_again(&mut self, last_words: &[u8]) -> Result<(), SessionEnd> {
        let unread = match self.server.as_mut() {
            Some(server) => server.has_left_unread().await,
            None => false,
        };
        let Some(mut server) = self.server.take_if(|_| unread) else {
            debug!(tenant = self.pool.tenant.name, "the server had read the statement: it is not sent again");
            self.session.unsent.push(last_words);
            return Err(SessionEnd::ServerClosed);
        };
        info!(
            tenant = self.pool.tenant.name,
            connection = self.session.handle.process_id,
            server_pid = server.process_id,
            "statement sent again: its server had not read it"
        );
        self.session.side.custom.insert(server.side.custom.by_session);
        self.session.handle.server_process_id.store(0, Ordering::Relaxed);
        self.session.inbox = server.first_request.take();
        (self.transaction_began, self.request_began) = (None, None);
        self.set_pins(Pins::empty());
        Ok(())
    }
}
