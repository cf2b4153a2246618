//! Runs commands and SHOW on this node, for its own console and for other nodes.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{
    ConsoleContext, ConsoleError, Request,
    node_command::{NodeCommand, ShutdownMode},
};
use crate::{
    data_path::{pool::pause::TenantScope, proxy::Proxy},
    error::ClientError,
    shutdown::Ending,
};

/// Interval at which PAUSE and WAIT_CLOSE check the servers.
const CHECK_EVERY: Duration = Duration::from_millis(20);

/// What a command holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// This node, until the process ends.
    Node,
    /// All nodes: its rows are in the central database.
    Fleet,
    /// All nodes, but the central database does not answer: this node, until it does.
    CutOff,
}

/// This process. Cheap to clone.
#[derive(Clone)]
pub struct ThisNode {
    /// Its clients and pools.
    pub proxy: Arc<Proxy>,
    /// What commands need besides.
    pub context: ConsoleContext,
}

impl ThisNode {
    /// Runs the command. The result is null, or for KILL_CLIENT the number of sessions that were ended.
    pub async fn run(&self, command: &NodeCommand<i64>, reach: Reach) -> Result<Value, ConsoleError> {
        let pools = &self.proxy.pools;
        match command {
            NodeCommand::Reload => self.reload().await?,
            NodeCommand::Shutdown(mode) => self.shut_down(*mode).await?,
            NodeCommand::Kill(tenant) => {
                self.pause(*tenant, reach).await?;
                let reason = ClientError::Ended("KILL".into());
                self.proxy.sessions.end(&reason, |session| tenant.is_none_or(|id| session.is_at(id)));
            }
            NodeCommand::KillClient(id) => {
                let reason = ClientError::Ended("KILL_CLIENT".into());
                return Ok(json!(self.proxy.sessions.end(&reason, |session| session.process_id == *id)));
            }
            NodeCommand::Pause(tenant) => {
                self.pause(*tenant, reach).await?;
                while pools.live(*tenant) > 0 && self.is_paused(*tenant) {
                    tokio::time::sleep(CHECK_EVERY).await;
                }
            }
            NodeCommand::Resume(tenant) => self.resume(*tenant, reach).await?,
            NodeCommand::Disable(tenant) if reach == Reach::Fleet => self.follow_fleet().await?,
            NodeCommand::Disable(tenant) => pools.pauses.set_disabled(*tenant, true),
            NodeCommand::Enable(tenant) => self.enable(*tenant, reach).await?,
            NodeCommand::Reconnect(tenant) => pools.reconnect(*tenant).await,
            NodeCommand::WaitClose(tenant) => {
                while !pools.leaving(*tenant).is_empty() {
                    tokio::time::sleep(CHECK_EVERY).await;
                }
            }
        }
        Ok(Value::Null)
    }

    async fn pause(&self, scope: TenantScope, reach: Reach) -> Result<(), ConsoleError> {
        match reach {
            Reach::Fleet => self.follow_fleet().await,
            Reach::Node | Reach::CutOff => {
                self.proxy.pools.pause(scope);
                Ok(())
            }
        }
    }

    async fn resume(&self, scope: TenantScope, reach: Reach) -> Result<(), ConsoleError> {
        let pools = &self.proxy.pools;
        match reach {
            Reach::Fleet => {
                self.follow_fleet().await?;
                pools.resume(scope);
            }
            Reach::CutOff => pools.resume_for_now(scope),
            Reach::Node if pools.pauses.is_paused_in_fleet(scope) => {
                return Err(held_by_all("paused", "RESUME"));
            }
            Reach::Node => pools.resume(scope),
        }
        Ok(())
    }

    async fn enable(&self, tenant: i64, reach: Reach) -> Result<(), ConsoleError> {
        let pauses = &self.proxy.pools.pauses;
        match reach {
            Reach::Fleet => {
                self.follow_fleet().await?;
                pauses.set_disabled(tenant, false);
            }
            Reach::CutOff => pauses.enable_for_now(tenant),
            Reach::Node if pauses.is_disabled_in_fleet(tenant) => {
                return Err(held_by_all("disabled", "ENABLE"));
            }
            Reach::Node => pauses.set_disabled(tenant, false),
        }
        Ok(())
    }

    async fn follow_fleet(&self) -> Result<(), ConsoleError> {
        Ok(self.context.fleet.pauses.apply().await?)
    }

    fn is_paused(&self, scope: TenantScope) -> bool {
        let pauses = &self.proxy.pools.pauses;
        scope.map_or_else(|| pauses.all_paused(), |tenant| pauses.is_paused(tenant))
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

    /// Ends the process.
    pub async fn shut_down(&self, mode: ShutdownMode) -> Result<(), ConsoleError> {
        self.request(Request::Shutdown(match mode {
            ShutdownMode::Now => Ending::Now,
            ShutdownMode::Wait => Ending::Drain { at_most: None },
        }))
        .await
    }

    async fn request(&self, request: Request) -> Result<(), ConsoleError> {
        self.context.requests.send(request).await.map_err(|_| ending())
    }
}

fn held_by_all(what: &str, command: &str) -> ConsoleError {
    ConsoleError::new("55000", format!("it is {what} on all nodes"))
        .hint(format!("{command} without ON NODE ends that."))
}

fn ending() -> ConsoleError {
    ConsoleError::new("57P01", "the process is ending")
}
