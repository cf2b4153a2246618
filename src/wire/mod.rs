//! PostgreSQL's messages and streams. Knows no tenant and no pool.

pub mod frame;
pub mod message;
pub mod outgoing;
pub mod stream;
pub mod unsent;
