//! Startup parameters, and the ParameterStatus messages that a client gets after its login: those that a
//! server with these startup parameters would send.
//!
//! A bad parameter is refused with the server's own error. The pool remembers what servers have accepted, and
//! knows by rule what they cannot refuse (`startup_values.rs`), so that a login need not wait while all
//! servers are busy. At each login an idle server is asked whether its reports are still the same. A server
//! that reports something else, then or later, clears the cache.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tracing::{info, warn};

use super::{Pool, PooledServer, startup_values::spelled};
use crate::{
    data_path::{
        lock::locked,
        server::connection::{AskError, Server},
        session_state::{
            Settings,
            parameter_status::ReportedParameters,
            role_settings::RoleSettings,
            temporary_use::{NewTempBuffers, TEMP_BUFFERS},
        },
    },
    error::ClientError,
};

/// Sets of startup parameters per pool. Applications have one, rarely a handful.
const KEPT_MAX: usize = 64;

/// Values of startup parameters per pool whose spelling is kept.
const SPELLINGS_MAX: usize = 256;

/// Longer values are not kept.
const VALUE_BYTES_MAX: usize = 256;

/// How long a login waits for an idle server to report changes.
const CHECK_TIME_MAX: Duration = Duration::from_secs(1);

/// Startup parameters of a client, and the ParameterStatus messages for it.
#[derive(Debug, Clone)]
pub struct StartupStatus {
    /// The startup parameters, as the server spells their values.
    pub settings: Arc<Settings>,
    pub reported: Arc<ReportedParameters>,
    /// NoticeResponse messages, sent first.
    pub notices: Arc<[u8]>,
    /// Settings of role and database; `None`: known with the session's first server.
    pub start: Option<Arc<RoleSettings>>,
}

impl StartupStatus {
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.notices);
        self.reported.write(out);
    }
}

/// What a pool knows of the parameters that its servers report.
#[derive(Debug, Default)]
pub struct StatusCache {
    known: Mutex<Known>,
    /// Counts reports that contradicted the cache.
    changes: AtomicU64,
    /// Number of the last check of an idle server that has begun, and of the last that is done.
    checks_begun: AtomicU64,
    checks_done: tokio::sync::Mutex<u64>,
    /// Held while a server is opened beside the pool to try startup parameters on.
    beside: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    /// Reports and start notices of servers without startup parameters; `None`: there was none yet.
    base: Option<(ReportedParameters, Arc<[u8]>)>,
    /// Keyed by startup parameters; the last used first.
    kept: VecDeque<(Settings, StartupStatus)>,
    /// Name, value, and the server's spelling of it; the newest first.
    spellings: VecDeque<(Box<str>, Box<str>, Box<str>)>,
}

impl Known {
    fn kept(&mut self, asked: &Settings) -> Option<StartupStatus> {
        let at = self.kept.iter().position(|(known, _)| known == asked)?;
        let found = self.kept.remove(at)?;
        let status = found.1.clone();
        self.kept.push_front(found);
        Some(status)
    }

