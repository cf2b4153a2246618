//! Commands to this node only: PAUSE, KILL, RELOAD and so on. They hold until the process ends.

use std::time::Duration;

use tokio::sync::oneshot;

use super::{ConsoleError, Request, Session, statement::NodeCommand};
use crate::{data_path::pool::pause::TenantScope, error::ClientError};

/// Interval at which PAUSE and WAIT_CLOSE check the servers.
const CHECK_EVERY: Duration = Duration::from_millis(20);

impl Session {
    /// Runs the command.
    pub(super) async fn run_node_command(&mut self, command: &NodeCommand) -> Result<(), ConsoleError> {
        let pools = self.proxy.pools.clone();
        match command {
            NodeCommand::Reload => self.reload().await?,
            NodeCommand::Shutdown(ending) => self.request(Request::Shutdown(*ending)).await?,
            NodeCommand::Kill(tenant) => {
                let scope = self.scope_of(tenant).await?;
                pools.pause(scope);
                let reason = ClientError::Ended("KILL".into());
                self.proxy.sessions.end(&reason, |session| scope.is_none_or(|id| session.is_at(id)));
            }
            NodeCommand::KillClient(id) => {
                let reason = ClientError::Ended("KILL_CLIENT".into());
                if self.proxy.sessions.end(&reason, |session| session.process_id == *id) == 0 {
                    return Err(ConsoleError::new("42704", format!("there is no client {id}"))
                        .hint("SHOW CLIENTS has the ids."));
                }
            }
            NodeCommand::Pause(tenant) => {
                let scope = self.scope_of(tenant).await?;
                pools.pause(scope);
                while pools.live(scope) > 0 && self.still_paused(scope) {
                    tokio::time::sleep(CHECK_EVERY).await;
                }
            }
            NodeCommand::Resume(tenant) => pools.resume(self.scope_of(tenant).await?),
            NodeCommand::Disable(tenant) => pools.pauses.set_disabled(self.id_of(tenant).await?, true),
            NodeCommand::Enable(tenant) => pools.pauses.set_disabled(self.id_of(tenant).await?, false),
            NodeCommand::Reconnect(tenant) => pools.reconnect(self.scope_of(tenant).await?).await,
            NodeCommand::WaitClose(tenant) => {
                let scope = self.scope_of(tenant).await?;
                while !pools.leaving(scope).is_empty() {
                    tokio::time::sleep(CHECK_EVERY).await;
                }
            }
        }
        Ok(())
    }

    async fn reload(&self) -> Result<(), ConsoleError> {
        let (sender, result) = oneshot::channel();
        self.request(Request::Reload(sender)).await?;
        match result.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(ConsoleError::new("F0000", format!("nothing was changed: {error}"))),
            Err(_) => Err(ending()),
        }
    }

    async fn request(&self, request: Request) -> Result<(), ConsoleError> {
        self.context.requests.send(request).await.map_err(|_| ending())
    }

    fn still_paused(&self, scope: TenantScope) -> bool {
        let pauses = &self.proxy.pools.pauses;
        scope.map_or_else(|| pauses.all_paused(), |tenant| pauses.is_paused(tenant))
    }

    async fn scope_of(&self, tenant: &Option<String>) -> Result<TenantScope, ConsoleError> {
        match tenant {
            Some(tenant) => Ok(Some(self.id_of(tenant).await?)),
            None => Ok(None),
        }
    }

    async fn id_of(&self, tenant: &str) -> Result<i64, ConsoleError> {
        match self.proxy.directory.tenant(tenant).await {
            Ok(Some(tenant)) => Ok(tenant.id),
            Ok(None) => Err(ConsoleError::new("3D000", format!("there is no tenant \"{tenant}\""))
                .hint("SHOW TENANTS lists them.")),
            Err(error) => Err(ConsoleError::new("58000", error.to_string())),
        }
    }
}

fn ending() -> ConsoleError {
    ConsoleError::new("57P01", "the process is ending")
}
