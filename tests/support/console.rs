//! The admin console as it is read.

use std::{collections::HashMap, time::Instant};

use super::client::{Client, PATIENCE};

/// A row as `column -> value`; NULL is the empty string.
pub type Row = HashMap<String, String>;

/// The rows of a SHOW.
pub async fn show(console: &Client, what: &str) -> Vec<Row> {
    let messages = console.simple_query(&format!("SHOW {what}")).await.unwrap();
    let rows = messages.iter().filter_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    rows.map(|row| {
        let columns = row.columns().iter().enumerate();
        columns
            .map(|(at, column)| (column.name().to_owned(), row.get(at).unwrap_or_default().to_owned()))
            .collect()
    })
    .collect()
}

/// Asks until what SHOW says is so: counters follow what happens without holding it up.
pub async fn shown(console: &Client, what: &str, column: &str, value: &str) {
    let begun = Instant::now();
    loop {
        let rows = show(console, what).await;
        if rows.iter().any(|row| row.get(column).map(String::as_str) == Some(value)) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "SHOW {what} never had {column} {value}: {rows:?}");
        tokio::task::yield_now().await;
    }
}
