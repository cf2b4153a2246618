//! What passes between one client and the server it borrowed: bytes in, bytes out. Pure; the engine is `relay.rs`.
//!
//! Messages are looked at by their five-byte headers; of a few (names in Parse, Bind, Describe and Close, the text of a
//! query, the status in ReadyForQuery) more is read. Everything else goes from one buffer to the other side unread.
//!
//! Source: PostgreSQL documentation, "Message Formats" and "Message Flow".

mod away;
mod bringing;
#[cfg(test)]
mod broken_off;
mod choices;
mod client_side;
mod left_out;
mod limits;
mod naming;
mod parsed;
mod postponed;
#[cfg(test)]
mod properties;
mod reporting;
mod requests;
mod reusable;
mod sequences;
mod server_error;
mod server_side;
mod signalling;
mod startup_again;
mod unnamed;
mod unread;
mod unserved;

pub use client_side::{ClientSide, Flow, Rules, need_of_client, violation};
pub use left_out::{FIRST_MESSAGE_BYTES, Front};
pub use limits::startup_charge;
pub use server_error::ServerError;
pub use server_side::{Broken, Heard, ServerSide};
pub use signalling::Send;
