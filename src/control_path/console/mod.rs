//! The admin console: what `psql -U admin pglobby` talks to. SHOW with PgBouncer's commands, columns and order, ours
//! appended, so that its exporters and dashboards work; what an operator does to a running node; and the life of tenants and
//! logins in SQL.
//!
//! It lives on the control path's own threads: a long list made here delays no query.

mod admin_commands;
mod config_table;
mod connection;
mod extended;
mod node_commands;
mod result_rows;
mod show;
mod show_central;
mod show_traffic;
mod statement;
mod stats_window;
mod table;
mod tenant_counts;

use std::{net::IpAddr, sync::Arc};

use pgwire::{error::ErrorInfo, messages::response::ErrorResponse};
use tokio::{runtime::Handle, sync::mpsc};
use tracing::{debug, info};

pub use self::stats_window::Period;
use self::{
    connection::{Conversation, Lost},
    extended::Extended,
    statement::{Command, Wait},
    table::{Formats, Table},
};
use crate::{
    control_path::admin::actor::{Office, Operator},
    data_path::{
        login::connection_limits::Visitor,
        proxy::{Console, ConsoleVisit, Proxy},
        tenant::{Login, LoginKind},
    },
    shutdown::Ending,
};

/// What the console needs beside the proxy itself.
#[derive(Clone)]
pub struct Backstage {
    /// Tenants, logins and hosts.
    pub office: Office,
    /// Averages of the last period.
    pub period: Arc<Period>,
    /// What only the owner of the process can do.
    pub requests: mpsc::Sender<Request>,
}

/// What an administrator wants from whoever runs the process.
#[derive(Debug)]
pub enum Request {
    /// Read the configuration again, and say how that went.
    Reload(tokio::sync::oneshot::Sender<Result<(), String>>),
    /// End the process.
    Shutdown(Ending),
}

/// An error that the administrator reads; the connection goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Complaint {
    sqlstate: &'static str,
    message: String,
    hint: Option<&'static str>,
}

impl Complaint {
    fn new(sqlstate: &'static str, message: impl Into<String>) -> Self {
        Self { sqlstate, message: message.into(), hint: None }
    }

    fn hint(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }

    fn to_message(&self, severity: &str) -> ErrorResponse {
        let mut info = ErrorInfo::new(severity.to_owned(), self.sqlstate.to_owned(), self.message.clone());
        info.severity_nonlocalized = Some(severity.to_owned());
        info.hint = self.hint.map(str::to_owned);
        info.into()
    }
}

