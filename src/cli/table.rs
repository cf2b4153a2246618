//! Answers for people: tables, fields, times and defaults. With `--json` the same value is printed for
//! scripts.

use std::{fmt::Display, io::IsTerminal as _};

use serde::Serialize;
use serde_json::Value;
use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339, macros::format_description};

use crate::{
    cli::output::{json, line},
    control_path::admin::fields::{Described, Field, FieldKind},
};

/// A word that is longer may be broken to fit the terminal.
const WORD_WIDTH_MAX: usize = 30;
const GAP: usize = 2;

/// Prints `value` as JSON, or calls `words`, which prints it for people.
pub fn answer(as_json: bool, value: &impl Serialize, words: impl FnOnce()) {
    if as_json { json(value) } else { words() }
}

/// Prints a table, or `nothing` if there are no rows.
///
/// On a terminal that is too narrow, long cells continue on further lines. Elsewhere a row stays one line,
/// for `grep`.
pub fn table(nothing: &str, headings: &[&str], rows: &[Vec<String>]) {
    line(if rows.is_empty() { nothing.to_owned() } else { aligned(headings, rows, terminal_width()) });
}

fn terminal_width() -> Option<usize> {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(stdout).ok()).flatten()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// Each column is as wide as its widest cell, or narrower if the table would be wider than `limit`.
fn aligned(headings: &[&str], rows: &[Vec<String>], limit: Option<usize>) -> String {
    let headings: Vec<String> = headings.iter().map(|heading| printable(heading)).collect();
    let rows = rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect());
    let lines: Vec<Vec<String>> = std::iter::once(headings).chain(rows).collect();
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let widest =
        |column: usize| lines.iter().filter_map(|row| row.get(column)).map(|it| it.chars().count()).max();
    let mut widths: Vec<usize> = (0..columns).map(|column| widest(column).unwrap_or_default()).collect();
    if let Some(limit) = limit {
        let longest_word = |cell: &String| cell.split(' ').map(|word| word.chars().count()).max();
        let least = (0..columns).map(|column| {
            let words = lines.iter().filter_map(|row| row.get(column)).filter_map(longest_word);
            words.max().unwrap_or_default().min(WORD_WIDTH_MAX)
        });
        narrow(&mut widths, &least.collect::<Vec<_>>(), limit);
    }
    let printed = lines.iter().flat_map(|row| printed_lines(row, &widths));
    printed.collect::<Vec<_>>().join("\n")
}

/// Takes from the widest columns until the table fits, as far as that is possible.
fn narrow(widths: &mut [usize], least: &[usize], limit: usize) {
    let mut excess =
        (widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)).saturating_sub(limit);
    while excess > 0 {
        match widths.iter_mut().zip(least).filter(|(width, least)| **width > **least).max() {
            Some((widest, _)) => *widest -= 1,
            None => return,
        }
        excess -= 1;
    }
}

fn printed_lines(row: &[String], widths: &[usize]) -> Vec<String> {
    let cells: Vec<Vec<String>> = row.iter().zip(widths).map(|(cell, width)| wrapped(cell, *width)).collect();
    let height = cells.iter().map(Vec::len).max().unwrap_or_default();
    let printed = |number: usize| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| {
            let text = cell.get(number).map_or("", String::as_str);
            format!("{text:width$}")
        });
        padded.collect::<Vec<_>>().join(&" ".repeat(GAP)).trim_end().to_owned()
    };
    (0..height).map(printed).collect()
}

/// Breaks at the last space that fits, or within a word that is too long.
fn wrapped(cell: &str, width: usize) -> Vec<String> {
    let mut rest: Vec<char> = cell.chars().collect();
    let mut lines = Vec::new();
    while rest.len() > width.max(1) {
        let at = rest.iter().take(width + 1).rposition(|c| *c == ' ').filter(|at| *at > 0);
        let tail = rest.split_off(at.unwrap_or(width.max(1)));
        lines.push(rest.into_iter().collect());
        rest = tail.into_iter().skip_while(|c| *c == ' ').collect();
    }
    lines.push(rest.into_iter().collect());
    lines
}

/// Cells may hold data of tenants: a line feed would break the table, an escape sequence could command the
/// terminal.
fn printable(cell: &str) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    cell.chars().map(escaped).collect()
}

/// Prints the fields of an object, one a line. `in_words` returns the text of those that are not shown as in
/// JSON.
pub fn show<T: Described>(object: &T, in_words: impl Fn(&str) -> Option<String>) {
    let values = serde_json::to_value(object).unwrap_or_default();
    let width = T::FIELDS.iter().map(|field| field.name.len()).max().unwrap_or_default();
    for Field { name, kind, .. } in T::FIELDS {
        let text = in_words(name).unwrap_or_else(|| in_general(&values[name], *kind));
        line(format!("{name:width$}  {text}"));
    }
}

fn in_general(value: &Value, kind: FieldKind) -> String {
    match (value, kind) {
        (Value::Null, _) => "-".to_owned(),
        (Value::String(text), FieldKind::Time) => {
            OffsetDateTime::parse(text, &Rfc3339).map_or_else(|_| text.clone(), time)
        }
        (Value::String(text), _) => printable(text),
        (other, _) => other.to_string(),
    }
}

/// Returns the value, or `-` if there is none.
pub fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Returns the value, or the configuration's one as `20 (default)`.
pub fn or_default(value: Option<impl Display>, default: impl Display) -> String {
    value.map_or_else(|| format!("{default} (default)"), |value| value.to_string())
}

/// Returns networks as `10.0.0.0/8, ::1/128`; `any` if there is no restriction.
pub fn networks(allowed: &[String]) -> String {
    if allowed.is_empty() { "any".to_owned() } else { allowed.join(", ") }
}

/// Returns the time in UTC as RFC 3339, to the second: `2027-01-31T18:00:00Z`.
pub fn time(time: OffsetDateTime) -> String {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    time.to_offset(UtcOffset::UTC).format(format).unwrap_or_else(|_| time.to_string())
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn columns_align_whatever_letters_are_in_them() {
        let rows = [vec!["müller".to_owned(), "x".to_owned()], vec!["a".to_owned(), "yy".to_owned()]];
        assert_eq!(aligned(&["NAME", "V"], &rows, None), "NAME    V\nmüller  x\na       yy");
    }

    #[test]
    fn a_table_that_is_too_wide_for_the_terminal_continues_on_further_lines() {
        let rows = [vec!["api".to_owned(), "acme, globex, initech".to_owned(), "read_only".to_owned()]];
        let headings = ["NAME", "TENANTS", "ACCESS"];
        let expected = "NAME  TENANTS        ACCESS\napi   acme, globex,  read_only\n      initech";
        assert_eq!(aligned(&headings, &rows, Some(30)), expected);
        let whole = aligned(&headings, &rows, None);
        assert_eq!(whole.lines().count(), 2, "{whole}");
        assert_eq!(wrapped("abcdefghij", 4), ["abcd", "efgh", "ij"]);
    }

    #[test]
    fn a_cell_cannot_break_the_table_or_command_the_terminal() {
        let rows = [vec!["a\nb\u{1b}[2J".to_owned()]];
        assert_eq!(aligned(&["V"], &rows, None), "V\na\\nb\\u{1b}[2J");
    }

    #[test]
    fn times_are_utc_and_defaults_are_marked() {
        assert_eq!(time(datetime!(2027-01-31 19:00:00.25 +1)), "2027-01-31T18:00:00Z");
        assert_eq!(
            (or_default(Some(40), 20), or_default(None::<i32>, 20)),
            ("40".into(), "20 (default)".into())
        );
    }
}
