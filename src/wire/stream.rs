//! A connection, plain or TLS, TCP or Unix, that can move from one thread's reactor to another's.
//!
//! A login may run on any worker; the session then moves once to its tenant's worker. tokio's sockets belong
//! to the reactor they were registered with, so [`Stream::detach`] takes the socket out and
//! [`Stream::attach`], called on the other runtime, registers it again (about 2 µs). The TLS state does not
//! change.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// The socket below TLS.
#[derive(Debug)]
pub enum Socket {
    /// TCP, registered with this thread's reactor.
    Tcp(TcpStream),
    /// Unix, registered with this thread's reactor.
    Unix(UnixStream),
    /// Between two reactors.
    DetachedTcp(std::net::TcpStream),
    /// Between two reactors.
    DetachedUnix(std::os::unix::net::UnixStream),
    /// One end of a pipe in this process, for the simulation. Belongs to no reactor.
    #[cfg(test)]
    Memory(tokio::io::DuplexStream),
    /// No socket: during a change of owner, and after a failed move.
    Gone,
}

/// A connection, with or without TLS.
#[derive(Debug)]
pub enum Stream {
    /// In clear.
    Plain(Socket),
    /// Either end of TLS; boxed, because its state is some kilobytes and most clients have none.
    Tls(Box<tokio_rustls::TlsStream<Socket>>),
}

impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Self {
        Self::Plain(Socket::Tcp(socket))
    }
}

impl From<UnixStream> for Stream {
    fn from(socket: UnixStream) -> Self {
        Self::Plain(Socket::Unix(socket))
    }
}

#[cfg(test)]
impl From<tokio::io::DuplexStream> for Stream {
    fn from(pipe: tokio::io::DuplexStream) -> Self {
        Self::Plain(Socket::Memory(pipe))
    }
}

impl Stream {
    /// Whether bytes are encrypted on their way.
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// The local address and the remote one; `None`: a Unix socket, or the connection is lost.
    pub fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        let (ours, theirs) = match self.socket() {
            Socket::Tcp(socket) => (socket.local_addr(), socket.peer_addr()),
            Socket::DetachedTcp(socket) => (socket.local_addr(), socket.peer_addr()),
            _ => return None,
        };
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Some((canonical(ours.ok()?), canonical(theirs.ok()?)))
    }

    /// Returns when there are bytes to read or the connection has ended. Needs no buffer.
    pub async fn readable(&self) -> io::Result<()> {
        match self.socket() {
            Socket::Tcp(socket) => socket.readable().await,
            Socket::Unix(socket) => socket.readable().await,
            _ => Err(detached()),
        }
    }

    /// The socket, below TLS if there is TLS.
    pub fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.get_ref().0,
        }
    }

    fn socket_mut(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.get_mut().0,
        }
    }

    /// Takes the socket out of this thread's reactor. Reads and writes fail until [`Self::attach`].
    ///
    /// # Errors
    /// The operating system's; the stream is unusable then.
    pub fn detach(&mut self) -> io::Result<()> {
        let socket = self.socket_mut();
        *socket = match std::mem::replace(socket, Socket::Gone) {
            Socket::Tcp(tcp) => Socket::DetachedTcp(tcp.into_std()?),
            Socket::Unix(unix) => Socket::DetachedUnix(unix.into_std()?),
            other => other,
        };
        Ok(())
    }

    /// Registers the socket with the reactor of the runtime this is called on.
    ///
    /// # Errors
    /// The operating system's; the stream is unusable then.
    pub fn attach(&mut self) -> io::Result<()> {
        let socket = self.socket_mut();
        *socket = match std::mem::replace(socket, Socket::Gone) {
            Socket::DetachedTcp(tcp) => Socket::Tcp(TcpStream::from_std(tcp)?),
            Socket::DetachedUnix(unix) => Socket::Unix(UnixStream::from_std(unix)?),
            other => other,
        };
        Ok(())
    }
}

fn detached() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the connection is between two reactors")
}

/// Calls the socket that is registered with this thread's reactor.
macro_rules! attached {
    ($socket:expr, $poll:ident($($given:expr),+)) => {
        match $socket.get_mut() {
            Socket::Tcp(socket) => Pin::new(socket).$poll($($given),+),
            Socket::Unix(socket) => Pin::new(socket).$poll($($given),+),
            #[cfg(test)]
            Socket::Memory(pipe) => Pin::new(pipe).$poll($($given),+),
            _ => Poll::Ready(Err(detached())),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        attached!(self, poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        attached!(self, poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        attached!(self, poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        attached!(self, poll_shutdown(cx))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
        }
    }
}
