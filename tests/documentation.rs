//! Checks the documents against the sources: links, configuration keys, commands, names, error codes, pins.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use clap::CommandFactory as _;
use pglobby::{cli::Cli, data_path::session_state::pins::Pins};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Paths and texts of README.md, CHANGELOG.md and the documents in docs/, docker/ and deploy/kubernetes/.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths = vec![root().join("README.md"), root().join("CHANGELOG.md")];
    for folder in ["docs", "docker", "deploy/kubernetes"] {
        let entries = std::fs::read_dir(root().join(folder)).unwrap();
        paths.extend(entries.map(|entry| entry.unwrap().path()));
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    assert!(paths.len() >= 6, "{paths:?}");
    paths.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

/// All files below `folder` as one text, with their names.
fn everything_in(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        text += &format!("{}\n", path.file_name().unwrap_or_default().display());
        text += &if path.is_dir() { everything_in(&path) } else { read(&path) };
    }
    text
}

/// The fenced blocks of a document that are marked `language`.
fn blocks<'d>(document: &'d str, language: &str) -> Vec<&'d str> {
    let mut found = Vec::new();
    let mut fences = document.split("\n```");
    fences.next();
    while let Some(block) = fences.next() {
        let (mark, body) = block.split_once('\n').unwrap_or((block, ""));
        if mark == language {
            found.push(body);
        }
        fences.next(); // The text after the block.
    }
    found
}

/// The words in single backticks, outside of blocks.
fn code_words(document: &str) -> Vec<&str> {
    let prose = document.split("\n```").step_by(2);
    prose.flat_map(|prose| prose.split('`').skip(1).step_by(2)).collect()
}

/// The anchor that GitHub makes of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn configuration_keys() -> BTreeSet<String> {
    let mut section = String::new();
    let mut keys = BTreeSet::new();
    for line in read("proxy.toml").lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
        } else if let Some((key, _)) = line.trim_start_matches('#').split_once(" = ") {
            keys.insert(format!("{section}{key}"));
        }
    }
    keys
}

#[test]
fn every_link_has_a_target() {
    for (path, document) in documents() {
        for link in document.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if link.starts_with("https://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link} is not there", path.display());
            if !heading.is_empty() {
                let text = read(&target);
                let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
                let found =
                    headings.map(|line| anchor(line.trim_start_matches('#'))).any(|name| name == heading);
                assert!(found, "{}: {link} names no heading", path.display());
            }
        }
    }
}

#[test]
fn every_key_in_an_example_is_one_of_proxy_toml() {
    let keys = configuration_keys();
    let mut seen = 0;
    for (path, document) in documents() {
        for block in blocks(&document, "toml") {
            let mut section = String::new();
            for line in block.lines().filter(|line| !line.starts_with('#')) {
                if let Some(name) = line.strip_prefix('[') {
                    section = format!("{}.", name.split(']').next().unwrap());
                } else if let Some((key, _)) = line.split_once(" = ") {
                    let key = format!("{section}{key}");
                    assert!(keys.contains(&key), "{}: {key} is no key of proxy.toml", path.display());
                    seen += 1;
                }
            }
        }
    }
    assert!(seen >= 5, "{seen}");
}

