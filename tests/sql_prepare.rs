//! PREPARE, EXECUTE and DEALLOCATE in SQL follow their client from server to server, under the client's names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    comparison::Comparison,
    wire::{Message, bind, c_string, close, describe, execute, message, parse, rows, sync, tags},
};

async fn two_servers() -> Proxy {
    Proxy::with_tenant("acme").pool_size(2).start().await
}

/// Makes sure that the next borrower gets another server than this one, or the same one without its statements.
async fn stir(other: &mut Wire) {
    other.query("DEALLOCATE ALL").await;
}

fn error(answers: &[Message]) -> (String, String) {
    let found = answers.iter().find(|message| message.tag == b'E');
    let found = found.unwrap_or_else(|| panic!("no error in {answers:?}"));
    (found.sqlstate(), found.field(b'M').unwrap())
}

fn one(value: &str) -> Vec<Vec<Option<String>>> {
    vec![vec![Some(value.to_owned())]]
}

#[tokio::test]
async fn a_statement_prepared_in_sql_follows_its_client_and_pins_nothing() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    other.query("PREPARE q AS SELECT 'another q'").await;
    client.query("PREPARE q (int, text) AS SELECT $1 + 1 AS a, $2 AS b").await;
    let console = proxy.console().await;
    for _ in 0..3 {
        assert_eq!(console.ask_all("SHOW PINS").await.len(), 0);
        let answers = client.query("EXECUTE q (41, 'x')").await;
        assert_eq!(rows(&answers), [[Some("42".to_owned()), Some("x".to_owned())]]);
        assert_eq!(rows(&other.query("EXECUTE q").await), one("another q"));
        stir(&mut other).await;
        other.query("PREPARE q AS SELECT 'another q'").await;
    }
    assert_eq!(tags(&client.query("EXPLAIN (COSTS off) EXECUTE q (1, 'x')").await), "TDCZ");
    assert_eq!(
        tags(&client.query("CREATE TEMP TABLE made ON COMMIT DROP AS EXECUTE q (1, 'x')").await),
        "CZ"
    );
    assert_eq!(tags(&client.query("DEALLOCATE q").await), "CZ");
    assert_eq!(error(&client.query("EXECUTE q (1, 'x')").await).0, "26000");
    assert_eq!(rows(&other.query("EXECUTE q").await), one("another q"));
}

/// PostgreSQL's own words, under the client's own names.
#[tokio::test]
async fn errors_show_the_clients_names_and_places() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    proxy.cluster.create_database("twin", "twin", "twin secret").await;
    let mut direct = Wire::login(proxy.cluster.port(), "twin", "twin secret", "twin").await;
    let steps = [
        "PREPARE \"My q\" (int) AS SELECT $1",
        "PREPARE \"My q\" AS SELECT 2",
        "EXECUTE \"My q\"",
        "EXECUTE \"My q\" ('x' + )",
        "EXECUTE \"My q\" (nonsense)",
        "EXECUTE \"My q\" (1, 2)",
        "EXECUTE none",
        "EXECUTE pglobby_1",
        "DEALLOCATE none",
        "DEALLOCATE pglobby_1",
        "PREPARE bad AS SELECT nonsense",
        "PREPARE bad AS SELECT",
        "EXECUTE bad",
        "PREPARE bad AS SELECT 'not bad'",
        "EXECUTE bad",
        "BEGIN",
        "PREPARE stays AS SELECT 'stays'",
        "SELECT 1/0",
        "PREPARE never AS SELECT 1",
        "EXECUTE stays",
        "DEALLOCATE stays",
        "ROLLBACK",
        "EXECUTE stays",
        "EXECUTE never",
        "PREPARE a AS SELECT 'a'; EXECUTE a; DEALLOCATE a; PREPARE a AS SELECT 'b'; EXECUTE a",
        "EXECUTE a",
        "PREPARE c AS SELECT 'c'; SELECT 1/0; PREPARE d AS SELECT 'd'",
        "EXECUTE c",
        "EXECUTE d",
        "DEALLOCATE ALL; PREPARE c AS SELECT 'new c'; EXECUTE c",
        "EXECUTE c",
        "EXECUTE stays",
        "DISCARD ALL",
        "EXECUTE c",
    ];
    for (step, by) in ["query", "", "named"].iter().flat_map(|by| steps.map(|step| (step, *by))) {
        let request = match by {
            "query" => message(b'Q', &c_string(step)),
            name => {
                let run = [bind("", name, &[]), execute("", 0), sync()].concat();
                [close(b'S', name), parse(name, step), run].concat()
            }
        };
        let through = client.send_bytes(&request).await.until_ready().await;
        let alone = direct.send_bytes(&request).await.until_ready().await;
        let seen = |answers: &[Message]| {
            let told = answers.iter().map(|message| match message.tag {
                b'E' => {
                    format!("{:?} {:?} {:?}", message.field(b'C'), message.field(b'M'), message.field(b'P'))
                }
                b'T' => "T".to_owned(),
                tag => format!("{} {:?}", tag as char, message.body),
            });
            told.collect::<Vec<_>>()
        };
        assert_eq!(seen(&through), seen(&alone), "(left: through the proxy) {step} by {by:?}");
        if !matches!(alone.last().unwrap().body[..], [b'I']) {
            continue;
        }
        stir(&mut other).await;
    }
}

