//! The management API, over HTTP, as a script uses it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use support::{
    Proxy,
    cluster::{MASTER, MASTER_PASSWORD},
};

#[tokio::test]
async fn a_tenant_and_a_login_made_over_http_are_used_at_once() {
    let proxy = Proxy::build().start().await;
    let api = proxy.api("operator");

    let begun = api.post("/v1/tenants", json!({ "name": "acme" })).await;
    let operation = api.followed(begun).await;
    assert_eq!((&operation["status"], &operation["kind"]), (&json!("done"), &json!("create")));
    assert_eq!(operation["actor"], "api:operator");
    let login = api.post("/v1/logins", json!({ "name": "bob", "tenant": "acme" })).await.with(201);

    let password = login["password"].as_str().unwrap();
    assert_eq!(proxy.caller("bob", password, "acme").ask("SELECT current_database()").await, "acme");
    let keys: BTreeSet<&str> = login.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, BTreeSet::from(["name", "tenant", "kind", "access", "password"]));
    assert!(!proxy.log().contains(password), "a password is in the log");
    // The same objects as the command line's.
    let tenants = api.get("/v1/tenants").await.with(200);
    assert_eq!(tenants, proxy.json(&["tenant", "list", "--json"]));
    assert_eq!(api.get("/v1/logins/bob").await.with(200), proxy.json(&["login", "show", "bob", "--json"]));
}

#[tokio::test]
async fn a_script_that_waits_gets_the_tenant_itself() {
    let proxy = Proxy::build().start().await;
    let api = proxy.api("operator");
    let body = json!({ "name": "acme", "schema": ["CREATE TABLE t (x int)", "INSERT INTO t VALUES (7)"] });
    let made = api.post("/v1/tenants?wait=60s", body).await;
    assert!(made.header("location").unwrap().starts_with("/v1/operations/"), "{made:?}");
    let made = made.with(201);
    assert_eq!(
        made,
        json!({
            "name": "acme", "status": "active", "host": "default", "database": "acme", "username": "acme_rw",
        })
    );
    let body = json!({ "name": "reader", "tenant": "acme", "password": "known", "read_only": true });
    let login = api.post("/v1/logins", body).await.with(201);
    assert_eq!(login.get("password"), None, "it is known already");
    assert_eq!(proxy.caller("reader", "known", "acme").ask("SELECT x FROM t").await, "7");
}

#[tokio::test]
async fn what_fails_leaves_nothing_and_says_why() {
    let proxy = Proxy::build().start().await;
    let api = proxy.api("operator");
    let body = json!({ "name": "acme", "schema": ["CREATE TABEL t ()"] });
    let begun = api.post("/v1/tenants", body.clone()).await;
    let operation = api.followed(begun).await;
    assert_eq!(operation["status"], "undone");
    assert_eq!(operation["tenant"], "acme");
    let waited = api.post("/v1/tenants?wait=60s", body).await;
    assert_eq!((waited.status, waited.code()), (422, "invalid"));
    let words = waited.body["error"]["message"].as_str().unwrap();
    assert!(words.contains("schema[0]:1:8: syntax error"), "{words}");
    // The row is closed by the work itself, the words are added by who asked for it.
    let listed = api.get("/v1/operations?tenant=acme&limit=1").await.with(200);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["status"], "undone");
    assert_eq!(api.get("/v1/tenants").await.with(200), json!([]));
}

