//! What a client is told when it has logged in: every parameter the server reports, as a server with this client's
//! startup parameters reports them.
//!
//! Startup parameters take effect as PostgreSQL would have it: a bad one is refused with a server's own error. What servers have
//! taken is remembered, and what they cannot refuse is known by rule (`startup_values.rs`), so that a login waits for no server
//! that others have. That what is known is still so, an idle server is asked at each login; one that reports something else, then
//! or later, makes the pool forget it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{Pool, PooledServer, role_settings::SessionStart, startup_values::spelled};
use crate::{
    data_path::{
        server::connection::{AskError, Server},
        session_state::{Settings, parameter_status::Reported},
    },
    error::ClientError,
};

/// Greetings kept per pool. Applications have one set of startup parameters, rarely a handful.
const KEPT_MAX: usize = 64;

/// Values of startup parameters whose spelling is kept per pool.
const SPELLINGS_MAX: usize = 256;

/// Longer values are not kept.
const VALUE_BYTES_MAX: usize = 256;

/// How long a login waits for an idle server to say whether what is known is still so.
const LOOK_TIME_MAX: Duration = Duration::from_secs(1);

/// What a client with certain startup parameters is told.
#[derive(Debug, Clone)]
pub struct Greeting {
    /// What the session has set, as the server spells it.
    pub settings: Arc<Settings>,
    /// What the server reports.
    pub told: Arc<Reported>,
    /// NoticeResponses, in front of that.
    notices: Arc<[u8]>,
    /// What the session begins with; `None`: its first server says so.
    pub start: Option<Arc<SessionStart>>,
}

impl Greeting {
    /// The messages.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.notices);
        self.told.write(out);
    }
}

/// What a pool knows of what its servers report.
#[derive(Debug, Default)]
pub struct Greetings {
    known: Mutex<Known>,
    /// How often servers have reported something else than was known.
    changes: AtomicU64,
    /// Looks at an idle server that have begun; and the last of them that is done.
    looks_begun: AtomicU64,
    looks_done: tokio::sync::Mutex<u64>,
    /// Whoever has it may open a server beyond the pool's size to try startup parameters on.
    aside: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    /// What servers report of which nobody has set anything, and what notices they start with; `None`: there was none yet.
    base: Option<(Reported, Arc<[u8]>)>,
    /// By what was asked for; the latest used first.
    kept: VecDeque<(Settings, Greeting)>,
    /// Name, value, and how servers spell that; the latest last.
    spellings: VecDeque<(Box<str>, Box<str>, Box<str>)>,
}

impl Known {
    fn kept(&mut self, asked: &Settings) -> Option<Greeting> {
        let at = self.kept.iter().position(|(known, _)| known == asked)?;
        let found = self.kept.remove(at)?;
        let greeting = found.1.clone();
        self.kept.push_front(found);
        Some(greeting)
    }

    /// What a server would tell whose every answer is known.
    fn composed(&self, asked: &Settings) -> Option<Greeting> {
        let (base, notices) = self.base.as_ref()?;
        let (mut told, mut settings) = (base.clone(), Settings::default());
        // What others may be set, and what servers report, is the role's.
        if asked.get("role").is_some() || asked.get("session_authorization").is_some() {
            return None;
        }
        for (name, value) in asked.iter() {
            let remembered = || {
                let same = |known: &&(Box<str>, Box<str>, Box<str>)| (&*known.0, &*known.1) == (name, value);
                self.spellings.iter().find(same).map(|known| known.2.to_string())
            };
            let spelled = spelled(name, value, base).or_else(remembered)?;
            settings.set(name, Some(&spelled));
            if let Some((reported, _)) = base.find(name) {
                told.set(reported, spelled.as_bytes());
            }
        }
        let notices = notices.clone();
        Some(Greeting { settings: Arc::new(settings), told: Arc::new(told), notices, start: None })
    }

    fn keep(&mut self, asked: Settings, greeting: Greeting, quiet: bool) {
        if asked.iter().any(|(_, value)| value.len() > VALUE_BYTES_MAX) {
            return;
        }
        for (name, value) in asked.iter().filter(|_| quiet) {
            let Some(spelled) = greeting.settings.get(name) else { continue };
            if !self.spellings.iter().any(|known| (&*known.0, &*known.1) == (name, value)) {
                self.spellings.truncate(SPELLINGS_MAX - 1);
                self.spellings.push_front((name.into(), value.into(), spelled.into()));
            }
        }
        self.kept.truncate(KEPT_MAX - 1);
        self.kept.push_front((asked, greeting));
    }

