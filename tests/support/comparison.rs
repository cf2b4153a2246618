//! Compares the proxy with PostgreSQL: what a client sends through the proxy is also sent on a direct connection, and both
//! must get the same answers.

use super::{
    Proxy, Wire,
    proxy::{login_of, password_of},
    wire::{Message, PROTOCOL_3_0},
};

/// A client of the proxy, and one with a connection of its own to the same database.
pub struct Twin {
    pub proxied: Wire,
    pub direct: Wire,
}

/// A tenant acme with roles, schemas and tables `one` and `two`, and a login for direct connections.
pub struct Comparison {
    pub proxy: Proxy,
    database: String,
}

impl Comparison {
    /// `servers` is the pool size; `sql` runs as the superuser, for what a test needs besides.
    pub async fn start(servers: u32, sql: &str) -> Self {
        Self::start_in("transaction", servers, sql).await
    }

    /// The same with this pool mode.
    pub async fn start_in(mode: &str, servers: u32, sql: &str) -> Self {
        let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(servers).start().await;
        let role = proxy.client("acme").ask("SELECT current_user").await;
        let database = proxy.client("acme").ask("SELECT current_database()").await;
        let superuser = proxy.behind("acme").await;
        superuser
            .run(&format!(
                "CREATE ROLE direct LOGIN PASSWORD 'direct' IN ROLE \"{role}\";
                 CREATE ROLE one; CREATE ROLE two; GRANT one, two TO direct, \"{role}\";
                 CREATE SCHEMA one; CREATE TABLE one.t AS SELECT 'one' AS x;
                 CREATE SCHEMA two; CREATE TABLE two.t AS SELECT 'two' AS x;
                 GRANT USAGE ON SCHEMA one, two TO PUBLIC; GRANT SELECT ON one.t, two.t TO PUBLIC;
                 {sql}"
            ))
            .await;
        Self { proxy, database }
    }

    /// Two clients that log in with `options` as the startup parameter.
    pub async fn twin(&self, options: &str) -> Twin {
        let [direct, proxied] = self.logins(&[("options", options)]).await;
        Twin { direct: direct.unwrap(), proxied: proxied.unwrap() }
    }

    /// A direct and a proxied login with these startup parameters: each a client, or the error that refused it.
    pub async fn logins(&self, more: &[(&str, &str)]) -> [Result<Wire, Message>; 2] {
        let login = async |port, user: &str, password: &str, database: &str| {
            let mut wire = Wire::open(port).await;
            let parameters = [&[("user", user), ("database", database)], more].concat();
            wire.startup(PROTOCOL_3_0, &parameters).await;
            wire.authenticate(password).await.map(|_| wire)
        };
        [
            login(self.proxy.cluster.port(), "direct", "direct", &self.database).await,
            login(self.proxy.port(), &login_of("acme"), &password_of("acme"), "acme").await,
        ]
    }
}
