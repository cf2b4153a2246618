//! The few SQL expressions that clients of the simulation and the proxy itself use, computed from a session's
//! state.

use super::backend::{Failure, Session};

/// A value; `None` is NULL.
pub type Value = Option<String>;

/// Computes a list of expressions, separated by commas.
pub fn row(list: &str, parameters: &[Value], session: &mut Session) -> Result<Vec<Value>, Failure> {
    split(list).into_iter().map(|expression| value(expression, parameters, session)).collect()
}

/// The parts between the commas that are in no parentheses and in no string.
pub fn split(list: &str) -> Vec<&str> {
    let (mut parts, mut from, mut depth, mut quoted) = (Vec::new(), 0, 0, false);
    for (at, byte) in list.bytes().enumerate() {
        match byte {
            b'\'' => quoted = !quoted,
            b'(' if !quoted => depth += 1,
            b')' if !quoted => depth -= 1,
            b',' if !quoted && depth == 0 => {
                parts.push(list[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(list[from..].trim());
    parts
}

/// How many milliseconds these expressions sleep.
pub fn sleep_ms(list: &str) -> u64 {
    let argument = list.split_once("pg_sleep(").and_then(|(_, rest)| rest.split_once(')'));
    argument.and_then(|(seconds, _)| seconds.parse::<u64>().ok()).unwrap_or(0) * 1000
}

fn value(expression: &str, parameters: &[Value], session: &mut Session) -> Result<Value, Failure> {
    if let Some(text) = expression.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')) {
        return Ok(Some(text.to_owned()));
    }
    if let Some(number) = expression.strip_prefix('$') {
        let at: usize = number.parse().map_err(|_| Failure::unknown(expression))?;
        return Ok(parameters.get(at - 1).cloned().flatten());
    }
    let call = expression.strip_prefix("pg_catalog.").unwrap_or(expression);
    let Some((name, arguments)) =
        call.split_once('(').and_then(|(name, rest)| Some((name, rest.strip_suffix(')')?)))
    else {
        return match expression {
            "1/0" => Err(Failure::new("22012", "division by zero")),
            "false" | "true" => Ok(Some(expression.to_owned())),
            number if number.parse::<i64>().is_ok() => Ok(Some(number.to_owned())),
            _ => Err(Failure::unknown(expression)),
        };
    };
    if name == "pg_sleep" {
        return Ok(Some(String::new()));
    }
    let arguments = row(arguments, parameters, session)?;
    let text = |at: usize| arguments.get(at).cloned().flatten().unwrap_or_default();
    Ok(match name {
        "current_setting" => session.value(&text(0)).or_else(|| (arguments.len() > 1).then(String::new)),
        "set_config" => {
            let value = arguments.get(1).cloned().flatten();
            session.set(&text(0), value.as_deref(), text(2) == "true");
            session.value(&text(0)).or(Some(String::new()))
        }
        "nullif" => Some(text(0)).filter(|value| *value != text(1)),
        "pg_notify" => {
            session.notifies.push((text(0), text(1)));
            Some(String::new())
        }
        "pg_advisory_lock" => {
            session.locks.insert(text(0));
            Some(String::new())
        }
        "pg_advisory_unlock" => Some(if session.locks.remove(&text(0)) { "t" } else { "f" }.to_owned()),
        _ => return Err(Failure::unknown(expression)),
    })
}
