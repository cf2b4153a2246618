//! Keeps this node's row up to date, on a connection of its own: a busy pool of connections delays no beat.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, timeout};
use tokio_postgres::Client;
use tracing::{info, warn};

use super::registration::Registration;
use crate::control_path::central::{Central, causes};

/// Interval of beats.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Without an answer for so long, the connection is replaced.
const ANSWER_WITHIN: Duration = Duration::from_millis(1500);

/// Beats until it is dropped.
pub async fn keep(central: Central, registration: Arc<Registration>) {
    let mut interval = tokio::time::interval(BEAT_EVERY);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut client = None;
    let mut is_lost = false;
    loop {
        interval.tick().await;
        let beaten = beat(&central, &registration, &mut client).await;
        match &beaten {
            Ok(()) if is_lost => info!(side = "central", "node beats again"),
            Err(cause) if !is_lost => warn!(side = "central", cause, "node cannot beat; retrying"),
            _ => {}
        }
        is_lost = beaten.is_err();
        if is_lost {
            client = None;
        }
    }
}

async fn beat(
    central: &Central,
    registration: &Registration,
    client: &mut Option<Client>,
) -> Result<(), String> {
    let work = async {
        if client.as_ref().is_none_or(Client::is_closed) {
            *client = Some(central.connect_to(central.database()).await.map_err(|error| error.to_string())?);
        }
        let Some(client) = client else { return Ok(()) };
        let beaten = async {
            let is_there = registration.id().is_some() && registration.beat(client).await?;
            if !is_there {
                registration.insert(client).await?;
            }
            Ok(())
        };
        beaten.await.map_err(|error: tokio_postgres::Error| causes(&error))
    };
    match timeout(ANSWER_WITHIN, work).await {
        Ok(done) => done,
        Err(_) => Err(format!("no answer within {ANSWER_WITHIN:?}")),
    }
}
