//! The worker threads that move bytes. Each is a `current_thread` runtime with its own reactor.
//!
//! A tenant belongs to one worker: its sessions and servers use the same reactor, so that a query wakes no
//! other thread.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
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

fn whole_ms(time: Duration) -> u64 {
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
    /// Transactions that have ended here. Only this worker counts.
    transactions: AtomicU32,
}

impl Worker {
    /// The worker of the runtime that this is called on, with a clock of its own.
    #[cfg(test)]
    pub fn here() -> Arc<Self> {
        let clock = Arc::<Clock>::default();
        tokio::spawn(keep_time(clock.clone()));
        Arc::new(Self { index: 0, handle: Handle::current(), clock, transactions: AtomicU32::default() })
    }

    /// The coarse time at the end of a transaction.
    #[inline]
    pub fn transaction_ended(&self) -> Duration {
        let count = self.transactions.load(Ordering::Relaxed).wrapping_add(1);
        self.transactions.store(count, Ordering::Relaxed);
        if count.is_multiple_of(TRANSACTIONS_A_TICK) {
            self.clock.tick();
        }
        self.clock.now()
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
            let waking = clock.clone();
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().on_thread_unpark(move || waking.tick()).build()?;
            all.workers.push(Arc::new(Worker {
                index,
                handle: runtime.handle().clone(),
                clock: clock.clone(),
                transactions: AtomicU32::default(),
            }));
            let (stop, stopped) = oneshot::channel::<()>();
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
        let worker = Worker {
            index: 0,
            handle: Handle::current(),
            clock: Arc::default(),
            transactions: AtomicU32::default(),
        };
        tokio::time::advance(Duration::from_millis(50)).await;
        let times: Vec<_> = (0..TRANSACTIONS_A_TICK).map(|_| worker.transaction_ended()).collect();
        assert_eq!(times.first(), Some(&Duration::ZERO));
        assert_eq!(times.last(), Some(&Duration::from_millis(50)));
    }
}
