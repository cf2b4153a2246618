//! One client connection, in the order things happen to it.

pub mod authentication;
pub mod cancel;
pub mod destination;
pub mod exchange;
pub mod farewell;
pub mod lease;
pub mod pool;
pub mod prepared;
pub mod relay;
pub mod server;
pub mod session;
pub mod session_state;
pub mod startup;
pub mod startup_options;
pub mod statement;
pub mod tenant;
pub mod worker;
