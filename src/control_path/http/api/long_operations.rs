//! Long work: begun, answered with an operation to follow, and carried on whether or not anybody is there to hear.

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

/// How often the row of an operation is looked at for somebody who follows it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What is carried on at this node.
pub struct RunningOperations {
    /// `max_operations`.
    pub places: Arc<Semaphore>,
    ids: watch::Sender<BTreeSet<i64>>,
}

impl RunningOperations {
    /// Nothing yet; `max_operations` at a time.
    pub fn new(max_operations: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(max_operations)), ids: watch::Sender::default() }
    }

    /// Returns when the operation is over here, too: its row says so a moment before its place is free.
    async fn until_over(&self, id: i64) {
        let _ = self.ids.subscribe().wait_for(|ids| !ids.contains(&id)).await;
    }
}

/// Takes an operation off the list of those under way, however it ends.
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

/// Tells which row the work is, once.
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

/// Begins `order` and answers 202 with its operation; or with the outcome, if that is there within `wait`. What is wrong
/// from the outset is told at once. A caller that leaves before anything was recorded has asked for nothing; from then
/// on the work goes on by itself.
///
/// # Errors
/// [`ApiError`].
pub async fn begin(caller: &Caller, command: AdminCommand, wait: Duration) -> Result<Response, ApiError> {
    caller.admit(&command).await?;
    let Ok(place) = caller.api.running.places.clone().try_acquire_owned() else {
        return Err(ApiError::new(
            "too_many_requests",
            "as many operations are under way as max_operations of [http] allows; follow them at /v1/operations",
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
    info!(actor = caller.actor.name, command = title, subject, operation = id, "an operation begins");
    let actor = caller.actor.clone();
    let listed = ListedOperation::new(caller.api.running.clone(), id);
    let carried_on = tokio::spawn(async move {
        let outcome = work.await;
        if let Err(error) = &outcome {
            warn!(command = title, subject, operation = id, %error, "an operation has failed");
            if let Err(error) = operations::note_error(&actor, id, error).await {
                warn!(operation = id, %error, "the failure could not be recorded");
            }
        }
        drop((place, listed)); // in this order
        outcome
    });
    let mut response = match tokio::time::timeout(wait, carried_on).await {
        Ok(Ok(outcome)) => done(created, &outcome?),
        _ => answered(StatusCode::ACCEPTED, &operations::show(&caller.actor, id).await?),
    };
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/operations/{id}")) {
        response.headers_mut().insert(LOCATION, place);
    }
    Ok(response)
}

/// An operation as it stands, or as it stands when it is over, if that is within `wait`.
///
/// # Errors
/// [`AdminError::NotFound`], or the central database.
pub async fn follow(caller: &Caller, id: i64, wait: Duration) -> Result<OperationSummary, AdminError> {
    let until = Instant::now() + wait;
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
