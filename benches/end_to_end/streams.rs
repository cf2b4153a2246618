//! One client, 200 MB again and again: what a megabyte costs, and that memory does not grow with it.

use std::fmt::Display;

use crate::{
    Plan,
    accounting::{Window, forget_peak, peak_kib, resident_kib},
    client::Client,
    sample::{Metric, Outcome, Sample},
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

    async fn try_run(self, target: &Target, plan: &Plan) -> std::io::Result<Sample> {
        let megabytes = if plan.quick { 20 } else { 200 };
        let mut client = Client::connect(target, None).await?;
        client.query("SELECT 1").await?;
        if let Some(pid) = target.pid {
            forget_peak(pid);
        }
        let resident = target.pid.map(resident_kib);
        let (window, mut streamed) = (Window::open(target.pid), 0);
        while streamed == 0 || window.begun.elapsed() < plan.window {
            self.stream(&mut client, megabytes).await?;
            streamed += megabytes;
        }
        let measured = window.close();
        let mut sample = vec![
            (Metric::Others, measured.others_percent),
            (Metric::Throughput, streamed as f64 / measured.seconds),
        ];
        sample.extend(measured.cpu_micros.map(|micros| (Metric::Cpu, micros / streamed as f64)));
        if let (Some(pid), Some(resident)) = (target.pid, resident) {
            sample.push((Metric::Peak, peak_kib(pid) - resident));
        }
        if matches!(self, Self::CopyIn) {
            client.query("TRUNCATE sink").await?;
        }
        client.leave().await?;
        Ok(sample)
    }

    async fn stream(self, client: &mut Client, megabytes: usize) -> std::io::Result<()> {
        let rows = format!("SELECT repeat('x', 1000) FROM generate_series(1, {})", megabytes * 1000);
        let reply = match self {
            Self::Result => client.query(&rows).await?,
            Self::CopyOut => client.query(&format!("COPY ({rows}) TO STDOUT")).await?,
            Self::CopyIn => {
                let rows = format!("{}\n", "x".repeat(99)).repeat(ROWS);
                client.query("BEGIN").await?;
                let count = megabytes * 1_000_000 / rows.len();
                let reply = client.copy_in("COPY sink FROM STDIN", rows.as_bytes(), count).await?;
                client.query("ROLLBACK").await?;
                reply
            }
        };
        let enough = matches!(self, Self::CopyIn) || reply.bytes > megabytes * 1_000_000;
        if reply.error || !enough { Err(std::io::Error::other("the stream broke off")) } else { Ok(()) }
    }
}

pub fn in_words(error: impl Display) -> String {
    error.to_string()
}
