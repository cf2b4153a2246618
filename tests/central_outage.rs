//! The central database is away: nodes start, admit every login that their snapshot has, and pass cancels on to each other. When it is
//! back, what it says counts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Instant};

use pglobby::{
    config::Config,
    control_path::{
        directory::snapshot::{self, Examined},
        secrets::keyring_reload::ReloadableKeyring,
    },
};
use rustix::process::Signal;
use support::{
    Client, Cluster, Forwarder, Node, Proxy, Wire,
    client::{PATIENCE, in_time},
    console::shown,
    forwarder::Fault,
    proxy::{Builder, login_of, password_of},
    wire::{c_string, tags},
};

const FILE: &str = "directory.snapshot";
const TENANTS: [&str; 2] = ["acme", "globex"];
/// Of the tenants, the console's administrator, and a service.
const LOGINS: usize = 4;

/// The tenants live on a PostgreSQL of their own, so that the central database can go without them.
struct Place {
    proxy: Proxy,
    host: Cluster,
}

impl Place {
    async fn with(builder: Builder) -> Self {
        let host = Cluster::start();
        let proxy = builder.config("node_name", "\"one\"").start().await;
        proxy.add_host("db", &host);
        for tenant in TENANTS {
            proxy.command(&["tenant", "create", tenant, "--host", "db"]);
            proxy.create_login(&login_of(tenant), &password_of(tenant), &["--tenant", tenant]);
        }
        proxy.create_login("api", "api secret", &["--service", "--all-tenants"]);
        proxy.create_login("console_admin", "console secret", &["--admin"]);
        Self { proxy, host }
    }

    async fn with_snapshot() -> Self {
        let place = Self::with(with_snapshot()).await;
        has_logins(place.proxy.folder(), LOGINS).await;
        place
    }

    /// The first node again, while the central database is away.
    async fn start_alone(&mut self) {
        assert!(self.proxy.stop_with(Signal::TERM).await.success());
        self.proxy.cluster.stop();
        self.proxy.start_again().await;
    }
}

fn with_snapshot() -> Builder {
    Proxy::build().config("directory_snapshot", &format!("{FILE:?}"))
}

/// What the file of the node in this folder contains.
fn examined(folder: &Path) -> Option<Examined> {
    let config = Config::load(Some(&folder.join("proxy.toml"))).unwrap();
    let keyring = ReloadableKeyring::load(&config).unwrap();
    snapshot::examine(&config, "central", keyring).ok()
}

/// Waits until the file has so many logins, and nothing has changed since.
async fn has_logins(folder: &Path, wanted: usize) {
    let begun = Instant::now();
    loop {
        let found = examined(folder);
        if found.as_ref().is_some_and(|found| (found.logins, found.changed) == (wanted, 0)) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "never {wanted} logins: {found:?}");
        tokio::task::yield_now().await;
    }
}

async fn becomes(what: &str, wanted: &str, mut ask: impl AsyncFnMut() -> String) {
    in_time(what, async { while ask().await != wanted {} }).await;
}

