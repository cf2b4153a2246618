//! SQL analysis: what a text may do to the session that runs it. Start reading at [`statements`].
//!
//! Pure: the code reports facts and makes no decisions. It does not assume that a statement runs: a statement
//! counts when its CommandComplete arrives. Texts that PostgreSQL rejects may be read in any way.
//!
//! An ordinary SELECT, INSERT, UPDATE, DELETE, BEGIN or COMMIT needs one pass and no allocation. Only
//! statements that affect the session are parsed in detail. Parsing never panics, recurses at most
//! [`self::function_body::DEPTH_MAX`] deep and takes linear time.
//!
//! Source: PostgreSQL's `scan.l` and `gram.y`, versions 13 to 18.

mod byte_blocks;
mod ddl;
mod definitions;
mod dynamic_sql;
mod effects;
mod function_body;
mod identifiers;
mod lexer;
mod pieces;
mod plain_query;
#[cfg(test)]
mod property_tests;
mod roles_and_databases;
mod set;
mod set_config;
mod statement_kind;
mod statement_scan;
mod tenant_parameter;
#[cfg(test)]
mod tests;
mod token_reader;
mod words;

use std::{borrow::Cow, ops::Range};

pub use self::byte_blocks::any_place;
pub use self::effects::{Effects, SESSION_FUNCTIONS};
pub use self::function_body::effects_of_body;
pub use self::identifiers::{QualifiedName, QualifiedNames};
use self::lexer::Lexer;
pub use self::pieces::{Piece, pieces};
pub use self::plain_query::BareQuery;
pub use self::roles_and_databases::{
    GivenPassword, IdentityChange, Named, identity_changes, may_change_identity,
};
pub use self::set_config::{Argument, SetConfig, SetConfigs};
pub use self::tenant_parameter::{PARAMETER, TenantMention};
pub use self::words::{NAME_BYTES_MAX, dotted_names, words};

/// Session state that determines how a text is split into tokens. PostgreSQL tokenizes a whole text before it
/// runs any of it, so the settings at its arrival apply to all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lexing {
    /// The reported parameter of this name: if off, `\` is an escape in every `'…'`.
    pub standard_conforming_strings: bool,
    /// Meaning of bytes above 127 in the client's encoding.
    pub characters: Characters,
}

/// How the client's encoding represents non-ASCII characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Characters {
    /// All bytes are above 127: UTF8 and most others.
    #[default]
    AsciiSafe,
    /// Two bytes; the second may look like ASCII (even `\`): BIG5, GBK, GB18030, UHC, JOHAB.
    DoubleByte,
    /// The same, but 0xA1 to 0xDF are single bytes: SJIS, SHIFT_JIS_2004.
    ShiftJis,
}

/// Returns the statements of a text in order, without empty ones (`;;`). They match the CommandCompletes of a
/// simple Query one to one; a text without statements gets EmptyQueryResponse.
pub fn statements(sql: &[u8], lexing: Lexing) -> Statements<'_> {
    Statements { lexer: Lexer::new(sql, lexing), lexing }
}

/// One ordinary query without effects on the session, in which nothing needs a second look. Conservative: may return
/// `None` for such a one.
#[inline]
pub fn bare_query(sql: &[u8], lexing: Lexing) -> Option<BareQuery> {
    self::plain_query::bare(sql, lexing)
}

/// Conservative: may return false for one ordinary query without effects on the session.
pub fn is_plain_query(sql: &[u8], lexing: Lexing) -> bool {
    self::plain_query::query(sql, lexing).is_some()
}

/// Returns all calls of set_config in a function's body.
pub fn set_configs(body: &[u8]) -> SetConfigs<'_> {
    SetConfigs::new(body, Lexing::default())
}

/// Returns the effects of a whole text. Empty for an ordinary query.
pub fn effects(sql: &[u8], lexing: Lexing) -> Effects {
    statements(sql, lexing).fold(Effects::empty(), |all, statement| all | statement.effects)
}

/// Iterator of [`statements`].
#[derive(Debug, Clone)]
pub struct Statements<'a> {
    lexer: Lexer<'a>,
    lexing: Lexing,
}

