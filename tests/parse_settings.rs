//! PostgreSQL reads literals and finds tables when it parses a text: sessions with other settings do not share its statement,
//! and one that moves to another server finds it there as it was parsed first. Whatever is said here is said to PostgreSQL
//! as well, on a connection of its own, and must be answered alike.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    comparison::{Comparison, Twin},
    wire::{Message, bind, close, execute, parse, rows, sync},
};

/// A parameter, two values of it, and a text that means something else under each when it is parsed.
const CASES: [(&str, &str, &str, &str); 11] = [
    (
        "TimeZone",
        "UTC",
        "Asia/Tokyo",
        "SELECT '2026-01-01 00:00'::timestamptz = '2026-01-01 00:00+00'::timestamptz",
    ),
    ("DateStyle", "ISO, DMY", "ISO, MDY", "SELECT '01/02/2026'::date"),
    ("IntervalStyle", "sql_standard", "postgres", "SELECT extract(epoch FROM '-1 2:03:04'::interval)"),
    ("array_nulls", "off", "on", "SELECT ('{NULL}'::text[])[1] IS NULL"),
    ("transform_null_equals", "on", "off", "SELECT (SELECT NULL::int) = NULL"),
    ("xmloption", "document", "content", "SELECT 'a<b/>'::xml"),
    ("lc_monetary", "de_DE.UTF-8", "C", "SELECT '1,50'::money"), // where there is such a locale
    ("backslash_quote", "off", "on", r"SELECT E'\''"),
    ("standard_conforming_strings", "off", "on", r"SELECT 'a\\b'"),
    ("search_path", "one", "two", "SELECT x FROM t"),
    ("role", "one", "two", "SELECT name FROM guarded"),
];

/// The same of texts that PostgreSQL works out when it plans, and goes by that plan as long as it likes.
const PLANNED: [(&str, &str, &str, &str); 3] = [
    ("bytea_output", "escape", "hex", r"SELECT '\x00ff'::bytea::text"),
    ("extra_float_digits", "0", "3", "SELECT (0.1::float8 + 0.2::float8)::text"),
    ("my.note", "one", "two", "SELECT note()"),
];

trait Both {
    async fn send(&mut self, what: &str, messages: &[Vec<u8>]) -> String;
    async fn query(&mut self, sql: &str) -> String;
    async fn set(&mut self, setting: (&str, &str));
    async fn prepare(&mut self, sql: &str);
    async fn run(&mut self, what: &str) -> String;
}

impl Both for Twin {
    /// What both get for it.
    async fn send(&mut self, what: &str, messages: &[Vec<u8>]) -> String {
        let bytes = messages.concat();
        self.direct.send_bytes(&bytes).await;
        self.proxied.send_bytes(&bytes).await;
        let told = outcome(&self.direct.until_ready().await);
        assert_eq!(outcome(&self.proxied.until_ready().await), told, "{what}");
        told
    }

    async fn query(&mut self, sql: &str) -> String {
        let message = support::wire::message(b'Q', &support::wire::c_string(sql));
        self.send(sql, &[message]).await
    }

    async fn set(&mut self, (name, value): (&str, &str)) {
        self.query(&format!("SET {name} = {}", quoted(name, value))).await;
    }

    async fn prepare(&mut self, sql: &str) {
        self.send(sql, &[close(b'S', "q"), parse("q", sql), sync()]).await;
    }

    async fn run(&mut self, what: &str) -> String {
        self.send(what, &[bind("", "q", &[]), execute("", 0), sync()]).await
    }
}

fn quoted(name: &str, value: &str) -> String {
    if name == "search_path" { value.to_owned() } else { format!("'{value}'") }
}

fn outcome(answers: &[Message]) -> String {
    let errors: Vec<_> = answers.iter().filter(|answer| answer.tag == b'E').map(Message::sqlstate).collect();
    format!("{:?} {errors:?}", rows(answers))
}

/// Policies by role, and functions, for what PostgreSQL decides when it parses.
const GUARDED: &str = "CREATE TABLE guarded AS SELECT unnest('{one,two}'::text[]) AS name;
    ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON guarded USING (name = current_user);
    GRANT SELECT ON guarded TO PUBLIC";

/// One or two servers; with two, the test chooses which one is free.
struct Servers {
    comparison: Comparison,
    /// Each has a server, and one of them keeps it: other sessions get the other server.
    holders: Vec<Wire>,
    held: usize,
}

