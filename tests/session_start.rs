//! What PostgreSQL reads when a session begins (`ALTER ROLE … SET`, `ALTER DATABASE … SET`): to a new session as if its server were
//! started now, to an old one as it was when it began, whoever changes it and whichever servers there are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{Client, Proxy, Wire, wire::rows};

const SHOWN: &str = "SELECT concat_ws(' ', current_setting('work_mem'), current_setting('DateStyle'), \
    current_setting('search_path'))";

const THEN: &str = "4MB ISO, MDY \"$user\", public";
const NOW: &str = "8MB SQL, DMY shop";

/// The statements that set something else for whoever begins a session in `database`, said of `whose`.
fn settings(whose: &str) -> Vec<String> {
    ["work_mem = '8MB'", "DateStyle = 'SQL, DMY'", "search_path = shop"]
        .map(|setting| format!("ALTER {whose} SET {setting}"))
        .to_vec()
}

async fn database(proxy: &Proxy) -> String {
    proxy.client("acme").ask("SELECT current_database()").await
}

async fn two_servers(one: &Client, other: &Client) {
    one.run("BEGIN").await;
    other.run("BEGIN").await;
    one.run("COMMIT").await;
    other.run("COMMIT").await;
}

/// What a session finds on one server after the other, while another session holds one of them.
async fn found(session: &Client, other: &Client) -> Vec<String> {
    let mut found = vec![session.ask(SHOWN).await];
    other.run("BEGIN").await;
    found.push(session.ask(SHOWN).await);
    other.run("COMMIT").await;
    found.push(session.ask(SHOWN).await);
    found.dedup();
    found
}

#[tokio::test]
async fn what_the_owner_sets_is_found_by_new_sessions_at_once_and_by_old_ones_never() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (old, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    two_servers(&old, &other).await;
    let (database, owner) = (database(&proxy).await, proxy.client("acme").connect().await);
    // As one transaction, of which nobody sees a part; and one that is undone.
    owner.run(&format!("BEGIN; {}; COMMIT", settings(&format!("DATABASE \"{database}\"")).join("; "))).await;
    owner.run(&format!("BEGIN; ALTER DATABASE \"{database}\" SET work_mem = '9MB'; ROLLBACK")).await;
    let new = proxy.client("acme").connect().await;
    assert_eq!(found(&new, &other).await, [NOW]);
    assert_eq!(found(&old, &new).await, [THEN]);
    assert_eq!(found(&owner, &new).await, [THEN]);
    // RESET leads to what the session began with.
    old.run("SET work_mem = '1MB'; SET DateStyle = German; RESET work_mem; RESET DateStyle").await;
    assert_eq!(found(&old, &new).await, [THEN]);
    old.run("DISCARD ALL").await;
    assert_eq!(found(&old, &new).await, [THEN]);
    new.run("SET work_mem = '1MB'; RESET ALL").await;
    assert_eq!(found(&new, &old).await, [NOW]);
    // And back again: three sessions, each as it began.
    owner.run(&format!("ALTER DATABASE \"{database}\" RESET ALL")).await;
    let newest = proxy.client("acme").connect().await;
    assert_eq!(found(&newest, &other).await, [THEN]);
    assert_eq!(found(&new, &newest).await, [NOW]);
    assert_eq!(found(&old, &newest).await, [THEN]);
}

#[tokio::test]
async fn what_an_operator_sets_past_the_proxy_is_found_by_the_next_session() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (master, database) = (proxy.cluster.client("postgres").await, database(&proxy).await);
    // Of the tenant's own role nothing is set but by pglobby: see `shared_roles.rs`.
    for whose in [format!("DATABASE \"{database}\""), "ROLE ALL".to_owned()] {
        let (old, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
        two_servers(&old, &other).await;
        for statement in settings(&whose) {
            master.run(&statement).await;
        }
        master.run(&format!("ALTER {whose} SET my.note = 'new'")).await;
        // What no session can set: theirs who began before is what new servers have.
        master.run(&format!("ALTER {whose} SET log_min_duration_statement = '1h'")).await;
        let new = proxy.client("acme").connect().await;
        assert_eq!(found(&new, &other).await, [NOW], "{whose}");
        assert_eq!(found(&old, &new).await, [THEN], "{whose}");
        assert_eq!(new.ask("SHOW my.note").await, "new", "{whose}");
        assert_eq!(old.ask("SELECT current_setting('my.note', true)").await, "", "{whose}");
        master.run(&format!("ALTER {whose} RESET ALL")).await;
    }
}

