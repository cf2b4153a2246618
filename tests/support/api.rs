//! The management API as a script calls it.

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{Proxy, client::in_time};

/// A caller with a key, or without one.
#[derive(Clone)]
pub struct Api {
    port: u16,
    key: Option<String>,
}

/// What was answered.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Value,
}

impl Reply {
    /// `error.code`.
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_else(|| panic!("no error: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The body, which must have come with this status.
    pub fn with(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        self.body
    }
}

impl Proxy {
    /// A caller with a new key of this role.
    pub fn api(&self, role: &str) -> Api {
        self.api_as(role, role)
    }

    /// The same, the key having this name.
    pub fn api_as(&self, name: &str, role: &str) -> Api {
        let made = self.json(&["api-key", "create", name, "--role", role, "--json"]);
        Api { port: self.http_port(), key: Some(made["key"].as_str().unwrap().to_owned()) }
    }

    /// A caller that sends this as its key.
    pub fn api_with(&self, key: Option<&str>) -> Api {
        Api { port: self.http_port(), key: key.map(str::to_owned) }
    }
}

impl Api {
    pub fn key(&self) -> &str {
        self.key.as_deref().unwrap()
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "").await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.send("POST", path, &body.to_string()).await
    }

    pub async fn patch(&self, path: &str, body: Value) -> Reply {
        self.send("PATCH", path, &body.to_string()).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.send("DELETE", path, "").await
    }

    /// The operation of a 202, when it is over.
    pub async fn followed(&self, reply: Reply) -> Value {
        let place = reply.header("location").unwrap_or_else(|| panic!("no Location: {reply:?}")).to_owned();
        reply.with(202);
        self.get(&format!("{place}?wait=60s")).await.with(200)
    }

    pub async fn send(&self, method: &str, path: &str, body: &str) -> Reply {
        let key = self.key.as_ref().map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\n{key}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = in_time(path, async {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
            // One that is refused on its head alone may be told so before it has sent its body.
            let _ = stream.write_all(request.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        });
        let answer = answer.await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: {answer}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = serde_json::from_str(body).unwrap_or_else(|_| json!(body));
        Reply { status, head: head.to_owned(), body }
    }
}
