//! SCRAM-SHA-256 as the one who logs in (RFC 5802, RFC 7677), against a server that is not trusted yet.
//!
//! Our own where postgres-protocol has one, for two reasons: the salted password can be kept, which turns some
//! milliseconds of CPU per connection into as much per credential; and its limit of 100 000 iterations is below what
//! operators set on purpose. Pure: text in, text out.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, Mac as _};
use moka::future::Cache;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::dial_error::DialCause;

/// What a server may ask for. 600 000 is the highest recommendation about (OWASP, for PBKDF2 with SHA-256), some 200 ms
/// of CPU; more than that is an attack on ours.
const ITERATIONS_MAX: u32 = 600_000;

/// PostgreSQL's own nonces have 48 letters, ours included.
const NONCE_BYTES_MAX: usize = 1024;

/// A salted password nobody asked for in this time is forgotten.
const SALTED_IDLE: Duration = Duration::from_secs(30 * 60);

/// What the exchange is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Binding {
    /// We could not (no TLS, or a certificate without a hash of its own): `n`.
    Unable,
    /// We could, and the server does not offer it: `y`, which a server that did offer takes for an attack.
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
pub(super) struct Exchange {
    binding: Binding,
    nonce: String,
}

/// What the server answered to the first message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    server_first: String,
    nonce: String,
    pub(super) salt: Vec<u8>,
    pub(super) iterations: u32,
}

/// The last message, and what the server must answer to it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) message: String,
    server_signature: [u8; 32],
}

type Salted = Zeroizing<[u8; 32]>;

impl Exchange {
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
    pub(super) fn answer(&self, challenge: &Challenge, salted: &[u8; 32]) -> Answer {
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
        Answer {
            message: format!("{without_proof},p={}", STANDARD.encode(*proof)),
            server_signature: hmac(&*server_key, signed.as_bytes()),
        }
    }
}

impl Answer {
    /// server-final-message: proves that the server knows the verifier and did not just say yes.
    pub(super) fn verify(&self, message: &[u8]) -> Result<(), DialCause> {
        let signature = message.strip_prefix(b"v=").and_then(|text| STANDARD.decode(text).ok());
        match signature {
            Some(signature) if bool::from(signature.ct_eq(&self.server_signature)) => Ok(()),
            _ => Err(DialCause::Protocol("the server could not prove that it knows the password".to_owned())),
        }
    }
}

/// Salted passwords, made once per credential and salt however many connections ask at a time.
#[derive(Debug, Clone)]
pub(super) struct SaltedPasswords {
    made: Cache<[u8; 32], Arc<Salted>>,
    /// Hashing at a time, so that a login storm leaves cores to the sessions that are running.
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

    /// PBKDF2 of the prepared password, off the reactor.
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
            // Moves into the work: whoever stops waiting for it does not make room for more of it.
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

/// SaltedPassword, of the password as SASLprep makes it, or as it is where SASLprep has no answer; as PostgreSQL does.
fn salted(password: &SecretString, salt: &[u8], iterations: u32) -> Salted {
    let raw = password.expose_secret();
    let prepared = stringprep::saslprep(raw).map(|text| Zeroizing::new(text.into_owned()));
    let bytes = prepared.as_ref().map_or(raw, |text| text.as_str()).as_bytes();
    Zeroizing::new(pbkdf2::pbkdf2_hmac_array::<Sha256, 32>(bytes, salt, iterations))
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    // HMAC takes keys of every length (RFC 2104); the error exists for other constructions.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    mac.update(data);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The exchange of RFC 7677, section 3, with the empty user name PostgreSQL's clients send.
    fn rfc() -> Exchange {
        Exchange { binding: Binding::Unable, nonce: "rOprNGfwEbeRWgbNEkqO".to_owned() }
    }

    const SERVER_FIRST: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";

    #[test]
    fn the_salted_password_of_the_rfc() {
        let challenge = rfc().challenged(SERVER_FIRST.as_bytes()).unwrap();
        let salted = salted(&SecretString::from("pencil"), &challenge.salt, challenge.iterations);
        // With the RFC's own auth message: ServerSignature = HMAC(HMAC(SaltedPassword, "Server Key"), AuthMessage).
        let signed = format!(
            "n=user,r=rOprNGfwEbeRWgbNEkqO,{SERVER_FIRST},c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
        );
        let signature = hmac(&hmac(&*salted, b"Server Key"), signed.as_bytes());
        assert_eq!(STANDARD.encode(signature), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }

    #[test]
    fn our_half_of_an_exchange_fits_pgwires() {
        use pgwire::api::auth::sasl::scram::{ScramSecret, ScramServerAuth};
        let password = SecretString::from("p\u{ad}ass\u{2168}");
        let exchange = Exchange::begin(Binding::Unable);
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
    async fn a_password_is_salted_once_for_many_who_ask() {
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
