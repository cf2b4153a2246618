//! An ordinary client: tokio-postgres, with the few words that tests say most often.

use std::{
    ops::{Deref, DerefMut},
    path::Path,
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinHandle};
use tokio_postgres::{AsyncMessage, Config, Error, NoTls, Notification, SimpleQueryMessage};

/// Derefs to [`tokio_postgres::Client`].
pub struct Client {
    client: tokio_postgres::Client,
    connection: JoinHandle<()>,
    asynchronous: mpsc::UnboundedReceiver<AsyncMessage>,
}

impl Client {
    pub async fn connect(config: &Config) -> Result<Self, Error> {
        let (client, mut connection) = in_time("connecting", config.connect(NoTls)).await?;
        let (sender, asynchronous) = mpsc::unbounded_channel();
        let connection = tokio::spawn(async move {
            while let Some(Ok(message)) =
                std::future::poll_fn(|context| connection.poll_message(context)).await
            {
                let _ = sender.send(message);
            }
        });
        Ok(Self { client, connection, asynchronous })
    }

    /// Runs statements, separated by semicolons, as one simple query. Fails the test on an error.
    pub async fn run(&self, sql: &str) -> &Self {
        self.try_run(sql).await.unwrap_or_else(|error| panic!("{sql}: {}", in_words(&error)));
        self
    }

    pub async fn try_run(&self, sql: &str) -> Result<(), Error> {
        in_time(sql, self.client.batch_execute(sql)).await
    }

    /// The first value of the first row, as text. NULL is the empty string.
    pub async fn ask(&self, sql: &str) -> String {
        let rows = self.ask_all(sql).await;
        rows.into_iter()
            .next()
            .unwrap_or_else(|| panic!("{sql}: no row"))
            .into_iter()
            .next()
            .flatten()
            .unwrap_or_default()
    }

    /// All rows of a simple query, as text.
    pub async fn ask_all(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        let messages = in_time(sql, self.client.simple_query(sql)).await;
        let messages = messages.unwrap_or_else(|error| panic!("{sql}: {}", in_words(&error)));
        let rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        rows.map(|row| (0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect()).collect()
    }

    /// The SQLSTATE with which `sql` is refused; fails the test if it is not.
    pub async fn refusal_of(&self, sql: &str) -> String {
        sqlstate(&self.try_run(sql).await.expect_err(sql))
    }

    /// The process id of the server that answers now.
    pub async fn server_pid(&self) -> String {
        self.ask("SELECT pg_backend_pid()").await
    }

    /// The next notice, notification excluded.
    pub async fn notice(&mut self) -> String {
        loop {
            match self.next_asynchronous("a notice").await {
                AsyncMessage::Notice(notice) => return notice.message().to_owned(),
                _ => continue,
            }
        }
    }

    pub async fn notification(&mut self) -> Notification {
        loop {
            match self.next_asynchronous("a notification").await {
                AsyncMessage::Notification(notification) => return notification,
                _ => continue,
            }
        }
    }

    async fn next_asynchronous(&mut self, what: &str) -> AsyncMessage {
        in_time(what, self.asynchronous.recv())
            .await
            .unwrap_or_else(|| panic!("closed while waiting for {what}"))
    }

    /// Cuts the connection without a word, as a crashed application does.
    pub async fn vanish(self) {
        self.connection.abort();
        let _ = self.connection.await;
    }

    /// Says goodbye and waits until the connection is closed.
    pub async fn leave(self) {
        drop(self.client);
        let _ = in_time("leaving", self.connection).await;
    }

    /// Waits until the other side has closed the connection.
    pub async fn closed(&mut self) {
        let _ = in_time("the end of the connection", &mut self.connection).await;
    }
}

impl Deref for Client {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &Self::Target {
        &self.client
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.client
    }
}

pub fn sqlstate(error: &Error) -> String {
    error.code().unwrap_or_else(|| panic!("no SQLSTATE in: {}", in_words(error))).code().to_owned()
}

/// tokio-postgres keeps the reason in the source.
pub fn in_words(error: &Error) -> String {
    match error.as_db_error() {
        Some(reason) => format!("{error}: {} ({})", reason.message(), reason.code().code()),
        None => format!("{error:?}"),
    }
}

/// A hang is a failure with a name, not a test that never ends.
pub async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("nothing happened for {PATIENCE:?}: {what}"))
}

/// Far longer than anything takes on a busy machine, shorter than the runner's own patience.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The end of a log, for a failed test.
pub fn tail_of(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
