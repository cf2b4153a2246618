//! What an administrator, or the driver in front of one, writes: a few words, read once into a
//! [`ConsoleCommand`].

use super::{
    ConsoleError,
    admin_commands::AdminStatement,
    node_command::{NodeCommand, Place, ShutdownMode},
};
use crate::data_path::sql::{self, Piece};

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleCommand {
    /// `SHOW …`: the words after it, in lower case, and of which nodes.
    Show(Vec<String>, Place),
    /// `SELECT …`: its words in lower case, without spaces.
    Select(String),
    /// A setting that drivers send and the console ignores; the command tag to answer.
    Accepted(&'static str),
    /// `BEGIN`, `START TRANSACTION`.
    Begin,
    /// `COMMIT`, `END`, `ROLLBACK`, `ABORT`; the command tag to answer.
    End(&'static str),
    /// A command to nodes.
    Node(NodeCommand<String>, Place),
    /// A command about a tenant or a login, for all nodes.
    Admin(AdminStatement),
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
    let (rest, place) = match verb.as_str() {
        // `SELECT` and `SET` have no nodes.
        "select" | "set" => (rest, Place::Default),
        _ => place(rest).ok_or_else(|| not_understood(statement))?,
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
            ConsoleCommand::Show(words.into_iter().map(str::to_owned).collect(), place)
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
        _ if place != Place::Default && !is_for_nodes(verb) => return Err(not_understood(statement)),
        "reset" => ConsoleCommand::Accepted("RESET"),
        "discard" => ConsoleCommand::Accepted("DISCARD ALL"),
        "deallocate" => ConsoleCommand::Accepted("DEALLOCATE"),
        "begin" | "start" => ConsoleCommand::Begin,
        "commit" | "end" => ConsoleCommand::End("COMMIT"),
        "rollback" | "abort" => ConsoleCommand::End("ROLLBACK"),
        _ => ConsoleCommand::Node(action(verb, rest).ok_or_else(|| not_understood(statement))?, place),
    })
}

/// Takes `ON ALL NODES` or `ON NODE name` from the end. A name that is not quoted may have any symbols, as
/// `db1:6433` has. `None`: it is not complete.
fn place(rest: &[Piece]) -> Option<(&[Piece], Place)> {
    let is_word = |piece: &Piece, wanted: &str| matches!(piece, Piece::Word(word) if word == wanted);
    let begin =
        |pair: &[Piece]| is_word(&pair[0], "on") && (is_word(&pair[1], "node") || is_word(&pair[1], "all"));
    let Some(at) = rest.windows(2).position(begin) else { return Some((rest, Place::Default)) };
    let (command, place) = (rest.get(..at)?, rest.get(at + 1..)?);
    let place = match place {
        [all, nodes] if is_word(all, "all") && is_word(nodes, "nodes") => Place::AllNodes,
        [node, Piece::Quoted(name)] if is_word(node, "node") => Place::Node(name.clone()),
        [node, name @ ..] if is_word(node, "node") && !name.is_empty() => {
            let is_quoted = |piece: &Piece| matches!(piece, Piece::Quoted(_));
            (!name.iter().any(is_quoted)).then(|| Place::Node(name.iter().map(written).collect()))?
        }
        _ => return None,
    };
    Some((command, place))
}

fn is_for_nodes(verb: &str) -> bool {
    const VERBS: &str = "reload shutdown kill kill_client pause resume disable enable reconnect wait_close";
    VERBS.split(' ').any(|known| known == verb)
}

fn action(verb: &str, rest: &[Piece]) -> Option<NodeCommand<String>> {
    let tenant = match rest {
        [] => None,
        [Piece::Word(name) | Piece::Quoted(name)] => Some(name.clone()),
        _ => return None,
    };
    Some(match (verb, tenant) {
        ("reload", None) => NodeCommand::Reload,
        ("shutdown", None) => NodeCommand::Shutdown(ShutdownMode::Now),
        // Idle sessions end at once in both cases, others after their transaction.
        ("shutdown", Some(word)) if matches!(word.as_str(), "wait_for_servers" | "wait_for_clients") => {
            NodeCommand::Shutdown(ShutdownMode::Wait)
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
        ConsoleCommand::Show(words.iter().map(|word| (*word).to_owned()).collect(), Place::Default)
    }

    fn node(command: NodeCommand<String>) -> ConsoleCommand {
        ConsoleCommand::Node(command, Place::Default)
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
        assert_eq!(one("KILL my-shop"), node(NodeCommand::Kill(Some("my-shop".into()))));
        assert_eq!(one("PAUSE \"My Shop\""), node(NodeCommand::Pause(Some("My Shop".into()))));
        assert_eq!(one("pause Acme--now"), node(NodeCommand::Pause(Some("acme".into()))));
        assert_eq!(one("KILL_CLIENT 42"), node(NodeCommand::KillClient(42)));
        assert_eq!(one("SHUTDOWN WAIT_FOR_CLIENTS"), node(NodeCommand::Shutdown(ShutdownMode::Wait)));
    }

    #[test]
    fn a_statement_may_say_for_which_nodes_it_is() {
        let pause = NodeCommand::Pause(Some("acme".into()));
        let at = |name: &str| Place::Node(name.to_owned());
        for (text, place) in [
            ("PAUSE acme ON ALL NODES", Place::AllNodes),
            ("pause acme on node b", at("b")),
            ("PAUSE acme ON NODE db1.example.com:6433", at("db1.example.com:6433")),
            ("PAUSE acme ON NODE \"Rack 1\"", at("Rack 1")),
            ("PAUSE acme ON NODE 17", at("17")),
        ] {
            assert_eq!(one(text), ConsoleCommand::Node(pause.clone(), place), "{text}");
        }
        assert_eq!(one("PAUSE ON NODE b"), ConsoleCommand::Node(NodeCommand::Pause(None), at("b")));
        assert_eq!(one("PAUSE \"on\""), node(NodeCommand::Pause(Some("on".into()))));
        let pools = ConsoleCommand::Show(vec!["pools".into()], Place::AllNodes);
        assert_eq!(one("SHOW POOLS ON ALL NODES"), pools);
        for text in ["PAUSE acme ON NODE", "PAUSE acme ON ALL", "SHOW POOLS ON NODE 'a' b", "BEGIN ON NODE b"]
        {
            assert_eq!(read(text).unwrap_err().sqlstate, "42601", "{text}");
        }
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