#[tokio::test]
async fn a_tenants_life_over_http() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let api = proxy.api("admin");
    let mut client = proxy.client("acme").connect().await;

    let networks = ["127.0.0.0/8"];
    let settings = json!({ "pool_size": 3, "weight": 2, "statement_timeout": "30s", "allow_from": networks });
    let tenant = api.patch("/v1/tenants/acme", settings).await.with(200);
    assert_eq!((&tenant["pool_size"], &tenant["statement_timeout"]), (&json!(3), &json!("30s")));
    assert_eq!(tenant["weight"], 2);
    let tenant = api.patch("/v1/tenants/acme", json!({ "pool_size": null })).await.with(200);
    assert_eq!(tenant["pool_size"], Value::Null);

    let rotated = api.post("/v1/tenants/acme/rotate?wait=60s", json!({})).await.with(200);
    assert_eq!(rotated["roles"], json!(["acme_rw", "acme_ro"]));
    assert_eq!(client.ask("SELECT 1").await, "1");

    let body = json!({ "reason": "unpaid; call 555-0199" });
    assert_eq!(api.post("/v1/tenants/acme/suspend", body).await.with(200)["status"], "suspended");
    client.closed().await;
    assert_eq!(api.post("/v1/tenants/acme/resume", json!({})).await.with(200)["status"], "active");
    assert_eq!(api.post("/v1/tenants/acme/rename", json!({ "to": "b b" })).await.with(200)["name"], "b b");
    assert_eq!(api.get("/v1/tenants/b%20b").await.with(200)["status"], "active");
    let dropped = api.delete("/v1/tenants/b%20b?wait=60s").await.with(200);
    assert_eq!(dropped["database_dropped"], true);
    assert_eq!(api.get("/v1/tenants").await.with(200), json!([]));
    assert_eq!(api.get("/v1/tenants?dropped=true").await.with(200)[0]["status"], "dropped");

    let actions = api.get("/v1/audit?limit=100").await.with(200);
    let ours: Vec<&str> = actions
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["actor"] == "api:admin")
        .map(|entry| entry["action"].as_str().unwrap())
        .collect();
    let done = ["dropped", "drop", "rename", "resume", "suspend", "rotate", "set", "set"];
    assert_eq!(ours, done.map(|action| format!("tenant.{action}")));
}

#[tokio::test]
async fn a_logins_life_over_http() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let api = proxy.api("operator");
    let body = json!({ "name": "shop", "service": true, "tenants": ["acme"], "password": "one" });
    assert_eq!(api.post("/v1/logins", body).await.with(201)["kind"], "service");
    assert_eq!(proxy.caller("shop", "one", "globex").refusal().await, "3D000");
    let body = json!({ "tenants": ["globex"], "read_only": true });
    let granted = api.post("/v1/logins/shop/grant", body).await.with(200);
    assert_eq!(granted["tenants"][1], json!({ "tenant": "globex", "access": "read_only" }));
    let admitted = proxy.caller("shop", "one", "globex").connect().await;
    assert_eq!(admitted.ask("SELECT current_database()").await, "globex");
    let revoked = api.post("/v1/logins/shop/revoke", json!({ "tenants": ["acme"] })).await.with(200);
    assert_eq!(revoked["tenants"].as_array().unwrap().len(), 1);

    let made = api.post("/v1/logins/shop/set-password", json!({})).await.with(200);
    let password = made["password"].as_str().unwrap();
    assert_eq!(proxy.caller("shop", "one", "globex").refusal().await, "28P01");
    assert_eq!(proxy.caller("shop", password, "globex").connect().await.ask("SELECT 1").await, "1");
    let until = json!({ "valid_until": "2020-01-01", "allow_from": ["127.0.0.0/8"] });
    let changed = api.patch("/v1/logins/shop", until).await.with(200);
    assert_eq!(changed["valid_until"], "2020-01-01T00:00:00Z");
    assert_eq!(proxy.caller("shop", password, "globex").refusal().await, "28P01");
    api.patch("/v1/logins/shop", json!({ "valid_until": null })).await.with(200);
    assert!(api.post("/v1/logins/shop/disable", json!({})).await.with(200)["disabled_at"].is_string());
    assert_eq!(proxy.caller("shop", password, "globex").refusal().await, "28P01");
    assert!(api.post("/v1/logins/shop/enable", json!({})).await.with(200)["disabled_at"].is_null());
    assert_eq!(api.get("/v1/logins?tenant=globex").await.with(200).as_array().unwrap().len(), 2);
    let gone = json!({ "name": "shop", "status": "dropped" });
    assert_eq!(api.delete("/v1/logins/shop").await.with(200), gone);
    assert_eq!(api.get("/v1/logins/shop").await.code(), "not_found");
}

