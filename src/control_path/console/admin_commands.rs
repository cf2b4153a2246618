//! Admin commands in SQL: `CREATE TENANT acme`, `GRANT TENANT acme TO shop`, …. Each statement becomes an
//! [`AdminCommand`].
//!
//! The console keeps a statement as its parsed pieces and reads it again for each execution, because each
//! execution generates a password of its own. Pieces are never logged or repeated in errors: one of them
//! may be a password.

use std::fmt;

use secrecy::SecretString;
use tracing::info;

use super::{ConsoleError, ConsoleReply, Session, result_rows, table::Table};
use crate::{
    config::units,
    control_path::{
        admin::{
            actor::AdminError,
            commands::AdminCommand,
            logins::{NewLogin, NewLoginKind},
            tenants::SuspendSessions,
        },
        onboarding::{adopt::AdoptTenant, create::CreateTenant, drop::DropDatabase, move_tenant::MoveTenant},
        secrets::scram_verifier::LoginPassword,
        timestamp::parse_timestamp,
    },
    data_path::sql::Piece,
};

/// A well-formed admin command.
#[derive(Clone, PartialEq, Eq)]
pub struct AdminStatement(Vec<Piece>);

impl AdminStatement {
    /// Parses an admin command. `None`: another statement. `Some(Err)`: an admin command with a syntax
    /// error.
    pub fn read(statement: &[Piece]) -> Option<Result<Self, ConsoleError>> {
        let word = |at: usize| match statement.get(at) {
            Some(Piece::Word(word)) => word.as_str(),
            _ => "",
        };
        let about = (word(0), word(1));
        let ours = match about {
            ("create" | "alter" | "drop", "tenant" | "login") | ("grant" | "revoke", "tenant" | "all") => {
                true
            }
            ("suspend" | "resume" | "rename" | "rotate" | "move" | "adopt", "tenant") => statement.len() > 2,
            _ => false,
        };
        ours.then(|| {
            let words = Self(statement.to_vec());
            words.command().map(|_| words)
        })
    }

    fn command(&self) -> Result<AdminCommand, ConsoleError> {
        let mut reader = Reader { rest: &self.0 };
        let command = reader.command()?;
        match reader.rest {
            [] => Ok(command),
            [Piece::Word(word), ..] => Err(syntax_error(format!("{word:?} was not expected here"))),
            _ => Err(syntax_error("there is more than expected at the end")),
        }
    }

    /// Whether no ROLLBACK can undo it.
    pub fn destroys(&self) -> bool {
        matches!(self.command(), Ok(AdminCommand::DropTenant { .. }))
    }

    /// The columns of its answer, for Describe.
    pub fn columns(&self) -> Option<Table> {
        self.command().ok().map(|command| result_rows::columns(&command))
    }
}

impl fmt::Debug for AdminStatement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AdminStatement").finish_non_exhaustive()
    }
}

fn syntax_error(message: impl Into<String>) -> ConsoleError {
    ConsoleError::new("42601", message).hint("SHOW HELP lists what the console understands.")
}

struct Reader<'a> {
    rest: &'a [Piece],
}

