//! Whether a client knows a password, judged by the stored verifier alone. Pure.
//!
//! pgwire conducts the exchange; the comparison that decides is made here first, in constant time, which pgwire's is
//! not. Only a proof that is right goes on to pgwire.
//!
//! Source: RFC 5802, section 3; RFC 7677.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use hmac::{Hmac, Mac as _};
use pgwire::api::auth::sasl::scram::ScramSecret;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// What the verifiers we make have, and so what a mock must have to look like one.
const MOCK_ITERATIONS: usize = 4096;
const MOCK_SALT_BYTES: usize = 16;
/// Read in the place of what an unknown login has not, for the time it takes.
const UNKNOWN: &str = "SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:\
                       AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// A SCRAM-SHA-256 verifier, taken apart.
pub struct Verifier {
    salt: Vec<u8>,
    iterations: usize,
    stored_key: [u8; 32],
    server_key: [u8; 32],
}

impl Verifier {
    /// Reads a verifier as PostgreSQL spells it: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
    pub fn read(text: &str) -> Option<Self> {
        let (iterations, rest) = text.strip_prefix("SCRAM-SHA-256$")?.split_once(':')?;
        let (salt, keys) = rest.split_once('$')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let decode = |text: &str| BASE64_STANDARD.decode(text).ok();
        Some(Self {
            salt: decode(salt)?,
            iterations: iterations.parse().ok().filter(|count| *count > 0)?,
            stored_key: decode(stored_key)?.try_into().ok()?,
            server_key: decode(server_key)?.try_into().ok()?,
        })
    }

    /// What a login is asked by: what is stored, and else a mock. The same work is done for both.
    pub fn of(stored: Option<&str>, user: &str, mock_salt: &[u8]) -> (Self, bool) {
        let mock = Self::mock(user, mock_salt);
        let read = Self::read(stored.unwrap_or(UNKNOWN)).filter(|_| stored.is_some());
        let is_stored = read.is_some();
        (read.unwrap_or(mock), is_stored)
    }

    /// What an unknown login is asked: always the same salt for the same name, as a real one would have, wherever and
    /// whenever it asks, and keys that nobody knows.
    fn mock(user: &str, mock_salt: &[u8]) -> Self {
        let salt = hmac(mock_salt, user.as_bytes()).into_iter().take(MOCK_SALT_BYTES).collect();
        Self { salt, iterations: MOCK_ITERATIONS, stored_key: rand::random(), server_key: rand::random() }
    }

    /// As pgwire takes it.
    pub fn secret(&self) -> ScramSecret {
        ScramSecret::Verifier {
            salt: self.salt.clone(),
            iterations: self.iterations,
            stored_key: self.stored_key.to_vec(),
            server_key: self.server_key.to_vec(),
        }
    }

    /// Whether the proof in client-final-message is that of whoever knows the password, for the exchange whose messages
    /// these are. Takes as long for every proof of the right length.
    pub fn is_proved(&self, client_first: &[u8], server_first: &str, client_final: &[u8]) -> bool {
        // gs2-header is `flag,authzid,`; what follows is client-first-message-bare.
        let Some(bare) = client_first.splitn(3, |byte| *byte == b',').nth(2) else { return false };
        let Some(at) = client_final.windows(3).rposition(|part| part == b",p=") else { return false };
        let (without_proof, proof) = client_final.split_at(at);
        let proof = BASE64_STANDARD.decode(proof.get(3..).unwrap_or_default());
        let Some(mut key) = proof.ok().and_then(|proof| <[u8; 32]>::try_from(proof).ok()) else {
            return false;
        };
        // ClientProof = ClientKey XOR HMAC(StoredKey, AuthMessage), and StoredKey = H(ClientKey).
        let signed = [bare, b",", server_first.as_bytes(), b",", without_proof].concat();
        for (byte, signature) in key.iter_mut().zip(hmac(&self.stored_key, &signed)) {
            *byte ^= signature;
        }
        Sha256::digest(key).as_slice().ct_eq(&self.stored_key).into()
    }
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    // HMAC takes keys of every length (RFC 2104); the error exists for other constructions.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    mac.update(data);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use pgwire::api::auth::sasl::scram::ScramServerAuth;
    use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
    use proptest::prelude::*;

    use super::*;

    fn verifier(password: &str) -> Verifier {
        let text = postgres_protocol::password::scram_sha_256(password.as_bytes());
        Verifier::read(&text).unwrap()
    }

