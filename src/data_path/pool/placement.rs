//! On which workers a pool has its sessions: on one, or, if it fills one, on several (`balance.rs` decides).
//!
//! A session learns of a change with its next request, and goes to its new worker before it borrows a server
//! (`relay/change_worker.rs`). Sessions of all workers share the pool's servers and its queue; a server whose
//! reactor is another worker's is moved when it is lent.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicUsize, Ordering},
};

use arc_swap::ArcSwap;

use crate::data_path::worker::Worker;

/// The workers of a pool, and of those that replace it.
#[derive(Debug)]
pub struct Placement {
    /// Never empty. The first one opens servers.
    workers: ArcSwap<Vec<Arc<Worker>>>,
    /// Counts changes; read for each request.
    version: AtomicU32,
    seats: AtomicUsize,
}

/// A session's place on one of its pool's workers.
#[derive(Debug)]
pub struct Seat {
    /// Where it is, or goes to next.
    pub worker: Arc<Worker>,
    number: usize,
    version: u32,
}

impl Placement {
    /// On this worker.
    pub fn new(worker: Arc<Worker>) -> Self {
        worker.count_pool(1);
        Self {
            workers: ArcSwap::from_pointee(vec![worker]),
            version: AtomicU32::default(),
            seats: AtomicUsize::default(),
        }
    }

    /// A seat for another session. Sessions take turns on the workers.
    pub fn seat(&self) -> Seat {
        let (number, version) = (self.seats.fetch_add(1, Ordering::Relaxed), self.version());
        Seat { worker: self.worker_of(number), number, version }
    }

    /// Whether the session's worker may be another one now. Costs a load.
    #[inline]
    pub fn has_changed_since(&self, seat: &Seat) -> bool {
        seat.version != self.version()
    }

    /// Where the session belongs now. `true`: on another worker than before.
    #[cold]
    pub fn update(&self, seat: &mut Seat) -> bool {
        seat.version = self.version();
        let before = std::mem::replace(&mut seat.worker, self.worker_of(seat.number));
        !Arc::ptr_eq(&before, &seat.worker)
    }

    /// The worker that opens servers, and runs what concerns no session.
    pub fn home(&self) -> Arc<Worker> {
        self.worker_of(0)
    }

    /// The numbers of its workers.
    pub fn workers(&self) -> Vec<usize> {
        self.workers.load().iter().map(|worker| worker.index).collect()
    }

    /// Places it on these workers; without any, nothing changes.
    pub fn place(&self, workers: Vec<Arc<Worker>>) {
        if workers.is_empty() {
            return;
        }
        workers.iter().for_each(|worker| worker.count_pool(1));
        let before = self.workers.swap(Arc::new(workers));
        before.iter().for_each(|worker| worker.count_pool(-1));
        self.version.fetch_add(1, Ordering::Release);
    }

    #[inline]
    fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    fn worker_of(&self, number: usize) -> Arc<Worker> {
        let workers = self.workers.load();
        workers[number % workers.len()].clone()
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        self.workers.load().iter().for_each(|worker| worker.count_pool(-1));
    }
}
