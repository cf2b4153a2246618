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

/// The most by which the clock moves on at once.
const STEP_MAX: Duration = Duration::from_secs(1);

/// Time that the process has run, read for the price of a load; behind by up to [`TICK`].
#[derive(Debug, Default)]
pub struct Clock {
    now_ms: AtomicU64,
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

    /// Moves the clock on by what has passed since `last`, but no further than [`STEP_MAX`]: when a process that was
    /// stopped for a while goes on, its timers do not all fire at once.
    fn tick(&self, last: &mut Instant) {
        let passed = std::mem::replace(last, Instant::now()).elapsed().min(STEP_MAX);
        self.now_ms.fetch_add(u64::try_from(passed.as_millis()).unwrap_or(0), Ordering::Relaxed);
    }
}

/// One worker thread.
#[derive(Debug)]
pub struct Worker {
    /// From 0.
    pub index: usize,
    handle: Handle,
    /// The same for all; the first worker keeps it.
    pub clock: Arc<Clock>,
}

impl Worker {
    /// Whether the caller, a task, runs on this worker.
    pub fn is_this_thread(&self) -> bool {
        Handle::current().id() == self.handle.id()
    }

    /// Runs a task on this worker, from any thread.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
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
        let clock = Arc::new(Clock::default());
        for index in 0..count.max(1) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            all.workers.push(Arc::new(Worker {
                index,
                handle: runtime.handle().clone(),
                clock: clock.clone(),
            }));
            let (stop, stopped) = oneshot::channel::<()>();
            if index == 0 {
                runtime.spawn(keep_time(clock.clone()));
            }
            let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                runtime.block_on(async move { drop(stopped.await) });
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
    let mut last = Instant::now();
    loop {
        interval.tick().await;
        clock.tick(&mut last);
    }
}
