//! Sends a request to another server that its first one has certainly not read (`exchange/unread_request.rs`).

use tracing::{debug, info};

use super::{Relay, session_end::SessionEnd};

impl Relay {
    /// The server has ended, and `last_words` is all that it has said since it was borrowed. Either the session goes on
    /// with its request in the inbox, or it ends with these words.
    #[cold]
    pub(super) async fn send_again(&mut self, last_words: &[u8]) -> Result<(), SessionEnd> {
        let (tenant, connection) = (self.pool.tenant.name.clone(), self.session.handle.process_id);
        let unread = match self.server.as_mut() {
            Some(server) => server.has_left_unread().await,
            None => false,
        };
        let abandoned = if unread { self.abandon_server() } else { None };
        let Some(mut server) = abandoned else {
            debug!(tenant, connection, "the server had read the statement: it is not sent again");
            self.session.unsent.push(last_words);
            return Err(SessionEnd::ServerClosed);
        };
        self.session.inbox = server.first_request.take();
        info!(
            tenant,
            connection,
            server_pid = server.process_id,
            "statement sent again: its server had not read it"
        );
        Ok(())
    }
}
