//! Roles that hosts make act as another role, and hosts that hide PostgreSQL's catalogs from tenants, so that these do not
//! see each other. Whatever is said here is said to PostgreSQL as well, on a connection of its own, and must be answered alike.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy,
    comparison::{Comparison, Twin},
    wire::{batch, bind, c_string, close, execute, message, parse, rows, sync},
};

/// The settings that a session can see.
const LOOK: &str = "SELECT (SELECT x FROM t), current_setting('TimeZone'), current_setting('role'), \
    coalesce(current_setting('my.note', true), ''), current_setting('work_mem'), current_setting('search_path')";

const HIDE: &str = "REVOKE SELECT ON pg_roles, pg_user, pg_group, pg_database, pg_settings, pg_stat_activity, pg_locks, \
        pg_auth_members, pg_db_role_setting, pg_tablespace, pg_cursors, pg_prepared_statements FROM PUBLIC; \
    REVOKE EXECUTE ON FUNCTION pg_show_all_settings(), pg_has_role(oid, text), pg_has_role(name, text), \
        pg_has_role(oid, oid, text), pg_has_role(oid, name, text), pg_has_role(name, oid, text), pg_has_role(name, name, text), \
        pg_terminate_backend(int, bigint), pg_stat_get_activity(int) FROM PUBLIC";

trait Both {
    async fn say(&mut self, bytes: &[u8], what: &str);
    async fn query(&mut self, sql: &str);
    async fn ask(&mut self, sql: &str);
}

impl Both for Twin {
    async fn say(&mut self, bytes: &[u8], what: &str) {
        let mut outcomes = Vec::new();
        for wire in [&mut self.direct, &mut self.proxied] {
            wire.send_bytes(bytes).await;
            let answers = wire.until_ready().await;
            let errors: Vec<_> =
                answers.iter().filter(|answer| answer.tag == b'E').map(|answer| answer.sqlstate()).collect();
            outcomes.push(format!("{:?} {errors:?} {:?}", rows(&answers), answers.last().unwrap().body));
        }
        assert_eq!(outcomes[1], outcomes[0], "{what}");
    }

    async fn query(&mut self, sql: &str) {
        self.say(&message(b'Q', &c_string(sql)), sql).await;
    }

    async fn ask(&mut self, sql: &str) {
        self.say(&batch(sql), sql).await;
    }
}

const ROLES: [&[&str]; 8] = [
    &["SET ROLE NONE"],
    &["SET ROLE two", "SET ROLE NONE"],
    &["SET ROLE NONE", "RESET ALL"],
    &["SET ROLE NONE", "BEGIN; RESET ROLE; COMMIT"],
    &["BEGIN", "RESET ROLE", "SET ROLE NONE", LOOK, "COMMIT"],
    &["BEGIN", "SET ROLE NONE", "ROLLBACK"],
    &["SELECT FROM set_config('role', 'none', false)", "SET work_mem = '5MB'"],
    &["SET ROLE NONE", "DISCARD ALL"],
];

/// A session that started as a role went on as that role after `SET ROLE NONE`, or ended.
#[tokio::test]
async fn a_session_that_started_as_a_role_can_go_back_to_its_login() {
    let comparison =
        Comparison::start(1, "CREATE TABLE public.t AS SELECT 'public' AS x; GRANT SELECT ON t TO PUBLIC")
            .await;
    let mut other = comparison.twin("").await;
    for startup in ["-c role=one", "-c role=one -c search_path=two", ""] {
        for texts in ROLES {
            let mut twin = comparison.twin(startup).await;
            for sql in texts.iter().copied().chain([LOOK, "SELECT current_user = session_user"]) {
                twin.query(sql).await;
                if !sql.starts_with("BEGIN") && !texts.contains(&"BEGIN") {
                    other.query(LOOK).await;
                    other.query("SET work_mem = '7MB'").await;
                }
            }
            for sql in [LOOK, "DO 'BEGIN END'", LOOK, "RESET ROLE", LOOK] {
                other.query(LOOK).await;
                twin.ask(sql).await;
            }
        }
    }
}

