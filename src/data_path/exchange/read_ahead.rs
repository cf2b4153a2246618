//! What was read of a client's first message before its server was borrowed: no text is read twice for one lease.

use crate::data_path::sql::{BareQuery, Lexing};

/// The first message of a client's next bytes has the text of a bare query; or it was not read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadAhead(Option<(BareQuery, Lexing)>);

impl ReadAhead {
    /// The message is a whole Query or Parse with such a text.
    pub fn bare(query: BareQuery, lexing: Lexing) -> Self {
        Self(Some((query, lexing)))
    }

    /// The query, if a server would read it in the same way.
    #[inline]
    pub(super) fn under(self, lexing: Lexing) -> Option<BareQuery> {
        self.0.filter(|(_, read_under)| *read_under == lexing).map(|(query, _)| query)
    }
}
