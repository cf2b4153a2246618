//! pglobby beside PgBouncer and beside no pooler at all, on this machine; `scripts/bench` runs it.
//!
//! PostgreSQL, PgBouncer and pglobby are started here, on loopback, with equal settings (`stand.rs`). Every scenario
//! (`scenarios.rs`) runs against one after the other and again, so that what else the machine does falls on all of
//! them; `report.rs` makes medians, a table, JSON and plots of it. Nothing is asserted: numbers belong to machines.
//! A run during which other processes needed the CPU (`noise.rs`) is repeated, and marked if that does not help.
//!
//! CPU is the operating system's accounting of all threads of the pooler (`accounting.rs`), over a window in which only
//! the load ran. Clients are `pgbench`, or, for what it cannot do, `client.rs`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a measurement that meets something unexpected ends, loudly"
)]

mod accounting;
mod client;
mod cold;
mod ddl;
mod fleet;
mod noise;
mod pgbench;
mod pgbouncer;
mod plot;
mod report;
mod sample;
mod scenarios;
mod stand;
mod streams;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Parser;

use pgbouncer::Program;
use report::Report;
use sample::Outcome;
use scenarios::{SCENARIOS, Scenario};
use stand::{Pooler, Stand};

/// pglobby, PgBouncer and a direct connection, measured beside each other
#[derive(Parser)]
struct Arguments {
    /// One short round of everything, to see that it runs; its numbers mean little
    #[arg(long)]
    quick: bool,
    /// Only scenarios whose name contains this; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// A PgBouncer to measure beside the distribution's, for instance a newer one; bars and ratios are to the newest
    #[arg(long, value_name = "PATH")]
    pgbouncer: Option<PathBuf>,
    /// How often each scenario runs against each pooler
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run that count, at least 3
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Where JSON and plots go
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
    /// Puts the table into docs/performance.md as well, and the plots beside it
    #[arg(long)]
    write_docs: bool,
    /// Names the scenarios
    #[arg(long)]
    list: bool,
    /// Starts everything, prints ports and process ids, and waits for Enter: for perf, strace and pgbench by hand
    #[arg(long)]
    stay: bool,
    /// cargo bench says so
    #[arg(long, hide = true)]
    bench: bool,
}

/// How long and how often.
pub struct Plan {
    pub rounds: usize,
    pub window: Duration,
    pub quick: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments = Arguments::parse();
    let chosen: Vec<&Scenario> = SCENARIOS.iter().filter(|it| is_chosen(it, &arguments.only)).collect();
    if arguments.list {
        chosen.iter().for_each(|scenario| println!("{:24} {}", scenario.name, scenario.title));
        return;
    }
    if chosen.is_empty() {
        refuse("no scenario is called so; --list names them");
    }
    if !arguments.quick && arguments.seconds < SECONDS_MIN {
        refuse("--seconds is at least 3: shorter runs scatter too much to tell poolers apart");
    }
    let given = arguments.pgbouncer.as_deref().map(Program::at).transpose();
    let given = given.unwrap_or_else(|error| refuse(&error));
    let plan = match arguments.quick {
        true => Plan { rounds: 1, window: Duration::from_millis(800), quick: true },
        false => Plan {
            rounds: arguments.rounds.max(1),
            window: Duration::from_secs_f64(arguments.seconds),
            quick: false,
        },
    };
    accounting::raise_descriptor_limit();
    let mut stand = Stand::start(given).await;
    if arguments.stay {
        stand.wait_for_enter();
        return;
    }
    let mut report = Report::new(&stand, &plan);
    for scenario in chosen {
        stand.become_like(scenario.layout).await;
        eprintln!("{}: {}", scenario.name, scenario.title);
        let mut rounds = Vec::new();
        for round in 0..plan.rounds.min(scenario.load.rounds_max()) {
            for pooler in stand.poolers() {
                let outcome = measure(scenario, &mut stand, pooler, &plan, round).await;
                rounds.push((pooler, outcome));
            }
        }
        report.add(scenario, &rounds);
        // After each, so that an interrupted run has told what it knew.
        report.write(&arguments.output);
    }
    if arguments.write_docs {
        report.write_docs(Path::new("docs"));
    }
    println!("{}", report.markdown());
    println!("written to {}: results.json, results.md and plots", arguments.output.display());
}

/// The run that others disturbed least, of as many as are needed for a quiet one.
async fn measure(
    scenario: &Scenario,
    stand: &mut Stand,
    pooler: Pooler,
    plan: &Plan,
    round: usize,
) -> Outcome {
    let mut best = run(scenario, stand, pooler, plan, round).await;
    let repeats = if plan.quick { 0 } else { scenario.load.repeats_max() };
    for _ in 0..repeats {
        let Some(noise) = sample::others_percent(&best).filter(|_| sample::is_noisy(&best)) else { break };
        let again = run(scenario, stand, pooler, plan, round).await;
        if sample::others_percent(&again).is_some_and(|others| others < noise) {
            best = again;
        }
    }
    best
}

async fn run(scenario: &Scenario, stand: &mut Stand, pooler: Pooler, plan: &Plan, round: usize) -> Outcome {
    let outcome = scenario.load.run(stand, pooler, plan, round).await;
    let noisy = if sample::is_noisy(&outcome) { "  (noisy)" } else { "" };
    eprintln!("  {:16} {}{noisy}", pooler.name(), sample::in_words(&outcome));
    outcome
}

fn refuse(why: &str) -> ! {
    eprintln!("{why}");
    std::process::exit(2);
}

const SECONDS_MIN: f64 = 3.0;

fn is_chosen(scenario: &Scenario, only: &[String]) -> bool {
    only.is_empty() || only.iter().any(|part| scenario.name.contains(part.as_str()))
}
