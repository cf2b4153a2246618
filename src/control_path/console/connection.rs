//! The wire protocol of the console: reads one message at a time and collects answers until the
//! administrator waits for them.
//!
//! pgwire encodes messages. Input is decoded here, because pgwire's decoders panic on malformed input.

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

const MESSAGE_BYTES_MAX: u32 = 64 * 1024;

/// Parameters reported at the start and by SHOW. Every driver knows this server version.
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

/// A version of PostgreSQL first, because drivers parse it.
pub const SERVER_VERSION: &str = concat!("15.0 (pglobby ", env!("CARGO_PKG_VERSION"), ")");

/// The connection is lost.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionLost {
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Writing failed.
    #[error(transparent)]
    Write(#[from] std::io::Error),
}

/// A connection of an administrator, with buffers for input and output.
#[derive(Debug)]
pub struct ConsoleConnection {
    stream: Stream,
    reader: MessageReader,
    out: BytesMut,
}

impl ConsoleConnection {
    /// `leftover` is input that was read already; `unsent` is sent first.
    pub fn new(stream: Stream, leftover: &[u8], unsent: Vec<u8>) -> Self {
        Self {
            stream,
            reader: MessageReader::with_leftover(leftover),
            out: BytesMut::from(unsent.as_slice()),
        }
    }

    /// The messages of a server after a login.
    pub fn greet(&mut self) {
        for (name, value) in PARAMETERS {
            self.say(&ParameterStatus::new(name.to_owned(), value.to_owned()));
        }
        // The cancel key cancels nothing, because no statement takes long.
        let process_id = i32::try_from(std::process::id()).unwrap_or(0);
        self.say(&BackendKeyData::new(process_id, SecretKey::I32(rand::random())));
        self.ready(false);
    }

    /// The next message. Sends all output before waiting for it.
    pub async fn next(&mut self) -> Result<Message, ConnectionLost> {
        if !self.reader.has_message(MESSAGE_BYTES_MAX) {
            self.flush().await?;
        }
        Ok(self.reader.next(&mut self.stream, MESSAGE_BYTES_MAX).await?)
    }

    /// Runs `work` until it ends or the administrator disconnects.
    pub async fn while_connected<T>(
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

    /// Sends the output.
    pub async fn flush(&mut self) -> Result<(), ConnectionLost> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out).await?;
            self.stream.flush().await?;
            self.out.clear();
        }
        Ok(())
    }

    /// Adds a message to the output.
    pub fn say<M: pgwire::messages::Message>(&mut self, message: &M) {
        let before = self.out.len();
        if message.encode(&mut self.out).is_err() {
            // Longer than the protocol allows: no part of it may be sent.
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

    /// A complete answer with its description.
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
pub fn text<'a>(body: &mut &'a [u8]) -> Result<&'a str, ConsoleError> {
    let bytes = cstr(body).map_err(|_| malformed())?;
    std::str::from_utf8(bytes)
        .map_err(|_| ConsoleError::new("22021", "invalid byte sequence for encoding \"UTF8\""))
}

/// Takes a two-byte number from the front of a message's body.
pub fn number(body: &mut &[u8]) -> Result<i16, ConsoleError> {
    let (bytes, rest) = body.split_first_chunk().ok_or_else(malformed)?;
    *body = rest;
    Ok(i16::from_be_bytes(*bytes))
}

/// Takes a four-byte number from the front of a message's body.
pub fn long_number(body: &mut &[u8]) -> Result<i32, ConsoleError> {
    let (bytes, rest) = body.split_first_chunk().ok_or_else(malformed)?;
    *body = rest;
    Ok(i32::from_be_bytes(*bytes))
}

/// The error for a malformed message.
pub fn malformed() -> ConsoleError {
    ConsoleError::new("08P01", "invalid message format")
}
