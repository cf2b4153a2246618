//! What a server says of a statement that was parsed, and of the settings under which it was.

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
    /// What a text is parsed under now; `None`: only the server knows. `under` are the session's own, as they were when the
    /// transaction began.
    #[inline]
    pub(super) fn parsing<'s>(&'s self, under: &'s Arc<ParseSettings>) -> Option<&'s Arc<ParseSettings>> {
        ParseContext::under(under, &self.checks, &self.replies)
    }

    /// A statement has been parsed, and this is what it takes and gives.
    #[cold]
    pub(super) fn described(&mut self, naming: StatementName, client: &mut ClientSide) {
        let StatementName { client_name, statement } = naming;
        let shape = self.description.finish();
        let known = shape.map(|shape| (shape, *statement.description.get_or_init(|| shape)));
        let Some((shape, _)) = known.filter(|(shape, known)| shape != known) else {
            // Whoever sought it has found it; what comes of it later is another's.
            let _ = self.sought.take_if(|(sought, _)| sought.is(&statement));
            return self.statements.confirmed(&statement);
        };
        // It is not what its clients know, and whoever uses it must be told so.
        self.statements.failed(&statement);
        match client_name {
            Some(name) => {
                let reshaped = client.rules().shared_statements.with_description(&statement, shape);
                // It may have been closed meanwhile, by what is skipped in the end.
                self.replies.closes_instead(&name, &statement, &reshaped);
                if client.statements.get(&name).is_some_and(|known| known.is(&statement)) {
                    client.statements.insert(&name, reshaped);
                }
            }
            None => {
                if let Some((_, changed)) = self.sought.as_mut().filter(|(sought, _)| sought.is(&statement)) {
                    *changed = true;
                }
            }
        }
    }

    /// A DataRow of ours tells one of its settings.
    #[cold]
    pub(super) fn told_setting(&mut self, row: &[u8]) {
        self.told_settings = self.told_settings.take().and_then(|told| with_setting(told, row));
    }

    /// Those were all.
    #[cold]
    pub(super) fn told_all(&mut self, settings: &ParseSettings) {
        let told = self.told_settings.replace(Settings::default());
        told.into_iter().for_each(|told| settings.set_values(&told));
    }
}

/// With the setting in a DataRow of ours; `None` where it cannot be read.
fn with_setting(mut told: Settings, row: &[u8]) -> Option<Settings> {
    let mut values = row.get(HEADER_BYTES + 2..)?;
    let mut next = || {
        let (length, rest) = values.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        values = rest;
        std::str::from_utf8(value).ok()
    };
    let (name, value) = (next()?, next()?);
    told.set(name, Some(value).filter(|value| name != "role" || *value != "none"));
    Some(told)
}
