//! Finds everything whose use calls a function with side effects. Pure.
//!
//! ```text
//! next_job() takes a lock ◀── run() mentions it ◀── trigger calls run() ◀── writes to table jobs
//!       ◀── view todo calls it      ◀── function fill() inserts into jobs
//! ```

use std::collections::{HashMap, VecDeque};

use super::effects_by_name::{CallEffects, EffectsByName, NamedEffects, is_write, search_word};
use crate::data_path::{memory_limit::PIECE_BYTES, sql::words};

/// The OID of a system catalog and of an object in it.
pub type Node = (u32, u32);

pub const FUNCTIONS: u32 = 1255;
pub const RELATIONS: u32 = 1259;
pub const OPERATORS: u32 = 2617;
pub const CASTS: u32 = 2605;
pub const OPERATOR_CLASSES: u32 = 2616;
pub const SUPPORT_FUNCTIONS: u32 = 2603;
pub const EVENT_TRIGGERS: u32 = 3466;

/// All tables and views: for functions that use a relation with an unknown name. No object has OID 0.
const SOME_RELATION: Node = (RELATIONS, 0);

/// Using `user` also uses `used`.
#[derive(Debug, Clone, Copy)]
pub struct Dependency {
    pub used: Node,
    pub user: Node,
    /// `used` is used only when a text writes to `user`.
    pub on_write: bool,
}

/// Objects, their dependencies and the functions with side effects.
#[derive(Debug, Default)]
pub struct DependencyGraph {
    effects: HashMap<Node, NamedEffects>,
    names: HashMap<Node, Vec<u8>>,
    uses: HashMap<Node, Vec<(Node, bool)>>,
    /// Functions by the words in their bodies.
    mentions: HashMap<Box<[u8]>, Vec<Node>>,
    /// Functions whose bodies write to tables.
    writers: std::collections::HashSet<Node>,
    /// Memory used in bytes.
    bytes: usize,
}

/// Overhead of a map entry in bytes.
const ENTRY_BYTES: usize = 4 * PIECE_BYTES;

impl DependencyGraph {
    /// Adds an object that has side effects itself.
    pub fn add_root(&mut self, node: Node, effects: &CallEffects) {
        self.bytes += ENTRY_BYTES + size_of::<NamedEffects>() + effects.bytes();
        self.effects.entry(node).or_default().always.merge(effects);
    }

    /// Returns whether no object has side effects.
    pub fn is_empty(&self) -> bool {
        self.effects.is_empty()
    }

    /// Sets the name of an object.
    pub fn name(&mut self, node: Node, name: Vec<u8>) {
        self.bytes += ENTRY_BYTES + name.len();
        self.names.insert(node, name);
    }

    /// Indexes the words of a function's body.
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

    /// Adds a function that uses tables or views with unknown names.
    pub fn uses_any_relation(&mut self, node: Node) {
        self.uses(Dependency { used: SOME_RELATION, user: node, on_write: false });
    }

    /// Adds a dependency.
    pub fn uses(&mut self, link: Dependency) {
        self.bytes += ENTRY_BYTES;
        self.uses.entry(link.used).or_default().push((link.user, link.on_write));
    }

    /// Returns the memory used in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Propagates the side effects along all dependencies. Returns `None` if that needs more than
    /// `bytes_max`, as it may with thousands of functions that call each other.
    pub fn propagate(mut self, bytes_max: usize) -> Option<EffectsByName> {
        let (uses, mentions) = (std::mem::take(&mut self.uses), std::mem::take(&mut self.mentions));
        let mut changed: VecDeque<Node> = self.effects.keys().copied().collect();
        while let Some(node) = changed.pop_front() {
            if self.bytes > bytes_max {
                return None;
            }
            let Some(effects) = self.effects.get(&node).cloned() else { continue };
            if node.0 == RELATIONS && node != SOME_RELATION && self.merge(SOME_RELATION, &effects) {
                changed.push_back(SOME_RELATION);
            }
            let mut whole = effects.always.clone();
            whole.merge(&effects.on_write);
            for &(user, on_write) in uses.get(&node).into_iter().flatten() {
                let passed = match on_write {
                    true => NamedEffects { always: CallEffects::default(), on_write: whole.clone() },
                    // A call of a function counts whether the calling text writes or not.
                    false if user.0 == FUNCTIONS => {
                        NamedEffects { always: whole.clone(), on_write: CallEffects::default() }
                    }
                    false => effects.clone(),
                };
                if self.merge(user, &passed) {
                    changed.push_back(user);
                }
            }
            let word = self.names.get(&node).and_then(|name| search_word(name));
            for &user in word.and_then(|word| mentions.get(&word)).into_iter().flatten() {
                let effects = if self.writers.contains(&user) { &whole } else { &effects.always };
                let passed = NamedEffects { always: effects.clone(), on_write: CallEffects::default() };
                if self.merge(user, &passed) {
                    changed.push_back(user);
                }
            }
        }
        Some(self.into_effects_by_name())
    }

