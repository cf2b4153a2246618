//! Sequences of requests and replies, and when the server is free again.

use super::*;

fn asked(lease: &mut ReplyTracker, requests: &str) {
    for request in requests.chars() {
        let asked = match request {
            'P' => Request::Parse(None),
            'B' => Request::Bind,
            'D' => Request::Describe,
            'E' => Request::Execute(None),
            'C' => Request::Close(None),
            'S' => Request::Sync,
            'Q' => Request::Query(None),
            'F' => Request::FunctionCall,
            other => panic!("{other}"),
        };
        let _ = lease.track(asked, Origin::Client);
    }
}

fn replies(lease: &mut ReplyTracker, tags: &str) -> Result<(), Desync> {
    for tag in tags.bytes() {
        match tag {
            b'Z' => drop(lease.ready(b'I')?),
            b'E' => drop(lease.error(|_, _| {})?),
            tag => drop(lease.reply(tag)?),
        }
    }
    Ok(())
}

#[test]
fn a_simple_query_needs_the_server_until_ready_for_query() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "Q");
    replies(&mut lease, "TDDC").unwrap();
    assert!(!lease.is_over());
    replies(&mut lease, "Z").unwrap();
    assert!(lease.is_over());
}

#[test]
fn a_transaction_keeps_the_server_between_its_statements() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "Q");
    replies(&mut lease, "C").unwrap();
    assert!(lease.ready(b'T').unwrap());
    assert!(!lease.is_over() && !lease.is_working());
    asked(&mut lease, "Q");
    replies(&mut lease, "CZ").unwrap();
    assert!(lease.is_over());
}

/// pgdog#164: Parse, Describe and Flush without Sync, and the server was given back inside an implicit transaction.
#[test]
fn a_batch_without_sync_keeps_the_server_although_every_reply_is_in() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "PD");
    replies(&mut lease, "1tT").unwrap();
    assert!(!lease.is_over());
    asked(&mut lease, "S");
    replies(&mut lease, "Z").unwrap();
    assert!(lease.is_over());
}

#[test]
fn an_error_skips_to_the_sync_of_its_own_batch_only() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "PBDESPBES");
    replies(&mut lease, "1E").unwrap();
    assert!(!lease.is_over());
    replies(&mut lease, "Z12CZ").unwrap();
    assert!(lease.is_over());
}

#[test]
fn what_is_sent_behind_an_error_without_sync_is_ignored_until_the_sync() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "P");
    replies(&mut lease, "E").unwrap();
    assert!(!lease.track(Request::Bind, Origin::Client));
    assert!(!lease.track(Request::Query(None), Origin::Client), "a simple query is skipped as well");
    asked(&mut lease, "S");
    replies(&mut lease, "Z").unwrap();
    assert!(lease.is_over());
}

#[test]
fn an_error_of_a_simple_query_behind_a_batch_skips_nothing_of_the_query() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "QQ");
    replies(&mut lease, "EZCZ").unwrap();
    assert!(lease.is_over());
}

/// libpq sends Sync with the COPY's Execute already; the server ignores it while it takes data.
#[test]
fn a_sync_sent_before_copy_data_is_not_answered() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "PBES");
    replies(&mut lease, "12G").unwrap();
    assert!(!lease.is_over());
    lease.copy_done();
    asked(&mut lease, "S");
    replies(&mut lease, "CZ").unwrap();
    assert!(lease.is_over());
}

/// The whole COPY in one write: the Sync behind CopyDone is answered, the one before it is not.
#[test]
fn a_copy_that_is_sent_at_once_ends_with_the_sync_behind_its_data() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "PBES");
    lease.copy_done();
    asked(&mut lease, "SQ");
    replies(&mut lease, "12GCZ").unwrap();
    assert!(!lease.is_over());
    replies(&mut lease, "TCZ").unwrap();
    assert!(lease.is_over());
}

#[test]
fn an_end_of_copy_data_that_nobody_waits_for_is_nothing() {
    let mut lease = ReplyTracker::default();
    lease.copy_done();
    assert!(lease.is_over());
    asked(&mut lease, "Q");
    lease.copy_done();
    asked(&mut lease, "PBES");
    lease.copy_done();
    replies(&mut lease, "EZ12CZ").unwrap();
    assert!(lease.is_over());
}

#[test]
fn copy_data_that_fails_half_way_ends_with_the_sync_behind_it() {
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "PBES");
    replies(&mut lease, "12GE").unwrap();
    assert!(!lease.is_over(), "the server skips until a Sync that is yet to come");
    lease.copy_done();
    asked(&mut lease, "S");
    replies(&mut lease, "Z").unwrap();
    assert!(lease.is_over());
}

#[test]
fn what_nobody_asked_for_is_a_desync() {
    let mut lease = ReplyTracker::default();
    assert_eq!(replies(&mut lease, "C"), Err(Desync(b'C')));
    asked(&mut lease, "PS");
    assert_eq!(replies(&mut lease, "1D"), Err(Desync(b'D')));
    let mut lease = ReplyTracker::default();
    assert_eq!(lease.ready(b'I'), Err(Desync(b'Z')));
    asked(&mut lease, "Q");
    assert_eq!(lease.ready(b'X'), Err(Desync(b'Z')));
}

#[test]
fn replies_to_what_we_put_in_stay_with_us() {
    let mut lease = ReplyTracker::default();
    assert!(lease.track(Request::Parse(None), Origin::Prepare));
    asked(&mut lease, "BES");
    assert!(!lease.reply(b'1').unwrap().pass);
    assert!(lease.reply(b'2').unwrap().pass);
}

#[test]
fn an_error_of_what_we_put_in_for_the_client_is_the_clients() {
    let mut lease = ReplyTracker::default();
    assert!(lease.track(Request::Parse(None), Origin::Prepare));
    asked(&mut lease, "BES");
    assert_eq!(lease.error(|_, _| {}), Ok(Origin::Prepare));
    assert!(lease.ready(b'I').unwrap());
}

/// pgjdbc's `autosave`: a simple query stands in a batch. If the batch fails before it, the query is skipped as well, and the
/// server went to somebody else, whose query it skipped, too.
#[test]
fn a_query_that_is_skipped_does_not_end_its_batch() {
    for rest in ["Q", "F", "EQ", "QQ"] {
        let mut lease = ReplyTracker::default();
        asked(&mut lease, &format!("PB{rest}"));
        replies(&mut lease, "1E").unwrap();
        assert!(!lease.is_over() && !lease.is_settled(), "{rest}");
        asked(&mut lease, "PBES");
        assert!(!lease.is_over());
        replies(&mut lease, "Z").unwrap();
        assert!(lease.is_over());
    }
    // One that runs does.
    let mut lease = ReplyTracker::default();
    asked(&mut lease, "PBEQ");
    replies(&mut lease, "12CTDCZ").unwrap();
    assert!(lease.is_over());
}
