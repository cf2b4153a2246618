//! A session that LISTENs: it hears by its pool's ear, and is told between its transactions.
//!
//! When a transaction that may have changed what the session listens to is over, its server has said what that is now
//! (`after_transaction.rs`), and the ear takes over. The reply that ends a transaction waits until then, and until the ear has heard
//! what the server was told of in the transaction: so the client's own notifications come in front of it, as PostgreSQL
//! sends them.

use std::{future::poll_fn, sync::Arc, task::Poll};

use tracing::warn;

use super::{
    Relay,
    session_end::{Loss, SessionEnd},
};
use crate::{
    data_path::{
        memory_limit::Charge,
        pool::shared_listener::{Handover, ListenerLost, Subscription, around_mark},
        server::connection::{AskError, Server},
        session_state::{
            channels::{Channels, MARKERS, NotificationFilter, statements_for},
            pins::Pins,
        },
    },
    error::ClientError,
    wire::message::append,
};

/// What a session hears by its pool's ear.
#[derive(Debug)]
pub struct Listening {
    channels: Arc<Channels>,
    /// What they take, here and at the ear.
    charge: Charge,
    /// Given up by drop.
    subscription: Subscription,
}

/// Why the ear does not take over.
enum ListenError {
    Ear(ClientError),
    Server,
}

impl From<ListenerLost> for ListenError {
    fn from(_: ListenerLost) -> Self {
        Self::Ear(ClientError::ListenerLost)
    }
}

impl From<AskError> for ListenError {
    fn from(_: AskError) -> Self {
        Self::Server
    }
}

impl Relay {
    /// The server listens to what its client listens to; in the same write as the client's next request.
    #[cold]
    pub(in crate::data_path) fn listen_along(heard: &Listening, server: &mut Server, out: &mut Vec<u8>) {
        let side = &mut server.side;
        append(out, b'Q', |out| {
            out.extend_from_slice(statements_for("LISTEN", heard.channels.iter()).as_bytes());
            out.push(0);
        });
        let _ = side.replies.track(
            crate::data_path::exchange::pending_replies::Request::Query(None),
            crate::data_path::exchange::pending_replies::Origin::Proxy,
        );
        side.statements.set_unnamed(0);
        side.notifications.channels = Some(heard.channels.clone());
    }

    /// Tells the client what has been heard for it, if it is between two transactions.
    #[cold]
    pub(in crate::data_path) fn send_notifications(&mut self) {
        let between = self
            .server
            .as_ref()
            .is_none_or(|server| server.side.replies.is_over() && !server.side.mid_message());
        if between && self.held.is_empty() && self.unsent.is_empty() {
            self.unsent.push(&self.handle.take_notifications());
        }
    }

    /// The session listens to this now: the ear takes over. Where it cannot, the server stays with its client.
    pub(in crate::data_path) async fn hear(
        &mut self,
        channels: Channels,
        pins: &mut Pins,
    ) -> Result<(), SessionEnd> {
        let before = self.subscription.as_ref().map(|heard| &*heard.channels);
        if before.unwrap_or(&Channels::default()) == &channels {
            pins.remove(Pins::LISTEN);
            return Ok(());
        }
        let mut charge = Charge::default();
        let few = channels.len() <= self.pool.rules.channels_max
            && charge.try_set(&self.side.rules().memory, channels.bytes()).is_ok();
        let mut taken = match few {
            true => self.hand_over(Arc::new(channels.clone())).await,
            false => Err(ListenError::Ear(ClientError::NotSupported("too many channels".to_owned()))),
        };
        if let Err(ListenError::Ear(reason)) = &taken {
            warn!(tenant = self.pool.tenant.name, login = self.handle.login.name, %reason, "a client that listens keeps its server");
            if self.pool.current().is_none_or(|pool| pool.is_paused()) {
                return Err(SessionEnd::Refused(ClientError::ListenerPaused.into()));
            }
            pins.insert(Pins::LISTEN);
            if self.subscription.is_none() {
                return Ok(());
            }
            taken = self.hand_over(Arc::default()).await;
        } else {
            pins.remove(Pins::LISTEN);
            if let Some(heard) = self.subscription.as_mut() {
                heard.charge = charge;
            }
        }
        taken.map_err(|error| match error {
            ListenError::Ear(reason) => SessionEnd::Refused(reason.into()),
            ListenError::Server => SessionEnd::ServerLost(Loss::Protocol),
        })
    }

