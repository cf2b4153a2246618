//! What a session, or its code, sees of what its server has prepared: its own statements, by its own names, and nobody else's.
//! Pure.

use std::sync::Arc;

use super::prepare::Preparer;
use crate::{
    data_path::prepared::{ClientStatements, Statement},
    wire::outgoing::Outgoing,
};

impl Preparer<'_> {
    /// Another session comes: a name that is not its own must not mean anything.
    #[cold]
    pub fn put_own_names_away(&mut self, client: &ClientStatements, out: &mut Vec<u8>) {
        let others = self.statements.all();
        let others = others.filter(|statement| statement.has_client_name() && !client.has(statement.id));
        for id in others.map(|statement| statement.id).collect::<Vec<_>>() {
            self.close(id, out);
        }
    }

    /// Before a session looks at what is prepared: what is others' goes.
    #[cold]
    pub fn hide_others(&mut self, client: &ClientStatements, out: &mut Vec<u8>) {
        let others = self.statements.all().map(|statement| statement.id).filter(|id| !client.has(*id));
        for id in others.collect::<Vec<_>>() {
            self.close(id, out);
        }
    }

    /// And what the server lacks of the session's own comes, in the order in which it was first prepared. In batches of their
    /// own, in front of a simple query, so that one that fails takes nothing with it. In a transaction it would: there only
    /// what some server has taken already. `in_sql`: only what was made by PREPARE.
    #[cold]
    pub fn show_own(&mut self, client: &ClientStatements, in_sql: bool, out: &mut Outgoing<'_>) {
        let mut own: Vec<&Arc<Statement>> =
            client.all().filter(|statement| statement.in_sql || !in_sql).collect();
        own.sort_unstable_by_key(|statement| statement.id);
        let safe = |statement: &&&Arc<Statement>| match self.replies.status() {
            b'I' => true,
            status => status == b'T' && statement.was_parsed(),
        };
        let shown: Vec<_> = own.iter().filter(safe).take(self.statements.statements_max()).collect();
        for statement in shown {
            self.ensure_for_query(statement, out);
        }
    }
}
