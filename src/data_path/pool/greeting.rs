//! What a client is told when it has logged in: every parameter the server reports, as a server with this client's
//! startup parameters reports them.
//!
//! Startup parameters take effect as PostgreSQL would have it, so a real server must have seen them once; a bad one is
//! refused with the server's own error. The answer is kept, because the clients of one application ask for the same.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::Pool;
use crate::{
    data_path::{
        server::connection::{AskError, Server},
        session_state::Settings,
    },
    error::Refusal,
    wire::message::parameter_status,
};

/// Greetings kept per pool. Applications have one set of startup parameters, rarely a handful.
const KEPT_MAX: usize = 64;

/// What a client with certain startup parameters is told.
#[derive(Debug, Clone)]
pub struct Greeting {
    /// What the session has set, as the server spells it.
    pub settings: Arc<Settings>,
    /// NoticeResponse and ParameterStatus messages, ready to send.
    pub messages: Arc<[u8]>,
    /// The parameter of that name.
    server_version: Option<Box<str>>,
}

/// A server that a session has from its login on.
#[derive(Debug)]
pub struct Engaged {
    /// The server.
    pub server: Box<Server>,
    /// What the client is told.
    pub messages: Vec<u8>,
}

/// The greetings of a pool, by what was asked for; the latest used first.
#[derive(Debug, Default)]
pub struct Greetings(Mutex<VecDeque<(Settings, Greeting)>>);

impl Greetings {
    fn get(&self, asked: &Settings) -> Option<Greeting> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == asked)?;
        let found = kept.remove(at)?;
        let greeting = found.1.clone();
        kept.push_front(found);
        Some(greeting)
    }

    fn keep(&self, asked: Settings, greeting: Greeting) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(KEPT_MAX - 1);
        kept.push_front((asked, greeting));
    }

    /// The version in one of them.
    pub fn server_version(&self) -> Option<Box<str>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.front().and_then(|(_, greeting)| greeting.server_version.clone())
    }

    /// Servers may report something else from now on.
    pub fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Pool {
    /// A server that was started with what a client asks for, and is its own to the end: `pool_mode = "session"`.
    ///
    /// # Errors
    /// As [`Pool::greet`].
    pub async fn engage(self: &Arc<Self>, asked: Settings, wait: Duration) -> Result<Engaged, Refusal> {
        let server = match self.open_for(&asked).await? {
            Some(server) => server,
            None => self.rested_for(asked, wait).await?,
        };
        let messages = greeting_of(&server);
        Ok(Engaged { server, messages })
    }

    /// The server of a session in session mode that no new one can be opened for: the one that has been idle longest, so
    /// that its process number has been nobody's for as long as can be.
    async fn rested_for(self: &Arc<Self>, asked: Settings, wait: Duration) -> Result<Box<Server>, Refusal> {
        let (pool, server) = match self.take_longest_idle() {
            Some(server) => (self.clone(), server),
            None => self.borrow_of_current(wait).await?,
        };
        if server.startup == asked { Ok(server) } else { pool.restart(server, asked).await }
    }

    /// What a client that asks for these parameters is told. Needs a server only where nobody asked for the same before.
    ///
    /// # Errors
    /// As [`Pool::borrow`]; [`Refusal::Server`] with the server's own words for a parameter it refuses.
    pub async fn greet(self: &Arc<Self>, asked: Settings, wait: Duration) -> Result<Greeting, Refusal> {
        if let Some(greeting) = self.greetings.get(&asked) {
            return Ok(greeting);
        }
        let (pool, mut server) = self.borrow_of_current(wait).await?;
        match apply(&mut server, &asked).await {
            Ok((settings, said)) => {
                let messages = [said, greeting_of(&server)].concat();
                let server_version = server.side.reported_value("server_version").map(Into::into);
                pool.give_back(server);
                let greeting = Greeting { settings, messages: messages.into(), server_version };
                pool.greetings.keep(asked, greeting.clone());
                Ok(greeting)
            }
            Err(AskError::Refused(error)) => {
                if server.clean().await.is_ok() {
                    pool.give_back(server);
                }
                Err(Refusal::Server { sqlstate: error.sqlstate, message: error.message })
            }
            Err(AskError::Lost(_)) => Err(Refusal::ServerLost),
        }
    }

    /// A server of this pool, or of the one that has replaced it while we waited; and that pool.
    async fn borrow_of_current(
        self: &Arc<Self>,
        wait: Duration,
    ) -> Result<(Arc<Self>, Box<Server>), Refusal> {
        let mut pool = self.clone();
        loop {
            if let Some(server) = pool.try_borrow() {
                return Ok((pool, server));
            }
            match pool.borrow(Instant::now(), wait).await {
                Ok(server) => return Ok((pool, server)),
                Err(refusal) => match pool.current().filter(|_| pool.is_retired()) {
                    Some(successor) => pool = successor,
                    None => return Err(refusal),
                },
            }
        }
    }
}

/// What the server said when it started, and what it reports.
fn greeting_of(server: &Server) -> Vec<u8> {
    let mut messages = server.notices.to_vec();
    for (name, value) in &server.side.reported {
        parameter_status(&mut messages, name.as_bytes(), value.as_bytes());
    }
    messages
}

/// Makes the server as a session with these parameters finds it; hands back how the server spells them, and what notices it
/// has for who asks for them (a name that is too long, say).
async fn apply(server: &mut Server, asked: &Settings) -> Result<(Arc<Settings>, Vec<u8>), AskError> {
    if !server.side.applied.is_empty() {
        server.run("RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL").await?;
        server.side.applied = Arc::default();
    }
    if asked.is_empty() {
        return Ok((Arc::default(), Vec::new()));
    }
    let calls: Vec<String> = (0..asked.len())
        .map(|at| format!("pg_catalog.set_config(${}, ${}, false)", 2 * at + 1, 2 * at + 2))
        .collect();
    let parameters: Vec<&str> = asked.iter().flat_map(|(name, value)| [name, value]).collect();
    let rows = server.ask(&format!("SELECT {}", calls.join(", ")), &parameters).await?;
    let mut settings = Settings::default();
    for ((name, value), spelled) in asked.iter().zip(rows.into_iter().flatten()) {
        let spelled = spelled.and_then(|bytes| String::from_utf8(bytes).ok());
        settings.set(name, Some(spelled.as_deref().unwrap_or(value)));
    }
    server.side.applied = Arc::new(settings);
    Ok((server.side.applied.clone(), std::mem::take(&mut server.said)))
}