#[tokio::test]
async fn a_node_starts_without_its_central_database_and_admits_every_login() {
    let mut place = Place::with_snapshot().await;
    let file = place.proxy.folder().join(FILE);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
    let checked = place.proxy.command(&["check"]);
    assert!(checked.contains("directory snapshot: ") && checked.contains("4 logins, 2 tenants"), "{checked}");

    place.start_alone().await;

    let proxy = &mut place.proxy;
    proxy.logged("starting with the snapshot of the directory").await;
    for tenant in TENANTS {
        assert_eq!(proxy.client(tenant).ask("SELECT current_database()").await, tenant);
    }
    for (user, tenant) in [("api", "acme"), ("api@globex", "globex")] {
        let database = if user == "api" { tenant } else { user };
        let api = proxy.caller(user, "api secret", database);
        assert_eq!(api.ask("SELECT current_database()").await, tenant);
    }
    // What the snapshot does not have may be there by now.
    for (user, password, database) in
        [("nobody", "x", "acme"), ("acme_user", "wrong", "acme"), ("api", "api secret", "unknown")]
    {
        assert_eq!(proxy.caller(user, password, database).refusal().await, "57P03", "{user} {database}");
    }
    let (status, words) = proxy.http_get("/readyz").await;
    assert!(status == 200 && words.contains("from a snapshot that is "), "{status} {words}");
    assert_eq!(proxy.metric("pglobby_central_reachable").await, 0.0);
    assert!(proxy.metric("pglobby_directory_snapshot_age_seconds").await < 60.0);
    let console = proxy.console_of_outage().await;
    assert_eq!(console.ask("SELECT 1").await, "1");

    proxy.cluster.start_again();
    becomes("/readyz", "ready\n", async || proxy.http_get("/readyz").await.1).await;
    proxy.create_login("late", "late secret", &["--tenant", "acme"]);
    assert_eq!(proxy.caller("late", "late secret", "acme").ask("SELECT 1").await, "1");
    has_logins(proxy.folder(), LOGINS + 1).await;
}

trait InOutage {
    async fn console_of_outage(&self) -> Client;
}

impl InOutage for Proxy {
    /// [`Proxy::console`] asks the central database whether there is an administrator.
    async fn console_of_outage(&self) -> Client {
        self.caller("console_admin", "console secret", "pglobby").connect().await
    }
}

#[tokio::test]
async fn a_running_node_admits_a_login_that_it_has_never_seen() {
    let mut place = Place::with_snapshot().await;
    place.proxy.cluster.stop();
    assert_eq!(place.proxy.client("globex").ask("SELECT current_database()").await, "globex");
    let (status, words) = place.proxy.http_get("/readyz").await;
    assert!(status == 200 && words.contains("from a snapshot that is "), "{status} {words}");
}

#[tokio::test]
async fn a_large_directory_is_in_the_snapshot_as_well() {
    let mut place = Place::with_snapshot().await;
    let central = place.proxy.cluster.client("central").await;
    central
        .run(
            "INSERT INTO pglobby.tenants (name, host, database, username)
                SELECT 't' || n, 'db', 'd' || n, 'r' || n FROM generate_series(1, 200) n;
             INSERT INTO pglobby.logins (name, kind, tenant_id, verifier)
                SELECT 'login' || n, 'employee', t.id, l.verifier
                FROM generate_series(1, 2000) n
                JOIN pglobby.tenants t ON t.name = 't' || (1 + n % 200)
                JOIN pglobby.logins l ON l.name = 'globex_user'",
        )
        .await;
    has_logins(place.proxy.folder(), LOGINS + 2000).await;
    place.proxy.cluster.stop();
    assert_eq!(place.proxy.client("globex").ask("SELECT current_database()").await, "globex");
}

/// Of several nodes, one that has no server on a host could open none, as long as the central database was away.
#[tokio::test]
async fn a_node_that_has_no_server_on_a_host_opens_one() {
    let mut place = Place::with_snapshot().await;
    let two = Node::beside(&place.proxy, &[("node_name", "\"two\"")]).await;
    has_logins(two.folder(), LOGINS).await;
    two.logged("another node has joined").await;
    place.proxy.cluster.stop();
    two.logged("leases have run out").await;
    for tenant in TENANTS {
        assert_eq!(two.client(tenant).ask("SELECT current_database()").await, tenant);
    }
}

/// `pglobby node snapshot` on any machine, and the file on the new one.
#[tokio::test]
async fn a_new_node_can_be_given_a_snapshot() {
    let mut place = Place::with(Proxy::build()).await;
    let given = place.proxy.folder().join("given");
    let printed = place.proxy.command(&["node", "snapshot", "--file", given.to_str().unwrap()]);
    assert!(printed.contains("4 logins, 2 tenants"), "{printed}");
    place.proxy.cluster.stop();

    let file = format!("{given:?}");
    let two = Node::beside(&place.proxy, &[("node_name", "\"two\""), ("directory_snapshot", &file)]).await;

    assert_eq!(two.client("acme").ask("SELECT current_database()").await, "acme");
}

