//! What texts mean for the choice of a tenant.

use super::{local_answers::*, *};
use crate::{
    data_path::exchange::{ClientSide, SessionRules},
    wire::message::{append, append_cstr},
};

fn plan(sql: &str) -> Plan {
    Plan::read(sql.as_bytes(), Lexing::default())
}

fn request(sql: &str) -> Option<(Option<String>, bool)> {
    match plan(sql) {
        Plan::Choose(choice) => {
            choice.request(&[]).map(|request| (request.tenant.map(String::from), request.local))
        }
        _ => None,
    }
}

#[test]
fn every_spelling_of_the_choice_is_read() {
    let named = |local| Some((Some("acme".to_owned()), local));
    for sql in [
        "SET pglobby.tenant = 'acme'",
        "set PGLOBBY.Tenant to acme;",
        "SET SESSION pglobby.tenant = \"acme\" -- comment",
        "/* comment */ SET \"pglobby\".tenant = E'acme'",
        "SET \"pglobby.tenant\" = acme",
        "SELECT set_config('pglobby.tenant', 'acme', false)",
        "select pg_catalog.set_config('PGLOBBY.tenant', 'acme'::text, NULL);",
    ] {
        assert_eq!(request(sql), named(false), "{sql}");
    }
    for sql in ["SET LOCAL pglobby.tenant = 'acme'", "SELECT set_config('pglobby.tenant', 'acme', true)"] {
        assert_eq!(request(sql), named(true), "{sql}");
    }
    for sql in ["RESET pglobby.tenant", "SET pglobby.tenant TO DEFAULT"] {
        assert_eq!(request(sql), Some((None, false)), "{sql}");
    }
    assert_eq!(plan("SHOW pglobby.tenant"), Plan::Show("pglobby.tenant".into()));
}

#[test]
fn a_choice_among_other_things_is_none() {
    for sql in [
        "SET pglobby.tenant = 'acme'; SELECT 1",
        "SELECT 1; SET pglobby.tenant = 'acme'",
        "BEGIN; SET LOCAL pglobby.tenant = 'acme'",
        "SELECT set_config('pglobby.tenant', 'acme', false), 1",
        "SELECT set_config('pglobby.tenant', name, false) FROM t",
        "SELECT set_config('pglobby.tenant', 'ac' || 'me', false)",
        "WITH x AS (SELECT set_config('pglobby.tenant', 'acme', false)) SELECT * FROM x",
        "PREPARE x AS SELECT set_config('pglobby.tenant', 'acme', false)",
        "SET pglobby.tenant FROM CURRENT",
        "SET LOCAL pglobby.tenant = acme; SET LOCAL pglobby.tenant = acme",
    ] {
        assert_eq!(plan(sql), Plan::Mixed, "{sql}");
    }
}

#[test]
fn what_only_looks_like_a_choice_is_a_servers_business() {
    for sql in [
        "SELECT 'SET pglobby.tenant = ''acme'''",
        "-- SET pglobby.tenant = 'acme'\nSELECT 2",
        "SET LOCAL pglobby.tenants = 'acme'",
        "SELECT current_setting('pglobby.tenant')",
    ] {
        assert_eq!(plan(sql), Plan::Server, "{sql}");
    }
}

/// A responder and its client.
struct Talked {
    responder: LocalResponder,
    side: ClientSide,
}

impl Talked {
    fn new() -> Self {
        let rules = SessionRules {
            may_switch_tenant: true,
            follow: true,
            inspect_bytes_max: 1 << 20,
            statements_max: 10,
            statements_bytes_max: 1 << 20,
            settings_max: 10,
            settings_bytes_max: 1 << 20,
            ..SessionRules::for_discarded_replies(&Arc::default())
        };
        Self {
            responder: LocalResponder::new(Arc::default()),
            side: ClientSide::new(rules, Arc::default(), 1 << 32),
        }
    }

    /// Sends simple queries in one go; returns reply tags, the number of queries left, and what is next.
    fn query(&mut self, here: Option<&str>, queries: &[&str]) -> (String, usize, LocalStep) {
        let mut inbox = Vec::new();
        for sql in queries {
            append(&mut inbox, b'Q', |out| append_cstr(out, sql.as_bytes()));
        }
        let mut replies = Vec::new();
        let (used, next) = self.responder.next(&inbox, &mut self.side, here, &mut replies).unwrap();
        let (mut tags, mut rest) = (String::new(), replies.as_slice());
        while let Some((tag, length)) = crate::wire::frame::header(rest).unwrap() {
            tags.push(tag.into());
            if tag == b'Z' {
                tags.push(rest[5].into());
            }
            rest = &rest[length + 1..];
        }
        let mut left = 0;
        let mut rest = &inbox[used..];
        while let Some((_, length)) = crate::wire::frame::header(rest).unwrap() {
            left += 1;
            rest = &rest[length + 1..];
        }
        (tags, left, next)
    }
}

use std::sync::Arc;

