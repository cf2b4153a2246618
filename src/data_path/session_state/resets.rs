//! What takes parameters back to what they were when the session began: `RESET`. Pure.
//!
//! To PostgreSQL that is what the startup packet asked for. A server of ours was started without it: there `RESET` leads to
//! PostgreSQL's own default, and what the session asked for is set again in front of its next request
//! (`exchange/restore_startup.rs`).

use super::{Settings, parameters::UNASKABLE};
use crate::data_path::sql::{Argument, Discard, Effects, Kind, SetValue, Statement};

/// Which parameters a text takes back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resets {
    /// By their names, and whether for the transaction only.
    named: Vec<(Box<str>, bool)>,
    /// All but the role: RESET ALL.
    all: bool,
    /// The role as well: DISCARD ALL.
    role: bool,
    /// A code block may take back any that PostgreSQL lists.
    code: bool,
}

/// A parameter of the startup packet that has been taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reset {
    /// In lower case.
    pub name: Box<str>,
    /// It is set again for the transaction only.
    pub local: bool,
}

impl Resets {
    /// With what this statement takes back.
    pub fn take(&mut self, statement: &Statement<'_>) {
        let mut add = |name: &[u8], local| self.named.push((String::from_utf8_lossy(name).into(), local));
        match &statement.kind {
            Kind::ResetAll => self.all = true,
            Kind::Discard(Discard::All) => (self.all, self.role) = (true, true),
            Kind::Do => self.code |= statement.code_block().is_some_and(|code| mentions_reset(&code)),
            Kind::Reset(name) if **name == *b"session_authorization" => add(b"role", false),
            Kind::Reset(name) => add(name, false),
            Kind::Set { local, name, value: SetValue::Default } => add(name, *local),
            Kind::SetRole { local, role: SetValue::Default }
            | Kind::SetSessionAuthorization { local, role: SetValue::Default } => add(b"role", *local),
            _ if statement.effects.contains(Effects::SET_CONFIG) => {
                for call in statement.set_configs().filter(|call| call.value == Argument::Null) {
                    if let Argument::Text(name) = &call.name {
                        add(name, call.local != Argument::Boolean(false));
                    }
                }
            }
            _ => {}
        }
    }

    /// Itself, unless it takes nothing back.
    pub fn unless_none(self) -> Option<Box<Self>> {
        (self != Self::default()).then(|| Box::new(self))
    }

    /// With those that another text takes back for good.
    #[cold]
    pub fn add(&mut self, other: &Self) {
        self.all |= other.all || self.named.len() + other.named.len() > NAMES_MAX;
        for named in other.named.iter().filter(|(_, local)| !local) {
            if !self.named.contains(named) {
                self.named.push(named.clone());
            }
        }
        self.named.truncate(NAMES_MAX);
    }

    /// Whether this parameter is taken back for good.
    pub fn takes_back(&self, name: &str) -> bool {
        self.all || self.named.iter().any(|(named, local)| !local && **named == *name)
    }

    /// Those of them that were given at `startup`.
    fn concerned(&self, startup: &Settings) -> Vec<Reset> {
        let of = |name: &str| {
            let named = || self.named.iter().filter(|(named, _)| **named == *name);
            let all = if name == "role" { self.role } else { self.all };
            let code = self.code && may_be_reset_by_code(name);
            let local = !all && !code && named().all(|(_, local)| *local);
            (all || code || named().next().is_some()).then(|| Reset { name: name.into(), local })
        };
        startup.iter().map(|(name, _)| name).filter(|name| !UNASKABLE.contains(name)).filter_map(of).collect()
    }
}

/// Whether code may take something back: it says so, also in a text that it runs.
fn mentions_reset(code: &[u8]) -> bool {
    let is_reset = |word: &[u8]| word.eq_ignore_ascii_case(b"reset") || word.eq_ignore_ascii_case(b"default");
    code.split(|byte| !byte.is_ascii_alphabetic()).any(is_reset)
}

/// Of a parameter that PostgreSQL does not list nobody could tell whether code has reset it.
fn may_be_reset_by_code(name: &str) -> bool {
    name != "role" && !name.contains('.')
}

/// So many names are told apart of what the transactions of a lease take back.
const NAMES_MAX: usize = 1000;

/// What is to be set again, in the transactions of a lease.
#[derive(Debug, Default)]
pub struct Pending {
    /// In front of the next request.
    due: Vec<Reset>,
    /// Has been set again in a batch that may yet fail, when what came before it has succeeded: once more, behind it.
    again: Vec<Reset>,
    /// By portals that have yet to run.
    bound: Vec<(Box<[u8]>, Vec<Reset>)>,
    /// This portal needs none of it.
    pub passes: Option<Box<[u8]>>,
}

/// So many portals that take something back are told apart.
const PORTALS_MAX: usize = 64;

impl Pending {
    /// A text with these `resets` runs, in a simple query or behind this portal's next Execute.
    pub fn note(&mut self, resets: &Resets, startup: &Settings, portal: Option<&[u8]>) {
        let taken = resets.concerned(startup);
        match portal {
            _ if taken.is_empty() => {}
            Some(portal) if self.bound.len() < PORTALS_MAX => self.bound.push((portal.into(), taken)),
            _ => merge(&mut self.due, taken),
        }
    }

