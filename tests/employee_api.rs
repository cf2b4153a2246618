//! The example of an HTTP service for many tenants with one pool, over HTTP.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

#[allow(dead_code, missing_docs, reason = "its main is not called")]
#[path = "../examples/employee_api.rs"]
mod employee_api;
mod support;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use support::Proxy;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// Calls the service; the status and the body.
async fn call(port: u16, method: &str, who: (&str, &str), tenant: &str, body: &str) -> (u16, Value) {
    let basic = BASE64_STANDARD.encode(format!("{}:{}", who.0, who.1));
    let request = format!(
        "{method} /employees HTTP/1.0\r\nHost: here\r\nAuthorization: Basic {basic}\r\nX-Tenant-Id: {tenant}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|_| json!(body)))
}

/// The service, before a proxy with tenants that have the table it needs.
struct Service {
    proxy: Proxy,
    port: u16,
}

impl Service {
    async fn of(proxy: Proxy, tenants: &[&str]) -> Self {
        proxy.create_login("api", "one-for-all", &["--service", "--all-tenants"]);
        for tenant in tenants {
            let client = proxy.client(tenant).connect().await;
            client.run("CREATE TABLE employees (name text PRIMARY KEY)").await;
            proxy.command(&["login", "set", &format!("{tenant}_user"), "may_add_logins=true"]);
        }
        let url = format!("postgres://api:one-for-all@127.0.0.1:{}/pglobby", proxy.port());
        let key = proxy.api("operator");
        let management = format!("127.0.0.1:{}", proxy.http_port());
        let router = employee_api::service(&url, &management, key.key()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { proxy, port }
    }

    async fn list(&self, who: (&str, &str), tenant: &str) -> (u16, Value) {
        call(self.port, "GET", who, tenant, "").await
    }

    async fn add(&self, who: (&str, &str), tenant: &str, body: Value) -> (u16, Value) {
        call(self.port, "POST", who, tenant, &body.to_string()).await
    }

    fn logins(&self) -> Vec<String> {
        let logins = self.proxy.json(&["login", "list", "--json"]);
        logins.as_array().unwrap().iter().map(|login| login["name"].as_str().unwrap().to_owned()).collect()
    }
}

const ALICE: (&str, &str) = ("acme_user", "acme-secret");

#[tokio::test]
async fn two_tenants_are_served_by_one_pool_and_a_lie_about_the_tenant_is_refused() {
    let proxy = Proxy::with_tenant("acme").and_tenant("beta").start().await;
    let service = Service::of(proxy, &["acme", "beta"]).await;

    let of = |tenant: &'static str| {
        let service = &service;
        async move {
            let first = (format!("{tenant}_user"), format!("{tenant}-secret"));
            let first = (&*first.0, &*first.1);
            for number in 0..3 {
                // The same names at both: neither tenant learns of the other's.
                let name = format!("employee-{number}");
                let (status, made) = service.add(first, tenant, json!({ "name": name })).await;
                assert_eq!(status, 201, "{made}");
                assert_eq!(made["login"], format!("{name}@{tenant}"));
                // The new person can log in at once.
                let new = (made["login"].as_str().unwrap(), made["password"].as_str().unwrap());
                let (status, listed) = service.list(new, tenant).await;
                assert_eq!(status, 200, "{listed}");
                let names: Vec<_> = (0..=number).map(|number| format!("employee-{number}")).collect();
                assert_eq!(listed, json!({ "tenant": tenant, "employees": names }));
            }
        }
    };
    tokio::join!(of("acme"), of("beta"));

    for lie in ["beta", "nobody", "pglobby"] {
        assert_eq!(service.list(ALICE, lie).await.0, 403, "{lie}");
        assert_eq!(service.add(ALICE, lie, json!({ "name": "mallory" })).await.0, 403, "{lie}");
    }
    assert_eq!(service.list(("acme_user", "wrong"), "acme").await, (401, json!("who are you?")));
    // A name that is taken leaves nothing behind.
    let (status, words) = service.add(ALICE, "acme", json!({ "name": "employee-1" })).await;
    assert_eq!((status, words), (409, json!("that name is taken")));
    let (_, listed) = service.list(ALICE, "acme").await;
    assert_eq!(listed["employees"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn nobody_adds_a_login_without_the_right_to_or_with_more_than_their_own() {
    let service = Service::of(Proxy::with_tenant("acme").start().await, &["acme"]).await;
    let proxy = &service.proxy;
    proxy.create_login("reader", "r", &["--tenant", "acme", "--read-only"]);
    proxy.create_login("writer", "w", &["--tenant", "acme"]);
    let before = service.logins();
    let asked = json!({ "name": "mallory", "access": "read_write" });
    for who in [("reader", "r"), ("writer", "w"), ("writer@acme", "w")] {
        let (status, words) = service.add(who, "acme", asked.clone()).await;
        assert_eq!((status, words), (403, json!("your login may not add others")), "{who:?}");
        assert_eq!(service.list(who, "acme").await.0, 200);
    }
    // With the right to add logins, but not to write: still not.
    proxy.command(&["login", "set", "reader", "may_add_logins=true"]);
    assert_eq!(service.add(("reader", "r"), "acme", asked.clone()).await.0, 403);
    assert_eq!(service.logins(), before);
    let (_, listed) = service.list(ALICE, "acme").await;
    assert_eq!(listed["employees"], json!([]));

    // Whoever may adds readers, and writers if that is said; they in turn add nobody.
    for (name, access, expected) in [("bob", None, "read_only"), ("carol", Some("read_write"), "read_write")]
    {
        let mut body = json!({ "name": name });
        if let Some(access) = access {
            body["access"] = json!(access);
        }
        let (status, made) = service.add(ALICE, "acme", body).await;
        assert_eq!((status, &made["access"]), (201, &json!(expected)), "{made}");
        let login = (made["login"].as_str().unwrap(), made["password"].as_str().unwrap());
        assert_eq!(service.add(login, "acme", asked.clone()).await.0, 403, "{name}");
        let wrote = proxy.caller(login.0, login.1, "acme").connect().await.try_run("CREATE TABLE t ()").await;
        assert_eq!(wrote.is_ok(), expected == "read_write", "{name}");
    }
    // The right can be taken again.
    proxy.command(&["login", "set", "acme_user", "may_add_logins=false"]);
    assert_eq!(service.add(ALICE, "acme", json!({ "name": "dave" })).await.0, 403);
    // It is an employee's; a service has none.
    let refused = proxy.command_with(&["login", "set", "api", "may_add_logins=true"], "");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("belongs to no tenant"));
}

#[tokio::test]
async fn what_goes_wrong_is_said_in_words_and_with_a_status_that_fits() {
    let service = Service::of(Proxy::with_tenant("acme").start().await, &["acme"]).await;
    let proxy = &service.proxy;
    for (body, words) in [
        (json!({}), "a name is missing"),
        (json!({ "name": "x", "access": "everything" }), "access is read_only or read_write"),
        (json!({ "name": "x\ny" }), "control character"),
    ] {
        let (status, said) = service.add(ALICE, "acme", body).await;
        assert_eq!(status, 422, "{said}");
        assert!(said.as_str().unwrap().contains(words), "{said}");
    }
    proxy.client("acme").connect().await.run("DROP TABLE employees").await;
    let (status, said) = service.list(ALICE, "acme").await;
    assert_eq!((status, said), (500, json!("relation \"employees\" does not exist")));

    let operator = proxy.api_as("second", "operator");
    operator.post("/v1/tenants/acme/suspend", json!({ "reason": "unpaid" })).await.with(200);
    let suspended = json!("tenant \"acme\" is suspended: unpaid");
    assert_eq!(service.list(ALICE, "acme").await, (403, suspended.clone()));
    assert_eq!(service.add(ALICE, "acme", json!({ "name": "x" })).await, (403, suspended));
    // Who does not prove to belong there learns nothing of that.
    assert_eq!(service.list(("acme_user", "wrong"), "acme").await.0, 401);
}
