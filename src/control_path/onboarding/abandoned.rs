//! Finishes operations whose process is gone: a command that was killed, a machine that died. Every node
//! looks for them.
//!
//! ```text
//! running, and the lock on its tenant is free ──SETTLE──▶ due ──▶ adopted ──▶ done or undone
//!                                                          ▲          │
//!                                                          └── pause ─┴─ failed
//! ```
//!
//! A process that works on a tenant holds the tenant's lock ([`TenantLock`]), so a free lock means that it is
//! gone. What happens then is what happens when a person repeats the command: a move is undone, or finished
//! once the new host serves; a create or adopt is undone; a drop goes on; a rotation is made again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tracing::{debug, info, warn};

use super::{
    drop::{DropDatabase, drop_tenant},
    move_tenant,
    operation::TenantLock,
    role_attributes::follow_status,
    rotate::rotate,
    undo_remains,
};
use crate::{
    control_path::{
        admin::{
            actor::{Actor, AdminContext, AdminError},
            fields::from_row,
        },
        central::causes,
        rhythm,
    },
    metrics::{Adoption, Metrics},
};

/// Interval of the searches. One query, which reads running operations only.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long an operation must be without its process. A person who repeats the command at once comes first.
const SETTLE: Duration = Duration::from_secs(2);
/// Pauses after failed attempts double from the first to the last.
const PAUSE_FIRST: Duration = Duration::from_secs(10);
const PAUSE_LAST: Duration = Duration::from_secs(600);
/// Operations that a node works on at a time.
const AT_ONCE: usize = 4;

/// Running operations, where no process holds the lock of their tenant; those in `$1` also if they have failed.
/// The arithmetic makes an advisory lock's key of two columns of `pg_locks`.
const WITHOUT_PROCESS: &str = "
    SELECT o.id, o.kind, t.name AS tenant, o.step, o.actor, o.arguments
    FROM pglobby.operations o JOIN pglobby.tenants t ON t.id = o.tenant_id
    WHERE (o.status = 'running' OR (o.status = 'failed' AND o.id = ANY ($1))) AND t.status <> 'dropped'
      AND NOT EXISTS (
          SELECT FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database
          WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND d.datname = pg_catalog.current_database()
            AND ((l.classid::int8 << 32) | l.objid::int8) = pg_catalog.hashtextextended('pglobby tenant ' || t.name, 0))
    ORDER BY o.id";

#[derive(Debug, Clone)]
struct Abandoned {
    id: i64,
    kind: String,
    tenant: String,
    step: String,
    actor: String,
    arguments: Value,
}

/// What a node does about an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// Undoes it, or finishes it once it has switched.
    SettleMove,
    Undo,
    GoOnDropping,
    RotateAgain,
    /// Left to a person.
    None,
}

impl Abandoned {
    fn remedy(&self) -> Remedy {
        match self.kind.as_str() {
            "move" => Remedy::SettleMove,
            "create" | "adopt" => Remedy::Undo,
            "rotate" => Remedy::RotateAgain,
            // The last dump belongs on the operator's machine, and nothing may be dropped before it is made.
            "drop" if self.arguments["final_dump"].is_string() && self.arguments["dumped"] != true => {
                Remedy::None
            }
            "drop" => Remedy::GoOnDropping,
            // Sealing keys: the ring may be a file of the operator's machine.
            _ => Remedy::None,
        }
    }
}

/// When to adopt which operation. Pure.
#[derive(Debug, Default)]
struct Schedule(HashMap<i64, Entry>);

#[derive(Debug)]
struct Entry {
    /// Not before this time.
    next: Instant,
    /// After the next failure; zero: there was none.
    pause: Duration,
    under_way: bool,
}

impl Schedule {
    /// Takes what is without its process now, and forgets the others. Returns what is due, at most `room`.
    fn due(&mut self, found: &[i64], room: usize, now: Instant) -> Vec<i64> {
        let present: HashSet<i64> = found.iter().copied().collect();
        self.0.retain(|id, entry| entry.under_way || present.contains(id));
        let mut due = Vec::new();
        for id in found {
            let new = Entry { next: now + SETTLE, pause: Duration::ZERO, under_way: false };
            let entry = self.0.entry(*id).or_insert(new);
            if !entry.under_way && entry.next <= now && due.len() < room {
                entry.under_way = true;
                due.push(*id);
            }
        }
        due
    }

