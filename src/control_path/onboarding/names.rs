//! Names of tenants, databases and roles: what is allowed, what is derived, and how they are quoted.
//!
//! Utility statements (`CREATE ROLE`, `GRANT`, …) take no parameters, so names enter them as text. They do so
//! through [`ident`] and [`literal`] only, and only after [`check_tenant_name`] or [`check_identifier`].

use std::borrow::Cow;

use postgres_protocol::escape::{escape_identifier, escape_literal};
use sha2::{Digest as _, Sha256};

/// PostgreSQL's NAMEDATALEN - 1. PostgreSQL truncates longer names.
pub const NAME_BYTES_MAX: usize = 63;
/// Leaves room for `_` and a number of two digits, for a derived role name that is taken.
const ROLE_STEM_BYTES_MAX: usize = NAME_BYTES_MAX - "_rw".len() - "_99".len();
/// Maximum of role names tried; each one taken is an existing role.
pub const ROLE_CANDIDATES_MAX: u32 = 99;

/// Databases of PostgreSQL itself, and names of the admin console.
const RESERVED: [&str; 6] = ["pglobby", "pgbouncer", "postgres", "template0", "template1", "all"];

/// Why a name is invalid: one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(String);

/// Checks a tenant's name. `central_database` is the name of the central database.
pub fn check_tenant_name(name: &str, central_database: &str) -> Result<(), NameError> {
    check_identifier("tenant", name)?;
    // `alice@acme` means login alice of tenant acme, and `--tenants acme,globex` means two.
    for (sign, use_of_it) in [('@', "login and tenant in a user name"), (',', "names in a list")] {
        if name.contains(sign) {
            return Err(NameError(format!(
                "tenant name {name:?} holds '{sign}', which separates {use_of_it}; choose a name without it"
            )));
        }
    }
    check_not_reserved("tenant", name, central_database)
}

/// Checks the name of a tenant's database.
pub fn check_database_name(name: &str, central_database: &str) -> Result<(), NameError> {
    check_identifier("database", name)?;
    check_not_reserved("database", name, central_database)
}

/// Checks that `name` is a valid identifier that PostgreSQL does not change.
pub fn check_identifier(what: &'static str, name: &str) -> Result<(), NameError> {
    check_text(what, name, NAME_BYTES_MAX)
}

/// Checks that `name` is not empty and has at most `max` bytes and no control characters or outer spaces.
pub fn check_text(what: &'static str, name: &str, max: usize) -> Result<(), NameError> {
    let bytes = name.len();
    let problem = if name.is_empty() {
        format!("a {what} needs a name")
    } else if bytes > max {
        // PostgreSQL would truncate it.
        format!("{what} name {name:?} has {bytes} bytes; PostgreSQL allows {max}")
    } else if name.chars().any(char::is_control) {
        format!("{what} name {name:?} holds a control character; choose a name without it")
    } else if name.trim() != name {
        format!("{what} name {name:?} begins or ends with a space; choose a name without it")
    } else {
        return Ok(());
    };
    Err(NameError(problem))
}

fn check_not_reserved(what: &'static str, name: &str, central_database: &str) -> Result<(), NameError> {
    let why = if name == central_database {
        "it is the central database"
    } else if matches!(name, "pglobby" | "pgbouncer") {
        "clients reach the admin console by it"
    } else if name == "all" {
        "it stands for every tenant on the command line"
    } else if matches!(name, "." | "..") {
        "it leads elsewhere in the path of a URL"
    } else if RESERVED.contains(&name) {
        "it is PostgreSQL's own"
    } else {
        return Ok(());
    };
    Err(NameError(format!("{what} name {name:?} is reserved ({why}); choose another name")))
}

/// The names of a tenant's two roles at the `attempt`-th attempt (from 1): `acme_rw` and `acme_ro`, then
/// `acme_2_rw`, ….
///
/// A long name is cut and gets a hash of the whole name. PostgreSQL reserves the prefix `pg_`.
pub fn role_names(tenant: &str, attempt: u32) -> (String, String) {
    let mut stem = tenant.to_owned();
    if stem.starts_with("pg_") {
        stem.insert_str(0, "t_");
    }
    if stem.len() > ROLE_STEM_BYTES_MAX {
        let hash = Sha256::digest(tenant.as_bytes());
        let hash: String = hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let mut end = ROLE_STEM_BYTES_MAX - hash.len() - 1;
        while !stem.is_char_boundary(end) {
            end -= 1;
        }
        stem.truncate(end);
        stem = format!("{stem}_{hash}");
    }
    if attempt > 1 {
        stem = format!("{stem}_{attempt}");
    }
    (format!("{stem}_rw"), format!("{stem}_ro"))
}

