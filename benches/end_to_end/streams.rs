//! One client, 200 MB: what a megabyte costs, and that memory does not grow with it.

use std::{fmt::Display, time::Instant};

use crate::{
    Plan,
    accounting::{Cpu, forget_peak, peak_kib, resident_kib},
    client::Client,
    sample::{Metric, Outcome},
    stand::Target,
};

#[derive(Debug, Clone, Copy)]
pub enum Stream {
    Result,
    CopyOut,
    CopyIn,
}

/// A message of CopyData holds this many rows of 100 bytes: 64 kB, as psql and drivers send.
const ROWS: usize = 640;

impl Stream {
    pub async fn run(self, target: &Target, plan: &Plan) -> Outcome {
        self.try_run(target, plan).await.map_err(in_words)
    }

    async fn try_run(self, target: &Target, plan: &Plan) -> std::io::Result<super::sample::Sample> {
        let megabytes = if plan.quick { 20 } else { 200 };
        let rows = format!("FROM generate_series(1, {})", megabytes * 1000);
        let mut client = Client::connect(target, None).await?;
        client.query("SELECT 1").await?;
        if let Some(pid) = target.pid {
            forget_peak(pid);
        }
        let resident = target.pid.map(resident_kib);
        let (before, begun) = (Cpu::of(target.pid), Instant::now());
        let reply = match self {
            Self::Result => client.query(&format!("SELECT repeat('x', 1000) {rows}")).await?,
            Self::CopyOut => {
                client.query(&format!("COPY (SELECT repeat('x', 1000) {rows}) TO STDOUT")).await?
            }
            Self::CopyIn => {
                let rows = format!("{}\n", "x".repeat(99)).repeat(ROWS);
                client.query("BEGIN").await?;
                let count = megabytes * 1_000_000 / rows.len();
                client.copy_in("COPY sink FROM STDIN", rows.as_bytes(), count).await?
            }
        };
        let (seconds, after) = (begun.elapsed().as_secs_f64(), Cpu::of(target.pid));
        let mut sample = vec![(Metric::Throughput, megabytes as f64 / seconds)];
        if let (Some(pid), Some(resident)) = (target.pid, resident) {
            sample.push((Metric::Cpu, after.micros_since(&before) / megabytes as f64));
            sample.push((Metric::Peak, peak_kib(pid) - resident));
        }
        if matches!(self, Self::CopyIn) {
            client.query("ROLLBACK").await?;
            client.query("TRUNCATE sink").await?;
        }
        client.leave().await?;
        let enough = matches!(self, Self::CopyIn) || reply.bytes > megabytes * 1_000_000;
        if reply.error || !enough { Err(std::io::Error::other("the stream broke off")) } else { Ok(sample) }
    }
}

pub fn in_words(error: impl Display) -> String {
    error.to_string()
}
