//! How much of the machine is used by others while something is measured.
//!
//! What the kernel counts for the whole machine (`/proc/stat`), less what it counts for this process and all its
//! descendants: PostgreSQL, the poolers, pgbench. Time that the hypervisor gives to other machines counts as used by
//! others. Kernel threads count as the stand's own: they pass on its packets and write its pages.

use std::{collections::HashMap, fs};

/// CPU time so far, in ticks of the kernel.
pub struct Machine {
    busy: u64,
    total: u64,
    own: u64,
}

impl Machine {
    /// Reads both counts in the same order each time, so that what passes in between cancels out.
    pub fn now() -> Self {
        let text = fs::read_to_string("/proc/stat").expect("the kernel counts CPU time");
        let (busy, total) = machine_ticks(&text).expect("the first line of /proc/stat");
        Self { busy, total, own: own_ticks() }
    }

    /// Per cent of the CPU time of all cores since `earlier`.
    pub fn others_percent_since(&self, earlier: &Self) -> f64 {
        let busy = self.busy.saturating_sub(earlier.busy);
        let own = self.own.saturating_sub(earlier.own);
        let total = self.total.saturating_sub(earlier.total).max(1);
        busy.saturating_sub(own) as f64 * 100.0 / total as f64
    }
}

/// `cpu user nice system idle iowait irq softirq steal …`, see proc_stat(5). What follows is counted in `user` already.
fn machine_ticks(stat: &str) -> Option<(u64, u64)> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
    let ticks: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>().ok()?;
    let idle = ticks.get(3)? + ticks.get(4)?;
    let total: u64 = ticks.iter().sum();
    Some((total - idle, total))
}

struct Process {
    parent: u32,
    name: String,
    /// Its own, and of its children that have ended.
    ticks: u64,
}

fn own_ticks() -> u64 {
    let processes = processes();
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for (pid, process) in &processes {
        children.entry(process.parent).or_default().push(*pid);
    }
    let mut found = vec![std::process::id()];
    let kernel = processes.iter().find(|(_, process)| process.parent == 0 && process.name == "kthreadd");
    found.extend(kernel.map(|(pid, _)| pid));
    let mut ticks = 0;
    while let Some(pid) = found.pop() {
        ticks += processes.get(&pid).map_or(0, |process| process.ticks);
        found.extend(children.get(&pid).into_iter().flatten());
    }
    ticks
}

fn processes() -> HashMap<u32, Process> {
    let process = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, read_process(&fs::read_to_string(entry.path().join("stat")).ok()?)?))
    };
    fs::read_dir("/proc").expect("the kernel lists processes").filter_map(process).collect()
}

/// `pid (name) state parent … utime stime cutime cstime …`, see proc_pid_stat(5). A name may hold anything.
fn read_process(stat: &str) -> Option<Process> {
    let (start, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let times = fields.get(11..15)?.iter().map(|field| field.parse::<u64>());
    Some(Process {
        parent: fields.get(1)?.parse().ok()?,
        name: start.split_once('(')?.1.to_owned(),
        ticks: times.sum::<Result<_, _>>().ok()?,
    })
}
