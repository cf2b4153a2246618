//! A PostgreSQL cluster on this machine, for `pglobby dev` and the tests: create, start, stop.
//!
//! PostgreSQL refuses to run as root, so root's clusters run as another user, who owns the data folder. A
//! cluster never outlives the process that started it: drop stops it, and a watcher process stops it if
//! that process is killed.
//!
//! All functions block; asynchronous callers use `spawn_blocking`.

use std::{
    fs,
    io::{self, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use secrecy::{ExposeSecret, SecretString};

use crate::local_postgres::{
    binaries::PostgresBinaries,
    os_user::{ClusterOwner, OwnerError},
};

/// A data folder and its programs. Nothing runs yet.
#[derive(Debug, Clone)]
pub struct LocalCluster {
    binaries: PostgresBinaries,
    data: PathBuf,
    log: PathBuf,
    owner: ClusterOwner,
}

/// Why a cluster could not be created or started. `Display` is one line.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum ClusterError {
    /// No user to run it as, or a folder that user cannot reach.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// An error with a folder or a program.
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    /// `initdb` failed.
    #[error("initdb failed: {0}")]
    Init(String),
    /// The folder exists and is not a complete data folder.
    #[error("{0:?} exists and is not a PostgreSQL data folder; remove it or choose another --data-dir")]
    NotADataFolder(PathBuf),
    /// The data folder is of another major version.
    #[error(
        "{folder:?} was made by PostgreSQL {made_by}, and this is PostgreSQL {major}; choose another --data-dir or --postgres-bin"
    )]
    OtherVersion { folder: PathBuf, made_by: u32, major: u32 },
    /// A postmaster already runs in this folder.
    #[error("a PostgreSQL (process {pid}) already runs on {folder:?}; stop it first")]
    AlreadyRunning { folder: PathBuf, pid: u32 },
    /// PostgreSQL ended during its start.
    #[error("PostgreSQL did not start: {reason} (log: {log:?})")]
    DidNotStart { reason: String, log: PathBuf },
}

impl LocalCluster {
    /// `data` is the data folder, existing or not. Its log is beside it: `<data>.log`.
    pub fn new(binaries: PostgresBinaries, data: &Path) -> Result<Self, ClusterError> {
        let data = std::path::absolute(data).map_err(|source| io_error("finding", data, source))?;
        let mut log = data.clone().into_os_string();
        log.push(".log");
        Ok(Self { binaries, data, log: log.into(), owner: ClusterOwner::current()? })
    }

    /// The data folder.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// PostgreSQL's log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The user of the server's processes.
    pub fn owner(&self) -> &ClusterOwner {
        &self.owner
    }

    /// The programs that serve it.
    pub fn binaries(&self) -> &PostgresBinaries {
        &self.binaries
    }

    /// Major version of the data folder; `None` if it does not exist.
    pub fn made_by(data: &Path) -> Result<Option<u32>, ClusterError> {
        match fs::read_to_string(data.join("PG_VERSION")) {
            // Before 10 a version was `9.6`; such a folder is not supported.
            Ok(text) => Ok(Some(text.trim().split('.').next().and_then(|it| it.parse().ok()).unwrap_or(0))),
            Err(_) if data.exists() => Err(ClusterError::NotADataFolder(data.to_path_buf())),
            Err(_) => Ok(None),
        }
    }

    /// Creates the data folder with UTF-8, SCRAM passwords for every connection and `superuser` as the only
    /// role. It appears complete or not at all; an interrupted run is repeated.
    pub fn init(
        &self,
        superuser: &str,
        password: &SecretString,
        options: &[&str],
    ) -> Result<(), ClusterError> {
        if Self::made_by(&self.data)?.is_some() {
            return Err(ClusterError::NotADataFolder(self.data.clone()));
        }
        let unfinished = self.data.with_extension("unfinished");
        let password_file = self.data.with_extension("password");
        let parent = self.data.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(|source| io_error("making", parent, source))?;
        self.owner.may_enter(parent)?;

        // C.UTF-8 sorts by code point and classifies letters beyond ASCII. Some systems have only C.
        let mut outcome = Err(ClusterError::Init("no locale".into()));
        for locale in ["C.UTF-8", "C"] {
            remove_folder(&unfinished)?;
            self.owner.make_folder(&unfinished)?;
            self.write_password(&password_file, password)?;
            outcome = self.run_initdb(&unfinished, superuser, &password_file, locale, options);
            if outcome.is_ok() {
                break;
            }
        }
        let _ = fs::remove_file(&password_file);
        outcome?;
        fs::rename(&unfinished, &self.data).map_err(|source| io_error("renaming to", &self.data, source))
    }

