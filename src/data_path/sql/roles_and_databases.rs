//! Statements about roles and databases: ALTER ROLE, DROP OWNED, GRANT of a role, ALTER DATABASE and others.
//! Reports the names only; `session_state/identity.rs` decides.
//!
//! Source: `AlterRoleStmt`, `GrantRoleStmt`, `AlterDatabaseStmt` and their neighbours in `gram.y`, versions
//! 13 to 18.

use std::borrow::Cow;

use super::{Kind, Lexing, Statement, lexer::TokenKind, set, statements, token_reader::Reader};

/// A reference to a role or database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named<'a> {
    /// CURRENT_USER, CURRENT_ROLE, SESSION_USER.
    Current,
    /// A name; `public` may mean all roles.
    Name(Cow<'a, [u8]>),
    /// A spelling that is not decoded (UESCAPE).
    Unclear,
}

/// The operand of PASSWORD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GivenPassword<'a> {
    /// NULL.
    Null,
    /// A password or a verifier.
    Text(Cow<'a, [u8]>),
    /// A spelling that is not decoded (`U&'…'`).
    Unclear,
}

/// A change of roles or of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityChange<'a> {
    /// `ALTER ROLE … PASSWORD` without other options.
    Password {
        /// The role.
        role: Named<'a>,
        /// The new password.
        password: GivenPassword<'a>,
    },
    /// Any other change of these roles: ALTER ROLE, ALTER GROUP, DROP ROLE.
    Roles(Vec<Named<'a>>),
    /// GRANT or REVOKE of roles: all roles named on either side.
    Membership(Vec<Named<'a>>),
    /// REASSIGN OWNED BY, DROP OWNED BY these roles.
    Owned(Vec<Named<'a>>),
    /// DROP DATABASE, or ALTER DATABASE except settings.
    Database(Named<'a>),
    /// ALTER DATABASE … SET or RESET, or the same for all roles in it. `None`: ALL, or an unreadable one.
    DatabaseSetting(Named<'a>, Option<Cow<'a, [u8]>>),
    /// GRANT or REVOKE ON DATABASE.
    DatabaseAccess {
        /// The databases.
        databases: Vec<Named<'a>>,
        /// The roles.
        roles: Vec<Named<'a>>,
        /// REVOKE.
        revoke: bool,
    },
}

/// Returns whether a text may concern roles or a database; conservative. Keywords have no escapes, so the
/// first two letters decide if there is only one statement.
#[inline]
pub fn may_change_identity(sql: &[u8]) -> bool {
    // PostgreSQL's white space differs from Rust's.
    let is_text = |byte: &u8| *byte > b' ';
    let (start, end) = (sql.iter().position(is_text), sql.iter().rposition(is_text));
    let text = start.zip(end).and_then(|(start, end)| sql.get(start..=end)).unwrap_or_default();
    let text = text.strip_suffix(b";").unwrap_or(text);
    let starts = match text {
        [b'-' | b'/', ..] => true,
        [first, second, ..] => {
            // alter, drop, grant, reassign, revoke
            matches!((first | 0x20, second | 0x20), (b'a', b'l') | (b'd' | b'g', b'r') | (b'r', b'e'))
        }
        _ => false,
    };
    starts || text.contains(&b';')
}

/// Returns all changes of roles or databases in a text, and the number of its statements.
pub fn identity_changes(sql: &[u8], lexing: Lexing) -> (Vec<IdentityChange<'_>>, usize) {
    let (mut changes, mut count) = (Vec::new(), 0);
    for statement in statements(sql, lexing) {
        count += 1;
        changes.extend(statement.identity_change());
    }
    (changes, count)
}

impl<'a> Statement<'a> {
    /// Returns the change of roles or a database.
    pub fn identity_change(&self) -> Option<IdentityChange<'a>> {
        if self.kind != Kind::Ddl {
            return None;
        }
        let mut reader = Reader::new(self.text, self.lexing);
        let reader = &mut reader;
        match () {
            () if reader.eat(b"alter") => alter(reader),
            () if reader.eat(b"drop") => drop(reader),
            () if reader.eat(b"reassign") => owned(reader),
            () if reader.eat(b"grant") => grant(reader, false),
            () if reader.eat(b"revoke") => grant(reader, true),
            () => None,
        }
    }
}

fn alter<'a>(reader: &mut Reader<'a>) -> Option<IdentityChange<'a>> {
    if reader.eat(b"group") {
        return Some(IdentityChange::Roles(all_named(reader, &[])));
    }
    if reader.eat(b"database") {
        return alter_database(reader);
    }
    if !reader.eat(b"role") && !eat_user(reader) {
        return None;
    }
    let all_roles = reader.eat(b"all");
    let role = if all_roles { Named::Name(Cow::Borrowed(b"")) } else { named(reader)? };
    if reader.eat_all(&[b"in", b"database"]) {
        let database = named(reader)?;
        return match all_roles {
            true => setting(reader).map(|parameter| IdentityChange::DatabaseSetting(database, parameter)),
            false => Some(IdentityChange::Roles(vec![role])),
        };
    }
    reader.eat(b"with");
    if reader.at_end() {
        return None;
    }
    let mut ahead = *reader;
    ahead.eat(b"encrypted");
    if ahead.eat(b"password") {
        let password = given_password(&mut ahead);
        if ahead.at_end() {
            return Some(IdentityChange::Password { role, password });
        }
    }
    Some(IdentityChange::Roles(vec![role]))
}

