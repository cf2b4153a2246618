//! What happens to a tenant's clients when it is renamed, suspended, dropped, or when their logins change: through the
//! real proxy.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use pglobby::{
    control_path::{
        admin::tenants,
        onboarding::{
            create::create,
            drop::{DropDatabase, drop_tenant},
        },
    },
    local_postgres::binaries::PostgresBinaries,
};
use support::{
    Client, Cluster, Proxy,
    admin::{Admin, Master, StopAfter, tenant},
    client::in_time,
    proxy::{login_of, password_of},
};

/// Waits until the client's session is refused, and answers how.
async fn until_refused(client: &Client) -> String {
    let refused = async {
        loop {
            if let Err(error) = client.try_run("SELECT 1").await {
                return error.code().map(|code| code.code().to_owned()).unwrap_or_default();
            }
        }
    };
    in_time("the session ends", refused).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_tenants_sessions_go_on_and_new_ones_ask_for_the_new_name() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let client = proxy.client("acme").connect().await;
    client.run("CREATE TABLE kept (a int); SET application_name = 'patient'").await;

    let renamed = proxy.json(&["tenant", "rename", "acme", "umbrella", "--json"]);

    assert_eq!((&renamed["name"], &renamed["database"]), (&"umbrella".into(), &"acme".into()));
    assert_eq!(client.ask("SHOW application_name").await, "patient");
    let mut caller = proxy.client("acme");
    caller.config.dbname("umbrella");
    let entered = async {
        while caller.try_connect().await.is_err() {} // every node hears of it within a second
    };
    in_time("the new name is known", entered).await;
    assert_eq!(caller.ask("SELECT count(*) FROM kept").await, "0");
    assert_eq!(proxy.client("acme").refusal().await, caller_of_nobody(&proxy).await);
    let taken = proxy.command_with(&["tenant", "rename", "umbrella", "globex"], "");
    assert!(
        String::from_utf8_lossy(&taken.stderr).contains("there is a tenant \"globex\" already"),
        "{taken:?}"
    );
    for (from, to, says) in [("umbrella", "postgres", "reserved"), ("acne", "x", "no tenant")] {
        let refused = proxy.command_with(&["tenant", "rename", from, to], "");
        assert!(String::from_utf8_lossy(&refused.stderr).contains(says), "{refused:?}");
    }
    client.run("INSERT INTO kept VALUES (1)").await;
}

