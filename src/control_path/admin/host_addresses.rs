//! The addresses of a host: as an operator writes them, and in the columns `address`, `port` and `more_addresses` of
//! `pglobby.hosts`. The first one is where an older pglobby finds it.

use tokio_postgres::GenericClient;

use super::actor::AdminError;
use crate::{
    control_path::directory::columns::Columns,
    data_path::host_address::{ADDRESSES_MAX, DEFAULT_PORT, HostAddress},
};

/// Longest DNS name; the path of a Unix socket is shorter.
const ADDRESS_BYTES_MAX: usize = 255;

/// The addresses that an operator has written, at least one; `port` is that of those that name none.
pub fn parse(text: &str, port: u16) -> Result<Vec<HostAddress>, AdminError> {
    let wrong = |why: String| AdminError::Invalid(format!("address: {why}"));
    let port = parse_port(&port.to_string())?;
    let addresses = HostAddress::parse_list(text, port).map_err(wrong)?;
    match addresses.iter().any(|address| address.place().len() > ADDRESS_BYTES_MAX) {
        true => Err(wrong(format!("an address has at most {ADDRESS_BYTES_MAX} bytes"))),
        false => Ok(addresses),
    }
}

/// A port that an operator has written.
pub fn parse_port(text: &str) -> Result<u16, AdminError> {
    let port = text.parse().ok().filter(|port| *port > 0);
    port.ok_or_else(|| AdminError::Invalid(format!("port is a number from 1 to 65535, not {text:?}")))
}

/// The port of a host's first address.
pub async fn port_of(client: &impl GenericClient, name: &str) -> Result<u16, AdminError> {
    let row = client.query_opt("SELECT port FROM pglobby.hosts WHERE name = $1", &[&name]).await?;
    let port = row.and_then(|row| u16::try_from(row.get::<_, i32>(0)).ok());
    Ok(port.unwrap_or(DEFAULT_PORT))
}

/// Stores the addresses of a host.
///
/// # Errors
/// The central database; several addresses, and its schema has no room for them yet.
pub async fn store(
    client: &impl GenericClient,
    name: &str,
    addresses: &[HostAddress],
) -> Result<(), AdminError> {
    let Some((first, more)) = addresses.split_first() else { return Ok(()) };
    let sql = "UPDATE pglobby.hosts SET address = $2, port = $3 WHERE name = $1";
    client.execute(sql, &[&name, &first.place(), &i32::from(first.port())]).await?;
    // The schema of the release before has no such column.
    let sql = "SELECT pg_catalog.to_jsonb(h) ? 'more_addresses' FROM pglobby.hosts h WHERE name = $1";
    let has_column = client.query_opt(sql, &[&name]).await?.is_some_and(|row| row.get(0));
    if has_column {
        let more: Vec<String> = more.iter().map(HostAddress::to_string).collect();
        let sql = "UPDATE pglobby.hosts SET more_addresses = $2 WHERE name = $1";
        client.execute(sql, &[&name, &more]).await?;
    } else if !more.is_empty() {
        return Err(AdminError::Refused(
            "the central schema has no room for several addresses of a host; run `pglobby init`".to_owned(),
        ));
    }
    Ok(())
}

/// The addresses in a row with the three columns. An older snapshot has no `more_addresses`.
///
/// # Errors
/// What is wrong with the row, in words.
pub(in crate::control_path) fn of_row(row: &impl Columns) -> Result<Vec<HostAddress>, String> {
    let port = u16::try_from(row.column::<i32>("port")?).map_err(|_| "a port beyond 65535")?;
    let first = HostAddress::of(row.column("address")?, port);
    let more: Option<Vec<&str>> = row.column("more_addresses")?;
    let more = more.unwrap_or_default().into_iter().map(|text| HostAddress::parse(text, DEFAULT_PORT));
    std::iter::once(Ok(first)).chain(more).take(ADDRESSES_MAX).collect()
}
