//! Bytes that a connection could not take yet. While there are any, nothing more is read for that connection.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::AsyncWrite;

use crate::wire::stream::Stream;

/// The bytes that wait for one stream. Has no buffer while it is empty.
#[derive(Debug, Default)]
pub struct Unsent {
    bytes: Vec<u8>,
    /// The number of `bytes` that are written.
    written: usize,
    /// TLS has buffered bytes that it has not written to the socket yet.
    unflushed: bool,
}

impl From<Vec<u8>> for Unsent {
    /// Starts with bytes to write.
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, written: 0, unflushed: false }
    }
}

impl Unsent {
    /// Whether everything has been written.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && !self.unflushed
    }

    /// Bytes allocated.
    #[inline]
    pub fn allocated(&self) -> usize {
        self.bytes.capacity()
    }

    /// The bytes that are not written yet.
    pub fn rest(&self) -> &[u8] {
        self.bytes.get(self.written..).unwrap_or_default()
    }

    /// Appends bytes without writing.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes the waiting bytes and then these, as far as the stream takes them. Keeps the rest, after an
    /// error too.
    #[inline(always)]
    pub fn send(&mut self, stream: &mut Stream, cx: &mut Context<'_>, bytes: &[u8]) -> io::Result<()> {
        if !self.is_empty() || bytes.is_empty() {
            self.bytes.extend_from_slice(bytes);
            return Ok(());
        }
        match stream.write_now(bytes) {
            Ok(written) if written == bytes.len() => Ok(()),
            tried => self.send_rest(stream, cx, bytes, tried),
        }
    }

    /// Continues after the first write, which was incomplete.
    #[cold]
    fn send_rest(
        &mut self,
        stream: &mut Stream,
        cx: &mut Context<'_>,
        mut bytes: &[u8],
        first: io::Result<usize>,
    ) -> io::Result<()> {
        let mut tried = match first {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Pin::new(&mut *stream).poll_write(cx, bytes)
            }
            first => Poll::Ready(first),
        };
        loop {
            let error = match tried {
                Poll::Ready(Ok(0)) => io::ErrorKind::WriteZero.into(),
                Poll::Ready(Ok(written)) => {
                    bytes = bytes.get(written..).unwrap_or_default();
                    if bytes.is_empty() {
                        break;
                    }
                    tried = Pin::new(&mut *stream).poll_write(cx, bytes);
                    continue;
                }
                Poll::Ready(Err(error)) => error,
                Poll::Pending => break,
            };
            self.bytes.extend_from_slice(bytes);
            return Err(error);
        }
        self.bytes.extend_from_slice(bytes);
        if stream.is_tls() {
            self.unflushed = Pin::new(&mut *stream).poll_flush(cx)?.is_pending();
        }
        Ok(())
    }

    /// Writes waiting bytes; `true` when none are left.
    pub fn drain(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> io::Result<bool> {
        while let Some(rest) = self.bytes.get(self.written..).filter(|rest| !rest.is_empty()) {
            match Pin::new(&mut *stream).poll_write(cx, rest)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => self.written += written,
                Poll::Pending => return Ok(false),
            }
        }
        self.bytes = Vec::new();
        self.written = 0;
        self.unflushed = stream.is_tls() && Pin::new(stream).poll_flush(cx)?.is_pending();
        Ok(!self.unflushed)
    }
}
