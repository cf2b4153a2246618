//! What an administrator, or the driver in front of one, writes: a few words, read once into a
//! [`ConsoleCommand`].

use super::{ConsoleError, admin_commands::AdminStatement};
use crate::{
    data_path::sql::{self, Piece},
    shutdown::Ending,
};

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleCommand {
    /// `SHOW …`: the words after it, in lower case.
    Show(Vec<String>),
    /// `SELECT …`: its words in lower case, without spaces.
    Select(String),
    /// A setting that drivers send and the console ignores; the command tag to answer.
    Accepted(&'static str),
    /// `BEGIN`, `START TRANSACTION`.
    Begin,
    /// `COMMIT`, `END`, `ROLLBACK`, `ABORT`; the command tag to answer.
    End(&'static str),
    /// A command to this node.
    Node(NodeCommand),
    /// A command about a tenant or a login, for all nodes.
    Admin(AdminStatement),
}

/// A command to this node. It holds until the process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeCommand {
    /// Read the configuration again.
    Reload,
    /// End the process.
    Shutdown(Ending),
    /// End every session of a tenant, or all, and lend no server until RESUME.
    Kill(Option<String>),
    /// End one session.
    KillClient(i32),
    /// Close servers as they come back, and lend none until RESUME.
    Pause(Option<String>),
    /// Serve again.
    Resume(Option<String>),
    /// Accept no new session of the tenant.
    Disable(String),
    /// Accept sessions again.
    Enable(String),
    /// Replace the servers by new ones.
    Reconnect(Option<String>),
    /// Return when the servers to be closed are closed.
    WaitClose(Option<String>),
}

impl NodeCommand {
    /// The command's word, for logs.
    pub fn title(&self) -> &'static str {
        match self {
            Self::Reload => "RELOAD",
            Self::Shutdown(_) => "SHUTDOWN",
            Self::Kill(_) => "KILL",
            Self::KillClient(_) => "KILL_CLIENT",
            Self::Pause(_) => "PAUSE",
            Self::Resume(_) => "RESUME",
            Self::Disable(_) => "DISABLE",
            Self::Enable(_) => "ENABLE",
            Self::Reconnect(_) => "RECONNECT",
            Self::WaitClose(_) => "WAIT_CLOSE",
        }
    }

    /// The tenant or client it names; empty if it names none.
    pub fn subject(&self) -> String {
        match self {
            Self::Reload | Self::Shutdown(_) => String::new(),
            Self::KillClient(id) => id.to_string(),
            Self::Disable(tenant) | Self::Enable(tenant) => tenant.clone(),
            Self::Kill(tenant)
            | Self::Pause(tenant)
            | Self::Resume(tenant)
            | Self::Reconnect(tenant)
            | Self::WaitClose(tenant) => tenant.clone().unwrap_or_default(),
        }
    }
}

/// Parameters that drivers set by themselves.
const HARMLESS_SETTINGS: &str = "application_name bytea_output characteristics client_encoding
    client_min_messages datestyle extra_float_digits idle_in_transaction_session_timeout intervalstyle
    lock_timeout names search_path standard_conforming_strings statement_timeout time timezone transaction";

/// Reads statements separated by semicolons; empty ones are left out.
pub fn read(text: &str) -> Result<Vec<ConsoleCommand>, ConsoleError> {
    let unterminated = |what| ConsoleError::new("42601", format!("unterminated {what}"));
    let mut pieces = sql::pieces(text).map_err(unterminated)?;
    for piece in &mut pieces {
        if let Piece::Word(word) = piece {
            *word = word.to_lowercase();
        }
    }
    let statements = pieces.split(|piece| *piece == Piece::Symbol(';'));
    statements.filter(|statement| !statement.is_empty()).map(command).collect()
}

fn command(statement: &[Piece]) -> Result<ConsoleCommand, ConsoleError> {
    if let Some(words) = AdminStatement::read(statement) {
        return words.map(ConsoleCommand::Admin);
    }
    let Some((Piece::Word(verb), rest)) = statement.split_first() else {
        return Err(not_understood(statement));
    };
    let words: Vec<&str> = rest
        .iter()
        .filter_map(|piece| match piece {
            Piece::Word(word) => Some(word.as_str()),
            _ => None,
        })
        .collect();
    Ok(match verb.as_str() {
        "show" if words.len() == rest.len() => {
            ConsoleCommand::Show(words.into_iter().map(str::to_owned).collect())
        }
        "select" => ConsoleCommand::Select(rest.iter().map(written).collect()),
        "set" => match words.iter().find(|word| !matches!(**word, "session" | "local")) {
            Some(name) if HARMLESS_SETTINGS.split_whitespace().any(|known| known == *name) => {
                ConsoleCommand::Accepted("SET")
            }
            _ => {
                return Err(ConsoleError::new("0A000", "the console cannot change settings").hint(
                    "Change the configuration file and RELOAD; SHOW CONFIG shows the values in effect.",
                ));
            }
        },
        "reset" => ConsoleCommand::Accepted("RESET"),
        "discard" => ConsoleCommand::Accepted("DISCARD ALL"),
        "deallocate" => ConsoleCommand::Accepted("DEALLOCATE"),
        "begin" | "start" => ConsoleCommand::Begin,
        "commit" | "end" => ConsoleCommand::End("COMMIT"),
        "rollback" | "abort" => ConsoleCommand::End("ROLLBACK"),
        _ => ConsoleCommand::Node(action(verb, rest).ok_or_else(|| not_understood(statement))?),
    })
}

