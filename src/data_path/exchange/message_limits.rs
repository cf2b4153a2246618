//! What is kept of what a client asks, within its limits. What exceeds one is an error of that statement, as far as it can be
//! told before a server has run it.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_messages::{ClientMessages, GOES_ON},
    client_side::{ClientSide, SessionRules},
    ensure_prepared::WaitReason,
    server_side::ServerSide,
};
use crate::{
    data_path::{
        memory_limit::{Account, Charge},
        prepared::{ClientStatements, Statement, UNNAMED_BYTES_KEPT},
        session_state::{Settings, side_effects::SideEffects},
    },
    error::{ClientError, Limit, RequestError},
};

/// Bytes of texts and names that may be unanswered, and bytes that are put in front of what a client has sent.
const UNANSWERED_BYTES_MAX: usize = 1 << 20;

/// So many bytes of startup parameters are part of what any session takes.
const STARTUP_BYTES_UNCOUNTED: usize = 1024;

/// What a session takes for the startup parameters that it asks for: they are kept, and what its client is told of them.
///
/// # Errors
/// There is no memory for a session that asks for so much.
pub fn startup_charge(asked: &Settings, memory: &Arc<Account>) -> Result<Charge, ClientError> {
    let mut charge = Charge::default();
    let bytes = asked.bytes();
    if bytes > STARTUP_BYTES_UNCOUNTED {
        charge
            .try_set(memory, 2 * bytes)
            .map_err(|limit| ClientError::MemoryLimit { limit, max: memory.max_of(limit).unwrap_or(0) })?;
    }
    Ok(charge)
}

impl SessionRules {
    /// Whether a client that has these statements may prepare so many more, with so much text.
    ///
    /// # Errors
    /// The limit that would be exceeded.
    pub fn admit(&self, statements: &ClientStatements, more: usize, text: usize) -> Result<(), Limit> {
        let bytes = Statement::memory_of(more, text);
        if statements.len() + more > self.statements_max {
            return Err(Limit::Statements);
        }
        if statements.bytes() + bytes > self.statements_bytes_max {
            return Err(Limit::StatementBytes);
        }
        self.shared_statements.memory.admits(bytes)
    }

    /// Whether a session that has these settings may SET what a text sets.
    ///
    /// # Errors
    /// The limit that would be exceeded.
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

    /// What the client is told.
    pub fn client_error(&self, request_error: RequestError) -> ClientError {
        match request_error {
            RequestError::TenantSwitch(reason) => reason.into(),
            RequestError::Identity(reason) => reason.into(),
            RequestError::ResultChanged => ClientError::ResultChanged,
            RequestError::MemoryLimit(limit) => self.too_much(limit),
        }
    }

    /// The same, of a limit.
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
    /// What is kept for the session counts there from now on.
    pub fn count_in(&mut self, memory: Arc<Account>) {
        self.kept.set(&memory, self.kept.bytes());
        self.holding.set(&memory, self.holding.bytes());
        self.began.set(&memory, self.began.bytes());
        self.rules.memory = memory;
    }

    /// The session has SET this from now on.
    ///
    /// # Errors
    /// The limit that would be exceeded; all is as before then.
    pub fn keep(&mut self, settings: Arc<Settings>) -> Result<(), Limit> {
        let bytes = if Arc::ptr_eq(&settings, &self.startup) { 0 } else { settings.bytes() };
        if bytes > self.rules.settings_bytes_max && bytes > self.kept.bytes() {
            return Err(Limit::SettingBytes);
        }
        self.kept.try_set(&self.rules.memory, bytes)?;
        self.wanted = settings;
        Ok(())
    }
}

impl ServerSide {
    /// Whether so much may be unanswered within the next bytes that each message must be looked at for that. None is so short that
    /// the server would owe more replies for it than it has bytes.
    #[inline]
    pub(super) fn may_fill(&self, replies_max: usize, bytes: usize) -> bool {
        self.replies.pending() + bytes >= replies_max || self.unanswered_bytes + bytes > UNANSWERED_BYTES_MAX
    }

    /// Whether so much is unanswered that nothing more is taken from a client that pipelines.
    fn is_full(&self, replies_max: usize, built: usize) -> bool {
        let owed = self.replies.pending();
        owed >= replies_max
            || owed > 0 && (self.unanswered_bytes > UNANSWERED_BYTES_MAX || built > UNANSWERED_BYTES_MAX)
    }

    /// Whether that is over.
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
    /// Whether so much has been put in front of what the client has sent that a message may have to wait.
    #[inline]
    pub(super) fn is_much_built(&self) -> bool {
        self.out.built() > UNANSWERED_BYTES_MAX
    }

    /// Whether a message must wait because so much is unanswered. Data of a COPY is no request.
    #[cold]
    pub(super) fn is_full(&self, tag: u8) -> bool {
        let is_request = !matches!(tag, b'd' | b'c' | b'f' | b'H');
        is_request && self.server.is_full(self.rules.unanswered_max, self.out.built())
    }

    /// A message is not passed on: its client gets an error in its place.
    #[cold]
    pub(super) fn refuse(&mut self, tag: u8, limit: Limit) -> Result<ControlFlow<WaitReason>, ClientError> {
        self.deny(tag, limit);
        GOES_ON
    }

    /// The same of a Bind, of which more may be to come.
    #[cold]
    pub(super) fn refuse_bind(
        &mut self,
        limit: Limit,
        whole: bool,
    ) -> Result<ControlFlow<WaitReason>, ClientError> {
        self.return_state.denied |= !whole;
        self.refuse(b'B', limit)
    }

    /// Whether the text of an unnamed statement may be kept, and what it sets.
    pub(super) fn admit_unnamed(&self, body: &[u8], side_effects: &SideEffects) -> Result<(), Limit> {
        if body.len() > UNNAMED_BYTES_KEPT {
            self.rules.memory.admits(body.len())?;
        }
        self.rules.admit_settings(&self.server.applied, side_effects)
    }
}
