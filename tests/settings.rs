//! What a session has set, and what it has not, on servers that others have used. Whatever is said here is said to PostgreSQL
//! as well, on a connection of its own, and must be answered alike.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy,
    comparison::{Comparison, Twin},
    wire::{batch, c_string, message, rows},
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
