//! How a host's budget is divided among the nodes that use the host. Each node computes it alike from the same rows.
//!
//! Weighted max-min fairness of what the nodes want, with a small floor for each: a node whose first client comes has
//! a server for it. What no node wants is spread evenly, so that a node seldom has to ask others for more.
//!
//! Pure.

/// What one node wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Servers that its sessions could use now.
    pub wanted: u32,
    /// The sum of the weights of their tenants; 0 counts as 1.
    pub weight: u32,
}

/// Servers that a node has without a reason, where there are enough.
const FLOOR_MAX: u32 = 2;
/// The floors of all nodes take at most one in so many of the servers, or one for each node.
const FLOORS_PART: u32 = 4;

/// The level of the filling is counted in fractions of a server: one of this number.
const FRACTIONS: u64 = 1 << 20;

/// The least that each of `nodes` nodes gets of `limit`.
pub fn floor(limit: u32, nodes: usize) -> u32 {
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX).max(1);
    if limit < nodes { 0 } else { (limit / nodes / FLOORS_PART).clamp(1, FLOOR_MAX) }
}

/// The part of each node, in the order of `demands`; they add up to `limit`, if there is a node.
pub fn allocate(limit: u32, demands: &[Demand]) -> Vec<u32> {
    let filling = Filling { limit, demands, floor: floor(limit, demands.len()) };
    let mut parts = filling.at(filling.highest_level());
    let mut left = limit - parts.iter().sum::<u32>();
    while left > 0
        && let Some(next) = filling.next(&parts)
    {
        parts[next] += 1;
        left -= 1;
    }
    let nodes = u32::try_from(parts.len()).unwrap_or(u32::MAX).max(1);
    for (at, part) in (0..).zip(&mut parts) {
        *part += left / nodes + u32::from(at < left % nodes);
    }
    parts
}

/// All nodes are filled to the same level, which is a number of servers for each unit of weight.
struct Filling<'a> {
    limit: u32,
    demands: &'a [Demand],
    floor: u32,
}

impl Filling<'_> {
    fn weight(demand: &Demand) -> u64 {
        // A step of the level is at most one server for each node.
        u64::from(demand.weight).clamp(1, FRACTIONS)
    }

    fn most(&self, demand: &Demand) -> u32 {
        demand.wanted.max(self.floor)
    }

    fn at(&self, level: u64) -> Vec<u32> {
        let part = |demand: &Demand| {
            let filled = level.saturating_mul(Self::weight(demand)) / FRACTIONS;
            u32::try_from(filled).unwrap_or(u32::MAX).clamp(self.floor, self.most(demand))
        };
        self.demands.iter().map(part).collect()
    }

    fn fits(&self, level: u64) -> bool {
        let sum: u64 = self.at(level).iter().map(|part| u64::from(*part)).sum();
        sum <= u64::from(self.limit)
    }

    fn highest_level(&self) -> u64 {
        let (mut fits, mut above) = (0, u64::from(self.limit) * FRACTIONS + 1);
        while above - fits > 1 {
            let middle = fits + (above - fits) / 2;
            if self.fits(middle) { fits = middle } else { above = middle }
        }
        fits
    }

    /// The node that would have the lowest level with one server more.
    fn next(&self, parts: &[u32]) -> Option<usize> {
        let lacking = (0..parts.len()).filter(|at| parts[*at] < self.most(&self.demands[*at]));
        lacking.min_by(|one, other| {
            let level = |at: usize| u64::from(parts[at]) + 1;
            let weight = |at: usize| Self::weight(&self.demands[at]);
            (level(*one) * weight(*other)).cmp(&(level(*other) * weight(*one)))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(limit: u32, wanted: &[u32]) -> Vec<u32> {
        let demands: Vec<_> = wanted.iter().map(|wanted| Demand { wanted: *wanted, weight: 1 }).collect();
        allocate(limit, &demands)
    }

    #[test]
    fn what_a_node_does_not_want_is_the_others_and_the_rest_is_spread() {
        assert_eq!(of(12, &[30, 30, 30]), [4, 4, 4]);
        assert_eq!(of(12, &[2, 30, 30]), [2, 5, 5]);
        assert_eq!(of(12, &[30, 0, 0]), [10, 1, 1]);
        assert_eq!(of(12, &[0, 0, 0]), [4, 4, 4]);
        assert_eq!(of(12, &[6, 0]), [9, 3]);
        assert_eq!(of(7, &[30, 30, 30]), [3, 2, 2]);
        assert_eq!(of(12, &[0]), [12]);
        assert_eq!(of(2, &[3, 3, 3]), [1, 1, 0]);
        assert_eq!(of(0, &[3]), [0]);
        assert!(of(5, &[]).is_empty());
    }

    #[test]
    fn weights_count() {
        let demands = [(30, 3), (30, 1)].map(|(wanted, weight)| Demand { wanted, weight });
        assert_eq!(allocate(12, &demands), [9, 3]);
        let most = [Demand { wanted: u32::MAX, weight: u32::MAX }; 2];
        assert_eq!(allocate(100_000, &most), [50_000, 50_000]);
    }

    proptest! {
        /// The whole budget is given out; each node has its floor; no node has less than it wants while another one has
        /// a higher level and more than its floor.
        #[test]
        fn parts_are_whole_and_fair(
            limit in 0..200u32,
            demands in proptest::collection::vec((0..100u32, 0..9u32), 1..9),
        ) {
            let demands: Vec<_> =
                demands.into_iter().map(|(wanted, weight)| Demand { wanted, weight }).collect();
            let parts = allocate(limit, &demands);
            prop_assert_eq!(parts.iter().sum::<u32>(), limit);
            let floor = floor(limit, demands.len());
            prop_assert!(parts.iter().all(|part| *part >= floor));
            for (one, part) in demands.iter().zip(&parts).filter(|(one, part)| **part < one.wanted) {
                for (other, more) in demands.iter().zip(&parts).filter(|(_, more)| **more > floor) {
                    let level_with_one_more = u64::from(part + 1) * u64::from(other.weight.max(1));
                    let level = u64::from(*more) * u64::from(one.weight.max(1));
                    prop_assert!(level <= level_with_one_more, "{parts:?}");
                }
            }
        }
    }
}
