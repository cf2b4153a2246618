//! Bytes between one client and the servers it borrows: in order, whole, and only its own, whatever the client sends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    client::in_time,
    wire::{
        self, Message, batch, bind, c_string, close, describe, execute, flush, message, parse, rows, sync,
        tags,
    },
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn one_server() -> Proxy {
    Proxy::with_tenant("acme").pool_size(1).start().await
}

fn one(value: impl ToString) -> Vec<Vec<Option<String>>> {
    vec![vec![Some(value.to_string())]]
}

fn error(answers: &[Message]) -> String {
    let found = answers.iter().find(|message| message.tag == b'E');
    found.unwrap_or_else(|| panic!("no error in {answers:?}")).sqlstate()
}

/// pgagroal#142: `select 6` was answered with 5. Here every client sends a hundred questions before it reads an answer.
#[tokio::test]
async fn pipelined_transactions_are_answered_in_order_and_each_to_its_own_client() {
    let proxy = one_server().await;
    let mut clients = Vec::new();
    for number in 0..4 {
        let mut client = proxy.wire("acme").await;
        let questions: Vec<u8> = (0..100)
            .flat_map(|round| match round % 3 {
                0 => batch(&format!("SELECT '{number}/{round}'")),
                1 => message(b'Q', &c_string(&format!("SELECT '{number}/{round}'"))),
                _ => message(b'Q', &c_string(&format!("BEGIN; SELECT '{number}/{round}'; COMMIT"))),
            })
            .collect();
        client.send_bytes(&questions).await;
        clients.push(client);
    }
    for (number, client) in clients.iter_mut().enumerate() {
        for round in 0..100 {
            assert_eq!(rows(&client.until_ready().await), one(format!("{number}/{round}")));
        }
    }
}

/// Any split of the stream gives the same answers: a client whose every byte comes alone, while others use the server.
#[tokio::test]
async fn a_client_that_sends_byte_by_byte_is_answered_and_holds_no_server_meanwhile() {
    let proxy = one_server().await;
    let (mut slow, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let questions = [message(b'Q', &c_string("SELECT 'slow'")), batch("SELECT 'slow'")].concat();
    for (at, byte) in questions.iter().enumerate() {
        slow.send_bytes(&[*byte]).await;
        if at % 7 == 0 && at < 18 {
            assert_eq!(rows(&other.query("SELECT 'other'").await), one("other"));
        }
    }
    for _ in 0..2 {
        assert_eq!(rows(&slow.until_ready().await), one("slow"));
    }
}

/// asyncmy#103, tiberius#300: the beginning of the next message is there when a transaction ends.
#[tokio::test]
async fn half_a_message_behind_a_transaction_waits_for_its_other_half() {
    let proxy = one_server().await;
    let (mut half, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let second = message(b'Q', &c_string("SELECT 'second'"));
    for cut in [1, 3, 5, 6, second.len() - 1] {
        half.send_bytes(&[&message(b'Q', &c_string("SELECT 'first'")), &second[..cut]].concat()).await;
        assert_eq!(rows(&half.until_ready().await), one("first"));
        assert_eq!(rows(&other.query("SELECT 'other'").await), one("other"), "cut at {cut}");
        half.send_bytes(&second[cut..]).await;
        assert_eq!(rows(&half.until_ready().await), one("second"));
    }
}

/// pgdog#164: Parse, Describe, Flush and no Sync: the server must not be given back inside an implicit transaction.
#[tokio::test]
async fn a_batch_without_sync_keeps_its_server() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.send_bytes(&[parse("s", "SELECT 'mine'"), describe(b'S', "s"), flush()].concat()).await;
    assert_eq!(tags(&client.until(b'T').await), "1tT");
    other.send(b'Q', &c_string("SELECT 'other'")).await;
    client.send_bytes(&[bind("", "s", &[]), execute("", 0), flush()].concat()).await;
    assert_eq!(rows(&client.until(b'C').await), one("mine"));
    client.send_bytes(&sync()).await;
    assert_eq!(tags(&client.until_ready().await), "Z");
    assert_eq!(rows(&other.until_ready().await), one("other"));
}

/// pgcat#137, pg_doorman 3.1.8: what stood behind an error in a batch was remembered as if it had been done.
#[tokio::test]
async fn an_error_in_mid_pipeline_skips_to_its_own_sync_and_what_was_skipped_is_not_remembered() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client
        .send_bytes(
            &[
                parse("before", "SELECT 'before'"),
                parse("bad", "SELECT nonsense("),
                parse("after", "SELECT 'after'"),
                bind("", "before", &[]),
                execute("", 0),
                sync(),
                bind("", "before", &[]),
                execute("", 0),
                sync(),
            ]
            .concat(),
        )
        .await;
    assert_eq!(tags(&client.until_ready().await), "1EZ");
    assert_eq!(rows(&client.until_ready().await), one("before"));
    client
        .send_bytes(
            &[
                bind("", "after", &[]),
                execute("", 0),
                sync(),
                parse("after", "SELECT 'after'"),
                sync(),
                bind("", "after", &[]),
                execute("", 0),
                sync(),
            ]
            .concat(),
        )
        .await;
    assert_eq!(error(&client.until_ready().await), "26000");
    assert_eq!(tags(&client.until_ready().await), "1Z");
    assert_eq!(rows(&client.until_ready().await), one("after"));
    other.query("DISCARD ALL").await;
    client.send_bytes(&[bind("", "after", &[]), execute("", 0), sync()].concat()).await;
    assert_eq!(rows(&client.until_ready().await), one("after"));
}

