//! An employee's ordinary wish, another password, and what the same employee must not do to the roles that all logins of
//! the tenant share: through the wire, from both accesses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use support::{
    Proxy,
    client::{in_words, sqlstate},
    proxy::{login_of, password_of},
    wire::{batch, bind, describe, execute, parse, sync, tags},
};

/// A tenant with its login, and a reader.
async fn tenant(mode: &str) -> Proxy {
    let proxy = Proxy::with_tenant("acme").pool_mode(mode).start().await;
    proxy.create_login("reader", "reader-secret", &["--tenant", "acme", "--read-only"]);
    proxy
}

async fn logs_in(proxy: &Proxy, login: &str, password: &str) -> bool {
    match proxy.caller(login, password, "acme").try_connect().await {
        Ok(client) => client.ask("SELECT 1").await == "1",
        Err(error) => {
            assert_eq!(sqlstate(&error), "28P01");
            false
        }
    }
}

/// The roles on the server, with everything that an employee might change about them.
async fn roles_and_database(proxy: &Proxy) -> Vec<Vec<Option<String>>> {
    let superuser = proxy.behind("acme").await;
    let mut all = superuser
        .ask_all(
            "SELECT rolname, rolpassword, rolcanlogin, rolconnlimit, rolvaliduntil, r.oid IN (SELECT member FROM pg_auth_members),
                    (SELECT array_agg(setconfig ORDER BY setdatabase) FROM pg_db_role_setting WHERE setrole = r.oid)
             FROM pg_authid r WHERE rolname ~ '^acme' ORDER BY 1",
        )
        .await;
    all.extend(superuser.ask_all("SELECT datname, datconnlimit, datallowconn, datacl, datdba FROM pg_database WHERE datname = 'acme'").await);
    all
}

#[tokio::test]
async fn a_login_changes_its_own_password_and_nobody_else_notices() {
    for mode in ["transaction", "session"] {
        let proxy = tenant(mode).await;
        let before = roles_and_database(&proxy).await;
        for (login, old) in
            [(login_of("acme"), password_of("acme")), ("reader".into(), "reader-secret".into())]
        {
            let mut password = old;
            let spellings = [
                "ALTER ROLE CURRENT_USER PASSWORD".to_owned(),
                "alter user session_user with encrypted password".to_owned(),
                format!("ALTER ROLE \"{login}\" PASSWORD"),
            ];
            for (number, spelling) in spellings.iter().enumerate() {
                let client = proxy.caller(&login, &password, "acme").connect().await;
                let next = format!("it's {number}");
                let sql = format!("{spelling} 'it''s {number}'");
                if number == 1 {
                    client.execute(&sql, &[]).await.unwrap(); // Parse, Describe, Sync; then Bind, Execute, Sync
                } else {
                    client.run(&sql).await;
                }
                assert_eq!(client.ask("SELECT 1").await, "1", "the session goes on");
                assert!(!logs_in(&proxy, &login, &password).await, "{sql}");
                assert!(logs_in(&proxy, &login, &next).await, "{sql}");
                client.run("ALTER ROLE CURRENT_USER PASSWORD 'again'; ").await;
                assert!(logs_in(&proxy, &login, "again").await, "the same session, once more");
                password = "again".to_owned();
                assert_eq!(client.ask("SELECT 2").await, "2");
            }
        }
        assert_eq!(roles_and_database(&proxy).await, before, "the servers' roles are as they were");
        let audit = proxy.cluster.client("central").await;
        let noted = "SELECT count(*) FROM pglobby.audit_log WHERE action = 'login.set_password'
                     AND actor = 'login:reader' AND tenant = 'acme' AND detail->>'by' = 'itself'";
        assert_eq!(audit.ask(noted).await, "6");
        assert!(!proxy.log().contains("again") && !proxy.log().contains("SCRAM-SHA-256$"));
    }
}