/// Adopted databases whose tables belong to a role without sessions of its own.
#[tokio::test]
async fn a_role_that_acts_as_the_owner_of_its_tables_keeps_working() {
    let comparison = Comparison::start(1, "GRANT CREATE ON SCHEMA two TO two").await;
    let proxy = &comparison.proxy;
    let role = proxy.client("acme").ask("SELECT session_user").await;
    let superuser = proxy.behind("acme").await;
    let mut earlier = proxy.client("acme").connect().await;
    earlier.run("SET work_mem = '6MB'").await;
    superuser.run(&format!("ALTER ROLE \"{role}\" SET role = two; ALTER ROLE direct SET role = two")).await;

    for rotated in [false, true] {
        if rotated {
            proxy.command(&["tenant", "rotate", "acme"]);
            earlier = proxy.client("acme").connect().await;
        }
        let mut twin = comparison.twin("").await;
        let mut other = comparison.twin("-c role=one").await;
        let texts =
            ["SET ROLE NONE", "SET ROLE one", "RESET ROLE", "DISCARD ALL", "SET ROLE two", "RESET ALL"];
        for sql in texts {
            for sql in [sql, "SELECT current_setting('role'), current_user = session_user"] {
                twin.query(sql).await;
                earlier.run("SELECT 1").await;
                other.query("SELECT current_user").await;
            }
        }
        for sql in [
            "BEGIN",
            "SET ROLE NONE",
            "SELECT current_setting('role')",
            "RESET ROLE",
            "SELECT current_user",
            "COMMIT",
        ] {
            twin.ask(sql).await;
        }
        other.ask("SELECT current_user").await;
        twin.query(&format!("CREATE TABLE two.made_{rotated}(); SELECT tableowner FROM pg_tables WHERE tablename = 'made_{rotated}'; DROP TABLE two.made_{rotated}")).await;
        let kept = format!("SELECT setconfig FROM pg_db_role_setting WHERE setrole = '\"{role}\"'::regrole");
        assert_eq!(superuser.ask(&kept).await, "{role=two}");
    }
}

