//! What the proxy keeps of a request until its reply has come. Pure.

use std::sync::Arc;

use crate::{
    data_path::prepared::{
        StatementName, parse_settings::ParseSettings, sql_prepare_effects::PrepareEffects,
    },
    error::RequestError,
};

/// Origin of a request: it decides which replies the client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The client sent it and gets the reply.
    Client,
    /// The proxy puts it in so that the client's next request works on this server. The client gets an error,
    /// and no other reply.
    Prepare,
    /// As `Prepare`, in a batch of its own: the client gets neither reply nor error.
    TryPrepare,
    /// The proxy's own request: the client gets no reply. An error closes both connections.
    Proxy,
    /// As `Proxy`, for a setting that the session may lose: an error ends nothing.
    Restore,
    /// Sent in place of a client's request, to fail: the client gets the error in the proxy's words.
    Denied(RequestError),
}

impl Origin {
    /// Whether it is part of the client's batch, and is skipped with it.
    pub fn is_for_client(self) -> bool {
        matches!(self, Self::Client | Self::Prepare | Self::Denied(_))
    }
}

/// A request, as far as its reply or its failure matters.
#[derive(Debug, Clone)]
pub enum Request {
    /// Parse. With a name: to be taken back if it fails. `None`: of the unnamed statement.
    Parse(Option<Box<StatementName>>),
    /// Parse of a named statement under the client's own name: nothing to take back.
    ParseAsIs,
    /// Parse of a name that exists: the server refuses it. Nothing to take back.
    ParseTaken(Box<StatementName>),
    /// Bind.
    Bind,
    /// Describe.
    Describe,
    /// The proxy's Describe of a statement that was just parsed: its columns and parameters are compared with
    /// those that the client was told.
    DescribeParsed(Box<StatementName>),
    /// Execute, with the effects of the PREPARE or DEALLOCATE in its portal.
    Execute(Option<Box<PrepareEffects>>),
    /// The proxy asks for the server's present settings, within the client's batch.
    AskSettings(Arc<ParseSettings>),
    /// Execute that gives the server a setting of the session, in a batch of its own.
    RestoreSetting(Box<str>),
    /// Close. With a name: to be restored if it is skipped.
    Close(Option<Box<StatementName>>),
    /// Close of the unnamed statement.
    CloseUnnamed,
    /// A message of a batch that can only fail: it is cut short, or a Flush with a body.
    Invalid,
    /// Sync.
    Sync,
    /// A simple query, with the effects of its PREPARE and DEALLOCATE statements.
    Query(Option<Box<PrepareEffects>>),
    /// FunctionCall.
    FunctionCall,
    /// CopyDone or CopyFail, sent before the server has asked for data. It gets no reply; it marks the Syncs
    /// that the server takes for part of the data.
    CopyEnd,
}

/// A reply that the server owes.
#[derive(Debug, Clone)]
pub struct PendingReply {
    /// The request that it answers.
    pub request: Request,
    /// Its origin.
    pub origin: Origin,
}

impl PendingReply {
    /// Whether it may change the client's unnamed statement.
    pub fn changes_unnamed(&self) -> bool {
        self.origin == Origin::Client
            && matches!(self.request, Request::Parse(None) | Request::CloseUnnamed | Request::Query(_))
    }
}
