//! Signals to a session from other tasks: cancel the running statement, end, forward notifications. They are
//! left in the session's mailbox, and the session's task is woken.

use std::{
    sync::{Arc, atomic::Ordering},
    task::Waker,
};

use tokio::sync::oneshot;
use tracing::info;

use super::registry::{NOTIFIED, Registered, SessionHandle};
use crate::{
    data_path::{
        memory_limit::{Account, Charge},
        session_state::side_effects::BackendSignal,
        tenant::TenantAccess,
    },
    error::ClientError,
};

/// The signals that wait for a session's task.
#[derive(Debug, Default)]
pub(in crate::data_path) struct Mailbox {
    pub(in crate::data_path) waker: Option<Waker>,
    /// Complete NotificationResponse messages.
    pub(in crate::data_path) notifications: Vec<u8>,
    /// Their memory.
    pub(in crate::data_path) charge: Charge,
    /// Boxed, because each idle client has a mailbox and most never get a signal.
    pub(in crate::data_path) signals: Option<Box<Signals>>,
}

impl Mailbox {
    pub(in crate::data_path) fn signals(&mut self) -> &mut Signals {
        self.signals.get_or_insert_default()
    }
}

/// Signals for a session's task.
#[derive(Debug, Default)]
pub struct Signals {
    /// End the session with this error.
    pub end: Option<ClientError>,
    /// End the session with this error when no transaction is open.
    pub end_when_free: Option<ClientError>,
    /// End the session with this error if it is still idle, without a server.
    pub end_if_idle: Option<ClientError>,
    /// Cancel the running statement. The senders are dropped when the cancel is complete.
    pub cancels: Vec<oneshot::Sender<()>>,
}

impl Registered {
    /// Signals the session with this process number, for `pg_cancel_backend` and `pg_terminate_backend`.
    /// Returns `false` if no session of the same tenant and access has it: only these have the same role.
    pub(in crate::data_path) fn send(
        &self,
        signal: BackendSignal,
        number: i32,
        tenant_access: &TenantAccess,
    ) -> bool {
        let same = |other: &TenantAccess| {
            (other.tenant.id, other.access) == (tenant_access.tenant.id, tenant_access.access)
        };
        let found = self.sessions().numbered(number);
        let Some(session) = found.filter(|session| session.tenant_access().is_some_and(|other| same(&other)))
        else {
            return false;
        };
        info!(
            tenant = tenant_access.tenant.name,
            login = self.login.name,
            connection = self.process_id,
            signal = match signal {
                BackendSignal::Cancel => "cancel",
                BackendSignal::Terminate => "terminate",
            },
            other = number,
            "session signals another session"
        );
        match signal {
            BackendSignal::Cancel => drop(session.cancel()),
            BackendSignal::Terminate => session.end(ClientError::AdminShutdown),
        }
        true
    }
}

impl SessionHandle {
    /// Leaves a NotificationResponse for the session's task, charged to `memory`. Fails if the waiting
    /// notifications would exceed `bytes_max`, or a memory limit.
    pub fn notify(&self, message: &[u8], bytes_max: usize, memory: &Arc<Account>) -> Result<(), ClientError> {
        let mut mailbox = self.mailbox();
        if mailbox.notifications.len() + message.len() > bytes_max {
            return Err(ClientError::TooManyNotifications { limit: bytes_max });
        }
        let Mailbox { notifications, charge, .. } = &mut *mailbox;
        notifications.extend_from_slice(message);
        if notifications.capacity() != charge.bytes()
            && let Err(limit) = charge.try_set(memory, notifications.capacity())
        {
            let max = memory.max_of(limit).unwrap_or(0);
            return Err(ClientError::UnsentLimit { limit, max });
        }
        self.signals.fetch_or(NOTIFIED, Ordering::AcqRel);
        let waker = mailbox.waker.clone();
        drop(mailbox);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    pub fn take_notifications(&self) -> Vec<u8> {
        let mut mailbox = self.mailbox();
        self.signals.fetch_and(!NOTIFIED, Ordering::AcqRel);
        mailbox.charge.clear();
        std::mem::take(&mut mailbox.notifications)
    }
}
