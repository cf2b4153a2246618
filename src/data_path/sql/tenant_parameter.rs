//! `pglobby.tenant`: how a text uses the parameter that selects the tenant. Pure.

use super::{Argument, Discard, Effects, Kind, SetConfig, Statement};

/// The parameter that selects the tenant. Servers have it too, from their startup packet, so that SHOW works.
pub const PARAMETER: &str = "pglobby.tenant";

/// How a text uses the session's tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum TenantMention {
    /// Nothing.
    #[default]
    None,
    /// Contains RESET ALL or DISCARD ALL, which return to the tenant at session start.
    Resets,
    /// Sets or resets the parameter, possibly among other things.
    Sets,
}

impl TenantMention {
    /// Returns the mention in one statement.
    pub fn of(statement: &Statement<'_>) -> Self {
        let is_parameter = |name: &[u8]| name == PARAMETER.as_bytes();
        match &statement.kind {
            Kind::Set { name, .. } | Kind::Reset(name) if is_parameter(name) => return Self::Sets,
            Kind::ResetAll | Kind::Discard(Discard::All) => return Self::Resets,
            _ => {}
        }
        let calls = (statement.effects | statement.deferred).contains(Effects::SET_CONFIG);
        let names = |call: SetConfig<'_>| matches!(call.name, Argument::Text(name) if is_parameter(&name));
        if calls && statement.set_configs().any(names) { Self::Sets } else { Self::None }
    }
}
