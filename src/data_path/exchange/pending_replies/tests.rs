//! Sequences of requests and replies, and when the server is free again.

use super::*;

fn send(replies: &mut ReplyTracker, requests: &str) {
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
        let _ = replies.track(asked, Origin::Client);
    }
}

fn receive(replies: &mut ReplyTracker, tags: &str) -> Result<(), Desync> {
    for tag in tags.bytes() {
        match tag {
            b'Z' => drop(replies.ready(b'I')?),
            b'E' => drop(replies.error(|_, _| {})?),
            tag => drop(replies.reply(tag)?),
        }
    }
    Ok(())
}

#[test]
fn a_simple_query_needs_the_server_until_ready_for_query() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "Q");
    receive(&mut replies, "TDDC").unwrap();
    assert!(!replies.is_over());
    receive(&mut replies, "Z").unwrap();
    assert!(replies.is_over());
}

#[test]
fn a_transaction_keeps_the_server_between_its_statements() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "Q");
    receive(&mut replies, "C").unwrap();
    assert!(replies.ready(b'T').unwrap());
    assert!(!replies.is_over() && !replies.is_working());
    send(&mut replies, "Q");
    receive(&mut replies, "CZ").unwrap();
    assert!(replies.is_over());
}

/// pgdog#164: Parse, Describe and Flush without Sync, and the server was given back inside an implicit
/// transaction.
#[test]
fn a_batch_without_sync_keeps_the_server_although_every_reply_is_in() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "PD");
    receive(&mut replies, "1tT").unwrap();
    assert!(!replies.is_over());
    send(&mut replies, "S");
    receive(&mut replies, "Z").unwrap();
    assert!(replies.is_over());
}

#[test]
fn an_error_skips_to_the_sync_of_its_own_batch_only() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "PBDESPBES");
    receive(&mut replies, "1E").unwrap();
    assert!(!replies.is_over());
    receive(&mut replies, "Z12CZ").unwrap();
    assert!(replies.is_over());
}

#[test]
fn what_is_sent_behind_an_error_without_sync_is_ignored_until_the_sync() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "P");
    receive(&mut replies, "E").unwrap();
    assert!(!replies.track(Request::Bind, Origin::Client));
    assert!(!replies.track(Request::Query(None), Origin::Client), "a simple query is skipped as well");
    send(&mut replies, "S");
    receive(&mut replies, "Z").unwrap();
    assert!(replies.is_over());
}

#[test]
fn an_error_of_a_simple_query_behind_a_batch_skips_nothing_of_the_query() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "QQ");
    receive(&mut replies, "EZCZ").unwrap();
    assert!(replies.is_over());
}

/// libpq sends Sync with the COPY's Execute already; the server ignores it while it takes data.
#[test]
fn a_sync_sent_before_copy_data_is_not_answered() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "PBES");
    receive(&mut replies, "12G").unwrap();
    assert!(!replies.is_over());
    replies.copy_done();
    send(&mut replies, "S");
    receive(&mut replies, "CZ").unwrap();
    assert!(replies.is_over());
}

/// The whole COPY in one write: the Sync behind CopyDone is answered, the one before it is not.
#[test]
fn a_copy_that_is_sent_at_once_ends_with_the_sync_behind_its_data() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "PBES");
    replies.copy_done();
    send(&mut replies, "SQ");
    receive(&mut replies, "12GCZ").unwrap();
    assert!(!replies.is_over());
    receive(&mut replies, "TCZ").unwrap();
    assert!(replies.is_over());
}

#[test]
fn an_end_of_copy_data_that_nobody_waits_for_is_nothing() {
    let mut replies = ReplyTracker::default();
    replies.copy_done();
    assert!(replies.is_over());
    send(&mut replies, "Q");
    replies.copy_done();
    send(&mut replies, "PBES");
    replies.copy_done();
    receive(&mut replies, "EZ12CZ").unwrap();
    assert!(replies.is_over());
}

#[test]
fn copy_data_that_fails_half_way_ends_with_the_sync_behind_it() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "PBES");
    receive(&mut replies, "12GE").unwrap();
    assert!(!replies.is_over(), "the server skips until a Sync that is yet to come");
    replies.copy_done();
    send(&mut replies, "S");
    receive(&mut replies, "Z").unwrap();
    assert!(replies.is_over());
}

#[test]
fn what_nobody_asked_for_is_a_desync() {
    let mut replies = ReplyTracker::default();
    assert_eq!(receive(&mut replies, "C"), Err(Desync(b'C')));
    send(&mut replies, "PS");
    assert_eq!(receive(&mut replies, "1D"), Err(Desync(b'D')));
    let mut replies = ReplyTracker::default();
    assert_eq!(replies.ready(b'I'), Err(Desync(b'Z')));
    send(&mut replies, "Q");
    assert_eq!(replies.ready(b'X'), Err(Desync(b'Z')));
}

#[test]
fn replies_to_what_we_put_in_stay_with_us() {
    let mut replies = ReplyTracker::default();
    assert!(replies.track(Request::Parse(None), Origin::Prepare));
    send(&mut replies, "BES");
    assert!(!replies.reply(b'1').unwrap().pass);
    assert!(replies.reply(b'2').unwrap().pass);
}

#[test]
fn an_error_of_what_we_put_in_for_the_client_is_the_clients() {
    let mut replies = ReplyTracker::default();
    assert!(replies.track(Request::Parse(None), Origin::Prepare));
    send(&mut replies, "BES");
    assert_eq!(replies.error(|_, _| {}), Ok(Origin::Prepare));
    assert!(replies.ready(b'I').unwrap());
}

/// pgjdbc's `autosave`: a simple query stands in a batch. If the batch fails before it, the query is skipped
/// as well, and the server went to another session, whose query it skipped, too.
#[test]
fn a_query_that_is_skipped_does_not_end_its_batch() {
    for rest in ["Q", "F", "EQ", "QQ"] {
        let mut replies = ReplyTracker::default();
        send(&mut replies, &format!("PB{rest}"));
        receive(&mut replies, "1E").unwrap();
        assert!(!replies.is_over() && !replies.is_settled(), "{rest}");
        send(&mut replies, "PBES");
        assert!(!replies.is_over());
        receive(&mut replies, "Z").unwrap();
        assert!(replies.is_over());
    }
    // One that runs does.
    let mut replies = ReplyTracker::default();
    send(&mut replies, "PBEQ");
    receive(&mut replies, "12CTDCZ").unwrap();
    assert!(replies.is_over());
}