/// `name` as one word of a shell command, for commands in messages.
pub fn shell_word(name: &str) -> Cow<'_, str> {
    // Only NUL cannot be quoted, and no name contains it.
    shlex::try_quote(name).unwrap_or(Cow::Borrowed(name))
}

/// `name` as a quoted SQL identifier.
pub fn ident(name: &str) -> String {
    escape_identifier(name)
}

/// `text` as a quoted SQL literal, whatever `standard_conforming_strings` says.
pub fn literal(text: &str) -> String {
    escape_literal(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ordinary_and_odd_names_are_tenants_names() {
        for name in
            ["acme", "Acme", "a", "o'neil", "say \"hi\"", "a.b", "müller", "日本", "x; DROP DATABASE y", "-x"]
        {
            assert_eq!(check_tenant_name(name, "central"), Ok(()), "{name}");
        }
        assert_eq!(check_tenant_name(&"x".repeat(63), "central"), Ok(()));
    }

    #[test]
    fn what_cannot_be_a_tenants_name_says_why() {
        for (name, words) in [
            ("", "needs a name"),
            ("pglobby", "admin console"),
            ("pgbouncer", "admin console"),
            ("postgres", "PostgreSQL's own"),
            ("template0", "PostgreSQL's own"),
            ("template1", "PostgreSQL's own"),
            ("central", "central database"),
            ("all", "every tenant"),
            ("alice@acme", "'@'"),
            (" acme", "space"),
            ("acme\u{a0}", "space"),
            ("ac\0me", "control"),
            ("ac\nme", "control"),
        ] {
            let error = check_tenant_name(name, "central").expect_err(name).to_string();
            assert!(error.contains(words), "{name:?}: {error}");
        }
        let long = check_tenant_name(&"ü".repeat(32), "central").expect_err("64 bytes").to_string();
        assert!(long.contains("64 bytes"), "{long}");
    }

    #[test]
    fn roles_are_named_after_the_tenant() {
        assert_eq!(role_names("acme", 1), ("acme_rw".to_owned(), "acme_ro".to_owned()));
        assert_eq!(role_names("acme", 2).0, "acme_2_rw");
        assert_eq!(role_names("pg_x", 1).0, "t_pg_x_rw");
    }

    #[test]
    fn quotes_inside_are_doubled() {
        assert_eq!(ident(r#"a"b.c"#), r#""a""b.c""#);
        assert_eq!(literal("o'neil"), "'o''neil'");
        assert_eq!(literal(r"back\slash"), r" E'back\\slash'");
    }

    #[test]
    fn a_command_that_is_told_can_be_pasted() {
        for name in ["acme", "it's acme", "a; rm -rf /", "$HOME", "\u{e9}t\u{e9}"] {
            assert_eq!(shlex::split(&format!("x {}", shell_word(name))).unwrap(), ["x", name]);
        }
    }

    proptest! {
        #[test]
        fn role_names_fit_and_tell_long_tenants_apart(a in "\\PC{1,63}", b in "\\PC{1,63}", attempt in 1..=ROLE_CANDIDATES_MAX) {
            prop_assume!(a.len() <= 63 && b.len() <= 63 && a != b);
            let (rw, ro) = role_names(&a, attempt);
            prop_assert!(rw.len() <= NAME_BYTES_MAX && ro.len() <= NAME_BYTES_MAX);
            prop_assert!(!rw.starts_with("pg_"));
            prop_assert_ne!(&rw, &ro);
            if a.len() > ROLE_STEM_BYTES_MAX && b.len() > ROLE_STEM_BYTES_MAX {
                prop_assert_ne!(rw, role_names(&b, attempt).0);
            }
        }

        #[test]
        fn a_quoted_name_ends_where_it_should(name in "\\PC*") {
            let quoted = ident(&name);
            let inside = &quoted[1..quoted.len() - 1];
            prop_assert!(!inside.replace("\"\"", "").contains('"'));
            prop_assert_eq!(inside.replace("\"\"", "\""), name);
        }
    }
}
