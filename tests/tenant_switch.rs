//! One application pool for all tenants: a service login's session chooses its tenant by SQL, and nothing that was meant
//! for one tenant ever runs at another.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Client, Proxy, Wire,
    client::{in_time, sqlstate},
    wire::{
        Message, batch, bind, c_string, close, describe, execute, flush, message, parse, rows, sync, tags,
    },
};

const PASSWORD: &str = "one for all";

/// Two tenants, a third that is not granted, and a service login for the two; each database knows its own name.
async fn start_proxy() -> Proxy {
    lobby_of(Proxy::with_tenant("acme")).await
}

async fn lobby_of(builder: support::proxy::Builder) -> Proxy {
    let proxy = builder.and_tenant("beta").and_tenant("gamma").config("worker_threads", "2").start().await;
    proxy.create_login("api", PASSWORD, &["--service", "--tenants", "acme,beta"]);
    for tenant in ["acme", "beta", "gamma"] {
        let client = proxy.client(tenant).connect().await;
        client.run(&format!("CREATE TABLE here (name text); INSERT INTO here VALUES ('{tenant}')")).await;
    }
    proxy
}

/// A session that has chosen no tenant.
async fn api(proxy: &Proxy) -> Client {
    proxy.caller("api", PASSWORD, "api").connect().await
}

async fn api_wire(proxy: &Proxy) -> Wire {
    Wire::login(proxy.port(), "api", PASSWORD, "api").await
}

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

fn one(value: impl ToString) -> Vec<Vec<Option<String>>> {
    vec![vec![Some(value.to_string())]]
}

fn error(answers: &[Message]) -> String {
    let found = answers.iter().find(|message| message.tag == b'E');
    found.unwrap_or_else(|| panic!("no error in {answers:?}")).sqlstate()
}

const WHERE: &str = "SELECT name FROM here";

#[tokio::test]
async fn a_session_goes_where_it_says_and_back() {
    let proxy = start_proxy().await;
    let client = api(&proxy).await;
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "");
    for (choice, tenant) in [
        ("SET pglobby.tenant = 'acme'", "acme"),
        ("SET pglobby.tenant TO beta", "beta"),
        ("SELECT set_config('pglobby.tenant', 'acme', false)", "acme"),
        ("SET SESSION pglobby.tenant = \"beta\"", "beta"),
    ] {
        client.run(choice).await;
        assert_eq!(client.ask(WHERE).await, tenant, "{choice}");
        assert_eq!(client.ask("SHOW pglobby.tenant").await, tenant);
        assert_eq!(client.ask("SELECT current_setting('pglobby.tenant')").await, tenant);
        let shown = proxy.console().await.ask_all("SHOW CLIENTS").await;
        let databases: Vec<_> = shown.iter().filter(|row| row[1].as_deref() == Some("api")).collect();
        assert_eq!(databases[0][2].as_deref(), Some(tenant), "the session is shown where it is");
    }
    client.run("RESET pglobby.tenant").await;
    assert_eq!(client.refusal_of(WHERE).await, "55000");
}

/// An employee is told the tenant as everybody is, and can never go elsewhere, however the choice is spelled.
#[tokio::test]
async fn an_employee_never_switches() {
    never_switches(&start_proxy().await).await;
}

/// Where nobody reads the texts of those who may not choose, a choice was a SET without effect, and without an error.
#[tokio::test]
async fn an_employee_never_switches_in_session_mode_either() {
    never_switches(&lobby_of(Proxy::with_tenant("acme").pool_mode("session")).await).await;
}

async fn never_switches(proxy: &Proxy) {
    let client = proxy.client("acme").connect().await;
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "acme");
    for sql in [
        "SET pglobby.tenant = 'beta'",
        "SET LOCAL pglobby.tenant = 'beta'",
        "RESET pglobby.tenant",
        "SELECT 1; SET pglobby.tenant = 'beta'; SELECT 2",
        "SELECT set_config('pglobby.tenant', 'beta', false)",
        "SELECT set_config('PGLOBBY.TENANT', 'beta', true)",
        "PREPARE p AS SELECT set_config('pglobby.tenant', 'beta', false)",
        "set session \"pglobby\".\"tenant\" to beta",
    ] {
        assert_eq!(client.refusal_of(sql).await, "42501", "{sql}");
    }
    assert_eq!(sqlstate(&client.prepare("SET pglobby.tenant = 'beta'").await.unwrap_err()), "42501");
    assert_eq!(client.ask(WHERE).await, "acme");
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "acme");
}

