//! Answers: tables and fields for people, JSON for scripts.

use serde::Serialize;

use crate::cli::output::{json, line};

/// `value` for scripts, or the same in words for people.
pub fn answer(as_json: bool, value: &impl Serialize, words: impl FnOnce()) {
    if as_json { json(value) } else { words() }
}

/// A table, or that there is nothing.
pub fn table(nothing: &str, headings: &[&str], rows: &[Vec<String>]) {
    line(if rows.is_empty() { nothing.to_owned() } else { aligned(headings, rows) });
}

/// Columns as wide as their widest cell, two spaces apart.
fn aligned(headings: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = headings
        .iter()
        .enumerate()
        .map(|(column, heading)| {
            let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.chain([heading.chars().count()]).max().unwrap_or_default()
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(headings.to_vec())];
    lines.extend(rows.iter().map(|row| line(row.iter().map(String::as_str).collect())));
    lines.join("\n")
}

/// An object's fields, one a line, for `show`.
pub fn fields(fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    for (name, value) in fields {
        line(format!("{name:width$}  {value}"));
    }
}

/// `-` where there is nothing.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_whatever_letters_are_in_them() {
        let rows = vec![vec!["müller".to_owned(), "x".to_owned()], vec!["a".to_owned(), "yy".to_owned()]];
        assert_eq!(aligned(&["NAME", "V"], &rows), "NAME    V\nmüller  x\na       yy");
    }
}
