//! Medians, spread and ratios; as a table, as JSON, as plots.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, process::Command};

use serde_json::{Value, json};

use crate::{
    Plan,
    accounting::load_average,
    plot,
    sample::{Metric, OTHERS_PERCENT_MAX, Outcome, median},
    scenarios::{Bar, Scenario},
    stand::{Pooler, Stand},
};

pub struct Report {
    machine: Vec<(String, String)>,
    columns: Vec<(Pooler, String)>,
    /// The PgBouncer that ratios and bars are to.
    reference: Pooler,
    results: Vec<Results>,
}

const RESULTS_BEGIN: &str = "<!-- results: written by scripts/bench --write-docs -->";
const RESULTS_END: &str = "<!-- end of results -->";

/// Of one scenario.
struct Results {
    name: &'static str,
    title: &'static str,
    bars: &'static [Bar],
    values: BTreeMap<(Pooler, Metric), Vec<f64>>,
    failures: BTreeMap<Pooler, String>,
    load_average: String,
}

impl Report {
    pub fn new(stand: &Stand, plan: &Plan) -> Self {
        let words = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpu = words("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let pgbouncers: Vec<&str> =
            stand.pgbouncer_versions().into_iter().map(|(_, version)| version).collect();
        let machine = [
            ("machine", format!("{cores} cores, {model}, Linux {}", words("/proc/sys/kernel/osrelease"))),
            ("PostgreSQL", stand.postgres_major().to_string()),
            ("PgBouncer", pgbouncers.join(", ")),
            ("pglobby", format!("{} ({})", env!("CARGO_PKG_VERSION"), commit())),
            ("rounds", format!("{} of {:.1} s", plan.rounds, plan.window.as_secs_f64())),
            ("load average before", load_average()),
        ];
        Self {
            machine: machine.map(|(what, value)| (what.to_owned(), value)).to_vec(),
            columns: columns(stand),
            reference: stand.newest_pgbouncer(),
            results: Vec::new(),
        }
    }

    pub fn add(&mut self, scenario: &Scenario, rounds: &[(Pooler, Outcome)]) {
        let mut results = Results {
            name: scenario.name,
            title: scenario.title,
            bars: scenario.bars,
            values: BTreeMap::new(),
            failures: BTreeMap::new(),
            load_average: load_average(),
        };
        for (pooler, outcome) in rounds {
            match outcome {
                Ok(sample) => {
                    for (metric, value) in sample {
                        results.values.entry((*pooler, *metric)).or_default().push(*value);
                    }
                }
                Err(reason) => drop(results.failures.insert(*pooler, reason.clone())),
            }
        }
        self.results.push(results);
    }

    pub fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("results.json"), format!("{:#}\n", self.json())).unwrap();
        fs::write(folder.join("results.md"), self.markdown()).unwrap();
        self.write_plots(folder);
    }

    /// Replaces what an earlier run has put between two marks of `performance.md`.
    pub fn write_docs(&self, folder: &Path) {
        let page = folder.join("performance.md");
        let text = fs::read_to_string(&page).unwrap();
        let (before, rest) = text.split_once(RESULTS_BEGIN).expect("the page has both marks");
        let (_, behind) = rest.split_once(RESULTS_END).expect("the page has both marks");
        let plots = folder.join("performance");
        fs::create_dir_all(&plots).unwrap();
        let written = self.write_plots(&plots);
        let images: String =
            written.iter().map(|file| format!("\n![{file}](performance/{file})\n")).collect();
        let results = self.markdown();
        fs::write(page, format!("{before}{RESULTS_BEGIN}\n{results}{images}{RESULTS_END}{behind}")).unwrap();
    }

    /// Their names.
    fn write_plots(&self, folder: &Path) -> Vec<&'static str> {
        let mut written = Vec::new();
        for (metric, file, title) in [
            (Metric::Cpu, "cpu.svg", "CPU of the pooler (less is better)"),
            (Metric::Throughput, "throughput.svg", "Throughput (more is better)"),
            (Metric::P99, "p99.svg", "99th percentile of latency (less is better)"),
            (Metric::Memory, "memory.svg", "Memory (less is better)"),
        ] {
            let rows: Vec<plot::Row> =
                self.results.iter().filter_map(|it| it.plot_row(metric, self.reference)).collect();
            if !rows.is_empty() {
                fs::write(folder.join(file), plot::ratios(title, metric.name(), &rows)).unwrap();
                written.push(file);
            }
        }
        written
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for (what, value) in &self.machine {
            let _ = writeln!(text, "- {what}: {value}");
        }
        let runs = self.results.iter().flat_map(Results::others_percent);
        let (noisy, quiet): (Vec<f64>, Vec<f64>) = runs.partition(|percent| *percent > OTHERS_PERCENT_MAX);
        let _ = writeln!(text, "- noisy runs: {} of {}", noisy.len(), noisy.len() + quiet.len());
        let names: Vec<&str> = self.columns.iter().map(|(_, name)| name.as_str()).collect();
        let _ = writeln!(text, "\n| scenario | quantity | {} | ratio | bar |", names.join(" | "));
        let _ = writeln!(text, "|---|---|{}--:|---|", "--:|".repeat(names.len()));
        for results in &self.results {
            for metric in Metric::SHOWN {
                if let Some(row) = self.row(results, metric) {
                    text.push_str(&row);
                }
            }
        }
        let _ = writeln!(
            text,
            "\nMedians; in brackets the lowest and the highest run. Ratio and bar: pglobby to {}.\n{NOISY}: others used \
             more than {OTHERS_PERCENT_MAX:.0} % of the machine's CPU in some of the runs, also when they were repeated; do not trust it.",
            self.name_of(self.reference)
        );
        for results in &self.results {
            for (pooler, reason) in results.failures.iter().filter(|(_, reason)| *reason != "no pooler") {
                let _ = writeln!(text, "- {}, {}: {reason}", results.name, self.name_of(*pooler));
            }
        }
        text
    }

    fn row(&self, results: &Results, metric: Metric) -> Option<String> {
        results.values.keys().find(|(_, measured)| *measured == metric)?;
        let ratio = match (results.median(Pooler::Pglobby, metric), results.median(self.reference, metric)) {
            (Some(ours), Some(theirs)) if theirs > 0.0 => {
                format!("{:.2}{}", ours / theirs, self.noisy(results))
            }
            _ => String::new(),
        };
        let bars: Vec<String> =
            results.bars.iter().filter_map(|bar| self.judge(results, metric, *bar)).collect();
        let cells = self.columns.iter().map(|(pooler, _)| results.cell(*pooler, metric));
        let cells: Vec<String> = cells.collect();
        let (name, metric, cells, bars) = (results.name, metric.name(), cells.join(" | "), bars.join("; "));
        Some(format!("| {name} | {metric} | {cells} | {ratio} | {bars} |\n"))
    }

    /// The mark of a comparison.
    fn noisy(&self, results: &Results) -> &'static str {
        let either = results.is_noisy(Pooler::Pglobby) || results.is_noisy(self.reference);
        if either { NOISY } else { "" }
    }

    fn name_of(&self, pooler: Pooler) -> &str {
        self.columns.iter().find(|(it, _)| *it == pooler).map_or("", |(_, name)| name)
    }

    /// The bar in words and what was reached; `None` if it is for another quantity or something is missing.
    fn judge(&self, results: &Results, metric: Metric, bar: Bar) -> Option<String> {
        let of = |name: &str, pooler| self.results.iter().find(|it| it.name == name)?.median(pooler, metric);
        let (theirs, noisy) = (results.median(self.reference, metric), self.noisy(results));
        if let (Bar::AtMost(about, limit), None) = (bar, theirs) {
            return (about == metric).then(|| format!("≤ {limit}: no PgBouncer to compare with"));
        }
        let ours = results.median(Pooler::Pglobby, metric)?;
        let (about, reached, limit, words, at_least) = match bar {
            Bar::AtMost(about, limit) => (about, ours / theirs?, limit, String::new(), false),
            Bar::AtLeast(about, limit) => (about, ours / theirs?, limit, String::new(), true),
            Bar::AtMostOfOwn(about, limit, other) => {
                (about, ours / of(other, Pooler::Pglobby)?, limit, format!(" of our {other}"), false)
            }
            Bar::AtLeastDirect(about, limit) => {
                let words = " of direct".to_owned();
                (about, ours / results.median(Pooler::Direct, metric)?, limit, words, true)
            }
            Bar::AtMostDirect(about, limit) => {
                let words = " of direct".to_owned();
                (about, ours / results.median(Pooler::Direct, metric)?, limit, words, false)
            }
            Bar::Below(about, limit) => (about, ours, limit, " as it stands".to_owned(), false),
            Bar::BeyondDirect(about, limit) => {
                let beyond = ours - results.median(Pooler::Direct, metric)?;
                (about, beyond, limit, " beyond direct".to_owned(), false)
            }
        };
        let (sign, holds) = if at_least { ("≥", reached >= limit) } else { ("≤", reached <= limit) };
        (about == metric).then(|| {
            format!(
                "{sign} {limit}{words}: {reached:.2}{noisy}, {}",
                if holds { "reached" } else { "**missed**" }
            )
        })
    }

    fn json(&self) -> Value {
        let machine: serde_json::Map<String, Value> =
            self.machine.iter().map(|(what, value)| (what.clone(), json!(value))).collect();
        let scenarios: Vec<Value> = self.results.iter().map(|it| it.json(&self.columns)).collect();
        json!({ "machine": machine, "scenarios": scenarios })
    }
}