impl Servers {
    async fn start(servers: u32) -> Self {
        let comparison = Comparison::start(servers, GUARDED).await;
        let proxy = &comparison.proxy;
        let functions = proxy.client("acme").connect().await;
        functions
            .run(
                "CREATE FUNCTION note() RETURNS text IMMUTABLE LANGUAGE sql
                   AS 'SELECT current_setting(''my.note'', true)';
                 CREATE FUNCTION to_tokyo() RETURNS void LANGUAGE sql
                   AS 'SELECT set_config(''TimeZone'', ''Asia/Tokyo'', true)';",
            )
            .await;
        functions.leave().await;
        let mut holders = Vec::new();
        if servers == 2 {
            holders = vec![proxy.wire("acme").await, proxy.wire("acme").await];
            holders[0].query("BEGIN").await;
        }
        Self { comparison, holders, held: 0 }
    }

    async fn twin(&self) -> Twin {
        self.comparison.twin("").await
    }

    async fn twins(&self) -> [Twin; 2] {
        [self.twin().await, self.twin().await]
    }

    /// From now on sessions get the other server.
    async fn turn(&mut self) {
        let (free, held) = (1 - self.held, self.held);
        self.holders[free].query("BEGIN").await;
        self.holders[held].query("COMMIT").await;
        self.held = free;
    }
}

/// `SELECT '01/02/2026'::date` meant the second of January to a client that writes days first, because another one had prepared it.
#[tokio::test]
async fn clients_with_other_settings_do_not_share_a_statement() {
    let servers = Servers::start(1).await;
    for (name, a, b, sql) in CASES.into_iter().chain(PLANNED) {
        for values in [[a, b], [b, a]] {
            let what = format!("{name} {values:?}");
            let [mut one, mut other] = servers.twins().await;
            one.set((name, values[0])).await;
            other.set((name, values[1])).await;
            one.prepare(sql).await;
            let before = one.run(&what).await;
            other.prepare(sql).await;
            assert!(name == "lc_monetary" || other.run(&what).await != before, "{what}: {before}");
            one.run(&what).await;
            if PLANNED.iter().any(|(planned, ..)| *planned == name) {
                continue;
            }
            // What was parsed stays as it was parsed, unless PostgreSQL itself looks again.
            one.set((name, values[1])).await;
            one.run(&what).await;
            other.run(&what).await;
            other.set((name, values[0])).await;
            other.run(&what).await;
            one.run(&what).await;
        }
    }
}

#[tokio::test]
async fn a_statement_is_parsed_on_another_server_under_the_settings_of_the_first_time() {
    let mut servers = Servers::start(2).await;
    for (name, a, b, sql) in CASES {
        let [mut one, mut other] = servers.twins().await;
        one.set((name, a)).await;
        other.set((name, b)).await;
        one.prepare(sql).await;
        other.prepare(sql).await;
        for value in [b, a, b] {
            for _ in 0..2 {
                one.run(name).await;
                other.run(name).await;
                servers.turn().await;
            }
            one.set((name, value)).await;
            one.query(&format!("SELECT current_setting('{name}')")).await;
        }
        // Back to what a session begins with.
        one.query(&format!("RESET {name}")).await;
        for _ in 0..2 {
            one.run(name).await;
            servers.turn().await;
        }
    }
}

#[tokio::test]
async fn a_statement_that_is_parsed_before_anything_is_set_stays_so_on_another_server() {
    let mut servers = Servers::start(2).await;
    for (name, a, _, sql) in CASES {
        let mut one = servers.twin().await;
        one.prepare(sql).await;
        one.run(name).await;
        one.set((name, a)).await;
        for _ in 0..2 {
            servers.turn().await;
            one.query("BEGIN").await;
            one.run(name).await;
            one.query(&format!("SELECT current_setting('{name}')")).await;
            one.query("ROLLBACK").await;
        }
    }
}

#[tokio::test]
async fn what_a_transaction_sets_for_itself_counts_for_what_is_parsed_in_it() {
    let mut servers = Servers::start(2).await;
    for (name, a, b, sql) in CASES {
        let [mut one, mut other] = servers.twins().await;
        other.set((name, b)).await;
        other.prepare(sql).await;
        other.run(name).await;
        one.set((name, b)).await;
        one.query("BEGIN").await;
        one.query(&format!("SELECT set_config('{name}', '{a}', true)")).await;
        one.prepare(sql).await;
        one.run(name).await;
        one.query("COMMIT").await;
        for _ in 0..2 {
            one.run(name).await;
            other.run(name).await;
            servers.turn().await;
        }
        // And for what others use: it is theirs as it was.
        other.query("BEGIN").await;
        other.query(&format!("SET LOCAL {name} = {}", quoted(name, a))).await;
        other.run(name).await;
        other.query("COMMIT").await;
        other.run(name).await;
        one.run(name).await;
    }
}

