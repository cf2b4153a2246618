//! The questions that the proxy itself asks a server, answered from a session's state. The database has no
//! functions, hides no catalog, and its role has no settings.

use super::{backend::Session, expressions::Value};

/// The rows for a question of the proxy; `None`: it is not one.
pub fn answer(sql: &str, parameters: &[Value], session: &mut Session) -> Option<Vec<Vec<Value>>> {
    let text = |text: &str| Some(text.to_owned());
    let no_rows = [
        "(SELECT FROM pg_catalog.pg_show_all_settings()", // what is hidden
        "SELECT s.setdatabase",                           // settings of role and database
        "WITH named AS",
        "SELECT p.oid, p.proname", // functions, and what calls them
        "WITH f AS",
        "SELECT 1259, oid, relname",
        "SELECT refclassid",
    ];
    if no_rows.iter().any(|beginning| sql.starts_with(beginning)) {
        return Some(Vec::new());
    }
    if sql.starts_with("SELECT CURRENT_CATALOG, SESSION_USER") {
        let (database, role) = (session.startup("database"), session.startup("user"));
        return Some(vec![vec![database, role.clone(), role]]);
    }
    if sql.starts_with("SELECT CASE WHEN pg_catalog.current_setting('server_version_num')") {
        return Some(vec![vec![None]]); // statistics count no changes
    }
    if sql.starts_with("SELECT pg_catalog.concat_ws(' ', pg_catalog.count(*)") {
        return Some(vec![vec![text("no functions"), text("0"), text("t")]]);
    }
    if sql.starts_with("SELECT pg_catalog.set_config(n, v, l) FROM ROWS FROM") {
        return Some(restore(parameters, session));
    }
    if sql.starts_with("WITH target (name, value)") {
        return Some(enter_settings(parameters, session));
    }
    if sql.starts_with("SELECT pg_catalog.set_config(key, value, true) FROM ( SELECT key, value") {
        let kept = std::mem::take(&mut session.kept);
        kept.iter().for_each(|(name, value)| session.set(name, Some(value), true));
        return Some(kept.into_iter().map(|(_, value)| vec![Some(value)]).collect());
    }
    if sql.contains("FROM pg_catalog.pg_show_all_settings() WHERE source = 'session' UNION ALL SELECT n,") {
        return Some(parse_settings(parameters, session));
    }
    sql.starts_with("SELECT CASE WHEN pg_catalog.octet_length(n)").then(|| state(sql, parameters, session))
}

/// What a session has left: settings, pins, statements that are missing.
fn state(sql: &str, parameters: &[Value], session: &Session) -> Vec<Vec<Value>> {
    let text = |text: &str| Some(text.to_owned());
    let mut rows = Vec::new();
    if sql.contains("WHERE source = 'session' AND name <> ALL") {
        let plain = session.settings().filter(|(name, _)| !name.contains('.'));
        rows.extend(plain.map(|(name, value)| vec![text("s"), text(name), text(value), text("t")]));
    }
    let asks_source = sql.contains("coalesce((SELECT source");
    for name in array(parameters, 0) {
        let known = session.settings().any(|(set, _)| set == name);
        let is_set = !asks_source || known || name.contains('.');
        rows.push(vec![text("s"), text(&name), session.value(&name), text(if is_set { "t" } else { "f" })]);
    }
    let ours = |name: &str| name.starts_with("pglobby_");
    let known = array(parameters, 1);
    for part in sql.split(" UNION ALL ") {
        let Some(holds) = part.split_once("SELECT 'p', '").map(|(_, rest)| rest) else { continue };
        let (pin, condition) = holds.split_once('\'').unwrap_or_default();
        let mut statements = session.statements.iter();
        let is_pinned = match condition {
            _ if condition.contains("pg_depend") => !session.has_no_temporary_table(),
            _ if condition.contains("pg_lock_status") => !session.locks.is_empty(),
            _ if condition.contains("NOT from_sql") => {
                statements.any(|(name, of)| !of.from_sql && !name.is_empty() && !ours(name))
            }
            _ if condition.contains("from_sql") => {
                statements.any(|(name, of)| of.from_sql && !ours(name) && !known.contains(name))
            }
            _ => false,
        };
        if is_pinned {
            rows.push(vec![text("p"), text(pin), text(""), text("t")]);
        }
    }
    if sql.contains("pg_listening_channels()") {
        rows.extend(session.listening.iter().map(|name| vec![text("c"), text(name), text(""), text("t")]));
    }
    if sql.contains("SELECT 'm', n") {
        let missing = array(parameters, 2).into_iter().filter(|name| !session.statements.contains_key(name));
        rows.extend(missing.map(|name| vec![text("m"), Some(name), text(""), text("t")]));
    }
    rows
}

/// The settings under which a statement was parsed.
fn parse_settings(parameters: &[Value], session: &Session) -> Vec<Vec<Value>> {
    let names = array(parameters, 0);
    let given = names.into_iter().map(|name| (session.value(&name), name));
    let set = session.all_set().map(|(name, value)| (Some(value.to_owned()), name.to_owned()));
    let rows = set.chain(given.filter(|(value, _)| value.as_deref().is_some_and(|value| !value.is_empty())));
    rows.map(|(value, name)| vec![Some(name), value]).collect()
}

/// Sets the settings under which a statement was parsed, and keeps those that they replace.
fn enter_settings(parameters: &[Value], session: &mut Session) -> Vec<Vec<Value>> {
    let (given, listed) = (array(parameters, 0), array(parameters, 3));
    let mut target: Vec<_> = given.iter().cloned().zip(array(parameters, 1)).collect();
    let others = session.all_set().map(|(name, _)| name.to_owned());
    let others: Vec<_> = others.filter(|name| !given.contains(name) && !listed.contains(name)).collect();
    target.extend(others.into_iter().map(|name| {
        let value = session.default_value(&name).unwrap_or_default();
        (name, value)
    }));
    let unlisted = array(parameters, 2).into_iter().filter(|name| name == "role" || name.contains('.'));
    let role = parameters.get(4).cloned().flatten().unwrap_or_default();
    target.extend(unlisted.map(|name| {
        let value = if name == "role" { role.clone() } else { String::new() };
        (name, value)
    }));
    target.retain(|(name, value)| session.value(name).unwrap_or_default() != *value);
    let before = |name: &String| (name.clone(), session.value(name).unwrap_or_default());
    session.kept = target.iter().map(|(name, _)| before(name)).collect();
    target.iter().for_each(|(name, value)| session.set(name, Some(value), true));
    (0..target.len().max(1)).map(|_| vec![None]).collect()
}

/// Sets startup parameters again that were reset.
fn restore(parameters: &[Value], session: &mut Session) -> Vec<Vec<Value>> {
    let mut rows = Vec::new();
    for ((name, value), local) in
        array(parameters, 0).into_iter().zip(array(parameters, 1)).zip(array(parameters, 2))
    {
        if !session.has_set(&name) {
            session.set(&name, Some(&value), local.starts_with('t'));
            rows.push(vec![Some(value)]);
        }
    }
    rows
}

/// The elements of a parameter that is an array, such as `{a,"b c"}`.
fn array(parameters: &[Value], at: usize) -> Vec<String> {
    let array = parameters.get(at).and_then(Option::as_deref).unwrap_or_default();
    let inner = array.trim_start_matches('{').trim_end_matches('}');
    let parts = inner.split(',').filter(|part| !part.is_empty());
    parts.map(|part| part.trim_matches('"').to_owned()).collect()
}