impl<'a> Iterator for Statements<'a> {
    type Item = Statement<'a>;

    #[inline]
    fn next(&mut self) -> Option<Statement<'a>> {
        if self.lexer.at_start()
            && let Some(place) = self::plain_query::query(self.lexer.sql(), self.lexing)
        {
            self.lexer.skip_to_end();
            let text = self.lexer.sql().get(place.clone()).unwrap_or_default();
            return Some(Statement::plain(text, place.start, self.lexing));
        }
        let scan = self::statement_scan::next(&mut self.lexer)?;
        let text = self.lexer.sql().get(scan.start..scan.end).unwrap_or_default();
        Some(self::statement_kind::read(text, scan, self.lexing))
    }
}

/// A statement of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement<'a> {
    /// Statement type and details.
    pub kind: Kind<'a>,
    /// From the first token to the last, without the `;`. Ranges in this struct are relative to it.
    pub text: &'a [u8],
    /// Index of `text` in the whole text.
    pub start: usize,
    /// Effects when the statement runs.
    pub effects: Effects,
    /// Effects of later uses of what the statement creates: EXECUTE of a prepared statement, FETCH from a
    /// cursor, a function call.
    pub deferred: Effects,
    /// The prepared statement that PREPARE, EXECUTE, DEALLOCATE, EXPLAIN EXECUTE or CREATE TABLE AS EXECUTE
    /// names. Its range allows to replace the name.
    pub prepared: Option<Name<'a>>,
    lexing: Lexing,
}

impl<'a> Statement<'a> {
    /// A query without effects on the session.
    #[inline]
    fn plain(text: &'a [u8], start: usize, lexing: Lexing) -> Self {
        let (effects, deferred) = (Effects::empty(), Effects::empty());
        Self { kind: Kind::Query, text, start, effects, deferred, prepared: None, lexing }
    }

    /// Returns all calls of set_config in the statement. Whether and how often a call runs is unknown.
    pub fn set_configs(&self) -> SetConfigs<'a> {
        SetConfigs::new(self.text, self.lexing)
    }

    /// Returns the code of a DO block in PL/pgSQL.
    pub fn code_block(&self) -> Option<Cow<'a, [u8]>> {
        matches!(self.kind, Kind::Do).then(|| self::ddl::code_of_block(self.text, self.lexing)).flatten()
    }

    /// Conservative: whether a use of what the statement defines leaves nothing in the session, except by
    /// objects that the statement names.
    pub fn defines_harmless(&self) -> bool {
        self::definitions::is_harmless(self)
    }

    /// Conservative: whether the statement defines an object and runs no function of the database meanwhile,
    /// unless an event trigger does.
    pub fn only_defines(&self) -> bool {
        self::definitions::only_defines(self)
    }

    /// Returns the call if the statement is only `SELECT set_config(…)`.
    pub fn lone_set_config(&self) -> Option<SetConfig<'a>> {
        self::set_config::lone(self.text, self.lexing)
    }
}

/// A name as PostgreSQL stores it (folded to lower case unless quoted, truncated to 63 bytes) and its place
/// in [`Statement::text`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name<'a> {
    /// The name.
    pub value: Cow<'a, [u8]>,
    /// The place, including quotes.
    pub range: Range<usize>,
}