#[tokio::test]
async fn an_unknown_tenant_and_one_that_is_not_granted_answer_alike() {
    let proxy = start_proxy().await;
    let client = api(&proxy).await;
    let said = async |tenant: &str| {
        let error = client.try_run(&format!("SET pglobby.tenant = '{tenant}'")).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        (error.code().code().to_owned(), error.message().replace(tenant, "X"))
    };
    let unknown = said("nobody").await;
    assert_eq!(unknown.0, "42501");
    assert_eq!(unknown, said("gamma").await);
    assert_eq!(unknown, said("a; DROP TABLE here").await);
    client.run("SET pglobby.tenant = 'acme'").await;
    assert_eq!(said("gamma").await, unknown);
    assert_eq!(client.ask(WHERE).await, "acme", "a choice that is refused changes nothing");
}

#[tokio::test]
async fn without_a_choice_everything_else_is_refused_in_words_that_help() {
    let proxy = start_proxy().await;
    let client = api(&proxy).await;
    let error = client.try_run(WHERE).await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "55000");
    assert!(error.message().contains("SET pglobby.tenant = "), "{}", error.message());
    assert_eq!(sqlstate(&client.query("SELECT $1::int", &[&1i32]).await.unwrap_err()), "55000");
    assert_eq!(client.ask("SELECT 1").await, "1");
    let one: i32 = client.query_one("SELECT 1", &[]).await.unwrap().get(0);
    assert_eq!(one, 1);
    client.run("").await;
    client.run("SET application_name = 'shop'; ").await;
    client.run("BEGIN; ").await;
    client.run("ROLLBACK").await;
    client.run("SET pglobby.tenant = 'acme'").await;
    assert_eq!(client.ask("SHOW application_name").await, "shop", "what was set before is kept");
}

/// What drivers do for `execute("SET …")` and for a bound parameter: Parse, Describe, Sync; then Bind, Execute, Sync.
#[tokio::test]
async fn drivers_choose_by_the_extended_protocol() {
    let proxy = start_proxy().await;
    let client = api(&proxy).await;
    let which = "SELECT set_config('pglobby.tenant', $1, false)";
    let choose = client.prepare(which).await.unwrap();
    for tenant in ["acme", "beta", "acme"] {
        let set: String = client.query_one(&choose, &[&tenant]).await.unwrap().get(0);
        assert_eq!(set, tenant);
        let name: String = client.query_one(WHERE, &[]).await.unwrap().get(0);
        assert_eq!(name, tenant);
    }
    client.execute("SET pglobby.tenant = 'beta'", &[]).await.unwrap();
    let name: String = client.query_one("SHOW pglobby.tenant", &[]).await.unwrap().get(0);
    assert_eq!(name, "beta");
    assert_eq!(sqlstate(&client.query(&choose, &[&"gamma"]).await.unwrap_err()), "42501");
    assert_eq!(client.ask(WHERE).await, "beta");
}

/// A statement that was prepared at one tenant runs at the next, and the first never hears of it.
#[tokio::test]
async fn prepared_statements_and_settings_follow() {
    let proxy = start_proxy().await;
    let client = api(&proxy).await;
    client.run("SET pglobby.tenant = 'acme'").await;
    client.run("SET work_mem = '5MB'").await;
    client.run("SET my.id = '7'").await;
    let statement = client.prepare("UPDATE here SET name = name || $1 RETURNING name").await.unwrap();
    let run = async || client.query_one(&statement, &[&"!"]).await.unwrap().get::<_, String>(0);
    assert_eq!(run().await, "acme!");
    client.run("SET pglobby.tenant = 'beta'").await;
    assert_eq!(run().await, "beta!");
    assert_eq!(run().await, "beta!!");
    assert_eq!(client.ask("SHOW work_mem").await, "5MB");
    assert_eq!(client.ask("SHOW my.id").await, "7");
    assert_eq!(proxy.client("acme").ask(WHERE).await, "acme!");
    client.run("SET pglobby.tenant = 'acme'").await;
    assert_eq!(run().await, "acme!!");
}

