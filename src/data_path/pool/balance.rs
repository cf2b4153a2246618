//! Which pool goes to another worker, or gets a second one. Pure.
//!
//! A pool waits as long as its worker is busy with others. A pool stays where it is unless its worker is busy and
//! another one clearly less so. Then the pool goes there whose move spares all pools most of that waiting: one of two
//! pools with much work, or the one with much work that others of its worker wait for. If no move helps because one
//! pool alone fills the worker, that pool gets the other worker as well, until one is enough for it again.

/// A worker is left alone below this part of the time.
const BUSY: f64 = 0.4;
/// How much more of the time than the least busy worker it is busy.
const GAP: f64 = 0.1;
/// A move spares all pools together at least this part of the time.
const GAIN: f64 = 0.2;
/// A pool fills a worker if it is busy for this part of the time, and [`DOMINANT`] of that with the pool.
const FULL: f64 = 0.75;
const DOMINANT: f64 = 0.6;
/// A pool with a smaller load on all its workers needs only one.
pub(super) const FITS: f64 = 0.4;

/// A pool's load.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolLoad {
    /// Its workers; never empty.
    pub workers: Vec<usize>,
    /// The part of the time that it keeps workers busy: 1 is one worker.
    pub load: f64,
    /// It has been where it is for long enough to be moved.
    pub is_settled: bool,
    /// It has had several workers for long enough to lose them.
    pub is_calm: bool,
}

impl PoolLoad {
    /// Its load on each of its workers: sessions take turns on them.
    fn part(&self) -> f64 {
        self.load / self.workers.len().max(1) as f64
    }

    fn is_on(&self, worker: usize) -> bool {
        self.workers.contains(&worker)
    }
}

/// The workers that a pool has from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its place in the list of pools.
    pub pool: usize,
    pub workers: Vec<usize>,
}

/// The worker for a new pool: the least busy one, of those the one with the fewest pools. `busy` is the part of
/// the time that each worker is.
pub fn least_loaded(workers: impl Iterator<Item = (f64, usize)>) -> Option<usize> {
    let ranked = workers.enumerate().map(|(at, (busy, pools))| ((in_hundredths(busy) / 10, pools), at));
    ranked.min().map(|(_, at)| at)
}

fn in_hundredths(part: f64) -> i64 {
    (part * 100.0).round() as i64
}

/// The change that helps most now; `None`: nothing is to be changed. `busy` is the part of the time that each
/// worker is.
pub fn next_change(busy: &[f64], pools: &[PoolLoad]) -> Option<Change> {
    let by_load = |a: &usize, b: &usize| busy[*a].total_cmp(&busy[*b]);
    let (from, to) = ((0..busy.len()).max_by(by_load)?, (0..busy.len()).min_by(by_load)?);
    if busy[from] < BUSY || busy[from] - busy[to] < GAP {
        return narrower(busy, pools);
    }
    // Pools that work, in parts: one with two workers counts half on each.
    let working = |worker| {
        let there = pools.iter().filter(|pool| pool.load > 0.0 && pool.is_on(worker));
        there.map(|pool| 1.0 / pool.workers.len() as f64).sum::<f64>()
    };
    let (waiting_from, waiting_to) = (working(from), working(to));
    let gain = |pool: &PoolLoad| {
        let (part, own) = (pool.part(), 1.0 / pool.workers.len() as f64);
        part * (waiting_from - own - waiting_to) + (busy[from] - part - busy[to]) * own
    };
    let may_move =
        |pool: &PoolLoad| pool.load > 0.0 && pool.is_settled && pool.is_on(from) && !pool.is_on(to);
    let movable: Vec<_> = pools.iter().enumerate().filter(|(_, pool)| may_move(pool)).collect();
    // Of those that help about as much the smallest, which is the least to move.
    let best =
        movable.iter().max_by_key(|(_, pool)| (in_hundredths(gain(pool)), -in_hundredths(pool.part())));
    if let Some((at, pool)) = best.filter(|(_, pool)| gain(pool) >= GAIN) {
        let workers = pool.workers.iter().map(|worker| if *worker == from { to } else { *worker });
        return Some(Change { pool: *at, workers: workers.collect() });
    }
    let fills = |pool: &PoolLoad| busy[from] >= FULL && pool.part() >= DOMINANT * busy[from];
    let (at, pool) = movable.into_iter().find(|(_, pool)| fills(pool))?;
    let part = pool.load / (pool.workers.len() + 1) as f64;
    let helps = busy[to] + part <= busy[from] - GAP;
    helps.then(|| Change { pool: at, workers: pool.workers.iter().copied().chain([to]).collect() })
}

