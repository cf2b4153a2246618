//! Appends messages to a buffer.
//!
//! Source: PostgreSQL documentation, "Message Formats". Lengths are computed from the written bytes. A
//! string is cut at a NUL, so that one field cannot become two.

use memchr::memchr;

/// The code of a CancelRequest, in place of a protocol version.
pub const CANCEL_REQUEST: u32 = 80_877_102;

/// Severity of an ErrorResponse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The statement failed.
    Error,
    /// The connection ends.
    Fatal,
}

/// Appends a message: `tag`, a length, and the body that `body` writes.
pub fn append(out: &mut Vec<u8>, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    let length = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

/// Appends a string and a NUL; a string with a NUL inside is cut there.
pub fn append_cstr(out: &mut Vec<u8>, text: &[u8]) {
    let end = memchr(0, text).unwrap_or(text.len());
    out.reserve(end + 1);
    out.extend_from_slice(&text[..end]);
    out.push(0);
}

/// ErrorResponse with the fields `S`, `V`, `C`, `M`, and others: detail (`D`), hint (`H`), or the name of
/// PostgreSQL's routine (`R`), which some clients read.
pub fn error_response(
    out: &mut Vec<u8>,
    severity: Severity,
    sqlstate: &str,
    message: &str,
    more: &[(u8, &str)],
) {
    let severity: &[u8] = match severity {
        Severity::Error => b"ERROR",
        Severity::Fatal => b"FATAL",
    };
    append(out, b'E', |out| {
        let always =
            [(b'S', severity), (b'V', severity), (b'C', sqlstate.as_bytes()), (b'M', message.as_bytes())];
        for (field, value) in
            always.into_iter().chain(more.iter().map(|(field, value)| (*field, value.as_bytes())))
        {
            out.push(field);
            append_cstr(out, value);
        }
        out.push(0);
    });
}

/// ReadyForQuery with a transaction status of `I`, `T` or `E`.
pub fn ready_for_query(out: &mut Vec<u8>, status: u8) {
    append(out, b'Z', |out| out.push(status));
}

/// ParameterStatus.
pub fn parameter_status(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    append(out, b'S', |out| {
        append_cstr(out, name);
        append_cstr(out, value);
    });
}

/// BackendKeyData; the secret has 4 bytes in protocol 3.0 and up to 256 in 3.2.
pub fn backend_key_data(out: &mut Vec<u8>, process_id: i32, secret: &[u8]) {
    append(out, b'K', |out| {
        out.extend_from_slice(&process_id.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

/// AuthenticationOk.
pub fn authentication_ok(out: &mut Vec<u8>) {
    append(out, b'R', |out| out.extend_from_slice(&0u32.to_be_bytes()));
}

/// Parse of a statement; PostgreSQL infers the types of its parameters.
pub fn parse(name: &[u8], sql: &[u8], out: &mut Vec<u8>) {
    append(out, b'P', |out| {
        append_cstr(out, name);
        append_cstr(out, sql);
        out.extend_from_slice(&[0, 0]);
    });
}

/// Bind of the unnamed portal to a statement, with parameters as text.
pub fn bind(statement: &[u8], parameters: &[&str], out: &mut Vec<u8>) {
    bind_portal(b"", statement, parameters, out);
}

/// Bind of a portal to a statement, with parameters as text.
pub fn bind_portal(portal: &[u8], statement: &[u8], parameters: &[&str], out: &mut Vec<u8>) {
    append(out, b'B', |out| {
        append_cstr(out, portal);
        append_cstr(out, statement);
        out.extend_from_slice(&[0, 0]); // parameter formats: all text
        out.extend_from_slice(&u16::try_from(parameters.len()).unwrap_or(u16::MAX).to_be_bytes());
        for text in parameters {
            out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        out.extend_from_slice(&[0, 0]); // result formats: all text
    });
}

/// Execute of the unnamed portal, for all of its rows.
pub fn execute(out: &mut Vec<u8>) {
    append(out, b'E', |out| out.extend_from_slice(&[0; 5]));
}

/// Close of a statement.
pub fn close_statement(name: &[u8], out: &mut Vec<u8>) {
    append(out, b'C', |out| {
        out.push(b'S');
        append_cstr(out, name);
    });
}

/// A PostgreSQL array, as text.
pub fn array_literal<'v>(values: impl Iterator<Item = &'v str>) -> String {
    let quoted: Vec<String> =
        values.map(|value| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))).collect();
    format!("{{{}}}", quoted.join(","))
}