    /// Adds the effects of using an object. Returns whether they changed.
    fn merge(&mut self, node: Node, effects: &NamedEffects) -> bool {
        let entry = self.effects.entry(node).or_default();
        let before = entry.bytes();
        let changed = entry.merge(effects);
        self.bytes += entry.bytes() - before;
        changed
    }

    fn into_effects_by_name(self) -> EffectsByName {
        let (mut any, mut ddl) = (CallEffects::default(), CallEffects::default());
        let mut named = Vec::new();
        for (node, effects) in self.effects {
            match node.0 {
                OPERATORS | CASTS | OPERATOR_CLASSES | SUPPORT_FUNCTIONS => {
                    any.merge(&effects.always);
                    any.merge(&effects.on_write);
                }
                EVENT_TRIGGERS => drop(ddl.merge(&effects.always)),
                _ => {
                    if let Some(name) = self.names.get(&node) {
                        named.push((name.clone(), effects));
                    }
                }
            }
        }
        EffectsByName::new(named, any, ddl)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_path::session_state::state_query::StateChecks;

    const TRIGGER: u32 = 2620;

    #[test]
    fn a_lock_in_a_function_is_found_through_triggers_tables_and_callers() {
        let mut graph = DependencyGraph::default();
        for (oid, name, body) in [
            (1, "take_lock", "perform pg_advisory_lock(1)"),
            (2, "on_insert", "begin perform take_lock(); return new; end"),
            (3, "fill", "begin insert into jobs values (1); end"),
            (4, "count_jobs", "select count(*) from jobs"),
            (5, "anywhere", "begin execute format('insert into %I values (1)', $1); end"),
        ] {
            graph.name((FUNCTIONS, oid), name.into());
            graph.body((FUNCTIONS, oid), body.as_bytes());
        }
        graph.uses_any_relation((FUNCTIONS, 5));
        graph.name((RELATIONS, 10), b"jobs".to_vec());
        graph.uses(Dependency { used: (FUNCTIONS, 2), user: (TRIGGER, 20), on_write: false });
        graph.uses(Dependency { used: (TRIGGER, 20), user: (RELATIONS, 10), on_write: true });
        graph.add_root((FUNCTIONS, 1), &CallEffects { checks: StateChecks::LOCKS, ..CallEffects::default() });
        let loaded = graph.propagate(usize::MAX).unwrap();
        for sql in
            ["SELECT take_lock()", "SELECT on_insert()", "INSERT INTO jobs VALUES (1)", "SELECT fill()"]
        {
            assert!(loaded.find(sql.as_bytes(), false).is_some(), "{sql}");
        }
        assert!(loaded.find(b"SELECT anywhere()", false).is_some());
        for sql in ["SELECT count_jobs()", "SELECT * FROM jobs", "INSERT INTO other VALUES (1)"] {
            assert!(loaded.find(sql.as_bytes(), false).is_none(), "{sql}");
        }
    }

    /// A thousand functions that call each other, each with a hundred parameter names, once used gigabytes.
    #[test]
    fn propagation_has_a_memory_limit() {
        let mut graph = DependencyGraph::default();
        for oid in 0..1000 {
            let names = (0..100).map(|at| format!("my{oid}.name{at}").into()).collect();
            graph.add_root(
                (FUNCTIONS, oid),
                &CallEffects { checks: StateChecks::ANY_SETTING, names, ..CallEffects::default() },
            );
            graph.uses(Dependency { used: (FUNCTIONS, oid), user: (FUNCTIONS, oid + 1), on_write: false });
        }
        assert!(graph.bytes() > 100 * 1000 * 16);
        assert!(graph.propagate(16 << 20).is_none());
    }
}