/// A pool with several workers for which one is enough again: it keeps the least busy of them.
fn narrower(busy: &[f64], pools: &[PoolLoad]) -> Option<Change> {
    let (at, pool) = pools
        .iter()
        .enumerate()
        .find(|(_, pool)| pool.workers.len() > 1 && pool.is_calm && pool.load < FITS)?;
    let kept = pool.workers.iter().copied().min_by(|a, b| busy[*a].total_cmp(&busy[*b]))?;
    Some(Change { pool: at, workers: vec![kept] })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(workers: &[usize], load: f64) -> PoolLoad {
        PoolLoad { workers: workers.to_vec(), load, is_settled: true, is_calm: true }
    }

    /// How busy the pools make `count` workers.
    fn busy(count: usize, pools: &[PoolLoad]) -> Vec<f64> {
        let of = |worker| pools.iter().filter(|pool| pool.is_on(worker)).map(PoolLoad::part).sum();
        (0..count).map(of).collect()
    }

    fn change(count: usize, pools: &[PoolLoad]) -> Option<Change> {
        next_change(&busy(count, pools), pools)
    }

    #[test]
    fn a_new_pool_goes_to_the_least_busy_worker_then_to_the_one_with_the_fewest_pools() {
        assert_eq!(least_loaded([(0.9, 1), (0.31, 7), (0.38, 5)].into_iter()), Some(2));
        assert_eq!(least_loaded([(0.0, 3), (0.02, 2), (0.01, 2)].into_iter()), Some(1));
        assert_eq!(least_loaded(std::iter::empty()), None);
    }

    #[test]
    fn one_of_two_hot_pools_leaves_their_worker_and_quiet_ones_stay() {
        let pools = [pool(&[1], 0.5), pool(&[1], 0.45), pool(&[1], 0.01), pool(&[1], 0.01), pool(&[0], 0.02)];
        assert_eq!(change(2, &pools), Some(Change { pool: 0, workers: vec![0] }));
        let pools = [pool(&[0], 0.5), pool(&[1], 0.45), pool(&[1], 0.01), pool(&[1], 0.01), pool(&[0], 0.02)];
        assert_eq!(change(2, &pools), None);
    }

    #[test]
    fn a_neighbour_leaves_the_worker_that_another_pool_fills() {
        let pools = [pool(&[0], 0.8), pool(&[0], 0.2)];
        assert_eq!(change(2, &pools), Some(Change { pool: 1, workers: vec![1] }));
        // However little it does: it would wait for the other one.
        let pools = [pool(&[0], 0.97), pool(&[0], 0.002)];
        assert_eq!(change(2, &pools), Some(Change { pool: 1, workers: vec![1] }));
        // Several neighbours stay, and the one for which they wait goes.
        let pools = [pool(&[0], 0.01), pool(&[0], 0.9), pool(&[0], 0.01), pool(&[0], 0.01)];
        assert_eq!(change(2, &pools), Some(Change { pool: 1, workers: vec![1] }));
        // It is alone then, and may fill that one too.
        let pools = [pool(&[0], 0.01), pool(&[1], 0.9), pool(&[0], 0.01), pool(&[0], 0.01)];
        assert_eq!(change(2, &pools), Some(Change { pool: 1, workers: vec![1, 0] }));
        // One that does nothing waits for nobody.
        assert_eq!(change(2, &[pool(&[0], 0.7), pool(&[0], 0.0)]), None);
    }

    #[test]
    fn a_pool_that_fills_a_worker_gets_a_second_one_and_loses_it_when_one_is_enough() {
        assert_eq!(change(2, &[pool(&[1], 1.0)]), Some(Change { pool: 0, workers: vec![1, 0] }));
        assert_eq!(change(2, &[pool(&[1], 0.7)]), None, "one is enough");
        assert_eq!(change(2, &[pool(&[1, 0], 1.6)]), None);
        assert_eq!(change(2, &[pool(&[1, 0], 0.5)]), None);
        assert_eq!(change(2, &[pool(&[1, 0], 0.3)]), Some(Change { pool: 0, workers: vec![1] }));
        let restless = PoolLoad { is_calm: false, ..pool(&[1, 0], 0.3) };
        assert_eq!(change(2, &[restless]), None);
    }

    #[test]
    fn nothing_moves_on_workers_that_are_not_busy_or_equally_so_or_before_it_has_settled() {
        assert_eq!(change(2, &[pool(&[0], 0.2), pool(&[0], 0.15)]), None);
        assert_eq!(change(2, &[pool(&[0], 0.9), pool(&[1], 0.85)]), None);
        let unsettled = PoolLoad { is_settled: false, ..pool(&[0], 0.5) };
        assert_eq!(change(2, &[unsettled.clone(), unsettled]), None);
        assert_eq!(change(1, &[pool(&[0], 0.9)]), None, "there is one worker");
        assert_eq!(next_change(&[], &[]), None);
    }

    /// The part of the time that pools wait for others on their workers.
    fn waiting(count: usize, pools: &[PoolLoad]) -> f64 {
        let busy = busy(count, pools);
        let of = |pool: &PoolLoad| {
            let others = pool.workers.iter().map(|worker| busy[*worker] - pool.part());
            others.sum::<f64>() / pool.workers.len() as f64
        };
        pools.iter().filter(|pool| pool.load > 0.0).map(of).sum()
    }

    proptest! {
        /// With constant loads the changes end; a pool waits for others less after each move, and has no worker twice.
        #[test]
        fn changes_end_and_each_move_helps(
            count in 1_usize..6,
            loads in proptest::collection::vec((0.0..1.0_f64, 0_usize..6), 0..12),
        ) {
            let mut pools: Vec<_> = loads.iter().map(|(load, at)| pool(&[at % count], *load)).collect();
            for round in 0.. {
                let Some(Change { pool, workers }) = change(count, &pools) else { break };
                let before = waiting(count, &pools);
                let moves = workers.len() == pools[pool].workers.len();
                let mut unique = workers.clone();
                unique.sort_unstable();
                unique.dedup();
                prop_assert_eq!(unique.len(), workers.len());
                pools[pool].workers = workers;
                prop_assert!(!moves || waiting(count, &pools) <= before - GAIN + 1e-6);
                prop_assert!(round < 200, "{:?}", pools);
            }
        }
    }
}
