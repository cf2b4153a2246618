//! If a session, or a function that it calls, reads the list of prepared statements, the session sees exactly
//! its own statements under its own names. Pure.

use std::sync::Arc;

use super::{pending_replies::Origin, prepare::Preparer};
use crate::{
    data_path::prepared::{ClientStatements, Statement},
    wire::outgoing::Outgoing,
};

impl Preparer<'_> {
    /// A lease begins: closes other sessions' statements that have a client's name.
    #[cold]
    pub fn close_foreign_names(&mut self, client: &ClientStatements, out: &mut Vec<u8>) {
        self.close_foreign(client, Statement::has_client_name, out);
    }

    /// Closes all statements of other sessions.
    #[cold]
    pub fn close_foreign_statements(&mut self, client: &ClientStatements, out: &mut Vec<u8>) {
        self.close_foreign(client, |_| true, out);
    }

    fn close_foreign(
        &mut self,
        client: &ClientStatements,
        concerned: impl Fn(&Statement) -> bool,
        out: &mut Vec<u8>,
    ) {
        let own = client.ids();
        let others = self.statements.all().filter(|statement| concerned(statement));
        let others: Vec<_> = others.map(|statement| statement.id).filter(|id| !own.contains(id)).collect();
        // Between two batches they have one of their own. As part of the client's next batch, they would leave the
        // session's own statements unprepared: in an open batch none may be.
        let apart = self.replies.admits_own_batch();
        let origin = if apart { Origin::Proxy } else { Origin::Prepare };
        let mut is_any_closed = false;
        for id in others {
            is_any_closed |= self.close_by(id, origin, out);
        }
        if apart && is_any_closed {
            self.replies.end_own_batch(out);
        }
    }

    /// Prepares the session's statements that the server lacks, in the order of their first Parse. Each gets
    /// a batch of its own before the simple query, so that a failure affects nothing else. In a transaction a
    /// failure would, so there only statements are prepared that some server has parsed before. `in_sql`:
    /// only those made by PREPARE.
    #[cold]
    pub fn ensure_own(&mut self, client: &ClientStatements, in_sql: bool, out: &mut Outgoing<'_>) {
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