/// pgx, Npgsql and JDBC send everything by Parse, these statements too.
#[tokio::test]
async fn the_same_by_the_extended_protocol() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let run =
        |name: &str, sql: &str| [parse(name, sql), bind("", name, &[]), execute("", 0), sync()].concat();
    client.send_bytes(&run("", "PREPARE q AS SELECT 'q'")).await;
    assert_eq!(tags(&client.until_ready().await), "12CZ");
    for name in ["", "named"] {
        stir(&mut other).await;
        client.send_bytes(&run(name, "EXECUTE q")).await;
        assert_eq!(rows(&client.until_ready().await), one("q"));
        stir(&mut other).await;
        client.send_bytes(&[bind("", name, &[]), execute("", 0), sync()].concat()).await;
        assert_eq!(rows(&client.until_ready().await), one("q"), "in a later batch");
    }
    // One prepared by protocol, named in SQL by Parse; and one prepared in SQL, bound by protocol.
    client.send_bytes(&[parse("p", "SELECT 'p'"), sync()].concat()).await.until_ready().await;
    stir(&mut other).await;
    client.send_bytes(&run("", "EXECUTE p")).await;
    assert_eq!(rows(&client.until_ready().await), one("p"));
    stir(&mut other).await;
    client.send_bytes(&[describe(b'S', "q"), bind("", "q", &[]), execute("", 0), sync()].concat()).await;
    let answers = client.until_ready().await;
    assert_eq!((tags(&answers).as_str(), rows(&answers)), ("tT2DCZ", one("q")));
    client.send_bytes(&run("", "PREPARE q AS SELECT 'again'")).await;
    assert_eq!(
        error(&client.until_ready().await),
        ("42P05".into(), "prepared statement \"q\" already exists".into())
    );
    client.send_bytes(&run("", "DEALLOCATE q")).await;
    assert_eq!(tags(&client.until_ready().await), "12CZ");
    client.send_bytes(&run("", "EXECUTE q")).await;
    assert_eq!(error(&client.until_ready().await).0, "26000");
    // All of it in one write, as a pipelining driver has it.
    let all = [parse("", "PREPARE r AS SELECT 'r'"), bind("", "", &[]), execute("", 0), run("", "EXECUTE r")]
        .concat();
    client.send_bytes(&all).await;
    assert_eq!(rows(&client.until_ready().await), one("r"));
}

