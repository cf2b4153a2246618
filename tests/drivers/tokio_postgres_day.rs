//! A day's ordinary work with tokio-postgres, pipelining included.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, TryStreamExt, future::try_join_all};
use serde_json::json;
use tokio_postgres::{Config, NoTls};

use crate::support::{
    Client,
    client::{in_time, sqlstate},
};

const UNICODE: &str = "naïve – 漢字 – 🦀 – 'quoted' \"twice\" \\ back";

/// One connection's day; `worker` keeps its tables apart from the others'.
pub async fn day(config: &Config, worker: usize) {
    let mut db = Client::connect(config).await.unwrap();
    let table = format!("tokio_day_{worker}");
    typed_values(&db, &table).await;
    transactions(&mut db, &table).await;
    prepared_statements(&db).await;
    pipelines(&db).await;
    copies(&db, &table).await;
    portals(&mut db).await;
    notices_and_errors(&mut db).await;
    cancels(&db).await;
    db.run(&format!("DROP TABLE {table}")).await;
    db.leave().await;
}

async fn typed_values(db: &Client, table: &str) {
    db.run(&format!(
        "CREATE TABLE {table} (name text UNIQUE, tags text[], doc jsonb, raw bytea, big int8, nothing int4)"
    ))
    .await;
    let raw: Vec<u8> = (0..10_240).map(|i: usize| i.to_le_bytes()[0]).collect();
    let tags = vec![Some("a"), None, Some("{}")];
    let doc = json!({"k": [1, null, {"deep": "ü"}]});
    let insert = format!("INSERT INTO {table} VALUES ($1, $2, $3, $4, $5, $6)");
    let big = i64::MAX;
    assert_eq!(db.execute(&insert, &[&UNICODE, &tags, &doc, &raw, &big, &None::<i32>]).await.unwrap(), 1);

    let row = db.query_one(&format!("SELECT * FROM {table} WHERE name = $1"), &[&UNICODE]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), UNICODE);
    assert_eq!(row.get::<_, Vec<Option<&str>>>(1), tags);
    assert_eq!(row.get::<_, serde_json::Value>(2), doc);
    assert_eq!(row.get::<_, &[u8]>(3), raw);
    assert_eq!(row.get::<_, i64>(4), big);
    assert_eq!(row.get::<_, Option<i32>>(5), None);
}

async fn transactions(db: &mut Client, table: &str) {
    let insert = format!("INSERT INTO {table} (name) VALUES ($1)");
    let transaction = db.transaction().await.unwrap();
    transaction.execute(&insert, &[&"rolled back"]).await.unwrap();
    transaction.rollback().await.unwrap();

    let mut transaction = db.transaction().await.unwrap();
    transaction.execute(&insert, &[&"kept"]).await.unwrap();
    let savepoint = transaction.transaction().await.unwrap();
    assert_eq!(sqlstate(&savepoint.execute(&insert, &[&"kept"]).await.unwrap_err()), "23505");
    assert_eq!(sqlstate(&savepoint.query("SELECT 1", &[]).await.unwrap_err()), "25P02");
    savepoint.rollback().await.unwrap();
    transaction.commit().await.unwrap();

    // Dropped without a word: rolled back.
    let transaction = db.transaction().await.unwrap();
    transaction.execute(&insert, &[&"forgotten"]).await.unwrap();
    drop(transaction);
    let names =
        format!("SELECT string_agg(name, ',' ORDER BY name) FROM {table} WHERE name <> $u${UNICODE}$u$");
    assert_eq!(db.ask(&names).await, "kept");
}

async fn prepared_statements(db: &Client) {
    let adding = db.prepare("SELECT $1::int4 + 1").await.unwrap();
    for i in 0..60 {
        assert_eq!(db.query_one(&adding, &[&i]).await.unwrap().get::<_, i32>(0), i + 1);
    }
    for i in 0..150 {
        let times = db.prepare(&format!("SELECT $1::int4 * {i}")).await.unwrap();
        assert_eq!(db.query_one(&times, &[&2]).await.unwrap().get::<_, i32>(0), 2 * i);
        // `times` is dropped here, and closed on the server with the next message.
    }
    assert_eq!(sqlstate(&db.prepare("SELEC 1").await.unwrap_err()), "42601");
}

