//! Whole messages, and how a violation shows them.

use std::io;

use tokio::io::AsyncRead;

use crate::{
    data_path::session_state::channels::messages,
    wire::{
        message_reader::{Message, MessageReader},
        server_error::ServerError,
    },
};

/// The longest message: texts and parameters of the proxy's own questions.
const LENGTH_MAX: u32 = 1 << 20;

/// The next message.
///
/// # Errors
/// The connection has ended.
pub async fn next(reader: &mut MessageReader, pipe: &mut (impl AsyncRead + Unpin)) -> io::Result<Message> {
    reader.next(pipe, LENGTH_MAX).await.map_err(io::Error::other)
}

/// All messages in these bytes.
pub fn all(bytes: &[u8]) -> Vec<Message> {
    messages(bytes).map(|message| Message { bytes: message.into() }).collect()
}

/// Of an error, what applications see of it.
pub fn shown(message: &Message) -> String {
    let tag = char::from(message.tag());
    if matches!(message.tag(), b'E' | b'N') && message.body().first() == Some(&b'S') {
        let ServerError { sqlstate, message, .. } = ServerError::read(&message.bytes);
        return format!("{tag} {sqlstate} {message}");
    }
    let readable = |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' };
    format!("{tag} {}", message.body().iter().map(readable).collect::<String>())
}
