//! The start of a session: an authenticated client moves to its tenant's worker once and is greeted there.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tracing::{info, warn};

use crate::{
    config::{Config, PoolMode},
    data_path::{
        exchange::{ClientSide, SessionRules, startup_charge},
        login::{
            connection_limits::{ClientAddress, ConnectionPermit},
            startup::StartupPacket,
        },
        memory_limit::{Account, Charge},
        pool::{Pool, PooledServer, placement::Seat, startup_parameters::StartupStatus},
        proxy::Proxy,
        refuse,
        relay::{
            Relay,
            change_worker::{Arrival, serve},
            client_session::{ClientSession, Traffic},
            no_tenant,
        },
        session_state::Settings,
        sessions::registry::{NewSession, SessionHandle},
        tenant::{Login, LoginKind},
        tenant_switch::switcher::TenantSwitcher,
        worker::Worker,
    },
    error::{ClientError, Limit},
    wire::{
        message::{backend_key_data, ready_for_query},
        stream::Stream,
    },
};

/// A client that has logged in and has no session yet.
#[derive(Debug)]
pub struct AuthenticatedClient {
    pub stream: Stream,
    pub packet: StartupPacket,
    pub login: Arc<Login>,
    /// The last replies of the authentication; they go out with the session's first write.
    pub unsent: Vec<u8>,
}

impl AuthenticatedClient {
    /// Takes the connection out of this thread's reactor if the session's worker is another one. `None`: that
    /// failed, and the connection is closed.
    pub fn detach_for(mut self, pool: &Pool, worker: &Worker) -> Option<Self> {
        if !worker.is_here()
            && let Err(error) = self.stream.detach()
        {
            self.log_move_failed(pool, &error);
            return None;
        }
        Some(self)
    }

    fn log_move_failed(&self, pool: &Pool, error: &std::io::Error) {
        let (tenant, login) = (&*pool.tenant.name, &*self.login.name);
        warn!(tenant, login, side = "client", %error, "cannot move a session to its worker");
    }

    /// Sends an error instead of starting a session, logs it and closes the connection.
    pub async fn refuse(mut self, error: &ClientError, tenant: Option<&str>, proxy: &Proxy) {
        let (address, login) = (ClientAddress(self.packet.peer), &*self.login.name);
        info!(%address, login, tenant, reason = %error, "login refused");
        proxy.metrics.login_refused(error);
        if tokio::io::AsyncWriteExt::write_all(&mut self.stream, &self.unsent).await.is_ok() {
            refuse(self.stream, error).await;
        }
    }
}

/// Applies what changed in the directory between the look-up of the login and the start of its session.
pub async fn apply_missed_changes(permit: &ConnectionPermit, session: &SessionHandle, proxy: &Proxy) {
    if permit.has_missed_changes() {
        Box::pin(proxy.look_again_at(session)).await;
    }
}

/// Starts the session on the tenant's worker: obtains the startup parameter status, registers the session and
/// prepares the replies that end the login. `None`: the client was refused.
pub async fn greet(
    mut client: AuthenticatedClient,
    pool: Arc<Pool>,
    seat: Seat,
    proxy: Arc<Proxy>,
) -> Option<Box<Relay>> {
    if let Err(error) = client.stream.attach() {
        client.log_move_failed(&pool, &error);
        return None;
    }
    let config = proxy.config.load_full();
    let sent = std::mem::take(&mut client.packet.settings);
    let respelled: Vec<String> =
        sent.iter().map(|(name, _)| name.clone()).filter(|name| *name != name.to_ascii_lowercase()).collect();
    let settings = Settings::new(sent);
    let memory = pool.account(config.limits.client_memory_max);
    let wait = config.timeouts.query_wait;
    let (status, server, began) = match startup_status(&pool, settings, &memory, wait).await {
        Ok(started) => started,
        Err(error) => {
            let error = with_names_as_sent(error, &respelled);
            client.refuse(&error, Some(&pool.tenant.name), &proxy).await;
            return None;
        }
    };
    let rules = SessionRules { memory, ..rules_at(&pool, &config, &client.login) };
    pool.stats.logins.fetch_add(1, Relaxed);
    let server_pid = server.as_ref().map(|server| server.process_id);
    let now_ms = pool.clock.now_ms();
    let mut session = open_session(client, rules, status, server_pid, now_ms, &proxy);
    session.side.startup_memory = began;
    let mut relay = Box::new(Relay::new(session, pool, seat));
    if let Some(server) = server {
        relay.engage(server);
    }
    Some(relay)
}

/// Servers get the names of parameters in lower case. In their errors a client finds its own spelling.
fn with_names_as_sent(mut error: ClientError, respelled: &[String]) -> ClientError {
    if let ClientError::Server { message, .. } = &mut error {
        for name in respelled {
            for before in ["parameter", "parameter name"] {
                let (ours, sent) = (name.to_ascii_lowercase(), name);
                let (ours, sent) = (format!("{before} \"{ours}\""), format!("{before} \"{sent}\""));
                *message = message.replacen(&ours, &sent, 1);
            }
        }
    }
    error
}