async fn caller_of_nobody(proxy: &Proxy) -> String {
    let mut caller = proxy.client("acme");
    caller.config.dbname("nobody");
    caller.refusal().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_tenants_sessions_may_finish_their_transaction_or_end_now() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let (idle, working) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    working.run("BEGIN; CREATE TABLE paid (a int)").await;

    proxy.command(&["tenant", "suspend", "acme", "--reason", "unpaid", "--after-transaction"]);

    until_refused(&idle).await;
    let refused = proxy.client("acme").try_connect().await.err().expect("closed");
    assert!(refused.as_db_error().unwrap().message().contains("unpaid"), "{refused:?}");
    working.run("INSERT INTO paid VALUES (1)").await.run("COMMIT").await;
    until_refused(&working).await;
    assert_eq!(proxy.behind("acme").await.ask("SELECT count(*) FROM paid").await, "1");

    proxy.command(&["tenant", "resume", "acme"]);
    let entered = async {
        loop {
            if let Ok(client) = proxy.client("acme").try_connect().await {
                return client;
            }
        }
    };
    let working = in_time("open again", entered).await;
    working.run("BEGIN; INSERT INTO paid VALUES (2)").await;
    proxy.command(&["tenant", "suspend", "acme", "--after-transaction"]);
    working.run("INSERT INTO paid VALUES (3)").await;
    proxy.command(&["tenant", "suspend", "acme", "--now"]);
    until_refused(&working).await;
    let superuser = proxy.behind("acme").await;
    assert_eq!(superuser.ask("SELECT count(*) FROM paid").await, "1", "the rest was rolled back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_login_ends_the_sessions_it_concerns_and_no_others() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let bystander = proxy.client("acme").connect().await;
    for (login, options, change) in [
        ("disabled", &["--tenant", "acme"][..], &["login", "disable", "disabled"][..]),
        ("dropped", &["--tenant", "acme"], &["login", "drop", "dropped"]),
        (
            "revoked",
            &["--service", "--tenants", "acme,globex"],
            &["login", "revoke", "revoked", "--tenants", "acme"],
        ),
        (
            "lowered",
            &["--service", "--tenants", "acme"],
            &["login", "grant", "lowered", "--tenants", "acme", "--read-only"],
        ),
        ("renewed", &["--tenant", "acme"], &["login", "set-password", "renewed", "--generate"]),
        ("narrowed", &["--tenant", "acme"], &["login", "set", "narrowed", "allow_from=10.0.0.0/8"]),
        ("over", &["--tenant", "acme"], &["login", "set", "over", "valid_until=2020-01-01"]),
        ("reading", &["--tenant", "acme"], &["login", "set", "reading", "access=read_only"]),
    ] {
        proxy.create_login(login, "secret", options);
        let client = proxy.caller(login, "secret", "acme").connect().await;
        client.run("SELECT 1").await;

        proxy.command(change);

        until_refused(&client).await;
    }
    proxy.create_login("granted", "secret", &["--service", "--tenants", "acme,globex"]);
    let client = proxy.caller("granted", "secret", "acme").connect().await;
    proxy.command(&["login", "revoke", "granted", "--tenants", "globex"]);
    let refused = async { while proxy.caller("granted", "secret", "globex").try_connect().await.is_ok() {} };
    in_time("the change has arrived", refused).await;
    client.run("SELECT 1").await;
    bystander.run("SELECT 1").await;
}

/// A session is not asked again who it is; its login's end is walked for. What was put off meanwhile is not held against it.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_when_its_login_does() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let mut clients = Vec::new();
    for name in ["passing", "extended"] {
        proxy.create_login(name, "secret", &["--tenant", "acme"]);
        clients.push(proxy.caller(name, "secret", "acme").connect().await);
        let soon = time::OffsetDateTime::now_utc() + time::Duration::seconds(2);
        let soon = soon.format(&time::format_description::well_known::Rfc3339).unwrap();
        proxy.command(&["login", "set", name, &format!("valid_until={soon}")]);
    }
    proxy.command(&["login", "set", "extended", "valid_until=2999-12-31"]);

    until_refused(&clients[0]).await;

    assert_eq!(proxy.caller("passing", "secret", "acme").refusal().await, "28P01");
    clients[1].run("SELECT 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_allow_from_ends_sessions_from_elsewhere() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let (client, bystander) = (proxy.client("acme").connect().await, proxy.client("globex").connect().await);
    proxy.command(&["tenant", "set", "acme", "allow_from=127.0.0.0/8"]);
    client.run("SELECT 1").await;
    proxy.command(&["tenant", "set", "acme", "allow_from=10.0.0.0/8"]);
    until_refused(&client).await;
    bystander.run("SELECT 1").await;
}

/// Restores a dump beside what is left, and reads from it.
async fn restored(admin: &Admin, file: &std::path::Path, sql: &str) -> String {
    admin.superuser("postgres").await.run("CREATE DATABASE restored").await;
    let programs = PostgresBinaries::find(None).unwrap();
    let done = Command::new(programs.program("pg_restore"))
        .args(["--no-owner", "--no-privileges", "--dbname", &admin.installation.cluster.url("restored")])
        .arg(file)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    admin.superuser("restored").await.ask(sql).await
}

/// A machine whose pg_dump is older than the host (or has none) makes no copy, and that is known while clients still work.
#[tokio::test]
async fn a_final_dump_that_cannot_be_made_leaves_the_tenant_open() {
    let admin = Admin::on(Cluster::postgres_18(), Master::Superuser).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("acme.dump");

    let dropped = drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, Some(&file)).await;

    let central = admin.superuser("central").await;
    let status = central.ask("SELECT status FROM pglobby.tenants").await;
    match dropped {
        Err(_) => assert_eq!((status.as_str(), file.exists()), ("active", false)),
        Ok(_) => assert_eq!((status.as_str(), file.exists()), ("dropped", true)),
    }
}

#[tokio::test]
async fn a_final_dump_holds_everything_and_a_run_that_died_goes_on() {
    for step in ["ended", "dumped", "roles"] {
        let admin = Admin::new().await;
        create(&admin.actor, &tenant("ac'me=1")).await.unwrap();
        admin
            .superuser("ac'me=1")
            .await
            .run("CREATE TABLE t (a int); INSERT INTO t VALUES (1), (2), (3)")
            .await;
        let file = admin.installation.folder.path().join("last.dump");
        let mut dying = admin.another_actor();
        let killer = StopAfter::step(step);
        dying.progress = Some(killer.clone());
        let dropping = drop_tenant(&dying, "ac'me=1", DropDatabase::IfOurs, Some(&file));
        killer.kill(async { drop(dropping.await) }).await;

        let again = drop_tenant(&admin.another_actor(), "ac'me=1", DropDatabase::IfOurs, None).await;

        assert!(again.unwrap().database_dropped, "killed after {step}");
        assert_eq!(restored(&admin, &file, "SELECT count(*) FROM t").await, "3", "killed after {step}");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            fs::read_dir(file.parent().unwrap())
                .unwrap()
                .filter(|entry| {
                    entry.as_ref().unwrap().file_name().to_string_lossy().contains("unfinished")
                })
                .count(),
            0
        );
    }
}

