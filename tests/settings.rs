//! What a session has set, and what it has not, on servers that others have used. Whatever is said here is said to PostgreSQL
//! as well, on a connection of its own, and must be answered alike.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    comparison::{Comparison, Twin},
    wire::{batch, c_string, message, rows, tags},
};

trait Both {
    async fn say(&mut self, sql: &str);
}

impl Both for Twin {
    async fn say(&mut self, sql: &str) {
        for bytes in [message(b'Q', &c_string(sql)), batch(sql)] {
            let mut outcomes = Vec::new();
            for wire in [&mut self.direct, &mut self.proxied] {
                wire.send_bytes(&bytes).await;
                let answers = wire.until_ready().await;
                let errors: Vec<_> = answers
                    .iter()
                    .filter(|answer| answer.tag == b'E')
                    .map(|answer| answer.sqlstate())
                    .collect();
                outcomes.push(format!("{:?} {errors:?} {:?}", rows(&answers), answers.last().unwrap().body));
            }
            assert_eq!(outcomes[1], outcomes[0], "{sql}");
            if sql.starts_with("BEGIN") {
                break;
            }
        }
    }
}

/// A session ended because a text search configuration was dropped that it had chosen.
#[tokio::test]
async fn a_session_goes_on_without_what_was_dropped() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("CREATE TEXT SEARCH CONFIGURATION mine (COPY = english)").await;
    one.run("SET default_text_search_config = 'public.mine'; SET work_mem = '5MB'; SET app.name = 'one'")
        .await;
    one.run("PREPARE q AS SELECT to_tsvector('cats')::text").await;
    other.run("SET default_text_search_config = 'simple'").await;
    assert_eq!(one.ask("SHOW default_text_search_config").await, "public.mine");
    assert_eq!(other.ask("SHOW default_text_search_config").await, "pg_catalog.simple");
    other.run("DROP TEXT SEARCH CONFIGURATION mine").await;
    for _ in 0..2 {
        let look = "SELECT current_setting('work_mem') || ' ' || current_setting('app.name')";
        assert_eq!(one.ask(look).await, "5MB one");
        assert_eq!(one.ask("SHOW default_text_search_config").await, "pg_catalog.english");
        assert_eq!(other.ask("SHOW default_text_search_config").await, "pg_catalog.simple");
    }
}

const LOOK: &str = "SELECT current_setting('app.user', true), current_setting('app.tenant', true)";

/// `''` instead of NULL let a policy for row security compare with an empty name.
#[tokio::test]
async fn a_custom_parameter_is_null_for_a_session_that_never_set_it() {
    let comparison = Comparison::start(3, "").await;
    let mut blank = comparison.twin("").await;
    let mut users = Vec::new();
    for _ in 0..3 {
        users.push(comparison.twin("").await);
    }
    // All servers have had the parameters.
    for user in &mut users {
        user.say("BEGIN; SELECT set_config('app.user', 'x', true); SET app.tenant = 'n'").await;
    }
    for user in &mut users {
        user.say("COMMIT").await;
    }
    for _ in 0..3 {
        for sql in [LOOK, "SHOW app.user", "SELECT current_setting('app.tenant')", "BEGIN", LOOK, "COMMIT"] {
            blank.say(sql).await;
            for user in &mut users {
                user.say(LOOK).await;
            }
        }
    }
    for sql in ["RESET app.tenant", "DISCARD ALL", "SET app.tenant = 'y'", "RESET ALL"] {
        for user in &mut users {
            user.say(sql).await;
        }
        for user in &mut users {
            user.say(LOOK).await;
        }
        blank.say("SELECT 1").await;
    }
    let mut new = comparison.twin("-c app.other=given").await;
    new.say(LOOK).await;
    new.say("SHOW app.other").await;
    tokio::time::sleep(std::time::Duration::from_millis(600)).await;
    comparison.twin("").await.say("SELECT current_setting('app.other', true)").await;
}

