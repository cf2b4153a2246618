//! The admin console, database `pglobby`: SHOW with PgBouncer's commands, columns and order (our columns
//! follow), so that its exporters and dashboards work; commands to this node and to others; admin commands in
//! SQL.
//!
//! It runs on the control path's threads, so a long answer delays no query.

mod admin_commands;
mod config_table;
mod connection;
mod extended;
mod fleet_commands;
mod fleet_show;
mod node_command;
mod result_rows;
mod show;
mod show_central;
mod show_traffic;
mod statement;
mod stats_window;
mod table;
mod tenant_counts;
mod this_node;

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use pgwire::{
    error::ErrorInfo,
    messages::response::{ErrorResponse, NoticeResponse},
};
use tokio::{runtime::Handle, sync::mpsc};
use tracing::{debug, info};

pub use self::stats_window::StatsWindow;
use self::{
    connection::{ConnectionLost, ConsoleConnection},
    extended::Extended,
    statement::ConsoleCommand,
    table::{Formats, Table},
    this_node::ThisNode,
};
use crate::{
    control_path::{
        admin::actor::{Actor, AdminContext},
        fleet::Fleet,
    },
    data_path::{
        login::connection_limits::ConnectionPermit,
        proxy::{Console, ConsoleClient, Proxy},
        tenant::{Login, LoginKind},
    },
    shutdown::Ending,
};

/// What the console needs besides the proxy.
#[derive(Clone)]
pub struct ConsoleContext {
    /// For admin commands.
    pub admin: AdminContext,
    /// For SHOW STATS.
    pub window: Arc<StatsWindow>,
    /// Requests to the owner of the process.
    pub requests: mpsc::Sender<Request>,
    /// The other nodes.
    pub fleet: Arc<Fleet>,
}

/// A request of an administrator to the owner of the process.
#[derive(Debug)]
pub enum Request {
    /// Reload the configuration, and report the result.
    Reload(tokio::sync::oneshot::Sender<Result<(), String>>),
    /// End the process.
    Shutdown(Ending),
}

/// An error for the administrator. The connection stays open.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ConsoleError {
    sqlstate: Cow<'static, str>,
    message: String,
    hint: Option<Cow<'static, str>>,
}

impl ConsoleError {
    fn new(sqlstate: &'static str, message: impl Into<String>) -> Self {
        Self { sqlstate: sqlstate.into(), message: message.into(), hint: None }
    }

    fn hint(self, hint: impl Into<Cow<'static, str>>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    fn to_message(&self, severity: &str) -> ErrorResponse {
        self.info(severity).into()
    }

    fn to_notice(&self) -> NoticeResponse {
        self.info("WARNING").into()
    }

    fn info(&self, severity: &str) -> ErrorInfo {
        let mut info = ErrorInfo::new(severity.to_owned(), self.sqlstate.to_string(), self.message.clone());
        info.severity_nonlocalized = Some(severity.to_owned());
        info.hint = self.hint.as_ref().map(ToString::to_string);
        info
    }
}

