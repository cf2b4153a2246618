//! Commands to this node only: PAUSE, KILL, RELOAD and so on. They hold until the process ends.

use std::time::Duration;

use tokio::sync::oneshot;

use super::{ConsoleError, Request, Session, statement::NodeCommand};
use crate::{data_path::pool::pause::Whom, error::ClientError, shutdown::Ending};

/// Interval at which PAUSE and WAIT_CLOSE check the servers.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Session {
    /// Runs the command and returns its tag.
    pub(super) async fn act(&mut self, action: &NodeCommand) -> Result<&'static str, ConsoleError> {
        let pools = self.proxy.pools.clone();
        Ok(match action {
            NodeCommand::Reload => self.reload().await?,
            NodeCommand::Shutdown(wait) => {
                self.request(Request::Shutdown(Ending::from(*wait))).await?;
                "SHUTDOWN"
            }
            NodeCommand::Kill(tenant) => {
                let whom = self.whom(tenant).await?;
                pools.pause(whom);
                let reason = ClientError::Ended("KILL".into());
                self.proxy.sessions.end(&reason, |session| whom.is_none_or(|id| session.is_at(id)));
                "KILL"
            }
            NodeCommand::KillClient(id) => {
                let reason = ClientError::Ended("KILL_CLIENT".into());
                if self.proxy.sessions.end(&reason, |session| session.process_id == *id) == 0 {
                    return Err(ConsoleError::new("42704", format!("there is no client {id}"))
                        .hint("SHOW CLIENTS has the ids."));
                }
                "KILL_CLIENT"
            }
            NodeCommand::Pause(tenant) => {
                let whom = self.whom(tenant).await?;
                pools.pause(whom);
                while pools.live(whom) > 0 && self.still_paused(whom) {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                "PAUSE"
            }
            NodeCommand::Resume(tenant) => {
                pools.resume(self.whom(tenant).await?);
                "RESUME"
            }
            NodeCommand::Disable(tenant) => {
                pools.halts.set_disabled(self.id_of(tenant).await?, true);
                "DISABLE"
            }
            NodeCommand::Enable(tenant) => {
                pools.halts.set_disabled(self.id_of(tenant).await?, false);
                "ENABLE"
            }
            NodeCommand::Reconnect(tenant) => {
                pools.reconnect(self.whom(tenant).await?).await;
                "RECONNECT"
            }
            NodeCommand::WaitClose(tenant) => {
                let whom = self.whom(tenant).await?;
                while !pools.leaving(whom).is_empty() {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                "WAIT_CLOSE"
            }
        })
    }

    async fn reload(&self) -> Result<&'static str, ConsoleError> {
        let (tell, told) = oneshot::channel();
        self.request(Request::Reload(tell)).await?;
        match told.await {
            Ok(Ok(())) => Ok("RELOAD"),
            Ok(Err(error)) => Err(ConsoleError::new("F0000", format!("nothing was changed: {error}"))),
            Err(_) => Err(ending()),
        }
    }

    async fn request(&self, request: Request) -> Result<(), ConsoleError> {
        self.context.requests.send(request).await.map_err(|_| ending())
    }

    /// Whether RESUME was not run meanwhile.
    fn still_paused(&self, whom: Whom) -> bool {
        let halts = &self.proxy.pools.halts;
        whom.map_or_else(|| halts.all_paused(), |tenant| halts.is_paused(tenant))
    }

    async fn whom(&self, tenant: &Option<String>) -> Result<Whom, ConsoleError> {
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
