//! Verifies a client's SCRAM proof against the stored verifier. Pure.
//!
//! pgwire reads the client-first-message and makes the server-first-message. The last step is made here,
//! because its comparison of the proof takes constant time.
//!
//! Source: RFC 5802, section 3; RFC 7677.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use pgwire::api::auth::sasl::scram::ScramSecret;
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq as _;

use crate::data_path::server::hmac;

/// The parameters of the verifiers that pglobby makes; a mock has the same.
const MOCK_ITERATIONS: usize = 4096;
const MOCK_SALT_BYTES: usize = 16;
/// Parsed for an unknown login, so that its login takes as long as that of a known one.
const UNKNOWN: &str = "SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:\
                       AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// A parsed SCRAM-SHA-256 verifier.
pub struct Verifier {
    salt: Vec<u8>,
    iterations: usize,
    stored_key: [u8; 32],
    server_key: [u8; 32],
}

impl Verifier {
    /// Parses PostgreSQL's format: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
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

    /// Returns the stored verifier and `true`, or a mock and `false` if there is none or it cannot be parsed.
    /// Both take the same work.
    pub fn of(stored: Option<&str>, user: &str, mock_salt: &[u8]) -> (Self, bool) {
        let mock = Self::mock(user, mock_salt);
        let read = Self::read(stored.unwrap_or(UNKNOWN)).filter(|_| stored.is_some());
        let is_stored = read.is_some();
        (read.unwrap_or(mock), is_stored)
    }

    /// A verifier for an unknown login. The salt depends on the name only, on every node, as that of a real
    /// login does. The keys are random, so that no proof can match.
    fn mock(user: &str, mock_salt: &[u8]) -> Self {
        let salt = hmac(mock_salt, user.as_bytes()).into_iter().take(MOCK_SALT_BYTES).collect();
        Self { salt, iterations: MOCK_ITERATIONS, stored_key: rand::random(), server_key: rand::random() }
    }

    /// The verifier as pgwire's exchange takes it.
    pub fn secret(&self) -> ScramSecret {
        ScramSecret::Verifier {
            salt: self.salt.clone(),
            iterations: self.iterations,
            stored_key: self.stored_key.to_vec(),
            server_key: self.server_key.to_vec(),
        }
    }

    /// Verifies the last message of an exchange and returns the server-final-message; `None` if the channel
    /// binding, the nonce or the proof is wrong. `end_point` is the hash of the TLS certificate, where the
    /// exchange may bind it. The time does not depend on how much of a proof is right.
    pub fn server_final(
        &self,
        client_first: &[u8],
        server_first: &str,
        client_final: &[u8],
        end_point: Option<&[u8]>,
    ) -> Option<String> {
        // gs2-header is `flag,authzid,`; client-first-message-bare follows.
        let bare = client_first.splitn(3, |byte| *byte == b',').nth(2)?;
        let gs2_header = client_first.get(..client_first.len() - bare.len())?;
        let at = client_final.windows(3).rposition(|part| part == b",p=")?;
        let (without_proof, proof) = client_final.split_at(at);
        let mut attributes = without_proof.split(|byte| *byte == b',');
        let bound = BASE64_STANDARD.decode(attributes.next()?.strip_prefix(b"c=")?).ok()?;
        let binding = if gs2_header.starts_with(b"p=") { end_point? } else { &[] };
        if bound.strip_prefix(gs2_header)? != binding {
            return None;
        }
        let nonce = server_first.split(',').next()?.strip_prefix("r=")?;
        if attributes.next()?.strip_prefix(b"r=")? != nonce.as_bytes() {
            return None;
        }
        let proof = BASE64_STANDARD.decode(proof.get(3..)?).ok()?;
        let mut key = <[u8; 32]>::try_from(proof).ok()?;
        // ClientProof = ClientKey XOR HMAC(StoredKey, AuthMessage), and StoredKey = H(ClientKey).
        let signed = [bare, b",", server_first.as_bytes(), b",", without_proof].concat();
        for (byte, signature) in key.iter_mut().zip(hmac(&self.stored_key, &signed)) {
            *byte ^= signature;
        }
        if !bool::from(digest(&SHA256, &key).as_ref().ct_eq(&self.stored_key)) {
            return None;
        }
        Some(format!("v={}", BASE64_STANDARD.encode(hmac(&self.server_key, &signed))))
    }
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

