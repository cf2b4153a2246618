//! What the operators' commands have in common: who acts, and a sign of life while it takes long.

use std::{io::IsTerminal as _, sync::Arc, time::Duration};

use async_trait::async_trait;
use indicatif::ProgressBar;

use super::{Failure, Globals};
use crate::control_path::{
    central::Central,
    keyring::Keyring,
    migrations,
    operator::{Operator, Progress},
};

/// The person at this command line, with the central database and the key ring at hand.
///
/// # Errors
/// Configuration, keys, or the central database's schema.
pub async fn operator(globals: &Globals) -> Result<Operator, Failure> {
    let config = globals.load_config()?;
    let keyring = Keyring::load(&config)?;
    let central = Central::open(&config)?;
    migrations::require_current(&**central.client().await?).await?;
    let mut operator = Operator::new(central, Arc::new(keyring), actor());
    if std::io::stderr().is_terminal() {
        operator.progress = Some(Arc::new(Spinner(ProgressBar::new_spinner())));
    }
    Ok(operator)
}

/// Who is recorded; `sudo` hides nobody.
fn actor() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|key| std::env::var(key).ok());
    let name = name.filter(|name| !name.is_empty());
    format!("os:{}", name.unwrap_or_else(|| rustix::process::getuid().as_raw().to_string()))
}

struct Spinner(ProgressBar);

#[async_trait]
impl Progress for Spinner {
    async fn step(&self, tenant: &str, step: &str) {
        if matches!(step, "active" | "dropped" | "undone" | "rotated") {
            self.0.finish_and_clear();
        } else {
            self.0.enable_steady_tick(Duration::from_millis(100));
            self.0.set_message(format!("{tenant}: {step}"));
        }
    }
}