/// The Parse put in front of a simple EXECUTE failed, the server skipped the query, and everybody waited for ever.
#[tokio::test]
async fn an_execute_in_sql_of_what_cannot_be_prepared_any_more_is_refused() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.query("CREATE TABLE t (x int)").await;
    client.send_bytes(&[parse("s", "SELECT x FROM t"), sync()].concat()).await.until_ready().await;
    other.query("DISCARD ALL").await;
    client.query("BEGIN").await;
    client.query("SELECT 1/0").await;
    assert_eq!(error(&client.query("EXECUTE s").await), "25P02");
    client.query("ROLLBACK").await;
    assert_eq!(tags(&client.query("EXECUTE s").await), "TCZ");
    other.query("DROP TABLE t").await;
    other.query("DISCARD ALL").await;
    assert_eq!(error(&client.query("EXECUTE s").await), "42P01", "why it cannot be brought there");
    assert_eq!(rows(&other.query("SELECT 'other'").await), one("other"));
}

/// pg_doorman 22e21034: eviction's own Close was left unread. One statement per server, three per client.
#[tokio::test]
async fn statements_are_evicted_and_come_back_without_the_client_noticing() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).config("max_prepared_statements", "1").start().await;
    let (mut one_client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    for client in [&mut one_client, &mut other] {
        for name in ["a", "b", "c"] {
            client.send_bytes(&[parse(name, &format!("SELECT '{name}', $1::text")), sync()].concat()).await;
            assert_eq!(tags(&client.until_ready().await), "1Z");
        }
    }
    for _ in 0..5 {
        for client in [&mut one_client, &mut other] {
            let all: Vec<u8> = ["c", "a", "b"]
                .iter()
                .flat_map(|name| [bind("", name, &[Some("x")]), execute("", 0)].concat())
                .collect();
            client.send_bytes(&[all, sync()].concat()).await;
            let answers = client.until_ready().await;
            assert_eq!(tags(&answers), "2DC2DC2DCZ");
            let names: Vec<_> = rows(&answers).into_iter().map(|row| row[0].clone().unwrap()).collect();
            assert_eq!(names, ["c", "a", "b"]);
            client.send_bytes(&[describe(b'S', "a"), close(b'S', "none"), sync()].concat()).await;
            assert_eq!(tags(&client.until_ready().await), "tT3Z");
        }
    }
}

/// A portal that is fetched in parts lives as long as its transaction.
#[tokio::test]
async fn a_portal_is_fetched_in_parts() {
    let proxy = one_server().await;
    let mut client = proxy.wire("acme").await;
    client.query("BEGIN").await;
    client
        .send_bytes(&[parse("", "SELECT generate_series(1, 5)"), bind("p", "", &[]), sync()].concat())
        .await;
    assert_eq!(tags(&client.until_ready().await), "12Z");
    for expected in ["DDsZ", "DDsZ", "DCZ"] {
        client.send_bytes(&[execute("p", 2), sync()].concat()).await;
        assert_eq!(tags(&client.until_ready().await), expected);
    }
    client.query("COMMIT").await;
    client.send_bytes(&[execute("p", 2), sync()].concat()).await;
    assert_eq!(error(&client.until_ready().await), "34000");
}

