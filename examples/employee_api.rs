//! An HTTP service for many tenants with one pool of connections: `GET /employees` and `POST /employees` in the database of
//! the tenant that the request names in `X-Tenant-Id`.
//!
//! An operator prepares it once, for an existing tenant `acme` (`pglobby tenant create acme`):
//!
//! ```sh
//! pglobby login create api --service --all-tenants       # the pool's login; prints its password
//! pglobby api-key create employee-api --role operator    # prints the key
//! pglobby login create alice --tenant acme               # the first employee; prints her password
//! pglobby login set alice may_add_logins=true            # she may add others
//! psql postgres://alice:…@127.0.0.1:6432/acme -c 'CREATE TABLE employees (name text PRIMARY KEY)'
//! ```
//!
//! Then run and use it:
//!
//! ```sh
//! DATABASE_URL=postgres://api:…@127.0.0.1:6432/pglobby PGLOBBY_API=127.0.0.1:9432 PGLOBBY_API_KEY=… \
//!     cargo run --example employee_api
//! curl -u alice:… -H 'X-Tenant-Id: acme' http://127.0.0.1:8080/employees
//! curl -u alice:… -H 'X-Tenant-Id: acme' -H 'Content-Type: application/json' \
//!     -d '{"name": "bob", "access": "read_only"}' http://127.0.0.1:8080/employees
//! ```
//!
//! The second answers with bob's login and password. The pool has a service login. Each request runs in one transaction, which
//! chooses its tenant by SET LOCAL. The service authenticates a caller by logging in to pglobby with the caller's name and
//! password, and asks there for the caller's tenant. A caller may do what the *caller's* login may do, never what the service's
//! may: to add an employee, the login must be able to write and to add logins. The service calls the logins that it makes
//! `name@tenant`, so no tenant learns which names another one uses.

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
use deadpool_postgres::{Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Transaction};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_postgres::{Config, Error, NoTls};

/// What the service needs.
pub struct Service {
    /// The one pool, of a service login.
    pool: Pool,
    /// The same endpoint, to authenticate callers at.
    endpoint: Config,
    /// pglobby's management API: address and key.
    management: (String, String),
}

/// An authenticated caller, who belongs to the tenant that the request names.
#[derive(Clone)]
struct Caller {
    login: String,
    tenant: String,
}

type Refused = (StatusCode, String);

fn refused(status: StatusCode, words: impl Into<String>) -> Refused {
    (status, words.into())
}

