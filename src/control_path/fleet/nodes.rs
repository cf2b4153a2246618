//! The nodes as people see them: a list, and where the nodes that serve differ from each other.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde::Serialize;
use time::OffsetDateTime;
use tokio_postgres::{GenericClient, Row};

use super::Fleet;
use crate::control_path::{
    admin::{
        actor::AdminError,
        fields::{described, from_row},
    },
    central::Central,
    directory::snapshot::KnownNode,
    migrations, rhythm,
};

described! {
    /// A node.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct NodeSummary {
        /// Its number. A node that starts again has another one.
        pub id: i64,
        /// Its name.
        pub name: String,
        /// Where its clients connect.
        pub address: String,
        /// The version of pglobby.
        pub version: String,
        /// The newest schema that its version knows.
        pub schema_version: i32,
        /// `serving`, or `silent`: it has not beaten for some seconds.
        pub state: String,
        /// When it started.
        #[serde(with = "time::serde::rfc3339")]
        pub started_at: OffsetDateTime,
        /// When it beat last.
        #[serde(with = "time::serde::rfc3339")]
        pub seen_at: OffsetDateTime,
        /// The names of its sealing keys, the one that seals first.
        pub key_ids: Vec<String>,
        /// Which of `version`, `schema_version` and `key_ids` differ from those of the other nodes that serve.
        pub differs: Vec<String>,
    }
}

const NODES: &str = "
    SELECT id, name, address, version, schema_version, started_at, seen_at, key_ids,
        CASE WHEN pg_catalog.clock_timestamp() - seen_at < interval '5 s' THEN 'serving' ELSE 'silent' END
            AS state
    FROM pglobby.nodes ORDER BY name, id";

/// All nodes, by name.
pub async fn list(central: &Central) -> Result<Vec<NodeSummary>, AdminError> {
    let client = central.client().await?;
    let rows = client.query(NODES, &[]).await.map_err(|error| match migrations::is_older(&error) {
        true => AdminError::Refused(
            "the central schema is older than this pglobby and has no list of nodes; run `pglobby init`"
                .to_owned(),
        ),
        false => error.into(),
    })?;
    let mut nodes: Vec<NodeSummary> = rows.iter().map(node).collect();
    mark_differences(&mut nodes);
    Ok(nodes)
}

/// All nodes, as other nodes need them.
pub async fn known(client: &impl GenericClient) -> Result<Vec<KnownNode>, tokio_postgres::Error> {
    let rows = client.query_typed("SELECT name, address, process FROM pglobby.nodes", &[]).await?;
    let node = |row: &Row| {
        Ok(KnownNode { name: row.try_get(0)?, address: row.try_get(1)?, process: row.try_get(2)? })
    };
    rows.iter().map(node).collect()
}

fn node(row: &Row) -> NodeSummary {
    from_row!(row => NodeSummary {
        id, name, address, version, schema_version, state, started_at, seen_at, key_ids;
        differs: Vec::new()
    })
}

impl NodeSummary {
    /// Whether it serves.
    pub fn is_serving(&self) -> bool {
        self.state == "serving"
    }

    /// The order of the keys matters for the first one only, which seals.
    fn keys(&self) -> String {
        let (first, others) =
            self.key_ids.split_first().map_or(("", &[][..]), |(first, others)| (first, others));
        let mut others = others.to_vec();
        others.sort();
        format!("{first} {}", others.join(" "))
    }
}

/// Names what differs from the value of most nodes; if no value is that of most, it differs at each node.
fn mark_differences(nodes: &mut [NodeSummary]) {
    type Value = fn(&NodeSummary) -> String;
    let values: [(&str, Value); 3] = [
        ("version", |node| node.version.clone()),
        ("schema_version", |node| node.schema_version.to_string()),
        ("key_ids", NodeSummary::keys),
    ];
    for (name, value) in values {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for node in nodes.iter().filter(|node| node.is_serving()) {
            *counts.entry(value(node)).or_default() += 1;
        }
        if counts.len() < 2 {
            continue;
        }
        let most = counts.values().copied().max().unwrap_or_default();
        let mut usual = counts.iter().filter(|(_, count)| **count == most).map(|(value, _)| value.clone());
        let usual = usual.next().filter(|_| usual.next().is_none());
        for node in nodes.iter_mut().filter(|node| node.is_serving()) {
            if usual.as_ref() != Some(&value(node)) {
                node.differs.push(name.to_owned());
            }
        }
    }
}

