//! What an operator may get wrong, and what the world may: a clear error, and nothing half made.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::process::Output;

use pglobby::control_path::{
    admin::tenants,
    onboarding::{
        create::{CreateTenant, create},
        names::check_tenant_name,
    },
};
use support::{
    Cluster, Proxy,
    admin::{Admin, Master, tenant},
    proxy::pglobby,
};

/// One line on standard error, exit status 1, and it says `what` (or has printed it before).
fn refused(output: &Output, what: &str) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.lines().count() == 1 && (err.contains(what) || out.contains(what)), "{err}{out}");
}

#[tokio::test]
async fn a_name_that_cannot_be_is_refused_before_anything_is_made() {
    let admin = Admin::new().await;
    let before = admin.remains().await;
    let (long, wide) = ("n".repeat(64), "\u{fc}".repeat(32));
    for (name, why) in [
        ("", "needs a name"),
        (" acme", "begins or ends with a space"),
        ("ac\nme", "control character"),
        ("ac\0me", "control character"),
        ("alice@acme", "holds '@'"),
        ("acme,globex", "holds ','"),
        ("..", "reserved (it leads elsewhere"),
        ("all", "reserved (it stands for every tenant"),
        ("pglobby", "reserved (clients reach the admin console"),
        ("template1", "reserved (it is PostgreSQL's own"),
        ("central", "reserved (it is the central database"),
        (&long, "has 64 bytes; PostgreSQL allows 63"),
        (&wide, "has 64 bytes; PostgreSQL allows 63"),
    ] {
        let error = create(&admin.actor, &tenant(name)).await.expect_err(name).to_string();
        assert!(error.contains(why), "{name:?}: {error}");
    }
    assert_eq!(admin.remains().await, before);
    let longest = "\u{fc}".repeat(31) + "n";
    for name in ["O'Neil", "a\"b", "a.b", "a/b", "UPPER", "-x", "'; DROP ROLE master; --", &longest] {
        assert_eq!(check_tenant_name(name, "central"), Ok(()), "{name}");
    }
}

#[tokio::test]
async fn a_template_or_a_host_that_is_not_there_leaves_nothing() {
    let admin = Admin::new().await;
    let before = admin.remains().await;
    for (wanted, why) in [
        (CreateTenant { template: Some("nosuch".into()), ..tenant("acme") }, "\"nosuch\" does not exist"),
        (CreateTenant { template: Some("x\"; DROP".into()), ..tenant("acme") }, "does not exist"),
        (CreateTenant { template: Some("central".into()), ..tenant("acme") }, "cannot be a template"),
        (CreateTenant { host: Some("defualt".into()), ..tenant("acme") }, "did you mean \"default\"?"),
        (CreateTenant { database: Some("postgres".into()), ..tenant("acme") }, "reserved"),
    ] {
        let error = create(&admin.actor, &wanted).await.expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!(admin.remains().await, before, "{why}");
    }
    create(&admin.actor, &tenant("acme")).await.unwrap();
}

/// The host's administrator has another password than the one that is stored.
#[tokio::test]
async fn a_wrong_password_of_a_hosts_administrator_leaves_everything_as_it_was() {
    let admin = Admin::on(Cluster::build(), Master::Createrole).await;
    create(&admin.actor, &tenant("acme")).await.unwrap();
    // The central database stays open to us; the host is entered with what is stored.
    let superuser = admin.superuser("postgres").await;
    superuser.run("CREATE ROLE other LOGIN CREATEDB CREATEROLE PASSWORD 'other'").await;
    admin.superuser("central").await.run("UPDATE pglobby.hosts SET admin_user = 'other'").await;
    let before = admin.remains().await;

    let created = create(&admin.actor, &tenant("globex")).await.expect_err("wrong").to_string();

    assert!(created.contains("password authentication failed for user \"other\""), "{created}");
    assert!(!created.contains("modest"), "the stored password is not told: {created}");
    assert_eq!(admin.remains().await, before);
    assert_eq!(tenants::show(&admin.actor, "acme").await.unwrap().status, "active");
}

/// The master login's own password: everything that needs it says so in one line, and what runs goes on.
#[tokio::test]
async fn a_wrong_master_password_is_said_in_one_line_by_every_command() {
    let proxy = Proxy::with_tenant("acme").start().await;
    for arguments in
        [&["check"][..], &["init"], &["tenant", "create", "globex"], &["tenant", "list"], &["doctor"]]
    {
        let mut command = pglobby();
        let url = format!("postgres://master:wrong@127.0.0.1:{}/central", proxy.cluster.port());
        command.args(arguments).arg("--config").arg(proxy.config_file()).env("PGLOBBY_CENTRAL_URL", url);
        let output = command.output().unwrap();
        refused(&output, "password authentication failed for user \"master\"");
    }
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    assert_eq!(proxy.json(&["tenant", "list", "--json"]).as_array().unwrap().len(), 1);
}

