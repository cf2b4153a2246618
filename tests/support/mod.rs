//! What the tests in this folder run against: a real PostgreSQL, the real proxy, and clients that can misbehave.
//!
//! Every test owns what it starts and loses it by drop, so tests run side by side and in processes of their own.
#![allow(dead_code, unused_imports, reason = "each test file is a crate of its own and uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    missing_docs,
    reason = "these are tests: whatever is not as expected ends the test, loudly"
)]

pub mod api;
pub mod certificates;
pub mod client;
pub mod cluster;
pub mod console;
pub mod desk;
pub mod forwarder;
pub mod hostile;
pub mod lobby;
pub mod ports;
pub mod proxy;
pub mod wire;

pub use api::{Api, Reply};
pub use client::Client;
pub use cluster::Cluster;
pub use forwarder::Forwarder;
pub use lobby::Lobby;
pub use proxy::Proxy;
pub use wire::Wire;
