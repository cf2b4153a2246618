//! After a transaction that may have left state in its session, the proxy asks the server for that state before
//! the server returns to the pool.
//!
//! The client's ReadyForQuery waits for the answer: changed parameters are reported in front of it, as
//! PostgreSQL does. It does not wait until the database's functions are loaded or compared, unless its own
//! texts decide what must be asked then. A server that goes back to the pool does that first, and the session
//! borrows another one meanwhile.

use std::sync::{Arc, atomic::Ordering};

use tokio::time::Instant;
use tracing::warn;

use super::{
    Relay, Step,
    load_functions::{load_functions, load_then_give_back},
    session_end::SessionEnd,
};
use crate::{
    data_path::{
        exchange::{
            Repeated,
            pending_checks::{ALL_VALUES, AnswerLimits, CheckedState, PendingChecks},
        },
        functions::TextsBeforeLoad,
        prepared::Statement,
        server::connection::{AskError, Row, Server},
        session_state::{
            Settings, custom_names::CustomSet, pins::Pins, server_role::HiddenCatalogs,
            state_query::StateChecks, temporary_use::TEMP_BUFFERS,
        },
    },
    error::TenantSwitchError,
};

impl Relay {
    /// Does the pending checks, and gives the server back if no pin is left.
    pub(super) async fn after_transaction(&mut self) -> Result<(), SessionEnd> {
        let checked = self.run_checks().await;
        if checked.is_err()
            && let Some(server) = self.server.as_mut()
        {
            // The state of the server's session is unknown: it cannot be undone.
            server.side.replies.set_pins(Pins::all());
        }
        checked?;
        if self.session.side.follows() && self.pool.functions.must_load() {
            self.load_behind_reply().await?;
        }
        match self.after_reply(Instant::now()) {
            Some(Step::End(end)) => Err(end),
            _ => Ok(()),
        }
    }

