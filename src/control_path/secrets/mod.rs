//! Credentials: sealed for the central database, hashed for logins; and the sealing keys.

pub mod key_rotation;
pub mod keyring;
pub mod keyring_reload;
pub mod scram_verifier;
pub mod seal;
