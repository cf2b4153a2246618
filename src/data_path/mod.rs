//! One client connection, in the order things happen to it.

pub mod lease;
pub mod prepared;
pub mod tenant;
