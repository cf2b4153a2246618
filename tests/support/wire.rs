//! A client written by hand, for what no driver would do: any bytes in any order, answers one by one.
//!
//! Numbers and messages are those of PostgreSQL's documentation, chapter "Frontend/Backend Protocol".

use std::collections::HashMap;

use bytes::{Buf, BufMut, BytesMut};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use super::client::in_time;

/// A connection on which every byte is ours to choose.
pub struct Wire {
    pub stream: TcpStream,
    /// From ParameterStatus, as last reported.
    pub parameters: HashMap<String, String>,
    /// Process id and secret key from BackendKeyData; the key is 4 bytes, up to 256 from protocol 3.2 on.
    pub key: Option<(u32, Vec<u8>)>,
}

/// One message from the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub tag: u8,
    pub body: Vec<u8>,
}

impl Wire {
    /// Connected, nothing sent yet.
    pub async fn open(port: u16) -> Self {
        let stream = in_time("connecting", TcpStream::connect(("127.0.0.1", port))).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, parameters: HashMap::new(), key: None }
    }

    /// The same from another of this machine's addresses.
    pub async fn open_from(address: [u8; 4], port: u16) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((address, 0).into()).unwrap();
        let connecting = socket.connect(([127, 0, 0, 1], port).into());
        let stream = in_time("connecting", connecting).await.unwrap();
        Self { stream, parameters: HashMap::new(), key: None }
    }

    /// Connected and logged in, ReadyForQuery read.
    pub async fn login(port: u16, user: &str, password: &str, database: &str) -> Self {
        let mut wire = Self::open(port).await;
        wire.startup(PROTOCOL_3_0, &[("user", user), ("database", database)]).await;
        if let Err(refusal) = wire.authenticate(password).await {
            panic!("{refusal:?}");
        }
        wire
    }

    /// Sends bytes as they are.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> &mut Self {
        in_time("sending", self.stream.write_all(bytes)).await.unwrap();
        self
    }

    /// Sends a message with a correct length.
    pub async fn send(&mut self, tag: u8, body: &[u8]) -> &mut Self {
        self.send_bytes(&message(tag, body)).await
    }

    /// A StartupMessage with these parameters, in this order.
    pub async fn startup(&mut self, protocol: u32, parameters: &[(&str, &str)]) {
        self.send_bytes(&startup_message(protocol, parameters)).await;
    }

    /// Proves `password` by SCRAM-SHA-256 and reads up to ReadyForQuery; the ErrorResponse where it is refused.
    pub async fn authenticate(&mut self, password: &str) -> Result<Vec<Message>, Message> {
        let asked = self.receive().await;
        self.authenticate_as_asked(asked, password).await
    }

    /// The same where the first message has been read.
    pub async fn authenticate_as_asked(
        &mut self,
        asked: Message,
        password: &str,
    ) -> Result<Vec<Message>, Message> {
        let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        let mut seen = Vec::new();
        let mut next = Some(asked);
        loop {
            let received = match next.take() {
                Some(message) => message,
                None => self.receive().await,
            };
            match (received.tag, received.authentication_code()) {
                (b'R', Some(10)) => {
                    let mut body = b"SCRAM-SHA-256\0".to_vec();
                    body.put_u32(scram.message().len().try_into().unwrap());
                    body.extend_from_slice(scram.message());
                    self.send(b'p', &body).await;
                }
                (b'R', Some(11)) => {
                    scram.update(&received.body[4..]).unwrap();
                    let answer = scram.message().to_vec();
                    self.send(b'p', &answer).await;
                }
                (b'R', Some(12)) => scram.finish(&received.body[4..]).unwrap(),
                (b'E', _) => return Err(received),
                (b'Z', _) => return Ok(seen),
                _ => {}
            }
            seen.push(received);
        }
    }

    /// The next message. Fails the test if the connection ends instead.
    pub async fn receive(&mut self) -> Message {
        self.receive_or_end().await.expect("a message, not the end of the connection")
    }

    /// The next message, or `None` where the connection ends (also where it is reset).
    pub async fn receive_or_end(&mut self) -> Option<Message> {
        let mut header = [0; 5];
        in_time("waiting for a message", self.stream.read_exact(&mut header)).await.ok()?;
        let length = u32::from_be_bytes(header[1..].try_into().unwrap());
        let mut body =
            vec![0; usize::try_from(length).unwrap().checked_sub(4).expect("a length of 4 or more")];
        in_time("waiting for a message's body", self.stream.read_exact(&mut body)).await.ok()?;
        let message = Message { tag: header[0], body };
        self.remember(&message);
        Some(message)
    }

    /// Everything up to and including ReadyForQuery.
    pub async fn until_ready(&mut self) -> Vec<Message> {
        self.until(b'Z').await
    }

    /// Everything up to and including the first message with `tag`.
    pub async fn until(&mut self, tag: u8) -> Vec<Message> {
        let mut seen = Vec::new();
        loop {
            seen.push(self.receive().await);
            if seen.last().is_some_and(|message| message.tag == tag) {
                return seen;
            }
        }
    }

    /// One byte, as the answer to SSLRequest is.
    pub async fn receive_byte(&mut self) -> u8 {
        in_time("waiting for a byte", self.stream.read_u8()).await.unwrap()
    }

    /// Reads to the end of the connection; what still came.
    pub async fn until_end(&mut self) -> Vec<Message> {
        let mut seen = Vec::new();
        while let Some(message) = self.receive_or_end().await {
            seen.push(message);
        }
        seen
    }

    /// A simple query and all of its answers.
    pub async fn query(&mut self, sql: &str) -> Vec<Message> {
        self.send(b'Q', &c_string(sql)).await;
        self.until_ready().await
    }

    /// Closes with RST instead of FIN, as a crashed host does.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }

    /// A CancelRequest for this connection, ready to be sent on another.
    pub fn cancel_request(&self) -> Vec<u8> {
        let (pid, secret) = self.key.as_ref().expect("BackendKeyData");
        let mut body = BytesMut::new();
        body.put_u32(CANCEL_REQUEST);
        body.put_u32(*pid);
        body.extend_from_slice(secret);
        with_length(&body)
    }

    fn remember(&mut self, message: &Message) {
        match message.tag {
            b'S' => {
                let mut texts =
                    message.body.split(|byte| *byte == 0).map(|it| String::from_utf8_lossy(it).into_owned());
                if let (Some(name), Some(value)) = (texts.next(), texts.next()) {
                    self.parameters.insert(name, value);
                }
            }
            b'K' => self.key = Some(((&message.body[..4]).get_u32(), message.body[4..].to_vec())),
            _ => {}
        }
    }
}