/// Function calls are old, and drivers use them for large objects.
#[tokio::test]
async fn a_function_call_is_answered() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let abs = 1397u32; // abs(int4)
    let mut body = abs.to_be_bytes().to_vec();
    body.extend([0, 1, 0, 1, 0, 1]); // one format: binary; one argument
    body.extend([0, 0, 0, 4]);
    body.extend((-7i32).to_be_bytes());
    body.extend([0, 1]);
    client.send(b'F', &body).await;
    let answers = client.until_ready().await;
    assert_eq!(tags(&answers), "VZ");
    assert!(answers[0].body.ends_with(&7i32.to_be_bytes()));
    client.send(b'F', &[&0u32.to_be_bytes()[..], &[0; 6]].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "EZ");
    // What a function of that name leaves behind nobody can tell: the server stays with its client until it goes.
    client.send(b'X', b"").await.until_end().await;
    assert_eq!(rows(&other.query("SELECT 1").await), one(1));
}

#[tokio::test]
async fn notices_and_many_results_come_in_order() {
    let proxy = one_server().await;
    let mut client = proxy.wire("acme").await;
    let sql = "SELECT 1; DO $$ BEGIN RAISE NOTICE 'between'; END $$; ; SELECT 2; SELECT 1/0; SELECT 3";
    let answers = client.query(sql).await;
    assert_eq!(tags(&answers), "TDCNCTDCEZ");
    assert_eq!(tags(&client.query("").await), "IZ");
}

/// A server with a lost client, a stray message, a lie: each time the next client must find a clean server at once.
#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_told_and_harms_nobody() {
    let proxy = one_server().await;
    let query = message(b'Q', &c_string("SELECT 1"));
    let breaches: [(&str, Vec<u8>); 8] = [
        ("an unknown type", message(b'!', b"hello")),
        ("type zero", message(0, b"")),
        ("a server's type", message(b'Z', b"I")),
        ("a password after login", message(b'p', b"secret\0")),
        ("a length below four", vec![b'Q', 0, 0, 0, 3]),
        ("a length of zero", vec![b'S', 0, 0, 0, 0]),
        ("a negative length", vec![b'Q', 0xff, 0xff, 0xff, 0xff]),
        ("a Sync of two gigabytes", vec![b'S', 0x7f, 0xff, 0xff, 0xff]),
    ];
    for (what, breach) in breaches {
        for begin in [&b""[..], &message(b'Q', &c_string("BEGIN"))] {
            let mut client = proxy.wire("acme").await;
            if !begin.is_empty() {
                client.send_bytes(begin).await.until_ready().await;
            }
            client.send_bytes(&breach).await;
            let answers = client.until_end().await;
            let last = answers.last().unwrap_or_else(|| panic!("no word about {what}"));
            assert_eq!((last.tag, last.sqlstate().as_str()), (b'E', "08P01"), "{what}");
            let mut next = proxy.wire("acme").await;
            next.send_bytes(&query).await;
            assert_eq!(tags(&next.until_ready().await), "TDCZ", "after {what}");
        }
    }
}

/// A body that lies about what is in it is PostgreSQL's to judge, and costs the client its session at most.
#[tokio::test]
async fn a_body_that_lies_is_refused_by_the_server_or_by_us_and_harms_nobody() {
    let proxy = one_server().await;
    let lies: [Vec<u8>; 6] = [
        message(b'Q', b"SELECT 1"),                       // not terminated
        message(b'Q', b"SELECT 1\0SELECT 2\0"),           // two texts
        message(b'P', b"s\0SELECT 1\0\xff\xff"),          // 65535 types, none there
        message(b'B', b"\0\0\0\0\0\x01\x7f\xff\xff\xff"), // a value of two gigabytes, not there
        message(b'E', b"unterminated"),
        message(b'D', b"?x\0"),
    ];
    for lie in lies {
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&[&lie[..], &sync()].concat()).await;
        let answers = client.receive().await;
        assert_eq!(answers.tag, b'E', "{lie:?}: {answers:?}");
        drop(client);
        let mut next = proxy.wire("acme").await;
        assert_eq!(rows(&next.query("SELECT 'next'").await), one("next"));
    }
}

