//! Parses the `options` of a startup packet: a command line in one string, as PostgreSQL does.
//!
//! Source: `pg_split_opts` and `process_postgres_switches` in PostgreSQL's source.

use crate::{error::ClientError, wire::server_error::ErrorDetails};

/// The settings in order, and the tenant if there is one (`pglobby.tenant=…`, or bare `tenant=…`).
pub type OptionSettings = (Vec<(String, String)>, Option<String>);

/// Parses `options`. Fails at one that PostgreSQL refuses, or that an open server cannot take.
pub fn settings_of_options(options: &str) -> Result<OptionSettings, ClientError> {
    let mut settings = Vec::new();
    let mut tenant = None;
    let mut words = split(options).into_iter();
    while let Some(word) = words.next() {
        let setting = if let Some(name) = word.strip_prefix("--") {
            name.to_owned()
        } else if word == "-c" {
            words.next().ok_or_else(|| invalid("-c requires a value"))?
        } else if let Some(setting) = word.strip_prefix("-c") {
            setting.to_owned()
        } else if let Some(name) = word.strip_prefix("tenant=") {
            tenant = Some(name.to_owned());
            continue;
        } else {
            match shorthand(&word, &mut words) {
                Some(setting) => setting,
                None => {
                    let message = format!("invalid command-line argument for server process: {word}");
                    let hint = "Try \"postgres --help\" for more information.".to_owned();
                    let details = ErrorDetails::of(None, Some(hint));
                    return Err(ClientError::Server { sqlstate: "42601".into(), message, details });
                }
            }
        };
        let (name, value) = setting.split_once('=').ok_or_else(|| {
            invalid(&if word.starts_with("--") {
                format!("--{setting} requires a value")
            } else {
                format!("-c {setting} requires a value")
            })
        })?;
        // PostgreSQL reads dashes in a parameter's name as underscores.
        let name = name.replace('-', "_");
        if names_tenant(&name) {
            tenant = Some(value.to_owned());
        } else {
            settings.push((name, value.to_owned()));
        }
    }
    Ok((settings, tenant))
}

/// Whether a parameter names the tenant. Names of parameters are case-insensitive.
pub fn names_tenant(parameter: &str) -> bool {
    parameter.eq_ignore_ascii_case("pglobby.tenant")
}

fn invalid(words: &str) -> ClientError {
    ClientError::Server { sqlstate: "42601".into(), message: words.into(), details: None }
}

/// The setting of a one-letter switch of the `postgres` program that a client may use.
fn shorthand(word: &str, words: &mut impl Iterator<Item = String>) -> Option<String> {
    let (letter, attached) = word.strip_prefix('-')?.split_at_checked(1)?;
    let mut value = || if attached.is_empty() { words.next() } else { Some(attached.to_owned()) };
    match letter {
        "e" if attached.is_empty() => Some("datestyle=euro".into()),
        "S" => value().map(|value| format!("work_mem={value}")),
        "f" => value().and_then(|kind| {
            let method = match kind.as_str() {
                "s" => "enable_seqscan",
                "i" => "enable_indexscan",
                "o" => "enable_indexonlyscan",
                "b" => "enable_bitmapscan",
                "t" => "enable_tidscan",
                "n" => "enable_nestloop",
                "m" => "enable_mergejoin",
                "h" => "enable_hashjoin",
                _ => return None,
            };
            Some(format!("{method}=off"))
        }),
        _ => None,
    }
}

/// Splits at white space; a backslash quotes the next character.
fn split(options: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = options.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => word.get_or_insert_default().extend(characters.next()),
            space if space.is_ascii_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(options: &str) -> Vec<(String, String)> {
        settings_of_options(options).unwrap().0
    }

    #[test]
    fn every_spelling_of_a_setting_is_read() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            settings(r"-c a=1 -cb=2 --c-d=3  --search_path=x,\ y -c e=a\\b"),
            [
                pair("a", "1"),
                pair("b", "2"),
                pair("c_d", "3"),
                pair("search_path", "x, y"),
                pair("e", r"a\b")
            ]
        );
        assert_eq!(
            settings("-e -S 64 -fs"),
            [pair("datestyle", "euro"), pair("work_mem", "64"), pair("enable_seqscan", "off")]
        );
        assert_eq!(settings(""), []);
    }

    #[test]
    fn a_tenant_is_named_in_every_spelling() {
        for options in
            ["-c pglobby.tenant=acme", "-cpglobby.Tenant=acme", "--pglobby.tenant=acme", "tenant=acme"]
        {
            assert_eq!(settings_of_options(options).unwrap(), (vec![], Some("acme".into())));
        }
    }

    #[test]
    fn what_postgresql_refuses_is_refused() {
        for options in ["-c", "-c a", "--a", "nonsense", "-Z", "-"] {
            assert!(settings_of_options(options).is_err(), "{options}");
        }
    }
}
