//! What a node says of itself: its name, its address, and which process of which machine it is.

use std::net::SocketAddr;

use rustix::process::{Pid, test_kill_process};

use crate::config::Config;

/// The port that a name leaves out.
const DEFAULT_PORT: u16 = 6432;

/// A node in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `node_name`; by default the machine's name, with the port where it is not 6432.
    pub name: String,
    /// `node_address`; by default where clients connect.
    pub address: String,
    /// The process, as [`has_ended`] reads it.
    pub process: String,
}

impl Identity {
    /// Of this process, which accepts clients at `addresses`.
    pub fn new(config: &Config, addresses: &[SocketAddr]) -> Self {
        let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let port = addresses.first().map_or(config.listen_port, SocketAddr::port);
        Self {
            name: config.node_name.clone().unwrap_or_else(|| default_name(&machine, port)),
            address: config
                .node_address
                .clone()
                .unwrap_or_else(|| default_address(config, addresses.first(), &machine)),
            process: this_process().unwrap_or_default(),
        }
    }
}

fn default_name(machine: &str, port: u16) -> String {
    if port == DEFAULT_PORT { machine.to_owned() } else { format!("{machine}:{port}") }
}

/// An address of all interfaces says nothing to others: the machine's name stands for it.
fn default_address(config: &Config, first: Option<&SocketAddr>, machine: &str) -> String {
    match (first, &config.unix_socket_dir) {
        (Some(address), _) if address.ip().is_unspecified() => format!("{machine}:{}", address.port()),
        (Some(address), _) => address.to_string(),
        (None, Some(folder)) => folder.display().to_string(),
        (None, None) => machine.to_owned(),
    }
}

/// `<boot of the machine> <PID namespace> <PID> <start time>`: unique, and it can be told on the same machine whether
/// the process still runs. `None` where the system does not say.
fn this_process() -> Option<String> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    Some(format!("{} {pid} {}", machine_and_namespace()?, start_time(pid)?))
}

fn machine_and_namespace() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), namespace.display()))
}

/// In ticks since the machine's start: another process with the same PID has another one.
fn start_time(pid: i32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(START_TIME_FIELD).map(str::to_owned)
}

/// `starttime` is the 22nd field; the first one after the name is the third.
const START_TIME_FIELD: usize = 22 - 3;

/// Whether this process is known to have ended. `false` also if that cannot be told, as for a process of another
/// machine or container.
pub fn has_ended(process: &str) -> bool {
    let Some((start_of_process, started)) = process.rsplit_once(' ') else { return false };
    let Some((place, pid)) = start_of_process.rsplit_once(' ') else { return false };
    if machine_and_namespace().as_deref() != Some(place) {
        return false;
    }
    let Ok(raw) = pid.parse::<i32>() else { return false };
    let Some(pid) = Pid::from_raw(raw) else { return false };
    match test_kill_process(pid) {
        Err(rustix::io::Errno::SRCH) => true,
        // Another process may have the number now. What cannot be read counts as running.
        _ => start_time(raw).is_some_and(|now| now != started),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_called_after_its_machine_and_an_unusual_port() {
        assert_eq!(default_name("db1", 6432), "db1");
        assert_eq!(default_name("db1", 6433), "db1:6433");
    }

    #[test]
    fn an_address_of_all_interfaces_gets_the_machines_name() {
        let text = "[central]\nurl = \"postgres://master@127.0.0.1/central\"";
        let config = Config::read(text, None, &|_| None).unwrap();
        let of = |address: &str| default_address(&config, Some(&address.parse().unwrap()), "db1");
        assert_eq!(of("0.0.0.0:6432"), "db1:6432");
        assert_eq!(of("[::]:6432"), "db1:6432");
        assert_eq!(of("10.1.2.3:6432"), "10.1.2.3:6432");
        assert_eq!(default_address(&config, None, "db1"), "db1");
    }

    #[test]
    fn a_process_of_this_machine_is_known_to_have_ended() {
        let own = this_process().unwrap();
        assert!(!has_ended(&own));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let other = format!("{} {pid} {}", machine_and_namespace().unwrap(), start_time(pid).unwrap());
        assert!(!has_ended(&other));
        // The same number, another process.
        let (start_of_process, _) = other.rsplit_once(' ').unwrap();
        assert!(has_ended(&format!("{start_of_process} 1")));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&other));
    }

    #[test]
    fn what_cannot_be_told_counts_as_running() {
        for process in ["", "x", "other-boot pid:[1] 999999999 5", "a b c d", "x y -3 4"] {
            assert!(!has_ended(process), "{process}");
        }
    }
}
