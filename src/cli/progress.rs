//! Shows the progress of long work on standard error: a bar on a terminal, lines elsewhere.
//!
//! Standard output is for results only, so that `--json` stays JSON.

use std::{
    fmt::Write,
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

use crate::{
    cli::output::error_line,
    control_path::admin::actor::{Actor, Progress},
};

/// Lines for counted work, such as 10 for a copy of 1000 tables, where there is no terminal.
const LINES: u64 = 10;

/// Shows the progress of what `actor` does: with a bar on a terminal; elsewhere with lines, if the work is
/// `long`.
pub fn watch(actor: &mut Actor, long: bool) {
    actor.progress = if std::io::stderr().is_terminal() {
        Some(Arc::new(Bar(ProgressBar::new_spinner())))
    } else if long {
        Some(Arc::new(Lines::default()))
    } else {
        Some(Arc::new(Notes))
    };
}

/// For short work without a terminal: prints notes and no steps.
struct Notes;

#[async_trait]
impl Progress for Notes {
    async fn step(&self, _tenant: &str, _step: &str) {}

    async fn note(&self, tenant: &str, sentence: &str) {
        error_line(format!("{tenant}: {sentence}"));
    }
}

/// Returns a bar that counts, for example tenants; hidden without a terminal.
pub fn bar(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    ProgressBar::new(0).with_style(counting(what))
}

fn counting(what: &str) -> ProgressStyle {
    let template = format!("{{bar:30}} {{pos}}/{{len}} {what}{{left}}  {{msg}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.with_key("left", |state: &ProgressState, text: &mut dyn Write| {
        // The time left cannot be estimated before the first part is done.
        if state.pos() > 0 && !state.is_finished() {
            let _ = write!(text, ", {:#} left", HumanDuration(state.eta()));
        }
    })
}

struct Bar(ProgressBar);

#[async_trait]
impl Progress for Bar {
    async fn step(&self, tenant: &str, step: &str) {
        if is_last(step) {
            self.0.finish_and_clear();
            return;
        }
        let counted = self.0.length().is_some_and(|total| self.0.position() < total);
        if !counted {
            self.0.set_style(ProgressStyle::default_spinner());
        }
        self.0.enable_steady_tick(Duration::from_millis(100));
        self.0.set_message(format!("{tenant}: {}", in_words(step)));
    }

    async fn part(&self, what: &str, done: u64, total: u64) {
        self.0.set_style(counting(what));
        self.0.set_length(total);
        self.0.set_position(done);
    }

    async fn note(&self, tenant: &str, sentence: &str) {
        self.0.println(format!("{tenant}: {sentence}"));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// The tenth that was printed last, of the work that is counted.
#[derive(Default)]
struct Lines(Mutex<Option<(String, u64)>>);

#[async_trait]
impl Progress for Lines {
    async fn step(&self, tenant: &str, step: &str) {
        error_line(format!("{tenant}: {}", in_words(step)));
    }

    async fn part(&self, what: &str, done: u64, total: u64) {
        let tenth = (what.to_owned(), done * LINES / total.max(1));
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(tenth.clone());
        if last != Some(tenth) {
            error_line(format!("{done} of {total} {what}"));
        }
    }

    async fn note(&self, tenant: &str, sentence: &str) {
        error_line(format!("{tenant}: {sentence}"));
    }
}

fn is_last(step: &str) -> bool {
    matches!(step, "active" | "dropped" | "undone" | "rotated" | "renamed" | "moved")
}

/// Words for the steps that `pglobby.operations` records.
fn in_words(step: &str) -> &str {
    match step {
        "begun" => "started",
        "roles" => "roles done",
        "database" => "database done",
        "schema" => "schema copied",
        "closed" => "access revoked from PUBLIC",
        "owned" => "ownership set",
        "granted" => "privileges set",
        "verified" => "tested by logging in",
        "prepared" => "new passwords prepared",
        "stored" => "new passwords stored",
        "published" => "publication created",
        "subscribed" => "subscription created",
        "following" => "both hosts allow replication",
        "synced" => "replication caught up",
        "copied" => "data copied",
        "fenced" => "clients stopped",
        "quiet" => "transactions ended",
        "switched" => "new host in use",
        "found" => "database found",
        "dumped" => "dump written",
        "ended" => "sessions ended",
        "examined" => "checked",
        other => other,
    }
}
