//! What one run has measured.

use crate::accounting::Measured;

/// A quantity that runs measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Of the pooler, for each transaction, login or megabyte, in microseconds.
    Cpu,
    /// Transactions, logins or megabytes a second.
    Throughput,
    /// Microseconds.
    P50,
    /// Microseconds.
    P99,
    /// For each client or tenant, in KiB.
    Memory,
    /// What memory grew by at most, in KiB.
    Peak,
    /// Not of the pooler: CPU of processes that are not the stand's, in per cent of the machine.
    Others,
}

impl Metric {
    /// Those that the table shows.
    pub const SHOWN: [Self; 6] =
        [Self::Cpu, Self::Throughput, Self::P50, Self::P99, Self::Memory, Self::Peak];

    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU, µs",
            Self::Throughput => "per second",
            Self::P50 => "p50, µs",
            Self::P99 => "p99, µs",
            Self::Memory => "memory, KiB",
            Self::Peak => "peak growth, KiB",
            Self::Others => "CPU of others, %",
        }
    }
}

pub type Sample = Vec<(Metric, f64)>;

/// A sample, or why there is none: PgBouncer 1.18 has no prepared statements in transaction mode.
pub type Outcome = Result<Sample, String>;

/// More than this in [`Metric::Others`] makes a run noisy. What the kernel counts for the machine and for processes
/// differs by one or two per cent on a machine that is quiet.
pub const OTHERS_PERCENT_MAX: f64 = 5.0;

/// What others used while this was measured; `None` where it does not matter (memory) or nothing was measured.
pub fn others_percent(outcome: &Outcome) -> Option<f64> {
    let (_, value) = outcome.as_ref().ok()?.iter().find(|(metric, _)| *metric == Metric::Others)?;
    Some(*value)
}

pub fn is_noisy(outcome: &Outcome) -> bool {
    others_percent(outcome).is_some_and(|percent| percent > OTHERS_PERCENT_MAX)
}

/// Rate, latencies and CPU of `latencies` (microseconds each) that were counted in one window.
pub fn of_requests(mut latencies: Vec<f64>, measured: Measured) -> Outcome {
    if latencies.is_empty() {
        return Err("nothing succeeded".to_owned());
    }
    latencies.sort_by(f64::total_cmp);
    let count = latencies.len() as f64;
    let mut sample: Sample = vec![(Metric::Others, measured.others_percent)];
    sample.extend(measured.cpu_micros.map(|micros| (Metric::Cpu, micros / count)));
    sample.push((Metric::Throughput, count / measured.seconds));
    sample.push((Metric::P50, quantile(&latencies, 0.5)));
    sample.push((Metric::P99, quantile(&latencies, 0.99)));
    Ok(sample)
}

/// Of sorted values.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (quantile(&values, 0.499) + quantile(&values, 0.501)) / 2.0
}

pub fn in_words(outcome: &Outcome) -> String {
    match outcome {
        Ok(sample) => {
            sample.iter().map(|(metric, value)| format!("{} {value:.1}  ", metric.name())).collect()
        }
        Err(reason) => reason.clone(),
    }
}