#[tokio::test]
async fn set_local_chooses_the_tenant_of_one_transaction() {
    let proxy = start_proxy().await;
    let client = api(&proxy).await;
    for tenant in ["acme", "beta", "acme"] {
        client.run("BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY").await;
        client.run(&format!("SET LOCAL pglobby.tenant = '{tenant}'")).await;
        assert_eq!(client.ask(WHERE).await, tenant);
        assert_eq!(client.ask("SHOW transaction_isolation").await, "serializable");
        assert_eq!(client.ask("SHOW transaction_read_only").await, "on");
        client.run("COMMIT").await;
        assert_eq!(client.refusal_of(WHERE).await, "55000", "over with the transaction");
    }
    client.run("SET pglobby.tenant = 'beta'").await;
    client.run("START TRANSACTION").await;
    client.run("SET LOCAL pglobby.tenant = 'acme'").await;
    client.run("INSERT INTO here VALUES ('lost')").await;
    client.run("ROLLBACK").await;
    assert_eq!(client.ask(WHERE).await, "beta");
    assert_eq!(client.refusal_of("SET LOCAL pglobby.tenant = 'acme'").await, "25P01");
    client.run("BEGIN").await;
    client.run("COMMIT").await;
    client.run("BEGIN").await;
    assert_eq!(client.refusal_of("SET pglobby.tenant = 'acme'").await, "25001");
    assert_eq!(client.refusal_of(WHERE).await, "25P02", "an error fails the transaction here as well");
    client.run("ROLLBACK").await;
    assert_eq!(client.ask(WHERE).await, "beta");
    assert_eq!(proxy.client("acme").ask("SELECT count(*) FROM here").await, "1");
}

#[tokio::test]
async fn once_a_server_has_begun_the_transaction_it_is_too_late() {
    let proxy = start_proxy().await;
    let client = api(&proxy).await;
    client.run("SET pglobby.tenant = 'acme'").await;
    for sql in ["SET LOCAL pglobby.tenant = 'beta'", "SET pglobby.tenant = 'beta'", "RESET pglobby.tenant"] {
        client.run("BEGIN").await;
        client.run(WHERE).await;
        assert_eq!(client.refusal_of(sql).await, "25001", "{sql}");
        assert_eq!(client.refusal_of(WHERE).await, "25P02");
        client.run("ROLLBACK").await;
        assert_eq!(client.ask(WHERE).await, "acme");
    }
    let choose = client.prepare("SELECT set_config('pglobby.tenant', $1, true)").await.unwrap();
    client.run("BEGIN").await;
    client.run(WHERE).await;
    assert_eq!(sqlstate(&client.query(&choose, &[&"beta"]).await.unwrap_err()), "25001");
    client.run("ROLLBACK").await;
    client.run("BEGIN").await;
    client.query(&choose, &[&"beta"]).await.unwrap();
    assert_eq!(client.ask(WHERE).await, "beta");
    client.run("COMMIT").await;
    assert_eq!(client.ask(WHERE).await, "acme");
}

/// A pool's reset must not leave one request's tenant to the next.
#[tokio::test]
async fn a_reset_leads_back_to_where_the_session_began() {
    let proxy = start_proxy().await;
    let resets =
        ["DISCARD ALL", "RESET ALL", "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL"];
    let (nowhere, begun) = (api(&proxy).await, proxy.caller("api", PASSWORD, "acme").connect().await);
    for reset in resets {
        for (client, then) in [(&nowhere, None), (&begun, Some("acme"))] {
            client.run("SET pglobby.tenant = 'beta'").await;
            assert_eq!(client.ask(WHERE).await, "beta");
            client.run(reset).await;
            match then {
                Some(tenant) => assert_eq!(client.ask(WHERE).await, tenant, "{reset}"),
                None => assert_eq!(client.refusal_of(WHERE).await, "55000", "{reset}"),
            }
        }
    }
    begun.run("SET pglobby.tenant = 'beta'").await;
    begun.run("CREATE TEMP TABLE mine (i int)").await;
    begun.run("RESET ALL").await;
    assert_eq!(begun.ask(WHERE).await, "acme", "though a temporary table is lost by it");
    begun.execute("SET pglobby.tenant = 'beta'", &[]).await.unwrap();
    begun.execute("DISCARD ALL", &[]).await.unwrap();
    assert_eq!(begun.ask(WHERE).await, "acme");
}

