//! What an operator can do, whichever way it is asked for: command line, console SQL or HTTP.

pub mod actor;
pub mod api_keys;
pub mod audit;
pub mod commands;
pub mod fields;
pub mod host_connection;
pub mod host_locks;
pub mod hosts;
pub mod logins;
pub mod operations;
pub mod pg_dump;
pub mod run_on_tenants;
pub mod tenant_database;
pub mod tenants;