/// psycopg prepares a text by protocol when it has run it five times, and so does JDBC: "PREPARE s …" as well. The
/// name in such a text was looked up when the text was parsed. Then a second PREPARE met the statement of the
/// first one on the server that had not seen the DEALLOCATE, and EXECUTE and DEALLOCATE went on with the first one.
#[tokio::test]
async fn a_text_prepared_by_protocol_looks_up_its_name_each_time() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let texts = [
        ("make", "PREPARE s AS SELECT 'made by protocol'"),
        ("run", "EXECUTE s"),
        ("drop", "DEALLOCATE s"),
        ("drop none", "DEALLOCATE none"),
    ];
    for (name, sql) in texts {
        client.send_bytes(&[parse(name, sql), sync()].concat()).await.until_ready().await;
    }
    let run = |name: &str| [bind("", name, &[]), execute("", 0), sync()].concat();
    for round in 0..6 {
        // The client's statements meet each of the two servers.
        for step in ["make", "run", "drop"] {
            if (round + step.len()) % 2 == 0 {
                other.query("BEGIN").await;
                client.send_bytes(&run(step)).await;
            } else {
                client.query("SELECT 'goes first, so that the other has the other server'").await;
                client.send_bytes(&run(step)).await;
            }
            let answers = client.until_ready().await;
            assert!(!tags(&answers).contains('E'), "{step} in round {round}: {answers:?}");
            other.query("COMMIT").await;
        }
    }
    // The same name by a simple query, in turn with the text.
    for sql in ["SELECT 'made by a query'", "SELECT 'made by another'"] {
        client.query(&format!("PREPARE s AS {sql}")).await;
        client.send_bytes(&run("run")).await;
        assert_eq!(rows(&client.until_ready().await), one(&sql[8..sql.len() - 1]));
        client.send_bytes(&run("make")).await;
        assert_eq!(
            error(&client.until_ready().await),
            ("42P05".into(), "prepared statement \"s\" already exists".into())
        );
        client.send_bytes(&run("drop")).await;
        assert_eq!(tags(&client.until_ready().await), "2CZ");
        client.send_bytes(&run("run")).await;
        assert_eq!(error(&client.until_ready().await).0, "26000");
    }
    client.send_bytes(&run("drop none")).await;
    assert_eq!(error(&client.until_ready().await).0, "26000");
    client.query("PREPARE none AS SELECT 1").await;
    client.send_bytes(&run("drop none")).await;
    assert_eq!(tags(&client.until_ready().await), "2CZ");
    // All in one batch.
    let portal = |name: &str| [bind("", name, &[]), execute("", 0)].concat();
    let all = [portal("make"), portal("run"), portal("drop"), portal("make"), run("run")].concat();
    client.send_bytes(&all).await;
    assert_eq!(tags(&client.until_ready().await), "2C2DC2C2C2DCZ");
    // The second PREPARE of a batch fails: what the first one prepared stays, and the text is the same afterwards.
    client.query("DEALLOCATE ALL").await;
    let twice = [parse("twice", "PREPARE t AS SELECT 't'"), portal("twice"), run("twice")].concat();
    client.send_bytes(&twice).await;
    assert_eq!(tags(&client.until_ready().await), "12C2EZ");
    client.send_bytes(&run("twice")).await;
    assert_eq!(error(&client.until_ready().await).0, "42P05");
    assert_eq!(rows(&client.query("EXECUTE t").await), one("t"));
}

/// What a PREPARE prepares may leave something behind at each EXECUTE, not before.
#[tokio::test]
async fn what_an_execute_leaves_behind_is_noticed() {
    let proxy = two_servers().await;
    let (client, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    client.run("PREPARE sets AS SELECT set_config('work_mem', '7MB', false)").await;
    client.run("EXECUTE sets").await;
    for _ in 0..2 {
        assert_ne!(other.ask("SHOW work_mem").await, "7MB");
        assert_eq!(client.ask("SHOW work_mem").await, "7MB");
    }
    client.run("PREPARE locks AS SELECT pg_advisory_lock(1)").await;
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 0);
    client.run("EXECUTE locks").await;
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 1);
}

/// A name that is taken, by protocol: PostgreSQL's own error, also where it is another one, and nothing is pinned.
#[tokio::test]
async fn a_taken_name_is_refused_as_postgresql_does() {
    let proxy = two_servers().await;
    let mut client = proxy.wire("acme").await;
    client.send_bytes(&[parse("s", "SELECT 's'"), sync()].concat()).await.until_ready().await;
    for _ in 0..2 {
        client.send_bytes(&[parse("s", "SELECT 2"), sync()].concat()).await;
        let expected = ("42P05".to_owned(), "prepared statement \"s\" already exists".to_owned());
        assert_eq!(error(&client.until_ready().await), expected);
    }
    client.query("BEGIN; SELECT 1/0").await;
    client.send_bytes(&[parse("s", "SELECT 2"), sync()].concat()).await;
    assert_eq!(error(&client.until_ready().await).0, "25P02");
    client.query("ROLLBACK").await;
    client.send_bytes(&[bind("", "s", &[Some("1")]), execute("", 0), sync()].concat()).await;
    let wrong = "bind message supplies 1 parameters, but prepared statement \"s\" requires 0";
    assert_eq!(error(&client.until_ready().await), ("08P01".into(), wrong.into()));
    client.send_bytes(&[bind("", "s", &[]), execute("", 0), sync()].concat()).await;
    assert_eq!(rows(&client.until_ready().await), one("s"));
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 0);
}