    async fn run_checks(&mut self) -> Result<(), SessionEnd> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        let mut checks = std::mem::take(&mut server.side.checks);
        let failed = std::mem::take(&mut server.failed);
        if let Some(switcher) = self.session.switcher.as_mut().filter(|_| checks.resets && !failed) {
            switcher.resetting = true;
        }
        let before_load = checks.before_load.take();
        if before_load.is_some() && checks.only_loads_functions() && self.listening.is_none() {
            self.release_reply().await?;
        }
        let changed = checks.has_changed_functions();
        self.changed_functions |= changed;
        if let Some(texts) = before_load {
            self.look_up_after_load(&texts, changed, &mut checks).await?;
        }
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        let new_pins = checks.pins(failed);
        let before = server.side.replies.pins();
        let mut pins = server.side.sequences.after_transaction(before, new_pins);
        pins.insert(new_pins);
        server.side.unknown_settings &= failed || !checks.resets;
        server.side.unknown_settings |= new_pins.contains(Pins::SETTINGS);
        if pins.contains(Pins::SETTINGS) && checks.decides_on_settings() {
            pins.set(Pins::SETTINGS, server.side.unknown_settings);
        }
        if self.session.side.follows() && checks.must_ask_server() {
            if failed {
                checks.failed();
            }
            self.learn_state(&mut checks, failed, &mut pins).await?;
        }
        if checks.includes(StateChecks::TEMPORARY)
            && let Some(server) = self.server.as_mut()
        {
            let temp_buffers = self.session.side.wanted.get(TEMP_BUFFERS);
            self.pool.note_temporary_use(&mut server.side.temporary_use, temp_buffers);
        }
        if checks.includes(StateChecks::SESSION_START)
            && let Some(server) = self.server.as_mut()
        {
            self.pool.has_same_start(server).await?;
        }
        let (server, statements) = (self.server.as_ref(), &mut self.session.side.statements);
        let there = server.is_some_and(|server| server.side.statements.has_unnamed_of(statements));
        pins.set(Pins::UNSTORED_UNNAMED, statements.keeps_unnamed_unstored(there));
        if self.session.side.wanted.len() > self.session.side.rules().settings_max {
            pins.insert(Pins::SETTINGS);
        }
        if self.server.as_ref().is_some_and(|server| server.side.unknown_settings) {
            pins.insert(Pins::SETTINGS);
        }
        self.set_pins(pins);
        self.release_reply().await
    }

    /// Finds out what the transaction has left: from the server, or without a question after a driver's reset.
    async fn learn_state(
        &mut self,
        checks: &mut PendingChecks,
        failed: bool,
        pins: &mut Pins,
    ) -> Result<(), SessionEnd> {
        let after_reset = checks.after_driver_reset(&self.session.side.wanted, &self.session.side.startup);
        let is_known = !failed && pins.is_empty() && self.listening.is_none();
        if let Some(checked) = after_reset.filter(|_| is_known) {
            return self.keep_settings(checked, pins).await;
        }
        match self.ask(checks, pins).await {
            Ok(mut checked) => {
                let channels = checked.channels.take();
                checks.set_parsed_settings(&self.session.side.wanted, &checked.wanted);
                self.keep_settings(checked, pins).await?;
                if let Some(channels) = channels {
                    self.subscribe(channels, pins).await?;
                }
                self.check_tenant_parameter(checks).await
            }
            Err(lost @ (AskError::Lost(_) | AskError::Unanswered)) => Err(lost.into()),
            Err(error) => {
                warn!(
                    tenant = self.pool.tenant.name,
                    login = self.session.handle.login.name,
                    connection = self.session.handle.process_id,
                    side = "server",
                    %error,
                    "cannot read the session's settings from the server; session pinned"
                );
                pins.insert(Pins::SETTINGS);
                Ok(())
            }
        }
    }

    /// Looks up texts that ran before the functions were loaded. `changed`: they have changed functions.
    async fn look_up_after_load(
        &mut self,
        texts: &TextsBeforeLoad,
        changed: bool,
        checks: &mut PendingChecks,
    ) -> Result<(), SessionEnd> {
        if !changed && std::mem::take(&mut self.changed_functions) {
            self.pool.functions.until_load_ended().await;
        }
        if self.pool.functions.must_load_at_once() {
            self.load().await?;
        }
        for found in self.pool.functions.lookup_after_load(texts, changed) {
            checks.record(&found, false);
        }
        if let (true, Some(server)) = (checks.take_sets_custom(), self.server.as_mut()) {
            server.side.custom.set(CustomSet::UNNAMED);
        }
        self.unshare(checks.take_prepared_under_unknown());
        Ok(())
    }

    /// Functions had changed the settings of these statements: they become the session's own.
    fn unshare(&mut self, statements: Vec<Arc<Statement>>) {
        let Some(server) = self.server.as_mut() else { return };
        let table = self.session.side.rules().shared_statements.clone();
        for statement in statements {
            server.side.statements.failed(&statement);
            self.session.side.statements.unshare(&statement, &table);
        }
    }

    /// A session that may choose its tenant, and has set parameters that its texts do not name, may have set
    /// `pglobby.tenant`: it ends if that is not the tenant it is at.
    async fn check_tenant_parameter(&mut self, checks: &PendingChecks) -> Result<(), SessionEnd> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        if self.session.switcher.is_none() || !checks.includes(StateChecks::ANY_SETTING) {
            return Ok(());
        }
        let sql = "SELECT pg_catalog.current_setting('pglobby.tenant', true)";
        let rows = server.ask(sql, &[]).await?;
        let value = rows.into_iter().flatten().next().flatten().unwrap_or_default();
        let is_here = value.is_empty() || value == self.pool.tenant.name.as_bytes();
        if is_here { Ok(()) } else { Err(SessionEnd::Refused(Box::new(TenantSwitchError::NotAlone.into()))) }
    }

    /// The one place where a session's pins change: on its server, for operators, in the pool's list.
    pub(super) fn set_pins(&mut self, pins: Pins) {
        if let Some(server) = self.server.as_mut() {
            server.side.replies.set_pins(pins);
        }
        self.session.handle.set_pins(pins);
        if pins.is_empty() || !self.session.side.follows() {
            self.pinned = None;
        } else if self.pinned.is_none() {
            self.pool.stats.pinned.fetch_add(1, Ordering::Relaxed);
            self.pinned = Some(self.pool.pin(&self.session.handle));
        }
    }

    /// Loads them with a server that no session uses: this one, if it goes back to the pool. Only where none is
    /// idle, a session that keeps its server waits.
    async fn load_behind_reply(&mut self) -> Result<(), SessionEnd> {
        let pins = self.server.as_ref().map_or(Pins::empty(), |server| server.side.replies.pins());
        if pins.is_empty() {
            self.loads_functions = true;
        } else if let Some(idle) = self.pool.try_borrow() {
            load_then_give_back(idle, &self.pool);
        } else if !pins.contains(Pins::UNSTORED_UNNAMED) {
            // A load replaces the unnamed statement.
            self.load().await?;
        }
        Ok(())
    }

    /// Loads the effects of the database's functions.
    async fn load(&mut self) -> Result<(), SessionEnd> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        if self.session.side.follows() {
            load_functions(server, &self.pool).await?;
            self.pass_notifications();
        }
        Ok(())
    }

    async fn ask(&mut self, checks: &PendingChecks, pins: &mut Pins) -> Result<CheckedState, AskError> {
        let (wanted, startup) = (&self.session.side.wanted, &self.session.side.startup);
        let Some(server) = self.server.as_mut() else {
            return Err(std::io::Error::from(std::io::ErrorKind::NotConnected).into());
        };
        let answer = AnswerLimits {
            value_bytes: self.session.side.rules().settings_bytes_max,
            channels: self.pool.rules.channels_max,
        };
        let mut rows = match ask_state(server, checks, wanted, startup, answer).await {
            // A catalog has been hidden since the server was opened.
            Err(AskError::Refused(error)) if error.is_denied() => {
                self.pool.look_for_hidden_catalogs(server).await?;
                ask_state(server, checks, wanted, startup, answer).await?
            }
            answer => answer?,
        };
        if checks.needs_all_values(startup, &server.side.role) {
            checks.add_settings(&mut rows, &server.run(ALL_VALUES).await?);
        }
        let missing = rows.iter().filter_map(|row| match &row[..] {
            [Some(kind), Some(name), ..] if kind == b"m" => Some(&**name),
            _ => None,
        });
        let role = &server.side.role;
        let checked = checks.answered(&rows, wanted, startup, role, pins);
        // Under a role that is a superuser, it may have set what nothing else shows here.
        let unseen = role.hides(HiddenCatalogs::SETTINGS)
            && checks.may_have_superuser_settings(wanted, role)
            && server.side.reported.text("is_superuser") == Some("on");
        if unseen || checks.may_have_other_login() && server.side.has_other_login() {
            pins.insert(Pins::SETTINGS);
        }
        server.side.deallocated_by_code(&missing.collect::<Vec<_>>(), &mut self.session.side);
        if checks.includes(StateChecks::DBLINK) {
            pins.set(Pins::DBLINK, keeps_dblink(server).await?);
        }
        self.pass_notifications();
        Ok(checked)
    }

    /// Keeps the session's settings. A reported parameter that the client has reset gets its startup value at
    /// once, and the client gets its ParameterStatus, as from PostgreSQL.
    ///
    /// Settings beyond the limit stay on their server, which is pinned then.
    async fn keep_settings(&mut self, checked: CheckedState, pins: &mut Pins) -> Result<(), SessionEnd> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        let CheckedState { mut wanted, mut applied, channels: _ } = checked;
        if wanted != applied {
            restore(server, &mut wanted, &mut applied).await?;
        }
        self.pass_notifications();
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        if wanted != *self.session.side.wanted {
            self.session.handle.set_application_name(wanted.get("application_name").unwrap_or_default());
            if self.session.side.keep(Arc::new(wanted)).is_err() {
                pins.insert(Pins::SETTINGS);
                server.side.applied = self.session.side.wanted.clone();
                return Ok(());
            }
            server.side.custom.ever.insert(self.session.side.custom);
            self.apply_idle_session_timeout();
        }
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        server.side.applied = if applied == *self.session.side.wanted {
            self.session.side.wanted.clone()
        } else {
            Arc::new(applied)
        };
        Ok(())
    }
}