impl Reader<'_> {
    /// Steps over these words if they come next.
    fn takes(&mut self, words: &str) -> bool {
        let mut rest = self.rest;
        for word in words.split(' ') {
            match rest.split_first() {
                Some((Piece::Word(next), behind)) if next == word => rest = behind,
                _ => return false,
            }
        }
        self.rest = rest;
        true
    }

    fn needs(&mut self, words: &str) -> Result<(), ConsoleError> {
        if self.takes(words) {
            Ok(())
        } else {
            Err(syntax_error(format!("{} was expected", words.to_uppercase())))
        }
    }

    fn takes_symbol(&mut self, symbol: char) -> bool {
        let taken = matches!(self.rest.first(), Some(Piece::Symbol(next)) if *next == symbol);
        if taken {
            self.rest = &self.rest[1..];
        }
        taken
    }

    /// A name or value: a word or a quoted string.
    fn name(&mut self, what: &str) -> Result<String, ConsoleError> {
        match self.rest.split_first() {
            Some((Piece::Word(name) | Piece::Quoted(name), rest)) => {
                self.rest = rest;
                Ok(name.clone())
            }
            _ => Err(syntax_error(format!("{what} was expected"))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String, ConsoleError> {
        match self.rest.first() {
            Some(Piece::Quoted(_)) => self.name(what),
            _ => Err(syntax_error(format!("{what} in quotes was expected"))),
        }
    }

    /// The value after a keyword, if the keyword comes next.
    fn option(&mut self, keyword: &str) -> Result<Option<String>, ConsoleError> {
        if self.takes(keyword) {
            self.name(&format!("what follows {}", keyword.to_uppercase())).map(Some)
        } else {
            Ok(None)
        }
    }

    fn names(&mut self, what: &str) -> Result<Vec<String>, ConsoleError> {
        let mut names = vec![self.name(what)?];
        while self.takes_symbol(',') {
            names.push(self.name(what)?);
        }
        Ok(names)
    }

    fn command(&mut self) -> Result<AdminCommand, ConsoleError> {
        if self.takes("create tenant") {
            let name = self.name("a name")?;
            let [host, template, database] = self.options(["host", "template", "database"])?;
            let schema = Vec::new();
            Ok(AdminCommand::CreateTenant(CreateTenant { name, host, database, template, schema }))
        } else if self.takes("adopt tenant") {
            let name = self.name("a name")?;
            let keywords = ["host", "database", "owner", "ownership", "username"];
            let [host, database, owner, ownership, username] = self.options(keywords)?;
            let ownership =
                ownership.map(|word| word.parse()).transpose().map_err(|why: String| syntax_error(why))?;
            let password = if self.takes("password") { Some(self.text("a password")?) } else { None };
            let password = password.map(SecretString::from);
            let wanted = AdoptTenant { name, host, database, owner, ownership, username, password };
            Ok(AdminCommand::AdoptTenant(wanted))
        } else if self.takes("alter tenant") {
            let name = self.name("a tenant")?;
            self.needs("set")?;
            Ok(AdminCommand::SetTenant { name, settings: self.settings()? })
        } else if self.takes("suspend tenant") {
            let (name, reason) = (self.name("a tenant")?, self.option("reason")?);
            let sessions = SuspendSessions::ending(self.takes("after transaction"));
            Ok(AdminCommand::SuspendTenant { name, reason, sessions })
        } else if self.takes("resume tenant") {
            Ok(AdminCommand::ResumeTenant { name: self.name("a tenant")? })
        } else if self.takes("rename tenant") {
            let name = self.name("a tenant")?;
            self.needs("to")?;
            Ok(AdminCommand::RenameTenant { name, to: self.name("a name")? })
        } else if self.takes("rotate tenant") {
            Ok(AdminCommand::RotateTenant { name: self.name("a tenant")? })
        } else if self.takes("move tenant") {
            self.move_tenant()
        } else if self.takes("drop tenant") {
            let name = self.name("a tenant")?;
            let with_database = self.takes("with database");
            let database = DropDatabase::of(!with_database && self.takes("leave host"), with_database);
            Ok(AdminCommand::DropTenant { name, database, final_dump: None })
        } else if self.takes("create login") {
            self.create_login()
        } else if self.takes("alter login") {
            self.alter_login()
        } else if self.takes("drop login") {
            Ok(AdminCommand::DropLogin { name: self.name("a login")? })
        } else if self.takes("grant") {
            let (tenants, all_tenants) = self.granted()?;
            self.needs("to")?;
            let name = self.name("a login")?;
            Ok(AdminCommand::Grant { name, tenants, all_tenants, read_only: self.takes("read only") })
        } else {
            self.needs("revoke")?;
            let (tenants, all_tenants) = self.granted()?;
            self.needs("from")?;
            Ok(AdminCommand::Revoke { name: self.name("a login")?, tenants, all_tenants })
        }
    }

    /// The values after these keywords, which may come in any order.
    fn options<const N: usize>(&mut self, keywords: [&str; N]) -> Result<[Option<String>; N], ConsoleError> {
        let mut values = [const { None }; N];
        loop {
            let before = self.rest.len();
            for (keyword, value) in keywords.into_iter().zip(&mut values) {
                if let Some(given) = self.option(keyword)? {
                    *value = Some(given);
                }
            }
            if self.rest.len() == before {
                return Ok(values);
            }
        }
    }

    fn move_tenant(&mut self) -> Result<AdminCommand, ConsoleError> {
        let name = self.name("a tenant")?;
        self.needs("to host")?;
        let host = self.name("a host")?;
        let patience = self.option("patience")?;
        let patience = units::duration(patience.as_deref().unwrap_or(MoveTenant::PATIENCE));
        let patience = patience.map_err(|why| syntax_error(format!("PATIENCE {why}")))?;
        let to = MoveTenant { host, patience, keep_source: self.takes("keep source") };
        Ok(AdminCommand::MoveTenant { name, to })
    }

    /// `k = v, k = DEFAULT`.
    fn settings(&mut self) -> Result<Vec<(String, String)>, ConsoleError> {
        let mut settings = Vec::new();
        loop {
            let key = self.name("a setting")?;
            if !self.takes_symbol('=') {
                self.needs("to")?;
            }
            let value = if self.takes("default") { String::new() } else { self.name("a value")? };
            settings.push((key, value));
            if !self.takes_symbol(',') {
                return Ok(settings);
            }
        }
    }

    fn create_login(&mut self) -> Result<AdminCommand, ConsoleError> {
        let name = self.name("a name")?;
        let kind = if let Some(tenant) = self.option("tenant")? {
            NewLoginKind::Employee { tenant }
        } else if self.takes("service") {
            let all_tenants = self.takes("all tenants");
            let named = !all_tenants && (self.takes("tenants") || self.takes("tenant"));
            let tenants = if named { self.names("a tenant")? } else { Vec::new() };
            NewLoginKind::Service { tenants, all_tenants }
        } else if self.takes("admin") {
            NewLoginKind::Admin
        } else {
            return Err(syntax_error("a login is of one TENANT, or a SERVICE, or an ADMIN"));
        };
        let (mut read_only, mut password, mut valid_until, mut allow_from) = (false, None, None, Vec::new());
        loop {
            if self.takes("read only") {
                read_only = true;
            } else if self.takes("password") {
                password = Some(SecretString::from(self.text("a password")?));
            } else if self.takes("valid until") {
                valid_until = Some(parse_timestamp(&self.text("a timestamp")?).map_err(syntax_error)?);
            } else if self.takes("from") {
                allow_from = self.text("networks")?.split(',').map(str::to_owned).collect();
            } else {
                break;
            }
        }
        let LoginPassword { password, generated } = LoginPassword::given_or_generated(password);
        let login = NewLogin { name, kind, read_only, password, valid_until, allow_from };
        Ok(AdminCommand::CreateLogin { login, generated })
    }

    fn alter_login(&mut self) -> Result<AdminCommand, ConsoleError> {
        let name = self.name("a login")?;
        let set = |name, key: &str, value| {
            Ok(AdminCommand::SetLogin { name, settings: vec![(key.to_owned(), value)] })
        };
        if self.takes("password") {
            let given = if self.rest.is_empty() { None } else { Some(self.text("a password")?) };
            Ok(AdminCommand::SetPassword {
                name,
                password: LoginPassword::given_or_generated(given.map(SecretString::from)),
            })
        } else if self.takes("enable") {
            Ok(AdminCommand::DisableLogin { name, disabled: false })
        } else if self.takes("disable") {
            Ok(AdminCommand::DisableLogin { name, disabled: true })
        } else if self.takes("valid until") {
            let forever = self.takes("infinity");
            let moment = if forever { String::new() } else { self.text("a timestamp, or INFINITY,")? };
            set(name, "valid_until", moment)
        } else if self.takes("from") {
            let anywhere = self.takes("anywhere");
            let networks = if anywhere { String::new() } else { self.text("networks, or ANYWHERE,")? };
            set(name, "allow_from", networks)
        } else if self.takes("read only") {
            set(name, "access", "read_only".to_owned())
        } else if self.takes("read write") {
            set(name, "access", "read_write".to_owned())
        } else {
            self.needs("set")?;
            Ok(AdminCommand::SetLogin { name, settings: self.settings()? })
        }
    }

    /// `TENANT a, b` or `ALL TENANTS`.
    fn granted(&mut self) -> Result<(Vec<String>, bool), ConsoleError> {
        if self.takes("all tenants") {
            return Ok((Vec::new(), true));
        }
        self.needs("tenant")?;
        Ok((self.names("a tenant")?, false))
    }
}

impl Session {
    /// Runs a command. It continues if the administrator disconnects.
    pub(super) async fn run_admin_command(
        &self,
        words: &AdminStatement,
    ) -> Result<ConsoleReply, ConsoleError> {
        let command = words.command()?;
        let (tag, subject) = (command.title(), command.subject().to_owned());
        info!(login = self.login.name, command = tag, subject, "admin command");
        let (actor, context) = (self.actor(), self.context.admin.clone());
        let table = result_rows::columns(&command);
        let work = tokio::spawn(async move {
            let outcome = command.execute(&actor).await?;
            context.until_applied().await;
            Ok::<_, AdminError>(outcome)
        });
        let outcome =
            work.await.map_err(|_| ConsoleError::new("XX000", "the command was aborted; see the log"))??;
        Ok(ConsoleReply::Rows { table: result_rows::in_columns(table, &outcome), tag })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_path::console::statement;

    fn command(text: &str) -> AdminCommand {
        match statement::read(text).unwrap().remove(0) {
            statement::ConsoleCommand::Admin(words) => words.command().unwrap(),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn statements_become_the_orders_they_say() {
        for (text, title, subject) in [
            ("CREATE TENANT acme HOST west TEMPLATE base", "CREATE TENANT", "acme"),
            ("create tenant \"My Shop\"", "CREATE TENANT", "My Shop"),
            ("ADOPT TENANT acme DATABASE acme_production OWNER app", "ADOPT TENANT", "acme"),
            ("ADOPT TENANT acme OWNERSHIP TRANSFER USERNAME app PASSWORD 'x'", "ADOPT TENANT", "acme"),
            ("ALTER TENANT acme SET pool_size = 40, statement_timeout = '30s'", "ALTER TENANT", "acme"),
            ("SUSPEND TENANT acme REASON 'unpaid; call' AFTER TRANSACTION", "SUSPEND TENANT", "acme"),
            ("RESUME TENANT acme", "RESUME TENANT", "acme"),
            ("RENAME TENANT a TO b", "RENAME TENANT", "a"),
            ("ROTATE TENANT acme", "ROTATE TENANT", "acme"),
            ("MOVE TENANT acme TO HOST west PATIENCE '2min' KEEP SOURCE", "MOVE TENANT", "acme"),
            ("DROP TENANT acme WITH DATABASE", "DROP TENANT", "acme"),
            ("DROP TENANT acme LEAVE HOST", "DROP TENANT", "acme"),
            (
                "CREATE LOGIN bob@x.org TENANT acme READ ONLY VALID UNTIL '2027-01-31'",
                "CREATE LOGIN",
                "bob@x.org",
            ),
            ("CREATE LOGIN shop SERVICE TENANTS acme, globex", "CREATE LOGIN", "shop"),
            ("ALTER LOGIN bob DISABLE", "ALTER LOGIN", "bob"),
            ("ALTER LOGIN bob FROM ANYWHERE", "ALTER LOGIN", "bob"),
            ("GRANT TENANT acme, globex TO shop READ ONLY", "GRANT", "shop"),
            ("REVOKE ALL TENANTS FROM shop", "REVOKE", "shop"),
            ("DROP LOGIN bob", "DROP LOGIN", "bob"),
        ] {
            let command = command(text);
            assert_eq!((command.title(), command.subject()), (title, subject), "{text}");
        }
        let AdminCommand::SetTenant { settings, .. } =
            command("ALTER TENANT a SET pool_size = DEFAULT, pool_mode = session")
        else {
            panic!()
        };
        assert_eq!(
            settings,
            [("pool_size", ""), ("pool_mode", "session")].map(|(k, v)| (k.into(), v.into()))
        );
    }

    #[test]
    fn what_is_not_well_formed_is_refused_without_repeating_what_was_quoted() {
        for text in [
            "CREATE TENANT",
            "CREATE TENANT acme HOST",
            "CREATE LOGIN bob",
            "CREATE LOGIN bob TENANT acme PASSWORD hunter2",
            "CREATE LOGIN bob TENANT acme 'hunter2'",
            "ALTER LOGIN bob PASSWORD 'hunter2' 'hunter2'",
            "ALTER LOGIN bob PASSWORT 'hunter2'",
            "ADOPT TENANT acme OWNERSHIP hunter",
            "ADOPT TENANT acme USERNAME app PASSWORD hunter2",
            "ALTER TENANT acme SET",
            "MOVE TENANT acme TO west",
            "GRANT TENANT acme",
            "REVOKE TENANT acme TO shop",
            "SUSPEND TENANT acme BECAUSE 'x'",
        ] {
            let error = statement::read(text).unwrap_err();
            assert_eq!(error.sqlstate, "42601", "{text}");
            assert!(!error.message.contains("hunter2"), "{}", error.message);
        }
        let words = statement::read("CREATE LOGIN bob TENANT acme PASSWORD 'hunter2'").unwrap();
        assert!(!format!("{words:?}").contains("hunter2"));
    }
}
