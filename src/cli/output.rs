//! What commands print. A reader that closes the pipe early (`pglobby check | head`) is no error.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use serde::Serialize;

/// `--json`, where a command has no other options.
#[derive(Debug, clap::Args)]
pub struct Json {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// For a check that passed.
pub const GOOD: Style = AnsiColor::Green.on_default().bold();
/// For a check that failed.
pub const BAD: Style = AnsiColor::Red.on_default().bold();

/// Prints a line on standard output.
pub fn line(text: impl Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// Prints an object or a list on standard output, for programs.
pub fn json(value: &impl Serialize) {
    if let Ok(text) = serde_json::to_string_pretty(value) {
        line(text);
    }
}

/// Prints a line on standard error, where errors and progress go.
pub fn error_line(text: impl Display) {
    let _ = writeln!(io::stderr(), "pglobby: {text}");
}

/// Returns `text` in colour if standard output is a terminal that shows colours; `NO_COLOR` turns them off.
pub fn coloured(text: &str, style: Style) -> String {
    match AutoStream::choice(&io::stdout()) {
        ColorChoice::Never => text.to_owned(),
        _ => format!("{style}{text}{style:#}"),
    }
}
