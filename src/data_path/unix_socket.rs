//! A listening Unix socket and its file. The file goes with the socket, unless another process listens there too.

use std::{
    fs::{Permissions, remove_file, set_permissions},
    io,
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use tracing::debug;

use super::inherited_sockets::InheritedSockets;

/// Clients in the kernel's queue at most; the kernel has a limit of its own.
const BACKLOG: i32 = i32::MAX;

/// A listening Unix socket.
#[derive(Debug)]
pub struct UnixSocket {
    /// Non-blocking.
    pub listener: UnixListener,
    path: PathBuf,
    owns_file: bool,
}

impl UnixSocket {
    /// Takes the socket of the process before, whose file it stays until [`Self::own_file`]. Or binds a new one
    /// with these rights, and replaces the file of a process that has ended.
    pub fn open(path: PathBuf, mode: u32, inherited: &mut InheritedSockets) -> io::Result<Self> {
        if let Some(listener) = inherited.take_unix(&path) {
            return Ok(Self { listener, path, owns_file: false });
        }
        let listener = bind(&path, mode)?;
        Ok(Self { listener, path, owns_file: true })
    }

    /// This is now the only process that listens there.
    pub fn own_file(&mut self) {
        self.owns_file = true;
        // Whoever connects is told the process that has called `listen` last.
        if let Err(error) = rustix::net::listen(&self.listener, BACKLOG) {
            debug!(path = %self.path.display(), %error, "cannot listen again on a socket that was taken over");
        }
    }

    /// Another process listens there from now on.
    pub fn leave_file(&mut self) {
        self.owns_file = false;
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        if self.owns_file {
            let _ = remove_file(&self.path);
        }
    }
}

fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
    }
    match remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    set_permissions(path, Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
