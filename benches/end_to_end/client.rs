//! A client for what pgbench cannot do: ten thousand that idle, logins without the client's own key derivation, results
//! that nobody stores, COPY.

use std::{cell::RefCell, collections::HashMap, io, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, Mac as _};
use pglobby::wire::{
    frame::{Framer, Need, Piece},
    message::{append, append_cstr},
    message_reader::MessageReader,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};

use crate::stand::Target;

trait Transport: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Transport for T {}

/// Logged in.
pub struct Client {
    stream: Box<dyn Transport>,
}

thread_local! {
    /// Password and salt to salted password: deriving it takes a client longer than the rest of a login, and what is
    /// measured is the other side.
    static SALTED: RefCell<HashMap<(String, String), [u8; 32]>> = RefCell::default();
    static CHUNK: RefCell<Vec<u8>> = RefCell::default();
}

/// What a reply amounted to.
pub struct Reply {
    pub bytes: usize,
    pub error: bool,
}

impl Client {
    pub async fn connect(target: &Target, tls: Option<&Arc<ClientConfig>>) -> io::Result<Self> {
        let mut socket: Box<dyn Transport> = if target.host.starts_with('/') {
            Box::new(UnixStream::connect(format!("{}/.s.PGSQL.{}", target.host, target.port)).await?)
        } else {
            let socket = TcpStream::connect((target.host.as_str(), target.port)).await?;
            socket.set_nodelay(true)?;
            Box::new(socket)
        };
        let stream: Box<dyn Transport> = match tls {
            None => socket,
            Some(config) => {
                socket.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await?;
                if socket.read_u8().await? != b'S' {
                    return Err(io::Error::other("no TLS"));
                }
                let name = ServerName::try_from("localhost").unwrap();
                Box::new(tokio_rustls::TlsConnector::from(config.clone()).connect(name, socket).await?)
            }
        };
        let mut client = Self { stream };
        client.log_in(target).await?;
        Ok(client)
    }

    /// RFC 5802, and PostgreSQL's documentation, "SASL Authentication".
    async fn log_in(&mut self, target: &Target) -> io::Result<()> {
        let mut hello = vec![0, 0, 0, 0, 0, 3, 0, 0];
        for text in ["user", &target.user, "database", &target.database, ""] {
            append_cstr(&mut hello, text.as_bytes());
        }
        let length = u32::try_from(hello.len()).unwrap();
        hello[..4].copy_from_slice(&length.to_be_bytes());
        self.send(&hello).await?;

        let nonce = STANDARD.encode(rand::random::<[u8; 18]>());
        let first = format!("n=,r={nonce}");
        let mut reader = MessageReader::default();
        loop {
            let message = reader.next(&mut self.stream, 100_000).await.map_err(io::Error::other)?;
            let mut answer = Vec::new();
            match (message.tag(), message.body()) {
                (b'R', [0, 0, 0, 10, ..]) => append(&mut answer, b'p', |out| {
                    append_cstr(out, b"SCRAM-SHA-256");
                    out.extend_from_slice(&u32::try_from(first.len() + 3).unwrap().to_be_bytes());
                    out.extend_from_slice(format!("n,,{first}").as_bytes());
                }),
                (b'R', [0, 0, 0, 11, theirs @ ..]) => {
                    let theirs = String::from_utf8_lossy(theirs);
                    let proof = prove(&target.password, &first, &theirs);
                    append(&mut answer, b'p', |out| out.extend_from_slice(proof.as_bytes()));
                }
                (b'Z', _) => return Ok(()),
                (b'E', body) => return Err(io::Error::other(String::from_utf8_lossy(body).into_owned())),
                _ => {}
            }
            if !answer.is_empty() {
                self.send(&answer).await?;
            }
        }
    }

    /// TLS keeps what is not flushed.
    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// A simple query, its reply read and dropped.
    pub async fn query(&mut self, sql: &str) -> io::Result<Reply> {
        let mut message = Vec::new();
        append(&mut message, b'Q', |out| append_cstr(out, sql.as_bytes()));
        self.send(&message).await?;
        self.read_until(b'Z').await
    }

    /// `COPY … FROM STDIN` of `count` times `rows`.
    pub async fn copy_in(&mut self, sql: &str, rows: &[u8], count: usize) -> io::Result<Reply> {
        let mut message = Vec::new();
        append(&mut message, b'Q', |out| append_cstr(out, sql.as_bytes()));
        self.send(&message).await?;
        self.read_until(b'G').await?;
        let mut data = Vec::new();
        append(&mut data, b'd', |out| out.extend_from_slice(rows));
        for _ in 0..count {
            self.send(&data).await?;
        }
        self.send(&[b'c', 0, 0, 0, 4]).await?;
        self.read_until(b'Z').await
    }

    pub async fn leave(mut self) -> io::Result<()> {
        self.send(&[b'X', 0, 0, 0, 4]).await
    }

    async fn read_until(&mut self, last: u8) -> io::Result<Reply> {
        let mut reply = Reply { bytes: 0, error: false };
        let mut framer = Framer::default();
        let mut chunk = CHUNK.take();
        chunk.resize(256 * 1024, 0);
        let mut done = false;
        while !done {
            let length = self.stream.read(&mut chunk).await?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            reply.bytes += length;
            let mut rest = &chunk[..length];
            let whole = |tag, _| Ok(if tag == last { Need::Whole } else { Need::Header });
            while let Some(piece) = framer.next(&mut rest, whole).map_err(io::Error::other)? {
                if let Piece::Whole { tag, .. } | Piece::First { tag, .. } = piece {
                    done |= tag == last;
                    reply.error |= tag == b'E';
                }
            }
        }
        CHUNK.set(chunk);
        Ok(reply)
    }
}

/// Client-final-message, of client-first-message-bare and server-first-message.
fn prove(password: &str, first: &str, theirs: &str) -> String {
    let field = |name: &str| theirs.split(',').find_map(|part| part.strip_prefix(name)).unwrap_or_default();
    let (nonce, salt) = (field("r="), field("s="));
    let salted = SALTED.with_borrow_mut(|known| {
        let derive = || {
            let rounds = field("i=").parse().unwrap();
            pbkdf2::pbkdf2_hmac_array::<Sha256, 32>(
                password.as_bytes(),
                &STANDARD.decode(salt).unwrap(),
                rounds,
            )
        };
        *known.entry((password.to_owned(), salt.to_owned())).or_insert_with(derive)
    });
    let hmac = |key: &[u8], data: &[u8]| {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
        mac.update(data);
        mac.finalize().into_bytes()
    };
    let without_proof = format!("c=biws,r={nonce}");
    let client_key = hmac(&salted, b"Client Key");
    let signature = hmac(&Sha256::digest(client_key), format!("{first},{theirs},{without_proof}").as_bytes());
    let proof: Vec<u8> = client_key.iter().zip(signature).map(|(key, signed)| key ^ signed).collect();
    format!("{without_proof},p={}", STANDARD.encode(proof))
}

/// Trusts what `authority` (PEM) has signed.
pub fn tls_config(authority: &str) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Arc::new(versions.unwrap().with_root_certificates(roots).with_no_client_auth())
}
