//! The messages between a client and the server of its lease: bytes in, bytes out. Pure; `relay/mod.rs` does
//! the I/O.
//!
//! Most messages are passed on by their five-byte header, from one buffer to the other side. The proxy reads
//! more of a few: the names in Parse, Bind, Describe and Close, the text of a query, the status in
//! ReadyForQuery.
//!
//! Source: PostgreSQL documentation, "Message Formats" and "Message Flow".

mod client_messages;
mod client_side;
mod deferred_parse;
mod ensure_prepared;
mod message_limits;
mod packed_side;
mod parameter_reports;
mod parse_results;
pub mod parse_under;
pub mod pending_checks;
pub mod pending_replies;
mod pg_terminate_backend;
mod prepare;
#[cfg(test)]
mod property_tests;
mod read_ahead;
mod restore_settings;
mod restore_startup;
pub mod return_to_tenant;
mod reusable;
mod sequences;
mod server_side;
mod skipped_messages;
mod sql_prepare;
mod tenant_choice;
#[cfg(test)]
mod torn_connection_tests;
mod unnamed_statement;
pub mod unread_request;
mod unstored_text;
mod visible_statements;
mod without_server;

pub use self::client_messages::is_cut_short;
pub use self::client_side::{ClientSide, Flow, SessionRules, need_of_client, violation};
pub use self::message_limits::startup_charge;
pub use self::pg_terminate_backend::SignalSender;
pub use self::read_ahead::ReadAhead;
pub use self::restore_settings::Repeated;

pub use self::server_side::{ChunkEvents, ExchangeError, ServerSide};
pub use self::skipped_messages::{FIRST_MESSAGE_BYTES, FirstMessage, invalid_format};
pub use self::tenant_choice::kind_and_name;
