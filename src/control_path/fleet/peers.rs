//! The addresses of the other nodes, by the number that their clients' process numbers have: so a cancel request finds the node
//! of its session without the central database.
//!
//! They are read when a node joins or leaves. A node that starts without the central database has them from its snapshot.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::{
    control_path::directory::snapshot::KnownNode,
    data_path::{host_address::HostAddress, sessions::registry::node_number},
};

/// The other nodes.
#[derive(Debug)]
pub struct Peers {
    /// `nodes.process` of this node.
    own: String,
    /// `None`: two nodes have this number.
    by_number: ArcSwap<HashMap<u32, Option<Arc<HostAddress>>>>,
    changed: Notify,
}

impl Peers {
    /// None are known yet.
    pub fn new(own_process: String) -> Self {
        Self { own: own_process, by_number: ArcSwap::default(), changed: Notify::new() }
    }

    /// From now on the nodes are these, this one among them. A node whose address is no `HOST:PORT` is left out.
    pub fn set(&self, nodes: &[KnownNode]) {
        let mut by_number = HashMap::new();
        for node in nodes.iter().filter(|node| node.process != self.own) {
            let (Some(number), Some(address)) = (node_number(&node.process), parse(&node.address)) else {
                continue;
            };
            let address = Some(Arc::new(address));
            by_number.entry(number).and_modify(|other| *other = None).or_insert(address);
        }
        self.by_number.store(Arc::new(by_number));
        self.changed.notify_one();
    }

    /// Waits until the nodes are others. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The address of the node with this number.
    pub fn address_of(&self, number: u32) -> Option<Arc<HostAddress>> {
        self.by_number.load().get(&number).cloned().flatten()
    }

    /// The addresses of all other nodes.
    pub fn all(&self) -> Vec<Arc<HostAddress>> {
        self.by_number.load().values().flatten().cloned().collect()
    }
}

/// `HOST:PORT`; an IPv6 address has brackets.
fn parse(address: &str) -> Option<HostAddress> {
    let (host, port) = address.rsplit_once(':')?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let is_sound = !bare.is_empty() && !bare.contains(['/', ' ']) && (bare != host || !host.contains(':'));
    let port = port.parse().ok().filter(|port| *port != 0 && is_sound)?;
    Some(HostAddress::Tcp { name: bare.to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(address: &str, process: &str) -> KnownNode {
        KnownNode { name: "n".to_owned(), address: address.to_owned(), process: process.to_owned() }
    }

    #[test]
    fn a_node_is_found_by_its_number_and_the_own_one_is_not_among_them() {
        let peers = Peers::new("own".to_owned());
        peers.set(&[
            node("10.0.0.1:6432", "own"),
            node("[::1]:6433", "other"),
            node("/run/pglobby", "by socket"),
        ]);
        let other = HostAddress::Tcp { name: "::1".to_owned(), port: 6433 };
        assert_eq!(peers.address_of(node_number("other").unwrap()).as_deref(), Some(&other));
        assert_eq!(peers.address_of(node_number("own").unwrap()), None);
        assert_eq!(peers.all().len(), 1);
        peers.set(&[node("a:1", "other"), node("b:1", "other")]);
        assert_eq!(peers.address_of(node_number("other").unwrap()), None, "which of the two is not known");
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for odd in ["", "db1", ":6432", "db1:", "db1:0", "db1:65536", "::1", "/run/pglobby", "a b:1", "a/b:1"]
        {
            assert_eq!(parse(odd), None, "{odd}");
        }
    }
}