impl Results {
    fn median(&self, pooler: Pooler, metric: Metric) -> Option<f64> {
        self.values.get(&(pooler, metric)).map(|values| median(values.clone()))
    }

    fn cell(&self, pooler: Pooler, metric: Metric) -> String {
        let Some(values) = self.values.get(&(pooler, metric)) else {
            let fails = self.failures.get(&pooler).is_some_and(|reason| reason != "no pooler");
            return if fails { "fails" } else { "" }.to_owned();
        };
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let noisy = if self.is_noisy(pooler) { NOISY } else { "" };
        format!("{}{noisy} ({}–{})", figure(median(values.clone())), figure(low), figure(high))
    }

    /// Of every run.
    fn others_percent(&self) -> impl Iterator<Item = f64> {
        let of_runs = self.values.iter().filter(|((_, metric), _)| *metric == Metric::Others);
        of_runs.flat_map(|(_, percent)| percent.iter().copied())
    }

    fn is_noisy(&self, pooler: Pooler) -> bool {
        let others = self.values.get(&(pooler, Metric::Others));
        others.is_some_and(|others| others.iter().any(|percent| *percent > OTHERS_PERCENT_MAX))
    }

    fn plot_row(&self, metric: Metric, reference: Pooler) -> Option<plot::Row> {
        Some(plot::Row {
            label: self.name,
            pgbouncer: self.median(reference, metric)?,
            pglobby: self.median(Pooler::Pglobby, metric)?,
        })
    }

