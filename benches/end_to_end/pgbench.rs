//! pgbench, and the part of its run that counts.
//!
//! pgbench writes a line for each transaction, with the time it ended. Only those that ended between two looks at the
//! pooler's CPU count: neither logins nor the opening of servers, unless they are what is measured.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tempfile::TempDir;

use crate::{
    Plan,
    accounting::Window,
    sample::{Outcome, of_requests},
    stand::{Stand, Target},
};

/// Clients have logged in by pgbench's first line of progress, which comes after this long, and pools are full.
const WARM_UP: Duration = Duration::from_secs(1);
const AFTERWARDS: Duration = Duration::from_millis(500);
const LOGINS_MAX: Duration = Duration::from_secs(60);

/// What pgbench is told beside where to connect.
#[derive(Debug, Clone, Copy)]
pub struct Pgbench {
    /// `simple`, `extended` or `prepared`.
    pub mode: &'static str,
    pub clients: usize,
    pub script: Script,
    pub tls: bool,
    /// A login for each transaction.
    pub connect: bool,
    /// As a service login instead of an employee's.
    pub service: bool,
    /// Transactions a second, instead of as many as can be.
    pub rate: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
pub enum Script {
    /// `-S`.
    SelectOnly,
    TpcB,
    Sql(&'static str),
}

pub const SELECT_1: Script = Script::Sql("SELECT 1;\n");

impl Pgbench {
    pub const SIMPLE: Self = Self {
        mode: "simple",
        clients: 16,
        script: Script::SelectOnly,
        tls: false,
        connect: false,
        service: false,
        rate: None,
    };

    pub const fn clients(self, clients: usize) -> Self {
        Self { clients, ..self }
    }

    pub async fn run(&self, stand: &Stand, target: &Target, plan: &Plan) -> Outcome {
        self.run_at(stand, std::slice::from_ref(target), plan).await
    }

    /// One for each target, at the same time; all targets are of one pooler.
    pub async fn run_at(&self, stand: &Stand, targets: &[Target], plan: &Plan) -> Outcome {
        let start = |target| self.start(stand, target, plan.window);
        let mut all = targets.iter().map(start).collect::<Result<Vec<_>, _>>()?;
        for running in &mut all {
            running.warmed_up().await;
        }
        let window = Window::open(targets.first().and_then(|target| target.pid));
        tokio::time::sleep(plan.window).await;
        let until = SystemTime::now();
        let measured = window.close();
        let mut latencies = Vec::new();
        for running in &mut all {
            running.finish()?;
            latencies.append(&mut running.latencies(window.from, until));
        }
        of_requests(latencies, measured)
    }

    /// Runs until a window of this length after the warm-up is over.
    pub fn start(&self, stand: &Stand, target: &Target, window: Duration) -> Result<Running, String> {
        let folder = tempfile::tempdir().unwrap();
        let seconds = (WARM_UP + window + AFTERWARDS).as_secs_f64().ceil();
        // With fewer threads than clients a PREPARE makes the thread wait, and others in it with open transactions
        // hold the servers it waits for: one thread for each client where that can happen.
        let threads = match self.script {
            Script::TpcB if self.mode == "prepared" => self.clients,
            _ => self.clients.min(2),
        };
        let mut command = Command::new(stand.program("pgbench"));
        command.args(["--no-vacuum", "--log", "--progress", "1", "--protocol", self.mode]);
        command.args(["--client", &self.clients.to_string(), "--jobs", &threads.to_string()]);
        command.args(["--time", &seconds.to_string()]);
        command.arg("--log-prefix").arg(folder.path().join("log"));
        match self.script {
            Script::SelectOnly => drop(command.arg("--select-only")),
            Script::TpcB => {}
            Script::Sql(sql) => {
                let file = folder.path().join("script.sql");
                fs::write(&file, sql).unwrap();
                command.arg("--file").arg(file);
            }
        }
        if self.connect {
            command.arg("--connect");
        }
        if let Some(rate) = self.rate {
            command.args(["--rate", &rate.to_string()]);
        }
        let target = if self.service { target.as_service() } else { target.clone() };
        command.args(["--host", &target.host, "--port", &target.port.to_string()]);
        command.args(["--username", &target.user]);
        command.arg(&target.database);
        command.env("PGPASSWORD", &target.password);
        command.env("PGSSLMODE", if self.tls { "require" } else { "disable" });
        let words = fs::File::create(folder.path().join("words")).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(words.try_clone().unwrap())
            .stderr(words)
            .spawn()
            .map_err(|error| format!("pgbench: {error}"))?;
        Ok(Running { child, folder })
    }
}

/// A pgbench under way; its log goes with it.
pub struct Running {
    child: Child,
    folder: TempDir,
}

impl Running {
    /// Returns when it reports progress, or has ended.
    pub async fn warmed_up(&mut self) {
        let begun = Instant::now();
        while self.is_running() && !self.words().contains("progress:") && begun.elapsed() < LOGINS_MAX {
            tokio::time::sleep(Duration::from_millis(10)).await; // A file does not wake its reader.
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn words(&self) -> String {
        fs::read_to_string(self.folder.path().join("words")).unwrap_or_default()
    }

    pub fn finish(&mut self) -> Result<(), String> {
        if self.child.wait().unwrap().success() {
            return Ok(());
        }
        let words = self.words();
        let error = words.lines().find(|line| line.contains("ERROR") || line.contains("error:"));
        Err(error.unwrap_or("pgbench failed").to_owned())
    }

    /// Of the transactions that ended in between, in microseconds.
    pub fn latencies(&self, from: SystemTime, until: SystemTime) -> Vec<f64> {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let (from, until) = (seconds(from), seconds(until));
        let mut latencies = Vec::new();
        for entry in fs::read_dir(self.folder.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("log.")) {
                read_log(&path, from, until, &mut latencies);
            }
        }
        latencies
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `client_id transaction_no time script_no time_epoch time_us [schedule_lag]`, see pgbench's "Per-Transaction Logging".
fn read_log(path: &Path, from: f64, until: f64, latencies: &mut Vec<f64>) {
    for line in fs::read_to_string(path).unwrap().lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let &[_, _, latency, _, second, micros, ..] = fields.as_slice() else { continue };
        let (Ok(latency), Ok(second), Ok(micros)) =
            (latency.parse(), second.parse::<f64>(), micros.parse::<f64>())
        else {
            continue;
        };
        if (from..until).contains(&(second + micros / 1e6)) {
            latencies.push(latency);
        }
    }
}
