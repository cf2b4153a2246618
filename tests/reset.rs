//! RESET leads to what the session asked for at startup, at once: also where the transaction goes on, or the next request is on its
//! way already. Whatever is said here is said to PostgreSQL as well, on a connection of its own, and must be answered alike.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    comparison::{Comparison, Twin},
    wire::{Message, batch, bind, c_string, close, execute, message, parse, rows, sync},
};

/// What the session is like: how it reads a date, which table it finds, what it has set.
const LOOK: &str = "SELECT '01/02/03'::date, (SELECT x FROM t), current_setting('TimeZone'), \
    coalesce(current_setting('my.note', true), ''), current_setting('role')";

const RESETS: [&str; 11] = [
    "RESET DateStyle",
    "SET DateStyle TO DEFAULT",
    "SET LOCAL DateStyle TO DEFAULT",
    "RESET search_path",
    "RESET TIME ZONE",
    "RESET my.note",
    "RESET ROLE",
    "RESET SESSION AUTHORIZATION",
    "RESET ALL",
    "SELECT FROM set_config('DateStyle', NULL, false)",
    "DO $$BEGIN RESET DateStyle; RESET search_path; END$$",
];

const STARTUPS: [&str; 4] = [
    "-c DateStyle=SQL,DMY",
    "-c search_path=one -c my.note=given -c DateStyle=SQL,DMY -c TimeZone=Asia/Tokyo",
    "-c role=one -c search_path=one -c client_encoding=LATIN1 -c my.note=given",
    "",
];

/// How texts are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    Simple,
    SimpleAtOnce,
    Extended,
    ExtendedAtOnce,
    /// With one Sync.
    Batch,
}

const HOWS: [How; 5] = [How::Simple, How::SimpleAtOnce, How::Extended, How::ExtendedAtOnce, How::Batch];

/// What a test sends to both.
trait Both {
    async fn told(&mut self, bytes: &[u8], syncs: usize) -> [Vec<String>; 2];
    async fn say(&mut self, what: &str, how: How, texts: &[&str]);
}

impl Both for Twin {
    async fn told(&mut self, bytes: &[u8], syncs: usize) -> [Vec<String>; 2] {
        self.direct.send_bytes(bytes).await;
        self.proxied.send_bytes(bytes).await;
        let (mut direct, mut proxied) = (Vec::new(), Vec::new());
        for _ in 0..syncs {
            direct.push(outcome(&self.direct.until_ready().await));
            proxied.push(outcome(&self.proxied.until_ready().await));
        }
        [direct, proxied]
    }

    /// What both get, and what they are told of themselves in the end.
    async fn say(&mut self, what: &str, how: How, texts: &[&str]) {
        let simple = |text: &&str| message(b'Q', &c_string(text));
        let part = |text: &&str| [parse("", text), bind("", "", &[]), execute("", 0)].concat();
        let messages: Vec<Vec<u8>> = match how {
            How::Simple | How::SimpleAtOnce => texts.iter().map(simple).collect(),
            How::Extended | How::ExtendedAtOnce => texts.iter().map(|text| batch(text)).collect(),
            How::Batch => vec![texts.iter().map(part).chain([sync()]).collect::<Vec<_>>().concat()],
        };
        let (mut direct, mut proxied) = (Vec::new(), Vec::new());
        match how {
            How::Simple | How::Extended => {
                for message in &messages {
                    let [there, here] = self.told(message, 1).await;
                    direct.extend(there);
                    proxied.extend(here);
                }
            }
            _ => [direct, proxied] = self.told(&messages.concat(), messages.len()).await,
        }
        assert_eq!(proxied, direct, "{what} {how:?} {texts:?}");
        for name in ["DateStyle", "TimeZone", "client_encoding"] {
            let (here, there) = (self.proxied.parameters.get(name), self.direct.parameters.get(name));
            assert_eq!(here, there, "{what} {how:?} {texts:?}: {name}");
        }
    }
}

fn outcome(answers: &[Message]) -> String {
    let errors: Vec<_> = answers.iter().filter(|answer| answer.tag == b'E').map(Message::sqlstate).collect();
    let done: Vec<_> = answers.iter().filter(|answer| answer.tag == b'C').map(Message::command).collect();
    format!("{:?} {errors:?} {done:?} {:?}", rows(answers), answers.last().unwrap().body)
}

/// One server, which all sessions use in turn.
async fn one_server() -> Comparison {
    let sql = "CREATE TABLE public.t AS SELECT 'public' AS x; GRANT SELECT ON public.t TO PUBLIC;
               GRANT USAGE ON SCHEMA public TO PUBLIC";
    Comparison::start(1, sql).await
}

