//! The sessions of this node, and what other tasks see of a session and want from it.

pub mod mailbox;
pub mod registry;
pub mod timeouts;
