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

#[tokio::test]
async fn two_tenants_are_served_by_one_pool_and_a_lie_about_the_tenant_is_refused() {
    let proxy = Proxy::with_tenant("acme").and_tenant("beta").start().await;
    proxy.create_login("api", "one-for-all", &["--service", "--all-tenants"]);
    for tenant in ["acme", "beta"] {
        let client = proxy.client(tenant).connect().await;
        client.run("CREATE TABLE employees (name text PRIMARY KEY)").await;
    }
    let url = format!("postgres://api:one-for-all@127.0.0.1:{}/pglobby", proxy.port());
    let key = proxy.api("admin");
    let management = format!("127.0.0.1:{}", proxy.http_port());
    let router = employee_api::service(&url, &management, key.key()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, router).await });

    let of = |tenant: &'static str| async move {
        let first = (format!("{tenant}_user"), format!("{tenant}-secret"));
        let first = (&*first.0, &*first.1);
        for number in 0..4 {
            let name = format!("{tenant}-{number}");
            let body = json!({ "name": name }).to_string();
            let (status, made) = call(port, "POST", first, tenant, &body).await;
            assert_eq!(status, 201, "{made}");
            // The new person can log in at once.
            let new = (&*name, made["password"].as_str().unwrap());
            let (status, listed) = call(port, "GET", new, tenant, "").await;
            assert_eq!(status, 200, "{listed}");
            let names: Vec<_> = (0..=number).map(|number| format!("{tenant}-{number}")).collect();
            assert_eq!(listed, json!({ "tenant": tenant, "employees": names }));
        }
    };
    tokio::join!(of("acme"), of("beta"));

    let alice = ("acme_user", "acme-secret");
    for lie in ["beta", "nobody", "pglobby"] {
        assert_eq!(call(port, "GET", alice, lie, "").await.0, 403, "{lie}");
        assert_eq!(call(port, "POST", alice, lie, r#"{"name":"mallory"}"#).await.0, 403, "{lie}");
    }
    assert_eq!(call(port, "GET", ("acme_user", "wrong"), "acme", "").await.0, 401);
    // A name that is taken elsewhere leaves nothing behind.
    assert_eq!(call(port, "POST", alice, "acme", r#"{"name":"beta-1"}"#).await.0, 409);
    let (_, listed) = call(port, "GET", alice, "acme", "").await;
    assert_eq!(listed["employees"].as_array().unwrap().len(), 4);
}