    fn run_initdb(
        &self,
        folder: &Path,
        superuser: &str,
        password_file: &Path,
        locale: &str,
        options: &[&str],
    ) -> Result<(), ClusterError> {
        let program = self.binaries.program("initdb");
        let mut command = Command::new(&program);
        command
            .arg("--pgdata")
            .arg(folder)
            .arg("--username")
            .arg(superuser)
            .arg("--pwfile")
            .arg(password_file)
            .args(["--encoding=UTF8", "--auth=scram-sha-256"])
            .arg(format!("--locale={locale}"))
            .args(options)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .current_dir("/");
        let output = self
            .owner
            .run_as(&mut command)
            .output()
            .map_err(|source| io_error("running", &program, source))?;
        if output.status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&output.stderr);
        Err(ClusterError::Init(
            words.lines().find(|line| line.contains("error:")).unwrap_or(words.trim()).to_owned(),
        ))
    }

    /// A real file, because `/dev/fd` is not readable after the change of user.
    fn write_password(&self, path: &Path, password: &SecretString) -> Result<(), ClusterError> {
        let _ = fs::remove_file(path);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| file.write_all(password.expose_secret().as_bytes()))
            .map_err(|source| io_error("writing", path, source))?;
        Ok(self.owner.give(path)?)
    }

    /// Starts PostgreSQL with `settings` (names and values of postgresql.conf) and returns when it accepts
    /// connections.
    pub fn start(&self, settings: &[(&str, &str)]) -> Result<RunningCluster, ClusterError> {
        self.check_before_start()?;
        let mut running = self.spawn(settings)?;
        let deadline = Instant::now() + START_MAX;
        loop {
            if let Some(status) = running.exited() {
                return Err(self.did_not_start(&format!("it ended with {status}")));
            }
            if running.says_ready() {
                return Ok(running);
            }
            if Instant::now() > deadline {
                return Err(self.did_not_start("it was not ready in time"));
            }
            // Polls like pg_ctl: PostgreSQL announces its state in a file without a notification.
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn spawn(&self, settings: &[(&str, &str)]) -> Result<RunningCluster, ClusterError> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(|source| io_error("opening", &self.log, source))?;
        let program = self.binaries.program("postgres");
        let mut command = Command::new(&program);
        command.arg("-D").arg(&self.data).current_dir("/");
        for (name, value) in settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command
            .env("LC_MESSAGES", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0); // Ctrl-C on the terminal is ours to turn into an orderly stop.
        let child = self
            .owner
            .run_as(&mut command)
            .spawn()
            .map_err(|source| io_error("running", &program, source))?;
        let watcher =
            spawn_watcher(child.id()).map_err(|source| io_error("running", Path::new("sh"), source))?;
        Ok(RunningCluster { child, watcher, data: self.data.clone() })
    }

    /// The process id in a postmaster.pid left by a killed machine or container may be of another process
    /// by now. PostgreSQL would then refuse to start.
    fn check_before_start(&self) -> Result<(), ClusterError> {
        let major = self.binaries.major();
        match Self::made_by(&self.data)? {
            Some(made_by) if made_by != major => {
                return Err(ClusterError::OtherVersion { folder: self.data.clone(), made_by, major });
            }
            Some(_) => {}
            None => return Err(ClusterError::NotADataFolder(self.data.clone())),
        }
        self.owner.may_enter(self.data.parent().unwrap_or(Path::new("/")))?;
        let pid_file = self.data.join("postmaster.pid");
        match postmaster_pid(&pid_file) {
            None => Ok(()),
            Some(pid) if self.is_served_by(pid) => {
                Err(ClusterError::AlreadyRunning { folder: self.data.clone(), pid })
            }
            Some(_) => fs::remove_file(&pid_file).map_err(|source| io_error("removing", &pid_file, source)),
        }
    }

    /// The working folder of a postmaster is its data folder. Without /proc, pg_ctl decides.
    fn is_served_by(&self, pid: u32) -> bool {
        if Path::new("/proc/self/cwd").exists() {
            let working_folder = fs::read_link(format!("/proc/{pid}/cwd"));
            return working_folder
                .is_ok_and(|cwd| fs::canonicalize(&self.data).is_ok_and(|data| data == cwd));
        }
        let mut command = Command::new(self.binaries.program("pg_ctl"));
        command.arg("status").arg("-D").arg(&self.data).stdin(Stdio::null()).current_dir("/");
        self.owner.run_as(&mut command).output().is_ok_and(|output| output.status.success())
    }

    /// PostgreSQL's last log lines are the best reason.
    fn did_not_start(&self, otherwise: &str) -> ClusterError {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let telling = |line: &&str| line.contains("could not") || line.contains("FATAL:");
        let reason = log.lines().rev().take(CLOSE_TIMEOUT).filter(telling).last().map(|line| {
            line.split_once("LOG:").or_else(|| line.split_once("FATAL:")).map_or(line, |it| it.1).trim()
        });
        ClusterError::DidNotStart { reason: reason.unwrap_or(otherwise).to_owned(), log: self.log.clone() }
    }
}