/// PostgreSQL ignores COPY data when no COPY is open; a stray Flush as well. Neither may keep a server.
#[tokio::test]
async fn copy_data_and_flush_out_of_place_are_ignored_and_hold_no_server() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    for stray in [message(b'd', b"data"), message(b'c', b""), message(b'f', b"why\0"), flush()] {
        client.send_bytes(&stray).await;
        assert_eq!(
            rows(&other.query("SELECT 'other'").await),
            one("other"),
            "after a stray {}",
            stray[0] as char
        );
        assert_eq!(rows(&client.query("SELECT 'mine'").await), one("mine"));
    }
    client.send_bytes(&sync()).await;
    assert_eq!(tags(&client.until_ready().await), "Z");
}

/// What was sent before Terminate is done, as PostgreSQL does it.
#[tokio::test]
async fn a_query_with_terminate_right_behind_it_is_done() {
    let proxy = one_server().await;
    let mut other = proxy.wire("acme").await;
    other.query("CREATE TABLE done (x int)").await;
    for number in 0..10 {
        let mut client = proxy.wire("acme").await;
        let insert = format!("INSERT INTO done SELECT {number} FROM pg_sleep(0.01)");
        client.send_bytes(&[message(b'Q', &c_string(&insert)), message(b'X', b"")].concat()).await;
        client.until_end().await;
    }
    assert_eq!(proxy.metric("pglobby_servers_opened_total{tenant=\"acme\"}").await, 1.0, "by one server");
    let mut left_open = proxy.wire("acme").await;
    left_open
        .send_bytes(
            &[message(b'Q', &c_string("BEGIN; INSERT INTO done VALUES (99)")), message(b'X', b"")].concat(),
        )
        .await;
    left_open.until_end().await;
    assert_eq!(rows(&other.query("SELECT count(*) FROM done").await), one(10));
}

