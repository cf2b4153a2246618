//! PostgreSQL's own regression tests, as a tenant's owner: on a direct connection, and through the proxy in transaction
//! mode on three servers that other clients keep busy and dirty. What psql prints must be the same.
//!
//! The tests build on each other, so both sides run them in PostgreSQL's order, each in a database of its own cluster. A part
//! that is quick and knows sessions well runs always; `scripts/regress`, which also gets the files, runs all of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

#[path = "regression/stirring.rs"]
mod stirring;
mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use pglobby::local_postgres::binaries::PostgresBinaries;
use support::{
    Cluster, Proxy,
    cluster::target_folder,
    proxy::{login_of, password_of},
};
use tokio::process::Command;

const TENANT: &str = "regression";

/// What `scripts/test` runs: they ask much of a session, and take little time.
const QUICK: [&str; 29] = [
    "test_setup",
    "tablespace",
    "copy",
    "create_schema",
    "errors",
    "transactions",
    "random",
    "portals",
    "namespace",
    "prepared_xacts",
    "lock",
    "password",
    "misc_functions",
    "sysviews",
    "async",
    "create_role",
    "psql",
    "portals_p2",
    "advisory_lock",
    "combocid",
    "json",
    "plancache",
    "copy2",
    "prepare",
    "conversion",
    "returning",
    "largeobject",
    "explain",
    "event_trigger",
];

/// Where the difference is one that `docs/transparency.md` owns up to.
const OWNED_UP_TO: [(&str, &str); 3] = [
    ("guc", "PL/pgSQL is loaded already on a server that others have used"),
    ("stats", "what other servers have counted is published when they idle for a second"),
    ("temp", "a server that others have used has a schema for temporary objects already"),
];

/// One way to the tests' database.
struct Side {
    name: &'static str,
    port: u16,
    user: String,
    password: String,
    database: String,
    /// Where the server reads and writes files, as far as tests make it do so.
    server_files: PathBuf,
    /// Where psql's outputs go.
    results: PathBuf,
}

#[tokio::test]
async fn the_regression_tests_see_no_difference() {
    let files = regression_files();
    let tests = chosen(&schedule(&files));
    let proxied = started().await;
    let direct = started().await;
    let sides = [side("direct", &direct, &files).await, side("proxied", &proxied, &files).await];
    let stirring = stirring::start(&proxied, TENANT).await;
    let mut different = Vec::new();
    for test in &tests {
        let begun = Instant::now();
        let (one, other) = tokio::join!(run(test, &sides[0], &files), run(test, &sides[1], &files));
        let passes = is_expected(test, &sides[0], &files);
        let expected = if passes { ", as PostgreSQL expects" } else { "" };
        let owned_up_to = OWNED_UP_TO.iter().find(|(known, _)| known == test);
        let verdict = match (one == other, owned_up_to) {
            (true, _) => "same",
            (false, Some((_, why))) => why,
            (false, None) => "DIFFERENT",
        };
        println!("{test}: {verdict}{expected}, {:.1} s", begun.elapsed().as_secs_f32());
        if one != other {
            let difference = difference(test, &sides).await;
            if owned_up_to.is_none() {
                different.push(format!("--- {test}\n{difference}"));
            }
        }
    }
    stirring.stop().await;
    assert!(different.is_empty(), "{} of {}:\n{}", different.len(), tests.len(), different.concat());
}

/// A cluster as PostgreSQL's own runner makes it, and a proxy before it. (The direct side needs no proxy, but for the
/// tenant to be made in the same way.)
async fn started() -> Proxy {
    let cluster =
        Cluster::build().setting("max_prepared_transactions", "2").setting("shared_buffers", "64MB");
    let proxy = Proxy::with_tenant(TENANT).cluster(cluster.start()).pool_size(3);
    proxy.config("query_wait_timeout", "\"60s\"").start().await
}

async fn side(name: &'static str, proxy: &Proxy, files: &Path) -> Side {
    let results = target_folder().join("regression").join(name);
    let _ = fs::remove_dir_all(&results);
    fs::create_dir_all(&results).unwrap();
    let server_files = proxy.cluster.socket_folder().join("regress");
    open_to_all(&server_files);
    open_to_all(&server_files.join("results"));
    let copied =
        std::process::Command::new("cp").arg("-r").arg(files.join("data")).arg(&server_files).status();
    assert!(copied.unwrap().success());
    let tenant = proxy.json(&["tenant", "show", TENANT, "--json"]);
    let told = |key: &str| tenant[key].as_str().unwrap().to_owned();
    let (database, owner) = (told("database"), told("username"));
    let behind = proxy.behind(TENANT).await;
    // Many tests begin with files that the server reads, or make roles of their own.
    behind.run(&format!("GRANT pg_read_server_files, pg_write_server_files TO \"{owner}\"; ALTER ROLE \"{owner}\" CREATEROLE")).await;
    for setting in [
        "lc_messages = 'C'",
        "lc_monetary = 'C'",
        "lc_numeric = 'C'",
        "lc_time = 'C'",
        "bytea_output = 'hex'",
    ] {
        behind.run(&format!("ALTER DATABASE \"{database}\" SET {setting}")).await;
    }
    let (port, user, password) = match name {
        "direct" => {
            behind.run(&format!("ALTER ROLE \"{owner}\" PASSWORD 'direct'")).await;
            (proxy.cluster.port(), owner, "direct".to_owned())
        }
        _ => (proxy.port(), login_of(TENANT), password_of(TENANT)),
    };
    Side { name, port, user, password, database, server_files, results }
}