/// Npgsql puts its reset in front of the next user's first statement, in one write.
#[tokio::test]
async fn what_is_sent_together_with_a_reset_runs_behind_it() {
    let proxy = start_proxy().await;
    let mut wire = Wire::login(proxy.port(), "api", PASSWORD, "acme").await;
    wire.query("SET pglobby.tenant = 'beta'").await;
    assert_eq!(rows(&wire.query(WHERE).await), one("beta"));
    wire.send_bytes(&[query("DISCARD ALL"), query(WHERE), batch(WHERE)].concat()).await;
    assert_eq!(tags(&wire.until_ready().await), "CZ");
    assert_eq!(rows(&wire.until_ready().await), one("acme"));
    assert_eq!(rows(&wire.until_ready().await), one("acme"));
    wire.query("SET pglobby.tenant = 'beta'").await;
    assert_eq!(error(&wire.query("RESET ALL; SELECT name FROM here").await), "0A000");
    let reset = [parse("", "RESET ALL"), bind("", "", &[]), execute("", 0)].concat();
    wire.send_bytes(&[reset, batch(WHERE)].concat()).await;
    let answers = wire.until_ready().await;
    assert_eq!((error(&answers), rows(&answers).len()), ("0A000".to_owned(), 0), "it ran nowhere");
    assert_eq!(rows(&wire.query("SHOW pglobby.tenant").await), one("beta"), "the batch was undone");
}

#[tokio::test]
async fn choices_between_pipelined_statements_part_them() {
    let proxy = start_proxy().await;
    let mut wire = api_wire(&proxy).await;
    let mut all = Vec::new();
    for round in 0..50 {
        let tenant = ["acme", "beta"][round % 2];
        let choice = format!("SET pglobby.tenant = '{tenant}'");
        all.extend(if round % 3 == 0 { batch(&choice) } else { query(&choice) });
        all.extend(if round % 5 == 0 { batch(WHERE) } else { query(WHERE) });
        all.extend(query("SELECT count(*) FROM here"));
    }
    wire.send_bytes(&all).await;
    for round in 0..50 {
        assert!(!tags(&wire.until_ready().await).contains('E'));
        assert_eq!(rows(&wire.until_ready().await), one(["acme", "beta"][round % 2]), "round {round}");
        assert_eq!(rows(&wire.until_ready().await), one(1));
    }
}

/// Two transactions with a tenant of their own in one write; what is behind a COMMIT belongs nowhere.
#[tokio::test]
async fn nothing_behind_a_transaction_with_a_tenant_of_its_own_runs_there() {
    let proxy = start_proxy().await;
    let mut wire = api_wire(&proxy).await;
    let visit = |tenant: &str| {
        [
            query("BEGIN"),
            query(&format!("SET LOCAL pglobby.tenant = '{tenant}'")),
            query(WHERE),
            query("COMMIT"),
        ]
        .concat()
    };
    wire.send_bytes(&[visit("acme"), query(WHERE), visit("beta"), query(WHERE)].concat()).await;
    for tenant in ["acme", "beta"] {
        assert_eq!(tags(&wire.until_ready().await), "CZ");
        assert_eq!(tags(&wire.until_ready().await), "CZ");
        let answers = wire.until_ready().await;
        assert_eq!(rows(&answers), one(tenant));
        assert_eq!(tags(&wire.until_ready().await), "CZ");
        assert_eq!(error(&wire.until_ready().await), "55000");
    }
    for (smuggled, state) in [
        (query("COMMIT; INSERT INTO here VALUES ('smuggled')"), "0A000"),
        (query("COMMIT AND CHAIN"), "0A000"),
        (
            [parse("", "COMMIT"), bind("", "", &[]), execute("", 0), batch("INSERT INTO here VALUES ('x')")]
                .concat(),
            "0A000",
        ),
    ] {
        wire.query("BEGIN").await;
        wire.query("SET LOCAL pglobby.tenant = 'acme'").await;
        wire.query("SELECT 1").await;
        wire.send_bytes(&smuggled).await;
        assert_eq!(error(&wire.until_ready().await), state);
        wire.query("ROLLBACK").await;
        assert_eq!(error(&wire.query(WHERE).await), "55000");
    }
    assert_eq!(proxy.client("acme").ask("SELECT count(*) FROM here").await, "1");
}

