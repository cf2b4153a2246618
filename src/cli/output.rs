//! What commands print. A reader that has gone away (`pglobby check | head`) is no failure.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use serde::Serialize;

/// A line on stdout.
pub fn line(text: impl Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// An object or a list on stdout, for programs.
pub fn json(value: &impl Serialize) {
    if let Ok(text) = serde_json::to_string_pretty(value) {
        line(text);
    }
}

/// A line on stderr.
pub fn complain(text: impl Display) {
    let _ = writeln!(io::stderr(), "pglobby: {text}");
}
