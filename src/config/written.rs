//! The configuration as written: `proxy.toml` flattened to `section.key`, overridden by environment
//! variables.
//!
//! Each typed read (`duration`, `count`, …) makes its key known. A key that is never read is unknown.
//! Problems are collected, so that all are reported at once.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use toml::de::{DeTable, DeValue};
use zeroize::Zeroizing;

use crate::config::units;

/// Reads an environment variable. A function, so that tests need no real environment.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The values, and the problems found so far.
pub struct Written<'a> {
    values: BTreeMap<String, Entry>,
    environment: Environment<'a>,
    /// Relative paths in the file are relative to its folder.
    folder: Option<PathBuf>,
    known: Vec<&'static str>,
    problems: Vec<String>,
}

struct Entry {
    value: Value,
    origin: Origin,
}

/// Text is zeroised, because the central URL may contain a password.
enum Value {
    Text(Zeroizing<String>),
    Number(i64),
    Truth(bool),
    List(Vec<String>),
    Other(&'static str),
}

#[derive(Clone)]
enum Origin {
    Line(usize),
    Variable(String),
}

impl<'a> Written<'a> {
    /// Parses the file. A syntax error becomes a problem, and the file then counts as empty.
    pub fn parse(text: &str, folder: Option<&Path>, environment: Environment<'a>) -> Self {
        let mut written = Self {
            values: BTreeMap::new(),
            environment,
            folder: folder.map(Path::to_owned),
            known: Vec::new(),
            problems: Vec::new(),
        };
        let line_of = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
        match DeTable::parse(text) {
            Ok(table) => written.flatten("", table.get_ref(), &line_of),
            // The parser's message quotes the line, which may contain a password.
            Err(error) => {
                let line = line_of(error.span().map_or(0, |span| span.start));
                written.problems.push(format!("line {line}: {}", error.message()));
            }
        }
        written
    }

    fn flatten(&mut self, prefix: &str, table: &DeTable<'_>, line_of: &dyn Fn(usize) -> usize) {
        for (key, value) in table {
            let name = format!("{prefix}{}", key.get_ref());
            let value = match value.get_ref() {
                DeValue::Table(table) => {
                    self.flatten(&format!("{name}."), table, line_of);
                    continue;
                }
                DeValue::String(text) => Value::Text(Zeroizing::new(text.to_string())),
                DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                    .map_or(Value::Other("a huge number"), Value::Number),
                DeValue::Boolean(truth) => Value::Truth(*truth),
                DeValue::Array(items) => items
                    .iter()
                    .map(|item| item.get_ref().as_str().map(str::to_owned))
                    .collect::<Option<_>>()
                    .map_or(Value::Other("a list of other things than strings"), Value::List),
                DeValue::Float(_) => Value::Other("a decimal number"),
                DeValue::Datetime(_) => Value::Other("a date"),
            };
            self.values.insert(name, Entry { value, origin: Origin::Line(line_of(key.span().start)) });
        }
    }

    /// Takes a key's value out, the environment's before the file's. Empty text counts as not written.
    fn take(&mut self, key: &'static str) -> Option<Entry> {
        self.known.push(key);
        let variable = variable_of(key);
        let from_file = self.values.remove(key);
        let entry = match (self.environment)(&variable) {
            Some(text) => {
                Some(Entry { value: Value::Text(Zeroizing::new(text)), origin: Origin::Variable(variable) })
            }
            None => from_file,
        };
        entry.filter(|entry| !matches!(&entry.value, Value::Text(text) if text.trim().is_empty()))
    }

    /// Reads a key with `read`, whose errors follow the key's name.
    fn ask<T>(&mut self, key: &'static str, read: impl FnOnce(Value) -> Result<T, String>) -> Option<T> {
        let entry = self.take(key)?;
        match read(entry.value) {
            Ok(value) => Some(value),
            Err(problem) => {
                self.problems.push(match entry.origin {
                    Origin::Line(line) => format!("line {line}: {key} {problem}"),
                    Origin::Variable(variable) => format!("{variable} {problem}"),
                });
                None
            }
        }
    }

    /// A duration above zero.
    pub fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        let read = |value| match read_duration(value)? {
            Duration::ZERO => Err("must be longer than nothing".to_owned()),
            duration => Ok(duration),
        };
        self.ask(key, read).unwrap_or(default)
    }

    /// A duration that `0` or `off` disables.
    pub fn duration_or_off(&mut self, key: &'static str, default: Option<Duration>) -> Option<Duration> {
        let read = |value| match value {
            Value::Truth(false) => Ok(Duration::ZERO),
            Value::Text(text) if text.trim() == "off" => Ok(Duration::ZERO),
            value => read_duration(value),
        };
        self.ask(key, read).or(default).filter(|duration| !duration.is_zero())
    }

    /// A number of bytes.
    pub fn bytes(&mut self, key: &'static str, default: usize) -> usize {
        let read = |value| match value {
            Value::Text(text) => units::bytes(&text),
            Value::Number(number) => units::bytes(&number.to_string()),
            other => Err(other.instead_of("a size, as \"256MB\"")),
        };
        self.ask(key, read).unwrap_or(default)
    }

    /// The same; `auto` is the default.
    pub fn bytes_or_auto(&mut self, key: &'static str, default: fn() -> usize) -> usize {
        let read = |value| match value {
            Value::Text(text) if text.trim() == "auto" => Ok(None),
            Value::Text(text) => units::bytes(&text).map(Some),
            Value::Number(number) => units::bytes(&number.to_string()).map(Some),
            other => Err(other.instead_of("a size, as \"256MB\", or \"auto\"")),
        };
        self.ask(key, read).flatten().unwrap_or_else(default)
    }

