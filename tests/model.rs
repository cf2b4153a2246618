//! Transparency, at random: several clients do what comes to their minds through the proxy, and the same on private
//! direct connections. Every answer must be the same.
//!
//! A seed that fails fails always: it is in the message, with everything that was done until then.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use support::{
    Proxy, Wire,
    proxy::{login_of, password_of},
    wire::{Message, bind, c_string, close, describe, execute, flush, message, parse, sync},
};

const CLIENTS: usize = 4;
const STEPS: usize = 150;

/// What is said as a simple query. `#` becomes a number from 1 to 3.
const TEXTS: [&str; 91] = [
    "SET work_mem = '#MB'",
    "SET LOCAL work_mem = '#MB'",
    "RESET work_mem",
    "SET work_mem TO DEFAULT",
    "SET search_path = s#, public",
    "SET LOCAL search_path = s#",
    "RESET search_path",
    "SET my.note = 'n#'",
    "SET LOCAL my.note = 'n#'",
    "SELECT set_config('my.note', 'c#', false)",
    "SELECT set_config('my.' || 'note', 'd#', false)",
    "SELECT set_config('work_mem', '1#MB', true)",
    "DO $$ BEGIN PERFORM set_config('work_mem', '2#MB', false); END $$",
    "SET ROLE visitor",
    "SET LOCAL ROLE visitor",
    "RESET ROLE",
    "SET ROLE NONE",
    "RESET ALL",
    "DISCARD ALL",
    "DISCARD TEMP",
    "DISCARD PLANS",
    "SET TIME ZONE 'Etc/GMT+#'",
    "SET DateStyle = 'German'",
    "RESET DateStyle",
    "SET application_name = 'app #'",
    "RESET application_name",
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET default_transaction_isolation TO DEFAULT",
    "SET work_mem = 'nonsense'",
    "SET work_mem = '3#MB'; SELECT 1/0",
    "BEGIN; SET work_mem = '4#MB'; COMMIT",
    "SET no_such_parameter = 1",
    "BEGIN",
    "BEGIN ISOLATION LEVEL REPEATABLE READ",
    "COMMIT",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT a",
    "ROLLBACK TO a",
    "RELEASE a",
    "SELECT 1/0",
    "SELECT 'one'; SELECT 'two'",
    "",
    "CREATE TEMP TABLE t# (x int)",
    "DROP TABLE IF EXISTS t#",
    "INSERT INTO t# VALUES (#)",
    "SELECT pg_try_advisory_lock(#)",
    "SELECT pg_advisory_unlock(#)",
    "SELECT pg_advisory_unlock_all()",
    "PREPARE q# AS SELECT 'q#', current_setting('work_mem')",
    "EXECUTE q#",
    "DEALLOCATE q#",
    "DEALLOCATE ALL",
    "DECLARE c# CURSOR WITH HOLD FOR VALUES (1), (2), (3)",
    "FETCH c#",
    "CLOSE c#",
    "CLOSE ALL",
    "LISTEN channel#",
    "UNLISTEN channel#",
    "UNLISTEN *",
    "SELECT nonsense",
    "SAVEPOINT b",
    "ROLLBACK TO b",
    "RELEASE b",
    "SAVEPOINT a; SET work_mem = '6#MB'; ROLLBACK TO a",
    "BEGIN; SET search_path = s#; SAVEPOINT a; SET search_path = lost; SELECT 1/0",
    "COMMIT AND CHAIN",
    "PREPARE r#(int) AS SELECT $1 + #",
    "EXECUTE r#(#)",
    "EXECUTE r#('no number')",
    "BEGIN; PREPARE q# AS SELECT 'kept'; ROLLBACK",
    "PREPARE s# AS SELECT set_config('work_mem', '7#MB', false)",
    "EXECUTE s#",
    "DEALLOCATE s#",
    "CREATE TEMP TABLE t# (x int) ON COMMIT DROP",
    "BEGIN; CREATE TEMP TABLE t# (x int); ROLLBACK",
    "SELECT # AS x INTO TEMP t#",
    "CREATE TEMP VIEW v# AS SELECT #",
    "DROP VIEW IF EXISTS v#",
    "SELECT * FROM t#",
    "CREATE FUNCTION pg_temp.f#() RETURNS int LANGUAGE sql AS 'SELECT #'",
    "BEGIN; SELECT pg_try_advisory_xact_lock(#); COMMIT",
    "SELECT pg_try_advisory_lock_shared(#)",
    "SELECT pg_advisory_unlock_shared(#)",
    "BEGIN; SELECT pg_try_advisory_lock(#); ROLLBACK",
    "DISCARD SEQUENCES",
    "SET session_replication_role = replica",
    "SELECT set_config('session_replication_role', 'replica', false)",
    "DO $$ BEGIN SET log_statement = 'all'; EXCEPTION WHEN OTHERS THEN SET work_mem = '8#MB'; END $$",
    "SET SESSION AUTHORIZATION DEFAULT",
    "EXECUTE p#",
];