/// What differs, in a sentence; `None`: nothing does.
pub fn differences(nodes: &[NodeSummary]) -> Option<String> {
    let of_node = |node: &NodeSummary| {
        let values = node.differs.iter().map(|name| match name.as_str() {
            "version" => format!("version {}", node.version),
            "schema_version" => format!("schema version {}", node.schema_version),
            _ => format!("keys {}", node.key_ids.join(", ")),
        });
        format!("node {:?} has {}", node.name, values.collect::<Vec<_>>().join(" and "))
    };
    let differing: Vec<String> = nodes.iter().filter(|node| !node.differs.is_empty()).map(of_node).collect();
    (!differing.is_empty()).then(|| differing.join("; "))
}

/// Interval at which a node compares itself and the others.
const COMPARE_EVERY: Duration = Duration::from_secs(5);

/// The same while the schema has no list of nodes: each look is an error in the log of its server.
const OLDER_SCHEMA_PAUSE: Duration = Duration::from_secs(60);

/// Logs where the nodes that serve differ, once for each difference. Returns only if it is dropped.
pub async fn warn_of_differences(central: Central, fleet: Arc<Fleet>) {
    let mut interval = rhythm::every(COMPARE_EVERY);
    let mut last = None;
    loop {
        interval.tick().await;
        let found = match compare(&central, &fleet).await {
            Ok(found) => found,
            Err(AdminError::Refused(_)) => {
                tokio::time::sleep(OLDER_SCHEMA_PAUSE).await;
                continue;
            }
            // An outage is logged elsewhere.
            Err(_) => continue,
        };
        if found != last {
            match &found {
                Some(differences) => tracing::warn!(differences, "nodes differ"),
                None => tracing::info!("nodes differ no more"),
            }
            last = found;
        }
    }
}

/// What differs between the nodes. A node that is alone asks nothing.
async fn compare(central: &Central, fleet: &Fleet) -> Result<Option<String>, AdminError> {
    if fleet.is_alone.load(Ordering::Relaxed) {
        return Ok(None);
    }
    list(central).await.map(|nodes| differences(&nodes))
}

/// Whether the nodes differ in their keys: then one of them cannot open what another seals.
pub fn keys_differ(nodes: &[NodeSummary]) -> bool {
    nodes.iter().any(|node| node.differs.iter().any(|name| name == "key_ids"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, version: &str, keys: &[&str]) -> NodeSummary {
        NodeSummary {
            id: 1,
            name: name.to_owned(),
            address: "127.0.0.1:6432".to_owned(),
            version: version.to_owned(),
            schema_version: 6,
            state: "serving".to_owned(),
            started_at: OffsetDateTime::UNIX_EPOCH,
            seen_at: OffsetDateTime::UNIX_EPOCH,
            key_ids: keys.iter().map(|key| (*key).to_owned()).collect(),
            differs: Vec::new(),
        }
    }

    fn differ(mut nodes: Vec<NodeSummary>) -> Vec<NodeSummary> {
        mark_differences(&mut nodes);
        nodes
    }

    #[test]
    fn nodes_that_are_alike_do_not_differ() {
        let nodes = differ(vec![node("a", "1", &["k2", "k0", "k1"]), node("b", "1", &["k2", "k1", "k0"])]);
        assert_eq!(differences(&nodes), None);
    }

    #[test]
    fn the_one_that_is_unlike_the_others_differs() {
        let nodes = differ(vec![
            node("a", "1", &["k"]),
            node("b", "2", &["k"]),
            node("c", "1", &["k", "l"]),
            node("d", "1", &["k"]),
        ]);
        assert_eq!(differences(&nodes).unwrap(), "node \"b\" has version 2; node \"c\" has keys k, l");
        assert!(keys_differ(&nodes));
    }

    #[test]
    fn of_two_both_differ_and_a_silent_one_does_not_count() {
        let mut silent = node("c", "0", &[]);
        silent.state = "silent".to_owned();
        let nodes = differ(vec![node("a", "1", &["k"]), node("b", "2", &["k"]), silent]);
        assert_eq!(differences(&nodes).unwrap(), "node \"a\" has version 1; node \"b\" has version 2");
        assert!(!keys_differ(&nodes));
    }
}
