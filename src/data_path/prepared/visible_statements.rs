//! What a session, or its code, sees of what its server has prepared: its own statements, by its own names, and nobody else's.
//! Pure.

use std::sync::Arc;

use super::{
    ClientStatements, Statement,
    parse_settings::Here,
    server_statements::{Certainty, ServerStatements},
};
use crate::{data_path::exchange::pending_replies::Lease, wire::outgoing::Outgoing};

impl ServerStatements {
    /// Whether some client's own names are among them.
    #[inline]
    pub fn has_own_names(&self) -> bool {
        self.own_names > 0
    }

    /// Those names, as a PostgreSQL array.
    pub fn own_names(&self) -> String {
        let known = self.known.values().map(|known| &known.statement);
        array(known.filter(|known| known.has_own_name()).map(|known| known.server_name()))
    }

    /// The names of all that it certainly has, and of `others`, as a PostgreSQL array.
    pub fn names(&self, others: impl Iterator<Item = &'static [u8]>) -> String {
        let certain = self.known.values().filter(|known| known.certainty == Certainty::Confirmed);
        array(certain.map(|known| known.statement.server_name()).chain(others.map(|name| -> &[u8] { name })))
    }

    /// Code has taken these away past us. Whether nothing is left.
    #[cold]
    pub fn lost(&mut self, names: &[&[u8]]) -> bool {
        let lost = self.known.values().map(|known| &known.statement);
        let lost: Vec<_> = lost.filter(|known| names.contains(&known.server_name())).cloned().collect();
        for statement in &lost {
            self.remove(statement);
        }
        !lost.is_empty() && self.known.is_empty()
    }

    /// Another session comes: a name that is not its own must not mean anything.
    #[cold]
    pub fn put_own_names_away(&mut self, client: &ClientStatements, lease: &mut Lease, out: &mut Vec<u8>) {
        let others = self.known.values().map(|known| &known.statement);
        let others = others.filter(|statement| statement.has_own_name() && !client.has(statement.id));
        for id in others.map(|statement| statement.id).collect::<Vec<_>>() {
            self.close(id, lease, out);
        }
    }

    /// Before a session looks at what is prepared: what is others' goes.
    #[cold]
    pub fn hide_others(&mut self, client: &ClientStatements, lease: &mut Lease, out: &mut Vec<u8>) {
        let others: Vec<u64> = self.known.keys().filter(|id| !client.has(**id)).copied().collect();
        for id in others {
            self.close(id, lease, out);
        }
    }

    /// And what the server lacks of the session's own comes, in the order in which it was first prepared. In batches of their
    /// own, in front of a simple query, so that one that fails takes nothing with it. In a transaction it would: there only
    /// what some server has taken already. `in_sql`: only what was made by PREPARE.
    #[cold]
    pub fn show_own(
        &mut self,
        client: &ClientStatements,
        here: Here<'_>,
        lease: &mut Lease,
        in_sql: bool,
        out: &mut Outgoing<'_>,
    ) {
        let mut own: Vec<&Arc<Statement>> =
            client.all().filter(|statement| statement.in_sql || !in_sql).collect();
        own.sort_unstable_by_key(|statement| statement.id);
        let safe = |statement: &&&Arc<Statement>| match lease.status() {
            b'I' => true,
            status => status == b'T' && statement.is_proved(),
        };
        let shown: Vec<_> = own.iter().filter(safe).take(self.capacity.statements).collect();
        for statement in shown {
            self.ensure_for_query(statement, here, lease, out);
        }
    }
}

/// A PostgreSQL array of names of statements; none has a letter in it that would have to be quoted otherwise.
fn array<'n>(names: impl Iterator<Item = &'n [u8]>) -> String {
    let names: Vec<_> = names.map(|name| format!("\"{}\"", String::from_utf8_lossy(name))).collect();
    format!("{{{}}}", names.join(","))
}
