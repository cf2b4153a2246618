//! From an accepted connection to an authenticated session at its tenant.

pub mod authentication;
pub mod connection_limits;
pub mod failed_logins;
pub mod login_result;
pub mod login_turns;
pub mod password_pace;
pub mod scram_proof;
pub mod startup;
pub mod startup_options;
pub mod tenant_routing;
