//! Reads whole messages from a pipe.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// A message: its type and its body.
pub type Frame = (u8, Vec<u8>);

/// Bytes that have been read and are not whole messages yet.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// The next message; `None`: the connection has ended.
    pub async fn next(&mut self, pipe: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = take(&mut self.0) {
                return Ok(Some(frame));
            }
            if pipe.read_buf(&mut self.0).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// All messages in these bytes.
pub fn all(mut bytes: Vec<u8>) -> Vec<Frame> {
    std::iter::from_fn(|| take(&mut bytes)).collect()
}

fn take(bytes: &mut Vec<u8>) -> Option<Frame> {
    let length = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?) as usize;
    if bytes.len() <= length {
        return None;
    }
    let frame: Vec<u8> = bytes.drain(..=length).collect();
    Some((frame[0], frame[5..].to_vec()))
}

/// A message as a violation shows it. Of an error, what applications see of it.
pub fn shown((tag, body): &Frame) -> String {
    let tag_text = char::from(*tag);
    if matches!(tag, b'E' | b'N') && body.first() == Some(&b'S') {
        let field = |letter: u8| {
            let fields = body.split(|byte| *byte == 0);
            let found = fields.into_iter().find(|field| field.first() == Some(&letter));
            found.map(|field| String::from_utf8_lossy(&field[1..]).into_owned()).unwrap_or_default()
        };
        return format!("{tag_text} {} {}", field(b'C'), field(b'M'));
    }
    let text: String = body
        .iter()
        .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' })
        .collect();
    format!("{tag_text} {text}")
}