fn action(verb: &str, rest: &[Piece]) -> Option<NodeCommand> {
    let tenant = match rest {
        [] => None,
        [Piece::Word(name) | Piece::Quoted(name)] => Some(name.clone()),
        _ => return None,
    };
    Some(match (verb, tenant) {
        ("reload", None) => NodeCommand::Reload,
        ("shutdown", None) => NodeCommand::Shutdown(Ending::Now),
        // Idle sessions end at once in both cases, others after their transaction.
        ("shutdown", Some(word)) if matches!(word.as_str(), "wait_for_servers" | "wait_for_clients") => {
            NodeCommand::Shutdown(Ending::Drain { at_most: None })
        }
        ("kill", tenant) => NodeCommand::Kill(tenant),
        ("kill_client", Some(id)) => NodeCommand::KillClient(id.parse().ok()?),
        ("pause", tenant) => NodeCommand::Pause(tenant),
        ("resume", tenant) => NodeCommand::Resume(tenant),
        ("disable", Some(tenant)) => NodeCommand::Disable(tenant),
        ("enable", Some(tenant)) => NodeCommand::Enable(tenant),
        ("reconnect", tenant) => NodeCommand::Reconnect(tenant),
        ("wait_close", tenant) => NodeCommand::WaitClose(tenant),
        _ => return None,
    })
}

fn not_understood(statement: &[Piece]) -> ConsoleError {
    let start: Vec<String> = statement.iter().take(2).map(written).collect();
    ConsoleError::new("42601", format!("the console does not know \"{}\"", start.join(" ")))
        .hint("SHOW HELP lists what it does.")
}

/// The text without what is quoted.
fn written(piece: &Piece) -> String {
    match piece {
        Piece::Word(word) => word.clone(),
        Piece::Quoted(_) => "'…'".to_owned(),
        Piece::Symbol(symbol) => symbol.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> ConsoleCommand {
        let mut commands = read(text).unwrap();
        assert_eq!(commands.len(), 1, "{text}");
        commands.remove(0)
    }

    fn show(words: &[&str]) -> ConsoleCommand {
        ConsoleCommand::Show(words.iter().map(|word| (*word).to_owned()).collect())
    }

    #[test]
    fn case_space_comments_and_semicolons_do_not_matter() {
        for text in ["SHOW POOLS", "show pools;", " ;Show\n\tPools ; ", "/* hello */ SHOW POOLS -- bye"] {
            assert_eq!(one(text), show(&["pools"]), "{text}");
        }
        assert_eq!(read("").unwrap(), []);
        assert_eq!(read(" ; ;").unwrap(), []);
        assert_eq!(read("SHOW pools; SHOW clients").unwrap(), [show(&["pools"]), show(&["clients"])]);
    }

    #[test]
    fn what_drivers_say_is_accepted() {
        for text in [
            "SET extra_float_digits = 3",
            "SET application_name = 'it''s; me'",
            "set client_encoding to 'UTF8'",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SET NAMES 'utf8'",
            "SET LOCAL statement_timeout = 0",
        ] {
            assert_eq!(one(text), ConsoleCommand::Accepted("SET"), "{text}");
        }
        assert_eq!(one("BEGIN"), ConsoleCommand::Begin);
        assert_eq!(one("START TRANSACTION READ ONLY"), ConsoleCommand::Begin);
        assert_eq!(one("ROLLBACK"), ConsoleCommand::End("ROLLBACK"));
        assert_eq!(one("select version()"), ConsoleCommand::Select("version()".into()));
        assert_eq!(one("SELECT 1;"), ConsoleCommand::Select("1".into()));
    }

    #[test]
    fn a_tenant_may_be_quoted_and_may_have_a_dash() {
        assert_eq!(one("KILL my-shop"), ConsoleCommand::Node(NodeCommand::Kill(Some("my-shop".into()))));
        assert_eq!(
            one("PAUSE \"My Shop\""),
            ConsoleCommand::Node(NodeCommand::Pause(Some("My Shop".into())))
        );
        assert_eq!(one("pause Acme--now"), ConsoleCommand::Node(NodeCommand::Pause(Some("acme".into()))));
        assert_eq!(one("KILL_CLIENT 42"), ConsoleCommand::Node(NodeCommand::KillClient(42)));
        assert_eq!(
            one("SHUTDOWN WAIT_FOR_CLIENTS"),
            ConsoleCommand::Node(NodeCommand::Shutdown(Ending::Drain { at_most: None }))
        );
    }

    #[test]
    fn everything_else_is_refused_with_a_hint() {
        for text in
            ["SELEKT 1", "KILL a b", "DISABLE", "KILL_CLIENT x", "1", "'x'", "INSERT INTO t VALUES (1)"]
        {
            let error = read(text).unwrap_err();
            assert_eq!(error.sqlstate, "42601", "{text}");
            assert!(error.hint.is_some(), "{text}");
        }
        assert_eq!(read("SET default_pool_size = 3").unwrap_err().sqlstate, "0A000");
        assert_eq!(read("SHOW 'x").unwrap_err().message, "unterminated string");
        assert_eq!(read("/* ").unwrap_err().message, "unterminated comment");
    }
}