/// Everything a session can see of itself. (A custom parameter that was never set is NULL, one that was reset is empty, in
/// PostgreSQL as well: whether a server has ever known it is nothing a session can rely on.)
const PROBE: &str =
    "SELECT current_user = 'visitor', current_setting('work_mem'), current_setting('search_path'),
    coalesce(current_setting('my.note', true), ''), current_setting('TimeZone'), current_setting('DateStyle'),
    current_setting('application_name'), current_setting('default_transaction_isolation'),
    ARRAY(SELECT pg_listening_channels() ORDER BY 1),
    ARRAY(SELECT name FROM pg_cursors WHERE is_holdable ORDER BY 1),
    ARRAY(SELECT relname FROM pg_class WHERE relnamespace = pg_my_temp_schema() ORDER BY 1),
    ARRAY(SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() ORDER BY 1)";

const PREPARED: [&str; 4] = [
    "SELECT 'p', current_setting('work_mem')",
    "SELECT set_config('work_mem', '5MB', false)",
    "SELECT 'p', coalesce(current_setting('my.note', true), '')",
    "SELECT 1/0",
];

/// One thing to do: bytes to send, and how many ReadyForQuery they bring.
fn step(random: &mut StdRng) -> (String, Vec<u8>, usize) {
    let number = random.random_range(1..=3).to_string();
    let name = if random.random_bool(0.3) { String::new() } else { format!("p{number}") };
    let text = PREPARED.choose(random).unwrap();
    let run = |name: &str| [bind("", name, &[]), describe(b'P', ""), execute("", 0)].concat();
    let (what, bytes) = match random.random_range(0..28) {
        24 => {
            let (name, sql) = (format!("u{number}"), any_text(random, &number));
            (format!("Close, Parse {name} {sql}"), [close(b'S', &name), parse(&name, &sql), sync()].concat())
        }
        25..=27 => {
            let name = format!("u{number}");
            (format!("run {name}"), [run(&name), sync()].concat())
        }
        20 | 21 => return pipeline(random),
        22 => {
            let name = ["work_mem", "my.note", "no_such_parameter", "session_replication_role"]
                .choose(random)
                .unwrap();
            let value = ["5MB", "6MB", "local"].choose(random).unwrap();
            let local = ["true", "false"].choose(random).unwrap();
            let text = "SELECT set_config($1, $2, $3::text::bool)";
            let bound = bind("", "", &[Some(name), Some(value), Some(local)]);
            (
                format!("set_config({name}, {value}, {local}) with bound parameters"),
                [parse("", text), bound, execute("", 0), sync()].concat(),
            )
        }
        23 => {
            let text = "SELECT i FROM generate_series(1, 5) AS i";
            let twice = [execute("", 2), execute("", 0)].concat();
            ("a portal in parts".to_owned(), [parse("", text), bind("", "", &[]), twice, sync()].concat())
        }
        0 | 1 => (
            format!("Close, Parse {name:?} {text}"),
            [close(b'S', &name), parse(&name, text), sync()].concat(),
        ),
        2..=4 => (format!("Bind, Execute {name:?}"), [run(&name), sync()].concat()),
        5 => (format!("Close {name:?}"), [close(b'S', &name), sync()].concat()),
        6 => (format!("Describe {name:?}"), [describe(b'S', &name), sync()].concat()),
        7 => (
            format!("Close, Parse {name:?} {text}, run twice"),
            [close(b'S', &name), parse(&name, text), run(&name), run(&name), sync()].concat(),
        ),
        8..=10 => ("probe".to_owned(), message(b'Q', &c_string(PROBE))),
        11 => {
            let sql = any_text(random, &number);
            (format!("by Parse: {sql}"), [parse("", &sql), run(""), sync()].concat())
        }
        _ => {
            let sql = TEXTS.choose(random).unwrap().replace('#', &number);
            (sql.clone(), message(b'Q', &c_string(&sql)))
        }
    };
    (what, bytes, 1)
}

/// One of the texts, for a Parse. All but the last, EXECUTE of a statement prepared at protocol level, which only a
/// simple query may name.
fn any_text(random: &mut StdRng, number: &str) -> String {
    TEXTS[..TEXTS.len() - 1].choose(random).unwrap().replace('#', number)
}