/// The disk of a last copy is full. pg_dump calls that a success where only its last few kilobytes did not fit, and the
/// database was dropped for half a copy. Now nothing is dropped, no part of a file stays, and the next run finishes.
#[tokio::test]
async fn a_final_dump_that_finds_no_room_drops_nothing() {
    let proxy = Proxy::with_tenant("acme").start().await;
    proxy
        .client("acme")
        .run("CREATE TABLE t AS SELECT repeat('x', 1000) AS a FROM generate_series(1, 9)")
        .then_leave()
        .await;
    let file = proxy.folder().join("last.dump");
    let mut shell = std::process::Command::new("sh");
    // A file may have 512 bytes, and whoever writes on is told so, as on a full disk.
    let script =
        "trap '' XFSZ; ulimit -f 1; exec \"$0\" tenant drop acme --yes --final-dump \"$1\" --config \"$2\"";
    shell.args(["-c", script, env!("CARGO_BIN_EXE_pglobby")]).arg(&file).arg(proxy.config_file());
    let output = shell.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.lines().last().unwrap().contains("File too large") && said.contains("tenant drop acme"),
        "{said}"
    );
    let left: Vec<_> =
        std::fs::read_dir(proxy.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("dump")), "{left:?}");
    assert_eq!(proxy.cluster.client("acme").await.ask("SELECT count(*) FROM t").await, "9");

    let dropped = proxy.json(&["tenant", "drop", "acme", "--yes", "--json"]);

    assert_eq!(dropped["database_dropped"], true);
    assert!(std::fs::metadata(&file).unwrap().len() > 512, "the copy that was asked for first");
}

/// The disk of a host fills up while a template is copied: nothing is half made, and with room the same command works.
#[tokio::test]
async fn a_tenant_that_finds_no_room_on_its_host_is_not_half_made() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    proxy.cluster.client("postgres").await.run("CREATE DATABASE model").await;
    // More than a file may have below; and that is more than a segment of the write-ahead log.
    let big = "CREATE TABLE big AS SELECT repeat(md5(n::text), 20) AS a FROM generate_series(1, 40000) n";
    proxy.cluster.client("model").await.run(big).await;
    proxy.cluster.restart_with_files_of(Some(17 << 20));
    let create = ["tenant", "create", "globex", "--template", "model"];

    let refused = proxy.command_with(&create, "");

    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("File too large"), "{said}");
    let left = "SELECT (SELECT count(*) FROM pg_database WHERE datname = 'globex')
                     + (SELECT count(*) FROM pg_roles WHERE rolname LIKE 'globex%')";
    assert_eq!(proxy.cluster.client("postgres").await.ask(left).await, "0");
    assert_eq!(proxy.json(&["tenant", "list", "--json"]).as_array().unwrap().len(), 1);
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");

    proxy.cluster.restart_with_files_of(None);
    proxy.command(&create);
    assert_eq!(proxy.cluster.client("globex").await.ask("SELECT count(*) FROM big").await, "40000");
}

/// Long work writes lines to standard error where that is no terminal, and the answer stays JSON.
#[tokio::test]
async fn long_work_is_told_in_lines_beside_the_answer() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let file = proxy.folder().join("last.dump");
    let dump = file.to_str().unwrap();
    for (arguments, lines) in [
        (&["key", "rotate", "--json"][..], &["of 5 credentials"][..]),
        (&["doctor", "--json"], &["0 of 2 tenants", "2 of 2 tenants"]),
        (&["run", "SELECT 1", "--tenants", "all", "--json"], &["1/2 ", "2/2 "]),
        (
            &["tenant", "drop", "acme", "--yes", "--final-dump", dump, "--json"],
            &["acme: clients stopped", "acme: dump written"],
        ),
    ] {
        let output = proxy.command_with(arguments, "");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || arguments[0] == "doctor", "{arguments:?}: {told}");
        for line in lines {
            assert!(told.contains(line), "{arguments:?}: no {line} in {told}");
        }
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
    }
    let quiet = proxy.command_with(&["tenant", "create", "initech"], "");
    assert_eq!(String::from_utf8_lossy(&quiet.stderr), "", "what is done at once says nothing more");
}
