//! How a node begins: with the central database, or without it with the snapshot of the directory.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use super::{
    central::{Central, CentralError},
    directory::{CentralDirectory, snapshot::About},
    migrations,
    node::{NodeError, refused},
};
use crate::config::Config;

/// Wait between attempts to reach the central database.
const PAUSE: Duration = Duration::from_millis(250);
/// The same in a node that serves already.
const PAUSE_OF_NODE: Duration = Duration::from_secs(1);

/// What a node begins with.
pub enum Beginning {
    /// The central database answers, and its schema can be used.
    Central,
    /// It does not. Logins are admitted from a snapshot.
    Snapshot(Box<About>),
}

/// Asks the central database, and takes the snapshot where it does not answer, for example after a restart of the
/// machine or a failover. Without a usable snapshot it asks again. Other errors are returned at once.
pub async fn begin(
    central: &Central,
    directory: &CentralDirectory,
    config: &Config,
) -> Result<Beginning, NodeError> {
    let begun = Instant::now();
    let mut is_logged = false;
    loop {
        let error = match central.client().await {
            Ok(client) => {
                report_schema(migrations::require_usable(&**client).await.map_err(refused)?);
                drop(client);
                directory.load_mock_salt().await.map_err(refused)?;
                return Ok(Beginning::Central);
            }
            Err(error) => error,
        };
        if !error.passes() {
            return Err(refused(error));
        }
        if let Some(about) = directory.begin_with_snapshot(&error).await {
            warn!(side = "central", %error, "the central database does not answer; starting with the snapshot of the directory");
            return Ok(Beginning::Snapshot(Box::new(about)));
        }
        if begun.elapsed() >= config.timeouts.central_start {
            return Err(refused(error));
        }
        if !std::mem::replace(&mut is_logged, true) {
            warn!(side = "central", %error, "waiting for the central database, for central_start_timeout at most");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Looks at what [`begin`] could not ask, as soon as the central database answers.
pub async fn make_up(central: Central, directory: Arc<CentralDirectory>) {
    loop {
        let asked = async {
            let schema = migrations::require_usable(&**central.client().await?).await;
            directory.load_mock_salt().await?;
            Ok::<_, CentralError>(schema)
        };
        match asked.await {
            Ok(Ok(found)) => return report_schema(found),
            // As when another version's `init` is run while a node serves: what works goes on.
            Ok(Err(error)) => {
                return error!(side = "central", %error, "this node cannot use the central schema");
            }
            Err(_) => tokio::time::sleep(PAUSE_OF_NODE).await,
        }
    }
}

/// Logs a schema of another version that the node works with.
fn report_schema(found: i32) {
    let known = migrations::latest();
    if found < known {
        warn!(
            found,
            known,
            "the central schema is older than this pglobby; what needs the newer one is off until `pglobby init`"
        );
    } else if found > known {
        info!(found, known, "the central schema is newer than this pglobby, and works with it");
    }
}