#[test]
fn begin_is_kept_until_a_server_is_needed() {
    let mut talked = Talked::new();
    assert_eq!(
        talked.query(Some("acme"), &["BEGIN READ ONLY", "SELECT 1"]),
        ("CZT".into(), 1, LocalStep::Server)
    );
    let (mut replies, mut out) =
        (crate::data_path::exchange::pending_replies::ReplyTracker::default(), Vec::new());
    talked.responder.hand_over(&mut replies, &mut out);
    let sent = String::from_utf8_lossy(&out);
    assert!(sent.contains("BEGIN\0") && sent.contains("SET TRANSACTION READ ONLY\0"), "{sent}");
    assert!(!talked.responder.has_begun());
}

#[test]
fn nothing_behind_the_end_of_a_transaction_is_looked_at_before_the_session_is_where_it_belongs() {
    let mut talked = Talked::new();
    let (tags, left, next) = talked.query(Some("acme"), &["BEGIN", "COMMIT", "SELECT 1"]);
    assert_eq!((&*tags, left, next), ("CZTCZI", 1, LocalStep::Ended));
}

#[test]
fn a_refused_choice_fails_the_transaction_it_was_made_in() {
    let mut talked = Talked::new();
    let (tags, left, next) = talked.query(None, &["BEGIN", "SET LOCAL pglobby.tenant = 'x'", "INSERT"]);
    assert_eq!((&*tags, left), ("CZT", 1));
    assert_eq!(next, LocalStep::Choose(TenantRequest { tenant: Some("x".into()), local: true }));
    let mut replies = Vec::new();
    talked.responder.refuse(&crate::error::ClientError::NoTenantChosen, &mut talked.side, &mut replies);
    assert!(replies.ends_with(b"E"), "ReadyForQuery says that the transaction has failed");
    assert_eq!(talked.query(Some("acme"), &["SELECT 1"]), ("EZE".into(), 0, LocalStep::Waits));
    assert_eq!(talked.query(Some("acme"), &["COMMIT"]), ("CZI".into(), 0, LocalStep::Ended));
    assert_eq!(talked.query(Some("acme"), &["SELECT 1"]).2, LocalStep::Server);
}

#[test]
fn without_a_tenant_only_what_needs_no_server_is_answered() {
    let mut talked = Talked::new();
    let answers = |talked: &mut Talked, sql: &str| talked.query(None, &[sql]).0;
    assert_eq!(answers(&mut talked, "SELECT 1"), "TDCZI");
    assert_eq!(answers(&mut talked, ""), "IZI");
    assert_eq!(answers(&mut talked, "SET work_mem = '64MB'"), "CZI");
    assert_eq!(talked.side.wanted.get("work_mem"), Some("64MB"));
    assert_eq!(
        answers(&mut talked, "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL"),
        "TDCCCCZI"
    );
    assert_eq!(talked.side.wanted.get("work_mem"), None);
    for sql in ["SELECT * FROM t", "SET ROLE x", "COPY t FROM STDIN", "SET LOCAL pglobby.tenant = x"] {
        assert_eq!(answers(&mut talked, sql), "EZI", "{sql}");
    }
}

#[test]
fn what_passes_the_desk_at_a_glance_is_what_it_would_have_let_pass() {
    let queries = [
        "SELECT * FROM t WHERE name = $1",
        " insert into t values (1) ; ",
        "UPDATE t SET tenant = 'pglobby.tenant'",
        "SELECT 1",
    ];
    let others = [
        "BEGIN",
        "COMMIT",
        "",
        "SHOW pglobby.tenant",
        "SET pglobby.tenant = 'acme'",
        "SELECT 1; SET pglobby.tenant = 'acme'",
        "SELECT set_config('pglobby.tenant', 'acme', false)",
        "SELECT set_config($1, $2, false)",
        "SELECT \"set_config\"($1, $2, false)",
        "WITH x AS (SELECT set_config('pglobby.tenant', 'acme', false)) SELECT * FROM x",
    ];
    for (texts, passes) in [(&queries[..], true), (&others[..], false)] {
        for sql in texts {
            let mut talked = Talked::new();
            let (mut query, mut parse, mut bind) = (Vec::new(), Vec::new(), Vec::new());
            append(&mut query, b'Q', |out| append_cstr(out, sql.as_bytes()));
            append(&mut parse, b'P', |out| {
                append_cstr(out, b"name");
                append_cstr(out, sql.as_bytes());
                out.extend_from_slice(&[0, 0]);
            });
            append(&mut bind, b'B', |out| {
                append_cstr(out, b"");
                append_cstr(out, b"name");
            });
            talked.side.prepare_without_server(b"name", &[sql.as_bytes(), &[0, 0, 0]].concat()).unwrap();
            for message in [&query, &parse, &bind] {
                assert_eq!(talked.responder.passes(message, &talked.side).is_some(), passes, "{sql}");
                assert!(
                    talked.responder.passes(&message[..message.len() - 1], &talked.side).is_none(),
                    "a part of {sql}"
                );
            }
            if passes {
                assert_eq!(talked.query(Some("acme"), &[sql]).2, LocalStep::Server);
                assert_eq!(talked.query(Some("acme"), &["BEGIN"]).0, "CZT");
                assert!(talked.responder.passes(&query, &talked.side).is_none(), "{sql} behind a BEGIN");
            }
        }
    }
}
