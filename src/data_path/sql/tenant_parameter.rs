//! `pglobby.tenant`: what a text has to do with the tenant of its session. Pure.

use super::{Argument, Discard, Effects, Kind, SetConfig, Statement};

/// The parameter that names the tenant. Servers have it as well, from their startup packet on: there SHOW finds it.
pub const PARAMETER: &str = "pglobby.tenant";

/// What a text has to do with the tenant of the session that runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Talk {
    /// Nothing.
    #[default]
    Silent,
    /// It has RESET ALL or DISCARD ALL in it: back to the tenant that the session began with.
    Resets,
    /// It sets or resets the parameter, alone or among other things.
    Chooses,
}

impl Talk {
    /// Of one statement.
    pub fn of(statement: &Statement<'_>) -> Self {
        let is_parameter = |name: &[u8]| name == PARAMETER.as_bytes();
        match &statement.kind {
            Kind::Set { name, .. } | Kind::Reset(name) if is_parameter(name) => return Self::Chooses,
            Kind::ResetAll | Kind::Discard(Discard::All) => return Self::Resets,
            _ => {}
        }
        let calls = (statement.effects | statement.deferred).contains(Effects::SET_CONFIG);
        let names = |call: SetConfig<'_>| matches!(call.name, Argument::Text(name) if is_parameter(&name));
        if calls && statement.set_configs().any(names) { Self::Chooses } else { Self::Silent }
    }

    /// Whether a text that is SET LOCAL at most need be read for it: most such texts set something else. An escaped name
    /// is not looked through.
    pub fn is_possible(sql: &[u8]) -> bool {
        let has = |word: &[u8]| sql.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word));
        has(b"pglobby") || has(b"u&\"")
    }
}
