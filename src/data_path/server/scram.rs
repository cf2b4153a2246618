//! The client side of SCRAM-SHA-256 (RFC 5802, RFC 7677), with a server that is not trusted yet.
//!
//! postgres-protocol has one as well. This one keeps the salted password, which saves some milliseconds of
//! CPU per connection, and allows more iterations than 100,000, which operators set on purpose.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use moka::future::Cache;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::dial_error::DialCause;

/// Most iterations that a server may ask for: OWASP's recommendation for PBKDF2 with SHA-256, about 200 ms of
/// CPU. More is an attack.
const ITERATIONS_MAX: u32 = 600_000;

/// PostgreSQL's nonces have 48 bytes, with the client's.
const NONCE_BYTES_MAX: usize = 1024;

/// A salted password that is unused for this long is dropped.
const SALTED_IDLE: Duration = Duration::from_secs(30 * 60);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Binding {
    /// The proxy cannot (no TLS, or a certificate without a hash of its own): `n`.
    Unable,
    /// The proxy can, and the server does not offer it: `y`, an attack to a server that did.
    NotOffered,
    /// SCRAM-SHA-256-PLUS, to the server's certificate.
    ServerEndPoint(Vec<u8>),
}

impl Binding {
    fn gs2_header(&self) -> &'static str {
        match self {
            Self::Unable => "n,,",
            Self::NotOffered => "y,,",
            Self::ServerEndPoint(_) => "p=tls-server-end-point,,",
        }
    }

    fn mechanism(&self) -> &'static str {
        match self {
            Self::ServerEndPoint(_) => "SCRAM-SHA-256-PLUS",
            _ => "SCRAM-SHA-256",
        }
    }
}

/// The exchange up to the server's first message.
#[derive(Debug)]
pub(super) struct ScramExchange {
    binding: Binding,
    nonce: String,
}

/// The server's answer to the first message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    server_first: String,
    nonce: String,
    pub(super) salt: Vec<u8>,
    pub(super) iterations: u32,
}

/// The last message, and the answer that the server must give.
#[derive(Debug)]
pub(super) struct FinalMessage {
    pub(super) message: String,
    server_signature: [u8; 32],
}

type Salted = Zeroizing<[u8; 32]>;

impl ScramExchange {
    pub(super) fn begin(binding: Binding) -> Self {
        Self { binding, nonce: STANDARD.encode(rand::random::<[u8; 18]>()) }
    }

    pub(super) fn mechanism(&self) -> &'static str {
        self.binding.mechanism()
    }

    /// client-first-message; PostgreSQL takes the user name from the startup packet.
    pub(super) fn first_message(&self) -> String {
        format!("{}n=,r={}", self.binding.gs2_header(), self.nonce)
    }

    /// server-first-message: `r=` our nonce and more, `s=` salt, `i=` iterations.
    pub(super) fn challenged(&self, message: &[u8]) -> Result<Challenge, DialCause> {
        let refuse = |why: &str| DialCause::Protocol(format!("SCRAM challenge: {why}"));
        let text = std::str::from_utf8(message).map_err(|_| refuse("not UTF-8"))?;
        let mut fields = text.split(',');
        let mut field = |name: &str| {
            fields.next().and_then(|field| field.strip_prefix(name)).ok_or_else(|| refuse("malformed"))
        };
        let (nonce, salt, iterations) = (field("r=")?, field("s=")?, field("i=")?);
        if nonce.len() > NONCE_BYTES_MAX {
            return Err(refuse("nonce too long"));
        }
        if nonce.strip_prefix(self.nonce.as_str()).is_none_or(str::is_empty) {
            return Err(refuse("nonce is not an extension of ours"));
        }
        let iterations = iterations.parse().ok().filter(|count| (1..=ITERATIONS_MAX).contains(count));
        Ok(Challenge {
            server_first: text.to_owned(),
            nonce: nonce.to_owned(),
            salt: STANDARD.decode(salt).map_err(|_| refuse("salt is not base64"))?,
            iterations: iterations.ok_or_else(|| refuse("iterations out of bounds"))?,
        })
    }

    /// client-final-message.
    pub(super) fn answer(&self, challenge: &Challenge, salted: &[u8; 32]) -> FinalMessage {
        let mut bound = self.binding.gs2_header().as_bytes().to_vec();
        if let Binding::ServerEndPoint(hash) = &self.binding {
            bound.extend_from_slice(hash);
        }
        let without_proof = format!("c={},r={}", STANDARD.encode(bound), challenge.nonce);
        let signed = format!("n=,r={},{},{without_proof}", self.nonce, challenge.server_first);

        let mut proof = Zeroizing::new(hmac(salted, b"Client Key"));
        let stored_key = Sha256::digest(*proof);
        for (byte, signature) in proof.iter_mut().zip(hmac(&stored_key, signed.as_bytes())) {
            *byte ^= signature;
        }
        let server_key = Zeroizing::new(hmac(salted, b"Server Key"));
        FinalMessage {
            message: format!("{without_proof},p={}", STANDARD.encode(*proof)),
            server_signature: hmac(&*server_key, signed.as_bytes()),
        }
    }
}