/// Statement types. Names are as in [`Name`]; parameter names are in lower case: PostgreSQL ignores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind<'a> {
    /// SELECT, INSERT, UPDATE, DELETE, MERGE, VALUES, TABLE, with or without WITH.
    Query,
    /// BEGIN, START TRANSACTION.
    Begin(TransactionModes),
    /// COMMIT, END.
    Commit {
        /// AND CHAIN: the next transaction begins at once, with the same modes.
        chain: bool,
    },
    /// ROLLBACK, ABORT.
    Rollback {
        /// AND CHAIN.
        chain: bool,
    },
    /// PREPARE TRANSACTION: the transaction leaves the session.
    PrepareTransaction,
    /// COMMIT PREPARED, ROLLBACK PREPARED.
    FinishPrepared,
    /// SAVEPOINT.
    Savepoint(Cow<'a, [u8]>),
    /// RELEASE.
    Release(Cow<'a, [u8]>),
    /// ROLLBACK TO; the savepoint remains.
    RollbackTo(Cow<'a, [u8]>),
    /// SET of a parameter, in any of its spellings (TIME ZONE, NAMES, SCHEMA, XML OPTION).
    Set {
        /// SET LOCAL: for this transaction.
        local: bool,
        /// The parameter's name.
        name: Cow<'a, [u8]>,
        /// The new value.
        value: SetValue<'a>,
    },
    /// SET ROLE, SET role = …; `none` is an ordinary value.
    SetRole {
        /// SET LOCAL.
        local: bool,
        /// The role.
        role: SetValue<'a>,
    },
    /// SET SESSION AUTHORIZATION, SET session_authorization = ….
    SetSessionAuthorization {
        /// SET LOCAL.
        local: bool,
        /// The role; `Default` is the login role.
        role: SetValue<'a>,
    },
    /// SET TRANSACTION, SET transaction_isolation = …: this transaction only.
    SetTransaction,
    /// SET SESSION CHARACTERISTICS AS TRANSACTION: sets default_transaction_isolation and others.
    SetSessionCharacteristics {
        /// SET LOCAL SESSION CHARACTERISTICS, which the grammar allows.
        local: bool,
        /// The modes.
        modes: TransactionModes,
    },
    /// SET CONSTRAINTS: this transaction only.
    SetConstraints,
    /// RESET of one parameter, also `role`, `session_authorization` and `timezone`.
    Reset(Cow<'a, [u8]>),
    /// RESET ALL.
    ResetAll,
    /// SHOW of a parameter; `None` for ALL and for unknown forms.
    Show(Option<Cow<'a, [u8]>>),
    /// DISCARD.
    Discard(Discard),
    /// PREPARE; the name is in [`Statement::prepared`].
    Prepare {
        /// The parameter types, without parentheses; empty if not given.
        types: Range<usize>,
        /// The statement to prepare.
        body: Range<usize>,
    },
    /// EXECUTE; the name is in [`Statement::prepared`].
    Execute {
        /// The rest after the name, with parentheses.
        arguments: Range<usize>,
    },
    /// DEALLOCATE; the name is in [`Statement::prepared`].
    Deallocate,
    /// DEALLOCATE ALL.
    DeallocateAll,
    /// LISTEN.
    Listen(Cow<'a, [u8]>),
    /// UNLISTEN; `None` is `*`.
    Unlisten(Option<Cow<'a, [u8]>>),
    /// NOTIFY.
    Notify(Cow<'a, [u8]>),
    /// DECLARE … CURSOR.
    DeclareCursor {
        /// The cursor.
        name: Cow<'a, [u8]>,
        /// WITH HOLD: it outlives its transaction.
        hold: bool,
    },
    /// FETCH, MOVE.
    Fetch(Cow<'a, [u8]>),
    /// CLOSE; `None` is ALL.
    CloseCursor(Option<Cow<'a, [u8]>>),
    /// CREATE of a temporary object, also by the schema `pg_temp` or by SELECT … INTO TEMP.
    CreateTemp {
        /// The object type.
        what: Object,
        /// The name; `None` for SELECT INTO.
        name: Option<Cow<'a, [u8]>>,
        /// ON COMMIT DROP.
        drop_on_commit: bool,
    },
    /// DROP TABLE, DROP VIEW, DROP SEQUENCE, …
    Drop {
        /// The object type.
        what: Object,
        /// The names.
        names: QualifiedNames<'a>,
    },
    /// LOAD.
    Load,
    /// COPY.
    Copy(Copy),
    /// DO.
    Do,
    /// CALL.
    Call,
    /// CREATE FUNCTION, CREATE PROCEDURE.
    CreateRoutine,
    /// Other CREATE, ALTER, DROP and similar statements.
    Ddl,
    /// LOCK TABLE.
    LockTable,
    /// EXPLAIN; the name of an explained EXECUTE is in [`Statement::prepared`].
    Explain {
        /// ANALYZE: runs the statement.
        analyze: bool,
        /// The explained statement.
        inner: Range<usize>,
    },
    /// VACUUM, ANALYZE, CLUSTER, REINDEX, CHECKPOINT.
    Maintenance,
    /// An unknown statement or spelling: [`Effects::UNKNOWN`].
    Other,
}

/// The value of a SET.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetValue<'a> {
    /// TO DEFAULT or an equivalent form.
    Default,
    /// The value in the form that `set_config(name, value, …)` takes.
    Text(Cow<'a, [u8]>),
    /// Known only to the server (FROM CURRENT, an INTERVAL that it normalises).
    Opaque,
}

/// Modes of BEGIN, SET TRANSACTION or SET SESSION CHARACTERISTICS; `None` if not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransactionModes {
    /// `serializable`, `repeatable read`, `read committed` or `read uncommitted`.
    pub isolation: Option<&'static str>,
    /// READ ONLY or READ WRITE.
    pub read_only: Option<bool>,
    /// [NOT] DEFERRABLE.
    pub deferrable: Option<bool>,
}

/// Variants of DISCARD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// RESET ALL, RESET SESSION AUTHORIZATION, DEALLOCATE ALL, CLOSE ALL, UNLISTEN *, advisory locks, plans,
    /// temporary objects and sequences.
    All,
    /// Plans.
    Plans,
    /// The values of currval and lastval.
    Sequences,
    /// Temporary objects.
    Temp,
}

/// Object types that may be temporary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// TABLE.
    Table,
    /// VIEW.
    View,
    /// SEQUENCE.
    Sequence,
    /// All other types that may be in `pg_temp`.
    Other,
}

/// Source or target of COPY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    /// COPY FROM STDIN.
    FromClient,
    /// COPY TO STDOUT.
    ToClient,
    /// A file or program on the server.
    OnServer,
}

impl Lexing {
    /// The same after a parameter (in lower case) was set to this value, in any spelling that PostgreSQL takes.
    pub fn with(self, name: &str, value: &str) -> Self {
        match name {
            "standard_conforming_strings" => {
                let standard_conforming_strings = set_config::boolean(value.as_bytes()) != Some(false);
                Self { standard_conforming_strings, ..self }
            }
            "client_encoding" => Self { characters: Characters::of_client_encoding(value), ..self },
            _ => self,
        }
    }
}

impl Default for Lexing {
    /// The state at session start.
    fn default() -> Self {
        Self { standard_conforming_strings: true, characters: Characters::AsciiSafe }
    }
}

impl Lexing {
    /// Token type of a string without a prefix.
    #[inline]
    fn plain_text(self) -> lexer::TokenKind {
        if self.standard_conforming_strings { lexer::TokenKind::Text } else { lexer::TokenKind::EscapedText }
    }
}

impl Characters {
    /// Returns the type for a `client_encoding` that the server reports.
    pub fn of_client_encoding(name: &str) -> Self {
        let letters = name.bytes().filter(u8::is_ascii_alphanumeric).map(|byte| byte.to_ascii_lowercase());
        match &*letters.collect::<Vec<u8>>() {
            b"sjis" | b"shiftjis" | b"mskanji" | b"win932" | b"windows932" | b"shiftjis2004" => {
                Self::ShiftJis
            }
            b"big5" | b"win950" | b"windows950" | b"gbk" | b"win936" | b"windows936" | b"gb18030"
            | b"uhc" | b"win949" | b"windows949" | b"johab" => Self::DoubleByte,
            _ => Self::AsciiSafe,
        }
    }

    /// Returns the bytes of the character that starts with `first`, as far as the lexer must skip them.
    #[inline]
    fn width(self, first: u8) -> usize {
        match (self, first) {
            (Self::DoubleByte, 128..) | (Self::ShiftJis, 0x80..=0xA0 | 0xE0..) => 2,
            _ => 1,
        }
    }
}

/// Returns the ranges of a text's tokens; each byte of an operator is a token.
#[cfg(any(test, fuzzing))]
pub fn tokens(sql: &[u8], lexing: Lexing) -> Vec<std::ops::Range<usize>> {
    let mut reader = Lexer::new(sql, lexing);
    let next = || Some(reader.next()).filter(|token| token.kind != lexer::TokenKind::End);
    std::iter::from_fn(next).map(|token| token.start..token.end).collect()
}
