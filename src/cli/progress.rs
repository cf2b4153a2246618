//! A sign of life while it takes long, on standard error: a bar on a terminal, lines elsewhere.
//!
//! Standard output belongs to the answer, so that `--json` stays JSON.

use std::{
    fmt::Write,
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

use crate::{
    cli::output::complain,
    control_path::admin::actor::{Actor, Progress},
};

/// Elsewhere than on a terminal, one line for each of so many parts of what is counted.
const LINES: u64 = 10;

/// Whoever watches long work at this command line: on a terminal a bar; elsewhere lines, if the work is `long`.
pub fn watched(operator: &mut Actor, long: bool) {
    operator.progress = if std::io::stderr().is_terminal() {
        Some(Arc::new(Bar(ProgressBar::new_spinner())))
    } else if long {
        Some(Arc::new(Lines::default()))
    } else {
        Some(Arc::new(Notes))
    };
}

/// Of work that is soon done nothing is shown but what is worth a sentence.
struct Notes;

#[async_trait]
impl Progress for Notes {
    async fn step(&self, _tenant: &str, _step: &str) {}

    async fn note(&self, tenant: &str, sentence: &str) {
        complain(format!("{tenant}: {sentence}"));
    }
}

/// The bar of something that is counted, such as tenants.
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
        // Nothing done says nothing about the rest.
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
        self.0.set_message(format!("{tenant}: {step}"));
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

/// What was said last of something that is counted.
#[derive(Default)]
struct Lines(Mutex<Option<(String, u64)>>);

#[async_trait]
impl Progress for Lines {
    async fn step(&self, tenant: &str, step: &str) {
        complain(format!("{tenant}: {step}"));
    }

    async fn part(&self, what: &str, done: u64, total: u64) {
        let tenth = (what.to_owned(), done * LINES / total.max(1));
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(tenth.clone());
        if said != Some(tenth) {
            complain(format!("{done} of {total} {what}"));
        }
    }

    async fn note(&self, tenant: &str, sentence: &str) {
        complain(format!("{tenant}: {sentence}"));
    }
}

fn is_last(step: &str) -> bool {
    matches!(step, "active" | "dropped" | "undone" | "rotated" | "renamed" | "moved")
}
