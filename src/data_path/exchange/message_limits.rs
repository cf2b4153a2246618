//! Limits on what a client's messages make the proxy keep. A message over a limit fails like a failed
//! statement, as far as the proxy can tell before a server has run it.

use std::sync::Arc;

use super::{
    client_messages::{CONTINUE, ClientMessages, Handled},
    client_side::{ClientSide, SessionRules},
    server_side::ServerSide,
    skipped_messages::is_no_request,
};
use crate::{
    data_path::{
        memory_limit::{Account, Charge},
        prepared::{ClientStatements, Statement, UNNAMED_BYTES_KEPT, statement_text::stored_bytes},
        session_state::{Settings, side_effects::SideEffects},
    },
    error::{ClientError, Limit, RequestError},
};

/// Most bytes of texts and names with pending replies, and most that the proxy adds to a client's messages.
const UNANSWERED_BYTES_MAX: usize = 1 << 20;

/// Startup parameters up to this many bytes are not charged.
const STARTUP_BYTES_UNCOUNTED: usize = 1024;

/// The memory charge for startup parameters: the proxy keeps them twice, as requested and as reported.
pub fn startup_charge(startup: &Settings, memory: &Arc<Account>) -> Result<Charge, ClientError> {
    let mut charge = Charge::default();
    let bytes = startup.bytes();
    if bytes > STARTUP_BYTES_UNCOUNTED {
        charge
            .try_set(memory, 2 * bytes)
            .map_err(|limit| ClientError::MemoryLimit { limit, max: memory.max_of(limit).unwrap_or(0) })?;
    }
    Ok(charge)
}

impl SessionRules {
    /// Checks that a client with these statements may prepare `body` by this name.
    pub fn admit_text(&self, statements: &ClientStatements, name: &[u8], body: &[u8]) -> Result<(), Limit> {
        // What a long text really takes is found out only where its length is too much.
        self.admit(statements, 1, name.len() + body.len()).or_else(|limit| match stored_bytes(body) {
            bytes if bytes < body.len() => self.admit(statements, 1, name.len() + bytes),
            _ => Err(limit),
        })
    }

    /// Checks that a client with these statements may prepare `more` of them with `text` stored bytes.
    pub fn admit(&self, statements: &ClientStatements, more: usize, text: usize) -> Result<(), Limit> {
        let bytes = Statement::memory_of(more, text);
        if statements.len() + more > self.statements_max {
            return Err(Limit::Statements);
        }
        if statements.bytes() + bytes > self.statements_bytes_max {
            return Err(Limit::StatementBytes);
        }
        self.shared_statements.admits(bytes)
    }

    /// Checks that a session with these settings may run a text that sets parameters.
    #[inline]
    pub fn admit_settings(&self, settings: &Settings, side_effects: &SideEffects) -> Result<(), Limit> {
        if side_effects.set_bytes == 0 { Ok(()) } else { self.admit_set(settings, side_effects) }
    }

    #[cold]
    fn admit_set(&self, settings: &Settings, side_effects: &SideEffects) -> Result<(), Limit> {
        let names = side_effects.names.as_deref().unwrap_or_default();
        if settings.bytes_with(names, side_effects.set_bytes) > self.settings_bytes_max {
            return Err(Limit::SettingBytes);
        }
        self.memory.admits(side_effects.set_bytes)
    }

    /// The client's error for a rejected request.
    pub fn client_error(&self, request_error: RequestError) -> ClientError {
        match request_error {
            RequestError::TenantSwitch(reason) => reason.into(),
            RequestError::Identity(reason) => reason.into(),
            RequestError::ResultChanged => ClientError::ResultChanged,
            RequestError::MemoryLimit(limit) => self.too_much(limit),
        }
    }

    /// The client's error for an exceeded limit.
    pub fn too_much(&self, limit: Limit) -> ClientError {
        let max = match limit {
            Limit::Statements => self.statements_max,
            Limit::StatementBytes => self.statements_bytes_max,
            Limit::SettingBytes => self.settings_bytes_max,
            other => {
                self.memory.max_of(other).or_else(|| self.shared_statements.memory.max_of(other)).unwrap_or(0)
            }
        };
        ClientError::MemoryLimit { limit, max }
    }
}

impl ClientSide {
    /// Charges the session's memory to this account from now on.
    pub fn count_in(&mut self, memory: Arc<Account>) {
        self.settings_memory.set(&memory, self.settings_memory.bytes());
        self.message_memory.set(&memory, self.message_memory.bytes());
        self.startup_memory.set(&memory, self.startup_memory.bytes());
        self.rules.memory = memory;
    }

    /// Replaces the session's settings. Nothing changes on an error.
    pub fn keep(&mut self, settings: Arc<Settings>) -> Result<(), Limit> {
        let bytes = if Arc::ptr_eq(&settings, &self.startup) { 0 } else { settings.bytes() };
        if bytes > self.rules.settings_bytes_max && bytes > self.settings_memory.bytes() {
            return Err(Limit::SettingBytes);
        }
        self.settings_memory.try_set(&self.rules.memory, bytes)?;
        self.wanted_custom = self.rules.shared_statements.custom_names.of(&settings);
        self.custom.insert(self.wanted_custom);
        self.wanted = settings;
        Ok(())
    }
}

impl ServerSide {
    /// Whether the next `bytes` may reach a limit on pending replies, so that each message must be checked. A
    /// message is never shorter in bytes than the number of replies it causes.
    #[inline]
    pub(super) fn may_fill(&self, replies_max: usize, bytes: usize) -> bool {
        self.replies.pending() + bytes >= replies_max || self.unanswered_bytes + bytes > UNANSWERED_BYTES_MAX
    }

    /// Whether too much is pending to take another request.
    fn is_full(&self, replies_max: usize, built: usize) -> bool {
        let pending = self.replies.pending();
        pending >= replies_max
            || pending > 0 && (self.unanswered_bytes > UNANSWERED_BYTES_MAX || built > UNANSWERED_BYTES_MAX)
    }

    /// Whether enough replies have arrived since to take requests again.
    pub fn has_room(&mut self, replies_max: usize) -> bool {
        let bytes_max = if self.unanswered_bytes > UNANSWERED_BYTES_MAX { 0 } else { replies_max / 2 };
        let has_room = self.replies.pending() <= bytes_max || self.replies.takes_copy_data();
        if has_room {
            self.unanswered_bytes = 0;
        }
        has_room
    }
}

impl ClientMessages<'_, '_> {
    /// Whether the proxy has added so much that messages must be checked one by one.
    #[inline]
    pub(super) fn is_much_built(&self) -> bool {
        self.out.built() > UNANSWERED_BYTES_MAX
    }

    /// Whether a message must wait because too much is pending. COPY data is no request.
    #[cold]
    pub(super) fn is_full(&self, tag: u8, length: usize) -> bool {
        !is_no_request(tag, length) && self.server.is_full(self.rules.unanswered_max, self.out.built())
    }

    #[cold]
    pub(super) fn reject_over_limit(&mut self, tag: u8, limit: Limit) -> Handled {
        self.reject(tag, limit);
        CONTINUE
    }

    /// Checks that the text of an unnamed statement, and what it sets, may be kept.
    pub(super) fn admit_unnamed(&self, body: &[u8], side_effects: &SideEffects) -> Result<(), Limit> {
        if body.len() > UNNAMED_BYTES_KEPT {
            self.rules.memory.admits(body.len())?;
        }
        self.rules.admit_settings(&self.server.applied, side_effects)
    }
}
