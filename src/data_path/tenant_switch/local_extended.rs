//! Answers the extended protocol while no server is held: Parse, Bind, Describe, Execute and Close of a
//! choice of tenant, of BEGIN and similar statements.

use super::{
    Form, Plan,
    local_answers::{Answering, BatchResult, LocalResponder, Portal, Protocol, aborted},
    messages::{self, Type},
};
use crate::{
    data_path::exchange::{ClientSide, kind_and_name, violation},
    error::{ClientError, TenantSwitchError},
    wire::{frame::cstr, message::append},
};

/// The most open portals while no server is held; drivers use one.
const PORTALS_MAX: usize = 16;

const EXTENDED: Protocol = Protocol::Extended(false);

impl LocalResponder {
    pub(super) fn parse(&mut self, mut body: &[u8], to: &mut Answering<'_>) -> BatchResult {
        let name = cstr(&mut body).map_err(violation)?;
        let plan = Plan::of(cstr(&mut { body }).map_err(violation)?, to.side);
        if let Some(result) = self.not_answered_here(&plan, to) {
            return result;
        }
        let client_error = match plan {
            Plan::Mixed => TenantSwitchError::NotAlone.into(),
            Plan::Refused(reason) => reason.into(),
            _ if !name.is_empty() && to.side.statements.get(name).is_some() => {
                let name = String::from_utf8_lossy(name);
                let message = format!("prepared statement \"{name}\" already exists");
                ClientError::AsPostgres { sqlstate: "42P05", message }
            }
            _ => match to.side.prepare_without_server(name, body) {
                Ok(()) => return self.answered(b'1', to.replies),
                Err(limit) => to.side.rules().too_much(limit),
            },
        };
        self.fail(&client_error, EXTENDED, to)
    }

    pub(super) fn bind(&mut self, mut body: &[u8], to: &mut Answering<'_>) -> BatchResult {
        let portal = cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        let plan = plan_of(name, to.side);
        if let Some(result) = self.not_answered_here(&plan, to) {
            return result;
        }
        let (parameters, binary) =
            bound(body).ok_or_else(|| ClientError::ProtocolViolation("invalid Bind message".into()))?;
        let request = if let Plan::Choose(choice) = &plan { choice.request(&parameters) } else { None };
        if self.portals.len() >= PORTALS_MAX && !self.portals.contains_key(portal) {
            let message = format!("more than {PORTALS_MAX} portals while no server is held");
            let many = ClientError::AsPostgres { sqlstate: "53400", message };
            return self.fail(&many, EXTENDED, to);
        }
        self.portals.insert(portal.into(), Portal { plan, request, binary });
        self.answered(b'2', to.replies)
    }

    pub(super) fn describe(&mut self, body: &[u8], to: &mut Answering<'_>) -> BatchResult {
        let (kind, name) = kind_and_name(body).map_err(violation)?;
        if let Some(portal) = self.portals.get(name).filter(|_| kind == b'P') {
            describe(&portal.plan, portal.binary, to.replies);
            self.in_batch = true;
            return Ok(None);
        }
        let plan = if kind == b'S' { plan_of(name, to.side) } else { Plan::Server };
        if let Some(result) = self.not_answered_here(&plan, to) {
            return result;
        }
        messages::parameter_description(to.replies, &plan.parameters());
        describe(&plan, false, to.replies);
        self.in_batch = true;
        Ok(None)
    }

    pub(super) fn execute(&mut self, mut body: &[u8], to: &mut Answering<'_>) -> BatchResult {
        let name = cstr(&mut body).map_err(violation)?;
        let Some(Portal { plan, request, binary }) = self.portals.remove(name) else {
            return self.elsewhere(EXTENDED, to);
        };
        self.in_batch = true;
        self.run(&plan, request.as_ref(), Protocol::Extended(binary), to)
    }

    /// Removes the client's name for a statement; servers keep the statement for other clients.
    pub(super) fn close(&mut self, body: &[u8], to: &mut Answering<'_>) -> BatchResult {
        let (kind, name) = kind_and_name(body).map_err(violation)?;
        match kind {
            b'S' if name.is_empty() => to.side.statements.forget_unnamed(),
            b'S' => drop(to.side.statements.remove(name)),
            _ => drop(self.portals.remove(name)),
        }
        self.answered(b'3', to.replies)
    }

    /// A message whose text a server must answer, or that a failed transaction refuses. `None`: it is answered here.
    fn not_answered_here(&mut self, plan: &Plan, to: &mut Answering<'_>) -> Option<BatchResult> {
        if !self.is_ours(plan, to) {
            return Some(self.elsewhere(EXTENDED, to));
        }
        self.is_refused_as_failed(plan).then(|| self.fail(&aborted(), EXTENDED, to))
    }

    fn answered(&mut self, tag: u8, replies: &mut Vec<u8>) -> BatchResult {
        self.in_batch = true;
        append(replies, tag, |_| {});
        Ok(None)
    }
}

fn plan_of(name: &[u8], side: &ClientSide) -> Plan {
    side.prepared_text(name).map_or(Plan::Server, |sql| Plan::of(&sql, side))
}

fn describe(plan: &Plan, binary: bool, replies: &mut Vec<u8>) {
    match plan {
        Plan::Show(name) => messages::row_description(replies, name, Type::Text, binary),
        Plan::Ping => messages::row_description(replies, "?column?", Type::Int4, binary),
        Plan::Choose(choice) if choice.form == Form::SetConfig => {
            messages::row_description(replies, "set_config", Type::Text, binary);
        }
        _ => append(replies, b'n', |_| {}),
    }
}

/// The parameters of a Bind, and whether its first result column is binary. `body` starts after the names.
fn bound(mut body: &[u8]) -> Option<(Vec<Option<&[u8]>>, bool)> {
    let mut take = |count: usize| {
        let (taken, rest) = body.split_at_checked(count)?;
        body = rest;
        Some(taken)
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0usize, |all, byte| all << 8 | usize::from(*byte));
    let formats = number(take(2)?);
    take(formats * 2)?;
    let count = number(take(2)?);
    let mut parameters = Vec::new();
    for _ in 0..count {
        parameters.push(match number(take(4)?) {
            0xffff_ffff => None,
            length => Some(take(length)?),
        });
    }
    let results = number(take(2)?);
    let binary = results > 0 && number(take(2)?) == 1;
    Some((parameters, binary))
}
