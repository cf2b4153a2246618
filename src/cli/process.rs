//! What the process may use, set once at its start.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use tracing::warn;

use crate::config::Config;

/// Descriptors that are neither a client's nor a server's: listeners, reactors, the central database, logs.
const OWN_DESCRIPTORS: u64 = 100;

/// Raises the limit of open descriptors as far as it goes, and keeps credentials out of core files.
///
/// Too few descriptors for `max_client_conn` are no reason not to start: those who come on top are told.
pub fn prepare(config: &Config) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = config.limits.max_client_conn as u64 * 2 + OWN_DESCRIPTORS;
    let reachable = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if current.is_some_and(|current| current < reachable) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(reachable), maximum });
    }
    if let Some(now) = getrlimit(Resource::Nofile).current.filter(|now| *now < wanted) {
        warn!(
            descriptors = now,
            max_client_conn = config.limits.max_client_conn,
            "fewer descriptors than clients and servers may need"
        );
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        warn!(%error, "core files may hold credentials");
    }
}
