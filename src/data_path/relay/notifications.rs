//! Notifications of a session that LISTENs. The pool's shared listener receives them; the session sends them
//! to its client between transactions.
//!
//! After a transaction that may have changed the channels, the server tells them (`after_transaction.rs`),
//! and the shared listener takes over. The end of the client's reply waits for that, and until the shared
//! listener has received what the server got in the transaction: the client gets its own notifications in
//! front of ReadyForQuery, as from PostgreSQL.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};
use tracing::warn;

use super::{
    Relay,
    acquire_server::TEXT_BYTES_MAX,
    session_end::{Loss, SessionEnd},
};
use crate::{
    data_path::{
        exchange::pending_replies::{Origin, Request},
        memory_limit::Charge,
        packed_session::PackedListening,
        pool::shared_listener::{Handover, ListenerLost, Subscription, around_mark},
        server::connection::Server,
        session_state::{
            channels::{Channels, MARKERS, NotificationFilter, statements_for},
            pins::Pins,
        },
    },
    error::ClientError,
    wire::message::append,
};

/// The pause between two attempts to open a shared listener for a session that has come from another process.
const LISTENER_PAUSE: Duration = Duration::from_millis(20);

/// A session's subscription of the pool's shared listener.
#[derive(Debug)]
pub struct Listening {
    channels: Arc<Channels>,
    /// The memory that they take, here and at the shared listener.
    charge: Charge,
    /// Dropping it unsubscribes.
    subscription: Subscription,
}

impl Relay {
    /// Makes the server listen to the client's channels, in the same write as the client's next request.
    #[cold]
    pub(super) fn listen_along(listening: &Listening, server: &mut Server, out: &mut Vec<u8>) {
        let side = &mut server.side;
        append(out, b'Q', |out| {
            out.extend_from_slice(statements_for("LISTEN", listening.channels.iter()).as_bytes());
            out.push(0);
        });
        let _ = side.replies.track(Request::Query(None), Origin::Proxy);
        side.statements.set_unnamed(0);
        side.notifications.channels = Some(listening.channels.clone());
    }

    /// Sends the client its notifications, if it is between two transactions.
    #[cold]
    pub(super) fn send_notifications(&mut self) {
        let between = self
            .server
            .as_ref()
            .is_none_or(|server| server.side.replies.is_over() && !server.side.mid_message());
        if between && self.held_reply.is_empty() && self.session.unsent.is_empty() {
            self.session.unsent.push(&self.session.handle.take_notifications());
        }
    }

    /// The session has borrowed a server. Its client gets what was sent before the request, which the request
    /// may UNLISTEN: PostgreSQL has sent that by then.
    #[cold]
    pub(super) async fn catch_up(&mut self) {
        let Some(listening) = &self.listening else { return };
        if self.may_unlisten(&self.session.inbox) {
            // A shared listener that is lost has ended this session already.
            let _ = listening.subscription.caught_up().await;
        }
        self.session.unsent.push(&self.session.handle.take_notifications());
    }

