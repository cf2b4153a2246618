//! When a server may serve another session, and the reset that makes it so.
//!
//! In transaction mode a server without pins is not reset: it only gets the settings of its next session
//! (`exchange/restore_settings.rs`). A session that has left state behind, and session mode, need DISCARD ALL.

use std::io;

use super::connection::{AskError, Server};

impl Server {
    /// Whether another session may have it as it is. The one check; if unsure, the caller closes the connection.
    pub fn is_reusable(&self) -> bool {
        self.side.is_reusable() && self.unsent.is_empty() && self.notified.is_empty() && !self.has_ended
    }

    /// Rolls back an open transaction and runs DISCARD ALL. After an error, also where the session left
    /// something that these cannot undo, the server must be closed.
    pub async fn clean(&mut self) -> Result<(), AskError> {
        if !self.side.is_cleanable() || !self.unsent.is_empty() {
            return Err(io::Error::other("the session left state that DISCARD ALL does not undo").into());
        }
        if self.side.replies.status() != b'I' {
            self.run("ROLLBACK").await?;
            self.side.replies = Default::default();
        }
        self.run("DISCARD ALL").await?;
        self.notified = Vec::new();
        self.side.discarded();
        Ok(())
    }
}
