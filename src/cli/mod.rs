//! The command line.

pub mod dev;
pub mod running_dev;