    /// An attempt has ended; `failed`: with an error. Returns the pause until the next one.
    fn ended(&mut self, id: i64, failed: bool, now: Instant) -> Option<Duration> {
        if !failed {
            self.0.remove(&id);
            return None;
        }
        let entry = self.0.get_mut(&id)?;
        entry.pause = (entry.pause * 2).clamp(PAUSE_FIRST, PAUSE_LAST);
        (entry.under_way, entry.next) = (false, now + entry.pause);
        Some(entry.pause)
    }

    /// Operations with a failed attempt: they may be `failed` in their row as well.
    fn failed(&self) -> Vec<i64> {
        self.0.iter().filter(|(_, entry)| entry.pause > Duration::ZERO).map(|(id, _)| *id).collect()
    }
}

/// Looks for such operations and finishes them, as long as the node lives.
pub async fn watch(context: AdminContext, metrics: Arc<Metrics>) {
    let actor = context.actor("pglobby");
    let (mut schedule, mut told) = (Schedule::default(), HashSet::new());
    let mut attempts = JoinSet::new();
    let mut interval = rhythm::every(LOOK_EVERY);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            Some(ended) = attempts.join_next() => {
                if let Ok((abandoned, outcome)) = ended {
                    conclude(&mut schedule, &metrics, &abandoned, outcome);
                }
                continue;
            }
        }
        let found = match look(&actor, &schedule.failed()).await {
            Ok(found) => found,
            Err(error) => {
                debug!(side = "central", error = %causes(&error), "cannot look for unfinished operations");
                continue;
            }
        };
        told.retain(|id| found.iter().any(|abandoned| abandoned.id == *id));
        let (mine, others): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|abandoned| abandoned.remedy() != Remedy::None);
        for Abandoned { id, kind, tenant, .. } in others {
            if told.insert(id) {
                warn!(
                    tenant,
                    operation = id,
                    kind,
                    "operation without its process is left to a person; run the command again"
                );
            }
        }
        let ids: Vec<i64> = mine.iter().map(|abandoned| abandoned.id).collect();
        let due = schedule.due(&ids, AT_ONCE.saturating_sub(attempts.len()), Instant::now());
        for abandoned in mine.into_iter().filter(|abandoned| due.contains(&abandoned.id)) {
            let actor = actor.clone();
            attempts.spawn(async move {
                let outcome = adopt(&actor, &abandoned).await;
                (abandoned, outcome)
            });
        }
    }
}

async fn look(actor: &Actor, failed: &[i64]) -> Result<Vec<Abandoned>, AdminError> {
    let client = actor.central.client().await?;
    let rows = client.query(WITHOUT_PROCESS, &[&failed]).await?;
    Ok(rows
        .iter()
        .map(|row| from_row!(row => Abandoned { id, kind, tenant, step, actor, arguments }))
        .collect())
}

/// Does what repeating the command would do. `None`: another node or a person is at it, or has done it.
async fn adopt(actor: &Actor, abandoned: &Abandoned) -> Result<Option<Adoption>, AdminError> {
    let client = actor.central.connect_to(actor.central.database()).await?;
    // One node at a time. Ends with the connection.
    let lock = "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('pglobby adopts operation ' || $1::text, 0))";
    if !client.query_one(lock, &[&abandoned.id.to_string()]).await?.get::<_, bool>(0) {
        return Ok(None);
    }
    // It may have ended since it was found.
    if !matches!(status(&client, abandoned.id).await?.as_str(), "running" | "failed") {
        return Ok(None);
    }
    let Some(mut lock) = TenantLock::take_if_free(actor, &abandoned.tenant).await? else { return Ok(None) };
    info!(
        tenant = abandoned.tenant,
        operation = abandoned.id,
        kind = abandoned.kind,
        step = abandoned.step,
        begun_by = abandoned.actor,
        "operation adopted: its process is gone"
    );
    let name = &abandoned.tenant;
    let worked = match abandoned.remedy() {
        Remedy::SettleMove => {
            let settled = move_tenant::finish_or_undo(actor, &mut lock).await;
            drop(lock);
            follow_status(actor, name).await;
            settled
        }
        Remedy::Undo => undo_remains(actor, &mut lock).await,
        Remedy::GoOnDropping => {
            drop(lock);
            drop_tenant(actor, name, DropDatabase::IfOurs, None).await.map(drop)
        }
        Remedy::RotateAgain => {
            drop(lock);
            rotate(actor, name).await.map(drop)
        }
        Remedy::None => return Ok(None),
    };
    match worked {
        Err(AdminError::Busy { .. }) => return Ok(None),
        worked => worked?,
    }
    let adoption = match abandoned.remedy() {
        // Another rotation has replaced the one that was left.
        Remedy::RotateAgain => Adoption::Finished,
        _ if status(&client, abandoned.id).await? == "done" => Adoption::Finished,
        _ => Adoption::Undone,
    };
    let detail = json!({
        "operation": abandoned.id, "kind": abandoned.kind, "step": abandoned.step, "begun_by": abandoned.actor,
        "outcome": adoption.word(),
    });
    actor.audit(&client, "operation.adopted", Some(name), &detail).await?;
    Ok(Some(adoption))
}