/// What a statement brought.
#[derive(Debug)]
enum Answer {
    Rows { table: Table, tag: &'static str },
    Done(&'static str),
}

/// What the data path calls for an administrator. Must be made on the runtime that is to serve them.
pub fn door(backstage: Backstage) -> Console {
    let here = Handle::current();
    Arc::new(move |mut visit| {
        let (here, backstage) = (here.clone(), backstage.clone());
        Box::pin(async move {
            if let Err(error) = visit.stream.detach() {
                return debug!(%error, "an administrator's connection broke");
            }
            here.spawn(receive(visit, backstage));
        })
    })
}

async fn receive(visit: ConsoleVisit, backstage: Backstage) {
    let ConsoleVisit { mut stream, hello, login, read_only, unsent, proxy, visitor } = visit;
    if let Err(error) = stream.attach() {
        return debug!(%error, "an administrator's connection broke");
    }
    info!(login = login.name, peer = ?hello.peer, read_only, "console opened");
    let conversation = Conversation::new(stream, &hello.leftover, unsent);
    let name = login.name.clone();
    let session = Session {
        proxy,
        backstage,
        login,
        read_only,
        peer: hello.peer,
        in_transaction: false,
        extended: Extended::default(),
        _visitor: visitor,
    };
    let end = session.serve(conversation).await;
    info!(login = name, end = ?end.err(), "console closed");
}

/// One administrator's connection.
struct Session {
    proxy: Arc<Proxy>,
    backstage: Backstage,
    login: Arc<Login>,
    read_only: bool,
    peer: Option<IpAddr>,
    /// Drivers that said BEGIN look whether they are believed.
    in_transaction: bool,
    extended: Extended,
    _visitor: Visitor,
}

impl Session {
    /// Until the administrator leaves.
    async fn serve(mut self, mut conversation: Conversation) -> Result<(), Lost> {
        conversation.greet();
        // After an error in a batch, everything up to its Sync is left out.
        let mut skipping = false;
        loop {
            let message = conversation.next().await?;
            if let Err(complaint) = self.look_at_login().await {
                conversation.say(&complaint.to_message("FATAL"));
                return conversation.flush().await;
            }
            match message.tag() {
                b'X' => return Ok(()),
                b'S' => {
                    skipping = false;
                    if !self.in_transaction {
                        self.extended.forget_portals();
                    }
                    conversation.ready(self.in_transaction);
                }
                _ if skipping => {}
                b'Q' => {
                    self.simple_query(message.body(), &mut conversation).await;
                    conversation.ready(self.in_transaction);
                }
                b'P' | b'B' | b'D' | b'E' | b'C' => {
                    if let Err(complaint) = self.extended_query(&message, &mut conversation).await {
                        conversation.say(&complaint.to_message("ERROR"));
                        skipping = true;
                    }
                }
                b'H' => conversation.flush().await?,
                // Data for a COPY that is not there is ignored, as PostgreSQL does.
                b'd' | b'c' | b'f' => {}
                tag => {
                    let words = format!("invalid frontend message type {tag}");
                    conversation.say(&Complaint::new("08P01", words).to_message("FATAL"));
                    return conversation.flush().await;
                }
            }
        }
    }

    /// Whether this is still an administrator, and of which rank. While nobody can be asked, nothing has changed.
    async fn look_at_login(&mut self) -> Result<(), Complaint> {
        let Ok(now) = self.proxy.directory.login(&self.login.name).await else { return Ok(()) };
        let still = now.filter(|now| now.still_admits(&self.login, self.peer)).map(|now| now.kind.clone());
        match still {
            Some(LoginKind::Admin { read_only }) => {
                self.read_only = read_only;
                Ok(())
            }
            _ => Err(Complaint::new("57P01", "terminating connection: the login was changed")),
        }
    }

    /// Statements up to the first that fails.
    async fn simple_query(&mut self, body: &[u8], conversation: &mut Conversation) {
        let commands = match self::connection::text(&mut { body }).and_then(statement::read) {
            Ok(commands) => commands,
            Err(complaint) => return conversation.say(&complaint.to_message("ERROR")),
        };
        if commands.is_empty() {
            conversation.nothing_asked();
        }
        // As PostgreSQL has it of DROP DATABASE: nothing of the text is done.
        let destroys = |command: &Command| matches!(command, Command::Order(words) if words.destroys());
        if commands.len() > 1 && commands.iter().any(destroys) {
            return conversation.say(&not_alone().to_message("ERROR"));
        }
        for command in &commands {
            match conversation.unless_gone(self.run(command)).await {
                Ok(answer) => conversation.answer(&answer, &Formats::default()),
                Err(complaint) => return conversation.say(&complaint.to_message("ERROR")),
            }
        }
    }

    async fn run(&mut self, command: &Command) -> Result<Answer, Complaint> {
        Ok(match command {
            Command::Show(words) => Answer::Rows { table: self.show(words).await?, tag: "SHOW" },
            Command::Select(what) => Answer::Rows { table: self.select(what)?, tag: "SELECT 1" },
            Command::Accepted(tag) => Answer::Done(tag),
            Command::Begin => {
                self.in_transaction = true;
                Answer::Done("BEGIN")
            }
            Command::End(tag) => {
                self.in_transaction = false;
                self.extended.forget_portals();
                Answer::Done(tag)
            }
            Command::Act(_) | Command::Order(_) if self.read_only => {
                return Err(Complaint::new("42501", "this administrator may only SHOW"));
            }
            Command::Order(words) if self.in_transaction && words.destroys() => return Err(not_alone()),
            Command::Act(action) => {
                info!(login = self.login.name, ?action, "an administrator acts");
                Answer::Done(self.act(action).await?)
            }
            Command::Order(words) => self.carry_out(words).await?,
        })
    }

    fn operator(&self) -> Operator {
        self.backstage.office.operator(format!("login:{}", self.login.name))
    }
}

fn not_alone() -> Complaint {
    Complaint::new(
        "25001",
        "DROP TENANT cannot run in a transaction block, or in a text with other statements",
    )
    .hint("It takes effect at once and cannot be undone: send it alone.")
}

impl From<Wait> for Ending {
    fn from(wait: Wait) -> Self {
        match wait {
            Wait::No => Self::Now,
            // Idle sessions end at once in both, others with their transaction.
            Wait::ForServers | Wait::ForClients => Self::Drain { at_most: None },
        }
    }
}
