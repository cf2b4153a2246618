//! Which nodes a request still waits for. Pure: what was read of the nodes, and how long ago the request was made,
//! come in.

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;

use super::presence::Presence;

/// One node's part in a request.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeReply {
    /// The node's name.
    pub node: String,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a request at one node.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Done, with this result.
    Done(Value),
    /// Failed, with this error.
    Failed(Value),
    /// The node runs, and has not begun within the time.
    Silent,
    /// The node does not run any more.
    Gone,
}

/// What was read of a node.
#[derive(Debug)]
pub struct NodeState {
    /// Its id.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// Its beat.
    pub beat: i64,
    /// How far it is with the request.
    pub answer: Option<NodeAnswer>,
}

/// How far a node is that has begun.
#[derive(Debug)]
pub enum NodeAnswer {
    /// Not done yet.
    Running,
    /// Done.
    Done(Value),
    /// Not possible.
    Failed(Value),
}

/// The nodes of the first look. Those that start later follow the pauses from their start.
#[derive(Debug, Default)]
pub struct Waiting {
    nodes: Option<BTreeMap<i64, (String, Option<Outcome>)>>,
    presence: Presence,
    /// Nodes that are gone already, with the beat that has not changed.
    gone: Vec<(i64, i64)>,
}

impl Waiting {
    /// Does not wait for nodes that are `gone` (number and beat), unless they beat again.
    pub fn new(gone: Vec<(i64, i64)>) -> Self {
        Self { gone, ..Self::default() }
    }

    /// Ids of the nodes whose outcome is known.
    pub fn known(&self) -> Vec<i64> {
        let nodes = self.nodes.iter().flatten();
        nodes.filter(|(_, (_, outcome))| outcome.is_some()).map(|(id, _)| *id).collect()
    }

    /// Takes in what was read when the request was `waited` old. A node has to begin when it is `begin_within` old.
    /// Returns the replies when the outcome of every node is known.
    pub fn look(
        &mut self,
        waited: Duration,
        begin_within: Duration,
        states: Vec<NodeState>,
    ) -> Option<Vec<NodeReply>> {
        let beats: Vec<(i64, i64)> = states.iter().map(|state| (state.id, state.beat)).collect();
        self.presence.read(waited, waited, &beats);
        let is_gone = |id: i64| {
            let known = |gone: &(i64, i64)| gone.0 == id && beats.contains(gone);
            self.presence.is_gone(id) || self.gone.iter().any(known)
        };
        let expected = || states.iter().map(|state| (state.id, (state.name.clone(), None))).collect();
        let nodes = self.nodes.get_or_insert_with(expected);
        let mut answers: BTreeMap<i64, Option<NodeAnswer>> =
            states.into_iter().map(|state| (state.id, state.answer)).collect();
        for (id, (_, outcome)) in nodes.iter_mut().filter(|(_, (_, outcome))| outcome.is_none()) {
            *outcome = match answers.remove(id) {
                // It has ended cleanly.
                None => Some(Outcome::Gone),
                Some(Some(NodeAnswer::Done(result))) => Some(Outcome::Done(result)),
                Some(Some(NodeAnswer::Failed(error))) => Some(Outcome::Failed(error)),
                Some(_) if is_gone(*id) => Some(Outcome::Gone),
                // A node that does not beat is waited for until it is gone, or beats.
                Some(None) if waited >= begin_within && self.presence.beats(*id) => Some(Outcome::Silent),
                Some(_) => None,
            };
        }
        let reply = |(name, outcome): &(String, Option<Outcome>)| {
            Some(NodeReply { node: name.clone(), outcome: outcome.clone()? })
        };
        nodes.values().map(reply).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN_WITHIN: Duration = Duration::from_secs(5);

    fn state(id: i64, beat: u64, answer: Option<NodeAnswer>) -> NodeState {
        NodeState { id, name: format!("n{id}"), beat: i64::try_from(beat).unwrap(), answer }
    }

    /// The outcome of a request to one node that is in `at(second)` each second, and the second of the outcome.
    fn outcome(at: impl Fn(u64) -> Vec<NodeState>) -> (u64, Vec<Outcome>) {
        let mut waiting = Waiting::default();
        for second in 0..60 {
            if let Some(replies) = waiting.look(Duration::from_secs(second), BEGIN_WITHIN, at(second)) {
                return (second, replies.into_iter().map(|reply| reply.outcome).collect());
            }
        }
        (60, Vec::new())
    }

    #[test]
    fn nothing_is_waited_for_without_other_nodes() {
        assert_eq!(outcome(|_| Vec::new()), (0, Vec::new()));
    }

    #[test]
    fn a_node_that_has_begun_is_waited_for_while_it_beats() {
        let busy = |second: u64| match second {
            0..30 => Some(NodeAnswer::Running),
            _ => Some(NodeAnswer::Done(Value::Null)),
        };
        assert_eq!(outcome(|at| vec![state(1, at, busy(at))]), (30, vec![Outcome::Done(Value::Null)]));
        let dies = |at: u64| vec![state(1, at.min(10), Some(NodeAnswer::Running))];
        assert_eq!(outcome(dies), (15, vec![Outcome::Gone]));
        let ends = |at: u64| if at < 3 { vec![state(1, at, Some(NodeAnswer::Running))] } else { Vec::new() };
        assert_eq!(outcome(ends), (3, vec![Outcome::Gone]));
    }

    #[test]
    fn a_node_that_does_not_begin_is_silent_if_it_beats_and_gone_if_it_does_not() {
        assert_eq!(outcome(|at| vec![state(1, at, None)]), (5, vec![Outcome::Silent]));
        assert_eq!(outcome(|_| vec![state(1, 7, None)]), (5, vec![Outcome::Gone]));
        // Stopped, and continued before it counts as gone.
        let stopped = |at: u64| vec![state(1, if at < 4 { 0 } else { at }, None)];
        assert_eq!(outcome(stopped), (5, vec![Outcome::Silent]));
    }

    #[test]
    fn a_node_that_is_known_to_be_gone_is_not_waited_for_unless_it_beats() {
        let mut waiting = Waiting::new(vec![(1, 7)]);
        let both = || vec![state(1, 7, None), state(2, 3, Some(NodeAnswer::Done(Value::Null)))];
        let replies = waiting.look(Duration::ZERO, BEGIN_WITHIN, both()).unwrap();
        assert_eq!(replies[0].outcome, Outcome::Gone);
        let mut waiting = Waiting::new(vec![(1, 7)]);
        assert_eq!(waiting.look(Duration::ZERO, BEGIN_WITHIN, vec![state(1, 8, None)]), None);
    }

    #[test]
    fn a_node_that_joins_later_is_not_waited_for() {
        let joined = |at: u64| match at {
            0 => vec![state(1, 0, Some(NodeAnswer::Running))],
            _ => vec![state(1, at, Some(NodeAnswer::Failed(Value::Null))), state(2, at, None)],
        };
        assert_eq!(outcome(joined), (1, vec![Outcome::Failed(Value::Null)]));
    }
}