#[tokio::test]
async fn a_choice_in_a_batch_that_has_reached_a_server_fails_the_batch() {
    let proxy = start_proxy().await;
    let mut wire = Wire::login(proxy.port(), "api", PASSWORD, "acme").await;
    let step = |sql: &str| [parse("", sql), bind("", "", &[]), execute("", 0)].concat();
    let insert = step("INSERT INTO here VALUES ('half') RETURNING 1");
    let choice = step("SET pglobby.tenant = 'beta'");
    for end in [sync(), [flush(), sync()].concat()] {
        wire.send_bytes(&[insert.clone(), choice.clone(), insert.clone(), end].concat()).await;
        let answers = wire.until_ready().await;
        assert_eq!(error(&answers), "25001");
        assert_eq!(tags(&answers).matches('D').count(), 1, "nothing behind the choice ran");
        assert_eq!(
            rows(&wire.query("SELECT count(*) FROM here").await),
            one(1),
            "and nothing before it stays"
        );
        assert_eq!(rows(&wire.query(WHERE).await), one("acme"));
    }
    // The other way round the batch begins at the new tenant.
    wire.send_bytes(&[choice.clone(), step(WHERE), sync()].concat()).await;
    assert_eq!(rows(&wire.until_ready().await), one("beta"));
    assert_eq!(rows(&wire.query(WHERE).await), one("beta"));
    // And what pgJDBC sends where a transaction begins.
    let local = step("SET LOCAL pglobby.tenant = 'acme'");
    wire.send_bytes(&[step("BEGIN"), local, step(WHERE), sync()].concat()).await;
    assert_eq!(rows(&wire.until_ready().await), one("acme"));
    assert_eq!(rows(&wire.query(WHERE).await), one("acme"));
    wire.query("COMMIT").await;
    assert_eq!(rows(&wire.query(WHERE).await), one("beta"));
}

#[tokio::test]
async fn a_choice_is_never_one_of_several_statements() {
    let proxy = start_proxy().await;
    let client = proxy.caller("api", PASSWORD, "acme").connect().await;
    for sql in [
        "SET pglobby.tenant = 'beta'; SELECT 1",
        "SELECT 1; SET pglobby.tenant = 'beta'",
        "BEGIN; SET LOCAL pglobby.tenant = 'beta'; SELECT 1; COMMIT",
        "SELECT set_config('pglobby.tenant', name, false) FROM here",
        "SELECT 1, set_config('pglobby.tenant', 'beta', false)",
    ] {
        assert_eq!(client.refusal_of(sql).await, "0A000", "{sql}");
    }
    assert_eq!(client.ask(WHERE).await, "acme");
    // One that no text shows ends the session before anything else can run in the wrong place.
    let mut lying = proxy.caller("api", PASSWORD, "acme").connect().await;
    let hidden = "DO $$ BEGIN EXECUTE 'SET pglobby' || '.tenant = ''beta'''; END $$";
    let _ = lying.try_run(hidden).await;
    lying.closed().await;
}

/// PostgreSQL takes any message but COPY data for the loss of synchrony, and closes the connection. So it is here: nothing
/// of the COPY stays, and the choice is not made.
#[tokio::test]
async fn a_choice_in_the_middle_of_a_copy_ends_the_session() {
    let proxy = start_proxy().await;
    let copy = || query("COPY here FROM STDIN");
    let choice = || query("SET pglobby.tenant = 'beta'");
    let row = || message(b'd', b"half\n");
    for together in [false, true] {
        let mut wire = Wire::login(proxy.port(), "api", PASSWORD, "acme").await;
        if together {
            wire.send_bytes(&[copy(), choice(), row(), message(b'c', b"")].concat()).await;
        } else {
            wire.send_bytes(&[copy(), row()].concat()).await;
            wire.until(b'G').await;
            wire.send_bytes(&[choice(), row(), message(b'c', b"")].concat()).await;
        }
        assert!(!tags(&wire.until_end().await).contains('C'));
        for tenant in ["acme", "beta"] {
            assert_eq!(proxy.client(tenant).ask("SELECT count(*) FROM here").await, "1");
        }
    }
}

#[tokio::test]
async fn what_the_session_keeps_at_its_tenant_is_not_lost_unasked() {
    let proxy = start_proxy().await;
    let client = proxy.caller("api", PASSWORD, "acme").connect().await;
    for (keep, reason, undo) in [
        ("CREATE TEMP TABLE mine (i int)", "temporary_object", "DROP TABLE mine"),
        ("LISTEN news", "listen", "UNLISTEN news"),
        ("SELECT pg_advisory_lock(1)", "advisory_lock", "SELECT pg_advisory_unlock(1)"),
    ] {
        client.run(keep).await;
        let error = client.try_run("SET pglobby.tenant = 'beta'").await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "55006");
        assert!(error.message().contains(reason), "{}", error.message());
        client.run("SET pglobby.tenant = 'acme'").await;
        assert_eq!(sqlstate(&client.execute("SET pglobby.tenant = 'beta'", &[]).await.unwrap_err()), "55006");
        assert_eq!(client.ask(WHERE).await, "acme");
        client.run(undo).await;
        client.run("SET pglobby.tenant = 'beta'").await;
        assert_eq!(client.ask(WHERE).await, "beta");
        client.run("SET pglobby.tenant = 'acme'").await;
    }
}

