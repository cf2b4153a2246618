//! Servers for sessions that set `temp_buffers`.
//!
//! PostgreSQL takes another value only in a session that has not used a temporary table yet, and a server
//! that has used one stays as it is (`session_state/temporary_use.rs`). Nothing else depends on that, so only
//! sessions that set the parameter get another server: an idle one, or a new one in its place.

use std::sync::{Arc, atomic::Ordering};

use super::{Pool, PooledServer};
use crate::{
    data_path::session_state::temporary_use::{NewTempBuffers, TemporaryUse},
    error::ClientError,
};

/// How many idle servers are looked at.
const LOOKS_MAX: usize = 8;

impl Pool {
    /// Whether a server has used temporary tables. If not, every server takes every value.
    #[inline]
    pub fn has_used_temporary(&self) -> bool {
        self.used_temporary.load(Ordering::Relaxed)
    }

    /// A session whose `temp_buffers` is `value` may have used temporary tables on a server.
    #[cold]
    pub fn note_temporary_use(&self, used: &mut TemporaryUse, value: Option<&str>) {
        self.used_temporary.store(true, Ordering::Relaxed);
        used.note(value);
    }

    /// This server, or another one that takes these `temp_buffers`. Errors: as [`Pool::borrow`].
    #[cold]
    pub async fn taking_temp_buffers(
        self: &Arc<Self>,
        server: Box<PooledServer>,
        new: NewTempBuffers<'_>,
    ) -> Result<Box<PooledServer>, ClientError> {
        let takes = |server: &PooledServer| server.side.temporary_use.takes(new);
        if takes(&server) {
            return Ok(server);
        }
        let (mut others, mut found) = (vec![server], None);
        while others.len() < LOOKS_MAX && found.is_none() {
            match self.try_borrow() {
                Some(server) if takes(&server) => found = Some(server),
                Some(server) => others.push(server),
                None => break,
            }
        }
        let replaced = if found.is_none() { others.pop() } else { None };
        others.into_iter().rev().for_each(|server| self.put(server));
        match (found, replaced) {
            (Some(server), _) => Ok(server),
            (None, Some(server)) => {
                let mut server = self.restart(server, Default::default()).await?;
                // If role or database have other settings now, the pool is replaced; this session may go on.
                match self.has_same_start(&mut server).await {
                    Ok(_) => Ok(server),
                    Err(_) => Err(ClientError::ServerLost),
                }
            }
            (None, None) => Err(ClientError::Internal),
        }
    }
}
