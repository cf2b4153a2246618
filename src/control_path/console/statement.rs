//! What an administrator, or the driver in front of one, writes: a few words, read once into a [`ConsoleCommand`].

use super::{ConsoleError, admin_commands::AdminStatement};

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleCommand {
    /// `SHOW …`: the words behind it, in lower case.
    Show(Vec<String>),
    /// `SELECT …` of one thing: its words, in lower case, without spaces between them.
    Select(String),
    /// What drivers say and nobody need hear; the command tag to answer.
    Accepted(&'static str),
    /// `BEGIN`, `START TRANSACTION`.
    Begin,
    /// `COMMIT`, `END`, `ROLLBACK`, `ABORT`; the command tag to answer.
    End(&'static str),
    /// Something is to be done on this node.
    Node(NodeCommand),
    /// Something is to be done to a tenant or a login, everywhere.
    Admin(AdminStatement),
}

/// What an administrator may have done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeCommand {
    /// Read the configuration again.
    Reload,
    /// End the process.
    Shutdown(ShutdownWait),
    /// End every session of a tenant, or all; nobody is served until RESUME.
    Kill(Option<String>),
    /// End one session.
    KillClient(i32),
    /// Close servers as they come back; nobody is served until RESUME.
    Pause(Option<String>),
    /// Serve again.
    Resume(Option<String>),
    /// Let no new session in.
    Disable(String),
    /// Let sessions in again.
    Enable(String),
    /// Open new servers instead of those there are.
    Reconnect(Option<String>),
    /// Return when servers that were to be closed are.
    WaitClose(Option<String>),
}

/// What a SHUTDOWN waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownWait {
    /// Nothing.
    No,
    /// Transactions.
    ForServers,
    /// Sessions.
    ForClients,
}

/// Parameters that drivers set without being asked.
const HARMLESS_SETTINGS: [&str; 17] = [
    "application_name",
    "bytea_output",
    "characteristics",
    "client_encoding",
    "client_min_messages",
    "datestyle",
    "extra_float_digits",
    "idle_in_transaction_session_timeout",
    "intervalstyle",
    "lock_timeout",
    "names",
    "search_path",
    "standard_conforming_strings",
    "statement_timeout",
    "time",
    "timezone",
    "transaction",
];

/// A word of a statement. Not to be logged: it may be a password.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// Folded to lower case.
    Word(String),
    /// `"…"` or `'…'`.
    Quoted(String),
    /// Anything else.
    Symbol(char),
}

/// Reads a text of statements separated by semicolons; empty ones are left out.
///
/// # Errors
/// A [`ConsoleError`] about the first that is not understood.
pub fn read(text: &str) -> Result<Vec<ConsoleCommand>, ConsoleError> {
    let tokens = tokens(text)?;
    let statements = tokens.split(|token| *token == Token::Symbol(';'));
    statements.filter(|statement| !statement.is_empty()).map(command).collect()
}

fn command(statement: &[Token]) -> Result<ConsoleCommand, ConsoleError> {
    if let Some(words) = AdminStatement::read(statement) {
        return words.map(ConsoleCommand::Admin);
    }
    let Some((Token::Word(verb), rest)) = statement.split_first() else {
        return Err(not_understood(statement));
    };
    let words: Vec<&str> = rest
        .iter()
        .filter_map(|token| match token {
            Token::Word(word) => Some(word.as_str()),
            _ => None,
        })
        .collect();
    Ok(match verb.as_str() {
        "show" if words.len() == rest.len() => {
            ConsoleCommand::Show(words.into_iter().map(str::to_owned).collect())
        }
        "select" => ConsoleCommand::Select(rest.iter().map(Token::written).collect()),
        "set" => match words.iter().find(|word| !matches!(**word, "session" | "local")) {
            Some(name) if HARMLESS_SETTINGS.contains(name) => ConsoleCommand::Accepted("SET"),
            _ => {
                return Err(ConsoleError::new("0A000", "the console cannot change settings")
                    .hint("Change the configuration file and RELOAD; SHOW CONFIG shows what holds."));
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

fn action(verb: &str, rest: &[Token]) -> Option<NodeCommand> {
    let tenant = match rest {
        [] => None,
        [Token::Word(name) | Token::Quoted(name)] => Some(name.clone()),
        _ => return None,
    };
    Some(match (verb, tenant) {
        ("reload", None) => NodeCommand::Reload,
        ("shutdown", None) => NodeCommand::Shutdown(ShutdownWait::No),
        ("shutdown", Some(word)) if word == "wait_for_servers" => {
            NodeCommand::Shutdown(ShutdownWait::ForServers)
        }
        ("shutdown", Some(word)) if word == "wait_for_clients" => {
            NodeCommand::Shutdown(ShutdownWait::ForClients)
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

fn not_understood(statement: &[Token]) -> ConsoleError {
    let start: Vec<String> = statement.iter().take(2).map(Token::written).collect();
    ConsoleError::new("42601", format!("the console does not understand \"{}\"", start.join(" ")))
        .hint("SHOW HELP lists what it does.")
}

impl Token {
    fn written(&self) -> String {
        match self {
            Self::Word(word) => word.clone(),
            Self::Quoted(_) => "'…'".to_owned(),
            Self::Symbol(symbol) => symbol.to_string(),
        }
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, ConsoleError> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.find('\n').map_or("", |end| &comment[end..]);
        } else if let Some(comment) = rest.strip_prefix("/*") {
            let end = comment.find("*/").ok_or_else(|| unterminated("comment"))?;
            rest = &comment[end + 2..];
        } else if first == '\'' || first == '"' {
            let (quoted, behind) = quoted(&rest[1..], first)?;
            tokens.push(Token::Quoted(quoted));
            rest = behind;
        } else if is_of_word(first) {
            let end = rest.find(|other| !is_of_word(other)).unwrap_or(rest.len());
            // A comment may begin right behind a word.
            let end = rest[..end].find("--").unwrap_or(end);
            tokens.push(Token::Word(rest[..end].to_lowercase()));
            rest = &rest[end..];
        } else {
            if !first.is_whitespace() {
                tokens.push(Token::Symbol(first));
            }
            rest = &rest[first.len_utf8()..];
        }
    }
    Ok(tokens)
}

/// Tenants may be called `my-shop`, and nobody subtracts here.
fn is_of_word(character: char) -> bool {
    character.is_alphanumeric() || matches!(character, '_' | '-' | '.' | '@' | '$')
}

/// What stands before the closing quote, a doubled one being one, and what is behind it.
fn quoted(text: &str, quote: char) -> Result<(String, &str), ConsoleError> {
    let mut quoted = String::new();
    let mut rest = text;
    loop {
        let (part, behind) = rest.split_once(quote).ok_or_else(|| unterminated("string"))?;
        quoted.push_str(part);
        match behind.strip_prefix(quote) {
            Some(more) => {
                quoted.push(quote);
                rest = more;
            }
            None => return Ok((quoted, behind)),
        }
    }
}

fn unterminated(what: &str) -> ConsoleError {
    ConsoleError::new("42601", format!("unterminated {what}"))
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
            ConsoleCommand::Node(NodeCommand::Shutdown(ShutdownWait::ForClients))
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
