//! What a SQL text may do to the session that runs it: read once, before it goes to the server, so that a pooler can
//! follow the session to another server, replay what it has set, or pin it to the one it is on. Start reading at
//! [`statements`].
//!
//! Pure: a text goes in, facts come out; what is done about them is not decided here. Nothing is assumed to have
//! *happened*: a statement counts when its CommandComplete arrives. A text that PostgreSQL would refuse may be read
//! in any way, because nothing of it runs.
//!
//! An ordinary SELECT, INSERT, UPDATE, DELETE, BEGIN or COMMIT is read in one pass without allocation. Only what
//! touches the session is read a second time, for its details. Reading never panics, recurses no deeper than
//! [`self::function_body::DEPTH_MAX`], and takes time linear in the text.
//!
//! Source: PostgreSQL's `scan.l` and `gram.y`, versions 13 to 18.

mod ddl;
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

pub use self::effects::{Effects, SESSION_FUNCTIONS};
pub use self::function_body::effects_of_body;
pub use self::identifiers::{QualifiedName, QualifiedNames};
use self::lexer::Lexer;
pub use self::pieces::{Piece, pieces};
pub use self::roles_and_databases::{
    GivenPassword, IdentityChange, Named, identity_changes, may_change_identity,
};
pub use self::set_config::{Argument, SetConfig, SetConfigs};
pub use self::tenant_parameter::{PARAMETER, Talk};
pub use self::words::{NAME_BYTES_MAX, dotted_names, words};

/// What of the session decides how a text is cut into tokens. For a whole text the settings count that hold when it
/// arrives: PostgreSQL cuts all of it before it runs any of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lexing {
    /// The parameter of that name, which the server reports: off makes `\` an escape in every `'…'`.
    pub standard_conforming_strings: bool,
    /// What bytes over 127 mean in the client's encoding.
    pub characters: Characters,
}

/// How the client's encoding spells characters that are not ASCII.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Characters {
    /// All their bytes are over 127: UTF8 and most others.
    #[default]
    AsciiSafe,
    /// Two bytes, the second of which may look like ASCII (even `\`): BIG5, GBK, GB18030, UHC, JOHAB.
    DoubleByte,
    /// The same, but 0xA1 to 0xDF stand alone: SJIS, SHIFT_JIS_2004.
    ShiftJis,
}

/// The statements of a text, in order. Empty ones (`;;`) are left out, as PostgreSQL does: what is yielded matches
/// the CommandCompletes of a simple Query one to one; where nothing is yielded, EmptyQueryResponse comes instead.
pub fn statements(sql: &[u8], lexing: Lexing) -> Statements<'_> {
    Statements { lexer: Lexer::new(sql, lexing), lexing }
}

/// Whether a text is one ordinary query that touches nothing of the session, as far as a glance tells: no may be yes.
pub fn is_plain_query(sql: &[u8], lexing: Lexing) -> bool {
    self::plain_query::query(sql, lexing).is_some()
}

/// Every call of set_config in a function's body.
pub fn set_configs(body: &[u8]) -> SetConfigs<'_> {
    SetConfigs::new(body, Lexing::default())
}

/// What a whole text may do. Empty for an ordinary query: it leaves no trace in the session.
pub fn effects(sql: &[u8], lexing: Lexing) -> Effects {
    statements(sql, lexing).fold(Effects::empty(), |all, statement| all | statement.effects)
}

/// See [`statements`].
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

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement<'a> {
    /// What it is.
    pub kind: Kind<'a>,
    /// From its first token to its last, without the `;`. Ranges in here count from its start.
    pub text: &'a [u8],
    /// Where `text` starts in the whole.
    pub start: usize,
    /// What it may do to the session when it runs.
    pub effects: Effects,
    /// What may be done later through something it makes: EXECUTE of a prepared statement, FETCH from a cursor, a
    /// call of a function. A prepared statement's belong to each of its EXECUTEs.
    pub deferred: Effects,
    /// The prepared statement it makes, runs or forgets by name: PREPARE, EXECUTE, DEALLOCATE, EXPLAIN EXECUTE,
    /// CREATE TABLE AS EXECUTE. The range is where another name can be put in its place.
    pub prepared: Option<Name<'a>>,
    lexing: Lexing,
}

impl<'a> Statement<'a> {
    /// A query that does nothing to the session.
    #[inline]
    fn plain(text: &'a [u8], start: usize, lexing: Lexing) -> Self {
        let (effects, deferred) = (Effects::empty(), Effects::empty());
        Self { kind: Kind::Query, text, start, effects, deferred, prepared: None, lexing }
    }

    /// Every call of set_config in it, with its arguments where they are literals or parameters. Whether a call is
    /// reached, and how often, is not known.
    pub fn set_configs(&self) -> SetConfigs<'a> {
        SetConfigs::new(self.text, self.lexing)
    }

    /// The code that a DO runs, where it is in PL/pgSQL.
    pub fn code_block(&self) -> Option<Cow<'a, [u8]>> {
        matches!(self.kind, Kind::Do).then(|| self::ddl::code_of_block(self.text, self.lexing)).flatten()
    }

    /// The call, where the statement is `SELECT set_config(…)` and nothing else.
    pub fn lone_set_config(&self) -> Option<SetConfig<'a>> {
        self::set_config::lone(self.text, self.lexing)
    }
}

/// A name as the catalogue would hold it (folded to lower case unless quoted, cut to 63 bytes), and where in
/// [`Statement::text`] it is written, quotes included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name<'a> {
    /// The name.
    pub value: Cow<'a, [u8]>,
    /// Where it is written.
    pub range: Range<usize>,
}

