//! Which of PostgreSQL's catalogs a host hides from the role of a pool. Asked of the pool's first server, and
//! again when a query is refused.

use std::sync::atomic::{AtomicU32, Ordering};

use tracing::info;

use super::Pool;
use crate::data_path::{
    server::connection::{AskError, Server},
    session_state::server_role::HiddenCatalogs,
};

/// What a pool knows of them.
#[derive(Debug)]
pub(super) struct KnownCatalogs(AtomicU32);

const UNKNOWN: u32 = u32::MAX;

impl Default for KnownCatalogs {
    fn default() -> Self {
        Self(AtomicU32::new(UNKNOWN))
    }
}

impl KnownCatalogs {
    /// The hidden ones; `None` before a server was asked.
    pub fn hidden(&self) -> Option<HiddenCatalogs> {
        match self.0.load(Ordering::Relaxed) {
            UNKNOWN => None,
            bits => Some(HiddenCatalogs::from_bits_truncate(bits as u16)),
        }
    }

    /// Stores them; `true`: they are others than before.
    fn set(&self, hidden: HiddenCatalogs) -> bool {
        self.0.swap(hidden.bits().into(), Ordering::Relaxed) != u32::from(hidden.bits())
    }
}

impl Pool {
    /// Asks a server which catalogs are hidden, and notes it for this server and later ones.
    pub async fn look_for_hidden_catalogs(&self, server: &mut Server) -> Result<(), AskError> {
        let (mut hidden, mut names) = (HiddenCatalogs::default(), Vec::new());
        if is_hidden(server, &HiddenCatalogs::probe_all()).await? {
            for (catalog, name, probe) in HiddenCatalogs::PROBES {
                if is_hidden(server, probe).await? {
                    hidden.insert(catalog);
                    names.push(name);
                }
            }
        }
        server.side.role.hidden = hidden;
        if self.catalogs.set(hidden) && !hidden.is_empty() {
            info!(
                tenant = self.tenant.name,
                host = self.tenant.host.name,
                hidden = names.join(", "),
                "catalogs are hidden from the tenant's role; sessions may be pinned for longer"
            );
        }
        Ok(())
    }

    /// As [`Self::look_for_hidden_catalogs`], unless another server of the pool was asked.
    pub(super) async fn note_hidden_catalogs(&self, server: &mut Server) -> Result<(), AskError> {
        match self.catalogs.hidden() {
            Some(hidden) => server.side.role.hidden = hidden,
            None => self.look_for_hidden_catalogs(server).await?,
        }
        Ok(())
    }
}

async fn is_hidden(server: &mut Server, probe: &str) -> Result<bool, AskError> {
    match server.ask(probe, &[]).await {
        Ok(_) => Ok(false),
        Err(AskError::Refused(error)) if error.is_denied() => Ok(true),
        Err(error) => Err(error),
    }
}
