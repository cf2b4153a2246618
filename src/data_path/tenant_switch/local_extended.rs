//! Answers the extended protocol while no server is held: Parse, Bind, Describe, Execute and Close of a
//! choice of tenant, of BEGIN and similar statements.

use super::{
    Form, Plan,
    local_answers::{BatchResult, LocalResponder, Portal, Protocol, aborted},
    messages::{self, Type},
};
use crate::{
    data_path::exchange::{ClientSide, violation},
    error::{ClientError, TenantSwitchError},
    wire::{
        frame::{FrameError, cstr},
        message::append,
    },
};

/// The most open portals while no server is held; drivers use one.
const PORTALS_MAX: usize = 16;

impl LocalResponder {
    pub(super) fn parse(
        &mut self,
        mut body: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        let name = cstr(&mut body).map_err(violation)?;
        let plan = Plan::of(cstr(&mut { body }).map_err(violation)?, side);
        if let Some(result) = self.not_answered_here(&plan, here, side, replies) {
            return result;
        }
        if plan == Plan::Mixed {
            return self.fail(&TenantSwitchError::NotAlone.into(), Protocol::Extended(false), side, replies);
        }
        if let Plan::Refused(reason) = plan {
            return self.fail(&reason.into(), Protocol::Extended(false), side, replies);
        }
        if !name.is_empty() && side.statements.get(name).is_some() {
            let message = format!("prepared statement \"{}\" already exists", String::from_utf8_lossy(name));
            let taken = ClientError::AsPostgres { sqlstate: "42P05", message };
            return self.fail(&taken, Protocol::Extended(false), side, replies);
        }
        if let Err(limit) = side.prepare_without_server(name, body) {
            let client_error = side.rules().too_much(limit);
            return self.fail(&client_error, Protocol::Extended(false), side, replies);
        }
        self.answered(b'1', replies)
    }

    pub(super) fn bind(
        &mut self,
        mut body: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        let portal = cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        let plan = plan_of(name, side);
        if let Some(result) = self.not_answered_here(&plan, here, side, replies) {
            return result;
        }
        let (parameters, binary) =
            bound(body).ok_or_else(|| ClientError::ProtocolViolation("invalid Bind message".into()))?;
        let request = if let Plan::Choose(choice) = &plan { choice.request(&parameters) } else { None };
        if self.portals.len() >= PORTALS_MAX && !self.portals.contains_key(portal) {
            let message = format!("more than {PORTALS_MAX} portals while no server is held");
            let many = ClientError::AsPostgres { sqlstate: "53400", message };
            return self.fail(&many, Protocol::Extended(false), side, replies);
        }
        self.portals.insert(portal.into(), Portal { plan, request, binary });
        self.answered(b'2', replies)
    }

    pub(super) fn describe(
        &mut self,
        body: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        let (kind, name) = kind_and_name(body)?;
        let bound =
            self.portals.get(name).filter(|_| kind == b'P').map(|portal| (&portal.plan, portal.binary));
        if let Some((plan, binary)) = bound {
            describe(plan, binary, replies);
            self.in_batch = true;
            return Ok(None);
        }
        let plan = if kind == b'S' { plan_of(name, side) } else { Plan::Server };
        if let Some(result) = self.not_answered_here(&plan, here, side, replies) {
            return result;
        }
        messages::parameter_description(replies, &plan.parameters());
        describe(&plan, false, replies);
        self.in_batch = true;
        Ok(None)
    }

    pub(super) fn execute(
        &mut self,
        mut body: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        let name = cstr(&mut body).map_err(violation)?;
        let Some(Portal { plan, request, binary }) = self.portals.remove(name) else {
            return self.elsewhere(Protocol::Extended(false), side, here, replies);
        };
        self.in_batch = true;
        self.run(&plan, request.as_ref(), Protocol::Extended(binary), side, here, replies)
    }

    /// Removes the client's name for a statement; servers keep the statement for other clients.
    pub(super) fn close(&mut self, body: &[u8], side: &mut ClientSide, replies: &mut Vec<u8>) -> BatchResult {
        let (kind, name) = kind_and_name(body)?;
        match kind {
            b'S' if name.is_empty() => side.statements.forget_unnamed(),
            b'S' => drop(side.statements.remove(name)),
            _ => drop(self.portals.remove(name)),
        }
        self.answered(b'3', replies)
    }

    /// A message whose text a server must answer, or that a failed transaction refuses. `None`: it is answered here.
    fn not_answered_here(
        &mut self,
        plan: &Plan,
        here: Option<&str>,
        side: &mut ClientSide,
        replies: &mut Vec<u8>,
    ) -> Option<BatchResult> {
        const EXTENDED: Protocol = Protocol::Extended(false);
        if !self.is_ours(plan, here, side) {
            return Some(self.elsewhere(EXTENDED, side, here, replies));
        }
        self.is_refused_as_failed(plan).then(|| self.fail(&aborted(), EXTENDED, side, replies))
    }

    fn answered(&mut self, tag: u8, replies: &mut Vec<u8>) -> BatchResult {
        self.in_batch = true;
        append(replies, tag, |_| {});
        Ok(None)
    }
}

fn plan_of(name: &[u8], side: &ClientSide) -> Plan {
    side.prepared_text(name).map_or(Plan::Server, |sql| Plan::of(sql, side))
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

fn kind_and_name(body: &[u8]) -> Result<(u8, &[u8]), ClientError> {
    let Some((kind, mut rest)) = body.split_first() else { return Err(violation(FrameError::Strings)) };
    Ok((*kind, cstr(&mut rest).map_err(violation)?))
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
