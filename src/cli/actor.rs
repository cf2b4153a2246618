//! Opens what administration commands need: configuration, key ring, central database, and the user's name.

use std::sync::Arc;

use crate::{
    cli::{Failure, Globals},
    config::Config,
    control_path::{
        admin::actor::Actor, central::Central, migrations, secrets::keyring_reload::ReloadableKeyring,
    },
};

/// Returns the user at this command line, with the central database and the key ring open.
///
/// # Errors
/// The configuration, the key ring or the central database cannot be used, or its schema is of a
/// version that this binary does not work with.
pub async fn actor(globals: &Globals) -> Result<Actor, Failure> {
    actor_with(&globals.load_config()?).await
}

/// The same with a configuration that is loaded already.
pub async fn actor_with(config: &Config) -> Result<Actor, Failure> {
    let keyring = ReloadableKeyring::load(config)?;
    let central = Central::open(config)?;
    migrations::require_usable(&**central.client().await?).await?;
    Ok(Actor::new(central, Arc::new(keyring), audit_name()))
}

/// Returns `os:NAME` for the audit log. Under sudo it is the user that called sudo.
fn audit_name() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|key| std::env::var(key).ok());
    let name = name.filter(|name| !name.is_empty());
    format!("os:{}", name.unwrap_or_else(|| rustix::process::getuid().as_raw().to_string()))
}