#[tokio::test]
async fn without_its_final_dump_nothing_is_dropped() {
    let admin = Admin::new().await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    let file = admin.installation.folder.path().join("precious");
    fs::write(&file, "mine").unwrap();

    let exists = drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, Some(&file)).await;
    let nowhere = admin.installation.folder.path().join("no/such/folder/dump");
    let no_folder = drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, Some(&nowhere)).await;

    assert!(exists.unwrap_err().to_string().contains("exists already"));
    assert!(no_folder.unwrap_err().to_string().contains("there is no folder"));
    assert_eq!(tenants::show(&admin.actor, "acme").await.unwrap().status, "active");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");

    // Once it has begun, a copy that fails keeps the database; another file will do.
    admin.superuser("acme").await.run("CREATE TABLE t (a int)").await;
    let taken = admin.installation.folder.path().join("taken.dump");
    let mut dying = admin.another_actor();
    let killer = StopAfter::step("fenced");
    dying.progress = Some(killer.clone());
    killer.kill(async { drop(drop_tenant(&dying, "acme", DropDatabase::IfOurs, Some(&taken)).await) }).await;
    fs::write(&taken, "somebody else's").unwrap();
    let in_the_way = drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, None).await;
    assert!(in_the_way.unwrap_err().to_string().contains("exists already"));
    assert_eq!(admin.superuser("acme").await.ask("SELECT count(*) FROM t").await, "0");
    let other = admin.installation.folder.path().join("other.dump");
    drop_tenant(&admin.actor, "acme", DropDatabase::IfOurs, Some(&other)).await.unwrap();
    assert_eq!(restored(&admin, &other, "SELECT count(*) FROM t").await, "0");
}

/// An employee's login went with its tenant, and who came late was told that the password was wrong.
#[tokio::test]
async fn whoever_belonged_to_a_dropped_tenant_is_told_so_and_the_names_are_free() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let name = login_of("acme");
    proxy.create_login("etl", "a good password", &["--service"]);
    proxy.command(&["login", "grant", "etl", "--tenant", "acme", "--tenant", "globex"]);
    let etl = |database: &str| proxy.caller("etl", "a good password", database);
    assert_eq!(etl("acme").connect().await.ask("SELECT 1").await, "1");
    proxy.command(&["tenant", "drop", "acme", "--yes"]);
    // A service that was granted it one by one, too; and now it has only one tenant.
    assert_eq!(etl("acme").refusal().await, "3D000");
    assert_eq!(etl("etl").connect().await.ask("SELECT current_database()").await, "globex");
    assert!(!proxy.command(&["login", "show", "etl", "--json"]).contains("acme"));
    assert!(!proxy.command(&["login", "list", "--tenant", "acme", "--json"]).contains("etl"));
    assert_eq!(proxy.client("acme").refusal().await, "3D000");
    assert_eq!(proxy.caller(&name, &password_of("acme"), &name).refusal().await, "3D000");
    assert_eq!(proxy.caller(&name, "not that", "acme").refusal().await, "28P01");

    assert!(!proxy.command(&["login", "list"]).contains(&name));
    for order in ["show", "disable", "enable", "drop", "grant", "revoke"] {
        let globex =
            if order.ends_with('t') || order.starts_with('r') { &["--tenant", "globex"][..] } else { &[] };
        let refused = proxy.command_with(&[&["login", order, &name], globex].concat(), "");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("no login"), "{refused:?}");
    }
    proxy.create_login(&name, "another password", &["--tenant", "globex"]);
    let globex = proxy.caller(&name, "another password", "globex");
    in_time("the new login is known", async { while globex.try_connect().await.is_err() {} }).await;
    proxy.create_tenant("acme");
    assert_eq!(proxy.caller(&name, &password_of("acme"), "acme").refusal().await, "28P01");
    assert_eq!(etl("acme").refusal().await, "3D000");
}

/// A host that burnt down kept its tenants for ever: neither they nor its row could be dropped.
#[tokio::test]
async fn a_tenant_on_a_host_that_never_comes_back_can_be_dropped() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let mut burning = Cluster::start();
    proxy.add_host("attic", &burning);
    proxy.command(&["tenant", "create", "globex", "--host", "attic"]);
    proxy.create_login("gloria", "a good password", &["--tenant", "globex"]);
    burning.stop();
    let refused = proxy.command_with(&["tenant", "drop", "globex", "--yes"], "");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--leave-host"), "{refused:?}");
    let dropped = proxy.json(&["tenant", "drop", "globex", "--yes", "--leave-host", "--json"]);
    assert_eq!(dropped["database_dropped"], false);
    assert_eq!(proxy.caller("gloria", "a good password", "globex").refusal().await, "3D000");
    proxy.command(&["host", "remove", "attic"]);
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}
