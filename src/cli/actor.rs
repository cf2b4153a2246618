//! What the operators' commands have in common: who acts.

use std::sync::Arc;

use crate::{
    cli::{Failure, Globals},
    control_path::{
        admin::actor::Actor, central::Central, migrations, secrets::keyring_reload::ReloadableKeyring,
    },
};

/// The person at this command line, with the central database and the key ring at hand.
///
/// # Errors
/// Configuration, keys, or the central database's schema.
pub async fn operator(globals: &Globals) -> Result<Actor, Failure> {
    let config = globals.load_config()?;
    let keyring = ReloadableKeyring::load(&config)?;
    let central = Central::open(&config)?;
    migrations::require_current(&**central.client().await?).await?;
    Ok(Actor::new(central, Arc::new(keyring), actor()))
}

/// Who is recorded; `sudo` hides nobody.
fn actor() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|key| std::env::var(key).ok());
    let name = name.filter(|name| !name.is_empty());
    format!("os:{}", name.unwrap_or_else(|| rustix::process::getuid().as_raw().to_string()))
}