/// Registers a session, logs it, and prepares the replies that end its login. `known_as`: in session mode,
/// the process number of its server.
fn open_session(
    client: AuthenticatedClient,
    mut rules: SessionRules,
    status: StartupStatus,
    known_as: Option<i32>,
    now_ms: u32,
    proxy: &Arc<Proxy>,
) -> ClientSession {
    let config = proxy.config.load();
    let AuthenticatedClient { stream, packet, login, unsent } = client;
    let tenant = rules.identity.tenant_access.as_ref().map(|tenant_access| tenant_access.tenant.clone());
    let new = NewSession {
        login: login.clone(),
        tenant_access: rules.identity.tenant_access.clone(),
        peer: packet.peer,
        addresses: stream.addresses(),
        now_ms,
        tls: packet.tls.is_some(),
        forwarded_until: None,
        application_name: status.reported.text("application_name").unwrap_or_default().into(),
        known_as,
        secret_bytes: if packet.minor >= 2 { 32 } else { 4 },
    };
    let (handle, secret) = proxy.sessions.register(new);
    if config.log.connections {
        let address = ClientAddress(handle.peer);
        info!(
            tenant = tenant.as_ref().map(|tenant| &*tenant.name), login = login.name,
            connection = handle.process_id, %address, tls = handle.tls,
            "{}", if tenant.is_some() { "session opened" } else { "session opened without a tenant" }
        );
    }
    let mut bytes = unsent;
    status.write(&mut bytes);
    backend_key_data(&mut bytes, handle.known_as, &secret);
    ready_for_query(&mut bytes, b'I');
    let switcher = rules
        .may_switch_tenant
        .then(|| TenantSwitcher::new(proxy.clone(), tenant.map(|tenant| tenant.id), status.reported.clone()));
    rules.identity.login = Some(login);
    // The first of 2^32 serial numbers that only this session uses.
    let first_serial = u64::from(handle.process_id.unsigned_abs()) << 32;
    let mut side = ClientSide::new(rules, status.settings, first_serial);
    (side.sent_parameters, side.start_settings) = (status.reported, status.start.into());
    ClientSession {
        client: stream,
        unsent: bytes.into(),
        side,
        inbox: packet.unread,
        end_of_input: None,
        handle,
        leaving: None,
        switcher,
        traffic: Traffic::default(),
        proxy: proxy.clone(),
    }
}

/// Returns the startup parameter status for a client with these settings, in session mode also the session's
/// server, and the memory charge of the settings.
async fn startup_status(
    pool: &Arc<Pool>,
    settings: Settings,
    memory: &Arc<Account>,
    wait: Duration,
) -> Result<(StartupStatus, Option<Box<PooledServer>>, Charge), ClientError> {
    let charge = startup_charge(&settings, memory)?;
    if pool.rules.mode == PoolMode::Transaction {
        return Ok((pool.startup_status(settings, wait).await?, None, charge));
    }
    let (status, server) = pool.session_server(settings, wait).await?;
    Ok((status, Some(server), charge))
}

/// The rules of a session at this pool.
pub fn rules_at(pool: &Pool, config: &Config, login: &Login) -> SessionRules {
    let mut rules = rules(config, matches!(login.kind, LoginKind::Service { .. }));
    rules.follow = pool.rules.mode == PoolMode::Transaction;
    (rules.shared_statements, rules.functions) = (pool.statements.clone(), pool.functions.clone());
    rules.memory = pool.account(config.limits.client_memory_max);
    rules.identity.tenant_access = Some(pool.tenant_access.clone());
    rules
}

/// The rules of a session without a tenant.
fn rules(config: &Config, is_service: bool) -> SessionRules {
    SessionRules {
        follow: true,
        may_switch_tenant: is_service,
        sees_binds: is_service,
        inspect_bytes_max: config.limits.statement_inspect_bytes_max,
        statements_max: config.limits.client_prepared_statements_max,
        statements_bytes_max: config.limits.client_prepared_bytes_max,
        unanswered_max: config.limits.pipelined_requests_max,
        settings_max: config.limits.tracked_parameters_max,
        settings_bytes_max: config.limits.tracked_bytes_max,
        ..SessionRules::default()
    }
}

/// The rules of a service login's session without a tenant.
pub fn rules_without_tenant(config: &Config, proxy: &Proxy) -> SessionRules {
    let no_tenant = &proxy.pools.accounts.no_tenant;
    let memory = Account::new(Limit::Client, config.limits.client_memory_max, &[no_tenant]);
    SessionRules { memory, ..rules(config, true) }
}

/// Starts a service login's session without a tenant. It stays on this worker until it chooses a tenant.
pub async fn start_without_tenant(
    mut client: AuthenticatedClient,
    permit: ConnectionPermit,
    proxy: Arc<Proxy>,
) {
    let config = proxy.config.load_full();
    let settings = Settings::new(std::mem::take(&mut client.packet.settings));
    let rules = rules_without_tenant(&config, &proxy);
    let charge = match startup_charge(&settings, &rules.memory) {
        Ok(charge) => charge,
        Err(error) => return client.refuse(&error, None, &proxy).await,
    };
    let server_version = proxy.pools.server_version();
    let reported = no_tenant::startup_status(&settings, &client.login.name, server_version.as_deref());
    let status =
        StartupStatus { settings: Arc::new(settings), reported, notices: Arc::default(), start: None };
    let now_ms = proxy.workers.first().map_or(0, |worker| worker.clock.now_ms());
    let mut session = open_session(client, rules, status, None, now_ms, &proxy);
    session.side.startup_memory = charge;
    apply_missed_changes(&permit, &session.handle, &proxy).await;
    tokio::spawn(serve(Arrival::NoTenant(Box::new(session)), permit));
}