/// Consumes USER, unless USER MAPPING follows.
fn eat_user(reader: &mut Reader<'_>) -> bool {
    let mut ahead = *reader;
    !ahead.eat_all(&[b"user", b"mapping", b"for"]) && reader.eat(b"user")
}

fn given_password<'a>(reader: &mut Reader<'a>) -> GivenPassword<'a> {
    if reader.eat(b"null") {
        return GivenPassword::Null;
    }
    if let Some(text) = reader.literal() {
        return GivenPassword::Text(text);
    }
    if reader.token().kind == TokenKind::UnicodeText || reader.token().kind == TokenKind::EscapedText {
        reader.advance();
        if reader.eat(b"uescape") {
            reader.advance();
        }
    }
    GivenPassword::Unclear
}

fn alter_database<'a>(reader: &mut Reader<'a>) -> Option<IdentityChange<'a>> {
    let database = named(reader)?;
    let mut ahead = *reader;
    if ahead.eat(b"refresh") || ahead.at_end() {
        return None;
    }
    if (ahead.eat(b"set") && !ahead.is(b"tablespace")) || ahead.eat(b"reset") {
        return setting(reader).map(|parameter| IdentityChange::DatabaseSetting(database, parameter));
    }
    Some(IdentityChange::Database(database))
}

/// Parses `SET …` or `RESET …` and returns the parameter. PostgreSQL rejects what this cannot parse.
fn setting<'a>(reader: &mut Reader<'a>) -> Option<Option<Cow<'a, [u8]>>> {
    let reading = if reader.eat(b"set") {
        set::set(reader)?
    } else if reader.eat(b"reset") {
        set::reset(reader)?
    } else {
        return None;
    };
    Some(match reading.kind {
        Kind::Set { name, .. } | Kind::Reset(name) => Some(name),
        Kind::SetRole { .. } => Some(Cow::Borrowed(b"role")),
        Kind::SetSessionAuthorization { .. } => Some(Cow::Borrowed(b"session_authorization")),
        _ => None,
    })
}

fn drop<'a>(reader: &mut Reader<'a>) -> Option<IdentityChange<'a>> {
    if reader.is(b"owned") {
        return owned(reader);
    }
    if reader.eat(b"database") {
        reader.eat_all(&[b"if", b"exists"]);
        return named(reader).map(IdentityChange::Database);
    }
    if !reader.eat_any(&[b"role", b"group"]) && !eat_user(reader) {
        return None;
    }
    reader.eat_all(&[b"if", b"exists"]);
    Some(IdentityChange::Roles(all_named(reader, &[])))
}

/// Parses from OWNED.
fn owned<'a>(reader: &mut Reader<'a>) -> Option<IdentityChange<'a>> {
    reader.eat_all(&[b"owned", b"by"]).then(|| IdentityChange::Owned(all_named(reader, &[b"to"])))
}

/// Parses the rest of GRANT or REVOKE. ON is reserved: without it the statement concerns membership.
fn grant<'a>(reader: &mut Reader<'a>, revoke: bool) -> Option<IdentityChange<'a>> {
    let end: &[u8] = if revoke { b"from" } else { b"to" };
    let mut ahead = *reader;
    let granted = all_named(&mut ahead, &[b"on", end]);
    if ahead.eat(b"on") {
        if !ahead.eat(b"database") {
            return None;
        }
        let databases = all_named(&mut ahead, &[end]);
        ahead.eat(end);
        let roles = all_named(&mut ahead, &[b"with", b"granted", b"cascade"]);
        return Some(IdentityChange::DatabaseAccess { databases, roles, revoke });
    }
    ahead.eat(end);
    let roles = all_named(&mut ahead, &[b"with", b"granted", b"cascade"]);
    Some(IdentityChange::Membership(granted.into_iter().chain(roles).collect()))
}

fn named<'a>(reader: &mut Reader<'a>) -> Option<Named<'a>> {
    const CURRENT: [&[u8]; 3] = [b"current_user", b"current_role", b"session_user"];
    if CURRENT.iter().any(|word| reader.is(word)) {
        reader.advance();
        return Some(Named::Current);
    }
    let is_escaped = reader.token().kind == TokenKind::UnicodeName;
    let Some(name) = reader.name() else {
        if is_escaped {
            reader.advance();
        }
        return is_escaped.then_some(Named::Unclear);
    };
    if reader.eat(b"uescape") {
        reader.advance();
        return Some(Named::Unclear);
    }
    Some(Named::Name(name))
}

/// Returns all names up to one of these keywords (not consumed) or the end.
fn all_named<'a>(reader: &mut Reader<'a>, ends: &[&[u8]]) -> Vec<Named<'a>> {
    let mut all = Vec::new();
    while !reader.at_end() && !ends.iter().any(|end| reader.is(end)) {
        match named(reader) {
            Some(name) => all.push(name),
            None => reader.advance(),
        }
    }
    all
}
