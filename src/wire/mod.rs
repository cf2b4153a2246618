//! PostgreSQL's messages and streams. Knows no tenant and no pool.

pub mod frame;
pub mod message;
pub mod outgoing;
pub mod stream;
pub mod tls_client_side;
pub mod unsent;