/// A running PostgreSQL. Drop stops it at once (`immediate`).
#[derive(Debug)]
pub struct RunningCluster {
    child: Child,
    /// The watcher process. It reads the end of a pipe when this process is gone.
    watcher: Child,
    data: PathBuf,
}

/// How to stop. See `pg_ctl stop` in PostgreSQL's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Ends all sessions, rolls back, and writes a checkpoint.
    Fast,
    /// Like a power failure; the next start recovers.
    Immediate,
}

impl RunningCluster {
    /// The postmaster's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// A pipe that reaches its end when PostgreSQL has ended. Can be taken once.
    pub fn end_signal(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Stops it and waits until it has.
    pub fn stop(mut self, how: Stop) -> io::Result<()> {
        self.end(how)
    }

    /// Kills the postmaster like the kernel out of memory, and waits until its children have ended (one
    /// that computes without a pause ends late). The next start recovers.
    pub fn kill(mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        // The children hold the other end; a new postmaster does not start while one of them runs.
        self.end_signal().map_or(Ok(()), |mut children| io::copy(&mut children, &mut io::sink()).map(drop))
    }

    /// Sends any other signal to the postmaster (HUP to reload, STOP and CONT to pause).
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(pid.ok_or(io::ErrorKind::InvalidInput)?, signal)?)
    }

    fn end(&mut self, how: Stop) -> io::Result<()> {
        if self.exited().is_none() {
            self.signal(match how {
                Stop::Fast => Signal::INT,
                Stop::Immediate => Signal::QUIT,
            })?;
            // A stopped process handles no signal before CONT.
            self.signal(Signal::CONT)?;
            self.child.wait()?;
        }
        Ok(())
    }

    /// The last line of postmaster.pid, since PostgreSQL 10. Its first line tells a running postmaster's
    /// file from an old one.
    fn says_ready(&self) -> bool {
        let Ok(text) = fs::read_to_string(self.data.join("postmaster.pid")) else { return false };
        let mut lines = text.lines();
        lines.next().and_then(|pid| pid.trim().parse().ok()) == Some(self.child.id())
            && lines.nth(6).is_some_and(|state| state.trim() == "ready")
    }
}

impl Drop for RunningCluster {
    fn drop(&mut self) {
        // The watcher ends after PostgreSQL and before its process id can be reused.
        let _ = self.end(Stop::Immediate);
        let _ = self.watcher.kill();
        let _ = self.watcher.wait();
    }
}

/// Stops PostgreSQL when this process ends for any reason. A parent-death signal would follow the thread
/// that started the child, not the process, and needs `unsafe`.
fn spawn_watcher(postmaster: u32) -> io::Result<Child> {
    Command::new("sh")
        .args(["-c", r#"read -r _; kill -INT "$1"; kill -CONT "$1""#, "pglobby-watcher"])
        .arg(postmaster.to_string())
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

fn postmaster_pid(pid_file: &Path) -> Option<u32> {
    fs::read_to_string(pid_file).ok()?.lines().next()?.trim().parse().ok()
}

fn remove_folder(path: &Path) -> Result<(), ClusterError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_error("removing", path, source)),
        _ => Ok(()),
    }
}

fn io_error(what: &str, path: &Path, source: io::Error) -> ClusterError {
    ClusterError::Io { what: format!("{what} {}", path.display()), source }
}

/// Limit on a start. Recovery after a crash takes longest.
const START_MAX: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Maximum of log lines shown after a failed start.
const CLOSE_TIMEOUT: usize = 8;