/// Its notification was seen: neither a cached row nor an older file lets it in again.
#[tokio::test]
async fn a_login_revoked_just_before_stays_revoked_in_a_node_that_starts_again() {
    let mut place = Place::with_snapshot().await;
    let proxy = &mut place.proxy;
    let mut session = proxy.client("acme").connect().await;
    proxy.command(&["login", "disable", "acme_user"]);
    session.closed().await;

    proxy.cluster.kill_9();

    assert_eq!(proxy.client("globex").ask("SELECT 1").await, "1");
    let refusal = proxy.client("acme").refusal().await;
    assert!(["57P03", "28P01"].contains(&refusal.as_str()), "{refusal}");
    proxy.kill_9();
    proxy.start_again().await;
    assert_eq!(proxy.client("globex").ask("SELECT 1").await, "1");
    let refusal = proxy.client("acme").refusal().await;
    assert!(["57P03", "28P01"].contains(&refusal.as_str()), "{refusal}");
}

/// A node that is cut off from the central database, which goes on.
async fn cut_off(place: &Place) -> (Node, Forwarder) {
    let way = Forwarder::to(place.proxy.cluster.port()).await;
    let url = place.proxy.cluster.url("central");
    let url = format!("{:?}", url.replace(&place.proxy.cluster.port().to_string(), &way.port.to_string()));
    let two = Node::beside(&place.proxy, &[("node_name", "\"two\""), ("central.url", &url)]).await;
    (two, way)
}

// The forwarder goes on while the test waits for a node.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_central_database_says_wins_when_it_is_back() {
    let place = Place::with_snapshot().await;
    let (mut two, way) = cut_off(&place).await;
    has_logins(two.folder(), LOGINS).await;
    way.set(Fault::CutAfter(0));
    two.logged("cannot follow changes").await;
    place.proxy.command(&["login", "disable", "acme_user"]);
    two.kill_9();
    two.start_again().await;
    let mut revoked = two.client("acme").connect().await;
    let other = two.client("globex").connect().await;
    assert_eq!(revoked.ask("SELECT 1").await, "1", "the node cannot know");

    way.set(Fault::None);

    revoked.closed().await;
    assert_eq!(other.ask("SELECT 1").await, "1");
    becomes("the refusal", "28P01", async || two.client("acme").refusal().await).await;
}

#[tokio::test]
async fn no_login_is_admitted_by_a_snapshot_that_is_too_old() {
    let mut place = Place::with(with_snapshot().config("directory_snapshot_max_age", "\"3s\"")).await;
    has_logins(place.proxy.folder(), LOGINS).await;
    place.proxy.cluster.stop();
    let refused = async { while place.proxy.client("acme").try_connect().await.is_ok() {} };
    in_time("the end of its time", refused).await;
    assert_eq!(place.proxy.client("globex").refusal().await, "57P03");

    place.proxy.stop_with(Signal::TERM).await;
    place.proxy.set_config("central_start_timeout", "\"300ms\"");
    let output = place.proxy.command_with(&["serve"], "");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("directory_snapshot_max_age is 3s"), "{said}");
}