    /// A whole number, at least `min`.
    pub fn count<N>(&mut self, key: &'static str, default: N, min: N) -> N
    where
        N: TryFrom<i64> + PartialOrd + std::fmt::Display,
    {
        let read = |value| {
            let number: i64 = match value {
                Value::Number(number) => number,
                Value::Text(text) => text.trim().parse().map_err(|_| "must be a whole number".to_owned())?,
                other => return Err(other.instead_of("a whole number")),
            };
            let fits = N::try_from(number).ok().filter(|number| *number >= min);
            fits.ok_or_else(|| match number < 0 || N::try_from(number).is_ok() {
                true => format!("must be {min} or more"),
                false => "is too large".to_owned(),
            })
        };
        self.ask(key, read).unwrap_or(default)
    }

    /// `true` or `false`.
    pub fn truth(&mut self, key: &'static str, default: bool) -> bool {
        let read = |value| match value {
            Value::Truth(truth) => Ok(truth),
            Value::Text(text) => match text.trim() {
                "true" | "on" | "1" => Ok(true),
                "false" | "off" | "0" => Ok(false),
                _ => Err("must be true or false".to_owned()),
            },
            other => Err(other.instead_of("true or false")),
        };
        self.ask(key, read).unwrap_or(default)
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)], default: T) -> T {
        let all: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let read = |value| match value {
            Value::Text(text) => words
                .iter()
                .find_map(|(word, meant)| (*word == text.trim()).then_some(*meant))
                .ok_or_else(|| format!("must be one of {}", all.join(", "))),
            other => Err(other.instead_of(&format!("one of {}", all.join(", ")))),
        };
        self.ask(key, read).unwrap_or(default)
    }

    /// Text, parsed by `parse`.
    pub fn text<T>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.ask(key, |value| match value {
            Value::Text(text) => parse(text.trim()),
            other => Err(other.instead_of("text in quotes")),
        })
    }

    /// A path; a relative one is relative to the file it was written in, or to the working folder if it came
    /// from a variable.
    pub fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        let written = self.text(key, |text| Ok(PathBuf::from(text)))?;
        Some(self.found_from(key, written))
    }

    /// The same; `Some(None)` for `off`.
    pub fn path_or_off(&mut self, key: &'static str) -> Option<Option<PathBuf>> {
        let written = self.text(key, |text| Ok((text != "off").then(|| PathBuf::from(text))))?;
        Some(written.map(|written| self.found_from(key, written)))
    }

    fn found_from(&self, key: &str, written: PathBuf) -> PathBuf {
        let from_variable = (self.environment)(&variable_of(key)).is_some();
        match &self.folder {
            Some(folder) if !from_variable => folder.join(written),
            _ => written,
        }
    }

    /// A list: an array of strings, or one string with commas.
    pub fn list(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.ask(key, read_list)
    }

    /// A list of networks; a bare address is a network of one.
    pub fn networks(&mut self, key: &'static str) -> Option<Vec<IpNet>> {
        self.ask(key, |value| {
            let network = |text: String| {
                let single = || std::net::IpAddr::from_str(&text).map(IpNet::from);
                IpNet::from_str(&text)
                    .or_else(|_| single())
                    .map_err(|_| format!("holds \"{text}\", which is not a network as 10.0.0.0/8 is"))
            };
            read_list(value)?.into_iter().map(network).collect()
        })
    }

    /// Adds a problem of several keys together.
    pub fn problem(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    /// All known keys, and all problems, unknown keys included.
    pub fn finish(mut self) -> (Vec<&'static str>, Vec<String>) {
        for (key, entry) in &self.values {
            let similarity = |known: &&&str| (strsim::jaro_winkler(key, known) * 1000.0) as u32;
            let hint = match self.known.iter().max_by_key(similarity) {
                Some(nearest) => format!("; did you mean {nearest}?"),
                None => String::new(),
            };
            if let Origin::Line(line) = entry.origin {
                self.problems.push(format!("line {line}: {key} is not a known key{hint}"));
            }
        }
        (self.known, self.problems)
    }
}

impl Value {
    fn instead_of(&self, wanted: &str) -> String {
        let found = match self {
            Self::Text(_) => "text",
            Self::Number(_) => "a number",
            Self::Truth(_) => "true or false",
            Self::List(_) => "a list",
            Self::Other(what) => what,
        };
        format!("must be {wanted}, not {found}")
    }
}

fn read_duration(value: Value) -> Result<Duration, String> {
    match value {
        Value::Text(text) => units::duration(&text),
        Value::Number(number) => units::duration(&number.to_string()),
        other => Err(other.instead_of("a duration, as \"30s\"")),
    }
}

fn read_list(value: Value) -> Result<Vec<String>, String> {
    let items = match value {
        Value::List(items) => items,
        Value::Text(text) => text.split(',').map(str::to_owned).collect(),
        other => return Err(other.instead_of("a list of strings")),
    };
    Ok(items.iter().map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect())
}

/// `central.url` is `PGLOBBY_CENTRAL_URL`. Other variables with our prefix are left alone: Kubernetes makes
/// some for every service, `PGLOBBY_SERVICE_HOST` for one called pglobby.
fn variable_of(key: &str) -> String {
    format!("PGLOBBY_{}", key.replace('.', "_").to_ascii_uppercase())
}