    /// From a mark on, the session hears these channels by the ear, and no others.
    async fn hand_over(&mut self, channels: Arc<Channels>) -> Result<(), ListenError> {
        let (before, subscription) = match self.subscription.take() {
            Some(Listening { channels, subscription, .. }) => (channels, subscription),
            None => {
                let memory = &self.side.rules().memory;
                (Arc::default(), self.pool.subscribe(&self.handle, memory).await.map_err(ListenError::Ear)?)
            }
        };
        let outcome = self.change_over(&subscription, &channels).await;
        let now = if outcome.is_ok() { channels } else { before };
        if !now.is_empty() {
            self.subscription = Some(Listening { channels: now, charge: Charge::default(), subscription });
        }
        outcome
    }

    /// Server and ear hear the mark. Of what came before it the client gets from its server what it did not hear by the ear
    /// until now, of what comes behind it what it does not hear by the ear from now on.
    async fn change_over(
        &mut self,
        subscription: &Subscription,
        channels: &Arc<Channels>,
    ) -> Result<(), ListenError> {
        let Some(server) = self.server.as_mut() else { return Err(ListenError::Server) };
        if server.side.reported_value("client_encoding") != Some(subscription.encoding())
            && !channels.is_empty()
        {
            return Err(ListenError::Ear(ClientError::NotSupported("another client_encoding".to_owned())));
        }
        let Handover { mark, done } = subscription.prepare(channels.clone()).await?;
        server.run(&format!("LISTEN {MARKERS}; NOTIFY {MARKERS}, '{mark}'")).await?;
        if !channels.has(MARKERS.as_bytes()) {
            server.run(&format!("UNLISTEN {MARKERS}")).await?;
        }
        done.await.map_err(|_| ListenerLost)?;
        let told = std::mem::take(&mut server.notified);
        let (before, behind) = around_mark(&told, &mark);
        let hearing = &mut server.side.notifications;
        let mut bytes = Vec::new();
        hearing.filter_all(before, &mut bytes);
        bytes.extend(hearing.restore_own(&self.handle.take_notifications()));
        hearing.channels = Some(channels.clone()).filter(|channels| !channels.is_empty());
        hearing.filter_all(behind, &mut bytes);
        self.tell(&bytes);
        Ok(())
    }

    /// The client gets what its server was told of while it answered us, as far as the ear does not hear it.
    pub(in crate::data_path) fn take_told(&mut self) {
        let Some(server) = self.server.as_mut() else { return };
        let told = std::mem::take(&mut server.notified);
        let mut bytes = Vec::new();
        server.side.notifications.filter_all(&told, &mut bytes);
        self.tell(&bytes);
    }

    /// What comes by itself, notifications and ParameterStatus, goes in front of the end of a reply that is kept back.
    pub(in crate::data_path) fn tell(&mut self, messages: &[u8]) {
        match self.held.strip_suffix(READY).map(<[u8]>::len) {
            Some(end) => drop(self.held.splice(end..end, messages.iter().copied())),
            None if self.held.is_empty() => self.unsent.push(messages),
            // They came behind it from the server, and these come behind them.
            None => self.held.extend_from_slice(messages),
        }
    }

    /// Everything is settled: the client gets the reply that was kept back, and in front of its end what has been heard
    /// meanwhile. A server that goes back listens no more.
    pub(in crate::data_path) async fn release_reply(&mut self) -> Result<(), SessionEnd> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        if let Some(heard) = self.subscription.as_ref().filter(|_| server.side.notifications.dropped > 0) {
            // An ear that is lost has ended this session already.
            let _ = heard.subscription.caught_up().await;
        }
        let mut news = server.side.notifications.restore_own(&self.handle.take_notifications());
        if server.side.reported != *self.side.sent_parameters {
            server.side.reported.write_changes(&mut self.side.sent_parameters, &mut news);
        }
        self.tell(&news);
        self.unsent.push(&std::mem::take(&mut self.held));
        let written = poll_fn(|cx| Poll::Ready(self.unsent.drain(&mut self.client, cx))).await;
        if let Err(error) = written {
            return Err(SessionEnd::client_lost(Err(error)));
        }
        if let Some(server) = self.server.as_mut()
            && !server.side.is_pinned(self.side.follows())
            && server.side.notifications.channels.is_some()
        {
            server.run("UNLISTEN *").await.map_err(SessionEnd::from)?;
            // What it was told of meanwhile, the ear has heard as well.
            server.notified.clear();
            server.side.notifications = NotificationFilter {
                process_id: server.side.notifications.process_id,
                client_process_id: server.side.notifications.client_process_id,
                ..NotificationFilter::default()
            };
        }
        Ok(())
    }
}

/// ReadyForQuery, idle.
const READY: &[u8] = b"Z\0\0\0\x05I";
