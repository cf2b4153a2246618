//! ParameterStatus: what a server reports, and what its client is sent.

use super::{
    client_side::ClientSide, pending_checks::LEXER_SETTINGS, pending_replies::Origin, server_side::ServerSide,
};
use crate::{
    data_path::{
        session_state::{Settings, parameter_status::ReportedParameters},
        sql::Lexing,
    },
    wire::{
        frame::{HEADER_BYTES, cstr},
        outgoing::Outgoing,
    },
};

impl ServerSide {
    /// The latest value of a reported parameter.
    pub fn reported_value(&self, wanted: &str) -> Option<&str> {
        self.reported.text(wanted)
    }

    /// A lease begins: the client may have been sent other values than the server reports.
    #[inline]
    pub fn begin_lease(&mut self, client: &ClientSide, out: &mut Outgoing<'_>) {
        self.parameters_differ |= self.reported != *client.sent_parameters;
        if self.is_stale {
            self.request_reports(out.build());
        }
    }

    /// Sends a Sync, so that the server reports changed parameters before its reply to the client.
    #[cold]
    fn request_reports(&mut self, out: &mut Vec<u8>) {
        self.is_stale = false;
        self.replies.end_own_batch(out);
    }

    /// Sends the client the parameters that differ, before its next message.
    #[cold]
    pub(super) fn send_parameters(&mut self, client: &mut ClientSide, out: &mut Outgoing<'_>) {
        self.parameters_differ = false;
        if self.reported != *client.sent_parameters {
            self.reported.write_changes(&mut client.sent_parameters, out.build());
        }
    }

    /// ParameterStatus. A change by a client's request is recorded for the after-transaction check and sent
    /// at once. A change by the proxy's own request is sent before the client's reply, and only if the client
    /// was sent another value.
    pub(super) fn parameter_status(&mut self, bytes: &[u8], client: &mut ClientSide, out: &mut Outgoing<'_>) {
        let name = self.record_parameter(bytes);
        if let (Some(name), true) =
            (name, !matches!(self.replies.origin(), Some(Origin::Proxy | Origin::Restore)))
        {
            self.checks.reported(&name);
            self.send_parameters(client, out);
        }
    }

    /// Records a reported parameter. Returns its name in lower case; `None`: the message is invalid, or too
    /// many parameters have been reported.
    pub fn record_parameter(&mut self, bytes: &[u8]) -> Option<String> {
        let mut body = bytes.get(HEADER_BYTES..)?;
        let (name, value) = (cstr(&mut body).ok()?, cstr(&mut body).ok()?);
        let name = String::from_utf8_lossy(name);
        if !self.reported.has_room_for(&name) {
            return None;
        }
        let lower = name.to_ascii_lowercase();
        if self.reported.set(&name, value) {
            (self.parameters_changed, self.parameters_differ) = (true, true);
            // Not the others: settings that were sent before are not reported yet.
            self.lexing = self.lexing.with(&lower, &String::from_utf8_lossy(value));
        }
        Some(lower)
    }
}

/// How a server that has reported these parameters reads string literals.
pub(super) fn lexing(reported: &ReportedParameters) -> Lexing {
    lexing_of(|name| reported.text(name), Lexing::default())
}

/// How a server with these settings reads string literals; `default`: without them.
pub(super) fn lexing_under(settings: &Settings, default: Lexing) -> Lexing {
    lexing_of(|name| settings.get(name), default)
}

fn lexing_of<'v>(value: impl Fn(&str) -> Option<&'v str>, default: Lexing) -> Lexing {
    LEXER_SETTINGS.iter().fold(default, |lexing, name| match value(name) {
        Some(value) => lexing.with(name, value),
        None => lexing,
    })
}