#[tokio::test]
async fn hosts_and_keys_over_http() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let api = proxy.api("admin");
    let body = json!({
        "name": "second", "address": "127.0.0.1", "port": proxy.cluster.port(), "admin_user": MASTER,
        "admin_password": MASTER_PASSWORD, "accepts_tenants": false,
    });
    assert_eq!(api.post("/v1/hosts", body).await.with(201)["superuser"], true);
    api.patch("/v1/hosts/second", json!({ "max_connections": 50 })).await.with(200);
    let hosts = api.get("/v1/hosts").await.with(200);
    assert_eq!((&hosts[1]["name"], &hosts[1]["max_connections"]), (&json!("second"), &json!(50)));
    assert_eq!(api.delete("/v1/hosts/default").await.code(), "refused");
    assert_eq!(api.delete("/v1/hosts/second").await.with(200)["status"], "removed");

    let nodes = api.get("/v1/nodes").await.with(200);
    assert_eq!((&nodes[0]["state"], &nodes[0]["differs"]), (&json!("serving"), &json!([])), "{nodes}");
    let before = api.get("/v1/keys").await.with(200);
    let begun = api.post("/v1/keys/rotate", json!({ "retire": true })).await;
    let operation = api.followed(begun).await;
    assert_eq!((&operation["kind"], &operation["status"]), (&json!("key_rotate"), &json!("done")));
    let after = api.get("/v1/keys").await.with(200);
    assert_ne!(before[0]["id"], after[0]["id"]);
    assert_eq!(after.as_array().unwrap().len(), 1);
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn whoever_has_no_good_key_gets_nowhere_and_a_role_goes_no_further_than_it_says() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let (viewer, operator, admin) = (proxy.api("viewer"), proxy.api("operator"), proxy.api("admin"));
    let wrong = format!("{}x", &admin.key()[..admin.key().len() - 1]);
    for key in [None, Some(""), Some("pglobby_x"), Some(wrong.as_str())] {
        let refused = proxy.api_with(key).get("/v1/tenants").await;
        assert_eq!((refused.status, refused.code()), (401, "unauthorized"), "{key:?}");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    }
    viewer.get("/v1/tenants/acme").await.with(200);
    for (caller, method, path, body) in [
        (&viewer, "POST", "/v1/tenants", r#"{"name":"globex"}"#),
        (&viewer, "POST", "/v1/tenants/acme/suspend", "{}"),
        (&viewer, "PATCH", "/v1/logins/acme_user", r#"{"access":"read_only"}"#),
        (&operator, "DELETE", "/v1/tenants/acme", ""),
        (&operator, "POST", "/v1/hosts", "{}"),
        (&operator, "POST", "/v1/keys/rotate", "{}"),
        // The console is everything: who makes its logins is an administrator.
        (&operator, "POST", "/v1/logins", r#"{"name":"root","admin":true}"#),
    ] {
        let refused = caller.send(method, path, body).await;
        assert_eq!((refused.status, refused.code()), (403, "forbidden"), "{method} {path}");
    }
    admin.post("/v1/logins", json!({ "name": "root", "admin": true })).await.with(201);
    let taken = operator.post("/v1/logins/root/set-password", json!({ "password": "mine" })).await;
    assert_eq!(taken.code(), "forbidden");
    assert_eq!(operator.delete("/v1/logins/root").await.code(), "forbidden");
    proxy.command(&["api-key", "revoke", "viewer"]);
    assert_eq!(viewer.get("/v1/tenants").await.code(), "unauthorized");
    assert_eq!(admin.get("/v1/tenants/acme").await.with(200)["status"], "active");
}

#[tokio::test]
async fn bad_requests_are_refused_in_words_with_a_code_that_stays() {
    let proxy = Proxy::with_tenant("acme").config("http.max_body", "\"2kB\"").start().await;
    let api = proxy.api("admin");
    let long = format!(r#"{{"name":"x","schema":["{}"]}}"#, "-".repeat(3000));
    for (method, path, body, status, code) in [
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("PUT", "/v1/tenants", "", 405, "method_not_allowed"),
        ("GET", "/v1/tenants/nobody", "", 404, "not_found"),
        ("GET", "/v1/operations/x", "", 404, "not_found"),
        ("GET", "/v1/tenants?droped=true", "", 422, "invalid"),
        ("GET", "/v1/audit?limit=many", "", 422, "invalid"),
        ("POST", "/v1/tenants?wait=soon", r#"{"name":"x"}"#, 422, "invalid"),
        ("POST", "/v1/tenants", "{", 400, "malformed"),
        ("POST", "/v1/tenants", "", 422, "invalid"),
        ("POST", "/v1/tenants", r#"{"name":"x","templat":"y"}"#, 422, "invalid"),
        ("POST", "/v1/tenants", r#"{"name":"a@b"}"#, 422, "invalid"),
        ("POST", "/v1/tenants", r#"{"name":"acme"}"#, 409, "exists"),
        ("POST", "/v1/tenants", &long, 413, "body_too_large"),
        ("POST", "/v1/tenants/acme/move", r#"{"host":"nowhere"}"#, 404, "not_found"),
        ("PATCH", "/v1/tenants/acme", r#"{"pool_sze":3}"#, 422, "invalid"),
        ("PATCH", "/v1/tenants/acme", "{}", 422, "invalid"),
        ("POST", "/v1/logins", r#"{"name":"x"}"#, 422, "invalid"),
        ("POST", "/v1/logins", r#"{"name":"x","tenant":"acme","password":""}"#, 422, "invalid"),
        ("POST", "/v1/logins", r#"{"name":"x","tenant":"nobody"}"#, 404, "not_found"),
        ("POST", "/v1/logins/acme_user/grant", r#"{"tenants":[]}"#, 422, "invalid"),
        ("GET", "/v1/tenants/a%00b", "", 400, "malformed"),
        ("GET", "/v1/logins/%ff", "", 400, "malformed"),
        ("GET", "/v1/logins?tenant=a%00b", "", 400, "malformed"),
        ("DELETE", "/v1/hosts/%00", "", 400, "malformed"),
        ("POST", "/v1/tenants", r#"{"name":"a\u0000b"}"#, 400, "malformed"),
        ("POST", "/v1/tenants/acme/suspend", r#"{"reason":"a\u0000b"}"#, 400, "malformed"),
        ("GET", "/v1/tenants/a%2500b", "", 404, "not_found"),
        ("POST", "/v1/hosts", r#"{"name":"down","address":"127.0.0.1","port":1}"#, 503, "host_unavailable"),
    ] {
        let refused = api.send(method, path, body).await;
        assert_eq!((refused.status, refused.code()), (status, code), "{method} {path} {body}: {refused:?}");
        assert!(refused.body["error"]["message"].as_str().unwrap().len() > 10);
    }
}

#[tokio::test]
async fn while_the_central_database_is_down_the_api_says_so() {
    let mut proxy = Proxy::with_tenant("acme").config("central_timeout", "\"1s\"").start().await;
    let api = proxy.api("viewer");
    proxy.cluster.stop();
    let refused = api.get("/v1/tenants").await;
    assert_eq!((refused.status, refused.code()), (503, "central_unavailable"));
}

#[tokio::test]
async fn the_document_has_every_route_and_no_other() {
    let proxy = Proxy::build().start().await;
    let document = proxy.api_with(None).get("/v1/openapi.json").await.with(200);
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let nobody = proxy.api_with(None);
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 20, "{}", paths.len());
    for (path, operations) in paths {
        let path = path.replace("{name}", "x").replace("{id}", "1");
        for method in ["get", "put", "post", "patch", "delete"] {
            let documented = operations.get(method).is_some();
            let answer = nobody.send(&method.to_uppercase(), &path, "").await;
            // Every real route asks for a key first.
            let expected = if documented { (401, "unauthorized") } else { (405, "method_not_allowed") };
            assert_eq!((answer.status, answer.code()), expected, "{method} {path}");
        }
    }
}

#[tokio::test]
async fn long_work_goes_on_when_its_caller_has_left_and_has_a_limit() {
    let proxy = Proxy::build().config("http.max_operations", "1").start().await;
    let api = proxy.api("operator");
    let slow = json!({ "name": "slow", "schema": ["SELECT pg_sleep(1)"] });
    let begun = api.post("/v1/tenants", slow).await;
    assert_eq!(begun.status, 202);
    let second = api.post("/v1/tenants", json!({ "name": "second" })).await;
    assert_eq!((second.status, second.code()), (503, "too_many_requests"));
    assert_eq!(api.followed(begun).await["status"], "done");
    api.post("/v1/tenants?wait=60s", json!({ "name": "second" })).await.with(201);
}

/// Long work over HTTP, to its good end: followed, or waited for.
#[tokio::test]
async fn a_tenant_is_moved_and_dropped_over_http() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let west = support::Cluster::start();
    proxy.add_host("west", &west);
    let api = proxy.api("admin");
    let mut alice = proxy.client("acme").connect().await;
    alice.run("CREATE TABLE t (x int); INSERT INTO t VALUES (7)").await;

    let begun = api.post("/v1/tenants/acme/move", json!({ "host": "west", "patience": "30s" })).await;
    let operation = api.followed(begun).await;
    assert_eq!((&operation["kind"], &operation["status"]), (&json!("move"), &json!("done")));
    assert_eq!(api.get("/v1/tenants/acme").await.with(200)["host"], "west");
    assert_eq!(alice.ask("SELECT x FROM t").await, "7");
    let back = api.post("/v1/tenants/acme/move?wait=60s", json!({ "host": "default" })).await.with(200);
    assert_eq!(
        (&back["from"], &back["host"], &back["copied_by"]),
        (&json!("west"), &json!("default"), &json!("dump"))
    );
    assert_eq!(alice.ask("SELECT x FROM t").await, "7");

    let begun = api.delete("/v1/tenants/acme").await;
    let operation = api.followed(begun).await;
    assert_eq!((&operation["kind"], &operation["status"]), (&json!("drop"), &json!("done")));
    alice.closed().await;
    assert_eq!(proxy.client("acme").refusal().await, "3D000", "she is told that her tenant is gone");
    let left = "SELECT count(*) FROM pg_database WHERE datname = 'acme'";
    for cluster in [&proxy.cluster, &west] {
        assert_eq!(cluster.client("postgres").await.ask(left).await, "0");
    }
}

/// What is ordered at a node holds there when the answer comes, over and over.
#[tokio::test]
async fn who_has_the_answer_finds_it_done() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let api = proxy.api("operator");
    for _ in 0..10 {
        api.post("/v1/tenants/acme/suspend", json!({})).await.with(200);
        assert_eq!(proxy.client("acme").refusal().await, "57P03");
        api.post("/v1/tenants/acme/resume", json!({})).await.with(200);
        assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
        api.post("/v1/logins/acme_user/disable", json!({})).await.with(200);
        assert_eq!(proxy.client("acme").refusal().await, "28P01");
        api.post("/v1/logins/acme_user/enable", json!({})).await.with(200);
        assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    }
}

/// What a host cannot be is said in words; PostgreSQL's own would quote the whole row, sealed password included.
#[tokio::test]
async fn a_value_that_cannot_be_is_refused_without_a_row_in_the_answer_or_the_log() {
    let proxy = Proxy::with_tenant("acme").config("log.level", "\"debug\"").start().await;
    let api = proxy.api("admin");
    let central = proxy.cluster.client("central").await;
    let sealed = central.ask("SELECT encode(sealed_admin_password, 'hex') FROM pglobby.hosts").await;
    for (key, value, words) in [
        ("accepts_tenants", json!(null), "true or false"),
        ("accepts_tenants", json!("perhaps"), "true or false"),
        ("address", json!(null), "is no address as"),
        ("address", json!("pg1,\u{1b}"), "is no address as"),
        ("port", json!(null), "1 to 65535"),
        ("port", json!(65536), "1 to 65535"),
        ("tls_mode", json!(null), "verify-full"),
        ("tls_mode", json!("maybe"), "verify-full"),
        ("admin_user", json!(null), "a text of 1 to 63 bytes"),
        ("admin_database", json!(""), "a text of 1 to 63 bytes"),
        ("max_connections", json!(0), "from 1 to 262143"),
        ("max_connections", json!(300_000), "from 1 to 262143"),
        ("tls_root_ca", json!("x".repeat(5000)), "1 to 4096 bytes"),
    ] {
        let refused = api.patch("/v1/hosts/default", json!({ key: value })).await;
        assert_eq!((refused.status, refused.code()), (422, "invalid"), "{key}: {refused:?}");
        let said = refused.body.to_string();
        assert!(said.contains(words) && said.contains(key), "{said}");
        assert!(!said.contains(&sealed[..16]), "{said}");
    }
    // Where the schema is the first to object: a row by its key, a row as a whole.
    for (sql, constraint) in [
        ("ALTER TABLE pglobby.hosts ADD CONSTRAINT moody CHECK (max_connections <> 13)", "moody"),
        ("ALTER TABLE pglobby.logins ADD CONSTRAINT moody CHECK (name <> 'unlucky')", "moody"),
    ] {
        central.run(sql).await;
        let refused = match sql.contains("hosts") {
            true => api.patch("/v1/hosts/default", json!({ "max_connections": 13 })).await,
            false => api.post("/v1/logins", json!({ "name": "unlucky", "tenant": "acme" })).await,
        };
        assert_eq!((refused.status, refused.code()), (422, "invalid"), "{refused:?}");
        let said = refused.body.to_string();
        assert!(said.contains(constraint) && !said.contains("Failing row"), "{said}");
    }
    let told = proxy.command_with(&["host", "set", "default", "max_connections=13"], "");
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("moody") && !told.contains("Failing row"), "{told}");
    let console = proxy.console().await;
    let refused = console.try_run("CREATE LOGIN unlucky TENANT acme").await.unwrap_err();
    let told = support::client::in_words(&refused);
    assert!(told.contains("moody") && !told.contains("Failing row"), "{told}");
    assert!(
        !proxy.log().contains("Failing row") && !proxy.log().contains("SCRAM-SHA-256$"),
        "{}",
        proxy.log()
    );
}