#[tokio::test]
async fn prepare_in_sql_follows_with_the_settings_it_was_made_under() {
    let mut servers = Servers::start(2).await;
    for (name, a, b, sql) in CASES {
        let mut one = servers.twin().await;
        one.set((name, a)).await;
        one.query(&format!("PREPARE p AS {sql}")).await;
        one.query("BEGIN").await;
        one.query(&format!("SET LOCAL {name} = {}", quoted(name, b))).await;
        one.query(&format!("PREPARE l AS {sql}")).await;
        one.query("COMMIT").await;
        one.query(&format!("SET {name} = {}; PREPARE s AS {sql}", quoted(name, b))).await;
        for value in [b, a] {
            one.set((name, value)).await;
            for _ in 0..2 {
                one.query("EXECUTE p").await;
                one.query("EXECUTE l").await;
                one.query("EXECUTE s").await;
                servers.turn().await;
            }
        }
        one.query("DEALLOCATE ALL").await;
    }
}

#[tokio::test]
async fn the_unnamed_statement_follows_with_the_settings_it_was_parsed_under() {
    let mut servers = Servers::start(2).await;
    let mut one = servers.twin().await;
    let run = |name: &str| [bind("", name, &[]), execute("", 0), sync()];
    for (name, sql) in [("set", "SET TimeZone = 'Asia/Tokyo'"), ("reset", "RESET TimeZone")] {
        one.send(sql, &[parse(name, sql), sync()]).await;
    }
    let sql = "SELECT '2026-01-01 00:00'::timestamptz";
    for (before, behind) in [("set", "reset"), ("reset", "set")] {
        one.send(before, &run(before)).await;
        one.send(sql, &[parse("", sql), sync()]).await;
        one.send(behind, &run(behind)).await;
        for _ in 0..2 {
            servers.turn().await;
            one.send(sql, &run("")).await;
        }
    }
}

/// When a table changes, PostgreSQL parses what uses it again, with the settings of whoever is there: they must be the same for
/// all who share it.
#[tokio::test]
async fn a_client_that_uses_a_statement_under_other_settings_does_not_change_it_for_others() {
    let servers = Servers::start(1).await;
    let [mut one, mut other] = servers.twins().await;
    let sql = "SELECT '01/02/2026'::date FROM one.t";
    one.prepare(sql).await;
    other.prepare(sql).await;
    other.run("before").await;
    one.set(("DateStyle", "ISO, DMY")).await;
    servers.comparison.proxy.behind("acme").await.run("ANALYZE one.t").await;
    for client in [&mut one.direct, &mut one.proxied] {
        client.send_bytes(&[bind("", "q", &[]), execute("", 0), sync()].concat()).await;
        client.until_ready().await;
    }
    other.run("not changed").await;
    other.query("BEGIN; SET LOCAL DateStyle = 'ISO, DMY'").await;
    other.run("not changed").await;
    servers.comparison.proxy.behind("acme").await.run("ANALYZE one.t").await;
    other.query("COMMIT").await;
    let mut third = servers.twin().await;
    third.prepare(sql).await;
    third.run("not changed").await;
}

/// Startup parameters are settings as well.
#[tokio::test]
async fn what_a_client_asks_for_when_it_logs_in_counts() {
    let servers = Servers::start(1).await;
    let login = |zone: &'static str| {
        servers
            .comparison
            .proxy
            .client("acme")
            .options(&format!("-c TimeZone={zone} -c application_name={zone}"))
    };
    let (one, other) = (login("UTC").connect().await, login("Asia/Tokyo").connect().await);
    let sql = "SELECT '2026-01-01 00:00'::timestamptz = '2026-01-01 00:00+00'::timestamptz";
    let (mine, theirs) = (one.prepare(sql).await.unwrap(), other.prepare(sql).await.unwrap());
    for _ in 0..2 {
        assert!(one.query_one(&mine, &[]).await.unwrap().get::<_, bool>(0));
        assert!(!other.query_one(&theirs, &[]).await.unwrap().get::<_, bool>(0));
    }
}

/// What a function sets for the transaction shows nowhere in the text that calls it.
#[tokio::test]
async fn what_a_function_sets_for_its_transaction_counts() {
    let mut servers = Servers::start(2).await;
    let sql = "SELECT '2026-01-01 00:00'::timestamptz = '2026-01-01 00:00+00'::timestamptz";
    for _ in 0..2 {
        let [mut one, mut other] = servers.twins().await;
        one.query("BEGIN").await;
        one.query("SELECT to_tokyo()").await;
        one.prepare(sql).await;
        one.run("in the transaction").await;
        one.query("COMMIT").await;
        other.prepare(sql).await;
        for _ in 0..2 {
            other.run("another").await;
            one.run("behind the transaction").await;
            servers.turn().await;
        }
    }
}

