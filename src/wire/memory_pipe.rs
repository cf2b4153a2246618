//! One end of a pipe for the simulation. Like a socket of a reactor, it reports once that there is something to
//! read, and wakes only the task that has found nothing before.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// One end of the pipe.
#[derive(Debug)]
pub struct MemoryPipe {
    pipe: DuplexStream,
    report: Arc<Report>,
}

/// What the reactor would know.
#[derive(Debug)]
struct Report {
    is_readable: AtomicBool,
    reader: std::sync::Mutex<Option<Waker>>,
}

impl Wake for Report {
    fn wake(self: Arc<Self>) {
        self.is_readable.store(true, Ordering::SeqCst);
        let reader = self.reader.lock().unwrap().take();
        reader.into_iter().for_each(Waker::wake);
    }
}

impl From<DuplexStream> for MemoryPipe {
    fn from(pipe: DuplexStream) -> Self {
        let report = Report { is_readable: AtomicBool::new(true), reader: std::sync::Mutex::default() };
        Self { pipe, report: Arc::new(report) }
    }
}

impl MemoryPipe {
    /// As of a socket: see [`super::stream::Stream::may_be_readable`].
    pub fn may_be_readable(&self) -> bool {
        self.report.is_readable.load(Ordering::SeqCst)
    }
}

impl AsyncRead for MemoryPipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        *self.report.reader.lock().unwrap() = Some(cx.waker().clone());
        self.report.is_readable.store(false, Ordering::SeqCst);
        let waker = Waker::from(self.report.clone());
        let read = Pin::new(&mut self.pipe).poll_read(&mut Context::from_waker(&waker), buf);
        if read.is_ready() {
            // As after an event, which takes the waker. What is left over is still reported.
            *self.report.reader.lock().unwrap() = None;
            self.report.is_readable.store(buf.remaining() == 0, Ordering::SeqCst);
        }
        read
    }
}

impl AsyncWrite for MemoryPipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}
