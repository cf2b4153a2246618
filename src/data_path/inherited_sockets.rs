//! Listening sockets that another process has passed to this one. Each is taken by whatever is configured for its
//! address; those that nothing takes are closed.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use socket2::Socket;

/// The sockets that nothing has taken yet.
#[derive(Debug, Default)]
pub struct InheritedSockets(Vec<(Place, OwnedFd)>);

/// What a socket listens on.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl InheritedSockets {
    /// The sockets among these descriptors. Others are closed.
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        let known = descriptors.into_iter().filter_map(|descriptor| {
            let socket = Socket::from(descriptor);
            let address = socket.local_addr().ok()?;
            let path = address.as_pathname().map(|path| Place::Unix(path.to_owned()));
            Some((address.as_socket().map(Place::Tcp).or(path)?, socket.into()))
        });
        Self(known.collect())
    }

    /// The TCP socket that listens on this address.
    pub fn take_tcp(&mut self, address: SocketAddr) -> Option<TcpListener> {
        self.take(|place| *place == Place::Tcp(address)).map(TcpListener::from)
    }

    /// The Unix socket at this path.
    pub fn take_unix(&mut self, path: &Path) -> Option<UnixListener> {
        let same =
            |other: &Path| other == path || std::path::absolute(other).ok() == std::path::absolute(path).ok();
        self.take(|place| matches!(place, Place::Unix(other) if same(other))).map(UnixListener::from)
    }

    fn take(&mut self, is_wanted: impl Fn(&Place) -> bool) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(place, _)| is_wanted(place))?;
        Some(self.0.swap_remove(at).1)
    }

    /// Closes the sockets that are not configured any more, with their files. Only when the other process does
    /// not need them either.
    pub fn close_rest(&mut self) {
        for (place, _) in self.0.drain(..) {
            if let Place::Unix(path) = place {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// A second descriptor of a socket.
pub fn duplicate(socket: &impl AsFd) -> io::Result<OwnedFd> {
    socket.as_fd().try_clone_to_owned()
}
