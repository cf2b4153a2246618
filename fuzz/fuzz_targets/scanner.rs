//! Compares the SQL reader's tokens with those of PostgreSQL's own scanner, for every text that the latter takes.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pg_query::protobuf::Token;

fuzz_target!(|text: &str| -> Corpus {
    // PostgreSQL gets no text with a zero byte.
    if text.contains('\0') {
        return Corpus::Reject;
    }
    let Ok(scanned) = pg_query::scan(text) else { return Corpus::Reject };
    let mut expected = Vec::new();
    for token in &scanned.tokens {
        let (start, end) = (token.start as usize, token.end as usize);
        match token.token() {
            Token::SqlComment | Token::CComment => {}
            // The reader needs no operators: each of their bytes is a token of its own.
            _ if text.as_bytes()[start..end].iter().all(|byte| b"+-*/<>=~!@#%^&|`?:.,;()[]$\\{}".contains(byte)) => {
                expected.extend((start..end).map(|at| at..at + 1));
            }
            _ => expected.push(start..end),
        }
    }
    assert_eq!(pglobby::fuzzing::tokens(text), expected, "{text:?}");
    Corpus::Keep
});