/// Behind a Parse that failed, its Bind in the next batch, sent before the answer was there, worked all the same.
#[tokio::test]
async fn a_bind_sent_behind_a_parse_that_fails_is_refused() {
    let proxy = two_servers().await;
    let mut client = proxy.wire("acme").await;
    let run = [bind("", "after", &[]), execute("", 0), sync()].concat();
    let failing = [parse("bad", "SELECT nonsense("), parse("after", "SELECT 'after'"), sync()].concat();
    client.send_bytes(&[failing, run.clone()].concat()).await;
    assert_eq!(error(&client.until_ready().await).0, "42601");
    let expected = ("26000".to_owned(), "prepared statement \"after\" does not exist".to_owned());
    assert_eq!(error(&client.until_ready().await), expected);
    client.send_bytes(&[parse("after", "SELECT 'after'"), sync(), run].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "1Z");
    assert_eq!(rows(&client.until_ready().await), one("after"));
}

/// PostgreSQL's own tests `prepare`, `plancache` and that of pruned partitions look at what is prepared, or run it in a function by
/// its name; they found names of the proxy's.
#[tokio::test]
async fn the_first_who_uses_a_name_has_it_on_servers_and_nobody_else_meets_it_there() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let run = "CREATE FUNCTION run(sql text) RETURNS text LANGUAGE plpgsql AS
               $$ DECLARE found text; BEGIN EXECUTE sql INTO found; RETURN found; END $$";
    client.query(run).await;
    let look = "SELECT name, statement, from_sql FROM pg_prepared_statements";
    let (by_name, by_code) = ("EXECUTE q", "SELECT run('EXECUTE q')");
    client.query("PREPARE q AS SELECT 'mine' ;").await;
    let mine = [["q", "PREPARE q AS SELECT 'mine' ;", "t"].map(|text| Some(text.to_owned()))];

    for _ in 0..2 {
        assert_eq!(rows(&client.query(look).await), mine);
        assert_eq!(rows(&client.query(by_code).await), one("mine"));
        // The same server, and nothing of that name.
        assert_eq!(error(&other.query(by_code).await).0, "26000");
        assert_eq!(error(&other.query(by_name).await).0, "26000");
        other.send_bytes(&[bind("", "q", &[]), execute("", 0), sync()].concat()).await;
        assert_eq!(error(&other.until_ready().await).0, "26000");
        other.send_bytes(&[describe(b'S', "q"), sync()].concat()).await;
        assert_eq!(error(&other.until_ready().await).0, "26000");
        assert_eq!(error(&other.query("DEALLOCATE q").await).0, "26000");
        assert_eq!(rows(&other.query(look).await).len(), 0);
    }
    // Whoever comes second has one of our names there.
    assert_eq!(tags(&other.query("PREPARE q AS SELECT 'other'").await), "CZ");
    for _ in 0..2 {
        assert_eq!(rows(&other.query(by_name).await), one("other"));
        assert_eq!(rows(&client.query(by_name).await), one("mine"));
    }
    let long = "a_name_that_is_longer_than_any_of_ours";
    client.query(&format!("PREPARE {long} AS SELECT 'long'")).await;
    assert_eq!(rows(&client.query(look).await).len(), 2);
    assert_eq!(tags(&client.query(&format!("DEALLOCATE {long}")).await), "CZ");
    // And a name that was given back can be taken, by the same or by another.
    assert_eq!(tags(&client.query("DEALLOCATE q").await), "CZ");
    assert_eq!(error(&client.query(by_code).await).0, "26000");
    assert_eq!(tags(&client.query("PREPARE q AS SELECT 'again'").await), "CZ");
    assert_eq!(rows(&client.query(by_code).await), one("again"));
    client.query("DISCARD ALL").await;
    other.query("DEALLOCATE q").await;
    assert_eq!(tags(&other.query("PREPARE q AS SELECT 'taken over'").await), "CZ");
    assert_eq!(rows(&other.query(by_code).await), one("taken over"));
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 0);
}

