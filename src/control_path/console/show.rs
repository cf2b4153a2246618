//! SHOW by its first word, and the few queries that drivers send at connect.

use super::{
    ConsoleError, Session, config_table,
    connection::{PARAMETERS, SERVER_VERSION},
    show_central, show_traffic,
    table::{Cell, Table},
    this_node::ThisNode,
};
use crate::control_path::admin::actor::Actor;

/// The PgBouncer version with these SHOW commands. Exporters parse the first number.
const VERSION: &str = concat!("PgBouncer 1.25.0 compatible console, pglobby ", env!("CARGO_PKG_VERSION"));

const HELP: &[(&str, &str)] = &[
    ("SHOW HELP", "this list"),
    ("SHOW VERSION", "version of pglobby"),
    ("SHOW POOLS", "pools of each tenant: clients, servers, waiting sessions"),
    ("SHOW CLIENTS", "sessions"),
    ("SHOW SERVERS", "server connections"),
    ("SHOW PINS", "sessions that keep a server between transactions, and why"),
    ("SHOW STATS", "what each tenant has done: totals, and averages of the last minute"),
    ("SHOW STATS_TOTALS", "the totals of SHOW STATS"),
    ("SHOW STATS_AVERAGES", "the averages of SHOW STATS"),
    ("SHOW TOTALS", "SHOW STATS over all tenants"),
    ("SHOW DATABASES", "tenants, with PgBouncer's columns"),
    ("SHOW USERS", "logins, with PgBouncer's columns"),
    ("SHOW TENANTS", "tenants"),
    ("SHOW LOGINS", "logins"),
    ("SHOW HOSTS", "PostgreSQL clusters and their budgets"),
    ("SHOW NODES", "running pglobby processes that share the central database, and where they differ"),
    ("SHOW … ON ALL NODES | ON NODE name", "the same of other nodes, with a first column node"),
    ("SHOW WORKERS", "threads that serve clients: how busy they are, with how many pools and clients"),
    ("SHOW LISTS", "how many there are of everything"),
    ("SHOW CONFIG", "configuration"),
    ("SHOW STATE", "whether everything is paused"),
    ("RELOAD", "read the configuration again"),
    ("PAUSE [tenant]", "close servers as they come back, and lend none until RESUME"),
    ("RESUME [tenant]", "lend servers again"),
    ("DISABLE tenant", "let no new session in until ENABLE"),
    ("ENABLE tenant", "let sessions in again"),
    ("RECONNECT [tenant]", "open new servers instead of those there are"),
    ("WAIT_CLOSE [tenant]", "return when the servers replaced by RECONNECT or RELOAD are closed"),
    ("KILL [tenant]", "end sessions now, and pause until RESUME"),
    ("KILL_CLIENT id", "end the session with that id of SHOW CLIENTS"),
    (
        "… ON NODE name, … ON ALL NODES",
        "after any of these commands; by default RELOAD and SHUTDOWN are for this node, the others for all",
    ),
    ("SHUTDOWN", "end now"),
    ("SHUTDOWN WAIT_FOR_SERVERS", "end when transactions have ended"),
    ("SHUTDOWN WAIT_FOR_CLIENTS", "the same: idle sessions end at once, others with their transaction"),
    ("CREATE TENANT name [HOST h] [TEMPLATE db] [DATABASE db]", "a tenant with a database of its own"),
    (
        "ADOPT TENANT name [HOST h] [DATABASE db] [OWNER role] [OWNERSHIP MEMBERSHIP | TRANSFER | NONE] \
         [USERNAME role] [PASSWORD '…']",
        "a tenant of a database that exists; USERNAME: its role exists, too, with this password or a new one",
    ),
    ("ALTER TENANT name SET key = value | DEFAULT [, …]", "its settings, as tenant set has them"),
    ("SUSPEND TENANT name [REASON '…'] [AFTER TRANSACTION]", "close it; its clients read the reason"),
    ("RESUME TENANT name", "open it again"),
    ("ROTATE TENANT name", "new passwords for its roles"),
    ("RENAME TENANT name TO name", "another name"),
    ("MOVE TENANT name TO HOST h [PATIENCE '30s'] [KEEP SOURCE]", "another host"),
    (
        "DROP TENANT name [WITH DATABASE | LEAVE HOST]",
        "drop it with its logins and its database (an adopted one stays)",
    ),
    (
        "CREATE LOGIN name TENANT t | SERVICE [TENANTS t, …] | SERVICE ALL TENANTS | ADMIN \
         [READ ONLY] [PASSWORD '…'] [VALID UNTIL '…'] [FROM '10.0.0.0/8,…']",
        "a login; without a password, one is made and shown once",
    ),
    (
        "ALTER LOGIN name PASSWORD ['…'] | ENABLE | DISABLE | VALID UNTIL '…' | FROM '…' | READ ONLY | READ WRITE",
        "change it; sessions that this concerns end",
    ),
    ("GRANT TENANT t [, …] TO login [READ ONLY]", "let a service enter; also GRANT ALL TENANTS"),
    ("REVOKE TENANT t [, …] FROM login", "take it back; also REVOKE ALL TENANTS"),
    ("DROP LOGIN name", "remove it"),
    ("SET, RESET, DISCARD, BEGIN, COMMIT, ROLLBACK", "accepted for the sake of drivers; nothing happens"),
    ("SELECT 1, SELECT version()", "answered for the sake of drivers"),
];

