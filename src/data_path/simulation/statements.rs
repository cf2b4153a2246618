//! The SQL statements that the model of a session runs: those that simulated clients and the proxy send.

use super::{
    backend::{Failure, Rolled, Session, Statement},
    expressions::{self, Value},
    proxy_queries,
};
use crate::wire::message::append;

impl Session {
    /// Runs one statement. `describes`: its columns come first, as for a simple query.
    pub(super) fn run_statement(
        &mut self,
        sql: &str,
        parameters: &[Value],
        describes: bool,
    ) -> Result<(), Failure> {
        if let Some(rows) = proxy_queries::answer(sql, parameters, self) {
            self.answer(columns(sql), &rows, describes);
            return Ok(());
        }
        let (verb, rest) = sql.split_once(' ').unwrap_or((sql, ""));
        let tag = match verb {
            "SELECT" => {
                let row = self.select(rest, parameters);
                if row.as_ref().is_err_and(Failure::is_unknown) {
                    self.unknown = Some(sql.to_owned());
                }
                let row = row?;
                self.answer(row.len(), &[row], describes);
                return Ok(());
            }
            "EXECUTE" => {
                let sql = self.statement(rest)?.sql.clone();
                return self.run_statement(&sql, &[], describes);
            }
            "COPY" => {
                append(&mut self.out, b'G', |out| out.extend_from_slice(&[0, 0, 1, 0, 0]));
                (self.copying, self.copied) = (true, 0);
                return Ok(());
            }
            "BEGIN" | "COMMIT" | "ROLLBACK" => self.transaction_statement(verb),
            "SET" | "RESET" => self.setting_statement(verb, rest),
            "DISCARD" => self.discard_all()?,
            "LISTEN" | "UNLISTEN" => {
                let channel = Some(rest.trim_matches('"').to_owned()).filter(|channel| channel != "*");
                self.listens.push((verb == "LISTEN", channel));
                verb
            }
            "NOTIFY" => {
                let (channel, payload) = rest.split_once(", ").unwrap_or((rest, ""));
                self.notifies.push((channel.to_owned(), payload.trim_matches('\'').to_owned()));
                verb
            }
            "PREPARE" | "DEALLOCATE" => self.prepare_statement(verb, rest)?,
            "CREATE" | "DROP" => self.table_statement(verb, rest)?,
            _ => {
                self.unknown = Some(sql.to_owned());
                return Err(Failure::new("42601", &format!("syntax error at or near \"{verb}\"")));
            }
        };
        self.complete(tag);
        Ok(())
    }

    fn answer(&mut self, columns: usize, rows: &[Vec<Value>], describes: bool) {
        if describes {
            self.describe(columns);
        }
        self.rows(rows);
    }

    /// One row, from no table or from a temporary one.
    fn select(&mut self, list: &str, parameters: &[Value]) -> Result<Vec<Value>, Failure> {
        let (list, table) =
            list.split_once(" FROM ").map_or((list, None), |(list, table)| (list, Some(table)));
        match table.filter(|table| !self.now.temporary.contains(*table)) {
            Some(table) => Err(Failure::new("42P01", &format!("relation \"{table}\" does not exist"))),
            None => expressions::row(list, parameters, self),
        }
    }

    fn is_block(&self) -> bool {
        self.transaction.as_ref().is_some_and(|transaction| transaction.is_block)
    }

    fn transaction_statement<'v>(&mut self, verb: &'v str) -> &'v str {
        match (verb, self.is_block()) {
            ("BEGIN", true) => self.warn("25001", "there is already a transaction in progress"),
            ("BEGIN", false) | (_, true) => {}
            (_, false) => self.warn("25P01", "there is no transaction in progress"),
        }
        if verb == "BEGIN" {
            self.transaction.iter_mut().for_each(|transaction| transaction.is_block = true);
            return verb;
        }
        let rolled_back = self.failed || verb == "ROLLBACK";
        self.end_transaction(rolled_back);
        if rolled_back { "ROLLBACK" } else { "COMMIT" }
    }

    fn setting_statement<'v>(&mut self, verb: &'v str, rest: &str) -> &'v str {
        match (verb, rest) {
            ("SET", rest) => {
                let (local, rest) = rest.strip_prefix("LOCAL ").map_or((false, rest), |rest| (true, rest));
                let (name, value) = rest.split_once(" = ").unwrap_or_default();
                self.set(name, Some(value.trim_matches('\'')), local);
            }
            (_, "ROLE" | "SESSION AUTHORIZATION") => {}
            (_, "ALL") => {
                self.now.set.clear();
                self.local.clear();
            }
            (_, name) => self.set(name, None, false),
        }
        verb
    }

    fn discard_all(&mut self) -> Result<&'static str, Failure> {
        if self.is_block() {
            return Err(Failure::new("25001", "DISCARD ALL cannot run inside a transaction block"));
        }
        self.now = Rolled::default();
        self.local.clear();
        self.statements.clear();
        self.portals.clear();
        self.locks.clear();
        self.listens.push((false, None));
        if let Some(transaction) = &mut self.transaction {
            transaction.before = Rolled::default();
        }
        Ok("DISCARD ALL")
    }

    fn prepare_statement<'v>(&mut self, verb: &'v str, rest: &str) -> Result<&'v str, Failure> {
        match (verb, rest) {
            ("PREPARE", rest) => {
                let (name, sql) = rest.split_once(" AS ").unwrap_or_default();
                self.refuse_if_prepared(name)?;
                self.statements.insert(name.to_owned(), Statement { sql: sql.to_owned(), from_sql: true });
            }
            (_, "ALL") => {
                self.statements.clear();
                return Ok("DEALLOCATE ALL");
            }
            (_, name) => {
                self.statement(name)?;
                self.statements.remove(name);
            }
        }
        Ok(verb)
    }

    /// CREATE TEMP TABLE, DROP TABLE.
    fn table_statement(&mut self, verb: &str, rest: &str) -> Result<&'static str, Failure> {
        let table = rest.trim_start_matches("TEMP ").trim_start_matches("TABLE ");
        let table = table.split(' ').next().unwrap_or_default();
        match (verb, self.now.temporary.contains(table)) {
            ("CREATE", false) => {
                self.now.temporary.insert(table.to_owned());
                Ok("CREATE TABLE")
            }
            ("CREATE", true) => Err(Failure::new("42P07", &format!("relation \"{table}\" already exists"))),
            (_, true) => {
                self.now.temporary.remove(table);
                Ok("DROP TABLE")
            }
            (_, false) => Err(Failure::new("42P01", &format!("table \"{table}\" does not exist"))),
        }
    }
}

/// How many columns the rows of a statement have; 0: it has none.
pub(super) fn columns(sql: &str) -> usize {
    match sql.strip_prefix("SELECT ") {
        _ if sql.starts_with("SELECT CURRENT_CATALOG") => 3,
        _ if sql.starts_with("SELECT CASE WHEN pg_catalog.octet_length") => 4,
        _ if sql.starts_with("SELECT pg_catalog.concat_ws") => 3,
        _ if sql.contains("FROM ROWS FROM") || sql.starts_with("SELECT pg_catalog.set_config(key") => 1,
        _ if sql.contains("WHERE source = 'session' UNION ALL SELECT n,") => 2,
        Some(list) => expressions::split(list.split(" FROM ").next().unwrap_or_default()).len(),
        None => 0,
    }
}
