//! `pg_terminate_backend` and `pg_cancel_backend` with the process number that the proxy gave a client.
//!
//! In transaction mode the number belongs to a session and not to a server: PostgreSQL returns `false` and
//! warns that there is no such process. If a text calls one of the functions by name, the proxy ends or
//! cancels the session instead. It removes the warning and changes the row to `true`.

use crate::{data_path::session_state::side_effects::BackendSignal, wire::server_error::error_field};

/// Signals the session with this number. Returns `false` if there is none that the caller may signal.
pub type SignalSender<'s> = &'s dyn Fn(i32, BackendSignal) -> bool;

/// PostgreSQL's process numbers are below this one (Linux), and session numbers are not.
const NUMBER_MIN: i32 = 1 << 22;

/// The server's function that warns. The warning is translated, except for this name and the number.
const SIGNAL_ROUTINE: &[u8] = b"pg_signal_backend";

/// The calls in the texts that the server is working on.
#[derive(Debug, Default)]
pub struct BackendSignals {
    /// The function that they call; `is_ambiguous` if they call both, since the warning does not name it.
    called: Option<BackendSignal>,
    is_ambiguous: bool,
    /// Rows to be changed to `true`.
    rows_due: u32,
}

impl BackendSignals {
    /// Records the call in a text that goes to the server.
    #[inline]
    pub fn record(&mut self, signal: Option<BackendSignal>) {
        if signal.is_some() {
            self.is_ambiguous |= self.called.is_some() && self.called != signal;
            self.called = signal;
        }
    }

    /// All replies have arrived.
    #[inline]
    pub fn finish(&mut self) {
        if self.called.is_some() {
            *self = Self::default();
        }
    }

    /// Whether notices must be read.
    #[inline]
    pub fn expects_notice(&self) -> bool {
        self.called.is_some()
    }

    /// Whether a row must be changed.
    #[inline]
    pub fn is_awaited(&self) -> bool {
        self.rows_due > 0
    }

    /// NoticeResponse. Signals the session that it names; `true`: the client does not get the notice.
    pub fn on_notice(&mut self, notice: &[u8], send: SignalSender<'_>) -> bool {
        let signal =
            self.called.filter(|_| !self.is_ambiguous && error_field(notice, b'R') == Some(SIGNAL_ROUTINE));
        let number = error_field(notice, b'M').and_then(number).filter(|number| *number >= NUMBER_MIN);
        let (Some(signal), Some(number)) = (signal, number) else { return false };
        let sent = send(number, signal);
        self.rows_due += u32::from(sent);
        sent
    }

    /// DataRow. Returns the row that the client gets, if it differs.
    pub fn corrected_row(&mut self, row: &[u8]) -> Option<Vec<u8>> {
        let (answer, before) = row.split_last()?;
        let truth = match (before, answer) {
            // One column of one byte, as text and in binary.
            (b"D\0\0\0\x0b\0\x01\0\0\0\x01", b'f') => b't',
            (b"D\0\0\0\x0b\0\x01\0\0\0\x01", 0) => 1,
            _ => return None,
        };
        self.rows_due -= 1;
        Some([before, &[truth]].concat())
    }
}

/// The first number in a text.
fn number(text: &[u8]) -> Option<i32> {
    let digits = text.split(|byte| !byte.is_ascii_digit()).find(|digits| !digits.is_empty())?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::append;

    fn warning(routine: &str, words: &str) -> Vec<u8> {
        let mut message = Vec::new();
        append(&mut message, b'N', |out| {
            out.extend_from_slice(format!("SWARNING\0C01000\0M{words}\0R{routine}\0\0").as_bytes());
        });
        message
    }

    const GONE: &str = "PID 9437302 is not a PostgreSQL backend process";
    const NO: &[u8] = b"D\0\0\0\x0b\0\x01\0\0\0\x01f";

    #[test]
    fn a_warning_with_a_sessions_number_signals_it_and_corrects_the_row() {
        let mut signalling = BackendSignals::default();
        signalling.record(Some(BackendSignal::Terminate));
        let only = |number, signal| (number, signal) == (9_437_302, BackendSignal::Terminate);
        assert!(signalling.on_notice(&warning("pg_signal_backend", GONE), &only));
        assert_eq!(signalling.corrected_row(b"D\0\0\0\x0b\0\x01\0\0\0\x01t"), None);
        assert_eq!(signalling.corrected_row(NO).as_deref(), Some(&b"D\0\0\0\x0b\0\x01\0\0\0\x01t"[..]));
        assert!(!signalling.is_awaited());
    }

    #[test]
    fn nothing_else_signals_a_session() {
        let any_session = |_, _| -> bool { panic!("signalled") };
        let ours = warning("pg_signal_backend", GONE);
        let mut no_call = BackendSignals::default();
        assert!(!no_call.on_notice(&ours, &any_session));
        let mut both_called = BackendSignals::default();
        both_called.record(Some(BackendSignal::Terminate));
        both_called.record(Some(BackendSignal::Cancel));
        assert!(!both_called.on_notice(&ours, &any_session));
        let mut signals = BackendSignals::default();
        signals.record(Some(BackendSignal::Cancel));
        signals.record(None);
        assert!(!signals.on_notice(&warning("exec_stmt_raise", GONE), &any_session));
        assert!(!signals.on_notice(&warning("pg_signal_backend", "PID 4194303 is no process"), &any_session));
        assert!(
            !signals.on_notice(&warning("pg_signal_backend", "PID 99999999999 is no process"), &any_session)
        );
        signals.finish();
        assert!(!signals.on_notice(&ours, &any_session));
        // There is no such session.
        signals.record(Some(BackendSignal::Cancel));
        assert!(!signals.on_notice(&ours, &|_, _| false) && !signals.is_awaited());
    }
}
