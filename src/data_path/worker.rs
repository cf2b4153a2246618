//! The threads that move bytes: each a `current_thread` runtime with its own reactor.
//!
//! A tenant belongs to one worker: its sessions and servers are registered with one reactor, so that nothing on the way
//! of a query wakes another thread.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::oneshot};

/// How coarse the clock is, and how often deadlines are walked.
pub const TICK: Duration = Duration::from_millis(100);

/// Time since the process started, read for the price of a load; behind by up to [`TICK`].
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    now_ms: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { started: Instant::now(), now_ms: AtomicU64::new(0) }
    }
}

impl Clock {
    /// The coarse time.
    #[inline]
    pub fn now(&self) -> Duration {
        Duration::from_millis(self.now_ms.load(Ordering::Relaxed))
    }

    /// The coarse time in milliseconds; wraps after 49 days.
    #[inline]
    pub fn now_ms(&self) -> u32 {
        self.now_ms.load(Ordering::Relaxed) as u32
    }

    /// Sets the clock. A process that was stopped for a while moves on by one tick only, so that timers do not all fire
    /// at once when it goes on.
    pub fn tick(&self) {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.now_ms.store(elapsed, Ordering::Relaxed);
    }
}

/// One worker thread.
#[derive(Debug)]
pub struct Worker {
    /// From 0.
    pub index: usize,
    handle: Handle,
    /// Set by the worker itself.
    pub clock: Arc<Clock>,
}

impl Worker {
    /// Runs a task on this worker, from any thread.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }

    /// Whether the caller runs on this worker.
    pub fn is_here(&self) -> bool {
        Handle::try_current().is_ok_and(|handle| handle.id() == self.handle.id())
    }
}

/// All worker threads. Dropping it ends them, and with them every session.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Arc<Worker>>,
    threads: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Workers {
    /// Starts `count` of them.
    ///
    /// # Errors
    /// The operating system's, if a thread or a reactor cannot be had.
    pub fn start(count: usize) -> io::Result<Self> {
        let mut all = Self { workers: Vec::new(), threads: Vec::new() };
        for index in 0..count.max(1) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let clock = Arc::new(Clock::default());
            all.workers.push(Arc::new(Worker {
                index,
                handle: runtime.handle().clone(),
                clock: clock.clone(),
            }));
            let (stop, stopped) = oneshot::channel::<()>();
            let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                runtime.block_on(async move {
                    let ticking = tokio::spawn(keep_time(clock));
                    let _ = stopped.await;
                    ticking.abort();
                });
                runtime.shutdown_background();
            })?;
            all.threads.push((stop, thread));
        }
        Ok(all)
    }

    /// Every worker.
    pub fn all(&self) -> &[Arc<Worker>] {
        &self.workers
    }

    /// The worker that a tenant belongs to.
    pub fn of(workers: &[Arc<Worker>], tenant_id: i64) -> Option<&Arc<Worker>> {
        // Ids are handed out in order: neighbours go to different workers.
        let index = usize::try_from(tenant_id.unsigned_abs()).unwrap_or(0) % workers.len().max(1);
        workers.get(index)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for (stop, thread) in self.threads.drain(..) {
            drop(stop);
            let _ = thread.join();
        }
    }
}

async fn keep_time(clock: Arc<Clock>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        interval.tick().await;
        clock.tick();
    }
}
