//! Server connections: opening one, and what we hold.

pub mod connection;
pub mod dial;