/// The pool grows by a server that begins with other settings than those that are open, and all of these are busy.
#[tokio::test]
async fn an_old_session_on_a_server_that_is_opened_later_finds_what_it_began_with() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (old, holder) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    let (master, database) = (proxy.cluster.client("postgres").await, database(&proxy).await);
    holder.run("BEGIN").await;
    for statement in settings(&format!("DATABASE \"{database}\"")) {
        master.run(&statement).await;
    }
    assert_eq!(old.ask(SHOWN).await, THEN);
    assert_eq!(holder.ask(SHOWN).await, THEN);
    holder.run("COMMIT").await;
    assert_eq!(found(&holder, &old).await, [THEN]);
    assert_eq!(proxy.client("acme").ask(SHOWN).await, NOW);
}

/// There is nobody to ask at its login, and the server that it gets first began before the change.
#[tokio::test]
async fn a_session_that_logs_in_while_all_servers_are_busy_finds_what_is_set_now() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (master, database) = (proxy.cluster.client("postgres").await, database(&proxy).await);
    let holder = proxy.client("acme").connect().await;
    holder.run("BEGIN").await;
    for statement in settings(&format!("DATABASE \"{database}\"")) {
        master.run(&statement).await;
    }
    let mut new = proxy.wire("acme").await;
    holder.run("COMMIT").await;
    let answers = new.query(SHOWN).await;
    assert_eq!(rows(&answers)[0][0].as_deref(), Some(NOW));
    let told_at = answers.iter().position(|answer| answer.tag == b'S').expect("told");
    assert!(told_at < answers.iter().position(|answer| answer.tag == b'D').unwrap());
    assert_eq!(new.parameters["DateStyle"], "SQL, DMY");
    assert_eq!(holder.ask(SHOWN).await, THEN);
}

#[tokio::test]
async fn a_login_is_told_what_its_role_and_database_set() {
    for mode in ["transaction", "session"] {
        let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(1).start().await;
        let (master, database) = (proxy.cluster.client("postgres").await, database(&proxy).await);
        assert_eq!(proxy.wire("acme").await.parameters["DateStyle"], "ISO, MDY");
        for statement in settings(&format!("DATABASE \"{database}\"")) {
            master.run(&statement).await;
        }
        let mut new = proxy.wire("acme").await;
        assert_eq!(new.parameters["DateStyle"], "SQL, DMY", "{mode}");
        assert_eq!(rows(&new.query(SHOWN).await)[0][0].as_deref(), Some(NOW), "{mode}");
    }
}

/// The same text is another statement to sessions that began with other settings.
#[tokio::test]
async fn statements_of_old_and_new_sessions_are_read_under_what_each_began_with() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let old = proxy.client("acme").connect().await;
    let text = "SELECT '01/02/2026'::date - '2026-01-01'::date";
    let then = old.prepare(text).await.unwrap();
    let days = async |client: &Client, statement: &tokio_postgres::Statement| -> i32 {
        client.query_one(statement, &[]).await.unwrap().get(0)
    };
    assert_eq!(days(&old, &then).await, 1);
    let database = old.ask("SELECT current_database()").await;
    old.run(&format!("ALTER DATABASE \"{database}\" SET DateStyle = 'ISO, DMY'")).await;
    let new = proxy.client("acme").connect().await;
    let now = new.prepare(text).await.unwrap();
    for _ in 0..2 {
        assert_eq!(days(&new, &now).await, 31);
        assert_eq!(days(&old, &then).await, 1);
        assert_eq!(days(&old, &old.prepare(text).await.unwrap()).await, 1);
    }
}

/// Nothing is asked of anybody for it: a transaction that has nothing to do with roles and databases stays on its server.
#[tokio::test]
async fn servers_stay_as_long_as_nothing_is_set() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut one: Wire = proxy.wire("acme").await;
    let server = rows(&one.query("SELECT pg_backend_pid()").await);
    let (master, database) = (proxy.cluster.client("postgres").await, database(&proxy).await);
    master.run("CREATE ROLE somebody; ALTER ROLE somebody SET work_mem = '8MB'; ALTER DATABASE central SET work_mem = '8MB'").await;
    one.query(&format!("ALTER DATABASE \"{database}\" CONNECTION LIMIT -1")).await;
    drop(proxy.wire("acme").await);
    assert_eq!(rows(&one.query("SELECT pg_backend_pid()").await), server);
}