    /// Takes down what a server reports that nobody has set; whether that contradicts what was known.
    fn hear(&mut self, server: &Server) -> bool {
        let side = &server.side;
        let is_set = |name: &str| {
            let name = name.to_ascii_lowercase();
            let of_role = name == "is_superuser" || name == "session_authorization";
            let set = |settings: &Settings| {
                settings.get(&name).is_some() || of_role && settings.get("role").is_some()
            };
            set(&side.applied) || set(&server.startup)
        };
        let reported = || side.reported.iter().filter(|(name, _)| !is_set(name));
        let Some((base, notices)) = &mut self.base else {
            if server.startup.is_empty() {
                self.base = Some((Reported::new(reported()), server.notices.clone().into()));
            }
            return false;
        };
        let mut contradicts = false;
        for (name, value) in reported() {
            let new = base.find(name).is_none();
            contradicts |= base.set(name, value) && !new;
        }
        if contradicts {
            *notices = server.notices.clone().into();
            self.kept.clear();
            self.spellings.clear();
        }
        contradicts
    }
}

impl Greetings {
    fn locked(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version that servers report, if there was one.
    pub fn server_version(&self) -> Option<Box<str>> {
        self.locked().base.as_ref().and_then(|(base, _)| base.text("server_version").map(Into::into))
    }

    /// Counts what has been found to be otherwise than known: a server that was idle since may have read its configuration anew
    /// as well, and not said so yet.
    #[inline]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
}

/// A server that a session has from its login on.
#[derive(Debug)]
pub struct Engaged {
    /// The server.
    pub server: Box<PooledServer>,
    /// What the client is told.
    pub greeting: Greeting,
}

impl Pool {
    /// A server that was started with what a client asks for, and is its own to the end: `pool_mode = "session"`.
    ///
    /// # Errors
    /// As [`Pool::greet`].
    pub async fn engage(self: &Arc<Self>, asked: Settings, wait: Duration) -> Result<Engaged, ClientError> {
        loop {
            let pool = self.current().ok_or(ClientError::AdminShutdown)?;
            let opened = pool.open_for(&asked).await?;
            let is_new = opened.is_some();
            let (pool, mut server) = match opened {
                Some(server) => (pool, server),
                None => pool.rested_for(asked.clone(), wait).await?,
            };
            // Asked, it has also said what it reports now: that may have changed while nobody spoke to it.
            match pool.is_as_begun(&mut server).await {
                Ok(true) => {
                    let (told, notices) =
                        (Arc::new(server.side.reported.clone()), server.notices.clone().into());
                    let start = pool.start().cloned();
                    let greeting = Greeting { settings: Arc::default(), told, notices, start };
                    return Ok(Engaged { server, greeting });
                }
                Ok(false) => {}
                Err(error) if is_new => {
                    if !pool.put_right_if_changed(&error).await {
                        return Err(ClientError::ServerLost);
                    }
                }
                Err(error) => {
                    warn!(tenant = self.tenant.name, side = "server", %error, "an idle server is gone")
                }
            }
        }
    }

    /// The server of a session in session mode that no new one can be opened for: the one that has been idle longest, so
    /// that its process number has been nobody's for as long as can be.
    async fn rested_for(
        self: &Arc<Self>,
        asked: Settings,
        wait: Duration,
    ) -> Result<(Arc<Self>, Box<PooledServer>), ClientError> {
        let (pool, server) = match self.take_longest_idle() {
            Some(server) => (self.clone(), server),
            None => self.borrow_of_current(wait).await?,
        };
        let server = if server.startup == asked { server } else { pool.restart(server, asked).await? };
        Ok((pool, server))
    }

    /// What a client that asks for these parameters is told. Waits for a server only where that is not known.
    ///
    /// # Errors
    /// As [`Pool::borrow`]; [`ClientError::Server`] with the server's own words for a parameter it refuses.
    pub async fn greet(self: &Arc<Self>, asked: Settings, wait: Duration) -> Result<Greeting, ClientError> {
        let seen = self.look_again().await;
        let mut pool = self.current().ok_or(ClientError::AdminShutdown)?;
        if let Some(greeting) = pool.known_greeting(&asked, seen) {
            return Ok(greeting);
        }
        loop {
            let (of, mut server, apart) = pool.borrow_to_greet(wait).await?;
            pool = of;
            match pool.is_as_begun(&mut server).await {
                Ok(true) => return pool.greet_by(server, apart, asked).await,
                Ok(false) => pool = pool.current().ok_or(ClientError::AdminShutdown)?,
                Err(error) => {
                    warn!(tenant = self.tenant.name, side = "server", %error, "an idle server is gone")
                }
            }
        }
    }