impl FinalMessage {
    /// server-final-message: proves that the server knows the verifier.
    pub(super) fn verify(&self, message: &[u8]) -> Result<(), DialCause> {
        let signature = message.strip_prefix(b"v=").and_then(|text| STANDARD.decode(text).ok());
        match signature {
            Some(signature) if bool::from(signature.ct_eq(&self.server_signature)) => Ok(()),
            _ => Err(DialCause::Protocol("the server could not prove that it knows the password".to_owned())),
        }
    }
}

/// Takes a server's challenge, which goes on from our nonce, and its last message.
#[cfg(any(test, fuzzing))]
pub fn answer_scram(challenge: &[u8], last: &[u8]) {
    let exchange = ScramExchange::begin(Binding::Unable);
    let challenge = [b"r=", exchange.nonce.as_bytes(), challenge].concat();
    if let Ok(challenge) = exchange.challenged(&challenge) {
        let answer = exchange.answer(&challenge, &[0; 32]);
        assert!(answer.verify(last).is_err());
    }
}

/// Salted passwords, computed once per credential and salt, also for many connections at a time.
#[derive(Debug, Clone)]
pub(super) struct SaltedPasswords {
    made: Cache<[u8; 32], Arc<Salted>>,
    /// Limits hashing at a time: many logins at once leave cores to the running sessions.
    hashing: Arc<Semaphore>,
}

impl SaltedPasswords {
    pub(super) fn new(entries_max: u64) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            made: Cache::builder().max_capacity(entries_max).time_to_idle(SALTED_IDLE).build(),
            hashing: Arc::new(Semaphore::new((cores / 2).max(1))),
        }
    }

    /// The salted password, computed off the reactor.
    pub(super) async fn get(
        &self,
        password: &SecretString,
        challenge: &Challenge,
    ) -> Result<Arc<Salted>, DialCause> {
        let Challenge { salt, iterations, .. } = challenge;
        let mut key = Sha256::new();
        key.update((salt.len() as u64).to_be_bytes());
        key.update(salt);
        key.update(iterations.to_be_bytes());
        key.update(password.expose_secret());

        let make = async {
            // Held by the work itself: a caller that stops waiting does not allow more work.
            let permit = self.hashing.clone().acquire_owned().await.map_err(|error| error.to_string())?;
            let (password, salt, iterations) = (password.clone(), salt.clone(), *iterations);
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                Arc::new(salted(&password, &salt, iterations))
            })
            .await
            .map_err(|error| error.to_string())
        };
        let made = self.made.try_get_with(key.finalize().into(), make).await;
        made.map_err(|error: Arc<String>| DialCause::Protocol(format!("SCRAM: {error}")))
    }
}

/// SaltedPassword after SASLprep, or of the password as given where that fails, as in PostgreSQL.
fn salted(password: &SecretString, salt: &[u8], iterations: u32) -> Salted {
    let raw = password.expose_secret();
    let prepared = stringprep::saslprep(raw).map(|text| Zeroizing::new(text.into_owned()));
    let bytes = prepared.as_ref().map_or(raw, |text| text.as_str()).as_bytes();
    Zeroizing::new(pbkdf2::pbkdf2_hmac_array::<Sha256, 32>(bytes, salt, iterations))
}

