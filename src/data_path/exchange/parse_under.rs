//! Parses a text under the settings of another moment: they are put in place in front of the Parse, and what was there
//! before is put back behind it, all in the same write (`ENTER`, `LEAVE`). Pure.

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
        },
    },
    wire::message::{append, append_cstr, array_literal, bind_portal, close_statement, parse},
};

/// Where a text is to be parsed: a session's settings on its server at this moment.
#[derive(Debug, Clone, Copy)]
pub struct ParseContext<'a> {
    /// `None`: something may have changed them that has not been asked about.
    pub under: Option<&'a Arc<ParseSettings>>,
    /// What the session began with, which its servers may no longer begin with: it holds for what was parsed before that, too.
    pub startup: &'a Settings,
    /// What the server had when the transaction began.
    pub applied: &'a Settings,
    /// What may have changed since.
    pub checks: &'a PendingChecks,
}

impl<'a> ParseContext<'a> {
    /// `under` are the session's as they were when the transaction began.
    #[inline]
    pub fn new(
        under: &'a Arc<ParseSettings>,
        startup: &'a Settings,
        applied: &'a Settings,
        checks: &'a PendingChecks,
        replies: &ReplyTracker,
    ) -> Self {
        Self { under: Self::under(under, checks, replies), startup, applied, checks }
    }

    /// `under`, unless something may have changed that has not been asked about.
    #[inline]
    pub fn under<'s>(
        under: &'s Arc<ParseSettings>,
        checks: &PendingChecks,
        replies: &ReplyTracker,
    ) -> Option<&'s Arc<ParseSettings>> {
        let known = !checks.changes_parsing() && !replies.pins().contains(Pins::SETTINGS);
        known.then_some(under)
    }

    /// Whether a text that was parsed under those is the same statement here.
    #[inline]
    pub fn is(&self, those: &Arc<ParseSettings>) -> bool {
        self.under.is_some_and(|under| Arc::ptr_eq(under, those))
    }

    /// What must be put in place to parse as under `those`; `None` where nothing need be, or can be, or nobody knows.
    fn differs(&self, those: &Arc<ParseSettings>, replies: &ReplyTracker) -> Option<Settings> {
        let can = replies.status() != b'E' && !replies.takes_copy_data() && !replies.is_skipping();
        if self.is(those) || !can {
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

    /// Parameters that PostgreSQL does not list and that may be set.
    fn unlisted(&self) -> impl Iterator<Item = &str> {
        let applied = self.applied.iter().map(|(name, _)| name);
        ["role"].into_iter().chain(applied.chain(self.checks.named()).filter(|name| name.contains('.')))
    }

    /// Runs `parses`, which sends what is to be parsed, as under `those` settings if they `matter` to it; its own result.
    pub fn parse_under(
        &self,
        those: &Arc<ParseSettings>,
        matter: bool,
        origin: Origin,
        replies: &mut ReplyTracker,
        out: &mut Vec<u8>,
        parses: impl FnOnce(&mut ReplyTracker, &mut Vec<u8>) -> bool,
    ) -> bool {
        let Some(settings) = self.differs(those, replies).filter(|_| matter) else {
            return parses(replies, out);
        };
        let set = || settings.iter().filter(|(name, _)| *name != "session_authorization");
        let names = array_literal(set().map(|(name, _)| name));
        let values = array_literal(set().map(|(_, value)| value));
        let others = array_literal(self.unlisted().filter(|name| settings.get(name).is_none()));
        let listed = array_literal(HARMLESS.into_iter().chain(NOT_RESTORABLE));
        once(ENTER, &[&names, &values, &others, &listed], Request::Execute(None), origin, replies, out);
        let goes = parses(replies, out);
        once(LEAVE, &[], Request::Execute(None), origin, replies, out);
        goes
    }

    /// Those under which a text is parsed that goes to the server next, where that must be asked: in front of it.
    pub fn ask(&self, origin: Origin, replies: &mut ReplyTracker, out: &mut Vec<u8>) -> Arc<ParseSettings> {
        let those = ParseSettings::unknown();
        if replies.status() != b'E' {
            let unlisted = array_literal(self.unlisted());
            once(TELL, &[&unlisted], Request::AskSettings(those.clone()), origin, replies, out);
        }
        those
    }
}

/// The settings now, and the value of each.
const TELL: &[u8] =
    b"SELECT pg_catalog.lower(name), pg_catalog.current_setting(name) FROM pg_catalog.pg_settings \
      WHERE source = 'session' \
      UNION ALL SELECT n, pg_catalog.current_setting(n, true) FROM pg_catalog.unnest($1::text[]) AS n \
      WHERE pg_catalog.current_setting(n, true) <> ''";

/// Sets $1 to $2 and all else that is set, $3 of it unlisted and but for $4, to what it is in a new session; until LEAVE, or the
/// end of the transaction. What there was before is kept in a parameter. A role may set less than the login: it comes last.
const ENTER: &[u8] = b"WITH target (name, value) AS MATERIALIZED ( \
        SELECT n, v FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS given (n, v) \
        UNION ALL SELECT pg_catalog.lower(name), reset_val FROM pg_catalog.pg_settings \
          WHERE source = 'session' AND pg_catalog.lower(name) <> ALL ($1::text[] || $4::text[]) \
        UNION ALL SELECT n, CASE n WHEN 'role' THEN 'none' ELSE '' END FROM pg_catalog.unnest($3::text[]) AS n \
          WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) = n) \
      ), changed AS MATERIALIZED ( \
        SELECT name, value, coalesce(pg_catalog.current_setting(name, true), '') AS before FROM target \
          WHERE coalesce(pg_catalog.current_setting(name, true), '') IS DISTINCT FROM value \
          AND (name <> 'role' OR value = 'none' OR EXISTS (SELECT FROM pg_catalog.pg_roles \
            WHERE rolname = value AND pg_catalog.pg_has_role(session_user, oid, 'MEMBER'))) \
      ), kept AS MATERIALIZED ( \
        SELECT pg_catalog.set_config('pglobby.kept', \
          coalesce(pg_catalog.json_object_agg(name, before)::text, '{}'), true) FROM changed \
      ) SELECT CASE WHEN name IS NOT NULL THEN pg_catalog.set_config(name, value, true) END \
        FROM (SELECT name, value FROM kept LEFT JOIN changed ON true ORDER BY name = 'role') AS ordered";

/// Puts back what ENTER has kept.
const LEAVE: &[u8] = b"SELECT pg_catalog.set_config(key, value, true) FROM ( \
        SELECT key, value FROM pg_catalog.json_each_text(pg_catalog.current_setting('pglobby.kept')::json) \
        ORDER BY key = 'role') AS ordered";

/// What servers call the statement and the portal of such a text. It is not kept: what is in front of it may fail, and nobody
/// knows then whether it is there.
const ONCE: &[u8] = b"pglobby_once";

/// Runs a text of ours once, in the middle of whatever the client has begun: its own unnamed statement and portal stay.
pub fn once(
    sql: &[u8],
    parameters: &[&str],
    asked: Request,
    origin: Origin,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) {
    if !replies.track(Request::Close(None), origin) {
        return;
    }
    for asked in [Request::ParseAsIs, Request::Bind, asked, Request::Close(None), Request::Close(None)] {
        let _ = replies.track(asked, origin);
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