    /// Whether the client's request may UNLISTEN, as far as its text shows.
    #[cold]
    pub(super) fn may_unlisten(&self, request: &[u8]) -> bool {
        const WORDS: [&[u8]; 2] = [b"unlisten", b"discard"];
        let bound = self.bound_text(request).unwrap_or_default();
        [request, &bound].into_iter().any(|text| {
            let text = text.get(..TEXT_BYTES_MAX).unwrap_or(text);
            WORDS.iter().any(|word| text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word)))
        })
    }

    /// The session listens to these channels from now on: the shared listener takes over. Where it cannot,
    /// the server stays pinned to the session.
    pub(super) async fn subscribe(&mut self, channels: Channels, pins: &mut Pins) -> Result<(), SessionEnd> {
        let before = self.listening.as_ref().map(|listening| &*listening.channels);
        if before.unwrap_or(&Channels::default()) == &channels {
            pins.remove(Pins::LISTEN);
            return Ok(());
        }
        let mut charge = Charge::default();
        let few = channels.len() <= self.pool.rules.channels_max
            && charge.try_set(&self.session.side.rules().memory, channels.bytes()).is_ok();
        let channels = Arc::new(channels);
        let mut taken = match few {
            true => self.move_to_listener(channels.clone(), &channels).await,
            false => Err(ClientError::NotSupported("too many channels".to_owned()).into()),
        };
        if let Err(SessionEnd::Refused(reason)) = &taken {
            warn!(
                tenant = self.pool.tenant.name,
                login = self.session.handle.login.name,
                connection = self.session.handle.process_id,
                %reason,
                "shared listener cannot serve this session; session pinned"
            );
            if self.pool.current().is_none_or(|pool| pool.is_paused()) {
                return Err(ClientError::ListenerPaused.into());
            }
            pins.insert(Pins::LISTEN);
            if self.listening.is_none() {
                return Ok(());
            }
            taken = self.move_to_listener(Arc::default(), &channels).await;
        } else {
            pins.remove(Pins::LISTEN);
            if let Some(listening) = self.listening.as_mut() {
                listening.charge = charge;
            }
        }
        taken
    }

    /// From a marker on, the session gets these channels, and no others, from the shared listener. `listened`:
    /// all channels that it listens to.
    async fn move_to_listener(
        &mut self,
        channels: Arc<Channels>,
        listened: &Channels,
    ) -> Result<(), SessionEnd> {
        let (before, subscription) = match self.listening.take() {
            Some(Listening { channels, subscription, .. }) => (channels, subscription),
            None => {
                let memory = &self.session.side.rules().memory;
                (Arc::default(), self.pool.subscribe(&self.session.handle, memory).await?)
            }
        };
        let outcome = self.exchange_marker(&subscription, &channels, listened).await;
        let now = if outcome.is_ok() { channels } else { before };
        if !now.is_empty() {
            self.listening = Some(Listening { channels: now, charge: Charge::default(), subscription });
        }
        outcome
    }

    /// The server and the shared listener both receive the marker. Before it, the server's notifications
    /// count for channels that the session has not subscribed to yet; behind it, for channels that it does
    /// not subscribe to any more. The shared listener has also received what was sent since the session's
    /// transaction has ended its LISTEN.
    async fn exchange_marker(
        &mut self,
        subscription: &Subscription,
        channels: &Arc<Channels>,
        listened: &Channels,
    ) -> Result<(), SessionEnd> {
        let Some(server) = self.server.as_mut() else { return Err(SessionEnd::ServerLost(Loss::Protocol)) };
        if server.side.reported_value("client_encoding") != Some(subscription.encoding())
            && !channels.is_empty()
        {
            return Err(ClientError::NotSupported("another client_encoding".to_owned()).into());
        }
        let Handover { mark, done } = subscription.prepare(channels.clone()).await?;
        server.run(&format!("LISTEN {MARKERS}; NOTIFY {MARKERS}, '{mark}'")).await?;
        if !channels.has(MARKERS.as_bytes()) {
            server.run(&format!("UNLISTEN {MARKERS}")).await?;
        }
        done.await.map_err(|_| ListenerLost)?;
        let notified = std::mem::take(&mut server.notified);
        let (before, behind) = around_mark(&notified, &mark);
        let notifications = &mut server.side.notifications;
        let mut bytes = Vec::new();
        notifications.filter_all(before, &mut bytes);
        let received = self.session.handle.take_notifications();
        let received = notifications.without_unlistened(&received, listened);
        bytes.extend(notifications.restore_own(&received));
        notifications.channels = Some(channels.clone()).filter(|channels| !channels.is_empty());
        notifications.filter_all(behind, &mut bytes);
        self.insert_messages(&bytes);
        Ok(())
    }

    /// Passes on the notifications that the server sent while it answered the proxy, except those that the
    /// shared listener sends.
    pub(super) fn pass_notifications(&mut self) {
        let Some(server) = self.server.as_mut() else { return };
        let notified = std::mem::take(&mut server.notified);
        let mut bytes = Vec::new();
        server.side.notifications.filter_all(&notified, &mut bytes);
        self.insert_messages(&bytes);
    }

    /// Sends notifications and ParameterStatus messages: in front of a held reply's ReadyForQuery.
    pub(super) fn insert_messages(&mut self, messages: &[u8]) {
        match self.held_reply.strip_suffix(READY).map(<[u8]>::len) {
            Some(end) => drop(self.held_reply.splice(end..end, messages.iter().copied())),
            None if self.held_reply.is_empty() => self.session.unsent.push(messages),
            // The server sent others behind its ReadyForQuery; these follow them.
            None => self.held_reply.extend_from_slice(messages),
        }
    }

    /// Sends the client the reply that was held back, with notifications in front of its end. A server that
    /// goes back to the pool stops listening.
    pub(super) async fn release_reply(&mut self) -> Result<(), SessionEnd> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        if let Some(listening) = self.listening.as_ref().filter(|_| server.side.notifications.dropped > 0) {
            // A shared listener that is lost has ended this session already.
            let _ = listening.subscription.caught_up().await;
        }
        let mut messages = server.side.notifications.restore_own(&self.session.handle.take_notifications());
        if server.side.reported != *self.session.side.sent_parameters {
            server.side.reported.write_changes(&mut self.session.side.sent_parameters, &mut messages);
        }
        self.insert_messages(&messages);
        self.session.unsent.push(&std::mem::take(&mut self.held_reply));
        let written =
            poll_fn(|cx| Poll::Ready(self.session.unsent.drain(&mut self.session.client, cx))).await;
        if let Err(error) = written {
            return Err(SessionEnd::client_lost(Err(error)));
        }
        if let Some(server) = self.server.as_mut()
            && !server.side.is_pinned(self.session.side.follows())
            && server.side.notifications.channels.is_some()
        {
            server.run("UNLISTEN *").await?;
            // The shared listener has received these as well.
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

impl Relay {
    /// The session's channels, and a mark from which on the shared listener delivers none of them: another process
    /// does. `None`: the listener is lost.
    pub(super) async fn leave_listener(&self) -> Option<(PackedListening, oneshot::Receiver<()>)> {
        let listening = self.listening.as_ref()?;
        let Handover { mark, done } = listening.subscription.prepare(Arc::default()).await.ok()?;
        let channels = listening.channels.iter().map(str::to_owned).collect();
        Some((PackedListening { channels, mark }, done))
    }

    /// A session that has come from another process gets its notifications here from the mark on. Runs on the
    /// session's worker. An error says why that cannot be.
    pub async fn enter_listener(&mut self, packed: PackedListening) -> Result<(), String> {
        let channels = Arc::new(Channels::new(packed.channels));
        let memory = self.session.side.rules().memory.clone();
        let mut charge = Charge::default();
        charge.try_set(&memory, channels.bytes()).map_err(|_| "there is no memory for its channels")?;
        let (began, wait) = (Instant::now(), self.session.query_wait());
        let mut server = self.pool.borrow(began, wait).await.map_err(|error| error.to_string())?;
        let subscription = loop {
            match self.pool.subscribe(&self.session.handle, &memory).await {
                // A process that has just begun gets its part of the host's budget in pieces.
                Err(ClientError::PoolBusy { .. }) if began.elapsed() < wait => sleep(LISTENER_PAUSE).await,
                subscribed => break subscribed.map_err(|error| error.to_string())?,
            }
        };
        if self.session.side.sent_parameters.text("client_encoding") != Some(subscription.encoding()) {
            return Err("it listens with another client_encoding".to_owned());
        }
        let prepared = subscription.prepare_at(packed.mark, channels.clone()).await;
        let Handover { mark, done } = prepared.map_err(|error| error.to_string())?;
        let notified = server.run(&format!("NOTIFY {MARKERS}, '{mark}'")).await;
        notified.map_err(|error| error.to_string())?;
        self.pool.give_back(server);
        done.await.map_err(|_| ListenerLost.to_string())?;
        self.listening = Some(Listening { channels, charge, subscription });
        Ok(())
    }
}

/// ReadyForQuery, idle.
pub(in crate::data_path) const READY: &[u8] = b"Z\0\0\0\x05I";
