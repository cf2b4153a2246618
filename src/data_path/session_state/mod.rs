//! What a session has that a server must have too before it serves it, and what its texts may change about that. Pure.

pub mod channels;
pub mod identity;
pub mod parameter_status;
pub mod parameters;
pub mod pins;
pub mod resets;
pub mod role_settings;
pub mod settings;
pub mod side_effects;
pub mod state_query;

pub use self::settings::Settings;