#[derive(Debug)]
enum ConsoleReply {
    Rows { table: Table, tag: &'static str },
    Done(&'static str),
}

/// The entry of the console, which the data path calls. Must be created on the runtime that serves
/// administrators.
pub fn entry(context: ConsoleContext) -> Console {
    let here = Handle::current();
    Arc::new(move |mut visit| {
        let (here, context) = (here.clone(), context.clone());
        Box::pin(async move {
            if let Err(error) = visit.stream.detach() {
                return debug!(%error, "console connection lost");
            }
            here.spawn(receive(visit, context));
        })
    })
}

/// Lets other nodes run commands and SHOW on this one.
pub fn serve_other_nodes(proxy: Arc<Proxy>, context: ConsoleContext) {
    let fleet = context.fleet.clone();
    fleet.answer_with(fleet_show::handler(ThisNode { proxy, context }));
}

async fn receive(visit: ConsoleClient, context: ConsoleContext) {
    let ConsoleClient { mut stream, packet, login, read_only, unsent, proxy, permit } = visit;
    if let Err(error) = stream.attach() {
        return debug!(%error, "console connection lost");
    }
    info!(
        login = login.name,
        address = packet.peer.map(tracing::field::display),
        read_only,
        "console opened"
    );
    let connection = ConsoleConnection::new(stream, &packet.unread, unsent);
    let name = login.name.clone();
    let session = Session {
        proxy,
        context,
        login,
        read_only,
        peer: packet.peer,
        in_transaction: false,
        extended: Extended::default(),
        notices: Vec::new(),
        _permit: permit,
    };
    let end = session.serve(connection).await;
    info!(login = name, cause = end.err().map(tracing::field::display), "console closed");
}

struct Session {
    proxy: Arc<Proxy>,
    context: ConsoleContext,
    login: Arc<Login>,
    read_only: bool,
    peer: Option<IpAddr>,
    /// Between BEGIN and its end, for drivers that check the transaction status.
    in_transaction: bool,
    extended: Extended,
    /// Warnings for the administrator, sent before the result.
    notices: Vec<ConsoleError>,
    _permit: ConnectionPermit,
}

impl Session {
    /// Serves until the administrator disconnects.
    async fn serve(mut self, mut connection: ConsoleConnection) -> Result<(), ConnectionLost> {
        connection.greet();
        // After an error, messages up to Sync are skipped.
        let mut skipping = false;
        loop {
            let message = connection.next().await?;
            if let Err(error) = self.check_login().await {
                connection.say(&error.to_message("FATAL"));
                return connection.flush().await;
            }
            match message.tag() {
                b'X' => return Ok(()),
                b'S' => {
                    skipping = false;
                    if !self.in_transaction {
                        self.extended.forget_portals();
                    }
                    connection.ready(self.in_transaction);
                }
                _ if skipping => {}
                b'Q' => {
                    self.simple_query(message.body(), &mut connection).await;
                    connection.ready(self.in_transaction);
                }
                b'P' | b'B' | b'D' | b'E' | b'C' => {
                    if let Err(error) = self.extended_query(&message, &mut connection).await {
                        connection.say(&error.to_message("ERROR"));
                        skipping = true;
                    }
                }
                b'H' => connection.flush().await?,
                // COPY data without COPY is ignored, as PostgreSQL does.
                b'd' | b'c' | b'f' => {}
                tag => {
                    let message = format!("invalid frontend message type {tag}");
                    connection.say(&ConsoleError::new("08P01", message).to_message("FATAL"));
                    return connection.flush().await;
                }
            }
        }
    }

    /// Checks that the login is still an administrator's, and whether it is read-only. Nothing changes
    /// while the central database is down.
    async fn check_login(&mut self) -> Result<(), ConsoleError> {
        let Ok(now) = self.proxy.directory.login(&self.login.name).await else { return Ok(()) };
        let still = now.filter(|now| now.still_admits(&self.login, self.peer)).map(|now| now.kind.clone());
        match still {
            Some(LoginKind::Admin { read_only }) => {
                self.read_only = read_only;
                Ok(())
            }
            _ => Err(ConsoleError::new("57P01", "terminating connection: the login was changed")),
        }
    }

    /// Runs statements up to the first error.
    async fn simple_query(&mut self, body: &[u8], connection: &mut ConsoleConnection) {
        let commands = match self::connection::text(&mut { body }).and_then(statement::read) {
            Ok(commands) => commands,
            Err(error) => return connection.say(&error.to_message("ERROR")),
        };
        if commands.is_empty() {
            connection.nothing_asked();
        }
        // As for DROP DATABASE in PostgreSQL: no statement of the text runs.
        let destroys =
            |command: &ConsoleCommand| matches!(command, ConsoleCommand::Admin(words) if words.destroys());
        if commands.len() > 1 && commands.iter().any(destroys) {
            return connection.say(&not_alone().to_message("ERROR"));
        }
        for command in &commands {
            let answer = connection.while_connected(self.run(command)).await;
            self.send_notices(connection);
            match answer {
                Ok(answer) => connection.answer(&answer, &Formats::default()),
                Err(error) => return connection.say(&error.to_message("ERROR")),
            }
        }
    }

    async fn run(&mut self, command: &ConsoleCommand) -> Result<ConsoleReply, ConsoleError> {
        Ok(match command {
            ConsoleCommand::Show(words, place) => {
                ConsoleReply::Rows { table: self.show_at(words, place).await?, tag: "SHOW" }
            }
            ConsoleCommand::Select(what) => ConsoleReply::Rows { table: self.select(what)?, tag: "SELECT 1" },
            ConsoleCommand::Accepted(tag) => ConsoleReply::Done(tag),
            ConsoleCommand::Begin => {
                self.in_transaction = true;
                ConsoleReply::Done("BEGIN")
            }
            ConsoleCommand::End(tag) => {
                self.in_transaction = false;
                self.extended.forget_portals();
                ConsoleReply::Done(tag)
            }
            ConsoleCommand::Node(..) | ConsoleCommand::Admin(_) if self.read_only => {
                return Err(ConsoleError::new(
                    "42501",
                    "permission denied: this login is read-only and may only SHOW",
                ));
            }
            ConsoleCommand::Admin(words) if self.in_transaction && words.destroys() => {
                return Err(not_alone());
            }
            ConsoleCommand::Node(command, place) => {
                info!(
                    login = self.login.name,
                    command = command.title(),
                    subject = command.subject(),
                    ?place,
                    "admin command"
                );
                self.run_node_command(command, place).await?;
                ConsoleReply::Done(command.title())
            }
            ConsoleCommand::Admin(words) => self.run_admin_command(words).await?,
        })
    }

    fn send_notices(&mut self, connection: &mut ConsoleConnection) {
        for notice in self.notices.drain(..) {
            connection.say(&notice.to_notice());
        }
    }

    fn this_node(&self) -> ThisNode {
        ThisNode { proxy: self.proxy.clone(), context: self.context.clone() }
    }

    fn actor(&self) -> Actor {
        self.context.admin.actor(format!("login:{}", self.login.name))
    }
}

fn not_alone() -> ConsoleError {
    ConsoleError::new(
        "25001",
        "DROP TENANT cannot run in a transaction block, or in a text with other statements",
    )
    .hint("It takes effect at once and cannot be undone: send it alone.")
}