/// supavisor: a client that does not read. The proxy's memory must not grow by what the client does not take.
#[tokio::test]
async fn a_large_result_to_a_slow_reader_stays_out_of_memory() {
    let proxy = one_server().await;
    let mut client = proxy.wire("acme").await;
    client.query("SELECT 1").await;
    let before = peak_kb(&proxy);
    client.send(b'Q', &c_string("SELECT repeat('x', 1000) FROM generate_series(1, 200000)")).await;
    // The server is held up by a full socket when it says so itself.
    let behind = proxy.behind("acme").await;
    in_time("a server that waits for its client", async {
        while behind.ask("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'").await
            == "0"
        {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let answers = client.until_ready().await;
    assert_eq!(answers.len(), 200_000 + 3);
    assert!(peak_kb(&proxy) < before + 20_000, "{before} kB became {} kB", peak_kb(&proxy));
}

/// pg_doorman 3.6.3: buffers kept their largest size, and 100 MB grew to 4 GB.
#[tokio::test]
async fn values_of_64_megabytes_pass_in_both_directions_in_bounded_memory() {
    let proxy = one_server().await;
    let mut client = proxy.wire("acme").await;
    client.query("SELECT 1").await;
    let before = peak_kb(&proxy);
    let value = "x".repeat(64 << 20);
    let (mut reading, mut writing) = client.stream.split();
    let question =
        [parse("", "SELECT length($1), $1::text"), bind("", "", &[Some(&value)]), execute("", 0), sync()]
            .concat();
    let expected = 5 + 5 + (5 + 2 + 4 + 8 + 4 + value.len()) + (5 + 9) + 6;
    let mut answer = vec![0; expected];
    let (sent, received) = in_time("64 MB", async {
        tokio::join!(writing.write_all(&question), reading.read_exact(&mut answer))
    })
    .await;
    sent.unwrap();
    received.unwrap();
    assert_eq!((answer[0], answer[5], answer[10], answer[expected - 6]), (b'1', b'2', b'D', b'Z'));
    assert!(answer[10 + 23..][..value.len()].iter().all(|byte| *byte == b'x'));
    assert_eq!(rows(&client.query("SELECT 'after'").await), one("after"));
    assert!(peak_kb(&proxy) < before + 20_000, "{before} kB became {} kB", peak_kb(&proxy));
}

/// The proxy's peak of resident memory.
fn peak_kb(proxy: &Proxy) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A statement too long to be read (`statement_inspect_bytes_max`) still works, by every way of sending it.
#[tokio::test]
async fn statements_longer_than_what_is_read_work_and_stay_their_clients() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let long = format!("SELECT 'long' /* {} */", "x".repeat(3 << 20));
    assert_eq!(rows(&client.query(&long).await), one("long"));
    client.send_bytes(&batch(&long)).await;
    assert_eq!(rows(&client.until_ready().await), one("long"));
    client.send_bytes(&[parse("long", &long), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "1Z");
    other.query("SELECT 1").await;
    for _ in 0..2 {
        client.send_bytes(&[bind("", "long", &[]), execute("", 0), sync()].concat()).await;
        assert_eq!(rows(&client.until_ready().await), one("long"));
        assert_eq!(rows(&other.query("SELECT 'other'").await), one("other"));
    }
    let mut third = Wire::open(proxy.port()).await;
    third.startup(wire::PROTOCOL_3_0, &[]).await;
    assert_eq!(third.until_end().await[0].sqlstate(), "28000");
}

/// While the server was asked what a SET had left behind, what it was notified of went under: lib/pq's listener missed
/// what came right behind its LISTEN.
#[tokio::test]
async fn no_notification_is_lost_while_a_server_is_asked_what_its_client_has_set() {
    const NOTIFICATIONS: usize = 2000;
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let mut listener = proxy.client("acme").connect().await;
    listener.run("LISTEN news").await;
    let notifier = proxy.client("acme").connect().await;
    let notifying = async {
        for number in 0..NOTIFICATIONS {
            notifier.run(&format!("NOTIFY news, '{number}'")).await;
        }
    };
    let setting = async {
        for number in 0..NOTIFICATIONS / 2 {
            listener.run(&format!("SET work_mem = '{}kB'", 1000 + number)).await;
        }
    };
    tokio::join!(notifying, setting);
    for number in 0..NOTIFICATIONS {
        assert_eq!(listener.notification().await.payload(), number.to_string());
    }
}

/// psqlODBC and psycopg (before libpq 17) forget a statement by DEALLOCATE: the name stayed taken (42P05), and the server's
/// copy was gone for every other client that had prepared the same text (26000).
#[tokio::test]
async fn deallocate_forgets_a_statement_for_its_client_and_for_nobody_else() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let prepare = [parse("_PLAN0x1", "SELECT 'same'"), sync()].concat();
    let run = [bind("", "_PLAN0x1", &[]), execute("", 0), sync()].concat();
    for wire in [&mut client, &mut other] {
        wire.send_bytes(&prepare).await;
        assert_eq!(tags(&wire.until_ready().await), "1Z");
    }
    client.query("BEGIN").await;
    assert_eq!(error(&client.query("SELECT 1/0").await), "22012");
    assert_eq!(error(&client.query("DEALLOCATE \"_PLAN0x1\"").await), "25P02");
    client.query("ROLLBACK").await;
    client.send_bytes(&run).await;
    assert_eq!(rows(&client.until_ready().await), one("same"), "a DEALLOCATE that failed");

    assert_eq!(tags(&client.query("SELECT 1; DEALLOCATE \"_PLAN0x1\"").await), "TDCCZ");
    other.send_bytes(&run).await;
    assert_eq!(rows(&other.until_ready().await), one("same"), "the other client's");
    client.send_bytes(&run).await;
    assert_eq!(error(&client.until_ready().await), "26000");
    client.send_bytes(&prepare).await;
    assert_eq!(tags(&client.until_ready().await), "1Z", "the name is free");
    client.send_bytes(&run).await;
    assert_eq!(rows(&client.until_ready().await), one("same"));
}

/// PostgreSQL's own test `prepare` looks into `pg_prepared_statements`, as psycopg's tests do, and found there what the proxy
/// and other clients had prepared on the same server, and not what it had itself prepared on another one.
#[tokio::test]
async fn whoever_looks_at_prepared_statements_finds_its_own_and_nobody_elses() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let look = "SELECT statement FROM pg_prepared_statements ORDER BY prepare_time, statement";
    client.query("SET work_mem = '5MB'").await;
    other.query("SET work_mem = '6MB'").await;
    let prepare = |text| [parse(text, text), sync()].concat();
    other.send_bytes(&prepare("SELECT 'other'")).await.until_ready().await;
    client.send_bytes(&prepare("SELECT 1")).await.until_ready().await;
    client.send_bytes(&prepare("SELECT 2")).await.until_ready().await;
    let mine = ["SELECT 1", "SELECT 2"].map(one).concat();
    assert_eq!(rows(&client.query(look).await), mine);
    // Now on the other server.
    other.query("BEGIN").await;
    assert_eq!(rows(&client.query(look).await), mine);
    client.send_bytes(&[parse("", look), bind("", "", &[]), execute("", 0), sync()].concat()).await;
    assert_eq!(rows(&client.until_ready().await), mine, "by the extended protocol");
    assert_eq!(rows(&other.query(look).await), one("SELECT 'other'"), "within a transaction");
    other.query("COMMIT").await;
    let run = |text| [bind("", text, &[]), execute("", 0), sync()].concat();
    assert_eq!(tags(&other.send_bytes(&run("SELECT 'other'")).await.until_ready().await), "2DCZ");
    assert_eq!(tags(&client.send_bytes(&run("SELECT 2")).await.until_ready().await), "2DCZ");
}

/// A Parse within a batch that has failed made room on the server for nothing: it was thought to have lost the statement,
/// and to prepare it again was refused (42P05).
#[tokio::test]
async fn what_a_failed_batch_would_have_replaced_is_still_there() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let run = [bind("", "a", &[]), execute("", 0), sync()].concat();
    other.send_bytes(&[parse("a", "SELECT 'same'"), run.clone()].concat()).await;
    assert_eq!(tags(&other.until_ready().await), "12DCZ");
    client.query("BEGIN").await;
    client.send_bytes(&[parse("", "SELECT nonsense"), flush()].concat()).await;
    client.until(b'E').await;
    client.send_bytes(&[parse("a", "SELECT 'same'"), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "Z");
    client.query("ROLLBACK").await;
    other.send_bytes(&run).await;
    assert_eq!(rows(&other.until_ready().await), one("same"));
}

/// A second Parse of a name is refused in PostgreSQL's own words. For that the name was taken on the server, where it stayed:
/// the session kept its server for it, and found a statement that it had never prepared.
#[tokio::test]
async fn a_name_that_was_refused_leaves_nothing_on_the_server() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.send_bytes(&[parse("s", "SELECT 1"), sync()].concat()).await.until_ready().await;
    client.send_bytes(&[parse("s", "SELECT 2"), sync()].concat()).await;
    assert_eq!(error(&client.until_ready().await), "42P05");
    // The unnamed statement is none of its business.
    client.send_bytes(&[parse("", "SELECT 'unnamed'"), sync()].concat()).await.until_ready().await;
    client.send_bytes(&[parse("s", "SELECT 2"), sync()].concat()).await.until_ready().await;
    client.send_bytes(&[bind("", "", &[]), execute("", 0), sync()].concat()).await;
    assert_eq!(rows(&client.until_ready().await), one("unnamed"));
    assert_eq!(rows(&client.query("SELECT statement FROM pg_prepared_statements").await), one("SELECT 1"));
    other.send_bytes(&[bind("", "s", &[]), execute("", 0), sync()].concat()).await;
    assert_eq!(error(&other.until_ready().await), "26000", "on the only server");
}

