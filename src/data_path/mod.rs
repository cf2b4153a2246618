//! One client connection, in the order things happen to it.

pub mod statement;
pub mod tenant;