#[tokio::test]
async fn the_real_psql_changes_a_password() {
    let proxy = tenant("transaction").await;
    let mut password = "reader-secret".to_owned();
    for (number, command) in
        [r"\password", r"\password reader", r#"\password acme_ro"#].into_iter().enumerate()
    {
        let url = format!("postgres://reader@127.0.0.1:{}/acme", proxy.port());
        // Without a terminal of its own it reads the password from its input.
        let mut psql = Command::new("setsid")
            .args(["--wait", "psql", "-X", "-v", "ON_ERROR_STOP=1", "-c", command, &url])
            .env("PGPASSWORD", &password)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("psql is installed");
        let next = format!("psql {number}");
        writeln!(psql.stdin.take().unwrap(), "{next}\n{next}").unwrap();
        let output = psql.wait_with_output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(logs_in(&proxy, "reader", &next).await, "{command}");
        assert!(!logs_in(&proxy, "reader", &password).await, "{command}");
        password = next;
    }
}

#[tokio::test]
async fn other_sessions_of_the_login_end_and_those_of_others_stay() {
    let proxy = tenant("transaction").await;
    let (mut other, own) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    let reader = proxy.caller("reader", "reader-secret", "acme").connect().await;
    own.run("ALTER ROLE CURRENT_USER PASSWORD 'new'").await;
    other.closed().await;
    assert_eq!(reader.ask("SELECT 1").await, "1");
    assert_eq!(own.ask("SELECT 1").await, "1");
    // And an operator's word still ends it.
    proxy.command_with(&["login", "set-password", &login_of("acme"), "--password-stdin"], "operator's\n");
    let mut own = own;
    own.closed().await;
    assert!(logs_in(&proxy, &login_of("acme"), "operator's").await);
}

/// A session that an operator is about to end must not be able to take the login back.
#[tokio::test]
async fn a_login_that_was_changed_or_disabled_meanwhile_keeps_its_password() {
    let proxy = tenant("transaction").await;
    let central = proxy.cluster.client("central").await;
    for change in ["verifier = 'SCRAM-SHA-256$4096:x$y:z'", "disabled_at = now()", "valid_until = now()"] {
        let client = proxy.caller("reader", "reader-secret", "acme").connect().await;
        // Nobody hears of it.
        let quietly = |sql: &str| {
            format!(
                "SET session_replication_role = replica; UPDATE pglobby.logins SET {sql} WHERE name = 'reader'"
            )
        };
        let verifier = central.ask("SELECT verifier FROM pglobby.logins WHERE name = 'reader'").await;
        central.run(&quietly(change)).await;
        assert_eq!(client.refusal_of("ALTER ROLE CURRENT_USER PASSWORD 'mine'").await, "42501", "{change}");
        central
            .run(&quietly(&format!("verifier = '{verifier}', disabled_at = NULL, valid_until = NULL")))
            .await;
        assert!(logs_in(&proxy, "reader", "reader-secret").await);
    }
}

#[tokio::test]
async fn a_password_is_no_part_of_a_transaction() {
    for mode in ["transaction", "session"] {
        let proxy = tenant(mode).await;
        let client = proxy.client("acme").connect().await;
        let sql = "ALTER ROLE CURRENT_USER PASSWORD 'new'";
        for begin in ["BEGIN", "BEGIN; SELECT 1"] {
            client.run(begin).await;
            assert_eq!(client.refusal_of(sql).await, "25001");
            assert_eq!(client.refusal_of("SELECT 1").await, "25P02", "the transaction has failed with it");
            client.run("ROLLBACK").await;
            client.run(begin).await;
            assert_eq!(sqlstate(&client.execute(sql, &[]).await.unwrap_err()), "25001");
            client.run("ROLLBACK").await;
        }
        assert_eq!(client.refusal_of(&format!("SELECT 1; {sql}")).await, "25001");
        assert_eq!(client.refusal_of(&format!("BEGIN; {sql}; COMMIT")).await, "25001");
        for (sql, code) in [
            ("ALTER ROLE CURRENT_USER PASSWORD NULL", "22023"),
            ("ALTER ROLE CURRENT_USER PASSWORD ''", "22023"),
            ("ALTER ROLE CURRENT_USER PASSWORD 'md5d41d8cd98f00b204e9800998ecf8427e'", "0A000"),
        ] {
            assert_eq!(client.refusal_of(sql).await, code, "{sql}");
            assert_eq!(sqlstate(&client.execute(sql, &[]).await.unwrap_err()), code, "{sql}");
        }
        assert_eq!(client.ask("SELECT 1").await, "1");
        assert!(logs_in(&proxy, &login_of("acme"), &password_of("acme")).await);
    }
}

#[tokio::test]
async fn a_batch_goes_on_behind_it_and_is_answered_as_postgresql_would() {
    for mode in ["transaction", "session"] {
        let proxy = tenant(mode).await;
        let mut wire = proxy.wire("acme").await;
        let sql = "ALTER ROLE CURRENT_USER PASSWORD 'new'";
        let answers = wire.query(sql).await;
        assert_eq!(tags(&answers), "CZ");
        assert_eq!(answers[0].command(), "ALTER ROLE");
        assert_eq!(answers[1].body, b"I");
        wire.send_bytes(&batch(sql)).await;
        assert_eq!(tags(&wire.until_ready().await), "12CZ");
        // In one batch with what a server must answer, before it and behind it.
        let select = [parse("", "SELECT 1"), bind("", "", &[]), execute("", 0)].concat();
        let change = [parse("", sql), bind("", "", &[]), describe(b'P', ""), execute("", 0)].concat();
        wire.send_bytes(&[change.clone(), select.clone(), sync()].concat()).await;
        assert_eq!(tags(&wire.until_ready().await), "12nC12DCZ");
        wire.send_bytes(&[select, change, sync()].concat()).await;
        let answers = wire.until_ready().await;
        assert_eq!(tags(&answers), "12DCEZ");
        assert_eq!(answers[4].sqlstate(), "25001");
        // Byte by byte, and the next one behind it in the same write.
        let bytes =
            [support::wire::message(b'Q', b"ALTER USER CURRENT_USER PASSWORD 'slow'\0"), batch("SELECT 7")]
                .concat();
        for byte in bytes {
            wire.send_bytes(&[byte]).await;
        }
        assert_eq!(tags(&wire.until_ready().await), "CZ");
        assert_eq!(tags(&wire.until_ready().await), "12DCZ");
        assert!(logs_in(&proxy, &login_of("acme"), "slow").await);
    }
}

/// Word of a change comes back when the next one has been made: it is not taken for a change by somebody else.
#[tokio::test]
async fn a_session_that_changes_its_password_again_and_again_stays() {
    let proxy = tenant("transaction").await;
    let mut wire = proxy.wire("acme").await;
    for number in 0..9 {
        let sql = format!("ALTER ROLE CURRENT_USER PASSWORD 'new{number}'");
        assert_eq!(tags(&wire.query(&sql).await), "CZ");
    }
    assert!(logs_in(&proxy, &login_of("acme"), "new8").await);
    // All words of it have come when one of another login's change has.
    proxy.create_login("other", "secret", &["--tenant", "acme"]);
    proxy
        .caller("other", "secret", "acme")
        .connect()
        .await
        .run("ALTER ROLE CURRENT_USER PASSWORD 'new'")
        .await;
    assert_eq!(tags(&wire.query("SELECT 1").await), "TDCZ");
}

/// The central database is away: the statement says so, and the session goes on.
#[tokio::test]
async fn a_central_database_that_is_away_is_this_statements_error_only() {
    let host = support::Cluster::start();
    let mut proxy = Proxy::with_tenant("acme").config("central_timeout", "\"1s\"").start().await;
    proxy.add_host("other", &host);
    proxy.command(&["tenant", "create", "beta", "--host", "other"]);
    proxy.create_login("beta_user", "beta-secret", &["--tenant", "beta"]);
    let client = proxy.client("beta").connect().await;
    proxy.cluster.stop();
    assert_eq!(client.refusal_of("ALTER ROLE CURRENT_USER PASSWORD 'new'").await, "57P03");
    assert_eq!(client.ask("SELECT 1").await, "1");
    proxy.cluster.start_again();
    client.run("ALTER ROLE CURRENT_USER PASSWORD 'new'").await;
    proxy.caller("beta_user", "new", "beta").connect().await;
    assert_eq!(client.ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_service_login_changes_its_password_wherever_it_is() {
    let proxy = Proxy::with_tenant("acme").start().await;
    proxy.create_login("api", "first", &["--service", "--tenants", "acme"]);
    let client = proxy.caller("api", "first", "api").connect().await;
    client.run("ALTER USER api PASSWORD 'second'").await;
    client.run("SET pglobby.tenant = 'acme'").await;
    client.execute("ALTER USER CURRENT_USER PASSWORD 'third'", &[]).await.unwrap();
    client.run("BEGIN").await;
    assert_eq!(client.refusal_of("ALTER USER CURRENT_USER PASSWORD 'fourth'").await, "25001");
    client.run("ROLLBACK").await;
    assert_eq!(client.ask("SELECT 1").await, "1");
    proxy.caller("api", "third", "acme").connect().await;
}

/// Each change is a row in the central database and a message to all nodes: a loop makes few of them.
#[tokio::test]
async fn a_login_that_changes_its_password_in_a_loop_is_slowed_down() {
    for mode in ["transaction", "session"] {
        let proxy = tenant(mode).await;
        let central = proxy.cluster.client("central").await;
        let verifier = "SELECT verifier FROM pglobby.logins WHERE name = 'reader'";
        let client = proxy.caller("reader", "reader-secret", "acme").connect().await;
        let change = "ALTER ROLE CURRENT_USER PASSWORD 'new'";
        for _ in 0..10 {
            client.run(change).await;
        }
        let last = central.ask(verifier).await;
        let error = client.try_run(change).await.unwrap_err();
        assert_eq!(sqlstate(&error), "53400");
        assert!(in_words(&error).contains("changed too often; please try again in "), "{}", in_words(&error));
        // Nor by another session of the login, nor by the extended protocol; the sessions go on.
        let other = proxy.caller("reader", "new", "acme").connect().await;
        assert_eq!(other.refusal_of(change).await, "53400");
        let error = other.execute(change, &[]).await.unwrap_err();
        assert_eq!(sqlstate(&error), "53400");
        for session in [&client, &other] {
            assert_eq!(session.ask("SELECT 1").await, "1");
        }
        assert_eq!(central.ask(verifier).await, last);
        let rows = "SELECT count(*) FROM pglobby.audit_log WHERE actor = 'login:reader'";
        assert_eq!(central.ask(rows).await, "10");
        // Others have a pace of their own.
        proxy.client("acme").connect().await.run(change).await;
    }
}

/// Each from both accesses, simple and extended, alone and behind something harmless.
#[tokio::test]
async fn nobody_changes_the_roles_that_all_logins_share() {
    for mode in ["transaction", "session"] {
        let proxy = tenant(mode).await;
        let before = roles_and_database(&proxy).await;
        let owner = proxy.client("acme").connect().await;
        let reader = proxy.caller("reader", "reader-secret", "acme").connect().await;
        reader.run("SET default_transaction_read_only = off").await;
        for sql in [
            "ALTER ROLE CURRENT_USER SET statement_timeout = '1ms'",
            "ALTER ROLE CURRENT_USER SET local_preload_libraries = 'nosuch'",
            "ALTER ROLE acme_ro SET statement_timeout = '1ms'",
            "ALTER ROLE acme_rw IN DATABASE acme SET search_path = nowhere",
            "ALTER ROLE acme_ro RESET ALL",
            "ALTER ROLE acme_rw PASSWORD 'x' VALID UNTIL '2020-01-01'",
            "ALTER ROLE acme_rw RENAME TO x",
            "ALTER ROLE acme_rw NOLOGIN",
            "ALTER USER U&\"acme!005frw\" UESCAPE '!' CONNECTION LIMIT 0",
            "ALTER DATABASE acme CONNECTION LIMIT 0",
            "ALTER DATABASE acme ALLOW_CONNECTIONS false",
            "ALTER DATABASE acme RENAME TO x",
            "ALTER DATABASE acme SET role = 'acme_ro'",
            "ALTER DATABASE acme SET local_preload_libraries = 'nosuch'",
            "REVOKE CONNECT ON DATABASE acme FROM acme_ro",
            "GRANT TEMP ON DATABASE acme TO PUBLIC",
            "DROP OWNED BY CURRENT_USER",
            "REASSIGN OWNED BY acme_rw TO acme_ro",
            "GRANT acme_rw TO acme_ro",
            "DROP ROLE acme_ro",
        ] {
            for client in [&owner, &reader] {
                assert_eq!(client.refusal_of(sql).await, "42501", "{sql}");
                assert_eq!(
                    client.refusal_of(&format!("SELECT 1; /* ; */ {sql}; SELECT 2")).await,
                    "42501",
                    "{sql}"
                );
                let error = client.execute(sql, &[]).await.expect_err(sql);
                assert_eq!(sqlstate(&error), "42501", "{sql}");
                let hint = error.as_db_error().unwrap().hint().unwrap_or_default();
                assert!(!hint.is_empty(), "{sql}");
                assert_eq!(client.ask("SELECT 1").await, "1");
            }
        }
        assert_eq!(roles_and_database(&proxy).await, before);
        // What PostgreSQL lets an owner do with settings of its database, it does.
        owner.run("ALTER DATABASE acme SET work_mem = '5MB'; ALTER DATABASE acme RESET work_mem").await;
        owner.run("BEGIN; ALTER DATABASE acme SET work_mem = '5MB'").await;
        assert_eq!(owner.refusal_of("ALTER ROLE acme_rw NOLOGIN").await, "42501");
        assert_eq!(owner.refusal_of("SELECT 1").await, "25P02", "in a transaction it fails like any error");
        owner.run("ROLLBACK").await;
        let hint = owner.try_run("ALTER ROLE acme_rw NOLOGIN").await.unwrap_err();
        assert!(hint.as_db_error().unwrap().hint().unwrap().contains("pglobby login set"));
    }
}
