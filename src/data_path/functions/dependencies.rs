//! From functions that leave something behind to everything whose use calls them. Pure.
//!
//! ```text
//! next_job() takes a lock ◀── run() mentions it ◀── trigger calls run() ◀── table jobs has the trigger, on writes
//!                         ◀── view todo calls it                        ◀── function fill() inserts into jobs
//! ```

use std::collections::{HashMap, VecDeque};

use super::effects_by_name::{Known, Level, Traces, is_write, key};
use crate::data_path::{memory_limit::PIECE_BYTES, sql::words};

/// A catalogue, by its object number, and an object in it.
pub type Node = (u32, u32);

pub const FUNCTIONS: u32 = 1255;
pub const RELATIONS: u32 = 1259;
pub const OPERATORS: u32 = 2617;
pub const CASTS: u32 = 2605;
pub const OPERATOR_CLASSES: u32 = 2616;
pub const SUPPORT_FUNCTIONS: u32 = 2603;
pub const EVENT_TRIGGERS: u32 = 3466;

/// Stands for all tables and views together, where nobody knows which is used. No object has this number.
const SOME_RELATION: Node = (RELATIONS, 0);

/// Whoever uses `used` uses `user`.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    pub used: Node,
    pub user: Node,
    /// Only a text that writes to `user` uses `used`.
    pub on_write: bool,
}

/// Objects, what uses what, and where it all begins.
#[derive(Debug, Default)]
pub struct Closure {
    levels: HashMap<Node, Level>,
    names: HashMap<Node, Vec<u8>>,
    uses: HashMap<Node, Vec<(Node, bool)>>,
    /// Functions by the words in their bodies.
    mentions: HashMap<Box<[u8]>, Vec<Node>>,
    /// Functions whose bodies write to tables.
    writers: std::collections::HashSet<Node>,
    /// What all of it takes.
    bytes: usize,
}

/// What an entry of a map takes beside what is in it.
const ENTRY_BYTES: usize = 4 * PIECE_BYTES;

impl Closure {
    /// An object may leave something behind by itself.
    pub fn root(&mut self, node: Node, traces: &Traces) {
        self.bytes += ENTRY_BYTES + size_of::<Level>() + traces.bytes();
        self.levels.entry(node).or_default().always.merge(traces);
    }

    /// Whether nothing leaves anything behind.
    pub fn is_empty(&self) -> bool {
        self.levels.is_empty()
    }

    /// What an object is called.
    pub fn name(&mut self, node: Node, name: Vec<u8>) {
        self.bytes += ENTRY_BYTES + name.len();
        self.names.insert(node, name);
    }

    /// A function's body.
    pub fn body(&mut self, node: Node, body: &[u8]) {
        for word in words(body) {
            let word = word.to_ascii_lowercase();
            if is_write(&word) {
                self.writers.insert(node);
            }
            let length = word.len();
            let functions = self.mentions.entry(word.into()).or_default();
            if functions.is_empty() {
                self.bytes += ENTRY_BYTES + length;
            }
            if functions.last() != Some(&node) {
                functions.push(node);
                self.bytes += size_of::<Node>();
            }
        }
    }

    /// A function uses tables and views whose names nobody knows.
    pub fn uses_any_relation(&mut self, node: Node) {
        self.uses(Use { used: SOME_RELATION, user: node, on_write: false });
    }

    /// One object is used by another.
    pub fn uses(&mut self, link: Use) {
        self.bytes += ENTRY_BYTES;
        self.uses.entry(link.used).or_default().push((link.user, link.on_write));
    }

