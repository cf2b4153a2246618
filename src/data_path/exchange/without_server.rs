//! Statements that a client prepares while it holds no server, and the session's change of tenant.

use std::{borrow::Cow, sync::Arc};

use super::{client_side::ClientSide, parameter_reports::lexing_under, return_to_tenant::CurrentTenant};
use crate::{
    data_path::{
        functions::FunctionEffects, memory_limit::Account, prepared::shared_statements::SharedStatements,
        session_state::side_effects::SideEffects, sql::Lexing, tenant::TenantAccess,
    },
    error::Limit,
    wire::frame::cstr,
};

impl ClientSide {
    /// How a server would read string literals for this session.
    pub fn lexing(&self) -> Lexing {
        lexing_under(&self.wanted, Lexing::default())
    }

    /// Prepares a statement without a server. `body` is the Parse message after the name. The Parse goes to a
    /// server before the first use of the statement there.
    pub fn prepare_without_server(&mut self, name: &[u8], body: &[u8]) -> Result<(), Limit> {
        let side_effects = SideEffects::read(cstr(&mut { body }).unwrap_or_default(), self.lexing());
        self.update_parse_settings();
        let under = &self.parse_settings.0;
        self.rules.sees_binds = true;
        if name.is_empty() {
            self.unnamed_serial += 1;
            self.statements.set_unnamed(self.unnamed_serial, body, side_effects, None, Some(under));
            return Ok(());
        }
        self.rules.admit_text(&self.statements, name, body)?;
        let statement = self.rules.shared_statements.intern(body, under, || side_effects);
        self.statements.insert(name, statement);
        Ok(())
    }

    /// The text of a prepared statement.
    pub fn prepared_text(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        self.statements.text(name)
    }

    /// Sets the roles under which the session's servers log in.
    pub fn set_tenant_access(&mut self, tenant_access: Arc<TenantAccess>) {
        self.rules.identity.tenant_access = Some(tenant_access);
    }

    /// Sets how the session came to its present tenant.
    pub fn set_current_tenant(&mut self, current_tenant: CurrentTenant) {
        self.rules.current_tenant = current_tenant;
    }

    /// Moves the session to another tenant's servers. Its statements get new names there.
    pub fn move_to(
        &mut self,
        tenant_access: Option<Arc<TenantAccess>>,
        table: Arc<SharedStatements>,
        functions: Arc<FunctionEffects>,
        memory: Arc<Account>,
        follow: bool,
    ) {
        self.rules.identity.tenant_access = tenant_access;
        self.count_in(memory);
        self.statements.move_to(&table, &self.wanted, &self.rules.memory);
        self.parse_settings = (table.settings.of(&self.wanted), self.wanted.clone());
        self.wanted_custom = table.custom_names.of(&self.wanted);
        self.custom = self.wanted_custom;
        self.rules.functions = functions;
        self.rules.shared_statements = table;
        self.rules.follow = follow;
    }
}
