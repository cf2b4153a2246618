//! PostgreSQL's messages and streams. Knows no tenant and no pool.

pub mod message;
pub mod stream;