/// Many requests sent before the first answer.
async fn pipelines(db: &Client) {
    let answers =
        try_join_all((0..300).map(|i: i32| async move { db.query_one("SELECT $1::int4", &[&i]).await }));
    let answers: Vec<i32> =
        in_time("a pipeline", answers).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(answers, (0..300).collect::<Vec<_>>());

    let (first, second, third) =
        tokio::join!(db.ask("SELECT 1"), db.refusal_of("SELECT 1/0"), db.ask("SELECT 3"));
    assert_eq!((first.as_str(), second.as_str(), third.as_str()), ("1", "22012", "3"));
}

async fn copies(db: &Client, table: &str) {
    let sink = db.copy_in::<_, Bytes>(&format!("COPY {table} (name, big) FROM STDIN")).await.unwrap();
    let mut sink = std::pin::pin!(sink);
    for part in 0..100 {
        let lines: String = (0..100).map(|line| format!("copied {part} {line}\t{line}\n")).collect();
        sink.send(Bytes::from(lines)).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 10_000);

    let copied = db
        .copy_out(&format!("COPY (SELECT big FROM {table} WHERE name LIKE 'copied%') TO STDOUT"))
        .await
        .unwrap();
    let copied: Vec<u8> = copied.map_ok(|part| part.to_vec()).try_concat().await.unwrap();
    let sum: u64 = String::from_utf8(copied).unwrap().lines().map(|line| line.parse::<u64>().unwrap()).sum();
    assert_eq!(sum, 100 * (0..100).sum::<u64>());

    // Given up by the client: CopyFail.
    let sink = db.copy_in::<_, Bytes>(&format!("COPY {table} (name) FROM STDIN")).await.unwrap();
    let mut sink = Box::pin(sink);
    sink.send(Bytes::from_static(b"given up\n")).await.unwrap();
    drop(sink);
    assert_eq!(db.ask(&format!("SELECT count(*) FROM {table} WHERE name = 'given up'")).await, "0");
}

async fn portals(db: &mut Client) {
    let transaction = db.transaction().await.unwrap();
    let portal = transaction.bind("SELECT i FROM generate_series(1, 1000) i", &[]).await.unwrap();
    let mut sum = 0;
    loop {
        let rows = transaction.query_portal(&portal, 300).await.unwrap();
        if rows.is_empty() {
            break;
        }
        sum += rows.iter().map(|row| row.get::<_, i32>(0)).sum::<i32>();
    }
    transaction.commit().await.unwrap();
    assert_eq!(sum, 500_500);

    // A result left unread in the middle.
    let no_parameters: [&str; 0] = [];
    let rows = db.query_raw("SELECT i FROM generate_series(1, 100000) i", no_parameters).await.unwrap();
    let first = Box::pin(rows).next().await.unwrap().unwrap();
    assert_eq!(first.get::<_, i32>(0), 1);
    assert_eq!(db.ask("SELECT 'alive'").await, "alive");
}

async fn notices_and_errors(db: &mut Client) {
    db.run("DO $$ BEGIN RAISE NOTICE 'hear this: %', 42; END $$").await;
    assert_eq!(db.notice().await, "hear this: 42");
    assert_eq!(db.refusal_of("SELECT * FROM no_such_table").await, "42P01");
    assert_eq!(sqlstate(&db.query("SELECT 1 / $1::int4", &[&0]).await.unwrap_err()), "22012");
}

async fn cancels(db: &Client) {
    let token = db.cancel_token();
    let sleeping = db.refusal_of("SELECT pg_sleep(60) -- until cancelled");
    let cancelling = async {
        // Sent again until it hits: the first may be on its way before the query is.
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            token.cancel_query(NoTls).await.unwrap();
        }
    };
    let state = tokio::select! { state = sleeping => state, () = cancelling => unreachable!() };
    assert_eq!(state, "57014");
    // A late cancel may hit once more; nothing is wrong with the connection.
    let mut answered = db.try_run("SELECT 1").await;
    if answered.as_ref().is_err_and(|error| sqlstate(error) == "57014") {
        answered = db.try_run("SELECT 1").await;
    }
    answered.unwrap();
}
