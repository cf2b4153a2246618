//! RESET: parameters that return to the value they had at session start. Pure.
//!
//! In PostgreSQL that is the value from the startup packet. A pooled server was started without the client's
//! startup packet, so RESET returns to PostgreSQL's own default there. The proxy then sets the client's
//! startup value before its next request (`exchange/restore_startup.rs`).

use super::{Settings, parameters::NOT_RESTORABLE};
use crate::data_path::sql::{Argument, Discard, Effects, Kind, SetValue, Statement};

/// The parameters that a text resets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resets {
    /// Names of parameters; `true` if reset for the transaction only.
    named: Vec<(Box<str>, bool)>,
    /// RESET ALL: all parameters except the role.
    all: bool,
    /// DISCARD ALL: the role too.
    role: bool,
    /// A DO block that may reset any parameter.
    code: bool,
    /// The role is set, after any reset of it. PostgreSQL does not tell `SET ROLE NONE` from `RESET ROLE`.
    sets_role: bool,
}

/// A startup parameter that a text has reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reset {
    /// Name in lower case.
    pub name: Box<str>,
    /// Restore it for the current transaction only (SET LOCAL).
    pub local: bool,
}

impl Resets {
    /// Adds the parameters that a statement resets.
    pub fn add_statement(&mut self, statement: &Statement<'_>) {
        let mut add = |name: &[u8], local: bool| {
            self.sets_role &= local || name != b"role";
            self.named.push((String::from_utf8_lossy(name).into(), local));
        };
        match &statement.kind {
            Kind::ResetAll => self.all = true,
            Kind::Discard(Discard::All) => (self.all, self.role, self.sets_role) = (true, true, false),
            Kind::Do => self.code |= statement.code_block().is_some_and(|code| mentions_reset(&code)),
            Kind::Reset(name) if **name == *b"session_authorization" => add(b"role", false),
            Kind::Reset(name) => add(name, false),
            Kind::Set { local, name, value: SetValue::Default } => add(name, *local),
            Kind::SetRole { local, role: SetValue::Default }
            | Kind::SetSessionAuthorization { local, role: SetValue::Default } => add(b"role", *local),
            Kind::SetRole { local: false, .. } => self.set_role(),
            _ if statement.effects.contains(Effects::SET_CONFIG) => {
                for call in statement.set_configs() {
                    match &call.name {
                        Argument::Text(name) if call.value == Argument::Null => {
                            self.sets_role &= **name != *b"role";
                            let local = call.local != Argument::Boolean(false);
                            self.named.push((String::from_utf8_lossy(name).into(), local));
                        }
                        Argument::Text(name)
                            if **name == *b"role" && call.local == Argument::Boolean(false) =>
                        {
                            self.set_role();
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    fn set_role(&mut self) {
        self.named.retain(|(name, _)| **name != *"role");
        (self.role, self.sets_role) = (false, true);
    }

    /// Returns whether a text sets the role for longer than its transaction, and does not reset it later.
    pub fn sets_role(&self) -> bool {
        self.sets_role
    }

    /// Returns whether a text resets the role for longer than its transaction, and does not set it later.
    pub fn is_role_reset(&self) -> bool {
        self.role || self.named.iter().any(|(named, local)| !local && **named == *"role")
    }

    /// Adds the resets of another text that outlast its transaction.
    #[cold]
    pub fn add_lasting(&mut self, other: &Self) {
        if other.sets_role {
            self.set_role();
        } else if other.is_role_reset() {
            self.sets_role = false;
        }
        self.role |= other.role;
        self.all |= other.all || self.named.len() + other.named.len() > NAMES_MAX;
        for named in other.named.iter().filter(|(_, local)| !local) {
            if !self.named.contains(named) {
                self.named.push(named.clone());
            }
        }
        self.named.truncate(NAMES_MAX);
    }

    /// Returns whether a text resets this parameter beyond its transaction.
    pub fn is_reset(&self, name: &str) -> bool {
        self.all || self.named.iter().any(|(named, local)| !local && **named == *name)
    }

    /// Returns the startup parameters that are reset.
    fn startup_parameters(&self, startup: &Settings) -> Vec<Reset> {
        let of = |name: &str| {
            let named = || self.named.iter().filter(|(named, _)| **named == *name);
            let all = if name == "role" { self.role } else { self.all };
            let code = self.code && may_be_reset_by_code(name);
            let local = !all && !code && named().all(|(_, local)| *local);
            (all || code || named().next().is_some()).then(|| Reset { name: name.into(), local })
        };
        startup
            .iter()
            .map(|(name, _)| name)
            .filter(|name| !NOT_RESTORABLE.contains(name))
            .filter_map(of)
            .collect()
    }
}

/// Conservative: searches string literals and comments too, because a block may execute its text.
fn mentions_reset(code: &[u8]) -> bool {
    let is_reset = |word: &[u8]| word.eq_ignore_ascii_case(b"reset") || word.eq_ignore_ascii_case(b"default");
    code.split(|byte| !byte.is_ascii_alphabetic()).any(is_reset)
}

/// PostgreSQL does not list a reset custom parameter (`a.b`), so its reset by code cannot be detected.
fn may_be_reset_by_code(name: &str) -> bool {
    name != "role" && !name.contains('.')
}

/// Limit of the names kept for the transactions of one lease; beyond it, all parameters count as reset.
const NAMES_MAX: usize = 1000;

/// Startup parameters to restore during a lease.
#[derive(Debug, Default)]
pub struct PendingRestore {
    /// Restored before the next request.
    due: Vec<Reset>,
    /// Restored within a batch of the client, which may still fail and roll back the restore but not the reset
    /// (which ran before the batch). Therefore repeated behind the batch.
    repeated: Vec<Reset>,
    /// Restored in a batch of the proxy, perhaps within a transaction of the client. Repeated behind its end.
    in_transaction: Vec<Reset>,
    /// Resets of bound portals that have not run yet.
    bound: Vec<(Box<[u8]>, Vec<Reset>)>,
    /// The portal before which nothing is restored.
    pub skip_portal: Option<Box<[u8]>>,
}

/// Where a restore runs, which decides what can still roll it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestorePlace {
    /// Within a batch of the client.
    ClientBatch,
    /// In a batch of the proxy, perhaps within a transaction of the client.
    OwnBatch,
    /// In a batch of the proxy that is a transaction of its own.
    Transaction,
}

/// Limit of bound portals with resets; beyond it, a reset counts as run at Bind.
const PORTALS_MAX: usize = 64;

impl PendingRestore {
    /// Records the resets of a text that runs now (`portal` is `None`) or at the next Execute of `portal`.
    pub fn record(&mut self, resets: &Resets, startup: &Settings, portal: Option<&[u8]>) {
        let taken = resets.startup_parameters(startup);
        if resets.sets_role() {
            for resets in [&mut self.due, &mut self.repeated, &mut self.in_transaction] {
                resets.retain(|reset| *reset.name != *"role");
            }
        }
        match portal {
            _ if taken.is_empty() => {}
            Some(portal) if self.bound.len() < PORTALS_MAX => self.bound.push((portal.into(), taken)),
            _ => merge(&mut self.due, taken),
        }
    }

    /// Forgets the resets of a portal that is bound again.
    pub fn portal_bound(&mut self, portal: &[u8]) {
        self.bound.retain(|(bound, _)| **bound != *portal);
        self.skip_portal.take_if(|skipped| **skipped == *portal);
    }

    /// Marks the resets of a portal as run.
    pub fn portal_runs(&mut self, portal: &[u8]) {
        while let Some(at) = self.bound.iter().position(|(bound, _)| **bound == *portal) {
            let (_, taken) = self.bound.swap_remove(at);
            merge(&mut self.due, taken);
        }
    }

    /// Returns what to restore now, at this place.
    pub fn take_due(&mut self, place: RestorePlace) -> Vec<Reset> {
        let mut due = std::mem::take(&mut self.due);
        if place == RestorePlace::ClientBatch {
            merge(&mut self.repeated, due.clone());
            return due;
        }
        merge(&mut due, std::mem::take(&mut self.repeated));
        match place {
            RestorePlace::Transaction => merge(&mut due, std::mem::take(&mut self.in_transaction)),
            _ => merge(&mut self.in_transaction, due.clone()),
        }
        due
    }

    /// Schedules a second restore, because the end of a transaction may have rolled back the first.
    pub fn repeat_restore(&mut self) {
        merge(&mut self.due, std::mem::take(&mut self.repeated));
        merge(&mut self.due, std::mem::take(&mut self.in_transaction));
    }

    /// Returns whether nothing needs to be restored.
    pub fn is_empty(&self) -> bool {
        [&self.due, &self.repeated, &self.in_transaction].iter().all(|resets| resets.is_empty())
            && self.bound.is_empty()
    }
}

/// A reset beyond the transaction takes precedence over one for the transaction only.
fn merge(all: &mut Vec<Reset>, more: Vec<Reset>) {
    for reset in more {
        match all.iter_mut().find(|other| other.name == reset.name) {
            Some(other) => other.local &= reset.local,
            None => all.push(reset),
        }
    }
}

/// Returns whether no restore may precede this text: it ends a transaction or a part of it, or must be the
/// first statement of a transaction (`SET TRANSACTION`). Every other SET needs the restore first: PostgreSQL
/// merges RESET and SET LOCAL of one parameter within a transaction.
pub fn forbids_restore(text: &[u8]) -> bool {
    const ENDS: [&[u8]; 4] = [b"commit", b"end", b"rollback", b"abort"];
    let text = text.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text);
    let mut words = text.split(|byte| !byte.is_ascii_alphabetic()).filter(|word| !word.is_empty());
    let mut word = || words.next().unwrap_or_default();
    let is = |word: &[u8], keyword: &[u8]| word.eq_ignore_ascii_case(keyword);
    let first = word();
    let begins = text.get(..first.len()) == Some(first);
    let sets = is(first, b"set") && {
        let second = word();
        let scoped = is(second, b"local") || is(second, b"session");
        is(if scoped { word() } else { second }, b"transaction")
    };
    begins && !text.contains(&b';') && (sets || ENDS.iter().any(|end| is(first, end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_path::{session_state::side_effects::SideEffects, sql::Lexing};

    fn startup() -> Settings {
        let values = [("datestyle", "SQL"), ("role", "one"), ("my.note", "a"), ("search_path", "s")];
        Settings::new(values.map(|(name, value)| (name.to_owned(), value.to_owned())))
    }

    /// The restored names, joined; `~` marks a restore for the transaction only.
    fn behind(sql: &str) -> String {
        let mut pending = PendingRestore::default();
        let read = SideEffects::read(sql.as_bytes(), Lexing::default());
        if let Some(resets) = read.resets {
            pending.record(&resets, &startup(), None);
        }
        let due = pending.take_due(RestorePlace::Transaction).into_iter();
        let shown = due.map(|reset| format!("{}{}", if reset.local { "~" } else { "" }, reset.name));
        shown.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn resets_of_startup_parameters_are_found() {
        for (sql, taken) in [
            ("SELECT 1", ""),
            ("SET datestyle = German", ""),
            ("RESET DateStyle", "datestyle"),
            ("SET DateStyle TO DEFAULT", "datestyle"),
            ("SET LOCAL DateStyle TO DEFAULT", "~datestyle"),
            ("SET LOCAL DateStyle TO DEFAULT; RESET datestyle", "datestyle"),
            ("RESET work_mem", ""),
            ("SET SCHEMA 'x'; RESET my.note", "my.note"),
            ("RESET ALL", "datestyle my.note search_path"),
            ("SET LOCAL search_path = DEFAULT; RESET ALL", "datestyle my.note search_path"),
            ("DISCARD ALL", "datestyle my.note role search_path"),
            ("DISCARD TEMP", ""),
            ("RESET ROLE", "role"),
            ("RESET SESSION AUTHORIZATION", "role"),
            ("RESET ROLE; SET ROLE NONE", ""),
            ("SET ROLE NONE; RESET ROLE", "role"),
            ("SET LOCAL ROLE DEFAULT", "~role"),
            ("SELECT set_config('DateStyle', NULL, false)", "datestyle"),
            ("SELECT set_config('search_path', NULL, $1), set_config('my.note', '', true)", "~search_path"),
        ] {
            assert_eq!(behind(sql), taken, "{sql}");
        }
    }

    #[test]
    fn a_portal_resets_when_it_runs() {
        let mut pending = PendingRestore::default();
        let all = Resets { all: true, ..Resets::default() };
        pending.record(&all, &startup(), Some(b"one"));
        pending.record(&all, &startup(), Some(b"two"));
        pending.portal_runs(b"three");
        pending.portal_bound(b"two");
        pending.portal_runs(b"two");
        assert!(pending.take_due(RestorePlace::ClientBatch).is_empty() && !pending.is_empty());
        pending.portal_runs(b"one");
        assert_eq!(pending.take_due(RestorePlace::ClientBatch).len(), 3);
        assert!(pending.take_due(RestorePlace::ClientBatch).is_empty(), "once in a batch");
        assert_eq!(pending.take_due(RestorePlace::Transaction).len(), 3, "once more behind it");
        assert!(pending.is_empty());
    }

    #[test]
    fn no_restore_precedes_a_text_that_must_come_first() {
        let first = ["SET TRANSACTION READ ONLY", "set local transaction_isolation = serializable"];
        for sql in first.into_iter().chain([" commit;", "END", "ROLLBACK TO a"]) {
            assert!(forbids_restore(sql.as_bytes()), "{sql}");
        }
        for sql in
            ["SELECT 1", "SET TRANSACTION READ ONLY; SELECT 1", "BEGIN", "SAVEPOINT a", "SET a = 1", "-end"]
        {
            assert!(!forbids_restore(sql.as_bytes()), "{sql}");
        }
    }
}
