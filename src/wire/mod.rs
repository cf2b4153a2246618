//! PostgreSQL's messages and streams, without tenants or pools.

pub mod frame;
#[cfg(test)]
pub mod memory_pipe;
pub mod message;
pub mod message_reader;
pub mod outgoing;
pub mod server_error;
pub mod stream;
pub mod tls;
pub mod unsent;
