//! Limits HTTP connections to `max_connections` and always accepts a new one. If all places are taken, the
//! connection that has been idle for longest is closed. So a health probe is always answered.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Instant,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    task::AbortHandle,
};

/// The connections of one listener.
#[derive(Debug)]
pub struct Connections {
    max: usize,
    held: Mutex<OpenConnections>,
    left: Notify,
}

#[derive(Debug, Default)]
struct OpenConnections {
    last_id: u64,
    by_id: HashMap<u64, (Arc<Activity>, AbortHandle)>,
}

/// What a connection is doing.
#[derive(Debug)]
pub struct Activity(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Time of its last read or write.
    moved_at: Instant,
    /// Requests in progress.
    requests: usize,
}

impl Connections {
    /// None yet.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, held: Mutex::default(), left: Notify::new() })
    }

    /// Runs `serving` as a task once there is a place for it.
    pub async fn serve<F>(self: &Arc<Self>, activity: Arc<Activity>, serving: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        while !self.make_room() {
            // Every connection has a request in progress, and each ends in bounded time.
            self.left.notified().await;
        }
        let mut held = self.held();
        held.last_id += 1;
        let id = held.last_id;
        let connections = self.clone();
        let task = tokio::spawn(async move {
            let _leaving = ConnectionSlot(connections, id);
            serving.await;
        });
        held.by_id.insert(id, (activity, task.abort_handle()));
    }

    fn make_room(&self) -> bool {
        let mut held = self.held();
        if held.by_id.len() < self.max {
            return true;
        }
        let idle = held.by_id.iter().filter_map(|(id, (activity, _))| Some((activity.idle_since()?, *id)));
        let Some((_, longest)) = idle.min() else { return false };
        if let Some((_, task)) = held.by_id.remove(&longest) {
            task.abort();
        }
        true
    }

    fn held(&self) -> MutexGuard<'_, OpenConnections> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Frees the place of a connection on drop.
struct ConnectionSlot(Arc<Connections>, u64);

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.0.held().by_id.remove(&self.1);
        self.0.left.notify_one();
    }
}

impl Activity {
    /// Of a new connection.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { moved_at: Instant::now(), requests: 0 })))
    }

    /// Counts a request until the value is dropped.
    pub fn request(self: &Arc<Self>) -> Request {
        self.state().requests += 1;
        Request(self.clone())
    }

    fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.requests == 0).then_some(state.moved_at)
    }

    fn moved(&self) {
        self.state().moved_at = Instant::now();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request in progress.
#[derive(Debug)]
pub struct Request(Arc<Activity>);

impl Drop for Request {
    fn drop(&mut self) {
        self.0.state().requests -= 1;
        self.0.moved();
    }
}

/// A stream that records reads and writes.
#[derive(Debug)]
pub struct TrackedStream<S> {
    /// The stream.
    pub stream: S,
    /// The record.
    pub activity: Arc<Activity>,
}

impl<S> TrackedStream<S> {
    fn note<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if matches!(polled, Poll::Ready(Ok(_))) {
            self.activity.moved();
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TrackedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.note(polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TrackedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.note(polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
