//! Reads timestamps as people write them.

use time::{
    Date, OffsetDateTime, PrimitiveDateTime, format_description::well_known::Rfc3339,
    macros::format_description,
};

/// Parses `2027-01-31`, `2027-01-31 18:00` (both UTC) or RFC 3339 with any offset.
///
/// # Errors
/// A sentence to follow the option's name.
pub fn parse_timestamp(text: &str) -> Result<OffsetDateTime, String> {
    let text = text.trim();
    let date = format_description!("[year]-[month]-[day]");
    let minute = format_description!("[year]-[month]-[day] [hour]:[minute]");
    let second = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    if let Ok(moment) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(moment);
    }
    if let Ok(date) = Date::parse(text, date) {
        return Ok(date.midnight().assume_utc());
    }
    PrimitiveDateTime::parse(text, second)
        .or_else(|_| PrimitiveDateTime::parse(text, minute))
        .map(PrimitiveDateTime::assume_utc)
        .map_err(|_| {
            format!(
                "{text:?} is not a timestamp; write 2027-01-31, 2027-01-31 18:00 or 2027-01-31T18:00:00+01:00"
            )
        })
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn timestamps_are_read_as_people_write_them() {
        for (text, moment) in [
            ("2027-01-31", datetime!(2027-01-31 00:00 UTC)),
            ("2027-01-31 18:00", datetime!(2027-01-31 18:00 UTC)),
            ("2027-01-31 18:00:01", datetime!(2027-01-31 18:00:01 UTC)),
            ("2027-01-31T18:00:00+01:00", datetime!(2027-01-31 17:00 UTC)),
        ] {
            assert_eq!(parse_timestamp(text), Ok(moment), "{text}");
        }
        for text in ["", "tomorrow", "2027-02-30", "2027-01-31 25:00"] {
            assert!(parse_timestamp(text).is_err(), "{text}");
        }
    }
}