    fn json(&self, columns: &[(Pooler, String)]) -> Value {
        let of = |pooler: Pooler| {
            let quantities: serde_json::Map<String, Value> = self
                .values
                .iter()
                .filter(|((measured, _), _)| *measured == pooler)
                .map(|((_, metric), values)| {
                    let summary = json!({ "median": median(values.clone()), "rounds": values });
                    (metric.name().to_owned(), summary)
                })
                .collect();
            json!({ "quantities": quantities, "failure": self.failures.get(&pooler) })
        };
        let poolers: serde_json::Map<String, Value> =
            columns.iter().map(|(pooler, name)| (name.clone(), of(*pooler))).collect();
        json!({ "name": self.name, "title": self.title, "load_average": self.load_average, "measured": poolers })
    }
}

/// With two PgBouncers, a column says which version it is.
fn columns(stand: &Stand) -> Vec<(Pooler, String)> {
    let versions = stand.pgbouncer_versions();
    let name = |pooler: Pooler| match versions.iter().find(|(it, _)| *it == pooler) {
        Some((_, version)) if versions.len() > 1 && pooler == Pooler::GivenPgBouncer => {
            format!("{version}, given")
        }
        Some((_, version)) if versions.len() > 1 => (*version).to_owned(),
        Some(_) => Pooler::PgBouncer.name().to_owned(),
        None => pooler.name().to_owned(),
    };
    stand.poolers().into_iter().map(|pooler| (pooler, name(pooler))).collect()
}

/// Behind a figure of which some run was noisy.
const NOISY: &str = "~";

/// Three digits are what such a measurement is good for.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => {
            let digits = format!("{value:.0}");
            let (sign, digits) = digits.strip_prefix('-').map_or(("", digits.as_str()), |rest| ("-", rest));
            let mut grouped = String::new();
            for (at, digit) in digits.chars().enumerate() {
                if at > 0 && (digits.len() - at).is_multiple_of(3) {
                    grouped.push(',');
                }
                grouped.push(digit);
            }
            format!("{sign}{grouped}")
        }
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn commit() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    output.map_or_else(|_| "?".to_owned(), |it| String::from_utf8_lossy(&it.stdout).trim().to_owned())
}