    /// The three messages of an exchange between a client that knows `password` and the verifier, and pgwire's opinion.
    fn exchange(verifier: &Verifier, password: &str) -> ([Vec<u8>; 3], bool) {
        let mut client = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        let first = client.message().to_vec();
        let (server_first, waiting) =
            ScramServerAuth::new().on_client_first_message_with_secret(&first, verifier.secret()).unwrap();
        client.update(server_first.as_bytes()).unwrap();
        let last = client.message().to_vec();
        let accepted = waiting.on_client_final_message(&last).is_ok();
        ([first, server_first.into_bytes(), last], accepted)
    }

    fn is_proved(verifier: &Verifier, [first, server_first, last]: &[Vec<u8>; 3]) -> bool {
        verifier.is_proved(first, std::str::from_utf8(server_first).unwrap(), last)
    }

    #[test]
    fn postgresqls_own_verifier_is_read_and_a_broken_one_is_not() {
        verifier("secret");
        let keys = format!("{0}:{0}", BASE64_STANDARD.encode([7; 32]));
        assert!(Verifier::read(&format!("SCRAM-SHA-256$1:c2FsdA==${keys}")).is_some());
        for broken in [
            "",
            "md5abc",
            "SCRAM-SHA-256$4096:c2FsdA==$AAAA:AAAA",
            "SCRAM-SHA-256$x:y$z",
            &format!("SCRAM-SHA-256$0:c2FsdA==${keys}"),
            &format!("SCRAM-SHA-256$4096:*${keys}"),
        ] {
            assert!(Verifier::read(broken).is_none(), "{broken}");
        }
    }

    #[test]
    fn the_right_password_proves_itself_and_a_wrong_one_does_not() {
        let verifier = verifier("open, sesame");
        for (password, right) in [("open, sesame", true), ("open, barley", false), ("", false)] {
            let (messages, accepted) = exchange(&verifier, password);
            assert_eq!((is_proved(&verifier, &messages), accepted), (right, right), "{password}");
        }
    }

    #[test]
    fn a_mock_asks_the_same_name_with_the_same_salt_and_believes_nobody() {
        let (one, same, other) =
            (unknown("nobody", b"a"), unknown("nobody", b"a"), unknown("somebody", b"a"));
        assert!(one.salt == same.salt && one.salt != other.salt && one.stored_key != same.stored_key);
        assert!(one.salt != unknown("nobody", b"b").salt);
        assert!(Verifier::read(UNKNOWN).is_some(), "it takes as long to read as a real one");
        // From outside it has the shape of a real one.
        let real = verifier("secret");
        assert_eq!((one.salt.len(), one.iterations), (real.salt.len(), real.iterations));
        let (messages, accepted) = exchange(&one, "");
        assert!(!accepted && !is_proved(&one, &messages));
    }

    fn unknown(user: &str, mock_salt: &[u8]) -> Verifier {
        let (verifier, is_stored) = Verifier::of(None, user, mock_salt);
        assert!(!is_stored);
        verifier
    }

    proptest! {
        #[test]
        fn a_changed_message_proves_nothing_and_never_panics(
            which in 0usize..3, at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>(),
        ) {
            let verifier = Verifier { salt: vec![1; 16], iterations: 1, ..verifier_of_one_round() };
            let (mut messages, accepted) = exchange(&verifier, "secret");
            prop_assert!(accepted && is_proved(&verifier, &messages));
            let message = &mut messages[which];
            let at = at.index(message.len());
            // Bits of base64 that stand for nothing are not part of the proof.
            prop_assume!(message[at] != byte && byte.is_ascii());
            // The gs2 header is bound by `c=`, which pgwire compares.
            prop_assume!(!(which == 0 && at < 3));
            message[at] = byte;
            prop_assert!(!is_proved(&verifier, &messages));
            messages[which].truncate(cut.index(messages[which].len()));
            let _ = is_proved(&verifier, &messages);
        }
    }

    fn verifier_of_one_round() -> Verifier {
        let salted = pgwire::api::auth::sasl::scram::gen_salted_password("secret", &[1; 16], 1);
        let client_key = hmac(&salted, b"Client Key");
        Verifier {
            salt: vec![1; 16],
            iterations: 1,
            stored_key: Sha256::digest(client_key).into(),
            server_key: hmac(&salted, b"Server Key"),
        }
    }
}