/// Several requests in one batch, some of which fail; then a simple query, in the same write. (Not several batches: one that
/// fails takes statements with it that the next one uses, see `docs/transparency.md`.)
fn pipeline(random: &mut StdRng) -> (String, Vec<u8>, usize) {
    let (mut what, mut bytes) = ("pipeline:".to_owned(), Vec::new());
    for _ in 0..random.random_range(2..8) {
        let name = format!("p{}", random.random_range(1..=3));
        let text = PREPARED.choose(random).unwrap();
        let run = [bind("", &name, &[]), execute("", 0)].concat();
        let (said, request) = match random.random_range(0..12) {
            0 => (format!("Parse {name} {text}"), parse(&name, text)),
            1 => (format!("Close, Parse {name} {text}"), [close(b'S', &name), parse(&name, text)].concat()),
            2 => (format!("Close {name}"), close(b'S', &name)),
            3 => (format!("Describe {name}"), describe(b'S', &name)),
            4 => ("Parse nonsense".to_owned(), parse("bad", "SELECT nonsense")),
            5 => {
                let text = ["BEGIN", "COMMIT", "ROLLBACK", "SET work_mem = '9MB'", "SAVEPOINT a"]
                    .choose(random)
                    .unwrap();
                let run = [bind("", "own", &[]), execute("", 0)].concat();
                (format!("run {text}"), [close(b'S', "own"), parse("own", text), run].concat())
            }
            6 => ("Flush".to_owned(), flush()),
            7 => {
                let name = format!("u{}", random.random_range(1..=3));
                let sql = any_text(random, "1");
                let run = [bind("", &name, &[]), execute("", 0)].concat();
                (
                    format!("Close, Parse {name} {sql}, run twice"),
                    [close(b'S', &name), parse(&name, &sql), run.clone(), run].concat(),
                )
            }
            8 => {
                let name = format!("u{}", random.random_range(1..=3));
                (format!("run {name}"), [bind("", &name, &[]), execute("", 0)].concat())
            }
            _ => (format!("run {name}"), run),
        };
        what += &format!(" {said};");
        bytes.extend(request);
    }
    bytes.extend([sync(), message(b'Q', &c_string("SELECT 1"))].concat());
    (what, bytes, 2)
}

/// What is compared of an answer: everything but object numbers in row descriptions and the place in the source.
fn seen(answers: &[Message]) -> Vec<String> {
    let told = answers.iter().map(|message| match message.tag {
        b'T' => format!("T {} columns", message.body[1]),
        b'E' | b'N' => {
            format!("{} {} {}", message.tag as char, message.sqlstate(), message.field(b'M').unwrap())
        }
        tag => format!("{} {}", tag as char, String::from_utf8_lossy(&message.body).replace('\0', "·")),
    });
    told.collect()
}

#[tokio::test]
async fn whatever_clients_do_at_random_is_answered_as_without_a_proxy() {
    let proxy = Proxy::with_tenant("acme")
        .pool_size(u32::try_from(CLIENTS).unwrap())
        .config("max_pinned_servers", &CLIENTS.to_string())
        .start()
        .await;
    let behind = proxy.behind("acme").await;
    let owner = proxy.client("acme").ask("SELECT current_user").await;
    proxy.cluster.create_database("twin", "twin", "twin secret").await;
    behind.run(&format!("CREATE ROLE visitor; GRANT visitor TO \"{owner}\", twin")).await;
    let acme = behind.ask("SELECT current_database()").await;
    for database in [acme.as_str(), "twin"] {
        behind.run(&format!("GRANT ALL ON DATABASE \"{database}\" TO visitor")).await;
    }
    let seeds = std::env::var("PGLOBBY_MODEL_SEEDS").map_or(40, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        same_answers(&proxy, seed).await;
    }
}

async fn answers(wire: &mut Wire, bytes: &[u8], ready: usize) -> Vec<String> {
    wire.send_bytes(bytes).await;
    let mut told = Vec::new();
    for _ in 0..ready {
        told.extend(seen(&wire.until_ready().await));
    }
    told
}

async fn same_answers(proxy: &Proxy, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut pairs = Vec::new();
    for _ in 0..CLIENTS {
        let through = Wire::login(proxy.port(), &login_of("acme"), &password_of("acme"), "acme").await;
        let direct = Wire::login(proxy.cluster.port(), "twin", "twin secret", "twin").await;
        pairs.push((through, direct));
    }
    let mut done = Vec::new();
    for _ in 0..STEPS {
        let client = random.random_range(0..CLIENTS);
        let (what, bytes, ready) = step(&mut random);
        done.push(format!("{client}: {what}"));
        let (through, direct) = &mut pairs[client];
        let proxied = answers(through, &bytes, ready).await;
        let private = answers(direct, &bytes, ready).await;
        assert_eq!(proxied, private, "(left: through the proxy) seed {seed}, done:\n{}", done.join("\n"));
    }
}