/// The setting is a session's: it ended the server that idled in the pool, and the session lived on.
#[tokio::test]
async fn idle_session_timeout_ends_the_session_and_no_server() {
    const SET: &str = "SET idle_session_timeout = '1s'";
    let comparison = Comparison::start(1, "").await;
    let mut other = comparison.twin("").await.proxied;
    let server = rows(&other.query("SELECT pg_backend_pid()").await);
    for options in ["", "-c idle_session_timeout=1s"] {
        let Twin { mut proxied, mut direct } = comparison.twin(options).await;
        if options.is_empty() {
            proxied.query(SET).await;
            direct.query(SET).await;
        }
        assert_eq!(last_words(&mut proxied).await, last_words(&mut direct).await, "{options}");
        assert_eq!(rows(&other.query("SELECT pg_backend_pid()").await), server);
    }

    // Not in a transaction, and not once it is off again.
    let (mut busy, mut reset) = (comparison.twin("").await.proxied, comparison.twin("").await.proxied);
    reset.query(SET).await;
    assert_eq!(rows(&reset.query("SHOW idle_session_timeout").await)[0][0].as_deref(), Some("1s"));
    reset.query("RESET idle_session_timeout").await;
    let mut idle = comparison.twin("").await.proxied;
    idle.query(SET).await;
    busy.query(SET).await;
    busy.query("BEGIN").await;
    last_words(&mut idle).await;
    busy.query("SELECT 1").await;
    assert_eq!(tags(&busy.query("COMMIT").await), "CZ");
    assert_eq!(rows(&reset.query("SELECT pg_backend_pid()").await), server);
    assert_eq!(rows(&reset.query("SHOW idle_session_timeout").await)[0][0].as_deref(), Some("0"));
}

#[tokio::test]
async fn the_databases_idle_session_timeout_ends_sessions_and_no_server() {
    let comparison = Comparison::start(1, "").await;
    let database = comparison.proxy.client("acme").ask("SELECT current_database()").await;
    let set = format!("ALTER DATABASE \"{database}\" SET idle_session_timeout = '1s'");
    comparison.proxy.behind("acme").await.run(&set).await;
    let Twin { mut proxied, mut direct } = comparison.twin("").await;
    let server = rows(&proxied.query("SELECT pg_backend_pid()").await);
    assert_eq!(last_words(&mut proxied).await, last_words(&mut direct).await);
    let mut next = comparison.twin("").await.proxied;
    assert_eq!(rows(&next.query("SELECT pg_backend_pid()").await), server);
    assert_eq!(rows(&next.query("SHOW idle_session_timeout").await)[0][0].as_deref(), Some("1s"));
    last_words(&mut next).await;
    let mut without = comparison.twin("-c idle_session_timeout=0").await.proxied;
    last_words(&mut comparison.twin("").await.proxied).await;
    assert_eq!(rows(&without.query("SELECT pg_backend_pid()").await), server);
}

/// PostgreSQL refuses the parameter in a session that has used temporary tables, and other sessions had used the server.
#[tokio::test]
async fn temp_buffers_may_be_set_though_others_have_had_temporary_tables() {
    let comparison = Comparison::start(2, "").await;
    // Both servers have had temporary tables, which are gone.
    let dirty = async || {
        let (mut one, mut two) = (comparison.twin("").await.proxied, comparison.twin("").await.proxied);
        for session in [&mut one, &mut two] {
            session
                .query("BEGIN; CREATE TEMP TABLE x (a int) ON COMMIT DROP; INSERT INTO x VALUES (1)")
                .await;
        }
        for session in [&mut one, &mut two] {
            session.query("COMMIT").await;
        }
    };
    dirty().await;
    for sql in ["SET temp_buffers = '2MB'", "SET SESSION temp_buffers TO 256"] {
        let mut new = comparison.twin("").await;
        new.say(sql).await;
        new.say("SHOW temp_buffers").await;
        dirty().await;
        new.say("SHOW temp_buffers").await;
        new.say("SELECT 1").await;
    }
    for options in ["-c temp_buffers=3MB", "-c temp_buffers=3MB", "-c temp_buffers=400"] {
        let mut new = comparison.twin(options).await;
        new.say("SHOW temp_buffers").await;
        dirty().await;
        new.say("SHOW temp_buffers").await;
    }
    // One that has the same value keeps the servers.
    let (mut one, mut other) = (comparison.twin("-c temp_buffers=5MB").await, comparison.twin("").await);
    one.say("CREATE TEMP TABLE y AS SELECT 1 AS a").await;
    one.say("DROP TABLE y").await;
    one.say("SHOW temp_buffers").await;
    other.say("SHOW temp_buffers").await;
}

/// Severity, SQLSTATE and message.
async fn last_words(session: &mut Wire) -> [Option<String>; 3] {
    let end = session.until_end().await;
    assert_eq!(tags(&end), "E", "{end:?}");
    [b'V', b'C', b'M'].map(|field| end[0].field(field))
}
