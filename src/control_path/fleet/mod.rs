//! The nodes that share a central database: each has a row there, and a lease on a part of each host's budget.
//!
//! No node is in charge. Each writes its own rows, reads those of the others, and decides by the same rules. No
//! query of a client waits for any of it.
//!
//! `membership.rs` renews; `lease_keeper.rs` decides, from who lives (`presence.rs`) and what each wants
//! (`allocation.rs`, `lease_decision.rs`); `lease_rows.rs` has the statements.

mod allocation;
pub mod identity;
mod lease_decision;
mod lease_keeper;
mod lease_rows;
pub mod membership;
mod peak;
mod presence;
pub mod registration;
#[cfg(test)]
mod simulation;
