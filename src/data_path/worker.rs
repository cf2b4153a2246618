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

/// How far the coarse clock is behind at most while a worker is busy and ends transactions.
pub const TICK: Duration = Duration::from_millis(100);

/// The largest step of the clock. At rest, the node's maintenance is what ticks, once a second.
const STEP_MAX: Duration = Duration::from_secs(2);

/// A busy worker ticks with every so many transactions.
const TRANSACTIONS_A_TICK: u32 = 64;

thread_local! {
    static HERE: Cell<Option<usize>> = const { Cell::new(None) };
    /// Transactions that have ended on this thread.
    static TRANSACTIONS: Cell<u32> = const { Cell::new(0) };
}

/// The number of the worker whose thread this is; `None`: another thread.
#[inline]
pub fn here() -> Option<usize> {
    HERE.get()
}

/// The time since the process started, as of the last tick. A read costs one load.
///
/// No timer drives it, so that a worker without work sleeps. A worker ticks when it wakes, and while it is too
/// busy to sleep, with its transactions. The node's maintenance ticks too: a clock that stood still for
/// longer than [`STEP_MAX`] shows that the whole process did.
#[derive(Debug)]
pub struct Clock {
    now_ms: AtomicU64,
    started: Instant,
    /// When it last ticked, in milliseconds after `started`.
    ticked_ms: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { now_ms: AtomicU64::default(), started: Instant::now(), ticked_ms: AtomicU64::default() }
    }
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

    /// The coarse time at the end of a transaction.
    #[inline]
    pub fn at_transaction_end(&self) -> Duration {
        let count = TRANSACTIONS.get().wrapping_add(1);
        TRANSACTIONS.set(count);
        if count.is_multiple_of(TRANSACTIONS_A_TICK) {
            self.tick();
        }
        self.now()
    }

    /// Advances the clock by the time since the last tick, at most [`STEP_MAX`], so that timers do not all fire
    /// at once after the process was stopped for a while.
    pub fn tick(&self) {
        let real_ms = whole_ms(self.started.elapsed());
        // Most workers that wake find a tick of this millisecond, and write nothing.
        if real_ms > self.ticked_ms.load(Ordering::Relaxed) {
            let passed_ms = real_ms.saturating_sub(self.ticked_ms.fetch_max(real_ms, Ordering::Relaxed));
            self.now_ms.fetch_add(passed_ms.min(whole_ms(STEP_MAX)), Ordering::Relaxed);
        }
    }
}

/// A time in whole milliseconds, as atomics keep it.
pub fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// One worker thread.
#[derive(Debug)]
pub struct Worker {
    /// The worker's number, from 0.
    pub index: usize,
    handle: Handle,
    /// All workers share it.
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
            let waking = clock.clone();
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().on_thread_unpark(move || waking.tick()).build()?;
            all.workers.push(Worker::of(runtime.handle().clone(), index, clock.clone()));
            let (stop, stopped) = oneshot::channel::<()>();
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

/// A simulation's runtime calls no hook when it wakes.
#[cfg(test)]
async fn keep_time(clock: Arc<Clock>) {
    let mut interval = tokio::time::interval(TICK);
    loop {
        interval.tick().await;
        clock.tick();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stop_of_the_whole_process_counts_as_two_seconds() {
        let clock = Clock::default();
        tokio::time::advance(Duration::from_millis(1_500)).await;
        assert_eq!(clock.now(), Duration::ZERO);
        clock.tick();
        assert_eq!(clock.now(), Duration::from_millis(1_500));
        tokio::time::advance(Duration::from_secs(600)).await;
        clock.tick();
        clock.tick();
        assert_eq!(clock.now(), Duration::from_millis(3_500));
    }

    /// A worker that has slept reads the time of its waking, though no timer has woken it before.
    #[test]
    fn a_worker_that_wakes_reads_the_present_time() {
        let workers = Workers::start(1).unwrap();
        let worker = workers.all()[0].clone();
        let slept = Duration::from_millis(250);
        std::thread::sleep(slept);
        let (read, is_read) = std::sync::mpsc::channel();
        let clock = worker.clock.clone();
        worker.spawn(async move { read.send(clock.now()).unwrap() });
        assert!(is_read.recv().unwrap() >= slept);
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_never_sleeps_ticks_with_its_transactions() {
        let clock = Clock::default();
        tokio::time::advance(Duration::from_millis(50)).await;
        let times: Vec<_> = (0..TRANSACTIONS_A_TICK).map(|_| clock.at_transaction_end()).collect();
        assert!(times.contains(&Duration::ZERO) && times.contains(&Duration::from_millis(50)));
    }
}
