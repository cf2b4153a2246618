//! Durations and sizes with units: `30s`, `256MB`. A number without a unit is refused, because programs
//! differ in the unit they assume.

use std::time::Duration;

/// Parses `250ms`, `30s`, `10min` (or `10m`), `1h`, `1d`. Zero is allowed.
///
/// # Errors
/// A sentence to follow the key's name.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = number_and_unit(text).ok_or("is not a duration, as 30s or 10min are")?;
    let unit_micros: u64 = match unit {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" | "min" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        "" if number == 0 => 1,
        "" => {
            return Err(format!("needs a unit: {number}ms, {number}s, {number}min, {number}h or {number}d"));
        }
        _ => return Err(format!("has an unknown unit \"{unit}\" (us, ms, s, min, h, d)")),
    };
    number.checked_mul(unit_micros).map(Duration::from_micros).ok_or_else(|| "is too long".to_owned())
}

/// Parses `512B`, `64kB`, `256MB`, `1GB`; each unit is 1024 of the one before, as in PostgreSQL.
///
/// # Errors
/// A sentence to follow the key's name.
pub fn bytes(text: &str) -> Result<usize, String> {
    let (number, unit) = number_and_unit(text).ok_or("is not a size, as 64kB or 256MB are")?;
    let unit_bytes: u64 = match unit.to_ascii_lowercase().as_str() {
        "b" => 1,
        "kb" | "kib" => 1 << 10,
        "mb" | "mib" => 1 << 20,
        "gb" | "gib" => 1 << 30,
        "" if number == 0 => 1,
        "" => return Err(format!("needs a unit: {number}B, {number}kB, {number}MB or {number}GB")),
        _ => return Err(format!("has an unknown unit \"{unit}\" (B, kB, MB, GB)")),
    };
    let bytes = number.checked_mul(unit_bytes).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| "is too large".to_owned())
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    Some((number.parse().ok()?, unit.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_carry_a_unit() {
        for (text, meant) in
            [("250ms", 250), ("30s", 30_000), ("10 min", 600_000), ("2m", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(meant)), "{text}");
        }
        for (text, meant) in [("512B", 512), ("64kB", 65_536), ("1MB", 1 << 20), ("2 GiB", 2 << 30)] {
            assert_eq!(bytes(text), Ok(meant), "{text}");
        }
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(bytes("0"), Ok(0));
    }

    #[test]
    fn a_bare_number_is_refused_and_told_what_it_lacks() {
        assert_eq!(duration("30").unwrap_err(), "needs a unit: 30ms, 30s, 30min, 30h or 30d");
        assert_eq!(bytes("256").unwrap_err(), "needs a unit: 256B, 256kB, 256MB or 256GB");
    }

    #[test]
    fn nonsense_and_overflow_are_refused() {
        for text in ["", "s", "-1s", "1.5h", "99999999999999999999s", "18446744073709551615d", "5 parsecs"] {
            assert!(duration(text).is_err(), "{text}");
        }
        for text in ["", "MB", "-1MB", "18446744073709551615GB", "5 acres"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