#[tokio::test]
async fn a_snapshot_that_is_not_its_own_or_was_altered_is_refused_in_words() {
    let mut place = Place::with_snapshot().await;
    let proxy = &mut place.proxy;
    proxy.stop_with(Signal::TERM).await;
    proxy.cluster.stop();
    let file = proxy.folder().join(FILE);
    let good = fs::read(&file).unwrap();
    proxy.set_config("central_start_timeout", "\"1ms\"");
    let says = |proxy: &Proxy, words: &str| {
        let output = proxy.command_with(&["serve"], "");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("the snapshot of the directory is not used") && said.contains(words), "{said}");
        let checked = String::from_utf8_lossy(&proxy.command_with(&["check"], "").stdout).into_owned();
        assert!(checked.contains("FAILED  directory snapshot: ") && checked.contains(words), "{checked}");
    };
    let mut altered = good.clone();
    *altered.last_mut().unwrap() ^= 1;
    for (bytes, words) in [
        (altered.as_slice(), "does not open with key"),
        (&good[..good.len() - 1], "is damaged"),
        (&[good.as_slice(), b"more"].concat(), "is damaged"),
        (b"", "is not a snapshot"),
        (b"SQLite format 3\0", "is not a snapshot"),
    ] {
        fs::write(&file, bytes).unwrap();
        says(proxy, words);
    }
    fs::write(&file, &good).unwrap();
    let config = fs::read_to_string(proxy.config_file()).unwrap();
    fs::write(proxy.config_file(), config.replace("/central\"", "/another\"")).unwrap();
    says(proxy, "does not open with key");
    fs::write(proxy.config_file(), config).unwrap();
    let (ring, other) = (proxy.folder().join("keyring.toml"), Proxy::build().start().await);
    let own = fs::read(&ring).unwrap();
    fs::write(&ring, fs::read(other.folder().join("keyring.toml")).unwrap()).unwrap();
    says(proxy, "which is not in the key ring");
    fs::write(&ring, own).unwrap();
    proxy.start_again().await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

/// A tenant's row that was changed made all logins of the tenant count as changed.
#[tokio::test]
async fn remembered_logins_of_a_tenant_that_was_set_are_admitted() {
    let mut place = Place::with(Proxy::build()).await;
    let proxy = &mut place.proxy;
    let console = proxy.console_of_outage().await;
    for user in ["acme_user", "api"] {
        let password = if user == "api" { "api secret" } else { "acme-secret" };
        assert_eq!(proxy.caller(user, password, "acme").ask("SELECT 1").await, "1");
    }
    proxy.command(&["tenant", "set", "acme", "pool_size=7"]);
    shown(&console, "DATABASES", "pool_size", "7").await;

    proxy.cluster.stop();

    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    assert_eq!(proxy.caller("api", "api secret", "acme").ask("SELECT 1").await, "1");
    assert_eq!(proxy.client("globex").refusal().await, "57P03", "no snapshot, never seen");
}

// ---- cancels between nodes ------------------------------------------------------------------------------------------

/// Runs a query that takes long; it is cancelled when `cancel` is sent to another node.
async fn is_cancelled_at(client: &mut Wire, behind: &Client, port: u16) {
    client.send(b'Q', &c_string("SELECT pg_sleep(600) AS marker")).await;
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%marker' AND state = 'active'";
    becomes("the query", "1", async || behind.ask(running).await).await;
    let mut cancel = Wire::open(port).await;
    cancel.send_bytes(&client.cancel_request()).await;
    assert_eq!(cancel.until_end().await, []);
    let answers = client.until_ready().await;
    let error = answers.iter().find(|answer| answer.tag == b'E');
    assert_eq!(error.map(|error| error.sqlstate()).as_deref(), Some("57014"), "{}", tags(&answers));
}

#[tokio::test]
async fn cancels_go_from_node_to_node_without_the_central_database() {
    let mut place = Place::with(with_snapshot()).await;
    let mut two = Node::beside(&place.proxy, &[("node_name", "\"two\"")]).await;
    place.proxy.logged("another node has joined").await;
    has_logins(two.folder(), LOGINS).await;
    let behind = place.host.client("acme").await;
    let mut client = place.proxy.wire("acme").await;
    is_cancelled_at(&mut client, &behind, two.port()).await;

    place.proxy.cluster.stop();

    is_cancelled_at(&mut client, &behind, two.port()).await;
    // A node that has started since knows the others from its snapshot.
    two.kill_9();
    two.start_again().await;
    is_cancelled_at(&mut client, &behind, two.port()).await;
}