async fn status(client: &Client, id: i64) -> Result<String, AdminError> {
    let row = client.query_opt("SELECT status FROM pglobby.operations WHERE id = $1", &[&id]).await?;
    Ok(row.map(|row| row.get(0)).unwrap_or_default())
}

fn conclude(
    schedule: &mut Schedule,
    metrics: &Metrics,
    abandoned: &Abandoned,
    outcome: Result<Option<Adoption>, AdminError>,
) {
    let Abandoned { id, kind, tenant, .. } = abandoned;
    let pause = schedule.ended(*id, outcome.is_err(), Instant::now());
    match outcome {
        Ok(None) => {}
        Ok(Some(adoption)) => {
            metrics.operation_adopted(adoption);
            info!(tenant, operation = id, kind, outcome = adoption.word(), "adopted operation ended");
        }
        Err(error) => {
            metrics.operation_adopted(Adoption::Failed);
            let retry_s = pause.unwrap_or_default().as_secs();
            warn!(tenant, operation = id, kind, retry_s, error = %causes(&error), "cannot end an adopted operation");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn abandoned(kind: &str, arguments: Value) -> Abandoned {
        let text = String::new;
        Abandoned { id: 1, kind: kind.to_owned(), tenant: text(), step: text(), actor: text(), arguments }
    }

    #[test]
    fn each_kind_is_ended_as_by_repeating_its_command() {
        for (kind, arguments, remedy) in [
            ("move", json!({}), Remedy::SettleMove),
            ("create", json!({}), Remedy::Undo),
            ("adopt", json!({}), Remedy::Undo),
            ("rotate", json!({}), Remedy::RotateAgain),
            ("drop", json!({ "final_dump": null }), Remedy::GoOnDropping),
            ("drop", json!({ "final_dump": "/a.dump" }), Remedy::None),
            ("drop", json!({ "final_dump": "/a.dump", "dumped": true }), Remedy::GoOnDropping),
            ("key_rotate", json!({}), Remedy::None),
        ] {
            assert_eq!(abandoned(kind, arguments.clone()).remedy(), remedy, "{kind} {arguments}");
        }
    }

    #[test]
    fn an_operation_is_due_once_it_has_been_without_its_process_for_a_while() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        assert!(schedule.due(&[1, 2], 4, now).is_empty());
        // A person has repeated the command of the first one.
        assert_eq!(schedule.due(&[2], 4, now + SETTLE), [2]);
        assert!(schedule.due(&[1, 2], 4, now + SETTLE).is_empty(), "one is new again, the other under way");
        assert_eq!(schedule.ended(2, false, now + SETTLE), None);
        assert_eq!(schedule.due(&[1], 4, now + SETTLE * 2), [1]);
    }

    #[test]
    fn attempts_that_fail_come_ever_more_seldom() {
        let (mut schedule, mut now) = (Schedule::default(), Instant::now());
        schedule.due(&[1], 4, now);
        now += SETTLE;
        let mut pause = PAUSE_FIRST;
        for _ in 0..9 {
            assert_eq!(schedule.due(&[1], 4, now), [1]);
            assert_eq!(schedule.ended(1, true, now), Some(pause));
            assert_eq!(schedule.failed(), [1]);
            assert!(schedule.due(&[1], 4, now + pause - Duration::from_millis(1)).is_empty());
            now += pause;
            pause = (pause * 2).min(PAUSE_LAST);
        }
        assert_eq!(pause, PAUSE_LAST);
        schedule.due(&[], 4, now);
        assert!(schedule.failed().is_empty(), "ended by someone else");
    }

    #[test]
    fn a_node_works_on_a_few_at_a_time() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        schedule.due(&[1, 2, 3], 2, now);
        assert_eq!(schedule.due(&[1, 2, 3], 2, now + SETTLE), [1, 2]);
        assert!(schedule.due(&[1, 2, 3], 0, now + SETTLE).is_empty());
        schedule.ended(1, false, now + SETTLE);
        assert_eq!(schedule.due(&[2, 3], 1, now + SETTLE), [3]);
    }
}
