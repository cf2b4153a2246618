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
            // ReadyForQuery within a transaction.
            b'*' => drop(replies.ready(b'T')?),
            b'E' => drop(replies.error(|_, _| {})?),
            tag => drop(replies.reply(tag)?),
        }
    }
    Ok(())
}

/// Plays a conversation: `>` sends requests, `<` receives replies, `]` ends COPY data, `.` finds the server
/// free, and `!` finds that it is not.
fn play(what: &str, conversation: &str) {
    let mut replies = ReplyTracker::default();
    for (at, step) in conversation.split(' ').enumerate() {
        match step.split_at(1) {
            (">", requests) => send(&mut replies, requests),
            ("<", tags) => receive(&mut replies, tags).unwrap(),
            ("]", "") => replies.copy_done(),
            (".", "") => assert!(replies.is_over(), "{what}, step {at}"),
            ("!", "") => assert!(!replies.is_over(), "{what}, step {at}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_server_is_free_when_nothing_more_can_come() {
    for (what, conversation) in [
        ("a simple query needs the server until ReadyForQuery", ">Q <TDDC ! <Z ."),
        ("a transaction keeps the server between its statements", ">Q <C* ! >Q <CZ ."),
        // pgdog#164: Parse, Describe and Flush without Sync, and the server was given back inside an implicit
        // transaction.
        ("a batch without Sync keeps the server although every reply is in", ">PD <1tT ! >S <Z ."),
        ("an error skips to the Sync of its own batch only", ">PBDESPBES <1E ! <Z12CZ ."),
        ("an error of a simple query behind a batch skips nothing of the query", ">QQ <EZCZ ."),
        // libpq sends Sync with the COPY's Execute already; the server ignores it while it takes data.
        ("a Sync sent before COPY data is not answered", ">PBES <12G ! ] >S <CZ ."),
        // The Sync behind CopyDone is answered, the one before it is not.
        ("a COPY that is sent at once ends with the Sync behind its data", ">PBES ] >SQ <12GCZ ! <TCZ ."),
        ("an end of COPY data that is not awaited is nothing", "] . >Q ] >PBES ] <EZ12CZ ."),
        // Found by the fuzz target `exchange`: the server was kept for a Sync that the client need not send.
        ("a Sync behind a query's COPY is ignored", ">QS <G ! ] <CZ ."),
        // The server skips until a Sync that is yet to come.
        ("COPY data that fails half way ends with the Sync behind it", ">PBES <12GE ! ] >S <Z ."),
        // pgjdbc's `autosave`: a simple query stands in a batch. If the batch fails before it, the query is
        // skipped as well, and the server went to another session, whose query it skipped, too.
        ("a query that is skipped does not end its batch", ">PBQ <1E ! >PBES ! <Z ."),
        ("nor does a function call", ">PBF <1E ! >PBES ! <Z ."),
        ("nor one behind Execute", ">PBEQ <1E ! >PBES ! <Z ."),
        ("nor two", ">PBQQ <1E ! >PBES ! <Z ."),
        ("one that runs does", ">PBEQ <12CTDCZ ."),
    ] {
        play(what, conversation);
    }
}

#[test]
fn what_is_sent_behind_an_error_without_sync_is_ignored_until_the_sync() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "P");
    receive(&mut replies, "E").unwrap();
    assert!(!replies.track(Request::Bind, Origin::Client));
    assert!(!replies.track(Request::Query(None), Origin::Client), "a simple query is skipped as well");
    assert!(!replies.is_status_known());
    send(&mut replies, "S");
    receive(&mut replies, "Z").unwrap();
    assert!(replies.is_over());
}

/// Found by the fuzz target `exchange`: a query behind such a batch got a Sync of the proxy's before it, and ran
/// although the batch had failed.
#[test]
fn a_batch_without_sync_may_yet_fail_after_a_query_in_it() {
    let mut replies = ReplyTracker::default();
    for (requests, tags, may_yet_skip) in [
        ("Q", "", false),
        ("", "CZ", false),
        ("PBQ", "", true),
        ("Q", "1", true),
        ("", "2CZCZ", false),
        ("PBS", "", false),
    ] {
        send(&mut replies, requests);
        receive(&mut replies, tags).unwrap();
        assert_eq!(replies.may_yet_skip(), may_yet_skip, "{requests} {tags}");
    }
}

#[test]
fn a_transaction_that_idles_is_no_work() {
    let mut replies = ReplyTracker::default();
    send(&mut replies, "Q");
    receive(&mut replies, "C").unwrap();
    assert!(replies.ready(b'T').unwrap() && !replies.is_working());
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
fn replies_to_what_we_put_in_stay_with_us_and_its_error_is_the_clients() {
    let mut replies = ReplyTracker::default();
    assert!(replies.track(Request::Parse(None), Origin::Prepare));
    send(&mut replies, "BES");
    let mut failing = ReplyTracker::default();
    assert!(failing.track(Request::Parse(None), Origin::Prepare));
    send(&mut failing, "BES");
    assert!(!replies.reply(b'1').unwrap().pass);
    assert!(replies.reply(b'2').unwrap().pass);
    assert_eq!(failing.error(|_, _| {}), Ok(Origin::Prepare));
    assert!(failing.ready(b'I').unwrap());
}
