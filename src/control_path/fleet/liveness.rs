//! Whether the nodes that a request waits for still run. Pure: beats and times come in.
//!
//! A node that runs counts its beat up each second. The time that a beat stays the same is summed over looks that
//! follow each other closely, so that a pause of the observer, or of the central database, counts little.

use std::{collections::HashMap, time::Duration};

/// A node is gone when its beat has stayed the same for so long.
const GONE_AFTER: Duration = Duration::from_secs(5);
/// The same for a node that was silent for [`LONG_SILENT`] before the first look.
const GONE_AFTER_LONG_SILENCE: Duration = Duration::from_millis(2500);
/// By the clock of the central database.
pub const LONG_SILENT: Duration = Duration::from_secs(10);
/// A node whose beat has changed within this time runs.
const BEATS_WITHIN: Duration = Duration::from_secs(2);
/// A longer time between two looks counts as this.
const GAP_MAX: Duration = Duration::from_millis(1500);

/// One look at a node's row.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// Its beat.
    pub beat: i64,
    /// How long ago it beat, by the clock of the central database.
    pub silent: Duration,
}

/// What several looks tell of each node, by id.
#[derive(Debug, Default)]
pub struct Liveness {
    nodes: HashMap<i64, Observed>,
    last_look: Option<Duration>,
}

#[derive(Debug)]
struct Observed {
    beat: i64,
    unchanged: Duration,
    was_long_silent: bool,
}

impl Liveness {
    /// Takes in what was seen at `now`, the time since any fixed moment.
    pub fn observe(&mut self, now: Duration, looks: impl IntoIterator<Item = (i64, Look)>) {
        let gap = now.saturating_sub(self.last_look.unwrap_or(now)).min(GAP_MAX);
        self.last_look = Some(now);
        for (id, look) in looks {
            let was_long_silent = look.silent >= LONG_SILENT;
            let first = Observed { beat: look.beat, unchanged: Duration::ZERO, was_long_silent };
            let node = self.nodes.entry(id).or_insert(first);
            if node.beat == look.beat {
                node.unchanged += gap;
            } else {
                *node = Observed { beat: look.beat, unchanged: Duration::ZERO, was_long_silent: false };
            }
        }
    }

    /// Whether the node does not run any more. A node that was never seen is gone.
    pub fn is_gone(&self, id: i64) -> bool {
        self.nodes.get(&id).is_none_or(|node| {
            node.unchanged >= if node.was_long_silent { GONE_AFTER_LONG_SILENCE } else { GONE_AFTER }
        })
    }

    /// Whether the node is seen to run.
    pub fn beats(&self, id: i64) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.unchanged < BEATS_WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn look(beat: i64, silent_s: u64) -> Look {
        Look { beat, silent: SECOND * silent_s as u32 }
    }

    #[test]
    fn a_node_is_gone_after_five_seconds_without_a_beat() {
        let mut liveness = Liveness::default();
        for second in 0..5 {
            liveness.observe(SECOND * second, [(1, look(7, 0)), (2, look(i64::from(second), 0))]);
            assert!(!liveness.is_gone(1), "{second}");
        }
        assert!(!liveness.beats(1) && liveness.beats(2));
        liveness.observe(SECOND * 5, [(1, look(7, 5)), (2, look(5, 0))]);
        assert!(liveness.is_gone(1) && !liveness.is_gone(2));
        liveness.observe(SECOND * 6, [(1, look(8, 0))]);
        assert!(!liveness.is_gone(1) && liveness.beats(1), "a stopped process may go on");
        assert!(liveness.is_gone(3));
    }

    #[test]
    fn a_row_that_was_left_long_ago_is_not_waited_for_as_long() {
        let mut liveness = Liveness::default();
        for at in [0, 1, 2, 3] {
            liveness.observe(SECOND * at, [(1, look(7, 3600))]);
        }
        assert!(liveness.is_gone(1));
    }

    #[test]
    fn after_an_outage_the_others_get_time_to_beat_again() {
        let mut liveness = Liveness::default();
        liveness.observe(SECOND, [(1, look(7, 0))]);
        liveness.observe(SECOND * 60, [(1, look(7, 60))]);
        assert!(!liveness.is_gone(1));
        liveness.observe(SECOND * 61, [(1, look(8, 0))]);
        assert!(liveness.beats(1));
    }
}
