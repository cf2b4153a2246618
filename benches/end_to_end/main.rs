//! pglobby beside Debian's PgBouncer and beside no pooler at all, on this machine; `scripts/bench` runs it.
//!
//! PostgreSQL, PgBouncer and pglobby are started here, on loopback, with equal settings (`stand.rs`). Every scenario
//! (`scenarios.rs`) runs against one after the other and again, so that what else the machine does falls on all of
//! them; `report.rs` makes medians, a table, JSON and plots of it. Nothing is asserted: numbers belong to machines.
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

use report::Report;
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
    /// How often each scenario runs against each of the three
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run that count
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
        eprintln!("no scenario is called so; --list names them");
        std::process::exit(2);
    }
    let plan = match arguments.quick {
        true => Plan { rounds: 1, window: Duration::from_millis(800), quick: true },
        false => Plan {
            rounds: arguments.rounds.max(1),
            window: Duration::from_secs_f64(arguments.seconds),
            quick: false,
        },
    };
    accounting::raise_descriptor_limit();
    let mut stand = Stand::start().await;
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
            for pooler in Pooler::ALL {
                let outcome = scenario.load.run(&mut stand, pooler, &plan, round).await;
                eprintln!("  {:10} {}", pooler.name(), sample::in_words(&outcome));
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

fn is_chosen(scenario: &Scenario, only: &[String]) -> bool {
    only.is_empty() || only.iter().any(|part| scenario.name.contains(part.as_str()))
}
