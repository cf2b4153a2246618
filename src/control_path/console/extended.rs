//! The extended protocol (Parse, Bind, Describe, Execute, Close), which many drivers always use. Statements
//! have no parameters here.

use std::collections::HashMap;

use pgwire::messages::{
    data::{NoData, ParameterDescription},
    extendedquery::{BindComplete, CloseComplete, ParseComplete, PortalSuspended},
    response::EmptyQueryResponse,
};

use super::{
    ConsoleError, ConsoleReply, Session,
    connection::{ConsoleConnection, long_number, malformed, number, text},
    statement::{self, ConsoleCommand},
    table::{Formats, Table},
};
use crate::wire::message_reader::Message;

const NAMES_MAX: usize = 1000;

/// Prepared statements and portals by name. `None`: an empty statement.
#[derive(Debug, Default)]
pub struct Extended {
    statements: HashMap<String, Option<ConsoleCommand>>,
    portals: HashMap<String, Portal>,
}

#[derive(Debug)]
struct Portal {
    command: Option<ConsoleCommand>,
    formats: Formats,
    /// The answer, and how many of its rows were sent.
    result: Option<(Table, &'static str, usize)>,
}

impl Extended {
    /// Portals end with their transaction, or with their batch outside one.
    pub fn forget_portals(&mut self) {
        self.portals.clear();
    }

    fn parse(&mut self, mut body: &[u8]) -> Result<(), ConsoleError> {
        let name = text(&mut body)?;
        let sql = text(&mut body)?;
        let mut commands = statement::read(sql)?;
        if commands.len() > 1 {
            return Err(ConsoleError::new(
                "42601",
                "cannot insert multiple commands into a prepared statement",
            ));
        }
        if !name.is_empty() && self.statements.contains_key(name) {
            return Err(ConsoleError::new("42P05", format!("prepared statement \"{name}\" already exists")));
        }
        if self.statements.len() >= NAMES_MAX {
            return Err(ConsoleError::new("53400", format!("at most {NAMES_MAX} prepared statements")));
        }
        self.statements.insert(name.to_owned(), commands.pop());
        Ok(())
    }

    fn bind(&mut self, mut body: &[u8]) -> Result<(), ConsoleError> {
        let portal = text(&mut body)?;
        let command = self.statement(text(&mut body)?)?.clone();
        for _ in 0..number(&mut body)? {
            number(&mut body)?;
        }
        if number(&mut body)? != 0 {
            return Err(ConsoleError::new("08P01", "statements of the console have no parameters"));
        }
        let mut formats = Vec::new();
        for _ in 0..number(&mut body)? {
            formats.push(match number(&mut body)? {
                format @ (0 | 1) => format,
                other => return Err(ConsoleError::new("22023", format!("unsupported format code: {other}"))),
            });
        }
        if self.portals.len() >= NAMES_MAX {
            return Err(ConsoleError::new("53400", format!("at most {NAMES_MAX} portals")));
        }
        self.portals.insert(portal.to_owned(), Portal { command, formats: Formats(formats), result: None });
        Ok(())
    }

    fn close(&mut self, body: &[u8]) -> Result<(), ConsoleError> {
        let (kind, mut name) = body.split_first().ok_or_else(malformed)?;
        let name = text(&mut name)?;
        match kind {
            b'S' => drop(self.statements.remove(name)),
            b'P' => drop(self.portals.remove(name)),
            _ => return Err(malformed()),
        }
        Ok(())
    }

    fn statement(&self, name: &str) -> Result<&Option<ConsoleCommand>, ConsoleError> {
        self.statements.get(name).ok_or_else(|| {
            ConsoleError::new("26000", format!("prepared statement \"{name}\" does not exist"))
        })
    }

