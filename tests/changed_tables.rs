//! Tables and types change while statements are prepared: whoever prepares a text anew sees what is now, and whoever has
//! prepared it before gets PostgreSQL's own answer, on whichever server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    wire::{Message, bind, close, describe, execute, parse, rows, sync, tags},
};

/// Two servers, of which two clients hold one at a time: who else comes gets the other.
struct Pair {
    proxy: Proxy,
    holders: [Wire; 2],
    held: usize,
}

impl Pair {
    async fn new() -> Self {
        let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
        let mut holders = [proxy.wire("acme").await, proxy.wire("acme").await];
        holders[0].query("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
        holders[0].query("BEGIN").await;
        Self { proxy, holders, held: 0 }
    }

    /// From now on everybody gets the other server.
    async fn turn(&mut self) {
        let (free, held) = (1 - self.held, self.held);
        self.holders[free].query("BEGIN").await;
        self.holders[held].query("COMMIT").await;
        self.held = free;
    }
}

async fn send(client: &mut Wire, messages: &[Vec<u8>]) -> Vec<Message> {
    client.send_bytes(&messages.concat()).await;
    client.until_ready().await
}

async fn prepare(client: &mut Wire, sql: &str) -> Vec<Message> {
    send(client, &[parse("q", sql), sync()]).await
}

async fn run(client: &mut Wire) -> Vec<Message> {
    send(client, &[bind("", "q", &[]), execute("", 0), sync()]).await
}

fn row(values: &[Option<&str>]) -> Vec<Vec<Option<String>>> {
    vec![values.iter().map(|value| value.map(str::to_owned)).collect()]
}

const CHANGED: &str = "cached plan must not change result type";

fn is_refused(answers: &[Message]) {
    assert_eq!(tags(answers), "EZ");
    assert_eq!(
        (answers[0].sqlstate().as_str(), answers[0].field(b'M').unwrap().as_str()),
        ("0A000", CHANGED)
    );
    // postgres.js and pgjdbc prepare anew and try again where this routine has spoken, as their own tests ask of them.
    assert_eq!(answers[0].field(b'R').as_deref(), Some("RevalidateCachedQuery"));
}

/// A client that had just prepared a text got "cached plan must not change result type" on a server where somebody else had
/// prepared the same text before the table changed; and one that had prepared it long ago got columns it knew nothing of.
#[tokio::test]
async fn a_column_more_is_seen_by_who_prepares_now_and_refused_to_who_prepared_before() {
    let mut pair = Pair::new().await;
    let (mut old, mut new) = (pair.proxy.wire("acme").await, pair.proxy.wire("acme").await);
    assert_eq!(tags(&prepare(&mut old, "SELECT * FROM t").await), "1Z");
    for _ in 0..2 {
        assert_eq!(rows(&run(&mut old).await), row(&[Some("1")]));
        pair.turn().await;
    }
    new.query("ALTER TABLE t ADD COLUMN y text").await;
    assert_eq!(tags(&prepare(&mut new, "SELECT * FROM t").await), "1Z");
    for _ in 0..4 {
        assert_eq!(rows(&run(&mut new).await), row(&[Some("1"), None]));
        is_refused(&run(&mut old).await);
        pair.turn().await;
    }
    // As in PostgreSQL, it is the transaction that fails, and the statement is as good as before once the table is.
    old.query("BEGIN").await;
    is_refused(&run(&mut old).await);
    assert_eq!(tags(&old.query("SELECT 1").await), "EZ");
    old.query("ROLLBACK").await;
    new.query("ALTER TABLE t DROP COLUMN y").await;
    for _ in 0..2 {
        assert_eq!(rows(&run(&mut old).await), row(&[Some("1")]));
        is_refused(&run(&mut new).await);
        pair.turn().await;
    }
    for client in [&mut old, &mut new] {
        send(client, &[close(b'S', "q"), parse("q", "SELECT * FROM t"), sync()]).await;
    }
    for _ in 0..2 {
        assert_eq!(rows(&run(&mut old).await), rows(&run(&mut new).await));
        pair.turn().await;
    }
}

/// Its parameter was described as what the column had been.
#[tokio::test]
async fn a_parameter_has_the_type_that_its_column_has_when_it_is_prepared() {
    let mut pair = Pair::new().await;
    let (mut old, mut new) = (pair.proxy.wire("acme").await, pair.proxy.wire("acme").await);
    let sql = "UPDATE t SET x = $1";
    for _ in 0..2 {
        prepare(&mut old, sql).await;
        send(&mut old, &[close(b'S', "q"), sync()]).await;
        pair.turn().await;
    }
    pair.holders[pair.held].query("ALTER TABLE t ALTER x TYPE text").await;
    pair.turn().await;
    pair.turn().await;
    assert_eq!(tags(&prepare(&mut new, sql).await), "1Z");
    for _ in 0..3 {
        let answers = send(&mut new, &[describe(b'S', "q"), sync()]).await;
        assert_eq!((tags(&answers).as_str(), &answers[0].body[..]), ("tnZ", &[0, 1, 0, 0, 0, 25][..]));
        assert_eq!(
            tags(&send(&mut new, &[bind("", "q", &[Some("a")]), execute("", 0), sync()]).await),
            "2CZ"
        );
        pair.turn().await;
    }
}

/// A server that lacks several statements of one pipeline is asked about each, and every answer is in its place.
#[tokio::test]
async fn a_pipeline_of_statements_that_the_server_lacks_is_answered_in_order() {
    let mut pair = Pair::new().await;
    let mut client = pair.proxy.wire("acme").await;
    let names = ["a", "b", "c"];
    let prepares: Vec<_> = names.map(|name| parse(name, &format!("SELECT '{name}', x FROM t"))).to_vec();
    send(&mut client, &[prepares, vec![sync()]].concat()).await;
    pair.turn().await;
    let big = "x".repeat(200_000);
    let batch = |name: &str| [bind("", name, &[]), execute("", 0)].concat();
    let request = [
        batch("a"),
        batch("b"),
        sync(),
        batch("none"),
        batch("c"),
        sync(),
        parse("long", "SELECT length($1)"),
        bind("", "long", &[Some(&big)]),
        execute("", 0),
        batch("c"),
        sync(),
    ];
    client.send_bytes(&request.concat()).await;
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(client.until_ready().await);
    }
    let first = |answers: &[Message]| {
        rows(answers).into_iter().map(|row| row[0].clone().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!((tags(&answers[0]).as_str(), first(&answers[0])), ("2DC2DCZ", vec!["a".into(), "b".into()]));
    assert_eq!((tags(&answers[1]).as_str(), answers[1][0].sqlstate().as_str()), ("EZ", "26000"));
    assert_eq!(
        (tags(&answers[2]).as_str(), first(&answers[2])),
        ("12DC2DCZ", vec!["200000".into(), "c".into()])
    );
    pair.turn().await;
    pair.turn().await;
    client.query("ALTER TABLE t ALTER x TYPE text").await;
    pair.turn().await;
    let answers =
        send(&mut client, &[bind("", "long", &[Some(&big)]), execute("", 0), batch("c"), sync()]).await;
    assert_eq!(tags(&answers), "2DCEZ");
    assert_eq!(answers[3].sqlstate(), "0A000");
}

/// What a batch that failed was to prepare was there all the same for the next one, if that was sent before the error came.
#[tokio::test]
async fn what_a_failed_batch_was_to_prepare_is_not_there_for_the_next_one_of_the_pipeline() {
    let mut pair = Pair::new().await;
    let (mut client, mut other) = (pair.proxy.wire("acme").await, pair.proxy.wire("acme").await);
    prepare(&mut other, "SELECT 'others'").await;
    let fails = [bind("", "none", &[]), parse("q", "SELECT 'others'"), sync()].concat();
    let uses = [bind("", "q", &[]), execute("", 0), sync()].concat();
    for _ in 0..2 {
        client.send_bytes(&[fails.clone(), uses.clone()].concat()).await;
        assert_eq!(tags(&client.until_ready().await), "EZ");
        let answers = client.until_ready().await;
        assert_eq!((tags(&answers).as_str(), answers[0].sqlstate().as_str()), ("EZ", "26000"));
        pair.turn().await;
    }
    // The unnamed statement from before is what a skipped one would have replaced, and nobody else's.
    send(&mut client, &[parse("", "SELECT 'own'"), sync()]).await;
    pair.turn().await;
    send(&mut other, &[parse("", "SELECT 'another'"), sync()]).await;
    let fails = [bind("", "none", &[]), parse("", "SELECT 'skipped'"), sync()].concat();
    let uses = [bind("", "", &[]), execute("", 0), sync()].concat();
    client.send_bytes(&[fails, uses].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "EZ");
    assert_eq!(rows(&client.until_ready().await), row(&[Some("own")]));
}

/// pgjdbc's test of as many parameters as there can be: what was not the whole of their description was taken for it, as much as
/// had come at once, and another server's was another.
#[tokio::test]
async fn a_statement_of_very_many_parameters_has_one_shape() {
    let mut pair = Pair::new().await;
    let mut client = pair.proxy.wire("acme").await;
    for count in [16_000, 20_000, 40_000, 65_535] {
        let parameters: Vec<String> = (1..=count).map(|number| format!("${number}::int")).collect();
        prepare(&mut client, &format!("SELECT count(*) FROM unnest(ARRAY[{}]) x", parameters.join(",")))
            .await;
        for _ in 0..2 {
            pair.turn().await;
            client.send_bytes(&[bind("", "q", &vec![None; count]), execute("", 0), sync()].concat()).await;
            assert_eq!(rows(&client.until_ready().await), row(&[Some(&count.to_string())]));
        }
        send(&mut client, &[close(b'S', "q"), sync()]).await;
    }
}
