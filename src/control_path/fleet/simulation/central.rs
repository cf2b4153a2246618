//! The tables of the central database, and the statements on them, each of which is one step.

use std::collections::BTreeMap;

use super::HOSTS;
use crate::control_path::fleet::{
    lease_decision::{HostRows, LeaseRow},
    lease_keeper::{Change, Snapshot},
};

#[derive(Debug, Default)]
pub struct Central {
    pub beats: BTreeMap<i64, i64>,
    pub hosts: Vec<Host>,
    last_id: i64,
}

#[derive(Debug)]
pub struct Host {
    pub limit: u32,
    pub version: i64,
    pub leases: BTreeMap<i64, LeaseRow>,
    /// What the sum of the leases must not exceed: more than the limit only after that was lowered.
    pub ceiling: u32,
}

/// What a node sends.
#[derive(Debug, Clone)]
pub enum Statement {
    Register,
    /// A beat, and then a look at the tables.
    Renew {
        id: i64,
    },
    Change {
        id: i64,
        changes: Vec<Change>,
    },
    Remove {
        removals: Vec<(String, i64)>,
        gone: Vec<(i64, i64)>,
    },
}

#[derive(Debug, Clone)]
pub enum Answer {
    Registered(i64),
    /// `None`: the node's row is gone.
    Rows(Option<Snapshot>),
    /// The hosts where the changes were made.
    Made(Vec<String>),
    Removed,
}

impl Central {
    pub fn new(limits: [u32; HOSTS.len()]) -> Self {
        let host = |limit| Host { limit, version: 0, leases: BTreeMap::new(), ceiling: limit };
        Self { hosts: limits.map(host).into(), ..Self::default() }
    }

    fn host(&mut self, name: &str, version: i64) -> Option<&mut Host> {
        let at = HOSTS.iter().position(|host| *host == name).unwrap();
        Some(&mut self.hosts[at]).filter(|host| host.version == version)
    }

    /// The answer, and the hosts of which the nodes are told.
    pub fn run(&mut self, statement: &Statement) -> (Answer, Vec<String>) {
        let mut told = Vec::new();
        let answer = match statement {
            Statement::Register => {
                self.last_id += 1;
                self.beats.insert(self.last_id, 0);
                Answer::Registered(self.last_id)
            }
            Statement::Renew { id } => {
                let found = self.beats.get_mut(id).map(|beat| *beat += 1);
                Answer::Rows(found.map(|()| self.snapshot()))
            }
            // A row of `node_leases` needs one of `nodes`.
            Statement::Change { id, .. } if !self.beats.contains_key(id) => Answer::Made(Vec::new()),
            Statement::Change { id, changes } => {
                let mut made = Vec::new();
                for change in changes {
                    let Some(host) = self.host(&change.host, change.version) else { continue };
                    if host.limit != change.limit {
                        continue;
                    }
                    host.version += 1;
                    host.leases.insert(*id, change.row);
                    made.push(change.host.clone());
                    told.extend(change.tell.then(|| change.host.clone()));
                }
                Answer::Made(made)
            }
            Statement::Remove { removals, gone } => {
                let silent = |(id, beat): &&(i64, i64)| self.beats.get(id) == Some(beat);
                let silent: Vec<i64> = gone.iter().filter(silent).map(|(id, _)| *id).collect();
                let mut removed = Vec::new();
                for (name, version) in removals {
                    let Some(host) = self.host(name, *version) else { continue };
                    let before = host.leases.len();
                    host.leases.retain(|id, _| !silent.contains(id));
                    if host.leases.len() < before {
                        host.version += 1;
                        removed.push(name.clone());
                    }
                }
                told.extend(removed);
                Answer::Removed
            }
        };
        (answer, told)
    }

    fn snapshot(&self) -> Snapshot {
        let beats = self.beats.iter().map(|(id, beat)| (*id, *beat)).collect();
        let rows = |host: &Host| HostRows {
            limit: host.limit,
            version: host.version,
            leases: host.leases.values().copied().collect(),
        };
        let hosts = HOSTS.iter().zip(&self.hosts).map(|(name, host)| ((*name).to_owned(), rows(host)));
        Snapshot { beats, hosts: hosts.collect() }
    }

    pub fn granted(&self, id: Option<i64>, host: usize) -> u32 {
        id.and_then(|id| self.hosts[host].leases.get(&id)).map_or(0, |row| row.granted)
    }

    /// The node has ended as it should: its rows go with it.
    pub fn remove_node(&mut self, id: i64) {
        self.beats.remove(&id);
        for host in &mut self.hosts {
            host.leases.remove(&id);
        }
    }

    pub fn set_limit(&mut self, host: usize, limit: u32) {
        self.hosts[host].limit = limit;
        self.hosts[host].ceiling = limit.max(self.hosts[host].sum());
    }

    /// The sum of the leases never exceeds the limit, and does not grow while it is above one that was lowered.
    pub fn check(&mut self) -> Result<(), String> {
        for host in &mut self.hosts {
            let sum = host.sum();
            if sum > host.ceiling {
                return Err(format!("leases of {sum} servers, the limit is {}: {host:?}", host.limit));
            }
            host.ceiling = host.limit.max(sum);
        }
        Ok(())
    }
}

impl Host {
    pub fn sum(&self) -> u32 {
        self.leases.values().map(|row| row.granted).sum()
    }
}
