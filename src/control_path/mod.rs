//! Everything a running query never waits for.

pub mod cluster_owner;
pub mod local_cluster;
pub mod postgres_binaries;
