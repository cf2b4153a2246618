//! SET and RESET, and the resulting value of a SET.
//!
//! Source: `VariableSetStmt` in `gram.y`, `flatten_set_variable_args` in `guc.c` (`guc_funcs.c`),
//! `quote_identifier` in `ruleutils.c`.

use std::borrow::Cow;

use super::{
    Effects, Kind, SetValue,
    lexer::TokenKind,
    statement_kind::{self, Reading},
    token_reader::Reader,
};

pub(super) fn set<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    let mut local = false;
    if !names_parameter(reader) {
        local = reader.is(b"local");
        if local || reader.is(b"session") && !is_session_form(reader) {
            reader.advance();
        }
    }
    let mut effects = if local { Effects::SETTING_LOCAL } else { Effects::SETTING };
    let kind = if names_parameter(reader) { parameter(reader, local)? } else { special(reader, local)? };
    match &kind {
        Kind::SetTransaction | Kind::SetConstraints => effects = Effects::SETTING_LOCAL,
        Kind::Set { name, .. } if **name == *b"seed" => effects = Effects::SEED,
        _ => {}
    }
    Some(Reading::of(kind, effects))
}

pub(super) fn reset<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    let setting = |kind| Some(Reading::of(kind, Effects::SETTING));
    if reader.is(b"all") {
        return setting(Kind::ResetAll);
    }
    if reader.eat_all(&[b"time", b"zone"]) {
        return setting(Kind::Reset(Cow::Borrowed(b"timezone")));
    }
    if reader.eat_all(&[b"session", b"authorization"]) {
        return setting(Kind::Reset(Cow::Borrowed(b"session_authorization")));
    }
    if reader.eat_all(&[b"transaction", b"isolation", b"level"]) {
        return Some(Reading::of(Kind::SetTransaction, Effects::SETTING_LOCAL));
    }
    let name = parameter_name(reader)?;
    if is_transaction_parameter(&name) {
        return Some(Reading::of(Kind::SetTransaction, Effects::SETTING_LOCAL));
    }
    setting(Kind::Reset(name))
}

/// Parses the rest of SHOW and returns the parameter, if there is one.
pub(super) fn show<'a>(reader: &mut Reader<'a>) -> Option<Cow<'a, [u8]>> {
    let name: Cow<'a, [u8]> = if reader.eat_all(&[b"time", b"zone"]) {
        Cow::Borrowed(b"timezone")
    } else if reader.eat_all(&[b"session", b"authorization"]) {
        Cow::Borrowed(b"session_authorization")
    } else if reader.eat_all(&[b"transaction", b"isolation", b"level"]) {
        Cow::Borrowed(b"transaction_isolation")
    } else {
        parameter_name(reader)?
    };
    (reader.at_end() && *name != *b"all").then_some(name)
}

/// Returns whether a parameter's name with its `=` or TO comes next, even if that is LOCAL or TRANSACTION.
fn names_parameter(reader: &Reader<'_>) -> bool {
    let mut next = *reader;
    next.advance();
    next.is_symbol(b'=') || next.is_symbol(b'.') || next.is(b"to") || next.is(b"from")
}

/// Returns whether the next words are SESSION AUTHORIZATION or SESSION CHARACTERISTICS, where SESSION does
/// not mean "not LOCAL".
fn is_session_form(reader: &Reader<'_>) -> bool {
    let mut next = *reader;
    next.advance();
    (next.is(b"authorization") || next.is(b"characteristics")) && !names_parameter(&next)
}

fn parameter<'a>(reader: &mut Reader<'a>, local: bool) -> Option<Kind<'a>> {
    let name = parameter_name(reader)?;
    let value = if reader.eat_all(&[b"from", b"current"]) {
        SetValue::Opaque
    } else if reader.eat_symbol(b'=') || reader.eat(b"to") {
        values(reader, is_quoted_list(&name))?
    } else {
        return None;
    };
    Some(match &*name {
        b"role" => Kind::SetRole { local, role: value },
        b"session_authorization" => Kind::SetSessionAuthorization { local, role: value },
        name if is_transaction_parameter(name) => Kind::SetTransaction,
        _ => Kind::Set { local, name, value },
    })
}

