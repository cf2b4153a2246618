//! The statements on `pglobby.node_leases`. Each is one statement, and so one transaction that holds its locks for as
//! long as the central database needs to run it, whatever becomes of the node.

use std::collections::BTreeMap;

use tokio_postgres::{
    Client, Error, Row,
    types::{ToSql, Type},
};

use super::{
    allocation::Demand,
    lease_decision::{HostRows, LeaseRow},
    lease_keeper::{Change, Snapshot},
};

/// One snapshot of all nodes, and of the leases on these hosts.
const READ: &str = "
    SELECT n.id, n.beat, n.name, h.name, h.max_connections, s.version, l.granted, l.wanted, l.weight
    FROM pglobby.nodes n
    LEFT JOIN pglobby.hosts h ON h.name = ANY ($1) AND h.max_connections IS NOT NULL
    LEFT JOIN pglobby.host_leases s ON s.host = h.name
    LEFT JOIN pglobby.node_leases l ON l.host = h.name AND l.node_id = n.id
    ORDER BY n.id";

const ADD_HOSTS: &str =
    "INSERT INTO pglobby.host_leases (host) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING";

/// A locked row is being changed at this moment: that change would win, so there is nothing to wait for. And nodes
/// that change several hosts cannot wait for each other. The row that is locked is the newest one: what has changed
/// since the statement began is seen in the comparison of versions.
const CHANGE: &str = "
    WITH asked AS (
        SELECT * FROM unnest($2::text[], $3::int8[], $4::int4[], $5::int4[], $6::int4[], $7::int4[], $8::bool[])
            AS a (host, version, max_connections, granted, wanted, weight, tell)),
    locked AS (
        SELECT s.host FROM pglobby.host_leases s JOIN asked a ON a.host = s.host AND a.version = s.version
        WHERE EXISTS (SELECT FROM pglobby.hosts h WHERE h.name = a.host AND h.max_connections = a.max_connections)
        FOR NO KEY UPDATE OF s SKIP LOCKED),
    counted AS (
        UPDATE pglobby.host_leases s SET version = s.version + 1 FROM locked WHERE locked.host = s.host
        RETURNING s.host),
    changed AS (
        INSERT INTO pglobby.node_leases (node_id, host, granted, wanted, weight)
        SELECT $1, a.host, a.granted, a.wanted, a.weight FROM asked a JOIN counted ON counted.host = a.host
        ON CONFLICT (node_id, host) DO UPDATE
            SET granted = excluded.granted, wanted = excluded.wanted, weight = excluded.weight
        RETURNING host)
    SELECT c.host, CASE WHEN a.tell THEN pg_notify('pglobby_leases', $1 || ' ' || c.host)::text END
    FROM changed c JOIN asked a ON a.host = c.host";

/// Only while the nodes still have the beat that was seen for so long. Their rows stay locked until the end, so a node
/// that beats again meanwhile waits, and then reads that its leases are gone.
const REMOVE: &str = "
    WITH asked AS (SELECT * FROM unnest($2::text[], $3::int8[]) AS a (host, version)),
    silent AS (
        SELECT n.id FROM pglobby.nodes n JOIN unnest($4::int8[], $5::int8[]) AS g (id, beat)
            ON g.id = n.id AND g.beat = n.beat
        FOR NO KEY UPDATE OF n SKIP LOCKED),
    locked AS (
        SELECT s.host FROM pglobby.host_leases s JOIN asked a ON a.host = s.host AND a.version = s.version
        FOR NO KEY UPDATE OF s SKIP LOCKED),
    removed AS (
        DELETE FROM pglobby.node_leases l USING locked, silent
        WHERE l.host = locked.host AND l.node_id = silent.id RETURNING l.host),
    counted AS (
        UPDATE pglobby.host_leases s SET version = s.version + 1
        WHERE s.host IN (SELECT host FROM removed) RETURNING s.host)
    SELECT host, pg_notify('pglobby_leases', $1 || ' ' || host)::text FROM counted";

/// The beat is compared, so that no clock decides alone.
const FORGET: &str = "
    DELETE FROM pglobby.nodes n USING unnest($1::int8[], $2::int8[]) AS g (id, beat)
    WHERE g.id = n.id AND g.beat = n.beat AND n.seen_at < now() - interval '1 hour'";

const TELL: &str =
    "SELECT pg_notify('pglobby_leases', $1 || ' ' || host) FROM unnest($2::text[]) AS a (host)";

/// What was read, and the names of the nodes.
#[derive(Debug)]
pub struct Read {
    pub snapshot: Snapshot,
    pub names: BTreeMap<i64, String>,
    /// Hosts with a budget on which no node has had a lease yet.
    pub new_hosts: Vec<String>,
}