/// Where nothing that matters differs, nothing is prepared twice.
#[tokio::test]
async fn clients_that_agree_on_what_matters_share_a_statement() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut clients = Vec::new();
    for number in 0..3 {
        let client = proxy.client("acme").options(&format!("-c application_name=a{number}")).connect().await;
        client.run("SET work_mem = '8MB'; SET statement_timeout = '60s'").await;
        clients.push((client.prepare("SELECT 42").await.unwrap(), client));
    }
    for (statement, client) in &clients {
        client.run("BEGIN; SET LOCAL lock_timeout = '1s'").await;
        assert_eq!(client.query_one(statement, &[]).await.unwrap().get::<_, i32>(0), 42);
        client.run("COMMIT; SET random_page_cost = 3").await;
    }
    // Each client's own Parse is one.
    assert_eq!(proxy.metric("pglobby_server_parses_total{tenant=\"acme\"}").await, 3.0);
}

/// A text went to the server in one write with the session's own settings, but was read under those that the last session had
/// left there: what stood behind a literal with a backslash was not seen, and the next session had that role.
#[tokio::test]
async fn a_text_is_read_under_the_settings_that_go_to_the_server_before_it() {
    let comparison = Comparison::start(1, "").await;
    let query = |sql: &[u8]| support::wire::message(b'Q', &[sql, b"\0"].concat());
    let extended = |sql: &str| [parse("x", sql), bind("", "x", &[]), execute("", 0), sync()].concat();
    let look = "SELECT current_setting('role'), current_setting('search_path'), current_setting('work_mem')";
    let left = ["SET standard_conforming_strings = off", "SET standard_conforming_strings = on"];
    let sjis = [b"SELECT E'\x95\x5c'; SET work_mem = '7MB' --'".as_slice()].concat();
    let cases: [(&str, &[&str], Vec<u8>); 5] = [
        (left[0], &[], query(br"SELECT 'C:\'; SET ROLE two --'")),
        (left[0], &[], query(br"SELECT 'C:\'; SET search_path = two --'")),
        (left[0], &[], extended(r"SELECT 'C:\', set_config('role', 'two', false) --'")),
        (left[0], &["PREPARE q AS SELECT 1"], query(br"SELECT 'C:\', '; EXECUTE q; --'")),
        (left[1], &["SET client_encoding = 'SJIS'"], query(&sjis)),
    ];
    for (left_there, own, bytes) in cases {
        let mut session = comparison.twin("").await;
        for sql in own {
            session.query(sql).await;
        }
        let mut last = comparison.twin("").await;
        last.query(left_there).await;
        session.send(&String::from_utf8_lossy(&bytes), std::slice::from_ref(&bytes)).await;
        comparison.twin("").await.query(look).await;
    }
}

/// The same where the session itself changes them, and what follows is on its way already.
#[tokio::test]
async fn a_text_is_read_under_the_settings_that_the_text_before_it_leaves() {
    let comparison = Comparison::start(1, "").await;
    let query = |sql: &str| support::wire::message(b'Q', &support::wire::c_string(sql));
    let part = |sql: &str| [parse("", sql), bind("", "", &[]), execute("", 0)].concat();
    let hidden = r"SELECT 'C:\'; SET ROLE two --'";
    let (on, off) = ("SET standard_conforming_strings = on", "SET standard_conforming_strings = off");
    let cases = [
        vec![query(on), query(hidden)],
        vec![query("BEGIN; SET standard_conforming_strings = on"), query(hidden), query("COMMIT")],
        vec![
            query(&format!("BEGIN; {on}; ROLLBACK; BEGIN; {on}")),
            query("ROLLBACK"),
            query(off),
            query(on),
            query(hidden),
        ],
        vec![query("RESET standard_conforming_strings"), query(hidden)],
        vec![[part(on), part(r"SELECT 'C:\', set_config('role', 'two', false) --'"), sync()].concat()],
    ];
    for messages in cases {
        let mut session = comparison.twin("").await;
        session.query(off).await;
        let bytes = messages.concat();
        session.direct.send_bytes(&bytes).await;
        session.proxied.send_bytes(&bytes).await;
        for _ in &messages {
            let told = outcome(&session.direct.until_ready().await);
            assert_eq!(outcome(&session.proxied.until_ready().await), told);
        }
        comparison.twin("").await.query("SELECT current_setting('role')").await;
    }
}
