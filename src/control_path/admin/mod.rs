//! Admin commands, the same for the command line, the console and the HTTP API.

pub mod actor;
pub mod api_keys;
pub mod audit;
pub mod commands;
pub mod fields;
pub mod host_addresses;
pub mod host_budget;
pub mod host_connection;
pub mod host_locks;
pub mod hosts;
pub mod logins;
pub mod operations;
pub mod pg_dump;
pub mod psql;
pub mod run_on_tenants;
pub mod tenant_database;
pub mod tenants;
