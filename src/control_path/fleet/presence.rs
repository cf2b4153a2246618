//! Which nodes live, by their beats.
//!
//! A node is gone when this one has seen the same beat for [`GONE_AFTER`] of its own time. No clocks of two machines are
//! compared. Only time between two reads that follow each other closely counts: after an outage of the central
//! database, or after this process was stopped, the others get time to beat again.
//!
//! Pure: times are those of this node's monotonic clock.

use std::{collections::BTreeMap, time::Duration};

/// Longer than a lease is valid without a renewal, so that a node has stopped opening servers when others count it as
/// gone. The difference is for clocks that do not run alike.
pub const GONE_AFTER: Duration = Duration::from_secs(5);
/// A node whose beat has changed within this time runs.
const BEATS_WITHIN: Duration = Duration::from_secs(2);
/// What the time between two reads counts at most.
const GAP_MAX: Duration = Duration::from_millis(1500);

/// What this node knows of the others.
#[derive(Debug, Default)]
pub struct Presence {
    nodes: BTreeMap<i64, Sighting>,
    /// When the last answer arrived.
    last_answer: Option<Duration>,
}

#[derive(Debug)]
struct Sighting {
    beat: i64,
    /// For how long the beat has not changed.
    silent: Duration,
}

/// What has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// A row is new, or a node that was gone beats again.
    Joined(i64),
    /// It does not beat.
    Gone(i64),
    /// Its row was removed while it lived.
    Left(i64),
}

impl Presence {
    /// The beats of all rows, from a question that was sent at `asked` and answered at `answered`.
    pub fn read(&mut self, asked: Duration, answered: Duration, beats: &[(i64, i64)]) -> Vec<News> {
        // The table was read between the two times: less time than this cannot have passed between two reads.
        let gap = self.last_answer.map_or(Duration::ZERO, |last| asked.saturating_sub(last)).min(GAP_MAX);
        self.last_answer = Some(answered);
        let mut news = Vec::new();
        self.nodes.retain(|id, sighting| {
            let has_row = beats.iter().any(|(row, _)| row == id);
            if !has_row && sighting.silent < GONE_AFTER {
                news.push(News::Left(*id));
            }
            has_row
        });
        for (id, beat) in beats {
            let Some(sighting) = self.nodes.get_mut(id) else {
                self.nodes.insert(*id, Sighting { beat: *beat, silent: Duration::ZERO });
                news.push(News::Joined(*id));
                continue;
            };
            let was_gone = sighting.silent >= GONE_AFTER;
            if sighting.beat == *beat {
                sighting.silent += gap;
            } else {
                *sighting = Sighting { beat: *beat, silent: Duration::ZERO };
            }
            match (was_gone, sighting.silent >= GONE_AFTER) {
                (false, true) => news.push(News::Gone(*id)),
                (true, false) => news.push(News::Joined(*id)),
                _ => {}
            }
        }
        news
    }

    /// Whether the node does not live. A node without a row is gone.
    pub fn is_gone(&self, id: i64) -> bool {
        self.nodes.get(&id).is_none_or(|sighting| sighting.silent >= GONE_AFTER)
    }

    /// Whether the node is seen to run.
    pub fn beats(&self, id: i64) -> bool {
        self.nodes.get(&id).is_some_and(|sighting| sighting.silent < BEATS_WITHIN)
    }

    /// The nodes that have a row and are gone, with the beat that has not changed.
    pub fn gone(&self) -> impl Iterator<Item = (i64, i64)> {
        let gone = self.nodes.iter().filter(|(_, sighting)| sighting.silent >= GONE_AFTER);
        gone.map(|(id, sighting)| (*id, sighting.beat))
    }

    /// Whether no node but `own` lives.
    pub fn is_alone(&self, own: i64) -> bool {
        self.nodes.iter().all(|(id, sighting)| *id == own || sighting.silent >= GONE_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Reads at these times, which see the same beat of node 7.
    fn silent_at(times: &[u64]) -> Vec<News> {
        let mut presence = Presence::default();
        times.iter().flat_map(|at| presence.read(ms(*at), ms(*at), &[(7, 1)])).collect()
    }

    #[test]
    fn a_node_that_does_not_beat_is_gone_after_five_seconds() {
        let joined = [News::Joined(7)];
        assert_eq!(silent_at(&[0, 1000, 2000, 3000, 4000, 4999]), joined);
        assert_eq!(silent_at(&[0, 1000, 2000, 3000, 4000, 5000]), [News::Joined(7), News::Gone(7)]);
    }

    #[test]
    fn a_pause_between_two_reads_counts_little() {
        assert_eq!(silent_at(&[0, 60_000, 61_000, 62_000]), [News::Joined(7)]);
        assert_eq!(silent_at(&[0, 60_000, 120_000, 180_000, 240_000]), [News::Joined(7), News::Gone(7)]);
    }

    #[test]
    fn slow_answers_count_against_the_time() {
        let mut presence = Presence::default();
        for at in 0..10 {
            presence.read(ms(at * 1000), ms(at * 1000 + 600), &[(7, 1)]);
        }
        assert!(!presence.is_gone(7), "9 times 400 ms");
    }

    #[test]
    fn a_node_that_beats_again_is_back() {
        let mut presence = Presence::default();
        (0..=5).for_each(|at| drop(presence.read(ms(at * 1000), ms(at * 1000), &[(7, 1), (8, at as i64)])));
        assert!(presence.is_gone(7) && !presence.is_gone(8) && presence.is_gone(9));
        assert!(presence.beats(8) && !presence.beats(7) && !presence.beats(9));
        assert!(presence.is_alone(8) && !presence.is_alone(7));
        assert_eq!(presence.gone().collect::<Vec<_>>(), [(7, 1)]);
        assert_eq!(presence.read(ms(5500), ms(5500), &[(7, 2)]), [News::Left(8), News::Joined(7)]);
    }
}
