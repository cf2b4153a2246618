//! Passwords of logins: generated here, stored only as SCRAM-SHA-256 verifiers.

use rand::Rng as _;
use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

/// 28 letters out of 57 are 163 bits.
const GENERATED_PASSWORD_LETTERS: usize = 28;

/// Without 0 O, 1 I l, which are easily confused. None needs quoting in a URL, in SQL or in a shell.
const ALPHABET: &[u8; 57] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

/// A password for a login, and whether it was generated and must be shown.
#[derive(Debug, Clone)]
pub struct LoginPassword {
    /// The password.
    pub password: SecretString,
    /// Generated here.
    pub generated: bool,
}

impl LoginPassword {
    /// The given password, or a generated one.
    pub fn given_or_generated(caller: Option<SecretString>) -> Self {
        match caller {
            Some(password) => Self { password, generated: false },
            None => Self { password: generate_password(), generated: true },
        }
    }
}

/// The verifier that PostgreSQL would store: `SCRAM-SHA-256$4096:<salt>$<stored key>:<server key>`, with a
/// random salt of 16 bytes. SASLprep is skipped for passwords that it does not allow, as PostgreSQL does
/// (RFC 5802, RFC 4013).
///
/// About 2 ms of CPU.
pub fn scram_verifier(password: &SecretString) -> SecretString {
    SecretString::from(postgres_protocol::password::scram_sha_256(password.expose_secret().as_bytes()))
}

/// A new random password.
pub fn generate_password() -> SecretString {
    let mut rng = rand::rng();
    // Full capacity at once, so that growing leaves no copy in memory.
    let mut password = Zeroizing::new(String::with_capacity(GENERATED_PASSWORD_LETTERS));
    for _ in 0..GENERATED_PASSWORD_LETTERS {
        password.push(char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
    }
    SecretString::from(password.as_str())
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use hmac::{Hmac, Mac as _};
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    fn a_verifier_is_what_rfc_5802_says_of_the_prepared_password() {
        // SASLprep turns the soft hyphen into nothing and the Roman numeral nine into two letters.
        let verifier = scram_verifier(&SecretString::from("p\u{ad}ass\u{2168}"));
        let text = verifier.expose_secret();
        let rest = text.strip_prefix("SCRAM-SHA-256$4096:").unwrap();
        let (salt, keys) = rest.split_once('$').unwrap();
        let (stored, server) = keys.split_once(':').unwrap();
        let salt = STANDARD.decode(salt).unwrap();
        assert_eq!(salt.len(), 16);

        let salted = pbkdf2::pbkdf2_hmac_array::<Sha256, 32>(b"passIX", &salt, 4096);
        let hmac = |data: &[u8]| {
            let mut mac = Hmac::<Sha256>::new_from_slice(&salted).unwrap();
            mac.update(data);
            mac.finalize().into_bytes()
        };
        assert_eq!(STANDARD.decode(stored).unwrap(), Sha256::digest(hmac(b"Client Key")).as_slice());
        assert_eq!(STANDARD.decode(server).unwrap(), hmac(b"Server Key").as_slice());
    }

    #[test]
    fn the_same_password_never_has_the_same_verifier() {
        let password = SecretString::from("secret");
        assert_ne!(scram_verifier(&password).expose_secret(), scram_verifier(&password).expose_secret());
    }

    #[test]
    fn a_generated_password_is_long_plain_and_new() {
        let (one, other) = (generate_password(), generate_password());
        assert_eq!(one.expose_secret().len(), GENERATED_PASSWORD_LETTERS);
        assert!(one.expose_secret().bytes().all(|byte| ALPHABET.contains(&byte)));
        assert_ne!(one.expose_secret(), other.expose_secret());
    }
}
