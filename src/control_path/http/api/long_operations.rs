//! Long work: starts it, answers with its operation, and completes it even if the caller disconnects.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use axum::{
    http::{HeaderValue, StatusCode, header::LOCATION},
    response::Response,
};
use tokio::{
    sync::{Semaphore, oneshot, watch},
    time::Instant,
};
use tracing::{info, warn};

use super::{
    Caller,
    responses::{ApiError, answered, creates, done},
};
use crate::control_path::admin::{
    actor::{AdminError, Progress},
    commands::AdminCommand,
    operations::{self, OperationSummary},
};

/// Interval at which a followed operation is read.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Operations that run on this node.
pub struct RunningOperations {
    /// `max_operations`.
    pub places: Arc<Semaphore>,
    ids: watch::Sender<BTreeSet<i64>>,
}

impl RunningOperations {
    /// No operation yet; `max_operations` at a time.
    pub fn new(max_operations: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(max_operations)), ids: watch::Sender::default() }
    }

    /// Returns when the operation has ended on this node. Its row says so a little before its place is
    /// free.
    async fn until_over(&self, id: i64) {
        let _ = self.ids.subscribe().wait_for(|ids| !ids.contains(&id)).await;
    }
}

/// Removes an operation from the list on drop.
struct ListedOperation(Arc<RunningOperations>, i64);

impl ListedOperation {
    fn new(running: Arc<RunningOperations>, id: i64) -> Self {
        running.ids.send_modify(|ids| {
            ids.insert(id);
        });
        Self(running, id)
    }
}

impl Drop for ListedOperation {
    fn drop(&mut self) {
        self.0.ids.send_modify(|ids| {
            ids.remove(&self.1);
        });
    }
}

/// Sends the id of the operation, once.
struct OperationStarted(Mutex<Option<oneshot::Sender<i64>>>);

#[async_trait]
impl Progress for OperationStarted {
    async fn begun(&self, operation: i64) {
        if let Some(tell) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = tell.send(operation);
        }
    }

    async fn step(&self, _: &str, _: &str) {}
}

/// Starts `command`. Answers 202 with its operation, or the outcome if that is ready within `?wait=`. Errors
/// before the start are answered at once. If the caller disconnects before the operation is recorded,
/// nothing runs; afterwards it completes.
pub async fn begin(caller: &Caller, command: AdminCommand) -> Result<Response, ApiError> {
    caller.admit(&command).await?;
    let Ok(place) = caller.api.running.places.clone().try_acquire_owned() else {
        return Err(ApiError::new(
            "too_many_requests",
            "max_operations of [http] is reached; see /v1/operations",
        ));
    };
    let (tell, begun) = oneshot::channel();
    let mut actor = caller.actor.clone();
    actor.progress = Some(Arc::new(OperationStarted(Mutex::new(Some(tell)))));
    let (title, subject, created) = (command.title(), command.subject().to_owned(), creates(&command));
    let context = caller.api.context.clone();
    let mut work = Box::pin(async move {
        let outcome = command.execute(&actor).await?;
        context.until_applied().await;
        Ok::<_, AdminError>(outcome)
    });
    let id = tokio::select! {
        biased;
        outcome = &mut work => return Ok(done(created, &outcome?)),
        Ok(id) = begun => id,
    };
    info!(actor = caller.actor.name, command = title, subject, operation = id, "operation started");
    let actor = caller.actor.clone();
    let listed = ListedOperation::new(caller.api.running.clone(), id);
    let carried_on = tokio::spawn(async move {
        let outcome = work.await;
        if let Err(error) = &outcome {
            warn!(command = title, subject, operation = id, %error, "operation failed");
            if let Err(error) = operations::note_error(&actor, id, error).await {
                warn!(operation = id, %error, "cannot record the failure of the operation");
            }
        }
        drop((place, listed)); // in this order
        outcome
    });
    let mut response = match tokio::time::timeout(caller.wait, carried_on).await {
        Ok(Ok(outcome)) => done(created, &outcome?),
        _ => answered(StatusCode::ACCEPTED, &operations::show(&caller.actor, id).await?),
    };
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/operations/{id}")) {
        response.headers_mut().insert(LOCATION, place);
    }
    Ok(response)
}

/// The operation, once it has ended or after `?wait=`.
pub async fn follow(caller: &Caller, id: i64) -> Result<OperationSummary, AdminError> {
    let until = Instant::now() + caller.wait;
    loop {
        let operation = operations::show(&caller.actor, id).await?;
        if operation.is_over() {
            caller.api.running.until_over(id).await;
            caller.api.context.until_applied().await;
            return Ok(operation);
        }
        if Instant::now() >= until {
            return Ok(operation);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
