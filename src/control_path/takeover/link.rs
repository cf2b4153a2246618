//! The messages between two processes, one of which takes over from the other: a header, a body, and descriptors
//! that the kernel passes on with the header.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tokio::{io::Interest, net::UnixStream, sync::Mutex};

/// Kind, number, length of the body.
const HEADER_BYTES: usize = 1 + 8 + 4;

/// The longest body. A session with more is not moved.
pub const BODY_BYTES_MAX: usize = 64 << 20;

/// Descriptors with one message. The kernel takes 253.
pub const DESCRIPTORS_MAX: usize = 64;

/// What a message says; `mod.rs` has their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The number is the version of these messages.
    Hello = 1,
    /// The listening sockets. The number is that of the node in process numbers.
    Sockets,
    /// The new process accepts clients.
    Accepting,
    /// A session and its socket, with a number for the answer.
    Session,
    /// The session with this number is served.
    Moved,
    /// The session with this number is not taken, and the body says why; or its notifications are lost.
    Refused,
    /// What the session with this number was sent before the other process listened for it.
    Notifications,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Hello,
        Self::Sockets,
        Self::Accepting,
        Self::Session,
        Self::Moved,
        Self::Refused,
        Self::Notifications,
    ];

    fn read(byte: u8) -> io::Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| *kind as u8 == byte);
        found.ok_or_else(|| invalid("unknown message"))
    }
}

/// One message. Its body may have a session's secrets, so it has no `Debug`.
pub struct Message {
    pub kind: Kind,
    pub number: u64,
    pub body: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// A connection between the two processes.
#[derive(Debug)]
pub struct Link {
    stream: UnixStream,
    /// One message at a time.
    sending: Mutex<()>,
}

impl Link {
    /// Over this connection.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, sending: Mutex::default() }
    }

    /// Sends a message.
    pub async fn send(
        &self,
        kind: Kind,
        number: u64,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        if body.len() > BODY_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(invalid("too long a message"));
        }
        let mut header = [0; HEADER_BYTES];
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        let bytes = [kind as u8].into_iter().chain(number.to_be_bytes()).chain(length.to_be_bytes());
        header.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
        let _one_at_a_time = self.sending.lock().await;
        let sent = self.when(Interest::WRITABLE, || self.send_header(&header, descriptors)).await?;
        self.send_all(header.get(sent..).unwrap_or_default()).await?;
        self.send_all(body).await
    }

    fn send_header(&self, header: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        Ok(sendmsg(&self.stream, &[IoSlice::new(header)], &mut control, SendFlags::NOSIGNAL)?)
    }

    async fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = self.when(Interest::WRITABLE, || Ok(rustix::io::write(&self.stream, bytes)?)).await?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// The next message; `None`: the other process has closed the connection. Not cancel-safe: after a call that
    /// was dropped, the link is of no use.
    pub async fn receive(&self) -> io::Result<Option<Message>> {
        let mut header = [0; HEADER_BYTES];
        let (received, descriptors) =
            self.when(Interest::READABLE, || self.receive_header(&mut header)).await?;
        if received == 0 {
            return Ok(None);
        }
        self.receive_all(header.get_mut(received..).unwrap_or_default()).await?;
        let [kind, rest @ ..] = header;
        let (number, length) = rest.split_at(8);
        let number = u64::from_be_bytes(number.try_into().map_err(io::Error::other)?);
        let length = u32::from_be_bytes(length.try_into().map_err(io::Error::other)?) as usize;
        if length > BODY_BYTES_MAX {
            return Err(invalid("too long a message"));
        }
        let mut body = vec![0; length];
        self.receive_all(&mut body).await?;
        Ok(Some(Message { kind: Kind::read(kind)?, number, body, descriptors }))
    }

    fn receive_header(&self, header: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&self.stream, &mut [IoSliceMut::new(header)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        Ok((received.bytes, descriptors.flatten().collect()))
    }

    async fn receive_all(&self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let read =
                self.when(Interest::READABLE, || Ok(rustix::io::read(&self.stream, &mut *bytes)?)).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes = bytes.get_mut(read..).unwrap_or_default();
        }
        Ok(())
    }

    async fn when<T>(&self, interest: Interest, act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.stream.async_io(interest, act).await
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[tokio::test]
    async fn messages_arrive_in_order_with_their_descriptors() {
        let (near, far) = UnixStream::pair().unwrap();
        let (near, far) = (Link::new(near), Link::new(far));
        let body: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let sending = async {
            near.send(Kind::Sockets, 7, b"", &[listener.as_fd(), listener.as_fd()]).await.unwrap();
            near.send(Kind::Session, u64::MAX, &body, &[listener.as_fd()]).await.unwrap();
            near.send(Kind::Refused, 1, b"why", &[]).await.unwrap();
            drop(near);
        };
        let receiving = async {
            let sockets = far.receive().await.unwrap().unwrap();
            assert_eq!((sockets.kind, sockets.number, sockets.descriptors.len()), (Kind::Sockets, 7, 2));
            let passed = socket2::Socket::from(sockets.descriptors.into_iter().next().unwrap());
            let address = passed.local_addr().unwrap().as_socket();
            assert_eq!(address, listener.local_addr().ok());
            let session = far.receive().await.unwrap().unwrap();
            assert_eq!((session.number, session.descriptors.len()), (u64::MAX, 1));
            assert!(session.body == body);
            let refused = far.receive().await.unwrap().unwrap();
            assert_eq!((refused.kind, &*refused.body), (Kind::Refused, &b"why"[..]));
            assert!(refused.descriptors.is_empty());
            assert!(far.receive().await.unwrap().is_none());
        };
        tokio::join!(sending, receiving);
    }

    #[tokio::test]
    async fn an_unknown_message_and_one_that_is_too_long_are_errors() {
        for header in [[9_u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0]]
        {
            let (near, far) = UnixStream::pair().unwrap();
            near.try_write(&header).unwrap();
            assert!(Link::new(far).receive().await.is_err());
        }
    }
}
