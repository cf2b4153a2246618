//! The nodes that share a central database: each has a row there, and a part of each host's budget.
//!
//! No node is in charge. Each writes its own rows, reads those of the others, and decides by the same rules. No
//! query of a client waits for any of it.

pub mod identity;
pub mod membership;
pub mod registration;
