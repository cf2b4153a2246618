//! pglobby: one PostgreSQL endpoint in front of a database per tenant.
//!
//! Two paths and the protocol they share:
//!
//! - [`data_path`]: one client connection, in the order things happen to it. Start reading at
//!   [`data_path::serve_client`].
//! - [`control_path`]: everything a running query never waits for: central database, onboarding, reload,
//!   admin console, metrics.
//! - [`wire`]: PostgreSQL's messages and streams. It knows no tenant and no pool.
//!
//! Allowed use is `cli -> control_path -> data_path -> wire, config`. The data path asks for logins and
//! tenants through a trait of its own, [`data_path::directory::Directory`].
//!
//! What holds everywhere:
//!
//! 1. After login no query waits for the central database, except a choice of tenant that is not cached and a change
//!    of one's own password.
//! 2. A server connection belongs to one tenant and one role for life, proved when it is opened
//!    (`current_database`, `session_user` as reported by the server equal the tenant's row), and has one holder
//!    at a time.
//! 3. An employee session belongs to one tenant for life. Only a service login may change tenant, only outside
//!    a transaction, only to a tenant it is granted.
//! 4. A server goes back to its pool only when no reply is pending, its status is idle, no cancel is in flight and
//!    every effect of the session is undone. If that is uncertain, it is closed.
//! 5. After startup only the relay moves bytes; bodies it need not read are passed on unread and uncopied.
//! 6. Every queue, map, cache, buffer and wait has a limit; those that an operator may change have a name in `config/settings.rs`.
//! 7. Nothing a client sends reaches a lookup, provisioning or master connection except as a bound parameter.
//! 8. Input from a network, from either side, never panics and never grows memory without bound: every byte that a client
//!    makes the proxy keep is counted against a limit of its session, its tenant and the process.
//! 9. Two sessions share a prepared statement on a server only where PostgreSQL parses its text alike for both.
//! 10. No code that a tenant can define runs with more rights than the tenant's own role has, whatever an operator does.
//! 11. What a client believes of its session (ParameterStatus, transaction status, process number) is what the answering
//!     server does.
//! 12. The servers that all nodes hold on a host never exceed its budget, but for what a node keeps that cannot be reached, and a
//!     waiting tenant gets its fair share.

pub mod cli;
pub mod config;
pub mod control_path;
pub mod data_path;
pub mod error;
#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "runs in tests only")]
pub mod fuzzing;
pub mod local_postgres;
pub mod metrics;
pub mod shutdown;
pub mod wire;
