//! Stands between the proxy and a PostgreSQL, and does to the bytes what networks and broken servers do.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// Passes connections on to a port of this machine until it is told otherwise. Ends with the test.
pub struct Forwarder {
    pub port: u16,
    fault: watch::Sender<Fault>,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

/// What happens to the server's bytes, on every connection at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    None,
    /// They stop, and nothing else does.
    Stall,
    /// The connection is cut (by RST) when so many more of them have passed.
    CutAfter(usize),
    /// These are said instead of the next ones, and the server's are passed on after them.
    Say(Vec<u8>),
}

impl Forwarder {
    pub async fn to(target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (fault, faults) = watch::channel(Fault::None);
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = connections.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(forward(client, target, faults.clone()));
            }
        });
        Self { port, fault, connections, task }
    }

    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(client: TcpStream, target: u16, mut faults: watch::Receiver<Fault>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let upwards = tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
    });
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
        let fault = faults.wait_for(|fault| *fault != Fault::Stall).await.map(|fault| fault.clone());
        let written = match fault {
            Ok(Fault::CutAfter(bytes)) if read >= bytes => {
                let _ = to_client.write_all(&buffer[..bytes]).await;
                socket2::SockRef::from(to_client.as_ref())
                    .set_linger(Some(std::time::Duration::ZERO))
                    .unwrap();
                break;
            }
            Ok(Fault::Say(words)) => to_client.write_all(&words).await,
            Ok(_) => to_client.write_all(&buffer[..read]).await,
            Err(_) => break,
        };
        if written.is_err() {
            break;
        }
    }
    upwards.abort();
}