#[tokio::test]
async fn grants_limits_and_suspensions_hold_for_who_has_chosen() {
    let proxy = start_proxy().await;
    proxy.command(&["tenant", "set", "beta", "max_clients=1"]);
    let (first, second) = (api(&proxy).await, api(&proxy).await);
    let chosen = async |client: &Client| loop {
        match client.try_run("SET pglobby.tenant = 'beta'").await {
            Ok(()) => break,
            Err(error) => assert_eq!(sqlstate(&error), "53300"),
        }
    };
    chosen(&first).await;
    assert_eq!(second.refusal_of("SET pglobby.tenant = 'beta'").await, "53300");
    first.run("SET pglobby.tenant = 'acme'").await;
    chosen(&second).await;
    assert_eq!(second.ask(WHERE).await, "beta");

    proxy.command(&["tenant", "suspend", "beta", "--reason", "unpaid bill"]);
    let mut second = second;
    second.closed().await;
    assert_eq!(first.ask(WHERE).await, "acme", "who is elsewhere goes on");
    assert_eq!(first.refusal_of("SET pglobby.tenant = 'beta'").await, "57P03");
    proxy.command(&["tenant", "resume", "beta"]);
    while first.try_run("SET pglobby.tenant = 'beta'").await.is_err() {}

    proxy.command(&["login", "revoke", "api", "--tenants", "beta"]);
    let mut first = first;
    first.closed().await;
    let third = api(&proxy).await;
    assert_eq!(third.refusal_of("SET pglobby.tenant = 'beta'").await, "42501");
    third.run("SET pglobby.tenant = 'acme'").await;
    assert_eq!(third.ask(WHERE).await, "acme");
}

#[tokio::test]
async fn a_cancel_reaches_the_tenant_that_the_session_is_in_now() {
    let proxy = start_proxy().await;
    let mut wire = api_wire(&proxy).await;
    for tenant in ["acme", "beta"] {
        wire.query(&format!("SET pglobby.tenant = '{tenant}'")).await;
        wire.send_bytes(&query("SELECT pg_sleep(1000)")).await;
        let behind = proxy.behind(tenant).await;
        let runs = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1000)' AND state = 'active' \
                    AND datname = current_database()";
        while behind.ask(runs).await != "1" {}
        let mut cancel = Wire::open(proxy.port()).await;
        cancel.send_bytes(&wire.cancel_request()).await;
        assert_eq!(error(&wire.until_ready().await), "57014");
    }
}

/// A session without a server is all that a switch needs: it succeeds while every server of both tenants is taken.
#[tokio::test]
async fn a_switch_waits_for_no_server() {
    let proxy = lobby_of(Proxy::with_tenant("acme").pool_size(1)).await;
    let (busy, other) = (proxy.client("acme").connect().await, proxy.client("beta").connect().await);
    busy.run("BEGIN; SELECT 1").await;
    other.run("BEGIN; SELECT 1").await;
    let client = api(&proxy).await;
    for tenant in ["acme", "beta", "acme"] {
        client.run(&format!("SET pglobby.tenant = '{tenant}'")).await;
        assert_eq!(client.ask("SHOW pglobby.tenant").await, tenant);
        client.run("BEGIN").await;
        client.run("COMMIT").await;
    }
    busy.run("COMMIT").await;
    assert_eq!(client.ask(WHERE).await, "acme");
}

