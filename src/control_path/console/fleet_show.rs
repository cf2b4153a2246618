//! SHOW of other nodes, and of all of them, with a first column `node`; and what this node answers to others.

use std::sync::Arc;

use serde_json::{Value, json};
use tracing::info;

use super::{
    ConsoleError, Session,
    fleet_commands::{Conclusion, NodeRequest, Target},
    node_command::{NodeCommand, Place},
    table::{Cell, Kind, Table},
    this_node::{Reach, ThisNode},
};
use crate::control_path::fleet::answers::{Answer, Handler};

impl Session {
    /// SHOW where `place` says. Without a place it has PgBouncer's columns.
    pub(super) async fn show_at(&mut self, words: &[String], place: &Place) -> Result<Table, ConsoleError> {
        let own = self.this_node().show(words, &self.actor()).await?;
        if *place == Place::Default {
            return Ok(own);
        }
        let name = self.context.fleet.name().to_owned();
        let target = self.target(place, true).await?;
        let mut table = match target {
            Target::Other(_) => with_node(Table { rows: Vec::new(), ..own }, &name),
            Target::This | Target::All => with_node(own, &name),
        };
        let request = NodeRequest::Show(words.to_vec());
        match target {
            Target::This => return Ok(table),
            Target::Other(node) => {
                append(&mut table, &node.name, &self.ask_one(&node, &request).await?);
                return Ok(table);
            }
            Target::All => {}
        }
        let replies = self.ask(None, &request).await?;
        let Conclusion { named, notices, error, .. } =
            Conclusion::of(replies, self.context.admin.central.timeout());
        // The rows of the others are still of use.
        self.notices.extend(notices.into_iter().chain(error));
        for (node, answer) in &named {
            append(&mut table, node, answer);
        }
        Ok(table)
    }

    /// The columns of [`Self::show_at`], without asking other nodes.
    pub(super) async fn show_columns(&self, words: &[String], place: &Place) -> Result<Table, ConsoleError> {
        let own = self.this_node().show(words, &self.actor()).await?;
        Ok(match place {
            Place::Default => own,
            Place::AllNodes | Place::Node(_) => with_node(own, ""),
        })
    }
}

fn with_node(mut table: Table, node: &str) -> Table {
    table.columns.insert(0, ("node", Kind::Text));
    for row in &mut table.rows {
        row.insert(0, node.into());
    }
    table
}

/// Adds the rows of another node. It may have another version: columns are found by name.
fn append(table: &mut Table, node: &str, answer: &Value) {
    let list = |key: &str| answer.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let names: Vec<&str> = list("columns").iter().filter_map(Value::as_str).collect();
    let columns = table.columns.iter().skip(1);
    let places: Vec<(Option<usize>, Kind)> =
        columns.map(|(name, kind)| (names.iter().position(|known| known == name), *kind)).collect();
    for row in list("rows") {
        let value = |at: Option<usize>| at.and_then(|at| row.get(at)).unwrap_or(&Value::Null);
        let cells = places.iter().map(|(at, kind)| typed(*kind, value(*at)));
        table.rows.push(std::iter::once(node.into()).chain(cells).collect());
    }
}

/// A value of another type is NULL.
fn typed(kind: Kind, value: &Value) -> Cell {
    match (kind, Cell::of_json(value, ",")) {
        (Kind::Text, cell @ Cell::Text(_))
        | (Kind::Int | Kind::BigInt, cell @ Cell::Number(_))
        | (Kind::Truth, cell @ Cell::Truth(_)) => cell,
        _ => Cell::Null,
    }
}

fn to_json(table: &Table) -> Value {
    let cell = |cell: &Cell| match cell {
        Cell::Null => Value::Null,
        Cell::Text(text) => text.as_str().into(),
        Cell::Number(number) => (*number).into(),
        Cell::Truth(truth) => (*truth).into(),
    };
    let rows = table.rows.iter().map(|row| row.iter().map(cell).collect::<Vec<_>>());
    let columns: Vec<&str> = table.columns.iter().map(|(name, _)| *name).collect();
    json!({ "columns": columns, "rows": rows.collect::<Vec<_>>() })
}

/// Runs what other nodes ask.
pub fn handler(node: ThisNode) -> Handler {
    Arc::new(move |actor, request| {
        let node = node.clone();
        Box::pin(async move { node.answer(actor, request).await })
    })
}

impl ThisNode {
    async fn answer(&self, actor: String, request: Value) -> Answer {
        let failed = |error: ConsoleError| Answer { outcome: Err(error.to_json()), then: None };
        let request = match serde_json::from_value(request) {
            Ok(request) => request,
            Err(_) => return failed(unknown()),
        };
        let (command, all_nodes) = match request {
            NodeRequest::Show(words) => {
                let shown = self.show(&words, &self.context.admin.actor(actor)).await;
                return Answer {
                    outcome: shown.as_ref().map(to_json).map_err(ConsoleError::to_json),
                    then: None,
                };
            }
            NodeRequest::Run { command, all_nodes } => (command, all_nodes),
        };
        info!(
            actor,
            command = command.title(),
            tenant = command.tenant(),
            all_nodes,
            "admin command of another node"
        );
        if let NodeCommand::Shutdown(mode) = command {
            // The answer has to be written first.
            let node = self.clone();
            let then = async move { drop(node.shut_down(mode).await) };
            return Answer { outcome: Ok(Value::Null), then: Some(Box::pin(then)) };
        }
        let reach = if all_nodes { Reach::Fleet } else { Reach::Node };
        match self.run(&command, reach).await {
            Ok(result) => Answer { outcome: Ok(result), then: None },
            Err(error) => failed(error),
        }
    }
}

fn unknown() -> ConsoleError {
    let words =
        concat!("this node has version ", env!("CARGO_PKG_VERSION"), " and does not know the command");
    ConsoleError::new("0A000", words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_another_version_is_read_by_names_and_types() {
        let mut table = with_node(Table::new("database cl_active:int pool_mode"), "a");
        let answer = json!({
            "columns": ["pool_mode", "new", "database", "cl_active"],
            "rows": [["session", 1, "acme", 7], [3, null, "globex", "x"], "nonsense"],
        });
        append(&mut table, "b", &answer);
        append(&mut table, "c", &Value::Null);
        assert_eq!(
            table.rows,
            [
                vec!["b".into(), "acme".into(), Cell::Number(7), "session".into()],
                vec!["b".into(), "globex".into(), Cell::Null, Cell::Null],
                vec!["b".into(), Cell::Null, Cell::Null, Cell::Null],
            ]
        );
    }

    #[test]
    fn a_table_survives_the_journey() {
        let mut table = Table::new("name port:int bytes:bigint");
        table.columns.push(("truth", Kind::Truth));
        table.rows.push(vec!["x".into(), 7.into(), Cell::Number(i64::MAX), true.into()]);
        table.rows.push(vec![Cell::Null; 4]);
        let mut read = with_node(Table { rows: Vec::new(), ..table.clone() }, "");
        append(&mut read, "b", &to_json(&table));
        assert_eq!(read, with_node(table, "b"));
    }
}