/// Runs one test with the settings and arguments of PostgreSQL's own runner; what psql printed.
async fn run(test: &str, side: &Side, files: &Path) -> String {
    let program = PostgresBinaries::find(None).unwrap().program("psql");
    let mut psql = Command::new(if program.exists() { program } else { "psql".into() });
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG")) {
        psql.env_remove(name);
    }
    let output = side.results.join(format!("{test}.out"));
    let printed = fs::File::create(&output).unwrap();
    psql.env("PGHOST", "127.0.0.1")
        .env("PGPORT", side.port.to_string())
        .env("PGUSER", &side.user)
        .env("PGPASSWORD", &side.password)
        .env("PGDATABASE", &side.database)
        .env("PGAPPNAME", format!("pg_regress/{test}"))
        .env("PGTZ", "PST8PDT")
        .env("PGDATESTYLE", "Postgres, MDY")
        .env("PGOPTIONS", "-c intervalstyle=postgres_verbose")
        .env("LC_ALL", "C")
        .env("PG_ABS_SRCDIR", &side.server_files)
        .env("PG_ABS_BUILDDIR", &side.server_files)
        .env("PG_LIBDIR", "/nonexistent")
        .env("PG_DLSUFFIX", ".so")
        .args(["-X", "-a", "-q", "-v", "HIDE_TABLEAM=on", "-v", "HIDE_TOAST_COMPRESSION=on"])
        .stdin(fs::File::open(files.join("sql").join(format!("{test}.sql"))).unwrap())
        .stdout(printed.try_clone().unwrap())
        .stderr(printed)
        .kill_on_drop(true);
    match tokio::time::timeout(TEST_MAX, psql.status()).await {
        Ok(status) => drop(status.unwrap()),
        Err(_) => panic!("{test} did not end within {TEST_MAX:?} ({})", side.name),
    }
    let printed = String::from_utf8_lossy(&fs::read(&output).unwrap()).into_owned();
    let mut comparable = printed.replace(side.server_files.to_str().unwrap(), "FILES");
    for name in ["pg_toast_", "pg_temp_", "ConstraintTrigger_a_", "ConstraintTrigger_c_"] {
        comparable = without_number(&comparable, name);
    }
    fs::write(&output, &comparable).unwrap();
    comparable
}

/// What PostgreSQL names by number has another number in each database.
fn without_number(text: &str, name: &str) -> String {
    let mut parts = text.split(name);
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + name + "N" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

/// Whether it is one of the outputs that PostgreSQL takes for right.
fn is_expected(test: &str, direct: &Side, files: &Path) -> bool {
    let printed = fs::read_to_string(direct.results.join(format!("{test}.out"))).unwrap();
    let endings = ["", "_0", "_1", "_2", "_3", "_4", "_5", "_6", "_7", "_8", "_9"];
    let mut expected =
        endings.map(|ending| files.join("expected").join(format!("{test}{ending}.out"))).into_iter();
    expected.any(|file| fs::read_to_string(file).is_ok_and(|expected| expected == printed))
}

async fn difference(test: &str, sides: &[Side; 2]) -> String {
    let outputs = sides.each_ref().map(|side| side.results.join(format!("{test}.out")));
    let diff = Command::new("diff").arg("-U5").args(&outputs).output().await.unwrap();
    let text = String::from_utf8_lossy(&diff.stdout).into_owned();
    fs::write(outputs[1].with_extension("diff"), &text).unwrap();
    text.lines().take(DIFFERENCE_LINES_MAX).flat_map(|line| [line, "\n"]).collect()
}

/// All tests in PostgreSQL's order, one after another.
fn schedule(files: &Path) -> Vec<String> {
    let schedule = fs::read_to_string(files.join("parallel_schedule")).unwrap();
    let lines = schedule.lines().filter_map(|line| line.strip_prefix("test:"));
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// Of these, what `PGLOBBY_REGRESSION` names (`all`, or names and spaces between them).
fn chosen(schedule: &[String]) -> Vec<String> {
    let named = std::env::var("PGLOBBY_REGRESSION").unwrap_or_else(|_| QUICK.join(" "));
    if named == "all" {
        return schedule.to_vec();
    }
    let named: BTreeSet<&str> = ["test_setup"].into_iter().chain(named.split_whitespace()).collect();
    let unknown: Vec<_> = named.iter().filter(|name| !schedule.iter().any(|test| test == **name)).collect();
    assert!(unknown.is_empty(), "no such tests: {unknown:?}");
    schedule.iter().filter(|test| named.contains(test.as_str())).cloned().collect()
}

fn regression_files() -> PathBuf {
    let major = PostgresBinaries::find(None).unwrap().major().to_string();
    let files = std::env::var_os("PGLOBBY_REGRESSION_FILES")
        .map_or_else(|| target_folder().join("regression-files").join(major), PathBuf::from);
    assert!(files.exists(), "{files:?} is missing: run scripts/regress, which gets it");
    files
}

/// A folder that PostgreSQL's user may write to.
fn open_to_all(folder: &Path) {
    fs::create_dir(folder).unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
}

/// The longest takes half a minute on a busy machine.
const TEST_MAX: Duration = Duration::from_secs(300);
/// Of each test, in what the failure prints; all of it is in the results' folder.
const DIFFERENCE_LINES_MAX: usize = 200;
