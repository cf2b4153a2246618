//! Whether a server has used temporary tables, and under which `temp_buffers`. Pure.
//!
//! PostgreSQL fixes the number of a session's buffers for temporary tables when it uses the first one. From
//! then on it refuses any other value (22023), also when the tables are gone, and after DISCARD ALL.

/// The parameter.
pub const TEMP_BUFFERS: &str = "temp_buffers";

/// The temporary tables that a server may have used.
#[derive(Debug, Default)]
pub struct TemporaryUse(Option<FixedBuffers>);

#[derive(Debug, PartialEq, Eq)]
enum FixedBuffers {
    /// Sessions with this value have made or dropped tables; `None`: the default.
    By(Option<Box<str>>),
    /// Sessions with several values have, and the first use is not known.
    Unknown,
}

/// A `temp_buffers` that a session gives its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewTempBuffers<'v> {
    /// The session has this value.
    Value(&'v str),
    /// Its next text sets one.
    ByText,
}

impl TemporaryUse {
    /// A session with this `temp_buffers` may have used a temporary table.
    pub fn note(&mut self, value: Option<&str>) {
        let now = FixedBuffers::By(value.map(Into::into));
        match &self.0 {
            None => self.0 = Some(now),
            Some(before) if *before == now => {}
            Some(_) => self.0 = Some(FixedBuffers::Unknown),
        }
    }

    /// Whether the server takes the value.
    pub fn takes(&self, new: NewTempBuffers<'_>) -> bool {
        match (&self.0, new) {
            (None, _) => true,
            (Some(FixedBuffers::By(Some(value))), NewTempBuffers::Value(new)) => **value == *new,
            _ => false,
        }
    }
}

/// Whether a text begins with a SET of `temp_buffers`.
#[inline]
pub fn sets_temp_buffers(text: &[u8]) -> bool {
    const SCOPES: [&[u8]; 2] = [b"session", b"local"];
    let mut words =
        text.split(|byte| byte.is_ascii_whitespace() || *byte == b'=').filter(|word| !word.is_empty());
    let is = |word: Option<&[u8]>, other: &[u8]| word.is_some_and(|word| word.eq_ignore_ascii_case(other));
    if !is(words.next(), b"set") {
        return false;
    }
    let mut name = words.next();
    if SCOPES.iter().any(|scope| is(name, scope)) {
        name = words.next();
    }
    is(name, TEMP_BUFFERS.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_has_used_temporary_tables_takes_the_value_that_it_has() {
        let (same, other) = (NewTempBuffers::Value("2MB"), NewTempBuffers::Value("4MB"));
        let mut used = TemporaryUse::default();
        assert!(used.takes(same) && used.takes(NewTempBuffers::ByText));
        used.note(Some("2MB"));
        used.note(Some("2MB"));
        assert!(used.takes(same) && !used.takes(other) && !used.takes(NewTempBuffers::ByText));
        used.note(None);
        assert!(!used.takes(same));
    }

    #[test]
    fn a_set_is_found_at_the_beginning_of_a_text() {
        for sql in
            ["SET temp_buffers='2MB'", " set\n local Temp_Buffers TO 100", "SET SESSION temp_buffers = 9"]
        {
            assert!(sets_temp_buffers(sql.as_bytes()), "{sql}");
        }
        for sql in ["", "SELECT 'set temp_buffers'", "SET work_mem = '1MB'", "SET LOCAL work_mem = 5"] {
            assert!(!sets_temp_buffers(sql.as_bytes()), "{sql}");
        }
    }
}
