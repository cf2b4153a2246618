//! Before a session: versions, limits, and startup parameters that mean what they mean to PostgreSQL.
//!
//! Who may enter, and what strangers see, is in `tests/login.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    client::{in_time, in_words},
    comparison::Comparison,
    proxy::{login_of, password_of},
    wire::{PROTOCOL_3_0, ssl_request, startup_message, tags},
};

async fn acme() -> Proxy {
    Proxy::with_tenant("acme").pool_size(1).start().await
}

/// CVE-2012-4575, pg_doorman's panics, pgcat#371: lengths and shapes that ended processes.
#[tokio::test]
async fn startup_packets_of_every_shape_end_at_most_their_own_connection() {
    let proxy = acme().await;
    let user = login_of("acme");
    let long = "x".repeat(5000);
    let mut shapes: Vec<Vec<u8>> = vec![
        vec![0, 0, 0, 0],
        vec![0, 0, 0, 4],
        vec![0, 0, 0, 7, 0, 3, 0],
        vec![0xff; 8],
        vec![0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0],
        [&10_001u32.to_be_bytes()[..], &[0, 3, 0, 0]].concat(),
        b"GET / HTTP/1.1\r\nHost: lobby\r\n\r\n".to_vec(),
        b"p\0\0\0\x0bsecret\0".to_vec(),
        startup_message(PROTOCOL_3_0, &[]),
        startup_message(2 << 16, &[("user", &user)]),
        startup_message(4 << 16, &[("user", &user)]),
        startup_message(PROTOCOL_3_0, &[("user", &long), ("database", &long[..4000])]),
        startup_message(PROTOCOL_3_0, &[("user", &user), ("", ""), ("database", "acme")]),
    ];
    let mut unterminated = startup_message(PROTOCOL_3_0, &[("user", &user), ("database", "acme")]);
    unterminated.truncate(unterminated.len() - 2);
    let length = u32::try_from(unterminated.len()).unwrap();
    unterminated[..4].copy_from_slice(&length.to_be_bytes());
    shapes.push(unterminated);
    let whole = startup_message(PROTOCOL_3_0, &[("user", &user), ("database", "acme")]);
    for cut in 0..whole.len() {
        let mut wire = Wire::open(proxy.port()).await;
        wire.send_bytes(&whole[..cut]).await;
        drop(wire);
    }
    for shape in shapes {
        let mut wire = Wire::open(proxy.port()).await;
        wire.send_bytes(&shape).await;
        // An answer or the end; a server that waits for more would be a hang, and fails here by `in_time`.
        if let Some(answer) = wire.receive_or_end().await {
            assert!(matches!(answer.tag, b'E' | b'R'), "{shape:?}: {answer:?}");
        }
    }
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

/// Every split and every coalescing of the first bytes gives the same session.
#[tokio::test]
async fn a_startup_that_comes_byte_by_byte_or_all_at_once_is_understood() {
    let proxy = acme().await;
    let user = login_of("acme");
    let whole = startup_message(PROTOCOL_3_0, &[("user", &user), ("database", "acme")]);
    let mut slow = Wire::open(proxy.port()).await;
    for byte in &whole {
        slow.send_bytes(&[*byte]).await;
    }
    slow.authenticate(&password_of("acme")).await.unwrap();
    assert_eq!(tags(&slow.query("SELECT 1").await), "TDCZ");

    // SSLRequest answered with N: the startup may stand right behind it, since nothing is encrypted.
    let mut asked = Wire::open(proxy.port()).await;
    asked.send_bytes(&ssl_request()).await;
    assert_eq!(asked.receive_byte().await, b'N');
    let gss = [&8u32.to_be_bytes()[..], &80_877_104u32.to_be_bytes()].concat();
    asked.send_bytes(&gss).await;
    assert_eq!(asked.receive_byte().await, b'N');
    asked.send_bytes(&whole).await;
    asked.authenticate(&password_of("acme")).await.unwrap();
    assert_eq!(tags(&asked.query("SELECT 1").await), "TDCZ");
}

/// Minor versions are negotiated, unknown protocol options are named.
#[tokio::test]
async fn a_protocol_of_the_future_is_negotiated_down() {
    let proxy = acme().await;
    let user = login_of("acme");
    let mut wire = Wire::open(proxy.port()).await;
    wire.startup((3 << 16) | 9999, &[("user", &user), ("database", "acme"), ("_pq_.surprise", "1")]).await;
    let greeting = wire.authenticate(&password_of("acme")).await.unwrap();
    let negotiated = greeting.iter().find(|message| message.tag == b'v').expect("NegotiateProtocolVersion");
    assert!(negotiated.body.ends_with(b"_pq_.surprise\0"), "{negotiated:?}");
    assert_eq!(tags(&wire.query("SELECT 1").await), "TDCZ");
}

/// PostgreSQL's own error, and the next client with good ones finds a clean server.
#[tokio::test]
async fn bad_startup_parameters_are_refused_with_the_servers_own_error() {
    let proxy = acme().await;
    let user = login_of("acme");
    let bad = [
        (("no_such_parameter", "1"), "42704"),
        (("work_mem", "a lot"), "22023"),
        (("log_statement", "all"), "42501"),
        (("shared_buffers", "1GB"), "55P02"),
        (("options", "-c work_mem=nonsense"), "22023"),
    ];
    for (parameter, state) in bad {
        let mut wire = Wire::open(proxy.port()).await;
        wire.startup(PROTOCOL_3_0, &[("user", &user), ("database", "acme"), parameter]).await;
        let refusal = wire.authenticate(&password_of("acme")).await.expect_err("refused");
        assert_eq!(refusal.sqlstate(), state, "{parameter:?}: {refusal:?}");
        assert_eq!(proxy.client("acme").ask("SHOW work_mem").await, "4MB");
    }
}

/// DETAIL and HINT, and the name of the parameter as the client has sent it.
#[tokio::test]
async fn a_bad_startup_parameter_has_the_servers_whole_error_in_both_pool_modes() {
    let mut differing = Vec::new();
    for mode in ["transaction", "session"] {
        let comparison = Comparison::start_in(mode, 2, "").await;
        for parameter in [
            ("DateStyle", "UTC, YMD"),
            ("datestyle", "nonsense"),
            ("IntervalStyle", "x"),
            ("intervalstyle", "x"),
            ("TimeZone", "Nowhere/Else"),
            ("client_encoding", "klingon"),
            ("my.bad-name", "1"),
            ("My.Bad-Name", "1"),
            ("nope", "1"),
            ("Nope", "1"),
            ("work_mem", "1kB"), // PostgreSQL 18 says `work_mem` to `Work_Mem` as well, 15 does not
            ("work_mem", "a lot"),
            ("shared_buffers", "1MB"),
            ("max_stack_depth", "10kB"),
            ("log_statement", "all"),
            ("search_path", "a,,b"),
            ("role", "nope"),
            ("session_authorization", "one"),
            ("session_authorization", "postgres"),
            ("session_authorization", "nope"),
            ("default_table_access_method", "nope"),
            ("options", "-c TimeZone=Nowhere/Else"),
            ("options", "-c IntervalStyle=x -c work_mem=5MB"),
            ("options", "--nope=1"),
            ("options", "-c My..bad=1"),
            ("options", "nonsense"),
        ] {
            let refusals = comparison.logins(&[parameter]).await.map(|login| {
                let refusal = login.err().unwrap_or_else(|| panic!("{mode}, {parameter:?} was accepted"));
                [b'S', b'V', b'C', b'M', b'D', b'H'].map(|letter| refusal.field(letter))
            });
            if refusals[1] != refusals[0] {
                differing.push(format!("{mode}, {parameter:?}: {refusals:?}"));
            }
        }
        // A bad parameter is no failure of the tenant's.
        assert_eq!(comparison.proxy.client("acme").ask("SELECT 1").await, "1");
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

#[tokio::test]
async fn options_are_read_in_every_spelling_that_libpq_allows() {
    let proxy = acme().await;
    for options in [
        "-c work_mem=5MB -c search_path=shop",
        "--work_mem=5MB --search_path=shop",
        "-cwork_mem=5MB  -csearch_path=shop",
        "--work-mem=5MB -c search-path=shop",
        "-c pglobby.tenant=acme -c work_mem=5MB -c search_path=shop",
    ] {
        let client = proxy.client("acme").options(options).connect().await;
        assert_eq!(client.ask("SHOW work_mem").await, "5MB", "{options}");
        assert_eq!(client.ask("SHOW search_path").await, "shop", "{options}");
    }
    let escaped = proxy.client("acme").options(r"-c search_path=a,\ b\\c").connect().await;
    assert_eq!(escaped.ask("SHOW search_path").await, r"a, b\c");
}

/// PostgreSQL cuts a long application_name and says so. rust-postgres' own tests wait for that notice; whoever comes later with the
/// same name gets it as well.
#[tokio::test]
async fn notices_about_startup_parameters_reach_whoever_asked_for_them() {
    let proxy = acme().await;
    let (user, long) = (login_of("acme"), "x".repeat(65));
    for application_name in [&*long, &*long, "short"] {
        let mut wire = Wire::open(proxy.port()).await;
        let parameters = [("user", &*user), ("database", "acme"), ("application_name", application_name)];
        wire.startup(PROTOCOL_3_0, &parameters).await;
        let greeting = wire.authenticate(&password_of("acme")).await.unwrap();
        let notices: Vec<_> = greeting.iter().filter(|message| message.tag == b'N').collect();
        assert_eq!(notices.len(), usize::from(application_name == long), "{application_name}: {notices:?}");
        assert!(notices.iter().all(|notice| notice.sqlstate() == "42622"), "{notices:?}");
    }
}

/// What a client asked for at startup never touches a connection but its own (CVE-2025-12819).
#[tokio::test]
async fn startup_parameters_are_their_clients_own() {
    let proxy = acme().await;
    let with = proxy.client("acme").options("-c search_path=evil -c my.flag=on").connect().await;
    let without = proxy.client("acme").connect().await;
    for _ in 0..3 {
        assert_eq!(with.ask("SELECT current_setting('my.flag')").await, "on");
        assert_eq!(without.ask("SELECT current_setting('my.flag', true)").await, "");
        assert_eq!(without.ask("SHOW search_path").await, "\"$user\", public");
    }
}

#[tokio::test]
async fn whoever_does_not_log_in_is_shown_out_and_keeps_nobody_else_out() {
    let proxy = Proxy::with_tenant("acme")
        .config("client_login_timeout", "\"3s\"")
        .config("max_unauthenticated_conn", "5")
        .start()
        .await;
    let mut silent = Vec::new();
    for _ in 0..6 {
        silent.push(Wire::open(proxy.port()).await);
    }
    // One has no place: the last, or the one before if another thread has accepted that one and counts it later.
    let mut told = Vec::new();
    for mut wire in silent {
        told.push(wire.until_end().await.last().expect("a word").sqlstate());
    }
    told.sort();
    assert_eq!(told, ["53300", "57014", "57014", "57014", "57014", "57014"]);
    // A place is free once the connection is closed on both ends.
    in_time("a free place", async {
        while let Err(error) = proxy.client("acme").try_connect().await {
            // Or a loaded machine takes longer for a login than this proxy gives it.
            let code = error.code().map(|code| code.code());
            assert!(matches!(code, Some("53300" | "57014")), "{}", in_words(&error));
        }
    })
    .await;
}

#[tokio::test]
async fn clients_beyond_the_limit_are_told_and_the_place_of_one_that_left_is_free() {
    let proxy = Proxy::with_tenant("acme").config("max_client_conn", "3").start().await;
    let mut here = Vec::new();
    for _ in 0..3 {
        here.push(proxy.client("acme").connect().await);
    }
    assert_eq!(proxy.client("acme").refusal().await, "53300");
    assert_eq!(here[0].ask("SELECT 1").await, "1");
    here.pop().unwrap().vanish().await;
    in_time("a free place", async {
        while let Err(error) = proxy.client("acme").try_connect().await {
            assert_eq!(error.code().map(|code| code.code()), Some("53300"), "{}", in_words(&error));
        }
    })
    .await;
}

/// A client may send its first query before it has heard that it is logged in.
#[tokio::test]
async fn a_query_right_behind_the_last_proof_is_not_lost() {
    let proxy = acme().await;
    let mut first = proxy.wire("acme").await;
    first.query("BEGIN").await; // holds the only server: the next one's greeting is known already
    let user = login_of("acme");
    let mut wire = Wire::open(proxy.port()).await;
    wire.startup(PROTOCOL_3_0, &[("user", &user), ("database", "acme")]).await;
    wire.authenticate(&password_of("acme")).await.unwrap();
    wire.send(b'Q', b"SELECT 'early'\0").await;
    first.query("COMMIT").await;
    assert_eq!(tags(&wire.until_ready().await), "TDCZ");
}

/// RESET leads to what was given at startup, of a parameter that PostgreSQL does not know as well.
#[tokio::test]
async fn reset_leads_back_to_a_custom_parameter_of_the_startup_packet() {
    let proxy = acme().await;
    let session = proxy.client("acme").options("-c my.tenant=given").connect().await;
    for reset in ["RESET my.tenant", "SET my.tenant TO DEFAULT", "RESET ALL"] {
        session.run("SET my.tenant = 'other'").await;
        assert_eq!(session.ask("SHOW my.tenant").await, "other");
        session.run(reset).await;
        assert_eq!(session.ask("SHOW my.tenant").await, "given", "{reset}");
    }
    // What is set to nothing is no reset.
    session.run("SET my.tenant = ''").await;
    assert_eq!(session.ask("SHOW my.tenant").await, "");
}
