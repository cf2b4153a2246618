//! A session, apart from its pool and its server: everything that it takes along when it changes its tenant.

use std::{sync::Arc, time::Duration};

use super::end_of_input::EndOfInput;
use crate::{
    data_path::{
        exchange::ClientSide, proxy::Proxy, sessions::registry::Registered,
        tenant_switch::switcher::TenantSwitcher,
    },
    error::ClientError,
    wire::{stream::Stream, unsent::Unsent},
};

/// A session, without what belongs to its pool.
#[derive(Debug)]
pub struct ClientSession {
    pub client: Stream,
    /// Bytes that the client has not taken yet.
    pub unsent: Unsent,
    /// The client's side of an exchange.
    pub side: ClientSide,
    /// Messages of the client that no server has got.
    pub inbox: Vec<u8>,
    /// The client sends no more.
    pub end_of_input: Option<Box<EndOfInput>>,
    /// Its entry in the registry of sessions.
    pub handle: Registered,
    /// The session ends with this error at its next transaction boundary.
    pub leaving: Option<Box<ClientError>>,
    /// Of a service login's session: chooses its tenant.
    pub switcher: Option<Box<TenantSwitcher>>,
    /// What it has done so far.
    pub traffic: Traffic,
    pub proxy: Arc<Proxy>,
}

impl ClientSession {
    /// `query_wait_timeout`, as it is configured now.
    pub fn query_wait(&self) -> Duration {
        self.proxy.config.load().timeouts.query_wait
    }
}

/// What a session has done, for the line that its end leaves in the log.
#[derive(Debug, Clone, Copy, Default)]
pub struct Traffic {
    /// Transactions that servers have run for it.
    pub transactions: u64,
    /// Bytes from its client.
    pub bytes_in: u64,
    /// Bytes to its client.
    pub bytes_out: u64,
}
