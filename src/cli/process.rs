//! Prepares the process that serves: its limit of file descriptors, and no core files.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use tracing::warn;

use crate::config::Config;

/// File descriptors beside those of clients and servers: listeners, reactors, the central database, logs.
const OWN_DESCRIPTORS: u64 = 100;

/// Raises the limit of file descriptors to what `max_client_conn` needs, and keeps credentials out of core
/// files.
///
/// Too few descriptors are a warning, not an error: the listener refuses the connections for which there is
/// none.
pub fn prepare(config: &Config) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = config.limits.max_client_conn as u64 * 2 + OWN_DESCRIPTORS;
    let reachable = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if current.is_some_and(|current| current < reachable) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(reachable), maximum });
    }
    if let Some(limit) = getrlimit(Resource::Nofile).current.filter(|limit| *limit < wanted) {
        warn!(
            limit,
            wanted,
            max_client_conn = config.limits.max_client_conn,
            "the limit of file descriptors is too low for max_client_conn"
        );
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        warn!(%error, "cannot turn off core files, which may contain credentials");
    }
}