/// Parses the forms of SET without a parameter name.
fn special<'a>(reader: &mut Reader<'a>, local: bool) -> Option<Kind<'a>> {
    let set = |name: &'static [u8], value| Some(Kind::Set { local, name: Cow::Borrowed(name), value });
    if reader.eat_all(&[b"time", b"zone"]) {
        return set(b"timezone", zone(reader)?);
    }
    if reader.eat(b"transaction") {
        // A snapshot or modes: both end with the transaction.
        return Some(Kind::SetTransaction);
    }
    if reader.eat_all(&[b"session", b"characteristics", b"as", b"transaction"]) {
        let modes = statement_kind::modes(reader)?;
        return Some(Kind::SetSessionCharacteristics { local, modes });
    }
    if reader.eat_all(&[b"session", b"authorization"]) {
        return Some(Kind::SetSessionAuthorization { local, role: one(reader)? });
    }
    if reader.eat(b"constraints") {
        return Some(Kind::SetConstraints);
    }
    if reader.eat(b"role") {
        return Some(Kind::SetRole { local, role: one(reader)? });
    }
    if reader.eat(b"names") {
        return set(b"client_encoding", if reader.at_end() { SetValue::Default } else { one(reader)? });
    }
    if reader.eat(b"schema") {
        return set(b"search_path", values(reader, true)?);
    }
    if reader.eat_all(&[b"xml", b"option"]) {
        let document = reader.is(b"document");
        let option: &[u8] = if document { b"DOCUMENT" } else { b"CONTENT" };
        return (document || reader.is(b"content"))
            .then_some(())
            .and_then(|()| set(b"xmloption", SetValue::Text(Cow::Borrowed(option))));
    }
    None
}

/// Parses a parameter's name. Returns it in lower case, with obsolete names replaced.
fn parameter_name<'a>(reader: &mut Reader<'a>) -> Option<Cow<'a, [u8]>> {
    let mut name = reader.name()?;
    while reader.eat_symbol(b'.') {
        let part = reader.name()?;
        let joined = name.to_mut();
        joined.push(b'.');
        joined.extend_from_slice(&part);
    }
    Some(canonical(name))
}

/// Returns a parameter's name in lower case, with obsolete names replaced.
pub(super) fn canonical(mut name: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    if name.iter().any(u8::is_ascii_uppercase) {
        name.to_mut().make_ascii_lowercase();
    }
    match &*name {
        b"sort_mem" => Cow::Borrowed(b"work_mem"),
        b"vacuum_mem" => Cow::Borrowed(b"maintenance_work_mem"),
        _ => name,
    }
}

/// Parameters that always apply to the current transaction only.
fn is_transaction_parameter(name: &[u8]) -> bool {
    matches!(name, b"transaction_isolation" | b"transaction_read_only" | b"transaction_deferrable")
}

/// Parameters whose value is a list of quoted identifiers (GUC_LIST_QUOTE). Custom ones cannot have it.
fn is_quoted_list(name: &[u8]) -> bool {
    matches!(
        name,
        b"search_path"
            | b"temp_tablespaces"
            | b"local_preload_libraries"
            | b"session_preload_libraries"
            | b"shared_preload_libraries"
            | b"unix_socket_directories"
    )
}

/// Parses a single value or DEFAULT, up to the end.
fn one<'a>(reader: &mut Reader<'a>) -> Option<SetValue<'a>> {
    values(reader, false)
}

/// Parses `DEFAULT` or a list of values, up to the end.
fn values<'a>(reader: &mut Reader<'a>, quoted_list: bool) -> Option<SetValue<'a>> {
    if reader.eat(b"default") {
        return reader.at_end().then_some(SetValue::Default);
    }
    let mut all: Option<Cow<'a, [u8]>> = None;
    let mut opaque = false;
    loop {
        let is_number = matches!(reader.token().kind, TokenKind::Number | TokenKind::Symbol(_));
        let Value { text, is_known } = value(reader)?;
        opaque |= !is_known;
        let text = if quoted_list && !is_number { quote_identifier(text) } else { text };
        match &mut all {
            None => all = Some(text),
            Some(all) => {
                let all = all.to_mut();
                all.extend_from_slice(b", ");
                all.extend_from_slice(&text);
            }
        }
        if !reader.eat_symbol(b',') {
            break;
        }
    }
    if !reader.at_end() {
        return None;
    }
    all.map(|all| if opaque { SetValue::Opaque } else { SetValue::Text(all) })
}

struct Value<'a> {
    text: Cow<'a, [u8]>,
    is_known: bool,
}

fn value<'a>(reader: &mut Reader<'a>) -> Option<Value<'a>> {
    let literal = |text| Some(Value { text, is_known: true });
    match reader.token().kind {
        TokenKind::Number | TokenKind::Symbol(b'-' | b'+') => {
            let text = number(reader)?;
            Some(Value { is_known: text.is_some(), text: text.unwrap_or_default() })
        }
        TokenKind::Word | TokenKind::QuotedName | TokenKind::UnicodeName => literal(reader.name()?),
        kind if kind.is_string() => {
            if let Some(text) = reader.literal() {
                return literal(text);
            }
            reader.advance();
            if reader.eat(b"uescape") {
                reader.advance();
            }
            Some(Value { text: Cow::Borrowed(b""), is_known: false })
        }
        _ => None,
    }
}