/// HMAC-SHA-256.
pub(in crate::data_path) fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
    let mut code = [0; 32];
    code.copy_from_slice(ring::hmac::sign(&key, data).as_ref());
    code
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The exchange of RFC 7677, section 3, with the empty user name PostgreSQL's clients send.
    fn rfc() -> ScramExchange {
        ScramExchange { binding: Binding::Unable, nonce: "rOprNGfwEbeRWgbNEkqO".to_owned() }
    }

    const SERVER_FIRST: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";

    #[test]
    fn the_salted_password_of_the_rfc() {
        let challenge = rfc().challenged(SERVER_FIRST.as_bytes()).unwrap();
        let salted = salted(&SecretString::from("pencil"), &challenge.salt, challenge.iterations);
        // With the RFC's own auth message: ServerSignature = HMAC(HMAC(SaltedPassword, "Server Key"),
        // AuthMessage).
        let signed = format!(
            "n=user,r=rOprNGfwEbeRWgbNEkqO,{SERVER_FIRST},c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
        );
        let signature = hmac(&hmac(&*salted, b"Server Key"), signed.as_bytes());
        assert_eq!(STANDARD.encode(signature), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }

    #[test]
    fn the_client_side_fits_pgwires_server_side() {
        use pgwire::api::auth::sasl::scram::{ScramSecret, ScramServerAuth};
        let password = SecretString::from("p\u{ad}ass\u{2168}");
        let exchange = ScramExchange::begin(Binding::Unable);
        let salted = salted(&password, b"0123456789abcdef", 4096);
        let secret = ScramSecret::verifier_from_salted_password(
            b"0123456789abcdef".to_vec(),
            pgwire::api::auth::sasl::scram::gen_salted_password("passIX", b"0123456789abcdef", 4096),
            4096,
        );
        let (first, server) = ScramServerAuth::new()
            .on_client_first_message_with_secret(exchange.first_message().as_bytes(), secret)
            .unwrap();
        let challenge = exchange.challenged(first.as_bytes()).unwrap();
        let answer = exchange.answer(&challenge, &salted);
        let last = server.on_client_final_message(answer.message.as_bytes()).unwrap();
        answer.verify(last.as_bytes()).unwrap();
        assert!(
            answer.verify(b"v=AAAA").is_err()
                && answer.verify(b"").is_err()
                && answer.verify(b"e=x").is_err()
        );
    }

    #[test]
    fn a_hostile_challenge_is_refused() {
        let long = format!("r=rOprNGfwEbeRWgbNEkqO{},s=AAAA,i=1", "x".repeat(NONCE_BYTES_MAX));
        for (challenge, ok) in [
            ("r=rOprNGfwEbeRWgbNEkqOx,s=AAAA,i=1", true),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=AAAA,i=600000", true),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=AAAA,i=600001", false),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=AAAA,i=0", false),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=AAAA,i=4294967297", false),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=AAAA,i=-1", false),
            ("r=rOprNGfwEbeRWgbNEkqO,s=AAAA,i=1", false),
            ("r=somebody else,s=AAAA,i=1", false),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=*,i=1", false),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=AAAA", false),
            ("m=ext,r=rOprNGfwEbeRWgbNEkqOx,s=AAAA,i=1", false),
            ("", false),
            (long.as_str(), false),
        ] {
            assert_eq!(rfc().challenged(challenge.as_bytes()).is_ok(), ok, "{challenge}");
        }
        assert!(rfc().challenged(b"r=\xff").is_err());
    }

    #[tokio::test]
    async fn a_password_is_salted_once_for_many_connections() {
        let passwords = SaltedPasswords::new(10);
        let challenge = rfc().challenged(SERVER_FIRST.as_bytes()).unwrap();
        let (one, other) = (SecretString::from("one"), SecretString::from("other"));
        let (a, b) = tokio::join!(passwords.get(&one, &challenge), passwords.get(&one, &challenge));
        assert!(Arc::ptr_eq(&a.unwrap(), &b.unwrap()));
        let c = passwords.get(&other, &challenge).await.unwrap();
        assert_eq!(*c, salted(&other, &challenge.salt, 4096));
    }

    proptest! {
        #[test]
        fn no_challenge_panics(noise in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = rfc().challenged(&noise);
            let mut near = SERVER_FIRST.as_bytes().to_vec();
            near.extend_from_slice(&noise);
            let _ = rfc().challenged(&near);
        }
    }
}