impl Message {
    /// The fields of an ErrorResponse or NoticeResponse by their letter: `C` SQLSTATE, `M` message, `S` severity.
    pub fn field(&self, letter: u8) -> Option<String> {
        let mut fields = self.body.split(|byte| *byte == 0);
        fields.find(|it| it.first() == Some(&letter)).map(|it| String::from_utf8_lossy(&it[1..]).into_owned())
    }

    /// The SQLSTATE of an ErrorResponse.
    pub fn sqlstate(&self) -> String {
        self.field(b'C').unwrap_or_else(|| panic!("no SQLSTATE in {self:?}"))
    }

    /// The values of a DataRow.
    pub fn values(&self) -> Vec<Option<String>> {
        let mut body = self.body.as_slice();
        let count = body.get_u16();
        let mut value = || match usize::try_from(body.get_i32()) {
            Ok(length) => {
                let (text, rest) = body.split_at(length);
                body = rest;
                Some(String::from_utf8_lossy(text).into_owned())
            }
            Err(_) => None,
        };
        (0..count).map(|_| value()).collect()
    }

    /// The text of a CommandComplete.
    pub fn command(&self) -> String {
        String::from_utf8_lossy(self.body.strip_suffix(b"\0").unwrap_or(&self.body)).into_owned()
    }

    pub fn authentication_code(&self) -> Option<u32> {
        (self.tag == b'R').then(|| self.body.as_slice().get_u32())
    }
}

/// The tags as a word: `tags(&answers) == "TDCZ"`.
pub fn tags(messages: &[Message]) -> String {
    messages.iter().map(|message| char::from(message.tag)).collect()
}

/// The values of all rows.
pub fn rows(messages: &[Message]) -> Vec<Vec<Option<String>>> {
    messages.iter().filter(|message| message.tag == b'D').map(Message::values).collect()
}

pub fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut whole = vec![tag];
    whole.extend(with_length(body));
    whole
}

pub fn startup_message(protocol: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = protocol.to_be_bytes().to_vec();
    for (name, value) in parameters {
        body.extend(c_string(name));
        body.extend(c_string(value));
    }
    body.push(0);
    with_length(&body)
}

pub fn ssl_request() -> Vec<u8> {
    with_length(&SSL_REQUEST.to_be_bytes())
}

pub fn parse(name: &str, sql: &str) -> Vec<u8> {
    let mut body = c_string(name);
    body.extend(c_string(sql));
    body.put_u16(0);
    message(b'P', &body)
}

/// Text parameters, text results.
pub fn bind(portal: &str, statement: &str, parameters: &[Option<&str>]) -> Vec<u8> {
    let mut body = c_string(portal);
    body.extend(c_string(statement));
    body.put_u16(0);
    body.put_u16(parameters.len().try_into().unwrap());
    for parameter in parameters {
        match parameter {
            Some(text) => {
                body.put_i32(text.len().try_into().unwrap());
                body.extend_from_slice(text.as_bytes());
            }
            None => body.put_i32(-1),
        }
    }
    body.put_u16(0);
    message(b'B', &body)
}

/// `kind` is `b'S'` (statement) or `b'P'` (portal).
pub fn describe(kind: u8, name: &str) -> Vec<u8> {
    message(b'D', &[&[kind][..], &c_string(name)].concat())
}

/// `kind` is `b'S'` (statement) or `b'P'` (portal).
pub fn close(kind: u8, name: &str) -> Vec<u8> {
    message(b'C', &[&[kind][..], &c_string(name)].concat())
}

/// At most `rows_max` rows; 0 for all.
pub fn execute(portal: &str, rows_max: u32) -> Vec<u8> {
    let mut body = c_string(portal);
    body.put_u32(rows_max);
    message(b'E', &body)
}

/// Parse, Bind, Execute and Sync of an unnamed statement without parameters.
pub fn batch(sql: &str) -> Vec<u8> {
    [parse("", sql), bind("", "", &[]), execute("", 0), sync()].concat()
}

pub fn sync() -> Vec<u8> {
    message(b'S', b"")
}

pub fn flush() -> Vec<u8> {
    message(b'H', b"")
}

pub fn c_string(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn with_length(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&length.to_be_bytes()[..], body].concat()
}

pub const PROTOCOL_3_0: u32 = 3 << 16;
pub const PROTOCOL_3_2: u32 = (3 << 16) | 2;
pub const SSL_REQUEST: u32 = 80_877_103;
pub const CANCEL_REQUEST: u32 = 80_877_102;
