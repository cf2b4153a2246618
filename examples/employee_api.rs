//! An HTTP service for many tenants with one pool of connections: `GET /employees` and `POST /employees` in the database of
//! the tenant that the request names in `X-Tenant-Id`.
//!
//! ```sh
//! DATABASE_URL=postgres://api:…@127.0.0.1:6432/pglobby PGLOBBY_API=127.0.0.1:9432 PGLOBBY_API_KEY=… \
//!     cargo run --example employee_api
//! curl -u alice:secret -H 'X-Tenant-Id: acme' http://127.0.0.1:8080/employees
//! ```
//!
//! The pool's login is a service login; each request runs in one transaction, which chooses its tenant by SET LOCAL. Who the
//! caller is, and where they belong, is proved by logging in to pglobby as they would.

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header::AUTHORIZATION},
    middleware::{self, Next},
    response::Response,
    routing::get,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Transaction};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_postgres::{Config, NoTls};

/// What the service needs.
pub struct Service {
    /// The one pool, of a service login.
    pool: Pool,
    /// The same endpoint, for callers to prove themselves at.
    endpoint: Config,
    /// pglobby's management API: address and key.
    management: (String, String),
}

/// The tenant of a request, once it is proved that the caller belongs there.
#[derive(Clone)]
struct Tenant(String);

type Refused = (StatusCode, String);

fn internal(error: impl std::fmt::Display) -> Refused {
    (StatusCode::BAD_GATEWAY, error.to_string())
}

/// The service on `url`, with the management API at `address`.
pub fn service(url: &str, address: &str, key: &str) -> Result<Router, Box<dyn std::error::Error>> {
    let endpoint: Config = url.parse()?;
    let recycling_method = RecyclingMethod::Fast;
    let manager = Manager::from_config(endpoint.clone(), NoTls, ManagerConfig { recycling_method });
    let pool = Pool::builder(manager).max_size(4).build()?;
    let service = Arc::new(Service { pool, endpoint, management: (address.to_owned(), key.to_owned()) });
    Ok(Router::new()
        .route("/employees", get(list).post(add))
        .layer(middleware::from_fn_with_state(service.clone(), at_their_tenant))
        .with_state(service))
}

/// Lets a request pass whose caller belongs to the tenant it names.
async fn at_their_tenant(
    State(service): State<Arc<Service>>,
    mut request: Request,
    next: Next,
) -> Result<Response, Refused> {
    let named = |headers: &HeaderMap| Some(headers.get("x-tenant-id")?.to_str().ok()?.to_owned());
    let tenant =
        named(request.headers()).ok_or((StatusCode::BAD_REQUEST, "X-Tenant-Id is missing".to_owned()))?;
    let unknown = (StatusCode::UNAUTHORIZED, "who are you?".to_owned());
    let (user, password) = credentials(request.headers()).ok_or(unknown.clone())?;
    let own = service.tenant_of(&user, &password).await.ok_or(unknown)?;
    if own != tenant {
        return Err((StatusCode::FORBIDDEN, "that is not your tenant".to_owned()));
    }
    request.extensions_mut().insert(Tenant(tenant));
    Ok(next.run(request).await)
}

/// Basic authentication.
fn credentials(headers: &HeaderMap) -> Option<(String, String)> {
    let encoded = headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Basic ")?;
    let decoded = String::from_utf8(BASE64_STANDARD.decode(encoded).ok()?).ok()?;
    decoded.split_once(':').map(|(user, password)| (user.to_owned(), password.to_owned()))
}

impl Service {
    /// Logs in as the caller, and asks where that is.
    async fn tenant_of(&self, user: &str, password: &str) -> Option<String> {
        let mut config = self.endpoint.clone();
        config.user(user).password(password).dbname(user);
        let (client, connection) = config.connect(NoTls).await.ok()?;
        let connection = tokio::spawn(connection);
        let row = client.query_one("SHOW pglobby.tenant", &[]).await;
        drop(client);
        let _ = connection.await;
        row.ok()?.try_get(0).ok()
    }

    /// A login for a new employee; its generated password.
    async fn create_login(&self, name: &str, tenant: &str) -> Result<String, Refused> {
        let (address, key) = &self.management;
        let body = json!({ "name": name, "tenant": tenant }).to_string();
        let request = format!(
            "POST /v1/logins HTTP/1.0\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(address).await.map_err(internal)?;
        stream.write_all(request.as_bytes()).await.map_err(internal)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map_err(internal)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let body: Value = serde_json::from_str(body).unwrap_or_default();
        match (head.split(' ').nth(1), body["password"].as_str()) {
            (Some("201"), Some(password)) => Ok(password.to_owned()),
            (Some("409"), _) => Err((StatusCode::CONFLICT, "that name is taken".to_owned())),
            _ => Err(internal("the login could not be made")),
        }
    }
}

/// The transaction's tenant. Nothing of it has reached a server yet, so this asks none.
async fn choose(transaction: &Transaction<'_>, tenant: &str) -> Result<(), Refused> {
    let choice = "SELECT set_config('pglobby.tenant', $1, true)";
    transaction.query_one(choice, &[&tenant]).await.map(drop).map_err(internal)
}

async fn list(
    State(service): State<Arc<Service>>,
    Extension(Tenant(tenant)): Extension<Tenant>,
) -> Result<Json<Value>, Refused> {
    let mut client = service.pool.get().await.map_err(internal)?;
    let transaction = client.transaction().await.map_err(internal)?;
    choose(&transaction, &tenant).await?;
    let rows = transaction.query("SELECT name FROM employees ORDER BY name", &[]).await.map_err(internal)?;
    transaction.commit().await.map_err(internal)?;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    Ok(Json(json!({ "tenant": tenant, "employees": names })))
}

async fn add(
    State(service): State<Arc<Service>>,
    Extension(Tenant(tenant)): Extension<Tenant>,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<Value>), Refused> {
    let name = body["name"].as_str().ok_or((StatusCode::BAD_REQUEST, "a name is missing".to_owned()))?;
    let mut client = service.pool.get().await.map_err(internal)?;
    let transaction = client.transaction().await.map_err(internal)?;
    choose(&transaction, &tenant).await?;
    transaction.execute("INSERT INTO employees (name) VALUES ($1)", &[&name]).await.map_err(internal)?;
    // Where no login can be made, the employee is not kept.
    let password = service.create_login(name, &tenant).await?;
    transaction.commit().await.map_err(internal)?;
    Ok((StatusCode::CREATED, Json(json!({ "tenant": tenant, "name": name, "password": password }))))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let of = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
    let router = service(&of("DATABASE_URL")?, &of("PGLOBBY_API")?, &of("PGLOBBY_API_KEY")?)?;
    let listen = of("LISTEN").unwrap_or_else(|_| "127.0.0.1:8080".to_owned());
    axum::serve(tokio::net::TcpListener::bind(listen).await?, router).await?;
    Ok(())
}
