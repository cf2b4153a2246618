//! Parses a text under the settings of an earlier Parse. ENTER sets them before the Parse and LEAVE
//! restores the present ones after it, in one write. Pure.

use std::sync::Arc;

use super::{
    pending_checks::PendingChecks,
    pending_replies::{Origin, ReplyTracker, Request},
};
use crate::{
    data_path::{
        prepared::parse_settings::ParseSettings,
        session_state::{
            Settings,
            parameters::{HARMLESS, NOT_RESTORABLE, affects_parsing},
            pins::Pins,
            server_role::{HiddenCatalogs, ServerRole},
        },
    },
    wire::message::{append, append_cstr, array_literal, bind_portal, close_statement, parse},
};

/// The settings of a session on its server at this moment.
#[derive(Debug, Clone, Copy)]
pub struct ParseContext<'a> {
    /// `None`: a change is possible that has not been checked.
    pub under: Option<&'a Arc<ParseSettings>>,
    /// The settings of the startup packet. They hold for texts of a replaced pool too.
    pub startup: &'a Settings,
    /// The server's settings at the beginning of the transaction.
    pub applied: &'a Settings,
    /// What may have changed since.
    pub checks: &'a PendingChecks,
    /// The role that the server runs as.
    pub role: &'a ServerRole,
}

impl<'a> ParseContext<'a> {
    /// `under` are the session's settings at the beginning of the transaction.
    #[inline]
    pub fn new(
        under: &'a Arc<ParseSettings>,
        startup: &'a Settings,
        applied: &'a Settings,
        checks: &'a PendingChecks,
        role: &'a ServerRole,
        replies: &ReplyTracker,
    ) -> Self {
        Self { under: Self::under(under, checks, replies), startup, applied, checks, role }
    }

    /// Returns `under`, unless a change is possible that has not been checked.
    #[inline]
    pub fn under<'s>(
        under: &'s Arc<ParseSettings>,
        checks: &PendingChecks,
        replies: &ReplyTracker,
    ) -> Option<&'s Arc<ParseSettings>> {
        let known = !checks.changes_parsing() && !replies.pins().contains(Pins::SETTINGS);
        known.then_some(under)
    }

    /// Whether a text that was parsed under `those` has the same meaning now.
    #[inline]
    pub fn is(&self, those: &Arc<ParseSettings>) -> bool {
        self.under.is_some_and(|under| Arc::ptr_eq(under, those))
    }

    /// The settings to set for a Parse under `those`; `None` if they are in place, unknown or cannot be set.
    fn settings_to_enter(&self, those: &Arc<ParseSettings>, replies: &ReplyTracker) -> Option<Settings> {
        let can_set = replies.status() != b'E' && !replies.takes_copy_data() && !replies.is_skipping();
        if self.is(those) || !can_set {
            return None;
        }
        let mut settings = those.values()?.clone();
        for (name, value) in self.startup.iter().filter(|(name, _)| affects_parsing(name)) {
            if settings.get(name).is_none() {
                settings.set(name, Some(value));
            }
        }
        Some(settings)
    }

    /// Parameters that may be set and that pg_settings does not list; all that may be set where it is hidden.
    fn unlisted(&self) -> impl Iterator<Item = &str> {
        let applied = self.applied.iter().map(|(name, _)| name);
        let all = self.role.hides(HiddenCatalogs::SETTINGS);
        ["role"]
            .into_iter()
            .chain(applied.chain(self.checks.named()).filter(move |name| all || name.contains('.')))
    }

    /// Calls `parses`, which sends the text, and returns its result. If the settings `matter` to the text, sends
    /// ENTER before it and LEAVE after it.
    pub fn parse_under(
        &self,
        those: &Arc<ParseSettings>,
        matter: bool,
        origin: Origin,
        replies: &mut ReplyTracker,
        out: &mut Vec<u8>,
        parses: impl FnOnce(&mut ReplyTracker, &mut Vec<u8>) -> bool,
    ) -> bool {
        let Some(settings) = self.settings_to_enter(those, replies).filter(|_| matter) else {
            return parses(replies, out);
        };
        let set = || settings.iter().filter(|(name, _)| *name != "session_authorization");
        let names = array_literal(set().map(|(name, _)| name));
        let values = array_literal(set().map(|(_, value)| value));
        let others = array_literal(self.unlisted().filter(|name| settings.get(name).is_none()));
        let listed = array_literal(HARMLESS.into_iter().chain(NOT_RESTORABLE));
        let parameters = [&*names, &values, &others, &listed, &self.role.start];
        once(enter(self.role.hidden).as_bytes(), &parameters, Request::Execute(None), origin, replies, out);
        let is_sent = parses(replies, out);
        once(LEAVE, &[], Request::Execute(None), origin, replies, out);
        is_sent
    }

    /// Asks the server for its settings before the next text. The answer fills in the result.
    pub fn request_settings(
        &self,
        origin: Origin,
        replies: &mut ReplyTracker,
        out: &mut Vec<u8>,
    ) -> Arc<ParseSettings> {
        let those = ParseSettings::unknown();
        if replies.status() != b'E' {
            let unlisted = array_literal(self.unlisted());
            let ask = if self.role.hides(HiddenCatalogs::SETTINGS) { ASK_UNLISTED } else { ASK_SETTINGS };
            once(ask, &[&unlisted], Request::AskSettings(those.clone()), origin, replies, out);
        }
        those
    }
}