/// Parses a signed number and returns it as PostgreSQL prints it: an int4 in its shortest form, other numbers
/// unchanged.
/// `Some(None)` if the result depends on the version (0x10, 1_000).
fn number<'a>(reader: &mut Reader<'a>) -> Option<Option<Cow<'a, [u8]>>> {
    let negative = reader.is_symbol(b'-');
    if negative || reader.is_symbol(b'+') {
        reader.advance();
    }
    if reader.token().kind != TokenKind::Number {
        return None;
    }
    let digits = reader.bytes();
    reader.advance();
    if digits.iter().any(|byte| matches!(byte, b'_' | b'x' | b'X' | b'o' | b'O' | b'b' | b'B')) {
        return Some(None);
    }
    let integer = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse::<i32>().ok());
    Some(Some(match integer {
        Some(integer) if negative => Cow::Owned((-integer).to_string().into_bytes()),
        Some(_) if !digits.starts_with(b"0") || digits.len() == 1 => Cow::Borrowed(digits),
        Some(integer) => Cow::Owned(integer.to_string().into_bytes()),
        None if negative => Cow::Owned([b"-", digits].concat()),
        None => Cow::Borrowed(digits),
    }))
}

/// Parses the rest of SET TIME ZONE.
fn zone<'a>(reader: &mut Reader<'a>) -> Option<SetValue<'a>> {
    if reader.eat(b"local") {
        return reader.at_end().then_some(SetValue::Default);
    }
    if !reader.eat(b"interval") {
        return one(reader);
    }
    // PostgreSQL formats the interval by the session's IntervalStyle. Hours and minutes mean the same in
    // every style, with or without HOUR TO MINUTE.
    let literal = reader.literal();
    reader.eat_all(&[b"hour", b"to", b"minute"]);
    match literal {
        Some(literal) if reader.at_end() && is_hours_and_minutes(&literal) => {
            Some(SetValue::Text(Cow::Owned([b"INTERVAL '", &*literal, b"'"].concat())))
        }
        _ => Some(SetValue::Opaque),
    }
}

/// Matches `-8:00` and `+05:30`.
fn is_hours_and_minutes(text: &[u8]) -> bool {
    let unsigned = text.strip_prefix(b"-").or_else(|| text.strip_prefix(b"+")).unwrap_or(text);
    match unsigned {
        [h, b':', m, n] => [h, m, n].iter().all(|digit| digit.is_ascii_digit()),
        [g, h, b':', m, n] => [g, h, m, n].iter().all(|digit| digit.is_ascii_digit()),
        _ => false,
    }
}

/// The server's function, for quote_all_identifiers off.
fn quote_identifier(name: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    let plain_start = name.first().is_some_and(|byte| matches!(byte, b'a'..=b'z' | b'_'));
    let plain = name.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
    if plain_start && plain && KEYWORDS.binary_search_by(|keyword| keyword.as_bytes().cmp(&name)).is_err() {
        return name;
    }
    let mut quoted = Vec::with_capacity(name.len() + 2);
    quoted.push(b'"');
    for byte in name.iter() {
        if *byte == b'"' {
            quoted.push(b'"');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    Cow::Owned(quoted)
}

/// Keywords that must be quoted as identifiers: all but the unreserved ones of PostgreSQL 15. Later versions
/// add a few (`system_user`, `json_…`). Such a schema is found with or without quotes; only SHOW differs.
#[rustfmt::skip]
const KEYWORDS: &[&str] = &[
    "all", "analyse", "analyze", "and", "any", "array", "as", "asc", "asymmetric", "authorization",
    "between", "bigint", "binary", "bit", "boolean", "both", "case", "cast", "char", "character",
    "check", "coalesce", "collate", "collation", "column", "concurrently", "constraint", "create",
    "cross", "current_catalog", "current_date", "current_role", "current_schema", "current_time",
    "current_timestamp", "current_user", "dec", "decimal", "default", "deferrable", "desc", "distinct",
    "do", "else", "end", "except", "exists", "extract", "false", "fetch", "float", "for", "foreign",
    "freeze", "from", "full", "grant", "greatest", "group", "grouping", "having", "ilike", "in",
    "initially", "inner", "inout", "int", "integer", "intersect", "interval", "into", "is", "isnull",
    "join", "lateral", "leading", "least", "left", "like", "limit", "localtime", "localtimestamp",
    "national", "natural", "nchar", "none", "normalize", "not", "notnull", "null", "nullif", "numeric",
    "offset", "on", "only", "or", "order", "out", "outer", "overlaps", "overlay", "placing", "position",
    "precision", "primary", "real", "references", "returning", "right", "row", "select", "session_user",
    "setof", "similar", "smallint", "some", "substring", "symmetric", "table", "tablesample", "then",
    "time", "timestamp", "to", "trailing", "treat", "trim", "true", "union", "unique", "user", "using",
    "values", "varchar", "variadic", "verbose", "when", "where", "window", "with", "xmlattributes",
    "xmlconcat", "xmlelement", "xmlexists", "xmlforest", "xmlnamespaces", "xmlparse", "xmlpi",
    "xmlroot", "xmlserialize", "xmltable",
];
