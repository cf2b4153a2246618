//! `pglobby tenant|login|host|key` as administrators and scripts run them: tables, JSON, errors, exit status.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    io::Write as _,
    process::{Output, Stdio},
};

use serde_json::{Value, json};
use support::{Cluster, installation::Installation, proxy::pglobby};

/// Runs a command that must succeed, and returns its JSON.
fn json_of(installation: &Installation, arguments: &[&str]) -> Value {
    let output = installation.run(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", words(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs a command that must fail with exit status 1, and returns its error, which is one line.
fn refusal(installation: &Installation, arguments: &[&str]) -> String {
    let output = installation.run(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", words(&output));
    assert!(output.stdout.is_empty(), "{arguments:?}");
    let words = words(&output);
    assert_eq!(words.lines().count(), 1, "{words}");
    words
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run_with(installation: &Installation, arguments: &[&str], stdin: &str) -> Output {
    let mut command = pglobby();
    command.args(arguments).arg("--config").arg(installation.file());
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Tables and fields for people: 80 columns, RFC 3339 times, defaults marked, no colour outside a terminal.
#[tokio::test]
async fn listings_fit_80_columns_and_show_defaults_and_times_in_rfc_3339() {
    let installation = Installation::initialised().await;
    for tenant in ["acme", "globex", "initech", "umbrella"] {
        json_of(&installation, &["tenant", "create", tenant]);
    }
    json_of(&installation, &["tenant", "set", "acme", "pool_size=40"]);
    let api = ["login", "create", "api", "--service", "--tenants", "acme,globex,initech,umbrella"];
    json_of(&installation, &[&api[..], &["--valid-until", "2030-01-31 18:00"]].concat());
    json_of(&installation, &["api-key", "create", "deploy", "--role", "operator", "--expires", "2030-01-31"]);
    let printed = |arguments: &[&str]| {
        let output = installation.run(arguments);
        assert!(output.status.success(), "{}", words(&output));
        String::from_utf8(output.stdout).unwrap()
    };

    for kind in ["tenant", "login", "host", "key", "api-key"] {
        let table = printed(&[kind, "list"]);
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    }

    let tenants = printed(&["tenant", "list"]);
    assert!(tenants.contains("transaction  40            0"), "{tenants}");
    assert!(tenants.contains("transaction  20 (default)  0"), "{tenants}");
    assert!(printed(&["login", "list"]).contains("acme, globex, +2  read_write  2030-01-31T18:00:00Z"));
    let tenant = printed(&["tenant", "show", "acme"]);
    let field = |name: &str| {
        let line = tenant.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
        line[name.len()..].trim().to_owned()
    };
    assert_eq!((&*field("pool_mode"), &*field("pool_size")), ("transaction (default)", "40"));
    assert_eq!((&*field("max_clients"), &*field("allow_from")), ("no limit (default)", "any"));
    let created_at = field("created_at");
    assert!(created_at.len() == "2030-01-31T18:00:00Z".len() && created_at.ends_with('Z'), "{created_at}");
    let checks = printed(&["check"]);
    assert!(checks.lines().all(|line| line.starts_with("ok      ")), "{checks}");
}

#[tokio::test]
async fn a_tenants_life_by_commands() {
    let installation = Installation::initialised().await;

    let made = json_of(&installation, &["tenant", "create", "acme"]);
    let expected = json!({
        "name": "acme", "status": "active", "host": "default", "database": "acme", "username": "acme_rw",
    });
    assert_eq!(made, expected);
    assert!(refusal(&installation, &["tenant", "create", "acme"]).contains("exists already"));
    assert!(refusal(&installation, &["tenant", "show", "acne"]).contains("did you mean \"acme\"?"));

    let settings = "pool_mode=session pool_size=7 weight=3 statement_timeout=90s allow_from=10.0.0.0/8,::1";
    let arguments: Vec<_> = ["tenant", "set", "acme"].into_iter().chain(settings.split(' ')).collect();
    let set = json_of(&installation, &arguments);
    assert_eq!(set["pool_mode"], "session");
    assert_eq!((&set["pool_size"], &set["weight"]), (&json!(7), &json!(3)));
    assert_eq!(set["statement_timeout"], "90s");
    assert_eq!(set["allow_from"], json!(["10.0.0.0/8", "::1/128"]));
    let nothing = ["tenant", "set", "acme", "pool_size=", "allow_from=", "statement_timeout=", "weight="];
    let cleared = json_of(&installation, &nothing);
    assert_eq!(
        (&cleared["pool_size"], &cleared["allow_from"], &cleared["statement_timeout"], &cleared["weight"]),
        (&Value::Null, &json!([]), &Value::Null, &json!(1))
    );
    for (wrong, says) in [
        ("pool_sise=3", "did you mean \"pool_size\"?"),
        ("pool_size=many", "whole number"),
        ("pool_size=0", "from 1 to 262143"),
        ("weight=0", "from 1 to 1000"),
        ("weight=1001", "from 1 to 1000"),
        ("pool_mode=statement", "transaction or session"),
        ("statement_timeout=30", "unit"),
        ("allow_from=10.1.2.3/8", "did you mean 10.0.0.0/8?"),
    ] {
        let refused = refusal(&installation, &["tenant", "set", "acme", "max_clients=5", wrong]);
        assert!(refused.contains(says), "{wrong}: {refused}");
    }
    assert_eq!(
        json_of(&installation, &["tenant", "show", "acme"])["max_clients"],
        Value::Null,
        "all or nothing"
    );

    let suspended = json_of(&installation, &["tenant", "suspend", "acme", "--reason", "unpaid"]);
    assert_eq!((&suspended["status"], &suspended["status_reason"]), (&json!("suspended"), &json!("unpaid")));
    let resumed = json_of(&installation, &["tenant", "resume", "acme"]);
    assert_eq!((&resumed["status"], &resumed["status_reason"]), (&json!("active"), &Value::Null));

    assert!(refusal(&installation, &["tenant", "drop", "acme"]).contains("--yes"));
    assert_eq!(json_of(&installation, &["tenant", "drop", "acme", "--yes"])["database_dropped"], true);
    assert_eq!(json_of(&installation, &["tenant", "list"]), json!([]));
    assert_eq!(json_of(&installation, &["tenant", "list", "--all"])[0]["status"], "dropped");
    assert!(refusal(&installation, &["tenant", "drop", "acme", "--yes"]).contains("no tenant"));
    assert!(refusal(&installation, &["tenant", "suspend", "acme"]).contains("is dropped"));
    assert_eq!(installation.run(&["tenant", "set", "acme"]).status.code(), Some(2));
    json_of(&installation, &["tenant", "create", "acme"]);
}

#[tokio::test]
async fn logins_of_every_kind_by_commands() {
    let installation = Installation::initialised().await;
    for tenant in ["acme", "globex"] {
        json_of(&installation, &["tenant", "create", tenant]);
    }

    let alice = json_of(&installation, &["login", "create", "alice@example.com", "--tenant", "acme"]);
    let password = alice["password"].as_str().expect("generated, because none was given");
    assert!(password.len() >= 20);
    let expected = json!({
        "name": "alice@example.com", "tenant": "acme", "kind": "employee", "access": "read_write", "password": password,
    });
    assert_eq!(alice, expected);
    let stored = installation.central().await.ask("SELECT verifier FROM pglobby.logins").await;
    assert!(stored.starts_with("SCRAM-SHA-256$4096:") && !stored.contains(password));

    let given = run_with(
        &installation,
        &["login", "create", "bob", "--tenant", "acme", "--read-only", "--password-stdin", "--json"],
        "s3cret\n",
    );
    let bob: Value = serde_json::from_slice(&given.stdout).unwrap();
    assert_eq!(bob, json!({ "name": "bob", "tenant": "acme", "kind": "employee", "access": "read_only" }));
    let empty =
        run_with(&installation, &["login", "create", "eve", "--tenant", "acme", "--password-stdin"], "\n");
    assert_eq!(empty.status.code(), Some(1));

    let api = json_of(
        &installation,
        &["login", "create", "api", "--service", "--tenants", "acme,globex", "--read-only"],
    );
    assert_eq!((&api["kind"], &api["tenant"]), (&json!("service"), &Value::Null));
    let granted = json_of(&installation, &["login", "grant", "api", "--tenants", "globex"]);
    let each =
        json!([{ "tenant": "acme", "access": "read_only" }, { "tenant": "globex", "access": "read_write" }]);
    assert_eq!(granted["tenants"], each);
    assert_eq!(
        json_of(&installation, &["login", "revoke", "api", "--tenants", "acme"])["tenants"][0]["tenant"],
        "globex"
    );
    assert_eq!(json_of(&installation, &["login", "grant", "api", "--all-tenants"])["all_tenants"], true);
    assert!(
        refusal(&installation, &["login", "grant", "bob", "--tenants", "globex"])
            .contains("only a service login")
    );
    assert!(refusal(&installation, &["login", "grant", "api", "--tenants", "glob"]).contains("no tenant"));
    json_of(&installation, &["login", "create", "root", "--admin", "--read-only"]);

    assert!(
        refusal(&installation, &["login", "create", "bob", "--tenant", "globex"])
            .contains("unique over all tenants")
    );
    assert!(
        refusal(&installation, &["login", "create", "carol", "--tenant", "acne"]).contains("did you mean")
    );
    let until = json_of(
        &installation,
        &[
            "login",
            "create",
            "dave",
            "--tenant",
            "acme",
            "--valid-until",
            "2030-01-31 18:00",
            "--allow-from",
            "10.0.0.0/8,::1",
        ],
    );
    assert_eq!(until["name"], "dave");
    let dave = json_of(&installation, &["login", "show", "dave"]);
    assert_eq!(
        (&dave["valid_until"], &dave["allow_from"]),
        (&json!("2030-01-31T18:00:00Z"), &json!(["10.0.0.0/8", "::1/128"]))
    );
    assert!(json_of(&installation, &["login", "disable", "dave"])["disabled_at"].is_string());
    assert!(json_of(&installation, &["login", "enable", "dave"])["disabled_at"].is_null());
    let other = json_of(&installation, &["login", "set-password", "dave", "--generate"]);
    assert_ne!(other["password"], until["password"]);
    for usage in [
        &["login", "create", "x"][..],
        &["login", "create", "x", "--tenant", "acme", "--admin"],
        &["login", "grant", "api"],
    ] {
        assert_eq!(installation.run(usage).status.code(), Some(2), "{usage:?}");
    }

    // Dropping a tenant drops its logins and grants, and no others.
    json_of(&installation, &["tenant", "drop", "acme", "--yes"]);
    let names: Vec<Value> = json_of(&installation, &["login", "list"])
        .as_array()
        .unwrap()
        .iter()
        .map(|login| login["name"].clone())
        .collect();
    assert_eq!(names, ["api", "root"]);
    json_of(&installation, &["login", "drop", "api"]);
    assert!(refusal(&installation, &["login", "drop", "api"]).contains("no login"));
    let leaked = "SELECT count(*) FROM pglobby.audit_log WHERE detail::text LIKE '%s3cret%'";
    assert_eq!(installation.central().await.ask(leaked).await, "0");
}

/// Several threads: a command blocks one, while the connection of a dropped client must still be closed.
#[tokio::test(flavor = "multi_thread")]
async fn tenants_on_another_host_by_commands() {
    let installation = Installation::initialised().await;
    let west = Cluster::start();
    west.client("postgres")
        .await
        .run("CREATE ROLE onboarder LOGIN CREATEDB CREATEROLE PASSWORD 'west secret'")
        .await;
    west.client("postgres").await.run("CREATE ROLE powerless LOGIN PASSWORD 'west secret'").await;
    let port = west.port().to_string();
    let add = |name, user| {
        vec![
            "host",
            "add",
            name,
            "--address",
            "127.0.0.1",
            "--port",
            &port,
            "--admin-user",
            user,
            "--password-stdin",
            "--json",
        ]
    };

    let refused = run_with(&installation, &add("west", "powerless"), "west secret\n");
    assert_eq!(refused.status.code(), Some(1));
    assert!(words(&refused).contains("CREATEDB and CREATEROLE"), "{}", words(&refused));
    assert_eq!(run_with(&installation, &add("west", "onboarder"), "wrong\n").status.code(), Some(1));
    let added = run_with(&installation, &add("west", "onboarder"), "west secret\n");
    let report: Value = serde_json::from_slice(&added.stdout).unwrap_or_else(|_| panic!("{}", words(&added)));
    assert_eq!(
        (&report["superuser"], &report["open_to_public"]),
        (&json!(false), &json!(["postgres", "template1"]))
    );
    let hosts = json_of(&installation, &["host", "list"]);
    assert_eq!(
        (&hosts[0]["name"], &hosts[1]["name"], &hosts[1]["has_password"]),
        (&json!("default"), &json!("west"), &json!(true))
    );

    // Without --host: the host with the fewest tenants that takes new ones.
    assert_eq!(json_of(&installation, &["tenant", "create", "acme"])["host"], "default");
    assert_eq!(json_of(&installation, &["tenant", "create", "globex"])["host"], "west");
    assert_eq!(json_of(&installation, &["host", "set", "west", "accepts_tenants=false"])["name"], "west");
    assert_eq!(json_of(&installation, &["tenant", "create", "initech"])["host"], "default");
    assert_eq!(json_of(&installation, &["tenant", "create", "umbrella", "--host", "west"])["host"], "west");
    west.client("globex").await.run("SELECT 1").await;

    assert!(refusal(&installation, &["host", "set", "west", "port=1"]).contains("cannot connect"));
    assert!(
        refusal(&installation, &["host", "set", "west", "adress=x"]).contains("did you mean \"address\"?")
    );
    assert!(refusal(&installation, &["host", "remove", "west"]).contains("globex, umbrella"));
    for tenant in ["globex", "umbrella"] {
        json_of(&installation, &["tenant", "drop", tenant, "--yes"]);
    }
    json_of(&installation, &["host", "remove", "west"]);
    assert_eq!(json_of(&installation, &["host", "list"]).as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn close_public_revokes_connect_on_a_host_from_public() {
    let installation = Installation::initialised().await;
    json_of(&installation, &["tenant", "create", "acme"]);

    let report = json_of(&installation, &["host", "set", "default", "--close-public"]);

    assert_eq!(report["open_to_public"], json!([]));
    let open = "SELECT count(*) FROM pg_database WHERE datallowconn AND has_database_privilege('acme_rw', oid, 'CONNECT')";
    assert_eq!(installation.cluster.client("postgres").await.ask(open).await, "1");
    json_of(&installation, &["tenant", "create", "globex"]);
}

#[tokio::test]
async fn keys_rotate_and_every_credential_is_sealed_with_the_new_one() {
    let installation = Installation::initialised().await;
    json_of(&installation, &["tenant", "create", "acme"]);
    let old = json_of(&installation, &["key", "list"]);
    assert_eq!((&old[0]["sealed"], &old[0]["writes"]), (&json!(3), &json!(true)));

    // As after a run that was interrupted when it had generated the key: the next run uses that key.
    let fresh = json_of(&installation, &["key", "generate"])["key"].clone();
    json_of(&installation, &["tenant", "create", "globex"]);
    let rotated = json_of(&installation, &["key", "rotate", "--retire"]);

    assert_eq!((&rotated["key"], &rotated["resealed"]), (&fresh, &json!(3)));
    assert_eq!(rotated["retired"], json!([old[0]["id"]]));
    let now = json_of(&installation, &["key", "list"]);
    assert_eq!(now, json!([{ "id": fresh, "writes": true, "in_ring": true, "sealed": 5 }]));
    let again = json_of(&installation, &["key", "rotate"]);
    assert_eq!((&again["generated"], &again["resealed"]), (&json!(true), &json!(5)));
    json_of(&installation, &["tenant", "drop", "acme", "--yes"]);
}
