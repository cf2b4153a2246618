//! Everything a running query never waits for.

pub mod central;
pub mod central_tls;
pub mod host_session;
pub mod keyring;
pub mod onboarding;
pub mod operator;
pub mod seal;
pub mod verifier;
