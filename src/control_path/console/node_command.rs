//! Commands to nodes, as an administrator writes them and as they travel to other nodes.

use serde::{Deserialize, Serialize};

/// A command. `T` names a tenant: by its name as it is written, by its id when it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", content = "of", rename_all = "snake_case")]
pub enum NodeCommand<T> {
    /// Read the configuration again.
    Reload,
    /// End the process.
    Shutdown(ShutdownMode),
    /// End every session of a tenant, or all, and lend no server until RESUME.
    Kill(Option<T>),
    /// End one session.
    KillClient(i32),
    /// Close servers as they come back, and lend none until RESUME.
    Pause(Option<T>),
    /// Serve again.
    Resume(Option<T>),
    /// Accept no new session of the tenant.
    Disable(T),
    /// Accept sessions again.
    Enable(T),
    /// Replace the servers by new ones.
    Reconnect(Option<T>),
    /// Return when the servers to be closed are closed.
    WaitClose(Option<T>),
}

/// When SHUTDOWN ends the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownMode {
    /// At once.
    Now,
    /// When all transactions have ended.
    Wait,
}

/// The nodes that a statement is for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Place {
    /// It does not say: those that the command is for by default.
    #[default]
    Default,
    /// `ON ALL NODES`.
    AllNodes,
    /// `ON NODE name`.
    Node(String),
}

impl<T> NodeCommand<T> {
    /// The command's word, for logs.
    pub fn title(&self) -> &'static str {
        match self {
            Self::Reload => "RELOAD",
            Self::Shutdown(_) => "SHUTDOWN",
            Self::Kill(_) => "KILL",
            Self::KillClient(_) => "KILL_CLIENT",
            Self::Pause(_) => "PAUSE",
            Self::Resume(_) => "RESUME",
            Self::Disable(_) => "DISABLE",
            Self::Enable(_) => "ENABLE",
            Self::Reconnect(_) => "RECONNECT",
            Self::WaitClose(_) => "WAIT_CLOSE",
        }
    }

    /// Whether it is for this node only, unless it says otherwise.
    pub fn is_for_one_node(&self) -> bool {
        matches!(self, Self::Reload | Self::Shutdown(_))
    }

    /// The tenant that it names.
    pub fn tenant(&self) -> Option<&T> {
        match self {
            Self::Reload | Self::Shutdown(_) | Self::KillClient(_) => None,
            Self::Disable(tenant) | Self::Enable(tenant) => Some(tenant),
            Self::Kill(tenant)
            | Self::Pause(tenant)
            | Self::Resume(tenant)
            | Self::Reconnect(tenant)
            | Self::WaitClose(tenant) => tenant.as_ref(),
        }
    }
}

impl NodeCommand<String> {
    /// The tenant or client that it names; empty if it names none.
    pub fn subject(&self) -> String {
        match self {
            Self::KillClient(id) => id.to_string(),
            other => other.tenant().cloned().unwrap_or_default(),
        }
    }

    /// The same with the id of its tenant; 0 if it names none.
    pub fn with_id(&self, id: i64) -> NodeCommand<i64> {
        let scope = |tenant: &Option<String>| tenant.as_ref().map(|_| id);
        match self {
            Self::Reload => NodeCommand::Reload,
            Self::Shutdown(mode) => NodeCommand::Shutdown(*mode),
            Self::Kill(tenant) => NodeCommand::Kill(scope(tenant)),
            Self::KillClient(client) => NodeCommand::KillClient(*client),
            Self::Pause(tenant) => NodeCommand::Pause(scope(tenant)),
            Self::Resume(tenant) => NodeCommand::Resume(scope(tenant)),
            Self::Disable(_) => NodeCommand::Disable(id),
            Self::Enable(_) => NodeCommand::Enable(id),
            Self::Reconnect(tenant) => NodeCommand::Reconnect(scope(tenant)),
            Self::WaitClose(tenant) => NodeCommand::WaitClose(scope(tenant)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes of another version read it.
    #[test]
    fn a_command_travels_as_json() {
        for (command, json) in [
            (NodeCommand::Pause(Some(7)), r#"{"command":"pause","of":7}"#),
            (NodeCommand::Pause(None), r#"{"command":"pause","of":null}"#),
            (NodeCommand::KillClient(-3), r#"{"command":"kill_client","of":-3}"#),
            (NodeCommand::Shutdown(ShutdownMode::Wait), r#"{"command":"shutdown","of":"wait"}"#),
            (NodeCommand::Reload, r#"{"command":"reload"}"#),
        ] {
            assert_eq!(serde_json::to_string(&command).unwrap(), json);
            assert_eq!(serde_json::from_str::<NodeCommand<i64>>(json).unwrap(), command);
        }
    }
}
