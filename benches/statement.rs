//! What it costs to read a statement before it goes to the server: the promise is about a nanosecond per byte, and no
//! allocation, for the ordinary ones.

use divan::{Bencher, counter::BytesCount};
use pglobby::data_path::sql::{self, Lexing};

#[global_allocator]
static ALLOCATOR: divan::AllocProfiler<std::alloc::System> = divan::AllocProfiler::system();

fn main() {
    divan::main();
}

const SELECT: &str = "SELECT abalance FROM pgbench_accounts WHERE aid = 4711;";
const JOIN: &str = "SELECT u.id, u.name, count(o.id) FROM users u LEFT JOIN orders o ON o.user_id = u.id \
                    WHERE u.email = $1 AND o.created_at > now() - interval '1 day' GROUP BY 1, 2 ORDER BY 3 DESC";
const ORM: &str = "SELECT \"auth_user\".\"id\", \"auth_user\".\"password\", \"auth_user\".\"last_login\", \
                   \"auth_user\".\"username\" FROM \"auth_user\" WHERE \"auth_user\".\"id\" = 1 LIMIT 21";
const COMMENTED: &str = "/* route=/accounts */ SELECT abalance FROM accounts WHERE aid = 4711";
const INSERT: &str = "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) \
                      VALUES (1, 2, 3, 4, CURRENT_TIMESTAMP)";
const SET: &str = "SET search_path = a, \"B c\", 'd'";

/// One text and a short name for it.
struct Sample(&'static str, &'static str);

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.0, self.1.len())
    }
}

#[divan::bench(args = [
    Sample("select", SELECT), Sample("join", JOIN), Sample("quoted by an ORM", ORM), Sample("commented", COMMENTED),
    Sample("insert", INSERT), Sample("begin", "BEGIN"), Sample("commit", "COMMIT"), Sample("set", SET),
])]
fn effects(bencher: Bencher<'_, '_>, sample: &Sample) {
    bencher
        .counter(BytesCount::of_str(sample.1))
        .bench(|| sql::effects(divan::black_box(sample.1.as_bytes()), Lexing::default()));
}

/// Bulk: many rows of short literals.
#[divan::bench(args = [100, 10_000])]
fn insert_of_many_rows(bencher: Bencher<'_, '_>, rows: usize) {
    let sql = format!("INSERT INTO t VALUES {}(0, '')", "(12345, 'some text', NULL), ".repeat(rows));
    bencher
        .counter(BytesCount::of_str(&sql))
        .bench(|| sql::effects(divan::black_box(sql.as_bytes()), Lexing::default()));
}
