//! The console's end of the protocol: one message at a time, each in a buffer of its own, and answers gathered until
//! the administrator has nothing more to say.
//!
//! Messages are encoded by pgwire. What arrives is read here, on slices: pgwire's decoders panic on malformed input.

use bytes::BytesMut;
use pgwire::messages::{
    response::{CommandComplete, EmptyQueryResponse, ReadyForQuery, TransactionStatus},
    startup::{BackendKeyData, ParameterStatus, SecretKey},
};
use tokio::io::AsyncWriteExt as _;

use super::{
    ConsoleError, ConsoleReply,
    table::{Formats, Table},
};
use crate::wire::{
    frame::cstr,
    message_reader::{Message, MessageReader, ReadError},
    stream::Stream,
};

/// The longest message of an administrator; nobody types that much.
const MESSAGE_BYTES_MAX: u32 = 64 * 1024;

/// What is told at the start, and to drivers that ask with SHOW. A server version that every driver knows.
pub const PARAMETERS: [(&str, &str); 9] = [
    ("server_version", SERVER_VERSION),
    ("server_encoding", "UTF8"),
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("standard_conforming_strings", "on"),
    ("integer_datetimes", "on"),
    ("is_superuser", "off"),
];

/// PostgreSQL's, first; then who is really here.
pub const SERVER_VERSION: &str = concat!("15.0 (pglobby ", env!("CARGO_PKG_VERSION"), ")");

/// The connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionLost {
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] std::io::Error),
}

/// An administrator's connection, with what has arrived and what is to be sent.
#[derive(Debug)]
pub struct ConsoleConnection {
    stream: Stream,
    reader: MessageReader,
    out: BytesMut,
}

impl ConsoleConnection {
    /// `leftover` has arrived already; `unsent` goes out first.
    pub fn new(stream: Stream, leftover: &[u8], unsent: Vec<u8>) -> Self {
        Self {
            stream,
            reader: MessageReader::with_leftover(leftover),
            out: BytesMut::from(unsent.as_slice()),
        }
    }

    /// What a server says after a login.
    pub fn greet(&mut self) {
        for (name, value) in PARAMETERS {
            self.say(&ParameterStatus::new(name.to_owned(), value.to_owned()));
        }
        // Nothing here takes long enough to be cancelled: the key opens nothing.
        let process_id = i32::try_from(std::process::id()).unwrap_or(0);
        self.say(&BackendKeyData::new(process_id, SecretKey::I32(rand::random())));
        self.ready(false);
    }

    /// The next message. Everything said so far goes out before it is waited for.
    ///
    /// # Errors
    /// [`ConnectionLost`]
    pub async fn next(&mut self) -> Result<Message, ConnectionLost> {
        if !self.reader.has_message(MESSAGE_BYTES_MAX) {
            self.flush().await?;
        }
        Ok(self.reader.next(&mut self.stream, MESSAGE_BYTES_MAX).await?)
    }

    /// Does what takes a while; no longer than the administrator is there to hear of it.
    ///
    /// # Errors
    /// Those of `work`, and that nobody is there.
    pub async fn unless_gone<T>(
        &mut self,
        work: impl Future<Output = Result<T, ConsoleError>>,
    ) -> Result<T, ConsoleError> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.reader.end_of(&mut self.stream, MESSAGE_BYTES_MAX as usize) => {
                Err(ConsoleError::new("57P01", "the administrator has left"))
            }
        }
    }

    /// Sends what was said.
    ///
    /// # Errors
    /// [`ConnectionLost`]
    pub async fn flush(&mut self) -> Result<(), ConnectionLost> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out).await?;
            self.stream.flush().await?;
            self.out.clear();
        }
        Ok(())
    }

    /// Takes a message to be sent.
    pub fn say<M: pgwire::messages::Message>(&mut self, message: &M) {
        let before = self.out.len();
        if message.encode(&mut self.out).is_err() {
            // Longer than the protocol allows; nothing of it may go out.
            self.out.truncate(before);
        }
    }

    /// ReadyForQuery.
    pub fn ready(&mut self, in_transaction: bool) {
        self.say(&ReadyForQuery::new(match in_transaction {
            true => TransactionStatus::Transaction,
            false => TransactionStatus::Idle,
        }));
    }

    /// EmptyQueryResponse.
    pub fn nothing_asked(&mut self) {
        self.say(&EmptyQueryResponse::new());
    }

    /// A whole answer, described.
    pub fn answer(&mut self, answer: &ConsoleReply, formats: &Formats) {
        match answer {
            ConsoleReply::Rows { table, tag } => {
                self.say(&table.description(formats));
                self.rows(table, &table.rows, formats);
                self.complete(tag);
            }
            ConsoleReply::Done(tag) => self.complete(tag),
        }
    }

    /// DataRows.
    pub fn rows(&mut self, table: &Table, rows: &[Vec<super::table::Cell>], formats: &Formats) {
        for row in rows {
            self.say(&table.data_row(row, formats));
        }
    }

    /// CommandComplete.
    pub fn complete(&mut self, tag: &str) {
        self.say(&CommandComplete::new(tag.to_owned()));
    }
}

/// Takes a zero-terminated text from the front of a message's body.
///
/// # Errors
/// There is none, or it is not UTF-8.
pub fn text<'a>(body: &mut &'a [u8]) -> Result<&'a str, ConsoleError> {
    let bytes = cstr(body).map_err(|_| malformed())?;
    std::str::from_utf8(bytes)
        .map_err(|_| ConsoleError::new("22021", "invalid byte sequence for encoding \"UTF8\""))
}

/// Takes a two-byte number from the front of a message's body.
///
/// # Errors
/// There is none.
pub fn number(body: &mut &[u8]) -> Result<i16, ConsoleError> {
    let (bytes, rest) = body.split_first_chunk().ok_or_else(malformed)?;
    *body = rest;
    Ok(i16::from_be_bytes(*bytes))
}

/// Takes a four-byte number from the front of a message's body.
///
/// # Errors
/// There is none.
pub fn long_number(body: &mut &[u8]) -> Result<i32, ConsoleError> {
    let (bytes, rest) = body.split_first_chunk().ok_or_else(malformed)?;
    *body = rest;
    Ok(i32::from_be_bytes(*bytes))
}

/// A message that is not as the protocol has it.
pub fn malformed() -> ConsoleError {
    ConsoleError::new("08P01", "invalid message format")
}
