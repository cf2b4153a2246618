//! Connections to servers: dialled, encrypted, logged in, verified to be the tenant's (invariant 2), reset.

pub mod address_roles;
pub mod connection;
pub mod dial;
pub mod dial_error;
#[cfg(test)]
mod hostile_server_tests;
mod login;
mod reset;
mod scram;

pub use self::address_roles::{AddressRole, AddressRoles};
pub use self::dial::{DialOptions, DialTarget, NewConnection, OnAnswer, open, pass_on_cancel, send_cancel};
pub use self::dial_error::{DialError, IdentityTrouble, TroubleKind};
pub(in crate::data_path) use self::scram::hmac;

#[cfg(any(test, fuzzing))]
pub(crate) use self::scram::answer_scram;