impl ThisNode {
    /// SHOW.
    pub(super) async fn show(&self, words: &[String], actor: &Actor) -> Result<Table, ConsoleError> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (pools, sessions) = (&self.proxy.pools, &self.proxy.sessions);
        Ok(match words.as_slice() {
            [] | ["help"] => help(),
            ["version"] => Table::of_text("version", VERSION),
            ["pools"] => show_traffic::pools(&self.proxy),
            ["clients"] => show_traffic::clients(&self.proxy),
            ["servers"] => show_traffic::servers(&self.proxy),
            ["workers"] => show_traffic::workers(&self.proxy),
            ["pins"] => show_traffic::pins(&self.proxy),
            ["stats"] => show_traffic::stats(pools, &self.context.window),
            ["stats_totals"] => show_traffic::stats_totals(pools),
            ["stats_averages"] => show_traffic::stats_averages(pools, &self.context.window),
            ["totals"] => show_traffic::totals(pools, &self.context.window),
            ["databases"] => show_central::databases(actor, &self.proxy).await?,
            ["users"] => show_central::users(actor, sessions).await?,
            ["tenants"] => show_central::tenants(actor).await?,
            ["logins"] => show_central::logins(actor).await?,
            ["hosts"] => show_central::hosts(actor, pools).await?,
            ["lists"] => show_central::lists(actor, &self.proxy).await?,
            ["config"] => config_table::show(&self.proxy.config.load()),
            ["state"] => show_traffic::state(pools),
            ["nodes"] => show_central::nodes(actor).await?,
            parameter => driver_parameter(parameter)?,
        })
    }
}

impl Session {
    /// SELECT of something that drivers select at connect.
    pub(super) fn select(&self, what: &str) -> Result<Table, ConsoleError> {
        let text = |column, text: &str| Ok(Table::of_text(column, text));
        match what.trim_start_matches("pg_catalog.") {
            "version()" => text("version", &format!("PostgreSQL {SERVER_VERSION}")),
            "current_user" | "current_role" => text("current_user", &self.login.name),
            "session_user" | "user" => text("session_user", &self.login.name),
            "current_database()" => text("current_database", "pglobby"),
            "current_schema()" => text("current_schema", "public"),
            digits if !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit()) => {
                let number: i32 = digits
                    .parse()
                    .map_err(|_| ConsoleError::new("22003", format!("{digits} is out of range")))?;
                let mut table = Table::new("?column?:int");
                table.rows.push(vec![Cell::from(number)]);
                Ok(table)
            }
            _ => Err(ConsoleError::new("0A000", "the console has no tables to SELECT from")
                .hint("SHOW HELP lists what there is to see.")),
        }
    }
}

fn help() -> Table {
    let mut table = Table::new("command meaning");
    table.rows = HELP.iter().map(|(command, meaning)| vec![(*command).into(), (*meaning).into()]).collect();
    table
}

/// `SHOW client_encoding` and similar.
fn driver_parameter(words: &[&str]) -> Result<Table, ConsoleError> {
    let reported = |word: &str| PARAMETERS.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
    match words {
        [word] if reported(word).is_some() => {
            let (name, value) = reported(word).copied().unwrap_or_default();
            Ok(Table::of_text(name, value))
        }
        ["time", "zone"] => Ok(Table::of_text("TimeZone", "UTC")),
        ["transaction", "isolation", "level"]
        | ["transaction_isolation" | "default_transaction_isolation"] => {
            Ok(Table::of_text("transaction_isolation", "read committed"))
        }
        ["transaction_read_only" | "default_transaction_read_only" | "in_hot_standby"] => {
            Ok(Table::of_text("transaction_read_only", "off"))
        }
        ["search_path"] => Ok(Table::of_text("search_path", "public")),
        ["application_name"] => Ok(Table::of_text("application_name", "")),
        ["max_identifier_length"] => Ok(Table::of_text("max_identifier_length", "63")),
        _ => Err(ConsoleError::new("42601", format!("there is no SHOW {}", words.join(" ").to_uppercase()))
            .hint("SHOW HELP lists what there is.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_find_what_they_ask_for() {
        let value = |words: &[&str]| driver_parameter(words).unwrap().rows[0][0].clone();
        assert_eq!(value(&["datestyle"]), Cell::from("ISO, MDY"));
        assert_eq!(value(&["transaction", "isolation", "level"]), Cell::from("read committed"));
        let error = driver_parameter(&["poools"]).unwrap_err();
        assert_eq!(error.message, "there is no SHOW POOOLS");
    }
}
