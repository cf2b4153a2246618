//! How much memory this process may use: the machine's, or the limit of its control groups.

use std::{fs, path::Path};

/// A quarter of the memory, 1 GiB at most. The rest is for buffers of sockets and TLS, which are not
/// counted, and for other programs.
pub fn memory_share() -> usize {
    const MAX: usize = 1 << 30;
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let machine = machine_bytes(&read("/proc/meminfo"));
    let groups = group_files(&read("/proc/self/cgroup"))
        .into_iter()
        .filter_map(|file| read(&file).trim().parse().ok());
    groups.chain(machine).min().map_or(MAX, |bytes: usize| (bytes / 4).min(MAX))
}

/// `MemTotal` of `/proc/meminfo`.
fn machine_bytes(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// Files with the limits of the groups in `/proc/self/cgroup` and their parents, for both versions of
/// control groups. In a container the own group is the root.
fn group_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) =
            (fields.next(), fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        files.extend(Path::new(path).ancestors().map(|group| {
            let group = group.to_str().unwrap_or_default().trim_matches('/');
            format!("{root}/{group}/{file}")
        }));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_machine_is_read() {
        assert_eq!(machine_bytes("MemTotal:       24123456 kB\nMemFree: 1 kB\n"), Some(24_123_456 << 10));
        assert_eq!(machine_bytes("nonsense"), None);
    }

    #[test]
    fn every_group_above_this_one_counts() {
        assert_eq!(
            group_files("0::/system.slice/pglobby.service\n"),
            [
                "/sys/fs/cgroup/system.slice/pglobby.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup//memory.max"
            ]
        );
        assert_eq!(
            group_files("5:cpu,cpuacct:/x\n4:memory:/small\n"),
            [
                "/sys/fs/cgroup/memory/small/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory//memory.limit_in_bytes"
            ]
        );
    }

    #[test]
    fn a_share_is_never_more_than_a_gigabyte() {
        assert!((1 << 20..=1 << 30).contains(&memory_share()));
    }
}