async fn ask_state(
    server: &mut Server,
    checks: &PendingChecks,
    wanted: &Settings,
    startup: &Settings,
    max: AnswerLimits,
) -> Result<Vec<Row>, AskError> {
    let (sql, names) = checks.state_query(wanted, startup, &server.side.role, max);
    let mut arrays = vec![names];
    if sql.contains("$2") {
        arrays.extend([server.side.statements.client_names(), server.side.prepared_names()]);
    }
    let arrays: Vec<&str> = arrays.iter().map(String::as_str).collect();
    server.ask_again(Repeated::State, &sql, &arrays).await
}

/// Whether named dblink connections are open, asked from the extension's own function; only a superuser can
/// create it, in any schema.
async fn keeps_dblink(server: &mut Server) -> Result<bool, AskError> {
    const WHERE: &str = "SELECT pg_catalog.quote_ident(n.nspname) FROM pg_catalog.pg_proc AS p \
        JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace \
        WHERE p.proname = 'dblink_get_connections' AND p.pronargs = 0 AND p.prolang = \
        (SELECT oid FROM pg_catalog.pg_language WHERE lanname = 'c')";
    for row in server.ask(WHERE, &[]).await? {
        let schema = row.into_iter().next().flatten().unwrap_or_default();
        let schema = String::from_utf8_lossy(&schema);
        let open = format!("SELECT FROM {schema}.dblink_get_connections() AS names WHERE names IS NOT NULL");
        match server.ask(&open, &[]).await {
            Ok(rows) if rows.is_empty() => {}
            Ok(_) | Err(AskError::Refused(_)) => return Ok(true),
            Err(lost) => return Err(lost),
        }
    }
    Ok(false)
}

/// Sets those of the wanted parameters that servers report; the client gets their ParameterStatus with its
/// reply. The others are set in front of the client's next request. One that the server refuses is wanted no
/// more.
async fn restore(server: &mut Server, wanted: &mut Settings, applied: &mut Settings) -> Result<(), AskError> {
    let mut missing: Vec<(Box<str>, Box<str>)> = Vec::new();
    for (name, value) in wanted.iter().filter(|(name, value)| applied.get(name) != Some(value)) {
        match server.side.reported.find(name) {
            Some((_, now)) if *now == *value.as_bytes() => {}
            Some(_) => missing.push((name.into(), value.into())),
            None => continue,
        }
    }
    for (name, value) in &missing {
        match server.ask("SELECT pg_catalog.set_config($1, $2, false)", &[name, value]).await {
            Err(AskError::Refused(_)) => wanted.set(name, None),
            answer => drop(answer?),
        }
    }
    for (name, value) in wanted.iter().filter(|(name, _)| server.side.reported.find(name).is_some()) {
        applied.set(name, Some(value));
    }
    Ok(())
}
