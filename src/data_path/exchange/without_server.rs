//! What a client prepares while it holds no server, and how its statements move to another tenant.

use std::sync::Arc;

use super::{client_side::ClientSide, return_to_tenant::CurrentTenant};
use crate::{
    data_path::{
        functions::FunctionEffects,
        memory_limit::Account,
        prepared::shared_statements::SharedStatements,
        session_state::side_effects::SideEffects,
        sql::{Characters, Lexing},
        tenant::TenantAccess,
    },
    error::Limit,
    wire::frame::cstr,
};

impl ClientSide {
    /// How servers would read string literals for this session.
    pub fn lexing(&self) -> Lexing {
        Lexing {
            standard_conforming_strings: self.wanted.get("standard_conforming_strings") != Some("off"),
            characters: Characters::of_client_encoding(
                self.wanted.get("client_encoding").unwrap_or_default().to_ascii_uppercase().as_bytes(),
            ),
        }
    }

    /// Takes a statement down that no server has seen; `body` is a Parse message's behind the name. It reaches a server in
    /// front of its first use there, if there is one.
    ///
    /// # Errors
    /// The limit that would be exceeded.
    pub fn prepare_unserved(&mut self, name: &[u8], body: &[u8]) -> Result<(), Limit> {
        let side_effects = SideEffects::read(cstr(&mut { body }).unwrap_or_default(), self.lexing());
        self.look_at_settings();
        let under = &self.parse_settings.0;
        self.rules.sees_binds = true;
        if name.is_empty() {
            self.unnamed_serial += 1;
            self.statements.set_unnamed(self.unnamed_serial, body, side_effects, None, Some(under));
            return Ok(());
        }
        self.rules.admit(&self.statements, 1, name.len() + body.len())?;
        let statement = self.rules.shared_statements.intern(body, under, || (side_effects, None));
        self.statements.insert(name, statement);
        Ok(())
    }

    /// The text of a prepared statement.
    pub fn prepared_text(&self, name: &[u8]) -> Option<&[u8]> {
        let mut body = match name {
            b"" => self.statements.unnamed_body()?,
            _ => self.statements.get(name)?.body(),
        };
        cstr(&mut body).ok()
    }

    /// The session's servers log in as these roles now.
    pub fn set_place(&mut self, place: Arc<TenantAccess>) {
        self.rules.identity.tenant_access = Some(place);
    }

    /// The session stands so to its tenant now.
    pub fn set_stance(&mut self, stance: CurrentTenant) {
        self.rules.current_tenant = stance;
    }

    /// The session goes on with another tenant's servers: its statements become that tenant's. None of them is known to
    /// any server there by what servers of the old one knew it by.
    pub fn move_to(
        &mut self,
        place: Option<Arc<TenantAccess>>,
        table: Arc<SharedStatements>,
        catalogue: Arc<FunctionEffects>,
        memory: Arc<Account>,
        follow: bool,
    ) {
        self.rules.identity.tenant_access = place;
        self.count_in(memory);
        self.statements.move_to(&table, &self.wanted, &self.rules.memory);
        self.parse_settings = (table.settings.of(&self.wanted), self.wanted.clone());
        self.rules.functions = catalogue;
        self.rules.shared_statements = table;
        self.rules.follow = follow;
    }
}
