//! The control path: everything that a running query never waits for.

pub mod admin;
mod beginning;
pub mod central;
pub mod check;
pub mod console;
pub mod directory;
pub mod doctor;
pub mod fleet;
mod follow_changes;
pub mod http;
pub mod init;
pub mod migrations;
pub mod node;
pub mod onboarding;
mod rhythm;
pub mod secrets;
pub mod takeover;
pub mod timestamp;
