//! The client's side of a session that moves to another process.

use std::sync::Arc;

use super::{
    client_side::{ClientSide, SessionRules},
    message_limits::startup_charge,
    parameter_reports::lexing_under,
    sequences::SequenceUse,
};
use crate::{
    data_path::{
        packed_session::{PackedSide, PackedStatement, PackedUnnamed},
        session_state::{
            Settings,
            parameter_status::ReportedParameters,
            role_settings::{RoleSettings, StartSettings},
            side_effects::SideEffects,
        },
        sql::{self, Kind, Lexing},
    },
    error::ClientError,
    wire::frame::cstr,
};

impl ClientSide {
    /// `None`: it is in the middle of something, or depends on what only this process knows.
    pub fn pack(&self) -> Option<PackedSide> {
        if !self.rules.follow || !self.framer.is_clear() || self.is_skipping_messages() {
            return None;
        }
        let (custom, has_unnamed_custom) = self.rules.shared_statements.custom_names.pack(self.custom);
        Some(PackedSide {
            startup: self.startup.pack(),
            wanted: self.wanted.pack(),
            custom,
            has_unnamed_custom,
            reported: self.sent_parameters.pack(),
            start: self.start_settings.known().map(RoleSettings::pack),
            statements: self.statements.pack()?,
            unnamed: self.statements.pack_unnamed()?,
            sequence_trials: self.sequence_use.trials,
            reads_sequences: self.sequence_use.reads,
            sees_binds: self.rules.sees_binds,
        })
    }

    /// A session that has come from another process. `first_serial` as for [`Self::new`]. An error: it exceeds a
    /// limit of this process.
    pub fn unpack(packed: PackedSide, rules: SessionRules, first_serial: u64) -> Result<Self, ClientError> {
        let startup = Arc::new(Settings::new(packed.startup));
        let startup_memory = startup_charge(&startup, &rules.memory)?;
        let custom_names = &rules.shared_statements.custom_names;
        let custom = custom_names.unpack(&packed.custom, packed.has_unnamed_custom);
        let mut side = Self::new(rules, startup.clone(), first_serial);
        side.startup_memory = startup_memory;
        let wanted = Settings::new(packed.wanted);
        if wanted != *startup {
            side.keep(Arc::new(wanted)).map_err(|limit| side.rules.too_much(limit))?;
        }
        side.custom.insert(custom);
        side.sent_parameters = ReportedParameters::unpack(&packed.reported);
        if let Some(start) = packed.start {
            side.start_settings = StartSettings::Earlier(Arc::new(RoleSettings::unpack(start)));
        }
        side.sequence_use = SequenceUse::arrived(packed.sequence_trials, packed.reads_sequences);
        if packed.reads_sequences {
            side.rules.functions.record_sequence_read();
        }
        side.rules.sees_binds = packed.sees_binds;
        side.update_parse_settings();
        for statement in &packed.statements {
            side.unpack_statement(statement)?;
        }
        if let Some(unnamed) = packed.unnamed {
            side.unpack_unnamed(&unnamed)?;
        }
        Ok(side)
    }

    fn unpack_statement(&mut self, packed: &PackedStatement) -> Result<(), ClientError> {
        self.rules
            .admit_text(&self.statements, &packed.name, &packed.body)
            .map_err(|limit| self.rules.too_much(limit))?;
        let settings = packed.parsed_under.clone().map(Settings::new);
        let lexing = lexing_under(settings.as_ref().unwrap_or(&self.wanted), Lexing::default());
        let side_effects = match packed.in_sql {
            Some(_) => match prepared_text(&packed.body, lexing) {
                Some(text) => SideEffects::read(text, lexing),
                None => SideEffects::of_unstored_text(),
            },
            None => SideEffects::read(cstr(&mut &*packed.body).unwrap_or_default(), lexing),
        };
        let table = &self.rules.shared_statements;
        let under = table.unpack_settings(settings.as_ref());
        let statement = table.unpack(packed, &under, side_effects);
        self.statements.insert(&packed.name, statement);
        if packed.is_deferred {
            self.statements.defer(&packed.name);
        }
        Ok(())
    }

    fn unpack_unnamed(&mut self, packed: &PackedUnnamed) -> Result<(), ClientError> {
        self.rules.memory.admits(packed.body.len()).map_err(|limit| self.rules.too_much(limit))?;
        let settings = packed.parsed_under.clone().map(Settings::new);
        let lexing = lexing_under(settings.as_ref().unwrap_or(&self.wanted), Lexing::default());
        let side_effects = SideEffects::read(cstr(&mut &*packed.body).unwrap_or_default(), lexing);
        let under = settings.map(|settings| self.rules.shared_statements.settings.of(&settings));
        self.unnamed_serial += 1;
        self.statements.set_unnamed(self.unnamed_serial, &packed.body, side_effects, None, under.as_ref());
        Ok(())
    }
}