/// An error of pglobby or PostgreSQL as an HTTP error. The message only, because a detail may quote a row.
fn of_database(error: Error) -> Refused {
    let Some(said) = error.as_db_error() else {
        return refused(StatusCode::SERVICE_UNAVAILABLE, "the database cannot be reached");
    };
    let (code, words) = (said.code().code(), said.message());
    let status = match code {
        "28P01" | "28000" => return refused(StatusCode::UNAUTHORIZED, "who are you?"),
        // 57P03 also stands for temporary states.
        "57P03" if words.contains(" is suspended") => StatusCode::FORBIDDEN,
        "42501" | "25006" | "3D000" => StatusCode::FORBIDDEN,
        "23505" => return refused(StatusCode::CONFLICT, "that name is taken"),
        _ if ["08", "53", "57"].iter().any(|class| code.starts_with(class)) => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        _ if code.starts_with("22") => StatusCode::UNPROCESSABLE_ENTITY,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    refused(status, words)
}

fn of_pool(error: PoolError) -> Refused {
    match error {
        PoolError::Backend(error) => of_database(error),
        _ => refused(StatusCode::SERVICE_UNAVAILABLE, "every connection is busy"),
    }
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

/// Passes a request on if its caller belongs to the tenant that it names.
async fn at_their_tenant(
    State(service): State<Arc<Service>>,
    mut request: Request,
    next: Next,
) -> Result<Response, Refused> {
    let named = |headers: &HeaderMap| Some(headers.get("x-tenant-id")?.to_str().ok()?.to_owned());
    let tenant =
        named(request.headers()).ok_or_else(|| refused(StatusCode::BAD_REQUEST, "X-Tenant-Id is missing"))?;
    let (login, password) =
        credentials(request.headers()).ok_or_else(|| refused(StatusCode::UNAUTHORIZED, "who are you?"))?;
    if service.tenant_of(&login, &password).await.map_err(of_database)? != tenant {
        return Err(refused(StatusCode::FORBIDDEN, "that is not your tenant"));
    }
    request.extensions_mut().insert(Caller { login, tenant });
    Ok(next.run(request).await)
}

/// Basic authentication.
fn credentials(headers: &HeaderMap) -> Option<(String, String)> {
    let encoded = headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Basic ")?;
    let decoded = String::from_utf8(BASE64_STANDARD.decode(encoded).ok()?).ok()?;
    decoded.split_once(':').map(|(user, password)| (user.to_owned(), password.to_owned()))
}

impl Service {
    /// Logs in as the caller, and asks for the tenant.
    async fn tenant_of(&self, user: &str, password: &str) -> Result<String, Error> {
        let mut config = self.endpoint.clone();
        config.user(user).password(password).dbname(user);
        let (client, connection) = config.connect(NoTls).await?;
        let connection = tokio::spawn(connection);
        let row = client.query_one("SHOW pglobby.tenant", &[]).await;
        drop(client);
        let _ = connection.await;
        row?.try_get(0)
    }

    /// Sends a request to the management API. Returns status and body.
    async fn manage(&self, method: &str, path: &str, body: &Value) -> Result<(u16, Value), Refused> {
        let unreachable = |_| refused(StatusCode::SERVICE_UNAVAILABLE, "pglobby's API cannot be reached");
        let (address, key) = &self.management;
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(address).await.map_err(unreachable)?;
        stream.write_all(request.as_bytes()).await.map_err(unreachable)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map_err(unreachable)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(502);
        Ok((status, serde_json::from_str(body).unwrap_or_default()))
    }

    /// Whether the caller's login may write and add logins at this moment.
    async fn may_add(&self, caller: &Caller) -> Result<bool, Refused> {
        // `alice@acme` is the login with that whole name, or else login alice at acme, as in pglobby.
        let short = caller.login.strip_suffix(&*format!("@{}", caller.tenant));
        for name in [Some(&*caller.login), short].into_iter().flatten() {
            match self.manage("GET", &login_path(name), &json!({})).await? {
                (200, login) => {
                    return Ok(login["tenant"] == *caller.tenant
                        && login["access"] == "read_write"
                        && login["may_add_logins"] == true);
                }
                (404, _) => {}
                (status, body) => return Err(of_management(status, &body)),
            }
        }
        Ok(false)
    }
}

fn login_path(name: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    format!("/v1/logins/{}", name.bytes().map(encode).collect::<String>())
}

/// An error of the management API as an HTTP error.
fn of_management(status: u16, body: &Value) -> Refused {
    let words = body["error"]["message"].as_str().unwrap_or("pglobby's API gave no reason");
    match status {
        409 => refused(StatusCode::CONFLICT, "that name is taken"),
        400 | 422 => refused(StatusCode::UNPROCESSABLE_ENTITY, words),
        503 => refused(StatusCode::SERVICE_UNAVAILABLE, words),
        // For example a wrong key of this service. The caller can do nothing about it.
        _ => refused(StatusCode::BAD_GATEWAY, "the login could not be made"),
    }
}

/// Chooses the transaction's tenant. The transaction has not reached a server yet, so this reaches none either.
async fn choose(transaction: &Transaction<'_>, tenant: &str) -> Result<(), Refused> {
    let choice = "SELECT set_config('pglobby.tenant', $1, true)";
    transaction.query_one(choice, &[&tenant]).await.map(drop).map_err(of_database)
}

async fn list(
    State(service): State<Arc<Service>>,
    Extension(Caller { tenant, .. }): Extension<Caller>,
) -> Result<Json<Value>, Refused> {
    let mut client = service.pool.get().await.map_err(of_pool)?;
    let transaction = client.transaction().await.map_err(of_database)?;
    choose(&transaction, &tenant).await?;
    let rows =
        transaction.query("SELECT name FROM employees ORDER BY name", &[]).await.map_err(of_database)?;
    transaction.commit().await.map_err(of_database)?;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    Ok(Json(json!({ "tenant": tenant, "employees": names })))
}

async fn add(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<Value>), Refused> {
    let invalid = |words| refused(StatusCode::UNPROCESSABLE_ENTITY, words);
    let name = body["name"].as_str().filter(|name| !name.is_empty()).ok_or(invalid("a name is missing"))?;
    let read_only = match body.get("access").map(Value::as_str) {
        None | Some(Some("read_only")) => true,
        Some(Some("read_write")) => false,
        _ => return Err(invalid("access is read_only or read_write")),
    };
    if !service.may_add(&caller).await? {
        return Err(refused(StatusCode::FORBIDDEN, "your login may not add others"));
    }
    let tenant = &caller.tenant;
    let mut client = service.pool.get().await.map_err(of_pool)?;
    let transaction = client.transaction().await.map_err(of_database)?;
    choose(&transaction, tenant).await?;
    let insert = "INSERT INTO employees (name) VALUES ($1)";
    transaction.execute(insert, &[&name]).await.map_err(of_database)?;
    // If the login cannot be made, the employee is not kept; if the employee cannot be stored, the login is dropped.
    let login = format!("{name}@{tenant}");
    let wanted = json!({ "name": login, "tenant": tenant, "read_only": read_only });
    let (status, made) = service.manage("POST", "/v1/logins", &wanted).await?;
    if status != 201 {
        return Err(of_management(status, &made));
    }
    if let Err(error) = transaction.commit().await {
        service.manage("DELETE", &login_path(&login), &json!({})).await?;
        return Err(of_database(error));
    }
    let employee = json!({
        "tenant": tenant, "name": name, "login": login, "access": made["access"], "password": made["password"],
    });
    Ok((StatusCode::CREATED, Json(employee)))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let of = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
    let router = service(&of("DATABASE_URL")?, &of("PGLOBBY_API")?, &of("PGLOBBY_API_KEY")?)?;
    let listen = of("LISTEN").unwrap_or_else(|_| "127.0.0.1:8080".to_owned());
    axum::serve(tokio::net::TcpListener::bind(listen).await?, router).await?;
    Ok(())
}
