//! What the operating system says a process has used.

use std::{
    collections::HashMap,
    fs,
    time::{Instant, SystemTime},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::noise::Machine;

/// The part of a run that counts, from here until [`Window::close`].
pub struct Window {
    pooler: Option<u32>,
    machine: Machine,
    cpu: Cpu,
    pub begun: Instant,
    pub from: SystemTime,
}

/// What was used in a window.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    pub seconds: f64,
    /// Of the pooler; `None` for a direct connection.
    pub cpu_micros: Option<f64>,
    /// Of the machine, by processes that are not the stand's.
    pub others_percent: f64,
}

impl Window {
    /// `pooler` is its process; `None` for a direct connection.
    pub fn open(pooler: Option<u32>) -> Self {
        let (machine, cpu) = (Machine::now(), Cpu::of(pooler));
        Self { pooler, machine, cpu, begun: Instant::now(), from: SystemTime::now() }
    }

    pub fn close(&self) -> Measured {
        let (seconds, cpu) = (self.begun.elapsed().as_secs_f64(), Cpu::of(self.pooler));
        Measured {
            seconds,
            cpu_micros: self.pooler.map(|_| cpu.micros_since(&self.cpu)),
            others_percent: Machine::now().others_percent_since(&self.machine),
        }
    }
}

/// CPU time of each thread of a process so far, in nanoseconds.
///
/// From `/proc/PID/task/*/schedstat`, which counts nanoseconds where `/proc/PID/stat` counts hundredths of a second.
/// root reads it of a process that has become another user as well.
struct Cpu(HashMap<String, u64>);

impl Cpu {
    /// `None` stands for no process: the direct connection has no pooler.
    fn of(pid: Option<u32>) -> Self {
        let Some(pid) = pid else { return Self(HashMap::new()) };
        let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the pooler runs");
        let time_of = |thread: std::io::Result<fs::DirEntry>| {
            let path = thread.ok()?.path();
            let text = fs::read_to_string(path.join("schedstat")).ok()?;
            Some((path.to_string_lossy().into_owned(), text.split(' ').next()?.parse().ok()?))
        };
        Self(threads.filter_map(time_of).collect())
    }

    /// Microseconds used since `earlier` by the threads that live.
    fn micros_since(&self, earlier: &Self) -> f64 {
        let used = |(thread, now): (&String, &u64)| now - earlier.0.get(thread).unwrap_or(&0);
        self.0.iter().map(used).sum::<u64>() as f64 / 1e3
    }
}

/// Resident memory in KiB.
pub fn resident_kib(pid: u32) -> f64 {
    kib(&format!("/proc/{pid}/smaps_rollup"), "Rss:")
}

/// The most that was resident since [`forget_peak`], in KiB.
pub fn peak_kib(pid: u32) -> f64 {
    kib(&format!("/proc/{pid}/status"), "VmHWM:")
}

pub fn forget_peak(pid: u32) {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("the peak may be reset");
}

fn kib(path: &str, field: &str) -> f64 {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let value = text.lines().find_map(|line| line.strip_prefix(field)).expect(field);
    value.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Ten thousand clients are ten thousand descriptors here, and as many in the pooler, which inherits the limit.
pub fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

/// How many clients the limit on descriptors leaves room for.
pub fn clients_max() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(2000)
}

pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}