    /// `seen`: a server has just said that what is known is still so.
    fn known_greeting(&self, asked: &Settings, seen: bool) -> Option<Greeting> {
        // Servers that are all busy report what changes with their next reply; where there is none, nobody does.
        if !seen && !self.is_paused() && self.live() <= self.opening() {
            return None;
        }
        let mut known = self.greetings.locked();
        let mut greeting = known.kept(asked).or_else(|| {
            let greeting = known.composed(asked)?;
            known.keep(asked.clone(), greeting.clone(), false);
            Some(greeting)
        })?;
        greeting.start = self.start().filter(|_| seen).cloned();
        Some(greeting)
    }

    async fn greet_by(
        &self,
        mut server: Box<PooledServer>,
        apart: bool,
        asked: Settings,
    ) -> Result<Greeting, ClientError> {
        let changes = self.greetings.changes();
        match apply(&mut server, &asked).await {
            Ok((settings, said)) => {
                let (told, quiet) = (Arc::new(server.side.reported.clone()), said.is_empty());
                let notices = [said, server.notices.to_vec()].concat().into();
                self.hear(&mut server);
                if !apart {
                    self.give_back(server);
                }
                let greeting = Greeting { settings, told, notices, start: self.start().cloned() };
                if changes == self.greetings.changes() {
                    self.greetings.locked().keep(asked, greeting.clone(), quiet);
                }
                Ok(greeting)
            }
            Err(AskError::Refused(error)) => {
                if !apart && server.clean().await.is_ok() {
                    self.give_back(server);
                }
                Err(ClientError::Server { sqlstate: error.sqlstate, message: error.message })
            }
            Err(AskError::Lost(_)) => Err(ClientError::ServerLost),
        }
    }

    /// Takes down what a server has reported. Where it contradicts what was known, all of that is forgotten, and servers that
    /// have been idle since are heard before their next reply.
    #[cold]
    pub(super) fn hear(&self, server: &mut PooledServer) {
        server.side.news = false;
        let contradicts = self.greetings.locked().hear(server);
        if contradicts {
            info!(
                tenant = self.tenant.name,
                host = self.tenant.host.name,
                "servers report other parameters than before"
            );
            server.changes_seen = self.greetings.changes.fetch_add(1, Ordering::Relaxed) + 1;
        }
    }

    /// Lets an idle server say whether what is known is still so: it tells what has changed with its next reply only. `false`:
    /// there was none that answered. Those who come at the same time share one look, which has begun after each of them came.
    async fn look_again(self: &Arc<Self>) -> bool {
        let came = self.greetings.looks_begun.load(Ordering::Acquire);
        let pool = self.clone();
        // In a task of its own: a server that is slow to answer is not lost with the login that waits for it.
        let look = tokio::spawn(async move {
            let mut done = pool.greetings.looks_done.lock().await;
            if *done > came {
                return true;
            }
            let Some(mut server) = pool.try_borrow() else { return false };
            let number = pool.greetings.looks_begun.fetch_add(1, Ordering::AcqRel) + 1;
            match pool.is_as_begun(&mut server).await {
                Ok(true) => pool.give_back(server),
                Ok(false) => {}
                Err(_) => return false,
            }
            *done = number;
            true
        });
        matches!(tokio::time::timeout(LOOK_TIME_MAX, look).await, Ok(Ok(true)))
    }

    /// A server to try startup parameters on; and whether it is none of the pool's, but one that is opened for this and closed
    /// then, because those of the pool are all busy.
    async fn borrow_to_greet(
        self: &Arc<Self>,
        wait: Duration,
    ) -> Result<(Arc<Self>, Box<PooledServer>, bool), ClientError> {
        let pool = self.current().ok_or(ClientError::AdminShutdown)?;
        if let Some(server) = pool.try_borrow() {
            return Ok((pool, server, false));
        }
        if pool.live() >= pool.rules.size && !pool.is_paused() {
            // One at a time, and not while others could use the place.
            let aside = pool.greetings.aside.lock().await;
            if let Some(server) = pool.try_borrow() {
                return Ok((pool.clone(), server, false));
            }
            if let Ok(server) = pool.open_beside().await {
                drop(aside);
                return Ok((pool, server, true));
            }
        }
        let (pool, server) = pool.borrow_of_current(wait).await?;
        Ok((pool, server, false))
    }

    /// A server of this pool, or of the one that has replaced it while we waited; and that pool.
    async fn borrow_of_current(
        self: &Arc<Self>,
        wait: Duration,
    ) -> Result<(Arc<Self>, Box<PooledServer>), ClientError> {
        let mut pool = self.clone();
        loop {
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
