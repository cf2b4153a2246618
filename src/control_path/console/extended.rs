//! Parse, Bind, Describe, Execute, Close: many drivers say everything this way. Statements have no parameters here.

use std::collections::HashMap;

use pgwire::messages::{
    data::{NoData, ParameterDescription},
    extendedquery::{BindComplete, CloseComplete, ParseComplete, PortalSuspended},
    response::EmptyQueryResponse,
};

use super::{
    Answer, Complaint, Session,
    connection::{Conversation, long_number, malformed, number, text},
    statement::{self, Command},
    table::{Formats, Table},
};
use crate::wire::message_reader::Message;

/// Statements, and portals, that an administrator may have prepared.
const NAMES_MAX: usize = 1000;

/// What was prepared, by name. `None`: an empty statement.
#[derive(Debug, Default)]
pub struct Extended {
    statements: HashMap<String, Option<Command>>,
    portals: HashMap<String, Portal>,
}

#[derive(Debug)]
struct Portal {
    command: Option<Command>,
    formats: Formats,
    /// What it brought, and how many rows have been sent.
    result: Option<(Table, &'static str, usize)>,
}

impl Extended {
    /// Portals end with their transaction, which is the batch where nobody said BEGIN.
    pub fn forget_portals(&mut self) {
        self.portals.clear();
    }

    fn parse(&mut self, mut body: &[u8]) -> Result<(), Complaint> {
        let name = text(&mut body)?;
        let sql = text(&mut body)?;
        let mut commands = statement::read(sql)?;
        if commands.len() > 1 {
            return Err(Complaint::new("42601", "cannot insert multiple commands into a prepared statement"));
        }
        if !name.is_empty() && self.statements.contains_key(name) {
            return Err(Complaint::new("42P05", format!("prepared statement \"{name}\" already exists")));
        }
        if self.statements.len() >= NAMES_MAX {
            return Err(Complaint::new("53400", format!("at most {NAMES_MAX} prepared statements")));
        }
        self.statements.insert(name.to_owned(), commands.pop());
        Ok(())
    }

    fn bind(&mut self, mut body: &[u8]) -> Result<(), Complaint> {
        let portal = text(&mut body)?;
        let command = self.statement(text(&mut body)?)?.clone();
        for _ in 0..number(&mut body)? {
            number(&mut body)?;
        }
        if number(&mut body)? != 0 {
            return Err(Complaint::new("08P01", "statements of the console have no parameters"));
        }
        let mut formats = Vec::new();
        for _ in 0..number(&mut body)? {
            formats.push(match number(&mut body)? {
                format @ (0 | 1) => format,
                other => return Err(Complaint::new("22023", format!("unsupported format code: {other}"))),
            });
        }
        if self.portals.len() >= NAMES_MAX {
            return Err(Complaint::new("53400", format!("at most {NAMES_MAX} portals")));
        }
        self.portals.insert(portal.to_owned(), Portal { command, formats: Formats(formats), result: None });
        Ok(())
    }

    fn close(&mut self, body: &[u8]) -> Result<(), Complaint> {
        let (kind, mut name) = body.split_first().ok_or_else(malformed)?;
        let name = text(&mut name)?;
        match kind {
            b'S' => drop(self.statements.remove(name)),
            b'P' => drop(self.portals.remove(name)),
            _ => return Err(malformed()),
        }
        Ok(())
    }

    fn statement(&self, name: &str) -> Result<&Option<Command>, Complaint> {
        self.statements
            .get(name)
            .ok_or_else(|| Complaint::new("26000", format!("prepared statement \"{name}\" does not exist")))
    }

    fn portal(&mut self, name: &str) -> Result<&mut Portal, Complaint> {
        let missing = || Complaint::new("34000", format!("portal \"{name}\" does not exist"));
        self.portals.get_mut(name).ok_or_else(missing)
    }
}

impl Session {
    /// One message of a batch.
    pub(super) async fn extended_query(
        &mut self,
        message: &Message,
        conversation: &mut Conversation,
    ) -> Result<(), Complaint> {
        let body = message.body();
        match message.tag() {
            b'P' => {
                self.extended.parse(body)?;
                conversation.say(&ParseComplete::new());
            }
            b'B' => {
                self.extended.bind(body)?;
                conversation.say(&BindComplete::new());
            }
            b'C' => {
                self.extended.close(body)?;
                conversation.say(&CloseComplete::new());
            }
            b'D' => self.describe(body, conversation).await?,
            _ => self.execute(body, conversation).await?,
        }
        Ok(())
    }

    async fn describe(&mut self, body: &[u8], conversation: &mut Conversation) -> Result<(), Complaint> {
        let (kind, mut name) = body.split_first().ok_or_else(malformed)?;
        let name = text(&mut name)?;
        let (table, formats) = match kind {
            b'S' => {
                let command = self.extended.statement(name)?.clone();
                conversation.say(&ParameterDescription::new(Vec::new()));
                (self.columns(&command).await?, Formats::default())
            }
            b'P' => {
                let command = self.extended.portal(name)?.command.clone();
                let found = self.look(&command).await?;
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
            Some(table) => conversation.say(&table.description(&formats)),
            None => conversation.say(&NoData::new()),
        }
        Ok(())
    }

    /// What the rows of a statement look like, without doing what it says; `None`: it brings none.
    async fn columns(&mut self, command: &Option<Command>) -> Result<Option<Table>, Complaint> {
        match command {
            Some(Command::Order(words)) => Ok(words.columns()),
            question => Ok(self.look(question).await?.map(|(table, _)| table)),
        }
    }

    /// The answer to a question; `None` to anything that is more than a question.
    async fn look(&mut self, command: &Option<Command>) -> Result<Option<(Table, &'static str)>, Complaint> {
        match command {
            Some(command @ (Command::Show(_) | Command::Select(_))) => match self.run(command).await? {
                Answer::Rows { table, tag } => Ok(Some((table, tag))),
                Answer::Done(_) => Ok(None),
            },
            _ => Ok(None),
        }
    }

    async fn execute(&mut self, mut body: &[u8], conversation: &mut Conversation) -> Result<(), Complaint> {
        let name = text(&mut body)?;
        let rows_max = usize::try_from(long_number(&mut body)?).unwrap_or(0);
        let portal = self.extended.portal(name)?;
        let Some(command) = portal.command.clone() else {
            conversation.say(&EmptyQueryResponse::new());
            return Ok(());
        };
        if portal.result.is_none() {
            match conversation.unless_gone(self.run(&command)).await? {
                Answer::Done(tag) => {
                    conversation.complete(tag);
                    return Ok(());
                }
                Answer::Rows { table, tag } => self.extended.portal(name)?.result = Some((table, tag, 0)),
            }
        }
        let Portal { formats, result: Some((table, tag, sent)), .. } = self.extended.portal(name)? else {
            return Ok(());
        };
        let rest = table.rows.get(*sent..).unwrap_or_default();
        let rows = rest.get(..rows_max).filter(|_| rows_max > 0).unwrap_or(rest);
        conversation.rows(table, rows, formats);
        *sent += rows.len();
        if *sent < table.rows.len() {
            conversation.say(&PortalSuspended::new());
        } else {
            conversation.complete(tag);
        }
        Ok(())
    }
}