/// Returns the session's settings and their values.
const ASK_SETTINGS: &[u8] =
    b"SELECT pg_catalog.lower(name), pg_catalog.current_setting(name) FROM pg_catalog.pg_show_all_settings() \
      WHERE source = 'session' \
      UNION ALL SELECT n, pg_catalog.current_setting(n, true) FROM pg_catalog.unnest($1::text[]) AS n \
      WHERE pg_catalog.current_setting(n, true) <> ''";

/// The same where pg_settings is hidden: the parameters that the proxy knows of.
const ASK_UNLISTED: &[u8] =
    b"SELECT n, pg_catalog.current_setting(n, true) FROM pg_catalog.unnest($1::text[]) AS n \
      WHERE pg_catalog.current_setting(n, true) <> ''";

/// ENTER: sets $1 to $2. Sets all others to the values of a new session: the listed ones except $4, and the
/// unlisted ones in $3. It lasts until LEAVE or the end of the transaction; a parameter keeps the previous
/// values. The role comes last, because it may have fewer rights than the login; $5 is that of a new session.
fn enter(hidden: HiddenCatalogs) -> String {
    let others = match hidden.contains(HiddenCatalogs::SETTINGS) {
        false => {
            "UNION ALL SELECT pg_catalog.lower(name), reset_val FROM pg_catalog.pg_show_all_settings() \
               WHERE source = 'session' AND pg_catalog.lower(name) <> ALL ($1::text[] || $4::text[]) \
             UNION ALL SELECT n, CASE n WHEN 'role' THEN $5 ELSE '' END FROM pg_catalog.unnest($3::text[]) AS n \
               WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_show_all_settings() WHERE pg_catalog.lower(name) = n)"
        }
        // A parameter that is set to NULL is reset. PostgreSQL would make a new one of an unknown name.
        true => {
            "UNION ALL SELECT n, CASE n WHEN 'role' THEN $5 END FROM pg_catalog.unnest($3::text[]) AS n \
               WHERE n <> ALL ($4::text[]) AND (pg_catalog.strpos(n, '.') = 0 OR pg_catalog.current_setting(n, true) <> '')"
        }
    };
    let may_set_role = match hidden.contains(HiddenCatalogs::ROLES) {
        false => {
            "AND (name <> 'role' OR value IN ('none', $5) OR EXISTS (SELECT FROM pg_catalog.pg_roles \
               WHERE rolname = value AND pg_catalog.pg_has_role(session_user, oid, 'MEMBER')))"
        }
        true => "",
    };
    format!(
        "WITH target (name, value) AS MATERIALIZED ( \
           SELECT n, v FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS given (n, v) {others} \
         ), changed AS MATERIALIZED ( \
           SELECT name, value, coalesce(pg_catalog.current_setting(name, true), '') AS before FROM target \
             WHERE coalesce(pg_catalog.current_setting(name, true), '') IS DISTINCT FROM value {may_set_role} \
         ), kept AS MATERIALIZED ( \
           SELECT pg_catalog.set_config('pglobby.kept', \
             coalesce(pg_catalog.json_object_agg(name, before)::text, '{{}}'), true) FROM changed \
         ) SELECT CASE WHEN name IS NOT NULL THEN pg_catalog.set_config(name, value, true) END \
           FROM (SELECT name, value FROM kept LEFT JOIN changed ON true ORDER BY name = 'role') AS ordered"
    )
}

/// Restores the values that ENTER has kept.
const LEAVE: &[u8] = b"SELECT pg_catalog.set_config(key, value, true) FROM ( \
        SELECT key, value FROM pg_catalog.json_each_text(pg_catalog.current_setting('pglobby.kept')::json) \
        ORDER BY key = 'role') AS ordered";

/// The name of statement and portal of such a text. They are closed before and after each use: if an earlier
/// request fails, the proxy cannot know whether they exist.
const ONCE: &[u8] = b"pglobby_once";

/// Runs one of the proxy's texts within the client's batch. The client's unnamed statement and portal stay.
pub fn once(
    sql: &[u8],
    parameters: &[&str],
    request: Request,
    origin: Origin,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) {
    if !replies.track(Request::Close(None), origin) {
        return;
    }
    for request in [Request::ParseAsIs, Request::Bind, request, Request::Close(None), Request::Close(None)] {
        let _ = replies.track(request, origin);
    }
    close_statement(ONCE, out);
    parse(ONCE, sql, out);
    bind_portal(ONCE, ONCE, parameters, out);
    append(out, b'E', |out| {
        append_cstr(out, ONCE);
        out.extend_from_slice(&[0; 4]);
    });
    append(out, b'C', |out| {
        out.push(b'P');
        append_cstr(out, ONCE);
    });
    close_statement(ONCE, out);
}
