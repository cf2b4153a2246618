//! The sessions of this node: what other tasks can see of a session, and how they signal it.

pub mod mailbox;
pub mod moving;
pub mod passed_on;
pub mod registry;
pub mod timeouts;
