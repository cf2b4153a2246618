//! A connection, plain or TLS, TCP or Unix, that can move from one thread's reactor to another's.
//!
//! A login may run on any worker; the session then moves once to its tenant's worker. tokio's sockets belong
//! to the reactor they were registered with, so [`Stream::detach`] takes the socket out and
//! [`Stream::attach`], called on the other runtime, registers it again (about 2 µs). The TLS state does not
//! change.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
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
    Memory(super::memory_pipe::MemoryPipe),
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
        Self::Plain(Socket::Memory(pipe.into()))
    }
}

impl Stream {
    /// A client's connection that another process has passed on. Registered with no reactor yet.
    ///
    /// # Errors
    /// It is no socket.
    pub fn detached(descriptor: OwnedFd) -> io::Result<Self> {
        let socket = socket2::Socket::from(descriptor);
        let is_unix = socket.local_addr()?.is_unix();
        Ok(Self::Plain(match is_unix {
            true => Socket::DetachedUnix(socket.into()),
            false => Socket::DetachedTcp(socket.into()),
        }))
    }

    /// Another descriptor of the connection, for another process. `None`: it has TLS, whose state cannot be passed
    /// on, or the connection is lost.
    pub fn duplicate(&self) -> Option<OwnedFd> {
        match self {
            Self::Plain(Socket::Tcp(socket)) => socket.as_fd().try_clone_to_owned().ok(),
            Self::Plain(Socket::Unix(socket)) => socket.as_fd().try_clone_to_owned().ok(),
            _ => None,
        }
    }

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

    /// Whether the other end has refused bytes that were sent. Can be asked once.
    pub fn is_reset(&self) -> bool {
        let error = match self.socket() {
            Socket::Tcp(socket) => socket.take_error(),
            Socket::Unix(socket) => socket.take_error(),
            _ => Ok(None),
        };
        let kind = error.ok().flatten().map(|error| error.kind());
        matches!(kind, Some(io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe))
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

/// Reads once, if the reactor has reported something. A read that leaves room has emptied the socket: as tokio's own
/// `poll_read`, it takes the report back, but no later one.
macro_rules! read_now {
    ($socket:expr, $bytes:expr) => {{
        let mut read = 0;
        let emptied = || io::Error::from(io::ErrorKind::WouldBlock);
        let tried = $socket.try_io(Interest::READABLE, || {
            read = $socket.try_read($bytes)?;
            if 0 < read && read < $bytes.len() { Err(emptied()) } else { Ok(()) }
        });
        if read > 0 { Ok(read) } else { tried.map(|()| 0) }
    }};
}

impl Stream {
    /// Whether the reactor has reported something to read. Costs no system call. `true` also where only a read can
    /// tell: TLS may have decrypted bytes that were not read yet.
    #[inline]
    pub fn may_be_readable(&self) -> bool {
        match self {
            Self::Plain(Socket::Tcp(socket)) => socket.try_io(Interest::READABLE, || Ok(())).is_ok(),
            Self::Plain(Socket::Unix(socket)) => socket.try_io(Interest::READABLE, || Ok(())).is_ok(),
            #[cfg(test)]
            Self::Plain(Socket::Memory(pipe)) => pipe.may_be_readable(),
            _ => true,
        }
    }

    /// Reads what there is. Costs half as much as tokio's `poll_read`, because it takes nothing from the task's budget:
    /// the caller limits how often it reads. `Pending`: the task is woken when there is more.
    #[inline]
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>, bytes: &mut [u8]) -> Poll<io::Result<usize>> {
        let tried = match self {
            Self::Plain(Socket::Tcp(socket)) => read_now!(socket, bytes),
            Self::Plain(Socket::Unix(socket)) => read_now!(socket, bytes),
            _ => return self.read_by_tokio(cx, bytes),
        };
        match tried {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.register_and_read(cx, bytes),
            tried => Poll::Ready(tried),
        }
    }

    /// There was nothing to read: registers the task with the reactor.
    fn register_and_read(&mut self, cx: &mut Context<'_>, bytes: &mut [u8]) -> Poll<io::Result<usize>> {
        let ready = match self {
            Self::Plain(Socket::Tcp(socket)) => socket.poll_read_ready(cx),
            Self::Plain(Socket::Unix(socket)) => socket.poll_read_ready(cx),
            _ => return self.read_by_tokio(cx, bytes),
        };
        match ready {
            Poll::Pending => Poll::Pending,
            // Something has come meanwhile.
            Poll::Ready(_) => self.read_by_tokio(cx, bytes),
        }
    }

    fn read_by_tokio(&mut self, cx: &mut Context<'_>, bytes: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut read = ReadBuf::new(bytes);
        Pin::new(self).poll_read(cx, &mut read).map_ok(|()| read.filled().len())
    }

    /// Writes what the socket takes at once, for less than tokio's `poll_write`. `WouldBlock`: only that can go on. TLS
    /// always says so.
    #[inline]
    pub fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(Socket::Tcp(socket)) => socket.try_write(bytes),
            Self::Plain(Socket::Unix(socket)) => socket.try_write(bytes),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::{io::AsyncWriteExt as _, net::TcpListener};

    use super::*;

    async fn pairs() -> [(Stream, Stream); 2] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (unix_near, unix_far) = UnixStream::pair().unwrap();
        [(near.unwrap().into(), far.unwrap().0.into()), (unix_near.into(), unix_far.into())]
    }

    #[tokio::test]
    async fn a_read_takes_what_is_there_and_the_task_is_woken_for_more() {
        for (mut near, mut far) in pairs().await {
            let mut bytes = [0; 4];
            for _ in 0..3 {
                let waits = poll_fn(|cx| Poll::Ready(near.poll_chunk(cx, &mut bytes).is_pending())).await;
                assert!(waits && !near.may_be_readable());
                assert_eq!(far.write_now(b"abcdef").unwrap(), 6);
                assert_eq!(poll_fn(|cx| near.poll_chunk(cx, &mut bytes)).await.unwrap(), 4);
                assert!(near.may_be_readable(), "the buffer was full");
                assert_eq!(poll_fn(|cx| near.poll_chunk(cx, &mut bytes)).await.unwrap(), 2);
                assert!(!near.may_be_readable(), "the socket is empty");
            }
            far.shutdown().await.unwrap();
            assert_eq!(poll_fn(|cx| near.poll_chunk(cx, &mut bytes)).await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn what_a_full_socket_does_not_take_is_written_later() {
        for (near, mut far) in pairs().await {
            let mut near = near;
            let mut unsent = crate::wire::unsent::Unsent::default();
            let bytes = vec![7; 32 * 1024 * 1024];
            poll_fn(|cx| Poll::Ready(unsent.send(&mut near, cx, &bytes))).await.unwrap();
            assert!(!unsent.is_empty());
            let drained = async {
                poll_fn(|cx| match unsent.drain(&mut near, cx) {
                    Ok(false) => Poll::Pending,
                    drained => Poll::Ready(drained),
                })
                .await
            };
            let received = async {
                let (mut received, mut chunk) = (0, vec![0; 65_536]);
                while received < bytes.len() {
                    received += poll_fn(|cx| far.poll_chunk(cx, &mut chunk)).await.unwrap();
                }
            };
            assert!(tokio::join!(drained, received).0.unwrap());
        }
    }
}
