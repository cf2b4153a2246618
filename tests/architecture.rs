//! The structure that `src/lib.rs` promises: which folder may use which, that no circle is among them, and what a file may not
//! contain.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// What each part of the crate may use besides itself. `cli` and `main` put everything together and may use all of it.
const ALLOWED: [(&str, &[&str]); 9] = [
    ("wire", &[]),
    ("data_path", &["wire", "config", "error", "metrics"]),
    ("control_path", &["data_path", "wire", "config", "error", "metrics", "shutdown", "local_postgres"]),
    ("local_postgres", &[]),
    ("config", &[]),
    ("error", &["wire"]),
    ("metrics", &["error"]),
    ("shutdown", &["data_path", "error"]),
    ("fuzzing", &["control_path", "data_path", "wire", "config", "error"]),
];

/// Files of `data_path` that are its spine: they tell the story of a client and use all folders. No folder uses them.
const SPINE: [&str; 4] = ["mod", "listener", "session_start", "session_arrival"];

/// Folders that decide: bytes and time come in, decisions go out. Nothing in them waits, looks at a clock or touches a socket.
/// The same holds for each file whose first lines say `Pure`.
const PURE: [&str; 4] =
    ["data_path/exchange/", "data_path/prepared/", "data_path/session_state/", "data_path/sql/"];

struct Source {
    /// Relative to `src`.
    path: String,
    text: String,
    /// `text` without comments and without what is between quotes.
    code: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let path = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
        Source { path, code: code_only(&text), text }
    };
    rust_files(&src).into_iter().map(read).collect()
}

/// The text with line comments and the contents of string literals taken out; enough for code that rustfmt has been at.
fn code_only(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if let Some(raw) =
            ["r\"", "r#\"", "br\"", "br#\""].iter().find(|start| rest.starts_with(**start))
        {
            let end = if raw.contains('#') { "\"#" } else { "\"" };
            let body = &rest[raw.len()..];
            rest = &body[body.find(end).map_or(body.len(), |at| at + end.len())..];
            code.push_str("\"\"");
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\\"'") {
            rest = &rest[rest[1..].find('\'').unwrap() + 2..];
        } else if first == '"' {
            let mut escaped = false;
            let end = rest[1..].find(|character| {
                let ends = character == '"' && !escaped;
                escaped = character == '\\' && !escaped;
                ends
            });
            rest = &rest[end.map_or(rest.len(), |at| at + 2)..];
            code.push_str("\"\"");
        } else {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    code
}

/// The module that a file is: `data_path/pool/mod.rs` is `["data_path", "pool"]`.
fn module_of(path: &str) -> Vec<&str> {
    let mut module: Vec<&str> = path.trim_end_matches(".rs").split('/').collect();
    if matches!(module.last(), Some(&"mod" | &"lib" | &"main")) {
        module.pop();
    }
    module
}

/// Every path in `code` that starts at the crate's root, also by way of `super`, with groups taken apart.
fn paths_from_root(module: &[&str], code: &str) -> BTreeSet<Vec<String>> {
    let mut paths = BTreeSet::new();
    for (start, anchor) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        let before = code[..start].chars().next_back();
        if before.is_some_and(|before| before.is_alphanumeric() || before == '_' || before == ':') {
            continue;
        }
        let mut base: Vec<String> = Vec::new();
        let mut rest = &code[start..];
        if anchor == "super::" {
            base = module.iter().map(|part| (*part).to_owned()).collect();
            while let Some(behind) = rest.strip_prefix("super::") {
                base.pop();
                rest = behind;
            }
        } else {
            rest = &rest[anchor.len()..];
        }
        expand(&base, rest, &mut paths);
    }
    paths
}

/// Reads `a::b`, or `{a::b, c::{d, e}}`, behind `base`; hands back what follows.
fn expand<'c>(base: &[String], mut rest: &'c str, paths: &mut BTreeSet<Vec<String>>) -> &'c str {
    rest = rest.trim_start();
    if let Some(mut group) = rest.strip_prefix('{') {
        loop {
            group = group.trim_start();
            if let Some(behind) = group.strip_prefix('}') {
                return behind;
            }
            let before = group.len();
            group = expand(base, group, paths).trim_start();
            group = group.strip_prefix(',').unwrap_or(group);
            assert!(group.len() < before, "cannot read a use: {group:.80}");
        }
    }
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    let (name, mut behind) = rest.split_at(end);
    let mut path = base.to_vec();
    if name.is_empty() {
        behind = behind.strip_prefix('*').unwrap_or(behind);
    } else {
        path.push(name.to_owned());
    }
    if let Some(deeper) = behind.strip_prefix("::").filter(|_| !name.is_empty()) {
        return expand(&path, deeper, paths);
    }
    paths.insert(path);
    let behind = behind.trim_start();
    match behind.strip_prefix("as ") {
        Some(alias) => alias.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_'),
        None => behind,
    }
}