    fn portal(&mut self, name: &str) -> Result<&mut Portal, ConsoleError> {
        let missing = || ConsoleError::new("34000", format!("portal \"{name}\" does not exist"));
        self.portals.get_mut(name).ok_or_else(missing)
    }
}

impl Session {
    /// Handles one message.
    pub(super) async fn extended_query(
        &mut self,
        message: &Message,
        connection: &mut ConsoleConnection,
    ) -> Result<(), ConsoleError> {
        let body = message.body();
        match message.tag() {
            b'P' => {
                self.extended.parse(body)?;
                connection.say(&ParseComplete::new());
            }
            b'B' => {
                self.extended.bind(body)?;
                connection.say(&BindComplete::new());
            }
            b'C' => {
                self.extended.close(body)?;
                connection.say(&CloseComplete::new());
            }
            b'D' => self.describe(body, connection).await?,
            _ => self.execute(body, connection).await?,
        }
        Ok(())
    }

    async fn describe(
        &mut self,
        body: &[u8],
        connection: &mut ConsoleConnection,
    ) -> Result<(), ConsoleError> {
        let (kind, mut name) = body.split_first().ok_or_else(malformed)?;
        let name = text(&mut name)?;
        let (table, formats) = match kind {
            b'S' => {
                let command = self.extended.statement(name)?.clone();
                connection.say(&ParameterDescription::new(Vec::new()));
                (self.columns(&command).await?, Formats::default())
            }
            b'P' => {
                let command = self.extended.portal(name)?.command.clone();
                let found = self.look(&command).await;
                self.send_notices(connection);
                let found = found?;
                let columns = match &found {
                    Some((table, _)) => Some(table.clone()),
                    None => self.columns(&command).await?,
                };
                let portal = self.extended.portal(name)?;
                portal.result = found.map(|(table, tag)| (table, tag, 0));
                (columns, portal.formats.clone())
            }
            _ => return Err(malformed()),
        };
        match table {
            Some(table) => connection.say(&table.description(&formats)),
            None => connection.say(&NoData::new()),
        }
        Ok(())
    }

    /// The columns of a statement's answer, without running it; `None`: it has none.
    async fn columns(&mut self, command: &Option<ConsoleCommand>) -> Result<Option<Table>, ConsoleError> {
        match command {
            Some(ConsoleCommand::Admin(words)) => Ok(words.columns()),
            Some(ConsoleCommand::Show(words, place)) => Ok(Some(self.show_columns(words, place).await?)),
            question => Ok(self.look(question).await?.map(|(table, _)| table)),
        }
    }

    /// The answer of a statement that only reads; `None`: the statement may change something.
    async fn look(
        &mut self,
        command: &Option<ConsoleCommand>,
    ) -> Result<Option<(Table, &'static str)>, ConsoleError> {
        match command {
            Some(command @ (ConsoleCommand::Show(..) | ConsoleCommand::Select(_))) => {
                match self.run(command).await? {
                    ConsoleReply::Rows { table, tag } => Ok(Some((table, tag))),
                    ConsoleReply::Done(_) => Ok(None),
                }
            }
            _ => Ok(None),
        }
    }

    async fn execute(
        &mut self,
        mut body: &[u8],
        connection: &mut ConsoleConnection,
    ) -> Result<(), ConsoleError> {
        let name = text(&mut body)?;
        let rows_max = usize::try_from(long_number(&mut body)?).unwrap_or(0);
        let portal = self.extended.portal(name)?;
        let Some(command) = portal.command.clone() else {
            connection.say(&EmptyQueryResponse::new());
            return Ok(());
        };
        if portal.result.is_none() {
            let answer = connection.while_connected(self.run(&command)).await;
            self.send_notices(connection);
            match answer? {
                ConsoleReply::Done(tag) => {
                    connection.complete(tag);
                    return Ok(());
                }
                ConsoleReply::Rows { table, tag } => {
                    self.extended.portal(name)?.result = Some((table, tag, 0))
                }
            }
        }
        let Portal { formats, result: Some((table, tag, sent)), .. } = self.extended.portal(name)? else {
            return Ok(());
        };
        let rest = table.rows.get(*sent..).unwrap_or_default();
        let rows = rest.get(..rows_max).filter(|_| rows_max > 0).unwrap_or(rest);
        connection.rows(table, rows, formats);
        *sent += rows.len();
        if *sent < table.rows.len() {
            connection.say(&PortalSuspended::new());
        } else {
            connection.complete(tag);
        }
        Ok(())
    }
}