/// Reads the leases on `hosts`.
pub async fn read(client: &Client, hosts: &[String]) -> Result<Read, Error> {
    let rows = client.query_typed(READ, &[(&hosts, Type::TEXT_ARRAY)]).await?;
    let (mut beats, mut names) = (BTreeMap::new(), BTreeMap::new());
    let (mut found, mut new_hosts) = (BTreeMap::<String, HostRows>::new(), Vec::new());
    for row in &rows {
        let node: i64 = row.try_get(0)?;
        beats.insert(node, row.try_get(1)?);
        names.insert(node, row.try_get(2)?);
        let Some(host) = row.try_get::<_, Option<String>>(3)? else { continue };
        let limit = unsigned(row.try_get(4)?);
        let Some(version) = row.try_get(5)? else {
            if !new_hosts.contains(&host) {
                new_hosts.push(host);
            }
            continue;
        };
        let rows = found.entry(host).or_insert_with(|| HostRows { limit, version, leases: Vec::new() });
        rows.leases.extend(lease(node, row)?);
    }
    let snapshot = Snapshot { beats: beats.into_iter().collect(), hosts: found.into_iter().collect() };
    Ok(Read { snapshot, names, new_hosts })
}

fn lease(node: i64, row: &Row) -> Result<Option<LeaseRow>, Error> {
    let Some(granted) = row.try_get::<_, Option<i32>>(6)? else { return Ok(None) };
    let demand = Demand { wanted: unsigned(row.try_get(7)?), weight: unsigned(row.try_get(8)?) };
    Ok(Some(LeaseRow { node, granted: unsigned(granted), demand }))
}

/// Adds what the leases of new hosts are counted in.
pub async fn add_hosts(client: &Client, hosts: &[String]) -> Result<(), Error> {
    client.execute_typed(ADD_HOSTS, &[(&hosts, Type::TEXT_ARRAY)]).await.map(drop)
}

/// Changes leases of the node `own`. Returns the hosts where that was done; elsewhere they had changed meanwhile.
pub async fn change(client: &Client, own: i64, changes: &[Change]) -> Result<Vec<String>, Error> {
    let numbers = |read: fn(&Change) -> u32| -> Vec<i32> {
        changes.iter().map(|change| signed(read(change))).collect()
    };
    let hosts: Vec<&str> = changes.iter().map(|change| change.host.as_str()).collect();
    let versions: Vec<i64> = changes.iter().map(|change| change.version).collect();
    let limits = numbers(|change| change.limit);
    let granted = numbers(|change| change.row.granted);
    let wanted = numbers(|change| change.row.demand.wanted);
    let weights = numbers(|change| change.row.demand.weight);
    let tell: Vec<bool> = changes.iter().map(|change| change.tell).collect();
    let parameters: [(&(dyn ToSql + Sync), Type); 8] = [
        (&own, Type::INT8),
        (&hosts, Type::TEXT_ARRAY),
        (&versions, Type::INT8_ARRAY),
        (&limits, Type::INT4_ARRAY),
        (&granted, Type::INT4_ARRAY),
        (&wanted, Type::INT4_ARRAY),
        (&weights, Type::INT4_ARRAY),
        (&tell, Type::BOOL_ARRAY),
    ];
    hosts_of(&client.query_typed(CHANGE, &parameters).await?)
}

/// Removes the leases of nodes that are `gone` (number and beat) on these hosts (name and version).
pub async fn remove(
    client: &Client,
    own: i64,
    hosts: &[(String, i64)],
    gone: &[(i64, i64)],
) -> Result<Vec<String>, Error> {
    let (hosts, versions): (Vec<&str>, Vec<i64>) =
        hosts.iter().map(|(host, version)| (host.as_str(), *version)).unzip();
    let (nodes, beats): (Vec<i64>, Vec<i64>) = gone.iter().copied().unzip();
    let parameters: [(&(dyn ToSql + Sync), Type); 5] = [
        (&own, Type::INT8),
        (&hosts, Type::TEXT_ARRAY),
        (&versions, Type::INT8_ARRAY),
        (&nodes, Type::INT8_ARRAY),
        (&beats, Type::INT8_ARRAY),
    ];
    hosts_of(&client.query_typed(REMOVE, &parameters).await?)
}

/// Removes the rows of nodes that are gone for an hour.
pub async fn forget(client: &Client, gone: &[(i64, i64)]) -> Result<(), Error> {
    let (nodes, beats): (Vec<i64>, Vec<i64>) = gone.iter().copied().unzip();
    client.execute_typed(FORGET, &[(&nodes, Type::INT8_ARRAY), (&beats, Type::INT8_ARRAY)]).await.map(drop)
}

/// Tells the other nodes to look at the leases of these hosts.
pub async fn tell(client: &Client, own: i64, hosts: &[String]) -> Result<(), Error> {
    client.query_typed(TELL, &[(&own, Type::INT8), (&hosts, Type::TEXT_ARRAY)]).await.map(drop)
}

fn hosts_of(rows: &[Row]) -> Result<Vec<String>, Error> {
    rows.iter().map(|row| row.try_get(0)).collect()
}

/// The columns hold no negative numbers.
fn unsigned(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

fn signed(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_path::central::change_feed::LEASES_CHANNEL;

    #[test]
    fn the_statements_notify_on_the_channel_that_nodes_listen_to() {
        for sql in [CHANGE, REMOVE, TELL] {
            assert!(sql.contains(&format!("pg_notify('{LEASES_CHANNEL}', ")), "{sql}");
        }
    }
}