    /// The status where all values can be spelled without a server.
    fn composed(&self, asked: &Settings) -> Option<StartupStatus> {
        let (base, notices) = self.base.as_ref()?;
        let (mut reported, mut settings) = (base.clone(), Settings::default());
        // Another role may set other parameters, and servers report others for it.
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
            if let Some((name, _)) = base.find(name) {
                reported.set(name, spelled.as_bytes());
            }
        }
        let notices = notices.clone();
        Some(StartupStatus {
            settings: Arc::new(settings),
            reported: Arc::new(reported),
            notices,
            start: None,
        })
    }

    fn keep(&mut self, asked: Settings, status: StartupStatus, quiet: bool) {
        if asked.iter().any(|(_, value)| value.len() > VALUE_BYTES_MAX) {
            return;
        }
        for (name, value) in asked.iter().filter(|_| quiet) {
            let Some(spelled) = status.settings.get(name) else { continue };
            if !self.spellings.iter().any(|known| (&*known.0, &*known.1) == (name, value)) {
                self.spellings.truncate(SPELLINGS_MAX - 1);
                self.spellings.push_front((name.into(), value.into(), spelled.into()));
            }
        }
        self.kept.truncate(KEPT_MAX - 1);
        self.kept.push_front((asked, status));
    }

    /// Notes reports of parameters that no session has set. `true`: the cache was wrong and is cleared.
    fn note_reported(&mut self, server: &Server) -> bool {
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
                self.base = Some((ReportedParameters::new(reported()), server.notices.clone().into()));
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

impl StatusCache {
    /// The status for these startup parameters, if it is known.
    fn status(&self, asked: &Settings) -> Option<StartupStatus> {
        let mut known = locked(&self.known);
        known.kept(asked).or_else(|| {
            let status = known.composed(asked)?;
            known.keep(asked.clone(), status.clone(), false);
            Some(status)
        })
    }

    /// `server_version`, once a server was open.
    pub fn server_version(&self) -> Option<Box<str>> {
        locked(&self.known).base.as_ref().and_then(|(base, _)| base.text("server_version").map(Into::into))
    }

    /// Counts reports that contradicted the cache. A server that is idle since may have others.
    #[inline]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
}

impl Pool {
    /// A server that was started with the client's parameters, for the whole session: `pool_mode =
    /// "session"`. Errors: as [`Pool::startup_status`].
    pub async fn session_server(
        self: &Arc<Self>,
        asked: Settings,
        wait: Duration,
    ) -> Result<(StartupStatus, Box<PooledServer>), ClientError> {
        let began = Instant::now();
        loop {
            let pool = self.current().ok_or(ClientError::AdminShutdown)?;
            let opened = match pool.open_for(&asked).await {
                // The host is away: its next attempt comes after a pause.
                Err(_) if pool.connector.is_holding() && began.elapsed() < wait => continue,
                opened => opened?,
            };
            let is_new = opened.is_some();
            let (pool, mut server) = match opened {
                Some(server) => (pool, server),
                None => longest_idle_for(&pool, asked.clone(), wait).await?,
            };
            // Its answer also reports parameters that changed while it was idle.
            match pool.has_same_start(&mut server).await {
                Ok(true) => {
                    let (reported, notices) =
                        (Arc::new(server.side.reported.clone()), server.notices.clone().into());
                    let start = pool.start().cloned();
                    let status = StartupStatus { settings: Arc::default(), reported, notices, start };
                    return Ok((status, server));
                }
                Ok(false) => {}
                Err(error) if is_new => {
                    if !pool.repair_role_after(&error).await {
                        return Err(ClientError::ServerLost);
                    }
                }
                Err(error) => {
                    warn!(tenant = self.tenant.name, side = "server", %error, "server lost while asked for startup parameters")
                }
            }
        }
    }

    /// The status for a client with these startup parameters. Waits only where the cache has none. Errors: as
    /// [`Pool::borrow`]; [`ClientError::Server`] with the server's own words for a parameter it refuses.
    pub async fn startup_status(
        self: &Arc<Self>,
        asked: Settings,
        wait: Duration,
    ) -> Result<StartupStatus, ClientError> {
        let began = Instant::now();
        let seen = ask_idle_server(self).await;
        let mut pool = self.current().ok_or(ClientError::AdminShutdown)?;
        // Busy servers report changes with their next reply. Without any server the cache may be stale.
        let is_fresh = seen || pool.is_paused() || pool.live() > pool.opening();
        if is_fresh && let Some(status) = pool.status_cache.status(&asked) {
            return Ok(StartupStatus { start: pool.start().filter(|_| seen).cloned(), ..status });
        }
        loop {
            let (of, mut server, beside) = borrow_for_status(&pool, wait).await?;
            pool = of;
            if let Some(value) = asked.get(TEMP_BUFFERS) {
                server = pool.taking_temp_buffers(server, NewTempBuffers::Value(value)).await?;
            }
            match pool.has_same_start(&mut server).await {
                Ok(true) => match status_from(&pool, server, beside, asked.clone()).await {
                    // Its host goes down: the login waits for another one.
                    Err(ClientError::ServerLost) if began.elapsed() < wait => {}
                    status => return status,
                },
                Ok(false) => pool = pool.current().ok_or(ClientError::AdminShutdown)?,
                Err(error) => {
                    warn!(tenant = self.tenant.name, side = "server", %error, "server lost while asked for startup parameters")
                }
            }
        }
    }

    /// Notes what a server has reported. If that contradicts the cache, it is cleared, and the other servers
    /// are stale until their next reply.
    #[cold]
    pub(super) fn note_reported(&self, server: &mut PooledServer) {
        server.side.parameters_changed = false;
        let contradicts = locked(&self.status_cache.known).note_reported(server);
        if contradicts {
            info!(
                tenant = self.tenant.name,
                host = self.tenant.host.name,
                "reported parameters changed on the host"
            );
            server.changes_seen = self.status_cache.changes.fetch_add(1, Ordering::Relaxed) + 1;
        }
    }
}

/// In session mode, where no new server can be opened: the one that has been idle longest, so that its
/// process number, which its last client knows, is not reused soon.
async fn longest_idle_for(
    pool: &Arc<Pool>,
    asked: Settings,
    wait: Duration,
) -> Result<(Arc<Pool>, Box<PooledServer>), ClientError> {
    let (pool, server) = match pool.take_longest_idle(Duration::ZERO) {
        Some(server) => (pool.clone(), server),
        None => borrow_of_current(pool, wait).await?,
    };
    let server = if server.startup == asked { server } else { pool.restart(server, asked).await? };
    Ok((pool, server))
}

async fn status_from(
    pool: &Arc<Pool>,
    mut server: Box<PooledServer>,
    beside: bool,
    asked: Settings,
) -> Result<StartupStatus, ClientError> {
    let changes = pool.status_cache.changes();
    server.side.custom.ever.insert(pool.statements.custom_names.of(&asked));
    match apply(&mut server, &asked).await {
        Ok((settings, said)) => {
            let (reported, quiet) = (Arc::new(server.side.reported.clone()), said.is_empty());
            let notices = [said, server.notices.to_vec()].concat().into();
            pool.note_reported(&mut server);
            if !beside {
                pool.give_back(server);
            }
            let status = StartupStatus { settings, reported, notices, start: pool.start().cloned() };
            if changes == pool.status_cache.changes() {
                locked(&pool.status_cache.known).keep(asked, status.clone(), quiet);
            }
            Ok(status)
        }
        Err(AskError::Refused(error)) => {
            if !beside && server.clean().await.is_ok() {
                pool.give_back(server);
            }
            Err(error.into())
        }
        Err(AskError::Lost(_) | AskError::Unanswered) => Err(ClientError::ServerLost),
    }
}

/// Lets an idle server report what has changed: it does so with its next reply only. `false`: no server
/// answered. Logins at the same time share one check, which begins after each of them asked for it.
async fn ask_idle_server(pool: &Arc<Pool>) -> bool {
    let asked_at = pool.status_cache.checks_begun.load(Ordering::Acquire);
    let pool = pool.clone();
    // In a task of its own: a login that leaves does not close a server that is slow to answer.
    let check = tokio::spawn(async move {
        let mut done = pool.status_cache.checks_done.lock().await;
        if *done > asked_at {
            return true;
        }
        let Some(mut server) = pool.try_borrow() else { return false };
        let number = pool.status_cache.checks_begun.fetch_add(1, Ordering::AcqRel) + 1;
        match pool.has_same_start(&mut server).await {
            Ok(true) => pool.give_back(server),
            Ok(false) => {}
            Err(_) => return false,
        }
        *done = number;
        true
    });
    matches!(tokio::time::timeout(CHECK_TIME_MAX, check).await, Ok(Ok(true)))
}

/// A server to try startup parameters on. `true`: those of the pool are all busy, and this one was opened
/// beside it, to be closed afterwards.
async fn borrow_for_status(
    pool: &Arc<Pool>,
    wait: Duration,
) -> Result<(Arc<Pool>, Box<PooledServer>, bool), ClientError> {
    let pool = pool.current().ok_or(ClientError::AdminShutdown)?;
    if let Some(server) = pool.try_borrow() {
        return Ok((pool, server, false));
    }
    if pool.live() >= pool.rules.size && !pool.is_paused() {
        // One at a time, to leave the host's budget to sessions.
        let beside = pool.status_cache.beside.lock().await;
        if let Some(server) = pool.try_borrow() {
            return Ok((pool.clone(), server, false));
        }
        if let Ok(server) = pool.open_beside().await {
            drop(beside);
            return Ok((pool, server, true));
        }
    }
    let (pool, server) = borrow_of_current(&pool, wait).await?;
    Ok((pool, server, false))
}

/// A server of this pool, or of its successor if it is replaced during the wait; and the pool it is from.
async fn borrow_of_current(
    pool: &Arc<Pool>,
    wait: Duration,
) -> Result<(Arc<Pool>, Box<PooledServer>), ClientError> {
    let mut pool = pool.clone();
    loop {
        match pool.borrow(Instant::now(), wait).await {
            Ok(server) => return Ok((pool, server)),
            Err(client_error) => match pool.current().filter(|_| pool.is_retired()) {
                Some(successor) => pool = successor,
                None => return Err(client_error),
            },
        }
    }
}

/// Sets these parameters on a server. Returns their values in the server's spelling, and its notices (about a
/// name that is too long, for example).
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
    Ok((server.side.applied.clone(), std::mem::take(&mut server.answer_notices)))
}
