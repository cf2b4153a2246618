//! Finds words anywhere in a text: in code, strings and comments.

/// NAMEDATALEN - 1: PostgreSQL truncates longer names.
pub const NAME_BYTES_MAX: usize = 63;

/// Iterates over the runs of ASCII letters, digits and `_`, each truncated like a name.
pub fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_')
        .filter(|word| !word.is_empty())
        .map(|word| word.get(..NAME_BYTES_MAX).unwrap_or(word))
}

/// Iterates over words that may name custom parameters, which PostgreSQL does not list: `my.note`.
pub fn dotted_names(text: &[u8]) -> impl Iterator<Item = Box<str>> {
    /// Most of these words are tables and columns.
    const NAMES_MAX: usize = 100;
    text.split(|byte| !byte.is_ascii_alphanumeric() && !matches!(byte, b'_' | b'.' | b'$'))
        .filter_map(|word| std::str::from_utf8(word).ok())
        .filter(|word| {
            let (class, name) = word.split_once('.').unwrap_or_default();
            let starts =
                |part: &str| part.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
            starts(class) && starts(name)
        })
        .take(NAMES_MAX)
        .map(|word| word.to_ascii_lowercase().into())
}