/// In session mode the process number is a server's: no node can tell whose it is.
#[tokio::test]
async fn cancels_in_session_mode_find_their_node_too() {
    let mut place = Place::with(Proxy::build().pool_mode("session")).await;
    let two = Node::beside(&place.proxy, &[("node_name", "\"two\"")]).await;
    place.proxy.logged("another node has joined").await;
    two.logged("another node has joined").await;
    let behind = place.host.client("acme").await;
    let mut client = place.proxy.wire("acme").await;
    two.client("acme").ask("SELECT 1").await;
    is_cancelled_at(&mut client, &behind, two.port()).await;

    place.proxy.cluster.stop();

    is_cancelled_at(&mut client, &behind, two.port()).await;
}

/// The address of the owner's row leads to a third node, as after a mistake in `node_address`: the request comes there once, and
/// then goes by the central database.
#[tokio::test]
async fn a_cancel_that_was_sent_to_the_wrong_node_is_not_passed_on_for_ever() {
    let mut place = Place::with(Proxy::build()).await;
    let two = Node::beside(&place.proxy, &[("node_name", "\"two\"")]).await;
    two.logged("another node has joined").await;
    place.proxy.set_config("node_address", &format!("\"127.0.0.1:{}\"", two.port()));
    assert!(place.proxy.stop_with(Signal::TERM).await.success());
    two.logged("another node has left").await;
    place.proxy.start_again().await;
    becomes("the first node again", "true", async || {
        let log = two.log();
        let since = log.rsplit("another node has left").next().unwrap();
        since.contains("another node has joined").to_string()
    })
    .await;
    let behind = place.host.client("acme").await;
    let mut client = place.proxy.wire("acme").await;

    is_cancelled_at(&mut client, &behind, two.port()).await;
}

// ---- a central database with a replica ------------------------------------------------------------------------------

#[tokio::test]
async fn nodes_follow_their_central_database_to_its_replica() {
    let primary = Cluster::start();
    let standby = Cluster::build().start_as_standby_of(&primary).await;
    let both = format!("127.0.0.1:{},127.0.0.1:{}", primary.port(), standby.port());
    let url = primary.url("central").replace(&format!("127.0.0.1:{}", primary.port()), &both);
    let servers = [primary.port(), standby.port()].map(|port| format!("central server 127.0.0.1:{port}: "));
    let builder = with_snapshot().cluster(primary);
    let url = format!("{:?}", format!("{url}?target_session_attrs=read-write"));
    let mut place = Place::with(builder.config("central.url", &url)).await;
    let proxy = &mut place.proxy;
    has_logins(proxy.folder(), LOGINS).await;
    let session = proxy.client("acme").connect().await;
    let checked = proxy.command(&["check"]);
    for (server, role) in servers.iter().zip(["takes writes", "stands by"]) {
        assert!(checked.contains(&format!("{server}{role}")), "{checked}");
    }

    proxy.cluster.stop();
    assert_eq!(proxy.client("globex").ask("SELECT 1").await, "1", "while there is no primary");
    standby.promote().await;

    becomes("/readyz", "ready\n", async || proxy.http_get("/readyz").await.1).await;
    proxy.create_login("late", "late secret", &["--tenant", "acme"]);
    assert_eq!(proxy.caller("late", "late secret", "acme").ask("SELECT 1").await, "1");
    assert_eq!(session.ask("SELECT 1").await, "1");
    let checked = String::from_utf8_lossy(&proxy.command_with(&["check"], "").stdout).into_owned();
    assert!(checked.contains(&format!("ok      {}takes writes", servers[1])), "{checked}");
    assert!(checked.contains(&format!("FAILED  {}", servers[0])), "{checked}");
}
