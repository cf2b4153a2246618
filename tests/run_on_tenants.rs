//! `pglobby run`: SQL over many tenants, each as its own role.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{fs, process::Output};

use serde_json::{Value, json};
use support::installation::Installation;

async fn lobby_with(tenants: &[&str]) -> Installation {
    let installation = Installation::initialised().await;
    for tenant in tenants {
        assert!(installation.run(&["tenant", "create", tenant]).status.success());
    }
    installation
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

#[tokio::test]
async fn every_tenant_answers_from_its_own_database_as_its_own_role() {
    let installation = lobby_with(&["acme", "globex", "o'neil"]).await;
    assert!(installation.run(&["tenant", "suspend", "globex"]).status.success());

    let asked = installation.run(&[
        "run",
        "SELECT current_database() AS db, current_user AS who, NULL AS nothing",
        "--tenants",
        "all",
        "--json",
    ]);

    assert!(asked.status.success(), "{asked:?}");
    let told = json_of(&asked);
    assert_eq!((&told["ok"], &told["succeeded"], &told["failed"]), (&json!(true), &json!(3), &json!(0)));
    for (tenant, name) in told["tenants"].as_array().unwrap().iter().zip(["acme", "globex", "o'neil"]) {
        assert_eq!(tenant["tenant"], name);
        let expected = json!([{
            "columns": ["db", "who", "nothing"], "rows": [[name, format!("{name}_rw"), null]],
            "row_count": 1, "truncated": false,
        }]);
        assert_eq!(tenant["results"], expected);
        assert!(tenant["elapsed_ms"].is_u64() && tenant["error"].is_null());
    }
    let lines = String::from_utf8(asked.stderr).unwrap();
    assert!(lines.contains("3/3 ") && lines.contains("acme: done"), "{lines}");
    let words = installation.run(&["run", "SELECT current_user AS who", "--tenants", "acme,globex"]);
    assert_eq!(String::from_utf8(words.stdout).unwrap(), "TENANT  who\nacme    acme_rw\nglobex  globex_rw\n");
}

#[tokio::test]
async fn a_migration_that_fails_for_one_tenant_is_undone_there_and_done_for_the_others() {
    let installation = lobby_with(&["acme", "globex", "initech"]).await;
    let file = installation.folder.path().join("migration.sql");
    fs::write(&file, "CREATE TABLE step (a int);\nCREATE TABLE orders (a int);\n").unwrap();
    installation.cluster.client("globex").await.run("CREATE TABLE orders (old int)").await;
    let file = file.to_str().unwrap();

    let ran = installation.run(&["run", "--file", file, "--tenants", "all", "--concurrency", "2", "--json"]);

    assert_eq!(ran.status.code(), Some(1));
    let told = json_of(&ran);
    assert_eq!((&told["ok"], &told["succeeded"], &told["failed"]), (&json!(false), &json!(2), &json!(1)));
    let globex = &told["tenants"][1];
    assert_eq!((&globex["ok"], &globex["sqlstate"]), (&json!(false), &json!("42P07")));
    assert!(globex["error"].as_str().unwrap().contains("already exists"));
    assert!(String::from_utf8_lossy(&ran.stderr).contains("--tenants globex"));
    let tables = "SELECT count(*) FROM pg_class WHERE relname IN ('step', 'orders')";
    for (tenant, count) in [("acme", "2"), ("globex", "1"), ("initech", "2")] {
        assert_eq!(installation.cluster.client(tenant).await.ask(tables).await, count, "{tenant}");
    }
    let audited = "SELECT detail -> 'failed' ->> 0 FROM pglobby.audit_log WHERE action = 'run'";
    assert_eq!(installation.central().await.ask(audited).await, "globex");
}

#[tokio::test]
async fn what_cannot_be_run_for_all_is_run_for_nobody() {
    let installation = lobby_with(&["acme"]).await;
    let sql = "CREATE TABLE t (a int)";

    let misspelt = installation.run(&["run", sql, "--tenants", "acme,acne"]);
    let no_file = installation.run(&["run", "--file", "/nowhere.sql", "--tenants", "all"]);

    assert_eq!(misspelt.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&misspelt.stderr).contains("did you mean \"acme\"?"));
    assert!(String::from_utf8_lossy(&no_file.stderr).contains("/nowhere.sql"));
    for usage in [
        &["run", sql][..],
        &["run", "--tenants", "all"],
        &["run", sql, "--tenants", "all", "--concurrency", "0"],
        &["run", sql, "--file", "x", "--tenants", "all"],
    ] {
        assert_eq!(installation.run(usage).status.code(), Some(2), "{usage:?}");
    }
    assert_eq!(
        installation
            .cluster
            .client("acme")
            .await
            .ask("SELECT count(*) FROM pg_class WHERE relname = 't'")
            .await,
        "0"
    );
}

#[tokio::test]
async fn an_answer_without_end_is_cut_and_says_so() {
    let installation = lobby_with(&["acme"]).await;

    let asked = installation.run(&["run", "SELECT generate_series(1, 5000)", "--tenants", "acme", "--json"]);

    let answer = &json_of(&asked)["tenants"][0]["results"][0];
    assert_eq!(answer["rows"].as_array().unwrap().len(), 1000);
    assert_eq!((&answer["row_count"], &answer["truncated"]), (&json!(5000), &json!(true)));
}
