//! What this node asks of others: a row in the central database, their answers, and how long they are waited for.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::Row;
use tracing::debug;

pub use super::waiting::{NodeReply, Outcome};
use super::{
    Fleet, FleetError,
    waiting::{NodeAnswer, NodeState, Waiting},
};
use crate::{control_path::central::Central, data_path::lock::locked};

/// Interval between looks, if no notification arrives.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Nodes that have started later read the pauses at their start. Answers that are known are not read again.
const ANSWERS: &str = "
    SELECT n.id, n.name, n.beat, a.status,
        CASE WHEN a.status <> 'running' AND n.id <> ALL ($2) THEN a.answer END AS answer
    FROM pglobby.node_requests r
    JOIN pglobby.nodes n ON n.id <> r.asked_by AND n.started_at <= r.asked_at
        AND (r.target IS NULL OR n.id = r.target)
    LEFT JOIN pglobby.node_answers a ON a.request_id = r.id AND a.node_id = n.id
    WHERE r.id = $1";

impl Fleet {
    /// Asks the node with the id `target`, or all other nodes, and returns what became of it at each of them. A
    /// node that has begun is waited for as long as it runs.
    ///
    /// # Errors
    /// The central database could not be reached, before or while nodes were waited for.
    pub async fn ask(
        &self,
        target: Option<i64>,
        actor: &str,
        command: &Value,
    ) -> Result<Vec<NodeReply>, FleetError> {
        let mut answered = self.answered.subscribe();
        let request = self.insert(target, actor, command).await?;
        let begun = Instant::now();
        let mut waiting = Waiting::new(locked(&self.gone).clone());
        loop {
            answered.borrow_and_update();
            let rows = self.central.client().await?.query(ANSWERS, &[&request.id, &waiting.known()]).await?;
            let states = rows.iter().map(state).collect::<Result<_, _>>()?;
            if let Some(replies) = waiting.look(begun.elapsed(), self.central.timeout(), states) {
                return Ok(replies);
            }
            tokio::select! {
                _ = answered.changed() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    async fn insert(&self, target: Option<i64>, actor: &str, command: &Value) -> Result<Request, FleetError> {
        let own = self.registration.id();
        let client = self.central.client().await?;
        // Of nodes that were cut off before they could withdraw them.
        let old = "DELETE FROM pglobby.node_requests WHERE asked_at < pg_catalog.now() - interval '1 hour'";
        client.execute(old, &[]).await?;
        let sql = "INSERT INTO pglobby.node_requests (asked_by, target, actor, command)
                   VALUES ($1, $2, $3, $4) RETURNING id";
        let own = own.ok_or(FleetError::NotRegistered)?;
        let id = client.query_one(sql, &[&own, &target, &actor, command]).await?.try_get(0)?;
        Ok(Request { central: self.central.clone(), id })
    }
}

/// A request that is there until this is dropped, also if the administrator leaves.
struct Request {
    central: Central,
    id: i64,
}

impl Drop for Request {
    fn drop(&mut self) {
        let (central, id) = (self.central.clone(), self.id);
        tokio::spawn(async move {
            let Ok(client) = central.client().await else { return };
            let sql = "DELETE FROM pglobby.node_requests WHERE id = $1";
            if let Err(error) = client.execute(sql, &[&id]).await {
                debug!(side = "central", %error, "request to other nodes not removed");
            }
        });
    }
}

fn state(row: &Row) -> Result<NodeState, tokio_postgres::Error> {
    let answer = || Ok(row.try_get::<_, Option<Value>>("answer")?.unwrap_or_default());
    Ok(NodeState {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        beat: row.try_get("beat")?,
        answer: match row.try_get("status")? {
            None => None,
            Some("done") => Some(NodeAnswer::Done(answer()?)),
            Some("failed") => Some(NodeAnswer::Failed(answer()?)),
            Some(_) => Some(NodeAnswer::Running),
        },
    })
}