/// What a PREPARE prepares.
fn prepared_text(sql: &[u8], lexing: Lexing) -> Option<&[u8]> {
    sql::statements(sql, lexing).find_map(|statement| match statement.kind {
        Kind::Prepare { body, .. } => statement.text.get(body),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules() -> SessionRules {
        SessionRules {
            follow: true,
            statements_max: 100,
            statements_bytes_max: 1 << 20,
            settings_max: 100,
            settings_bytes_max: 1 << 20,
            ..SessionRules::default()
        }
    }

    fn settings() -> impl Strategy<Value = Settings> {
        let name =
            prop::sample::select(vec!["timezone", "search_path", "app.user", "standard_conforming_strings"]);
        let value = prop::sample::select(vec!["on", "off", "", "é'\\"]);
        let pair = (name, value).prop_map(|(name, value)| (name.to_owned(), value.to_owned()));
        prop::collection::vec(pair, 0..5).prop_map(Settings::new)
    }

    #[derive(Debug, Clone)]
    enum Step {
        Parse { name: &'static str, sql: &'static str },
        Prepare { name: &'static str },
        Defer { name: &'static str },
        Parsed { name: &'static str },
        Described { name: &'static str, bits: u64 },
        Set(Settings),
    }

    fn step() -> impl Strategy<Value = Step> {
        let name = || prop::sample::select(vec!["", "a", "b", "pglobby_7"]);
        let sql =
            prop::sample::select(vec!["SELECT 1", "SELECT $1", "INSERT INTO t VALUES (1)", "SET x.y = 'z'"]);
        prop_oneof![
            4 => (name(), sql).prop_map(|(name, sql)| Step::Parse { name, sql }),
            2 => name().prop_map(|name| Step::Prepare { name }),
            1 => name().prop_map(|name| Step::Defer { name }),
            1 => name().prop_map(|name| Step::Parsed { name }),
            1 => (name(), 0..3_u64).prop_map(|(name, bits)| Step::Described { name, bits }),
            2 => settings().prop_map(Step::Set),
        ]
    }

    fn apply(side: &mut ClientSide, step: Step) {
        match step {
            Step::Parse { name, sql } => {
                let body = [sql.as_bytes(), &[0, 0, 0]].concat();
                side.prepare_without_server(name.as_bytes(), &body).unwrap();
            }
            Step::Prepare { name: "" } => {}
            Step::Prepare { name } => {
                let text = format!("PREPARE {name} AS SELECT 1");
                let under = side.parse_settings.0.clone();
                let range = 8..8 + name.len();
                let effects = SideEffects::default();
                let statement = side.rules.shared_statements.in_sql(effects, text.as_bytes(), range, &under);
                side.statements.insert(name.as_bytes(), statement);
            }
            Step::Defer { name } if side.statements.get(name.as_bytes()).is_some() => {
                side.statements.defer(name.as_bytes());
            }
            Step::Parsed { name } => {
                if let Some(statement) = side.statements.get(name.as_bytes()) {
                    statement.set_parsed();
                }
            }
            Step::Described { name, bits } => {
                if let Some(statement) = side.statements.get(name.as_bytes()) {
                    statement.set_description(bits);
                }
            }
            Step::Set(settings) => side.keep(Arc::new(settings)).unwrap(),
            Step::Defer { .. } => {}
        }
    }

    /// In the order of names.
    fn packed(side: &ClientSide) -> serde_json::Value {
        let mut packed = side.pack().unwrap();
        packed.statements.sort_by(|one, other| one.name.cmp(&other.name));
        serde_json::to_value(packed).unwrap()
    }

    proptest! {
        /// Packed again, a session that has moved is the same, also where others have brought the same texts before.
        #[test]
        fn a_session_that_has_moved_is_the_same(
            startup in settings(),
            steps in prop::collection::vec(step(), 0..12),
            others in prop::collection::vec(step(), 0..6),
        ) {
            let mut here = ClientSide::new(rules(), Arc::new(startup), 1 << 32);
            steps.into_iter().for_each(|step| apply(&mut here, step));
            let there = rules();
            let mut other = ClientSide::new(there.clone(), Arc::default(), 2 << 32);
            others.into_iter().for_each(|step| apply(&mut other, step));
            let before = packed(&other);

            let moved = serde_json::from_value(packed(&here)).unwrap();
            let moved = ClientSide::unpack(moved, there, 3 << 32).unwrap();

            let (mut expected, found) = (packed(&here), packed(&moved));
            // A text that a server has parsed for another session counts as parsed.
            let statements = expected["statements"].as_array_mut().unwrap();
            for (expected, found) in statements.iter_mut().zip(found["statements"].as_array().unwrap()) {
                prop_assert!(found["was_parsed"] == true || expected["was_parsed"] == false);
                expected["was_parsed"] = found["was_parsed"].clone();
                if expected["description"].is_null() {
                    expected["description"] = found["description"].clone();
                } else {
                    expected["is_shared"] = found["is_shared"].clone();
                }
            }
            prop_assert_eq!(expected, found);
            prop_assert_eq!(before["unnamed"].clone(), packed(&other)["unnamed"].clone());
        }
    }
}
