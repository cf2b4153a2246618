//! PostgreSQL's messages and streams. Knows no tenant and no pool.

pub mod message;
pub mod message_reader;
pub mod stream;
pub mod tls;
