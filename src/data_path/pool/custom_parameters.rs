//! Lends sessions servers that have had no custom parameters but the session's own
//! (`session_state/custom_names.rs`): an idle one, or a new one in place of another.
//!
//! Usually all sessions of an application set the same parameters, and every server suits them. A session that
//! begins has set none yet; most set theirs at once, and a new server would be for nothing. So new servers
//! come at a pace, which slows down as long as they are for nothing.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tracing::debug;

use super::{Pool, PooledServer};
use crate::{
    data_path::{lock::locked, session_state::custom_names::CustomSet},
    error::ClientError,
};

/// What the first text of a session's transaction is, as far as it may see a custom parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstText {
    /// It may read one, perhaps by a policy for row security.
    Reads,
    /// It sets something, or begins a transaction: it may set the same parameters as the others.
    Begins,
}

impl FirstText {
    /// Reads a text.
    pub fn of(text: &[u8]) -> Self {
        const READS: [&[u8]; 12] = [
            b"select", b"with", b"insert", b"update", b"delete", b"merge", b"show", b"table", b"values",
            b"copy", b"call", b"execute",
        ];
        let text = text.trim_ascii_start();
        let contains = |word: &[u8]| text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word));
        let end = text.iter().position(|byte| !byte.is_ascii_alphabetic()).unwrap_or(text.len());
        let first = text.get(..end).unwrap_or_default();
        let reads = READS.iter().any(|verb| first.eq_ignore_ascii_case(verb)) && !contains(b"set_config");
        if reads || contains(b"current_setting") { Self::Reads } else { Self::Begins }
    }

    /// The shortest and the longest time between two new servers.
    fn pace(self) -> (Duration, Duration) {
        match self {
            Self::Reads => (Duration::from_millis(250), Duration::from_secs(60)),
            Self::Begins => (Duration::from_secs(1), Duration::from_secs(600)),
        }
    }
}

/// A new server that gets a custom parameter sooner than this was for nothing.
const USEFUL: Duration = Duration::from_secs(10);

/// How many idle servers are looked at.
const LOOKS_MAX: usize = 8;

/// The custom parameters of a pool's servers.
#[derive(Debug, Default)]
pub(super) struct CustomParameters {
    /// A server has had one.
    any: AtomicBool,
    paces: Mutex<[Pace; 2]>,
}

/// When the next new server may come; times on the worker's clock.
#[derive(Debug, Default)]
struct Pace {
    next: Duration,
    gap: Duration,
    /// When the last one came, unless it was for nothing.
    last: Option<Duration>,
}

impl Pace {
    fn take(&mut self, now: Duration, shortest: Duration) -> bool {
        if now < self.next {
            return false;
        }
        if self.gap.is_zero() || self.last.is_some_and(|last| now.saturating_sub(last) >= USEFUL) {
            self.gap = shortest;
        }
        (self.next, self.last) = (now + self.gap, Some(now));
        true
    }

    fn was_for_nothing(&mut self, now: Duration, longest: Duration) {
        self.gap = (self.gap * 2).min(longest);
        (self.next, self.last) = (now + self.gap, None);
    }
}

impl Pool {
    /// Whether a server has had a custom parameter. If not, every server suits every session.
    #[inline]
    pub fn has_custom_parameters(&self) -> bool {
        self.custom.any.load(Ordering::Relaxed)
    }

    /// An idle server for a session that has had `own` parameters. `None`: none is idle, or the session
    /// should have a new one ([`Self::renew`]).
    #[cold]
    pub fn try_borrow_for(&self, own: CustomSet, text: FirstText) -> Option<Box<PooledServer>> {
        let mut others = Vec::new();
        let mut suiting: Option<Box<PooledServer>> = None;
        while others.len() < LOOKS_MAX {
            let Some(server) = self.try_borrow() else { break };
            let had = server.side.custom.ever;
            // A session with parameters leaves servers without any to the others.
            match had.is_within(own) {
                true if had.is_empty() == own.is_empty() => {
                    others.extend(suiting.replace(server));
                    break;
                }
                true if suiting.is_none() => suiting = Some(server),
                _ => others.push(server),
            }
        }
        if suiting.is_none() && !others.is_empty() && !self.may_renew(text) {
            suiting = Some(others.remove(0));
        }
        others.into_iter().rev().for_each(|server| self.put(server));
        suiting
    }

    fn may_renew(&self, text: FirstText) -> bool {
        self.clock.now() >= locked(&self.custom.paces)[text as usize].next
    }

    /// A new server in place of one that does not suit a session with `own` parameters, if its pace allows.
    /// If none can be opened, the session waits for up to `wait` for another one, whatever it has had.
    /// Errors: as [`Pool::borrow`].
    pub async fn renew(
        self: &Arc<Self>,
        server: Box<PooledServer>,
        own: CustomSet,
        text: FirstText,
        wait: Duration,
    ) -> Result<Box<PooledServer>, ClientError> {
        let now = self.clock.now();
        if server.side.custom.ever.is_within(own)
            || !locked(&self.custom.paces)[text as usize].take(now, text.pace().0)
        {
            return Ok(server);
        }
        let Ok(mut server) = self.restart(server, Default::default()).await else {
            return self.borrow(Instant::now(), wait).await;
        };
        // If role or database have other settings now, the pool is replaced; this session may go on.
        if self.has_same_start(&mut server).await.is_err() {
            // Its place in the pool is free before the session waits for another one.
            drop(server);
            return self.borrow(Instant::now(), wait).await;
        }
        server.renewed = Some((text, now));
        debug!(
            tenant = self.tenant.name,
            server_pid = server.process_id,
            "server renewed for a session without custom parameters"
        );
        Ok(server)
    }

    /// A server that has had custom parameters comes back.
    #[cold]
    pub(super) fn note_custom_parameters(&self, server: &mut PooledServer, now: Duration) {
        self.custom.any.store(true, Ordering::Relaxed);
        if let Some((text, since)) = server.renewed.take()
            && now.saturating_sub(since) < USEFUL
        {
            locked(&self.custom.paces)[text as usize].was_for_nothing(now, text.pace().1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_may_read_a_parameter_are_told_from_those_that_set_one() {
        for sql in ["SELECT 1", " insert into t values (1)", "BEGIN; SELECT current_setting('a.b', true)"] {
            assert_eq!(FirstText::of(sql.as_bytes()), FirstText::Reads, "{sql}");
        }
        for sql in
            ["BEGIN", "SET app.user = 1", "select Set_Config('app.user', $1, true)", "", "start transaction"]
        {
            assert_eq!(FirstText::of(sql.as_bytes()), FirstText::Begins, "{sql}");
        }
    }

    #[test]
    fn servers_for_nothing_come_ever_more_seldom() {
        let (shortest, longest) = FirstText::Begins.pace();
        let (mut pace, mut now) = (Pace::default(), Duration::from_secs(5));
        let mut gap = shortest;
        for _ in 0..12 {
            assert!(pace.take(now, shortest) && !pace.take(now, shortest));
            pace.was_for_nothing(now, longest);
            gap = (gap * 2).min(longest);
            assert!(!pace.take(now + gap - Duration::from_millis(1), shortest));
            now += gap;
        }
        assert_eq!(gap, longest);
        assert!(pace.take(now, shortest));
        now += longest.max(USEFUL);
        assert!(pace.take(now, shortest), "the last one was useful");
        assert!(pace.take(now + shortest, shortest));
    }
}
