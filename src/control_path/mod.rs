//! Everything a running query never waits for.

pub mod central;
pub mod central_tls;
pub mod keyring;
pub mod seal;
pub mod verifier;
