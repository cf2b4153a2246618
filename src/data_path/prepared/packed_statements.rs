//! Prepared statements of a session that moves to another process, which has numbers and tables of its own. Pure.

use std::sync::{Arc, atomic::Ordering};

use super::{
    ClientStatements, Statement, parse_settings::ParseSettings, row_description::RowDescription,
    shared_statements::SharedStatements, sql_prepare_effects::END_OF_PREPARE,
};
use crate::data_path::{
    packed_session::{PackedStatement, PackedUnnamed},
    prepared::shared_statements::replaced,
    session_state::{Settings, side_effects::SideEffects},
};

impl ClientStatements {
    /// `None`: one of the named statements depends on what only this process knows.
    pub fn pack(&self) -> Option<Vec<PackedStatement>> {
        let deferred = |name: &[u8]| self.rare.as_ref().is_some_and(|rare| rare.deferred.contains(name));
        self.named.iter().map(|(name, statement)| statement.pack(name, deferred(name))).collect()
    }

    /// Packs the unnamed statement, if there is one. `None`: it depends on what only this process knows.
    pub fn pack_unnamed(&self) -> Option<Option<PackedUnnamed>> {
        if self.unnamed.serial == 0 {
            return Some(None);
        }
        let unnamed = self.stored_unnamed().filter(|unnamed| unnamed.sql_names.is_none())?;
        let under = unnamed.parsed_under.as_ref().and_then(|under| under.values());
        Some(Some(PackedUnnamed { body: unnamed.body.clone(), parsed_under: under.map(Settings::pack) }))
    }
}

impl Statement {
    /// A statement whose text names others, or that has its client's name on servers, cannot be packed.
    fn pack(&self, name: &[u8], is_deferred: bool) -> Option<PackedStatement> {
        if self.sql_names.is_some() || self.has_client_name() {
            return None;
        }
        let body = self.body();
        let (body, in_sql) = match &self.renamed {
            Some((at, client)) => {
                let text = body.strip_suffix(END_OF_PREPARE)?;
                let text = replaced(text, *at..*at + self.server_name.len(), client);
                (text, Some((*at, *at + client.len())))
            }
            None => (body.to_vec(), None),
        };
        Some(PackedStatement {
            name: name.to_vec(),
            body,
            in_sql,
            parsed_under: self.parsed_under.values().map(Settings::pack),
            is_shared: self.is_shared,
            was_parsed: self.was_parsed(),
            is_deferred,
            description: self.description.get().map(|description| description.to_bits()),
        })
    }
}

impl SharedStatements {
    /// The settings of a packed statement.
    pub fn unpack_settings(&self, packed: Option<&Settings>) -> Arc<ParseSettings> {
        packed.map_or_else(ParseSettings::unknown, |settings| self.settings.of(settings))
    }

    /// The statement of a client that has come from another process. `side_effects`: those of the text that it
    /// runs.
    pub fn unpack(
        &self,
        packed: &PackedStatement,
        under: &Arc<ParseSettings>,
        side_effects: SideEffects,
    ) -> Arc<Statement> {
        let statement = match packed.in_sql {
            Some((from, to)) => self.in_sql(side_effects, &packed.body, from..to, under),
            None if packed.is_shared => self.intern(&packed.body, under, || side_effects),
            None => self.own(&packed.body, under, side_effects, None),
        };
        let statement = match packed.description.map(RowDescription::from_bits) {
            Some(description) => self.described_as(statement, description),
            None => statement,
        };
        statement.was_parsed.fetch_or(packed.was_parsed, Ordering::Relaxed);
        statement
    }

    /// The statement for a client that has got this description.
    fn described_as(&self, statement: Arc<Statement>, description: RowDescription) -> Arc<Statement> {
        if *statement.description.get_or_init(|| description) == description {
            return statement;
        }
        self.add_own(Statement {
            is_description_checked: true,
            has_fixed_meaning: statement.has_fixed_meaning,
            description: description.into(),
            ..Statement::new(
                statement.text(),
                statement.side_effects.clone(),
                &statement.parsed_under,
                &self.memory,
            )
        })
    }
}

#[cfg(test)]
impl Statement {
    /// As if a server had parsed it.
    pub fn set_parsed(&self) {
        self.was_parsed.store(true, Ordering::Relaxed);
    }

    /// As if its client had got a description.
    pub fn set_description(&self, bits: u64) {
        if self.is_description_checked {
            let _ = self.description.set(RowDescription::from_bits(bits));
        }
    }
}