    /// What all of it takes so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Follows it all to its end; `None` where that would take more than `bytes_max`, as it may with what is put together by
    /// thousands of functions that call each other.
    pub fn close(mut self, bytes_max: usize) -> Option<Known> {
        let (uses, mentions) = (std::mem::take(&mut self.uses), std::mem::take(&mut self.mentions));
        let mut changed: VecDeque<Node> = self.levels.keys().copied().collect();
        while let Some(node) = changed.pop_front() {
            if self.bytes > bytes_max {
                return None;
            }
            let Some(level) = self.levels.get(&node).cloned() else { continue };
            if node.0 == RELATIONS && node != SOME_RELATION && self.merge(SOME_RELATION, &level) {
                changed.push_back(SOME_RELATION);
            }
            let mut whole = level.always.clone();
            whole.merge(&level.on_write);
            for &(user, on_write) in uses.get(&node).into_iter().flatten() {
                let passed = match on_write {
                    true => Level { always: Traces::default(), on_write: whole.clone() },
                    // A function does with its own what it does, whether its caller writes or not.
                    false if user.0 == FUNCTIONS => {
                        Level { always: whole.clone(), on_write: Traces::default() }
                    }
                    false => level.clone(),
                };
                if self.merge(user, &passed) {
                    changed.push_back(user);
                }
            }
            let word = self.names.get(&node).and_then(|name| key(name));
            for &user in word.and_then(|word| mentions.get(&word)).into_iter().flatten() {
                let traces = if self.writers.contains(&user) { &whole } else { &level.always };
                if self.merge(user, &Level { always: traces.clone(), on_write: Traces::default() }) {
                    changed.push_back(user);
                }
            }
        }
        Some(self.known())
    }

    /// Adds to what using an object leaves behind; whether that made a difference.
    fn merge(&mut self, node: Node, level: &Level) -> bool {
        let known = self.levels.entry(node).or_default();
        let before = known.bytes();
        let changed = known.merge(level);
        self.bytes += known.bytes() - before;
        changed
    }

    fn known(self) -> Known {
        let (mut any, mut ddl) = (Traces::default(), Traces::default());
        let mut named = Vec::new();
        for (node, level) in self.levels {
            match node.0 {
                OPERATORS | CASTS | OPERATOR_CLASSES | SUPPORT_FUNCTIONS => {
                    any.merge(&level.always);
                    any.merge(&level.on_write);
                }
                EVENT_TRIGGERS => drop(ddl.merge(&level.always)),
                _ => {
                    if let Some(name) = self.names.get(&node) {
                        named.push((name.clone(), level));
                    }
                }
            }
        }
        Known::new(named, any, ddl)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_path::session_state::state_query::Doubts;

    const TRIGGER: u32 = 2620;

    #[test]
    fn a_lock_in_a_function_is_found_behind_triggers_tables_and_callers() {
        let mut closure = Closure::default();
        for (oid, name, body) in [
            (1, "take_lock", "perform pg_advisory_lock(1)"),
            (2, "on_insert", "begin perform take_lock(); return new; end"),
            (3, "fill", "begin insert into jobs values (1); end"),
            (4, "count_jobs", "select count(*) from jobs"),
            (5, "anywhere", "begin execute format('insert into %I values (1)', $1); end"),
        ] {
            closure.name((FUNCTIONS, oid), name.into());
            closure.body((FUNCTIONS, oid), body.as_bytes());
        }
        closure.uses_any_relation((FUNCTIONS, 5));
        closure.name((RELATIONS, 10), b"jobs".to_vec());
        closure.uses(Use { used: (FUNCTIONS, 2), user: (TRIGGER, 20), on_write: false });
        closure.uses(Use { used: (TRIGGER, 20), user: (RELATIONS, 10), on_write: true });
        closure.root((FUNCTIONS, 1), &Traces { doubts: Doubts::LOCKS, ..Traces::default() });
        let known = closure.close(usize::MAX).unwrap();
        for sql in
            ["SELECT take_lock()", "SELECT on_insert()", "INSERT INTO jobs VALUES (1)", "SELECT fill()"]
        {
            assert!(known.look(sql.as_bytes(), false).is_some(), "{sql}");
        }
        assert!(known.look(b"SELECT anywhere()", false).is_some());
        for sql in ["SELECT count_jobs()", "SELECT * FROM jobs", "INSERT INTO other VALUES (1)"] {
            assert!(known.look(sql.as_bytes(), false).is_none(), "{sql}");
        }
    }

    /// A thousand functions that call each other, each with a hundred names of its own, came to gigabytes.
    #[test]
    fn what_functions_hand_on_to_each_other_has_a_limit() {
        let mut closure = Closure::default();
        for oid in 0..1000 {
            let names = (0..100).map(|at| format!("my{oid}.name{at}").into()).collect();
            closure
                .root((FUNCTIONS, oid), &Traces { doubts: Doubts::ANY_SETTING, names, ..Traces::default() });
            closure.uses(Use { used: (FUNCTIONS, oid), user: (FUNCTIONS, oid + 1), on_write: false });
        }
        assert!(closure.bytes() > 100 * 1000 * 16);
        assert!(closure.close(16 << 20).is_none());
    }
}