/// `pgbench -M prepared` with more clients than servers and threads waited for itself: a thread that prepares on one
/// connection does not go on with the transactions of its others, which held every server.
#[tokio::test]
async fn a_known_text_is_prepared_without_waiting_for_a_server_and_is_checked_before_its_first_use() {
    let proxy = one_server().await;
    let (mut holder, mut client) = (proxy.wire("acme").await, proxy.wire("acme").await);
    holder.query("CREATE TABLE passing (i int)").await;
    let prepare = [parse("p", "SELECT count(*) FROM passing"), sync()].concat();
    let run = [bind("", "p", &[]), execute("", 0), sync()].concat();
    holder.send_bytes(&prepare).await;
    assert_eq!(tags(&holder.until_ready().await), "1Z");

    holder.query("BEGIN").await;
    client.send_bytes(&[prepare.clone(), run.clone()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "1Z", "while no server is idle");
    holder.query("ALTER TABLE passing ADD j int").await;
    holder.query("COMMIT").await;
    assert_eq!(rows(&client.until_ready().await), one(0));

    holder.query("DEALLOCATE p").await;
    holder.send_bytes(&prepare).await;
    holder.until_ready().await;
    client.query("DEALLOCATE p").await;
    holder.query("BEGIN; DROP TABLE passing").await;
    client.send_bytes(&prepare).await;
    assert_eq!(tags(&client.until_ready().await), "1Z");
    holder.query("COMMIT").await;
    client.send_bytes(&run).await;
    assert_eq!(error(&client.until_ready().await), "42P01", "as the Parse would have had it");
}

/// A changed row replaces the pool; sessions from before kept a table of statements of their own, in which the same numbers
/// meant other statements: a client got the answer to somebody else's.
#[tokio::test]
async fn statements_of_sessions_from_before_and_after_a_pool_was_replaced_are_told_apart() {
    let proxy = one_server().await;
    let prepare = |word: &str| [parse("s", &format!("SELECT '{word}'")), sync()].concat();
    let run = [bind("", "s", &[]), execute("", 0), sync()].concat();
    let mut before = proxy.wire("acme").await;
    before.query("SELECT 1").await;
    proxy.command(&["tenant", "set", "acme", "statement_timeout=77s"]);
    in_time("the new pool", async {
        while rows(&before.query("SHOW statement_timeout").await) != one("77s") {}
    })
    .await;
    let mut after = proxy.wire("acme").await;
    for (client, word) in [(&mut before, "before"), (&mut after, "after")] {
        client.send_bytes(&prepare(word)).await;
        assert_eq!(tags(&client.until_ready().await), "1Z");
    }
    for (client, word) in [(&mut before, "before"), (&mut after, "after")] {
        client.send_bytes(&run).await;
        assert_eq!(rows(&client.until_ready().await), one(word));
    }
}

/// A Bind that was skipped behind an error was to find no unnamed statement; the Close that was put in front of it, against
/// what another client had left there, was skipped as well. The next Bind ran the other client's statement.
#[tokio::test]
async fn an_unnamed_statement_is_nobody_elses_after_an_error_either() {
    let proxy = one_server().await;
    let (mut owner, mut stranger) = (proxy.wire("acme").await, proxy.wire("acme").await);
    owner.send_bytes(&[parse("", "SELECT 'the owner''s'"), sync()].concat()).await.until_ready().await;

    stranger.send_bytes(&[bind("", "none", &[]), bind("", "", &[]), sync()].concat()).await;
    assert_eq!(tags(&stranger.until_ready().await), "EZ");
    stranger.send_bytes(&[bind("", "", &[]), execute("", 0), sync()].concat()).await;
    let answers = stranger.until_ready().await;

    assert_eq!((tags(&answers).as_str(), answers[0].sqlstate().as_str()), ("EZ", "26000"));
    owner.send_bytes(&[bind("", "", &[]), execute("", 0), sync()].concat()).await;
    assert_eq!(tags(&owner.until_ready().await), "2DCZ");
}

/// pgjdbc puts `Q SAVEPOINT` into a batch. If the batch had failed before, the server went to somebody else while it still
/// skipped to the Sync: that one's query was swallowed, and the rest of the failed batch ran on another server.
#[tokio::test]
async fn a_failed_batch_keeps_its_server_until_its_sync_also_with_a_query_in_it() {
    let proxy = one_server().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let failing = [
        [parse("", "SELECT 1/0"), bind("", "", &[]), execute("", 0)].concat(),
        [bind("", "nobody's", &[]), execute("", 0)].concat(),
        parse("", "SELECT nonsense"),
    ];
    let (query, call) =
        (message(b'Q', &c_string("SELECT 5")), message(b'F', &[0, 0, 0x06, 0xEC, 0, 0, 0, 0, 0, 0]));
    for failing in &failing {
        for skipped in [&query, &call] {
            client.send_bytes(&[&failing[..], skipped].concat()).await;
            client.until(b'E').await;
            other.send_bytes(&batch("SELECT 7")).await;
            client.send_bytes(&[&query[..], &batch("SELECT 42")].concat()).await;
            assert_eq!(tags(&client.until_ready().await), "Z");
            assert_eq!(rows(&other.until_ready().await), one(7));
            assert_eq!(rows(&client.query("SELECT 8").await), one(8));
        }
    }
}
