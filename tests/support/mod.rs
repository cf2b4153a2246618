//! What the tests run against: a real PostgreSQL, the real proxy, and clients that can send anything.
//!
//! A test owns what it starts and stops it by drop, so that tests can run at the same time and in any process.
#![allow(dead_code, unused_imports, reason = "each test file is a crate of its own and uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    missing_docs,
    reason = "in tests, everything unexpected ends the test"
)]

pub mod admin;
pub mod api;
pub mod certificates;
pub mod client;
pub mod cluster;
pub mod comparison;
pub mod console;
pub mod forwarder;
pub mod hostile;
pub mod installation;
pub mod node;
pub mod ports;
pub mod proxy;
pub mod tls;
pub mod wire;

pub use api::{Api, Reply};
pub use client::Client;
pub use cluster::Cluster;
pub use forwarder::Forwarder;
pub use installation::Installation;
pub use node::{Node, Replaced};
pub use proxy::Proxy;
pub use wire::Wire;