#[tokio::test]
async fn names_are_closed_and_prepared_without_a_tenant_as_with_one() {
    let proxy = start_proxy().await;
    let mut wire = api_wire(&proxy).await;
    let choose = "SELECT set_config('pglobby.tenant', $1, false)";
    wire.send_bytes(&[parse("c", choose), describe(b'S', "c"), sync()].concat()).await;
    assert_eq!(tags(&wire.until_ready().await), "1tTZ");
    wire.send_bytes(&[parse("c", choose), sync()].concat()).await;
    assert_eq!(error(&wire.until_ready().await), "42P05");
    wire.send_bytes(&[bind("", "c", &[Some("acme")]), describe(b'P', ""), execute("", 0), sync()].concat())
        .await;
    assert_eq!(tags(&wire.until_ready().await), "2TDCZ");
    assert_eq!(rows(&wire.query(WHERE).await), one("acme"));
    wire.send_bytes(&[close(b'S', "c"), sync()].concat()).await;
    assert_eq!(tags(&wire.until_ready().await), "3Z");
    wire.send_bytes(&[bind("", "c", &[Some("beta")]), execute("", 0), sync()].concat()).await;
    assert_eq!(error(&wire.until_ready().await), "26000");
}

/// Many at once, switching at random between two tenants, each with something of its own to lose.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_every_statement_runs_where_its_session_is() {
    let proxy = std::sync::Arc::new(lobby_of(Proxy::with_tenant("acme").pool_size(3)).await);
    let mut tasks = Vec::new();
    for number in 0..12u32 {
        let proxy = proxy.clone();
        tasks.push(tokio::spawn(async move {
            let client = api(&proxy).await;
            let mut chance = number.wrapping_mul(2_654_435_761).wrapping_add(1);
            let mut next = move || {
                chance ^= chance << 13;
                chance ^= chance >> 17;
                chance ^= chance << 5;
                chance
            };
            let statement = {
                client.run("SET pglobby.tenant = 'acme'").await;
                client.prepare("SELECT name, current_database(), $1::int FROM here").await.unwrap()
            };
            for round in 0..150i32 {
                let tenant = ["acme", "beta"][next() as usize % 2];
                let local = next() % 2 == 0;
                if local {
                    client.run("BEGIN").await;
                    client.run(&format!("SET LOCAL pglobby.tenant = '{tenant}'")).await;
                } else {
                    client.run(&format!("SET pglobby.tenant = '{tenant}'")).await;
                }
                for _ in 0..next() % 3 {
                    let row = client.query_one(&statement, &[&round]).await.unwrap();
                    assert_eq!((row.get::<_, &str>(0), row.get::<_, i32>(2)), (tenant, round));
                    assert!(row.get::<_, &str>(1).contains(tenant));
                    assert_eq!(client.ask(WHERE).await, tenant);
                }
                if local {
                    client.run(["COMMIT", "ROLLBACK"][next() as usize % 2]).await;
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// Where a session keeps its server nobody reads its texts, and nobody would see the end of the transaction.
#[tokio::test]
async fn no_transaction_visits_a_tenant_in_session_mode() {
    let proxy = start_proxy().await;
    proxy.command(&["tenant", "set", "beta", "pool_mode=session"]);
    let client = api(&proxy).await;
    client.run("SET pglobby.tenant = acme").await;
    in_time("the new mode", async {
        loop {
            client.run("BEGIN").await;
            let visit = client.try_run("SET LOCAL pglobby.tenant = 'beta'").await;
            client.run("ROLLBACK").await;
            match visit {
                Ok(()) => continue,
                Err(refused) => break assert_eq!(sqlstate(&refused), "55006"),
            }
        }
    })
    .await;
    assert_eq!(client.ask(WHERE).await, "acme");
}

/// BEGIN is answered by the proxy and not sent to a server yet. A Parse that is answered behind it, because no server
/// is idle, was told that no transaction is open: drivers then begin another one.
#[tokio::test]
async fn a_parse_in_a_transaction_that_no_server_knows_is_told_the_transaction() {
    let proxy = lobby_of(Proxy::with_tenant("acme").pool_size(1)).await;
    let mut session = api_wire(&proxy).await;
    session.query("SET pglobby.tenant = 'acme'").await;
    session.send_bytes(&[parse("first", WHERE), sync()].concat()).await;
    session.until_ready().await;
    let holder = proxy.client("acme").connect().await;
    holder.run("BEGIN").await;
    assert_eq!(session.query("BEGIN").await.last().unwrap().body, b"T");
    for batch in [[parse("second", WHERE), sync()].concat(), sync()] {
        session.send_bytes(&batch).await;
        assert_eq!(session.until_ready().await.last().unwrap().body, b"T");
    }
    holder.run("COMMIT").await;
    assert_eq!(session.query("COMMIT").await.last().unwrap().body, b"I");
}