/// What a statement is. Names are spelled as in [`Name`]; names of parameters are in lower case throughout, because
/// PostgreSQL compares them without regard to case.
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
    /// ROLLBACK TO; the savepoint itself stays.
    RollbackTo(Cow<'a, [u8]>),
    /// SET of a parameter, in any of its spellings (TIME ZONE, NAMES, SCHEMA, XML OPTION).
    Set {
        /// SET LOCAL: for this transaction.
        local: bool,
        /// The parameter's name.
        name: Cow<'a, [u8]>,
        /// What to.
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
        /// The role; `Default` is the one that logged in.
        role: SetValue<'a>,
    },
    /// SET TRANSACTION, SET transaction_isolation = …: this transaction only.
    SetTransaction,
    /// SET SESSION CHARACTERISTICS AS TRANSACTION: sets default_transaction_isolation, … for the session.
    SetSessionCharacteristics {
        /// SET LOCAL SESSION CHARACTERISTICS, which the grammar allows.
        local: bool,
        /// What is set.
        modes: TransactionModes,
    },
    /// SET CONSTRAINTS: this transaction only.
    SetConstraints,
    /// RESET of one parameter, `role`, `session_authorization` and `timezone` among them.
    Reset(Cow<'a, [u8]>),
    /// RESET ALL.
    ResetAll,
    /// SHOW of a parameter; `None` is ALL, or what this reader does not know.
    Show(Option<Cow<'a, [u8]>>),
    /// DISCARD.
    Discard(Discard),
    /// PREPARE; the name is in [`Statement::prepared`].
    Prepare {
        /// The types of its parameters, without the parentheses; empty where none are given.
        types: Range<usize>,
        /// The statement to prepare.
        body: Range<usize>,
    },
    /// EXECUTE; the name is in [`Statement::prepared`].
    Execute {
        /// All that follows the name, parentheses included.
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
    /// CREATE of something temporary, also by `pg_temp.` in front of its name, also SELECT … INTO TEMP.
    CreateTemp {
        /// What.
        what: Object,
        /// Its name. `None` for SELECT INTO, where it is not looked for.
        name: Option<Cow<'a, [u8]>>,
        /// ON COMMIT DROP: it does not outlive its transaction.
        drop_on_commit: bool,
    },
    /// DROP TABLE, DROP VIEW, DROP SEQUENCE, …
    Drop {
        /// What.
        what: Object,
        /// Their names.
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
    /// CREATE, ALTER, DROP and so on of anything else.
    Ddl,
    /// LOCK TABLE.
    LockTable,
    /// EXPLAIN; of an EXECUTE, the name is in [`Statement::prepared`].
    Explain {
        /// ANALYZE: the statement runs.
        analyze: bool,
        /// The statement explained.
        inner: Range<usize>,
    },
    /// VACUUM, ANALYZE, CLUSTER, REINDEX, CHECKPOINT.
    Maintenance,
    /// Not a statement this reader knows, or not spelled as it expects: [`Effects::UNKNOWN`].
    Other,
}

/// What a parameter is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetValue<'a> {
    /// TO DEFAULT, and what means the same.
    Default,
    /// What `set_config(name, value, …)` would take to the same effect.
    Text(Cow<'a, [u8]>),
    /// Known to the server only (FROM CURRENT, an INTERVAL it must normalise).
    Opaque,
}

/// Modes given to BEGIN, SET TRANSACTION or SET SESSION CHARACTERISTICS; `None` where not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransactionModes {
    /// `serializable`, `repeatable read`, `read committed` or `read uncommitted`.
    pub isolation: Option<&'static str>,
    /// READ ONLY or READ WRITE.
    pub read_only: Option<bool>,
    /// [NOT] DEFERRABLE.
    pub deferrable: Option<bool>,
}

/// What DISCARD discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// Everything: RESET ALL, RESET SESSION AUTHORIZATION, DEALLOCATE ALL, CLOSE ALL, UNLISTEN *, advisory locks,
    /// plans, temporary objects, sequences.
    All,
    /// Plans.
    Plans,
    /// What currval and lastval remember.
    Sequences,
    /// Temporary objects.
    Temp,
}

/// A kind of object, as far as temporary ones need telling apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// TABLE.
    Table,
    /// VIEW.
    View,
    /// SEQUENCE.
    Sequence,
    /// Whatever else can be in `pg_temp`.
    Other,
}

/// Where COPY's rows go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    /// COPY FROM STDIN: the client sends them.
    FromClient,
    /// COPY TO STDOUT: the client gets them.
    ToClient,
    /// A file or program of the server's.
    OnServer,
}

impl Default for Lexing {
    /// What a session starts with.
    fn default() -> Self {
        Self { standard_conforming_strings: true, characters: Characters::AsciiSafe }
    }
}

impl Lexing {
    /// What a `'…'` without a letter in front is.
    #[inline]
    fn plain_text(self) -> lexer::TokenKind {
        if self.standard_conforming_strings { lexer::TokenKind::Text } else { lexer::TokenKind::EscapedText }
    }
}

impl Characters {
    /// By `client_encoding` as the server reports it.
    pub fn of_client_encoding(name: &[u8]) -> Self {
        match name {
            b"SJIS" | b"SHIFT_JIS_2004" => Self::ShiftJis,
            b"BIG5" | b"GBK" | b"GB18030" | b"UHC" | b"JOHAB" => Self::DoubleByte,
            _ => Self::AsciiSafe,
        }
    }

    /// How many bytes to step over at one that starts a character.
    #[inline]
    fn width(self, first: u8) -> usize {
        match (self, first) {
            (Self::DoubleByte, 128..) | (Self::ShiftJis, 0x80..=0xA0 | 0xE0..) => 2,
            _ => 1,
        }
    }
}
