//! What other nodes ask of this one. Each request runs in a task of its own, and its answer is a row.

use std::{pin::Pin, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tracing::{info, warn};

use super::{Fleet, FleetError, pauses::PAUSES};

/// Requests that run at a time; a further one is not begun.
pub const RUNNING_MAX: usize = 64;
/// Longest answer. What SHOW lists of 30,000 connections fits.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Interval at which a request that takes long looks whether it is still wanted, and at which an answer is repeated.
const WANTED_EVERY: Duration = Duration::from_secs(1);

/// Runs a request of the named actor.
pub type Handler = Arc<dyn Fn(String, Value) -> Pin<Box<dyn Future<Output = Answer> + Send>> + Send + Sync>;

/// The outcome of a request.
pub struct Answer {
    /// The result, or the error as JSON.
    pub outcome: Result<Value, Value>,
    /// What is done when the answer is written.
    pub then: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Marks the request as begun by this node, and returns it if it is for this node, new, and not begun before.
const BEGIN: &str = "
    WITH asked AS (
        SELECT id, actor, command FROM pglobby.node_requests
        WHERE id = $1 AND asked_by <> $2 AND (target IS NULL OR target = $2)
          AND asked_at > pg_catalog.now() - interval '1 minute'
    ), begun AS (
        INSERT INTO pglobby.node_answers (request_id, node_id) SELECT id, $2 FROM asked
        ON CONFLICT DO NOTHING RETURNING request_id
    )
    SELECT actor, command FROM asked JOIN begun ON begun.request_id = asked.id";

impl Fleet {
    /// Applies a notification of the channel `pglobby_fleet`.
    pub async fn notified(self: &Arc<Self>, payload: &str) {
        match payload.split_once(' ') {
            None if payload == PAUSES => self.pauses.follow().await,
            Some(("request", id)) => id.parse().into_iter().for_each(|id| self.begin(id)),
            Some(("answer", _)) => self.answered.send_replace(()),
            _ => {}
        }
    }

    /// After a connect, when notifications may have been missed.
    pub async fn catch_up(self: &Arc<Self>) {
        self.pauses.follow().await;
        match self.unanswered().await {
            Ok(requests) => requests.into_iter().for_each(|id| self.begin(id)),
            Err(FleetError::OlderSchema) => {}
            Err(error) => warn!(side = "central", %error, "cannot read what other nodes have asked"),
        }
    }

    async fn unanswered(&self) -> Result<Vec<i64>, FleetError> {
        let Some(node) = self.registration.id() else { return Ok(Vec::new()) };
        let sql = "SELECT r.id FROM pglobby.node_requests r
                   LEFT JOIN pglobby.node_answers a ON a.request_id = r.id AND a.node_id = $1
                   WHERE a.node_id IS NULL";
        let rows = self.central.client().await?.query(sql, &[&node]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    fn begin(self: &Arc<Self>, request: i64) {
        let Some(handler) = self.handler.get().cloned() else { return };
        let Ok(place) = self.running.clone().try_acquire_owned() else {
            return warn!(request, "too many requests of other nodes at a time; one is not answered");
        };
        let fleet = self.clone();
        tokio::spawn(async move {
            if let Err(error) = fleet.answer(request, &handler).await {
                warn!(request, side = "central", %error, "request of another node failed");
            }
            drop(place);
        });
    }

    async fn answer(&self, request: i64, handler: &Handler) -> Result<(), FleetError> {
        let Some(node) = self.registration.id() else { return Ok(()) };
        let begun = self.central.client().await?.query_opt(BEGIN, &[&request, &node]).await?;
        let Some(row) = begun else { return Ok(()) };
        let (actor, command): (String, Value) = (row.get(0), row.get(1));
        let answer = tokio::select! {
            answer = handler(actor, command) => answer,
            () = self.unwanted(request) => {
                info!(request, "request of another node withdrawn");
                return Ok(());
            }
        };
        // The node that asks waits for it as long as this one runs.
        tokio::select! {
            () = self.deliver(request, node, within_limit(answer.outcome)) => {}
            () = self.unwanted(request) => {}
        }
        if let Some(then) = answer.then {
            then.await;
        }
        Ok(())
    }

    /// Writes the answer. Retries until it is written.
    async fn deliver(&self, request: i64, node: i64, mut outcome: Result<Value, Value>) {
        let mut is_logged = false;
        while let Err(error) = self.write(request, node, &outcome).await {
            if !std::mem::replace(&mut is_logged, true) {
                warn!(request, side = "central", %error, "cannot answer a request of another node; retrying");
            }
            if matches!(&error, FleetError::Central(error) if error.is_about_a_value()) {
                outcome = Err(json!({ "message": format!("the answer cannot be written: {error}") }));
            }
            tokio::time::sleep(WANTED_EVERY).await;
        }
    }

    async fn write(&self, request: i64, node: i64, outcome: &Result<Value, Value>) -> Result<(), FleetError> {
        let (status, value) = match outcome {
            Ok(value) => ("done", value),
            Err(value) => ("failed", value),
        };
        let sql = "UPDATE pglobby.node_answers SET status = $3, answer = $4
                   WHERE request_id = $1 AND node_id = $2";
        let client = self.central.client().await?;
        client.execute(sql, &[&request, &node, &status, value]).await?;
        Ok(())
    }

    /// Returns when the request is there no more. While that cannot be told, it is.
    async fn unwanted(&self, request: i64) {
        let sql = "SELECT FROM pglobby.node_requests WHERE id = $1";
        loop {
            tokio::time::sleep(WANTED_EVERY).await;
            let Ok(client) = self.central.client().await else { continue };
            if let Ok(None) = client.query_opt(sql, &[&request]).await {
                return;
            }
        }
    }
}

fn within_limit(outcome: Result<Value, Value>) -> Result<Value, Value> {
    match outcome {
        Ok(value) if value.to_string().len() > ANSWER_BYTES_MAX => Err(json!({
            "sqlstate": "54000",
            "message": format!("the answer is longer than {ANSWER_BYTES_MAX} bytes"),
            "hint": "Ask that node itself.",
        })),
        outcome => outcome,
    }
}
