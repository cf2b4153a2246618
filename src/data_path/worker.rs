//! The worker threads that move bytes. Each is a `current_thread` runtime with its own reactor.
//!
//! A pool has its sessions and servers on one worker, so that a query wakes no other thread. Only a pool that
//! fills a worker uses several (`pool/placement.rs`).

use std::{
    cell::Cell,
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicIsize, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::{runtime::Handle, sync::oneshot, time::Instant};

/// The resolution of the coarse clock.
pub const TICK: Duration = Duration::from_millis(100);

/// The largest step of the clock.
const STEP_MAX: Duration = Duration::from_secs(1);

thread_local! {
    static HERE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The number of the worker whose thread this is; `None`: another thread.
#[inline]
pub fn here() -> Option<usize> {
    HERE.get()
}

/// The time since the process started, behind by up to [`TICK`]. A read costs one load.
#[derive(Debug, Default)]
pub struct Clock {
    now_ms: AtomicU64,
}

impl Clock {
    #[inline]
    pub fn now(&self) -> Duration {
        Duration::from_millis(self.now_ms.load(Ordering::Relaxed))
    }

    /// The coarse time in milliseconds; wraps after 49 days.
    #[inline]
    pub fn now_ms(&self) -> u32 {
        self.now_ms.load(Ordering::Relaxed) as u32
    }

    /// Advances the clock by the time since `last`, at most [`STEP_MAX`], so that timers do not all fire at
    /// once after the process was stopped for a while.
    fn tick(&self, last: &mut Instant) {
        let passed = std::mem::replace(last, Instant::now()).elapsed().min(STEP_MAX);
        self.now_ms.fetch_add(u64::try_from(passed.as_millis()).unwrap_or(0), Ordering::Relaxed);
    }
}

/// One worker thread.
#[derive(Debug)]
pub struct Worker {
    /// The worker's number, from 0.
    pub index: usize,
    handle: Handle,
    /// All workers share it; the first one advances it.
    pub clock: Arc<Clock>,
    /// Sessions that run on it.
    sessions: AtomicUsize,
    /// Pools that are placed on it.
    pools: AtomicIsize,
}

/// A session runs on a worker as long as this lives.
#[derive(Debug)]
pub struct OnWorker(Arc<Worker>);

impl Drop for OnWorker {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Worker {
    /// The worker of the runtime that this is called on, with a clock of its own.
    #[cfg(test)]
    pub fn here() -> Arc<Self> {
        let clock = Arc::<Clock>::default();
        tokio::spawn(keep_time(clock.clone()));
        Self::of(Handle::current(), 0, clock)
    }

    /// Another worker of the same runtime and clock.
    #[cfg(test)]
    pub fn beside(&self, index: usize) -> Arc<Self> {
        Self::of(self.handle.clone(), index, self.clock.clone())
    }

    fn of(handle: Handle, index: usize, clock: Arc<Clock>) -> Arc<Self> {
        Arc::new(Self { index, handle, clock, sessions: AtomicUsize::new(0), pools: AtomicIsize::new(0) })
    }

    /// Counts a session as long as the result lives.
    pub fn enter(self: &Arc<Self>) -> OnWorker {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        OnWorker(self.clone())
    }

    /// Sessions that run on it.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Pools that are placed on it.
    pub fn pools(&self) -> usize {
        self.pools.load(Ordering::Relaxed).max(0).cast_unsigned()
    }

    /// One pool more or less is placed on it.
    pub fn count_pool(&self, change: isize) {
        self.pools.fetch_add(change, Ordering::Relaxed);
    }

    /// For how long it has not waited for events since it started. A worker that had work and no processor was
    /// busy.
    pub fn busy(&self) -> Duration {
        self.handle.metrics().worker_total_busy_duration(0)
    }

    /// Whether the calling task runs on this worker.
    pub fn is_here(&self) -> bool {
        here() == Some(self.index)
    }

    /// Runs a task on this worker, from any thread.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }
}

/// All worker threads. Drop ends them and all sessions.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Arc<Worker>>,
    threads: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Workers {
    /// Starts `count` of them.
    pub fn start(count: usize) -> io::Result<Self> {
        let mut all = Self { workers: Vec::new(), threads: Vec::new() };
        let clock = Arc::new(Clock::default());
        for index in 0..count.max(1) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            all.workers.push(Worker::of(runtime.handle().clone(), index, clock.clone()));
            let (stop, stopped) = oneshot::channel::<()>();
            if index == 0 {
                runtime.spawn(keep_time(clock.clone()));
            }
            let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                HERE.set(Some(index));
                runtime.block_on(async move { drop(stopped.await) });
                runtime.shutdown_background();
            })?;
            all.threads.push((stop, thread));
        }
        Ok(all)
    }

    pub fn all(&self) -> &[Arc<Worker>] {
        &self.workers
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