    /// A portal is another from now on.
    pub fn rebinds(&mut self, portal: &[u8]) {
        self.bound.retain(|(bound, _)| **bound != *portal);
        self.passes.take_if(|passes| **passes == *portal);
    }

    /// A portal runs.
    pub fn runs(&mut self, portal: &[u8]) {
        while let Some(at) = self.bound.iter().position(|(bound, _)| **bound == *portal) {
            let (_, taken) = self.bound.swap_remove(at);
            merge(&mut self.due, taken);
        }
    }

    /// What is set again now: in a batch of its own (`apart`), or within the client's.
    pub fn take_due(&mut self, apart: bool) -> Vec<Reset> {
        let mut due = std::mem::take(&mut self.due);
        match apart {
            true => merge(&mut due, std::mem::take(&mut self.again)),
            false => merge(&mut self.again, due.clone()),
        }
        due
    }

    /// What has been set again in this batch may be undone, and what it is for may not.
    pub fn is_due_again(&mut self) {
        merge(&mut self.due, std::mem::take(&mut self.again));
    }

    /// Nothing is to be set again.
    pub fn is_empty(&self) -> bool {
        self.due.is_empty() && self.again.is_empty() && self.bound.is_empty()
    }
}

/// What is taken back for good is, whatever is for the transaction only.
fn merge(all: &mut Vec<Reset>, more: Vec<Reset>) {
    for reset in more {
        match all.iter_mut().find(|known| known.name == reset.name) {
            Some(known) => known.local &= reset.local,
            None => all.push(reset),
        }
    }
}

/// A text in front of which nothing is set again: it ends the transaction, or part of it, or must come before all else in it
/// (`SET TRANSACTION`). Any other SET needs it: what RESET and SET LOCAL do to one parameter in one transaction is, to PostgreSQL, set.
pub fn needs_none(text: &[u8]) -> bool {
    const ENDS: [&[u8]; 4] = [b"commit", b"end", b"rollback", b"abort"];
    let text = text.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text);
    let mut words = text.split(|byte| !byte.is_ascii_alphabetic()).filter(|word| !word.is_empty());
    let mut word = || words.next().unwrap_or_default();
    let is = |word: &[u8], known: &[u8]| word.eq_ignore_ascii_case(known);
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
    use crate::data_path::{session_state::side_effects::Aftermath, sql::Lexing};

    fn startup() -> Settings {
        let values = [("datestyle", "SQL"), ("role", "one"), ("my.note", "a"), ("search_path", "s")];
        Settings::new(values.map(|(name, value)| (name.to_owned(), value.to_owned())))
    }

    /// What is set again behind a text; with a `~` for the transaction only.
    fn behind(sql: &str) -> String {
        let mut pending = Pending::default();
        let read = Aftermath::read(sql.as_bytes(), Lexing::default());
        if let Some(resets) = read.resets {
            pending.note(&resets, &startup(), None);
        }
        let due = pending.take_due(true).into_iter();
        let shown = due.map(|reset| format!("{}{}", if reset.local { "~" } else { "" }, reset.name));
        shown.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_a_text_takes_back_of_what_was_given_at_startup() {
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
            ("SET LOCAL ROLE DEFAULT", "~role"),
            ("SELECT set_config('DateStyle', NULL, false)", "datestyle"),
            ("SELECT set_config('search_path', NULL, $1), set_config('my.note', '', true)", "~search_path"),
        ] {
            assert_eq!(behind(sql), taken, "{sql}");
        }
    }

    #[test]
    fn a_portal_takes_back_when_it_runs() {
        let mut pending = Pending::default();
        let all = Resets { all: true, ..Resets::default() };
        pending.note(&all, &startup(), Some(b"one"));
        pending.note(&all, &startup(), Some(b"two"));
        pending.runs(b"three");
        pending.rebinds(b"two");
        pending.runs(b"two");
        assert!(pending.take_due(false).is_empty() && !pending.is_empty());
        pending.runs(b"one");
        assert_eq!(pending.take_due(false).len(), 3);
        assert!(pending.take_due(false).is_empty(), "once in a batch");
        assert_eq!(pending.take_due(true).len(), 3, "once more behind it");
        assert!(pending.is_empty());
    }

    #[test]
    fn a_text_that_must_come_first_comes_first() {
        let first = ["SET TRANSACTION READ ONLY", "set local transaction_isolation = serializable"];
        for sql in first.into_iter().chain([" commit;", "END", "ROLLBACK TO a"]) {
            assert!(needs_none(sql.as_bytes()), "{sql}");
        }
        for sql in
            ["SELECT 1", "SET TRANSACTION READ ONLY; SELECT 1", "BEGIN", "SAVEPOINT a", "SET a = 1", "-end"]
        {
            assert!(!needs_none(sql.as_bytes()), "{sql}");
        }
    }
}