    /// The messages of an exchange of a client with `password`, and pgwire's server-final-message.
    fn exchange(verifier: &Verifier, password: &str) -> ([Vec<u8>; 3], Option<String>) {
        let mut client = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        let first = client.message().to_vec();
        let (server_first, waiting) =
            ScramServerAuth::new().on_client_first_message_with_secret(&first, verifier.secret()).unwrap();
        client.update(server_first.as_bytes()).unwrap();
        let last = client.message().to_vec();
        let accepted = waiting.on_client_final_message(&last).ok();
        ([first, server_first.into_bytes(), last], accepted)
    }

    fn server_final(verifier: &Verifier, [first, server_first, last]: &[Vec<u8>; 3]) -> Option<String> {
        verifier.server_final(first, std::str::from_utf8(server_first).unwrap(), last, None)
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
            assert_eq!(server_final(&verifier, &messages), accepted, "{password}");
            assert_eq!(accepted.is_some(), right, "{password}");
        }
    }

    #[test]
    fn a_mock_has_one_salt_for_each_name_and_accepts_no_proof() {
        let (one, same, other) =
            (unknown("nobody", b"a"), unknown("nobody", b"a"), unknown("somebody", b"a"));
        assert!(one.salt == same.salt && one.salt != other.salt && one.stored_key != same.stored_key);
        assert!(one.salt != unknown("nobody", b"b").salt);
        assert!(Verifier::read(UNKNOWN).is_some(), "it takes as long to read as a real one");
        // A client sees no difference to a real one.
        let real = verifier("secret");
        assert_eq!((one.salt.len(), one.iterations), (real.salt.len(), real.iterations));
        let (messages, accepted) = exchange(&one, "");
        assert_eq!((accepted, server_final(&one, &messages)), (None, None));
    }

    fn unknown(user: &str, mock_salt: &[u8]) -> Verifier {
        let (verifier, is_stored) = Verifier::of(None, user, mock_salt);
        assert!(!is_stored);
        verifier
    }

    #[test]
    fn channel_binding_takes_the_hash_of_the_certificate() {
        let verifier = verifier("secret");
        for (end_point, right) in [(Some(&b"hash"[..]), true), (Some(b"other"), false), (None, false)] {
            let binding = ChannelBinding::tls_server_end_point(b"hash".to_vec());
            let mut client = ScramSha256::new(b"secret", binding);
            let first = client.message().to_vec();
            // The nonce itself may contain `=`.
            let at = first.windows(3).position(|part| part == b",r=").unwrap() + 3;
            let nonce = &first[at..];
            let nonce = String::from_utf8(nonce.to_vec()).unwrap();
            let salt = BASE64_STANDARD.encode(&verifier.salt);
            let server_first = format!("r={nonce}more,s={salt},i={}", verifier.iterations);
            client.update(server_first.as_bytes()).unwrap();
            let server_final = verifier.server_final(&first, &server_first, client.message(), end_point);
            assert_eq!(server_final.is_some(), right, "{end_point:?}");
        }
    }

    proptest! {
        #[test]
        fn a_changed_message_proves_nothing_and_never_panics(
            which in 0usize..3, at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>(),
        ) {
            let verifier = Verifier { salt: vec![1; 16], iterations: 1, ..verifier_of_one_round() };
            let (mut messages, accepted) = exchange(&verifier, "secret");
            prop_assert!(accepted.is_some() && accepted == server_final(&verifier, &messages));
            let message = &mut messages[which];
            let at = at.index(message.len());
            // Unused bits of base64 are not part of the proof.
            prop_assume!(message[at] != byte && byte.is_ascii());
            message[at] = byte;
            prop_assert_eq!(server_final(&verifier, &messages), None);
            messages[which].truncate(cut.index(messages[which].len()));
            let _ = server_final(&verifier, &messages);
        }
    }

    fn verifier_of_one_round() -> Verifier {
        let salted = pgwire::api::auth::sasl::scram::gen_salted_password("secret", &[1; 16], 1);
        let client_key = hmac(&salted, b"Client Key");
        Verifier {
            salt: vec![1; 16],
            iterations: 1,
            stored_key: digest(&SHA256, &client_key).as_ref().try_into().unwrap(),
            server_key: hmac(&salted, b"Server Key"),
        }
    }
}