/// Runs these texts in every way, in sessions of every kind. Other sessions between them must not see their settings.
async fn run_everywhere(comparison: &Comparison, texts: &[&str]) {
    let mut plain = comparison.twin("").await;
    let mut other = comparison.twin("-c DateStyle=ISO,YMD -c search_path=two").await;
    for startup in STARTUPS {
        for how in HOWS {
            let mut twin = comparison.twin(startup).await;
            twin.say(startup, how, texts).await;
            twin.say(startup, How::Simple, &["ROLLBACK"]).await;
            plain.say("a stranger", How::Simple, &[LOOK]).await;
            twin.say(startup, How::Simple, &[LOOK]).await;
            other.say("another", How::Extended, &[LOOK]).await;
            twin.say(startup, how, &["BEGIN", LOOK, "COMMIT", "RESET ALL", LOOK]).await;
        }
    }
}

const MINE: [&str; 5] = [
    "SET DateStyle = German",
    "SET search_path = two",
    "SET my.note = 'mine'",
    "SET TimeZone = 'Europe/Rome'",
    "SET ROLE two",
];

fn with<'t>(before: &[&'t str], after: &[&'t str]) -> Vec<&'t str> {
    [before, &MINE, after].concat()
}

/// `RESET DateStyle; SELECT '01/02/2026'::date` in a transaction was the second of January to a client that had asked to
/// write days first, and `RESET search_path` led to other tables.
#[tokio::test]
async fn what_is_reset_in_a_transaction_is_at_once_as_at_startup() {
    let comparison = one_server().await;
    for reset in RESETS {
        run_everywhere(&comparison, &with(&["BEGIN"], &[reset, LOOK, LOOK, "COMMIT", LOOK])).await;
    }
}

#[tokio::test]
async fn what_is_reset_is_undone_with_its_transaction() {
    let comparison = one_server().await;
    for reset in RESETS {
        run_everywhere(&comparison, &with(&[], &["BEGIN", reset, LOOK, "ROLLBACK", LOOK])).await;
        run_everywhere(
            &comparison,
            &with(
                &["BEGIN"],
                &[
                    "SAVEPOINT a",
                    reset,
                    LOOK,
                    "ROLLBACK TO a",
                    LOOK,
                    reset,
                    "SAVEPOINT b",
                    MINE[0],
                    "ROLLBACK TO b",
                    LOOK,
                    "COMMIT",
                    LOOK,
                ],
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn what_is_reset_outside_a_transaction_is_so_for_the_next_request_on_its_way() {
    let comparison = one_server().await;
    for reset in RESETS.into_iter().chain(["DISCARD ALL"]) {
        run_everywhere(
            &comparison,
            &with(&[], &[reset, LOOK, reset, "BEGIN", LOOK, "ROLLBACK", LOOK, "SELECT 1/0", LOOK]),
        )
        .await;
        run_everywhere(&comparison, &[reset, "SELECT 1/0", LOOK]).await;
    }
}

/// A BEGIN takes what its batch did before it into its transaction: the end of a failed one undid the restore, and
/// what was sent together with its COMMIT ran with PostgreSQL's own settings.
#[tokio::test]
async fn what_a_failed_transaction_undoes_is_restored_behind_it() {
    let comparison = one_server().await;
    let together = |texts: &[&str]| {
        let parts = texts.iter().map(|text| [parse("", text), bind("", "", &[]), execute("", 0)].concat());
        parts.chain([sync()]).collect::<Vec<_>>().concat()
    };
    for startup in STARTUPS {
        for end in ["COMMIT", "ROLLBACK"] {
            let mut twin = comparison.twin(startup).await;
            let ended = message(b'Q', &c_string(end));
            for (bytes, syncs) in [
                ([batch("RESET ALL"), together(&["ROLLBACK", LOOK, "BEGIN"])].concat(), 2),
                (batch(LOOK), 1),
                ([batch("SELECT 1/0"), batch(LOOK)].concat(), 2),
                ([ended, batch(LOOK)].concat(), 2),
                (batch(LOOK), 1),
            ] {
                let [direct, proxied] = twin.told(&bytes, syncs).await;
                assert_eq!(proxied, direct, "{startup} {end}");
            }
        }
    }
}

/// Nothing is set again where nothing was reset; and nothing of ours gets into the way.
#[tokio::test]
async fn what_is_not_reset_stays() {
    let comparison = one_server().await;
    for texts in [
        with(&["BEGIN"], &["SAVEPOINT a", "RESET nothing", LOOK, "ROLLBACK TO a", LOOK, "COMMIT", LOOK]),
        with(&[], &["RESET log_statement_stats", LOOK]),
        with(&[], &["RESET DateStyle; SELECT 1/0", LOOK]),
        with(&["BEGIN"], &["SET my.note = ''", "RESET DateStyle", LOOK, "COMMIT", LOOK]),
        with(&["BEGIN"], &["SET LOCAL search_path = one", "RESET DateStyle", LOOK, "COMMIT", LOOK]),
        with(&[], &["BEGIN", "SET LOCAL DateStyle TO DEFAULT", LOOK, "COMMIT", LOOK]),
        with(&[], &["BEGIN", "SET LOCAL DateStyle = ISO", "RESET DateStyle", LOOK, "COMMIT", LOOK]),
        vec!["BEGIN", "RESET ALL", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", LOOK, "COMMIT", LOOK],
        vec!["BEGIN", "RESET ALL", "COMMIT", LOOK],
        with(&["BEGIN"], &["RESET DateStyle", "SET LOCAL DateStyle = ISO", LOOK, "COMMIT", LOOK]),
        vec!["BEGIN", "RESET ALL; SAVEPOINT a; SELECT 1/0", "ROLLBACK TO a", LOOK, "COMMIT", LOOK],
    ] {
        run_everywhere(&comparison, &texts).await;
    }
}

/// Portals run in another order than they are bound, and the client's unnamed ones stay.
#[tokio::test]
async fn a_portal_resets_when_it_runs() {
    let comparison = one_server().await;
    for startup in STARTUPS {
        let mut twin = comparison.twin(startup).await;
        let begin = [batch("BEGIN"), batch(MINE[0]), batch(MINE[1])].concat();
        let reset = [parse("r", "RESET ALL"), bind("r", "r", &[]), parse("look", LOOK)].concat();
        let first = [bind("a", "look", &[]), execute("a", 0), parse("", LOOK), bind("", "", &[])].concat();
        let second = [execute("r", 0), execute("", 0), bind("b", "look", &[]), execute("b", 0)].concat();
        let third = [sync(), bind("c", "look", &[]), execute("c", 0), sync()].concat();
        let bytes = [begin, reset, first, second, third, batch("COMMIT"), batch(LOOK)].concat();
        let [direct, proxied] = twin.told(&bytes, 7).await;
        assert_eq!(proxied, direct, "{startup}");
    }
}

/// A statement that is prepared behind a reset is not taken for that of a session with other settings.
#[tokio::test]
async fn what_is_prepared_behind_a_reset_is_shared_with_its_like() {
    let comparison = one_server().await;
    for startup in STARTUPS {
        let (mut twin, mut plain) = (comparison.twin(startup).await, comparison.twin("").await);
        let prepare = [close(b'S', "q"), parse("q", LOOK), sync()].concat();
        let run = [bind("", "q", &[]), execute("", 0), sync()].concat();
        let resets = [batch("BEGIN"), batch(MINE[0]), batch(MINE[1]), batch("RESET ALL")].concat();
        for (who, bytes, syncs) in [
            (1, [&resets[..], &prepare, &run, &batch("COMMIT"), &run].concat(), 8),
            (0, [&prepare[..], &run].concat(), 2),
            (1, [&run[..], &batch("DISCARD ALL"), &prepare, &run].concat(), 4),
            (0, run.clone(), 1),
            (1, [&resets[..], &run, &batch("ROLLBACK"), &run].concat(), 7),
        ] {
            let [direct, proxied] = [&mut plain, &mut twin][who].told(&bytes, syncs).await;
            assert_eq!(proxied, direct, "{startup}");
        }
    }
}

/// Nothing is put into the data of a COPY.
#[tokio::test]
async fn a_copy_behind_a_reset_takes_its_own_data() {
    let comparison = one_server().await;
    for startup in STARTUPS {
        let mut twin = comparison.twin(startup).await;
        let query = |text: &str| message(b'Q', &c_string(text));
        let made = query("CREATE TEMP TABLE mine (x date)");
        let copy = query("SET DateStyle = German; RESET DateStyle; COPY mine FROM STDIN");
        let data = [message(b'd', b"2003-02-01\n"), message(b'c', b"")].concat();
        let look = query("SELECT *, '01/02/03'::date FROM mine");
        let [direct, proxied] = twin.told(&[made, copy, data, look].concat(), 3).await;
        assert_eq!(proxied, direct, "{startup}");
    }
}
