//! How PostgreSQL spells the value of a startup parameter, where that is known without a server: it cannot
//! refuse the value, and a rule gives its spelling. `None` in all other cases. Pure.
//!
//! Source: PostgreSQL's `variable.c` (DateStyle, client_encoding, application_name), `guc_tables.c`.

use crate::data_path::session_state::parameter_status::ReportedParameters;

/// PostgreSQL truncates longer names, with a notice.
const NAME_BYTES_MAX: usize = 63;

/// The value of a parameter (name in lower case) as a server shows it that reports `base`.
pub fn spelled(name: &str, value: &str, base: &ReportedParameters) -> Option<String> {
    match name {
        "application_name" => application_name(value, base),
        "client_encoding" => client_encoding(value, base.text("server_encoding")?),
        "datestyle" => date_style(value, base.text("DateStyle")?),
        "intervalstyle" => one_of(value, &["postgres", "postgres_verbose", "sql_standard", "iso_8601"]),
        "timezone" => one_of(value, &["UTC", "GMT"]),
        "bytea_output" => one_of(value, &["hex", "escape"]),
        "extra_float_digits" => integer(value, -15..=3),
        "statement_timeout" | "lock_timeout" | "idle_in_transaction_session_timeout" => {
            integer(value, 0..=i32::MAX)
        }
        "standard_conforming_strings" | "default_transaction_read_only" => one_of(value, &["on", "off"]),
        "search_path" => names(value).then(|| value.to_owned()),
        _ => None,
    }
}

fn one_of(value: &str, known: &[&str]) -> Option<String> {
    known.iter().find(|known| known.eq_ignore_ascii_case(value)).map(|known| (*known).to_owned())
}

fn integer(value: &str, range: std::ops::RangeInclusive<i32>) -> Option<String> {
    let number = value.parse::<i32>().ok().filter(|number| range.contains(number))?;
    // Neither `+1` nor `01`, which is octal.
    (number.to_string() == value).then(|| value.to_owned())
}

/// Whether these are schema names that need no quotes.
fn names(value: &str) -> bool {
    value.split(',').map(str::trim).all(|name| {
        name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
            && name.len() <= NAME_BYTES_MAX
    })
}

/// PostgreSQL 16 and later write bytes that are not printable ASCII as hexadecimal, earlier as `?`.
fn application_name(value: &str, base: &ReportedParameters) -> Option<String> {
    let printable = |byte: u8| (b' '..=b'~').contains(&byte);
    match value {
        _ if value.len() > NAME_BYTES_MAX => None,
        _ if value.bytes().all(printable) => Some(value.to_owned()),
        _ if base.text("server_encoding")? != "UTF8" => None,
        _ => {
            let major: u32 =
                base.text("server_version")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
            let clean = |byte: u8| match byte {
                byte if printable(byte) => char::from(byte).to_string(),
                byte if major >= 16 => format!("\\x{byte:02x}"),
                _ => "?".to_owned(),
            };
            Some(value.bytes().map(clean).collect())
        }
    }
}

/// Encodings to which every server with this encoding can convert.
fn client_encoding(value: &str, server_encoding: &str) -> Option<String> {
    let clean = |name: &str| -> String {
        name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
    };
    let asked = clean(value);
    let known = match (server_encoding, &*asked) {
        // PostgreSQL reports it as given, for old drivers.
        _ if value == "UNICODE" => value,
        (_, asked) if asked == clean(server_encoding) => server_encoding,
        ("UTF8", "unicode") => "UTF8",
        ("UTF8", "latin1" | "iso88591") => "LATIN1",
        ("UTF8", "win1252" | "windows1252") => "WIN1252",
        _ => return None,
    };
    (server_encoding == "UTF8" || known == server_encoding).then(|| known.to_owned())
}

/// A style, an order, or both; the other one stays as in `base`.
fn date_style(value: &str, base: &str) -> Option<String> {
    let (base_style, base_order) = base.split_once(", ")?;
    let (mut style, mut order) = (None, None);
    for word in value.split(',').map(|word| word.trim().to_ascii_lowercase()) {
        let (place, known) = match &*word {
            "iso" => (&mut style, "ISO"),
            "sql" => (&mut style, "SQL"),
            "postgres" => (&mut style, "Postgres"),
            "german" => (&mut style, "German"),
            "ymd" => (&mut order, "YMD"),
            "dmy" | "european" => (&mut order, "DMY"),
            "mdy" | "us" | "noneuropean" => (&mut order, "MDY"),
            _ => return None,
        };
        if place.replace(known).is_some() {
            return None;
        }
    }
    let order = match (order, style) {
        (None, Some("German")) => "DMY",
        (order, _) => order.unwrap_or(base_order),
    };
    Some(format!("{}, {order}", style.unwrap_or(base_style)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(version: &str, name: &str, value: &str) -> Option<String> {
        let base = [("server_version", version), ("server_encoding", "UTF8"), ("DateStyle", "ISO, MDY")];
        spelled(name, value, &ReportedParameters::new(base.map(|(name, value)| (name, value.as_bytes()))))
    }

    #[test]
    fn an_application_name_is_cleaned_as_the_version_does() {
        for (version, cleaned) in [
            ("15.14 (Debian 15.14-0+deb12u1)", "caf?? ?"),
            ("16.1", r"caf\xc3\xa9 \x07"),
            ("18rc1", r"caf\xc3\xa9 \x07"),
        ] {
            assert_eq!(of(version, "application_name", "café \x07").as_deref(), Some(cleaned), "{version}");
        }
        assert_eq!(of("15.1", "application_name", "").as_deref(), Some(""));
        assert_eq!(of("15.1", "application_name", &"x".repeat(64)), None, "truncated, with a notice");
    }

    #[test]
    fn values_that_all_servers_accept_are_spelled_as_reported() {
        for (name, value, known) in [
            ("client_encoding", "utf-8", Some("UTF8")),
            ("client_encoding", "UNICODE", Some("UNICODE")),
            ("client_encoding", "'utf8'", Some("UTF8")),
            ("client_encoding", "iso-8859-1", Some("LATIN1")),
            ("client_encoding", "klingon", None),
            ("datestyle", "ISO", Some("ISO, MDY")),
            ("datestyle", "dmy", Some("ISO, DMY")),
            ("datestyle", "German", Some("German, DMY")),
            ("datestyle", "german, YMD", Some("German, YMD")),
            ("datestyle", "ISO, German", None),
            ("datestyle", "default", None),
            ("intervalstyle", "ISO_8601", Some("iso_8601")),
            ("timezone", "utc", Some("UTC")),
            ("timezone", "Europe/Berlin", None),
            ("extra_float_digits", "3", Some("3")),
            ("extra_float_digits", "4", None),
            ("statement_timeout", "5000", Some("5000")),
            ("statement_timeout", "-1", None),
            ("search_path", "shop, public", Some("shop, public")),
            ("search_path", "shop,", None),
            ("search_path", "\"$user\", public", None),
            ("work_mem", "4MB", None),
        ] {
            assert_eq!(of("18.0", name, value).as_deref(), known, "{name} = {value}");
        }
    }
}
