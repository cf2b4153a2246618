//! The state of a session that every server must have before it runs the session's requests, and how SQL
//! changes it. Pure.

pub mod channels;
pub mod custom_names;
pub mod identity;
pub mod parameter_status;
pub mod parameters;
pub mod pins;
pub mod resets;
pub mod role_settings;
pub mod server_role;
pub mod settings;
pub mod side_effects;
pub mod state_query;
pub mod temporary_use;

pub use self::settings::Settings;
