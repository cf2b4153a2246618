//! One client connection, in the order things happen to it.

pub mod server;
pub mod tenant;
