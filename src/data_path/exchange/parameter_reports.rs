//! ParameterStatus: what a server reports, and what its client is told of that (see [`Reported`]).

use super::{
    client_side::ClientSide,
    pending_replies::{Origin, Request},
    server_side::ServerSide,
};
use crate::{
    data_path::{
        session_state::parameter_status::ReportedParameters,
        sql::{Characters, Lexing},
    },
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::append,
        outgoing::Outgoing,
    },
};

impl ServerSide {
    /// A reported parameter, as last reported.
    pub fn reported_value(&self, wanted: &str) -> Option<&str> {
        self.reported.text(wanted)
    }

    /// A client begins to use it: it may believe something else than the server reports.
    #[inline]
    pub fn begins_with(&mut self, client: &ClientSide, out: &mut Outgoing<'_>) {
        self.must_tell |= self.reported != *client.told;
        if self.is_stale {
            self.stir(out.build());
        }
    }

    /// Has it say what it reports now, in front of the reply to its client.
    #[cold]
    fn stir(&mut self, out: &mut Vec<u8>) {
        self.is_stale = false;
        append(out, b'S', |_| {});
        let _ = self.replies.track(Request::Sync, Origin::Proxy);
    }

    /// In front of what the client gets next: what it believes of its session becomes what the server reports.
    #[cold]
    pub(super) fn tell(&mut self, client: &mut ClientSide, out: &mut Outgoing<'_>) {
        self.must_tell = false;
        if self.reported != *client.told {
            self.reported.write_changes(&mut client.told, out.build());
        }
    }

    /// ParameterStatus. What was not changed by statements of ours is to be asked about, and its client is told at once; of
    /// what was, the client is told in front of its own reply, if it believes something else.
    pub(super) fn parameter_status(&mut self, bytes: &[u8], client: &mut ClientSide, out: &mut Outgoing<'_>) {
        let name = self.note_parameter(bytes);
        if let (Some(name), true) = (name, self.replies.origin() != Some(Origin::Proxy)) {
            self.checks.reported(&name);
            self.tell(client, out);
        }
    }

    /// Takes down what the server reports; the parameter's name in lower case. `None`: it has reported too many others.
    pub fn note_parameter(&mut self, bytes: &[u8]) -> Option<String> {
        let mut body = bytes.get(HEADER_BYTES..)?;
        let (name, value) = (cstr(&mut body).ok()?, cstr(&mut body).ok()?);
        let name = String::from_utf8_lossy(name);
        if !self.reported.has_room_for(&name) {
            return None;
        }
        if self.reported.set(&name, value) {
            (self.parameters_changed, self.must_tell) = (true, true);
            self.lexing = lexing(&self.reported);
        }
        Some(name.to_ascii_lowercase())
    }
}

/// How a server that reports this reads string literals.
pub(super) fn lexing(reported: &ReportedParameters) -> Lexing {
    let value = |wanted: &str| reported.text(wanted);
    Lexing {
        standard_conforming_strings: value("standard_conforming_strings") != Some("off"),
        characters: Characters::of_client_encoding(value("client_encoding").unwrap_or_default().as_bytes()),
    }
}
