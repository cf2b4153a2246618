//! The server's answers about a parsed statement: its row description, and the settings under which it was
//! parsed.

use std::sync::Arc;

use super::{client_side::ClientSide, parse_under::ParseContext, server_side::ServerSide};
use crate::{
    data_path::{
        prepared::{StatementName, parse_settings::ParseSettings},
        session_state::Settings,
    },
    wire::frame::HEADER_BYTES,
};

impl ServerSide {
    /// The settings under which a text is parsed now; `None`: only the server knows. `under` are the
    /// session's settings at the beginning of the transaction.
    #[inline]
    pub(super) fn parsing<'s>(&'s self, under: &'s Arc<ParseSettings>) -> Option<&'s Arc<ParseSettings>> {
        ParseContext::under(under, &self.checks, &self.replies)
    }

    /// The row description of a parsed statement is complete.
    #[cold]
    pub(super) fn described(&mut self, name: StatementName, client: &mut ClientSide) {
        let StatementName { client_name, statement } = name;
        let description = self.description.finish();
        let known =
            description.map(|description| (description, *statement.description.get_or_init(|| description)));
        let Some((description, _)) = known.filter(|(description, known)| description != known) else {
            // The description is the expected one: a later change is a new one.
            let _ = self.awaited_description.take_if(|(awaited, _)| awaited.is(&statement));
            return self.statements.confirmed(&statement);
        };
        // It differs from the description that clients were told: they must get an error.
        self.statements.failed(&statement);
        match client_name {
            Some(name) => {
                let redescribed = client.rules().shared_statements.with_description(&statement, description);
                // The name may have been removed by a Close that the server will skip.
                self.replies.closes_instead(&name, &statement, &redescribed);
                if client.statements.get(&name).is_some_and(|known| known.is(&statement)) {
                    client.statements.insert(&name, redescribed);
                }
            }
            None => {
                if let Some((_, changed)) =
                    self.awaited_description.as_mut().filter(|(awaited, _)| awaited.is(&statement))
                {
                    *changed = true;
                }
            }
        }
    }

    #[cold]
    pub(super) fn add_setting(&mut self, row: &[u8]) {
        self.settings_answer = self.settings_answer.take().and_then(|settings| with_setting(settings, row));
    }

    #[cold]
    pub(super) fn complete_settings(&mut self, settings: &ParseSettings) {
        let answer = self.settings_answer.replace(Settings::default());
        answer.into_iter().for_each(|answer| settings.set_values(&answer));
    }
}

/// Adds the setting in a DataRow; `None` if it cannot be read.
fn with_setting(mut settings: Settings, row: &[u8]) -> Option<Settings> {
    let mut values = row.get(HEADER_BYTES + 2..)?;
    let mut next = || {
        let (length, rest) = values.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        values = rest;
        std::str::from_utf8(value).ok()
    };
    let (name, value) = (next()?, next()?);
    settings.set(name, Some(value));
    Some(settings)
}