/// Such names are keys, columns, metrics and functions.
#[test]
fn every_name_with_an_underscore_is_in_the_sources() {
    let folders = ["src", "examples"].map(|name| everything_in(&root().join(name)));
    let sources = read("proxy.toml") + &read("docker/compose.yaml") + &folders.concat();
    let is_name_character = |c: char| c.is_alphanumeric() || c == '_';
    let known: BTreeSet<&str> = sources.split(|c| !is_name_character(c)).collect();
    // Names of PostgreSQL, and names that the sources build from parts.
    let elsewhere = [
        "current_query",
        "current_user",
        "session_user",
        "pg_stat_activity",
        "application_name",
        "search_path",
    ];
    for (path, document) in documents() {
        for words in code_words(&document) {
            for name in
                words.split(|c| !is_name_character(c)).filter(|name| name.trim_matches('_').contains('_'))
            {
                let metric =
                    name.strip_prefix("pglobby_").map(|name| name.strip_suffix("_total").unwrap_or(name));
                let variable = name.strip_prefix("PGLOBBY_").map(str::to_ascii_lowercase);
                let keys = configuration_keys();
                let is_variable =
                    variable.is_some_and(|name| keys.iter().any(|key| key.replace('.', "_") == name));
                assert!(
                    known.contains(name)
                        || metric.is_some_and(
                            |name| known.contains(name) || name.bytes().all(|b| b.is_ascii_digit())
                        )
                        || is_variable
                        || elsewhere.contains(&name)
                        || name.starts_with("client_tls_")
                        || name.starts_with("server_tls_"),
                    "{}: `{name}` is nowhere in the sources",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn every_source_file_that_is_named_is_there() {
    let mut named = 0;
    for (path, document) in documents() {
        for word in code_words(&document) {
            let is_path = word.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./".contains(&b));
            if !is_path || !(word.ends_with(".rs") || word.ends_with('/') && word != "/") {
                continue;
            }
            let folders = ["", "src", "src/data_path", "src/control_path"];
            let found = folders.iter().any(|folder| root().join(folder).join(word).exists());
            assert!(found, "{}: {word} is not there", path.display());
            named += 1;
        }
    }
    assert!(named >= 30, "{named}");
}

#[test]
fn every_command_that_is_shown_is_one_with_those_options() {
    let mut whole = Cli::command();
    whole.build();
    let mut seen = 0;
    for (path, document) in documents() {
        let shown = blocks(&document, "sh").into_iter().chain(blocks(&document, "console"));
        let lines = shown.flat_map(str::lines).map(|line| line.split(" #").next().unwrap());
        for line in lines.flat_map(|line| line.split("&&")) {
            let Some((_, arguments)) = line.rsplit_once("pglobby ") else { continue };
            if !line.trim_start_matches(['$', ' ']).split(' ').next().unwrap().ends_with("pglobby") {
                continue;
            }
            let mut command = &whole;
            for word in arguments.split_whitespace() {
                if let Some(option) = word.strip_prefix("--") {
                    let option = option.split('=').next().unwrap();
                    let known = command.get_arguments().any(|known| known.get_long() == Some(option));
                    assert!(known, "{}: {line}: there is no --{option}", path.display());
                } else if command.has_subcommands() {
                    let next = command.find_subcommand(word);
                    command = next.unwrap_or_else(|| panic!("{}: {line}: no {word}", path.display()));
                    seen += 1;
                }
                // Other words are names and values.
            }
        }
    }
    assert!(seen >= 20, "{seen}");
}

#[test]
fn every_sqlstate_that_clients_get_is_explained() {
    let operations = read("docs/operations.md");
    let sources = read("src/error/sqlstate.rs")
        + &read("src/error/memory_limit.rs")
        + &read("src/data_path/sessions/timeouts.rs")
        + &read("src/data_path/login/startup_options.rs");
    let is_sqlstate = |text: &&str| {
        text.len() == 5
            && text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
            && text.bytes().any(|b| b.is_ascii_digit() || text.starts_with("XX"))
    };
    let codes: BTreeSet<&str> = sources.split('"').filter(is_sqlstate).collect();
    assert!(codes.len() >= 14, "{codes:?}");
    for code in codes {
        assert!(operations.contains(&format!("| {code} |")), "docs/operations.md does not explain {code}");
    }
}

#[test]
fn every_pin_is_explained() {
    let transparency = read("docs/transparency.md");
    for (_, name) in Pins::named() {
        let explained = transparency.contains(&format!("| `{name}` |"));
        assert!(explained, "docs/transparency.md does not explain {name}");
    }
}
