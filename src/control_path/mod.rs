//! Everything a running query never waits for.

pub mod central;
pub mod central_tls;
pub mod check;
pub mod cluster_owner;
pub mod console;
pub mod directory;
pub mod doctor;
pub mod fan_out;
pub mod fleet;
pub mod host_session;
pub mod hosts;
pub mod http;
pub mod init;
pub mod key_rotation;
pub mod keyring;
pub mod local_cluster;
pub mod logins;
pub mod migrations;
pub mod notifications;
pub mod onboarding;
pub mod operator;
pub mod postgres_binaries;
pub mod seal;
pub mod serving;
pub mod tenants;
pub mod verifier;