/// Sessions ended after SET ROLE, and a SET pinned them.
#[tokio::test]
async fn sessions_work_where_a_host_hides_its_catalogs() {
    let sql = "CREATE TABLE public.t AS SELECT 'public' AS x; GRANT SELECT ON t TO PUBLIC";
    let comparison = Comparison::start(2, sql).await;
    comparison.proxy.behind("acme").await.run(HIDE).await;
    comparison.proxy.client("acme").run(
        "CREATE FUNCTION public.sets() RETURNS void LANGUAGE plpgsql AS $$BEGIN SET work_mem = '9MB'; END$$;
         CREATE FUNCTION public.runs(text) RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE $1; END$$").then_leave().await;
    for rotated in [false, true] {
        if rotated {
            comparison.proxy.command(&["tenant", "rotate", "acme"]);
        }
        for startup in
            ["", "-c role=one -c TimeZone=Asia/Tokyo -c my.note=given", "-c search_path=one -c work_mem=8MB"]
        {
            everything(&comparison, startup).await;
        }
    }
}

async fn everything(comparison: &Comparison, startup: &str) {
    let mut other = comparison.twin("-c search_path=two").await;
    let mut third = comparison.twin("").await;
    let mut twin = comparison.twin(startup).await;
    // Statements prepared under one setting and used under another.
    twin.say(&[close(b'S', "q"), parse("q", LOOK), sync()].concat(), "parse").await;
    for sql in [
        "SET TimeZone = 'Europe/Rome'",
        "SET work_mem = '5MB'",
        "RESET work_mem",
        "SET search_path = one",
        "SET my.note = 'mine'",
        "SET ROLE one",
        "SET work_mem = '6MB'",
        "SET nonsense = 1",
        "SELECT public.sets()",
        "SELECT public.runs('SET TimeZone = UTC')",
        "DO $$BEGIN SET search_path = two; END$$",
        "RESET ROLE",
        "RESET search_path",
        "RESET my.note",
        "BEGIN; SET LOCAL search_path = one; RESET TimeZone",
        LOOK,
        "COMMIT",
        "RESET ALL",
        "SET ROLE two",
        "DISCARD ALL",
        "SELECT pg_advisory_lock_shared(7)",
        "SELECT pg_advisory_unlock_shared(7)",
        "DISCARD ALL",
        "CREATE TEMP TABLE mine(); DROP TABLE mine",
        "DECLARE c CURSOR WITH HOLD FOR SELECT 1; CLOSE c",
        "PREPARE p AS SELECT 1; DEALLOCATE p",
        "DISCARD ALL",
        "LISTEN news",
        "UNLISTEN *",
    ] {
        twin.query(sql).await;
        for looks in 0..2 {
            other.ask(LOOK).await;
            third.query("BEGIN; SET LOCAL TimeZone = 'Asia/Tokyo'").await;
            if !sql.starts_with("BEGIN") && sql != LOOK {
                if looks == 0 {
                    twin.ask(LOOK).await;
                } else if sql != "DISCARD ALL" {
                    twin.say(&[parse("", LOOK), bind("", "", &[]), execute("", 0), sync()].concat(), sql)
                        .await;
                }
            }
            third.query("COMMIT").await;
        }
    }
    for sql in ["BEGIN", "SET LOCAL search_path = two"] {
        twin.query(sql).await;
    }
    twin.say(&[close(b'S', "r"), parse("r", LOOK), sync()].concat(), "parse in a transaction").await;
    twin.query("COMMIT").await;
    for _ in 0..3 {
        other.ask(LOOK).await;
        third.query("BEGIN").await;
        twin.say(&[bind("", "r", &[]), execute("", 0), sync()].concat(), "bind").await;
        third.query("COMMIT").await;
    }
}

/// What was pipelined behind the role was executed without it, by a login that may do more.
#[tokio::test]
async fn where_catalogs_are_hidden_nothing_is_done_without_the_role_either() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    let role = other.ask("SELECT current_user").await;
    let superuser = proxy.behind("acme").await;
    superuser.run(&format!("{HIDE}; CREATE ROLE visitor; GRANT visitor TO \"{role}\"")).await;
    one.run("CREATE TABLE done (by text); GRANT ALL ON done TO visitor; SET ROLE visitor").await;
    one.run("INSERT INTO done SELECT current_user").await;
    other.run("INSERT INTO done SELECT 'other'").await;
    superuser.run(&format!("REVOKE visitor FROM \"{role}\"")).await;
    assert_eq!(one.refusal_of("INSERT INTO done SELECT current_user").await, "42501");
    assert_eq!(other.ask("SELECT string_agg(by, ' ' ORDER BY by) FROM done").await, "other visitor");
    assert_eq!(other.ask("SHOW exit_on_error").await, "off");
}

/// Whether the session still has the lock cannot be asked.
#[tokio::test]
async fn where_locks_are_hidden_a_session_with_one_keeps_its_server_until_it_discards_all() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    proxy.behind("acme").await.run("REVOKE EXECUTE ON FUNCTION pg_lock_status() FROM PUBLIC").await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    for _ in 0..2 {
        one.run("SELECT pg_advisory_lock(1)").await;
        assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 1);
        one.run("DISCARD ALL").await;
        assert_eq!(other.ask("SELECT pg_try_advisory_xact_lock(1)").await, "t");
        one.run("SET work_mem = '5MB'").await;
        assert_eq!(other.ask("SHOW work_mem").await, "4MB");
    }
}