/// It did: other clients' statements were gone (26000), and what a session had set could not be set any more (its end).
#[tokio::test]
async fn code_that_deallocates_everything_takes_nothing_from_others() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let maker =
        "CREATE FUNCTION tidy() RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE ''DEALLOCATE ALL''; END'";
    other.query(maker).await;
    let run = |name| [bind("", name, &[]), execute("", 0), sync()].concat();
    for tidies in ["DO 'BEGIN EXECUTE ''DEALLOCATE ALL''; END'", "SELECT tidy()"] {
        client.query("SET work_mem = '7MB'").await;
        other.query("SET work_mem = '9MB'").await;
        client.send_bytes(&[parse("mine", "SELECT 1"), run("mine")].concat()).await.until_ready().await;
        other.send_bytes(&[parse("its", "SELECT 2"), run("its")].concat()).await.until_ready().await;

        // Again and again: our own question is kept prepared then, and gone as well.
        for _ in 0..4 {
            assert_eq!(tags(&other.query(tidies).await).chars().last(), Some('Z'));
        }

        assert_eq!(rows(&client.send_bytes(&run("mine")).await.until_ready().await), one("1"));
        assert_eq!(rows(&client.query("SHOW work_mem").await), one("7MB"));
        // Its own are gone, as PostgreSQL has it.
        let answers = other.send_bytes(&run("its")).await.until_ready().await;
        assert_eq!(answers[0].sqlstate(), "26000", "{tidies}");
        assert_eq!(rows(&other.query("SHOW work_mem").await), one("9MB"));
        client.send_bytes(&[close(b'S', "mine"), sync()].concat()).await.until_ready().await;
    }
}

/// Where another session's statements had been shown under their own names, the next session that read the list found
/// none of its own: closing the others began a batch, in which nothing may be prepared.
#[tokio::test]
async fn sessions_that_read_the_list_of_statements_in_turn_see_their_own() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("PREPARE first AS SELECT 1").await;
    other.run("PREPARE second AS SELECT 2").await;
    let list = "SELECT string_agg(name, ',' ORDER BY name) FROM pg_prepared_statements WHERE from_sql";
    for _ in 0..3 {
        assert_eq!(one.ask(list).await, "first");
        assert_eq!(other.ask(list).await, "second");
    }
    assert_eq!(other.ask("EXECUTE second").await, "2");
}

/// What was sent behind a PREPARE that failed ran a statement that does not exist, and wrote its row.
#[tokio::test]
async fn what_is_sent_behind_a_prepare_that_fails_finds_no_statement() {
    let comparison =
        Comparison::start(2, "CREATE TABLE written (n int); GRANT ALL ON written TO PUBLIC").await;
    let query = |sql: &str| message(b'Q', &c_string(sql));
    let run = [bind("", "q", &[]), execute("", 0), sync()].concat();
    let described = [describe(b'S', "q"), sync()].concat();
    let text = [parse("", "EXECUTE q"), bind("", "", &[]), execute("", 0), sync()].concat();
    let prepare = "PREPARE q AS INSERT INTO written VALUES (1)";
    let failing = [
        vec![query(&format!("SELECT 1/0; {prepare}"))],
        vec![query(&format!("{prepare}; SELECT 1/0"))],
        vec![query("PREPARE q AS SELECT nope")],
        vec![query("BEGIN"), query("SELECT 1/0"), query(prepare), query("ROLLBACK")],
        vec![query(prepare), query("DEALLOCATE q; SELECT 1/0")],
        vec![query(prepare), query("SELECT 1/0; DEALLOCATE q")],
    ];
    for failing in failing {
        for behind in [query("EXECUTE q"), run.clone(), described.clone(), text.clone(), query(prepare)] {
            let mut twin = comparison.twin("").await;
            let bytes = [failing.concat(), behind].concat();
            twin.direct.send_bytes(&bytes).await;
            twin.proxied.send_bytes(&bytes).await;
            for _ in 0..=failing.len() {
                let [direct, proxied] = [twin.direct.until_ready().await, twin.proxied.until_ready().await];
                let told = |answers: &[Message]| {
                    let errors = answers.iter().filter(|answer| answer.tag == b'E');
                    (tags(answers), errors.map(|error| error.field(b'M')).collect::<Vec<_>>())
                };
                assert_eq!(told(&proxied), told(&direct), "{}", String::from_utf8_lossy(&bytes));
            }
        }
    }
}