#[test]
fn paths_are_read_however_they_are_written() {
    let code = "use crate::{config::Config, data_path::{pool::{Pool, stats::*}, lease as hold}};\n\
                fn f() { super::super::wire::frame::cstr(); let x = crate::error::ClientError::NoUser; }";
    let paths = paths_from_root(&["data_path", "pool"], code);
    let joined: Vec<String> = paths.iter().map(|path| path.join("::")).collect();
    assert_eq!(
        joined,
        [
            "config::Config",
            "data_path::lease",
            "data_path::pool::Pool",
            "data_path::pool::stats",
            "error::ClientError::NoUser",
            "wire::frame::cstr"
        ]
    );
    assert_eq!(code_only("a // crate::b\n\"crate::c\\\"\" r#\"\"d\"# e '\"' f"), "a \n\"\" \"\" e  f");
}

#[test]
fn use_goes_from_the_control_path_to_the_data_path_to_the_wire_and_never_back() {
    let mut wrong = Vec::new();
    for source in sources() {
        let module = module_of(&source.path);
        let Some((own, allowed)) = ALLOWED.iter().find(|(part, _)| module.first() == Some(part)) else {
            assert!(
                matches!(module.first(), None | Some(&"cli")),
                "{}: a new part of the crate; say in ALLOWED what it may use",
                source.path
            );
            continue;
        };
        for path in paths_from_root(&module, &source.code) {
            let used = path.first().map_or("", String::as_str);
            let known = used == "cli" || ALLOWED.iter().any(|(part, _)| *part == used);
            if !known || used == *own || allowed.contains(&used) {
                continue;
            }
            wrong.push(format!("{} uses {}", source.path, path.join("::")));
        }
    }
    assert!(wrong.is_empty(), "against the direction of use:\n{}", wrong.join("\n"));
}

/// A file without its tests.
fn without_tests(source: &Source) -> &str {
    if source.path.ends_with("tests.rs") || source.path.starts_with("data_path/simulation/") {
        return "";
    }
    source.code.split("\nmod tests {").next().unwrap_or_default()
}

/// Which folder (or file beside the folders) of `data_path` uses which other ones, with a path that says so.
fn use_within_data_path() -> BTreeMap<String, BTreeMap<String, String>> {
    let mut used: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for source in sources().iter().filter(|source| source.path.starts_with("data_path/")) {
        let module = module_of(&source.path);
        let own = *module.get(1).unwrap_or(&"mod");
        if SPINE.contains(&own) {
            continue;
        }
        for path in paths_from_root(&module, without_tests(source)) {
            let [root, part, ..] = &*path else { continue };
            if root == "data_path" && part != own {
                let example = format!("{} uses {}", source.path, path.join("::"));
                used.entry(own.to_owned()).or_default().insert(part.clone(), example);
            }
        }
    }
    used
}

#[test]
fn the_folders_of_the_data_path_form_no_circle() {
    let mut used = use_within_data_path();
    assert!(used.len() > 10, "{used:?}");
    let spine: Vec<_> = used.values().flatten().filter(|(part, _)| SPINE.contains(&part.as_str())).collect();
    assert!(spine.is_empty(), "{spine:#?}");
    // Takes away what uses nothing that is left, until nothing is, or nothing goes.
    loop {
        let left: BTreeSet<String> = used.keys().cloned().collect();
        used.retain(|_, parts| {
            parts.retain(|part, _| left.contains(part));
            !parts.is_empty()
        });
        if used.len() == left.len() {
            break;
        }
    }
    assert!(used.is_empty(), "a circle:\n{used:#?}");
}

#[test]
fn no_file_is_called_after_nothing_in_particular() {
    for source in sources() {
        let nothing = ["util", "utils", "common", "helper", "helpers", "misc"];
        let named = module_of(&source.path).into_iter().find(|part| nothing.contains(part));
        assert_eq!(named, None, "{}: its content has a better home", source.path);
    }
}

#[test]
fn what_decides_neither_waits_nor_looks_at_a_clock() {
    let is_pure = |source: &&Source| {
        let mut head = source.text.lines().take_while(|line| line.starts_with("//!"));
        PURE.iter().any(|folder| source.path.starts_with(folder))
            || head.any(|line| line.contains("Pure.") || line.contains("Pure:") || line.contains("Pure;"))
    };
    let sources = sources();
    assert!(sources.iter().filter(is_pure).count() > 70);
    for source in sources.iter().filter(is_pure) {
        // A time is a value like others; to ask for it is not.
        let (path, code) = (&source.path, without_tests(source).replace("tokio::time::Instant", ""));
        for word in ["tokio", "std::fs", "TcpStream", "Instant::now", "SystemTime::now", "async fn", ".await"]
        {
            let longer = |rest: &str| rest.starts_with(|next: char| next.is_alphanumeric() || next == '_');
            let found = code.match_indices(word).any(|(at, _)| !longer(&code[at + word.len()..]));
            assert!(!found, "{path} says it decides only, and has {word}");
        }
    }
}

#[test]
fn nothing_is_left_for_later() {
    let left = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];
    for folder in ["src", "tests", "benches"] {
        for path in rust_files(&root().join(folder)) {
            let code = code_only(&std::fs::read_to_string(&path).unwrap());
            for mark in left {
                assert!(!code.contains(mark), "{} has {mark}", path.display());
            }
        }
    }
}
