//! What others want of a session: that it cancels what runs, that it ends, that its client is told of something. They leave it
//! here and wake the session's own task.

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
        session_state::side_effects::Signal,
        tenant::Place,
    },
    error::ClientError,
};

/// Where others leave what they want of a session.
#[derive(Debug, Default)]
pub(in crate::data_path) struct Mailbox {
    pub(in crate::data_path) waker: Option<Waker>,
    /// NotificationResponses, whole, one behind the other.
    pub(in crate::data_path) notifications: Vec<u8>,
    /// What they take.
    pub(in crate::data_path) charge: Charge,
    /// Boxed: most sessions never get any, and there is a mailbox for each idle client.
    pub(in crate::data_path) signals: Option<Box<Signals>>,
}

impl Mailbox {
    pub(in crate::data_path) fn signals(&mut self) -> &mut Signals {
        self.signals.get_or_insert_default()
    }
}

/// What a session's own task finds in its mailbox.
#[derive(Debug, Default)]
pub struct Signals {
    /// End the session with these words.
    pub end: Option<ClientError>,
    /// The same, once it is between two transactions.
    pub end_when_free: Option<ClientError>,
    /// Cancel what runs; each is dropped when the cancel has settled.
    pub cancels: Vec<oneshot::Sender<()>>,
}

impl Registered {
    /// Signals the session with this number, as one of PostgreSQL's functions does; `false` if there is none at the same place,
    /// where all sessions are the same role.
    pub(in crate::data_path) fn send(&self, signal: Signal, number: i32, place: &Place) -> bool {
        let same = |other: &Place| (other.tenant.id, other.access) == (place.tenant.id, place.access);
        let found = self.sessions().numbered(number);
        let Some(session) = found.filter(|session| session.place().is_some_and(|other| same(&other))) else {
            return false;
        };
        info!(
            tenant = place.tenant.name,
            login = self.login.name,
            connection = self.process_id,
            ?signal,
            other = number,
            "a session signals another one"
        );
        match signal {
            Signal::Cancel => drop(session.cancel()),
            Signal::Terminate => session.end(ClientError::AdminShutdown),
        }
        true
    }
}

impl SessionHandle {
    /// Puts a NotificationResponse where the session's task finds it, counted in `memory`.
    ///
    /// # Errors
    /// So many wait already that there is no room in `bytes_max`, or no memory.
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

    /// Takes the notifications that wait.
    pub fn take_notifications(&self) -> Vec<u8> {
        let mut mailbox = self.mailbox();
        self.signals.fetch_and(!NOTIFIED, Ordering::AcqRel);
        mailbox.charge.clear();
        std::mem::take(&mut mailbox.notifications)
    }
}