/// A server closes statements that are too many, but none that the message at hand needs: neither one of several
/// names in a text, nor the one that a Bind names beside the one in its text.
#[tokio::test]
async fn no_statement_is_evicted_that_the_same_message_needs() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).config("max_prepared_statements", "1").start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.query("PREPARE a AS SELECT 'a'").await;
    client.query("PREPARE b AS SELECT 'b'").await;
    client.send_bytes(&[parse("runs_a", "EXECUTE a"), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "1Z");
    for _ in 0..3 {
        let both = client.query("EXECUTE b; EXECUTE a").await;
        assert_eq!(tags(&both), "TDCTDCZ", "{both:?}");
        stir(&mut other).await;
        client.send_bytes(&[bind("", "runs_a", &[]), execute("", 0), sync()].concat()).await;
        let answers = client.until_ready().await;
        assert_eq!(tags(&answers), "2DCZ", "{answers:?}");
        stir(&mut other).await;
    }
    assert_eq!(tags(&client.query("DEALLOCATE b; DEALLOCATE a").await), "CCZ");
    assert_eq!(error(&client.query("EXECUTE a").await).0, "26000");
}

/// PostgreSQL keeps 63 bytes of a statement's name, by whichever way it is told.
#[tokio::test]
async fn names_longer_than_63_bytes_mean_what_they_mean_to_postgresql() {
    let comparison = Comparison::start(2, "").await;
    let mut twin = comparison.twin("").await;
    let mut other = comparison.proxy.wire("acme").await;
    let query = |sql: String| message(b'Q', &c_string(&sql));
    let same = |tail: &str| format!("{}{tail}", "n".repeat(63));
    // The last character that fits begins at the 63rd byte, and a query cuts before it, a Parse within it.
    let cut = |tail: &str| format!("{}ä{tail}", "n".repeat(62));
    let run = |name: &str| [bind("", name, &[]), execute("", 0), sync()].concat();
    let steps = [
        [parse(&same("one"), "SELECT 'protocol'"), sync()].concat(),
        run(&same("another")),
        query(format!("EXECUTE {}", same("_third"))),
        [describe(b'S', &same("x")), sync()].concat(),
        [parse(&same("two"), "SELECT 2"), sync()].concat(),
        run(&same("")),
        [close(b'S', &same("three")), sync()].concat(),
        run(&same("one")),
        query(format!("PREPARE {} AS SELECT 'sql'", same("one"))),
        run(&same("more")),
        query(format!("DEALLOCATE {}", same("yet_another"))),
        run(&same("one")),
        query(format!("PREPARE {} AS SELECT 'sql'", cut("one"))),
        run(&cut("one")),
        run(&"n".repeat(62)),
        query(format!("EXECUTE \"{}\"", cut(""))),
        [parse(&cut(""), "SELECT 'cut'"), sync()].concat(),
        run(&cut("two")),
        query(format!("DEALLOCATE {}", cut("three"))),
        run(&cut("")),
    ];
    for (at, bytes) in steps.iter().enumerate() {
        let told = async |wire: &mut Wire| {
            wire.send_bytes(bytes).await;
            let mut answers = wire.until_ready().await;
            // That a name in a query is truncated: the proxy's name is shorter.
            answers.retain(|answer| answer.tag != b'N');
            let errors = answers.iter().filter(|answer| answer.tag == b'E');
            let errors: Vec<_> = errors.map(|error| (error.sqlstate(), error.field(b'M'))).collect();
            (tags(&answers), rows(&answers), errors)
        };
        let (direct, proxied) = (told(&mut twin.direct).await, told(&mut twin.proxied).await);
        assert_eq!(proxied, direct, "step {at}: {}", String::from_utf8_lossy(bytes));
        stir(&mut other).await;
    }
}
