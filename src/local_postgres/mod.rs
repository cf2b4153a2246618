//! A PostgreSQL cluster on this machine, for `pglobby dev` and for the tests.

pub mod binaries;
pub mod cluster;
pub mod os_user;
