//! The worker threads that move bytes. Each is a `current_thread` runtime with its own reactor.
//!
//! A tenant belongs to one worker: its sessions and servers use the same reactor, so that a query wakes no
//! other thread.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::{runtime::Handle, sync::oneshot, time::Instant};

/// The resolution of the coarse clock.
pub const TICK: Duration = Duration::from_millis(100);

/// The largest step of the clock.
const STEP_MAX: Duration = Duration::from_secs(1);

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
}

impl Worker {
    /// The worker of the runtime that this is called on, with a clock of its own.
    #[cfg(test)]
    pub fn here() -> Arc<Self> {
        let clock = Arc::<Clock>::default();
        tokio::spawn(keep_time(clock.clone()));
        Arc::new(Self { index: 0, handle: Handle::current(), clock })
    }

    /// Whether the calling task runs on this worker.
    pub fn is_this_thread(&self) -> bool {
        Handle::current().id() == self.handle.id()
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

    pub fn all(&self) -> &[Arc<Worker>] {
        &self.workers
    }

    /// The worker that a tenant belongs to.
    pub fn of(workers: &[Arc<Worker>], tenant_id: i64) -> Option<&Arc<Worker>> {
        // Ids are consecutive, so neighbours go to different workers.
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
