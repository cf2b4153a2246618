//! What a server owes a reply for, and to whom. Pure.

use std::sync::Arc;

use crate::{
    data_path::prepared::{
        StatementName, parse_settings::ParseSettings, sql_prepare_effects::PrepareEffects,
    },
    error::RequestError,
};

/// On whose behalf a request went to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The client asked: it gets the reply.
    Client,
    /// Put in so that the client's next request works on this server: success is left out, an error is the client's.
    Prepare,
    /// Put in for the client's next request, in a batch of its own: success and error are left out.
    TryPrepare,
    /// Our own bookkeeping: the reply is left out, and an error ends both connections.
    Proxy,
    /// Put in place of what the client asked, to fail: the client gets the error in words of ours.
    Denied(RequestError),
}

impl Origin {
    /// Whether it belongs to what the client asked, and fails with it.
    pub fn is_for_client(self) -> bool {
        matches!(self, Self::Client | Self::Prepare | Self::Denied(_))
    }
}

/// What was asked, as far as its reply or failure matters.
#[derive(Debug, Clone)]
pub enum Request {
    /// Parse, of the unnamed statement where there is no naming; else what to take back if it fails.
    Parse(Option<Box<StatementName>>),
    /// Parse of a named statement that the server gets under the client's name: nothing to take back.
    ParseAsIs,
    /// Parse of a name that is taken, sent to be refused: nothing to take back.
    ParseTaken(Box<StatementName>),
    /// Bind.
    Bind,
    /// Describe.
    Describe,
    /// Describe of a statement that has just been parsed here, for ourselves: is it what its client knows?
    DescribeParsed(Box<StatementName>),
    /// Execute; with what the portal's PREPARE or DEALLOCATE does.
    Execute(Option<Box<PrepareEffects>>),
    /// A question of ours, in the middle of what the client has begun, which settings the server has at that moment.
    AskSettings(Arc<ParseSettings>),
    /// Close; of a named statement what to restore if it is skipped.
    Close(Option<Box<StatementName>>),
    /// Close of the unnamed statement.
    CloseUnnamed,
    /// Sync.
    Sync,
    /// A simple query; with what it does by PREPARE and DEALLOCATE.
    Query(Option<Box<PrepareEffects>>),
    /// FunctionCall.
    FunctionCall,
    /// CopyDone or CopyFail sent before the server has said that it takes data. Gets no reply: it marks which Syncs the
    /// server takes for part of the data.
    CopyEnd,
}

/// A reply the server owes.
#[derive(Debug, Clone)]
pub struct PendingReply {
    /// To which request.
    pub request: Request,
    /// For whom.
    pub origin: Origin,
}

impl PendingReply {
    /// Whether the client asks for another unnamed statement, or takes it away.
    pub fn changes_unnamed(&self) -> bool {
        self.origin == Origin::Client
            && matches!(self.request, Request::Parse(None) | Request::CloseUnnamed | Request::Query(_))
    }
}
