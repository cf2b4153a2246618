//! Which process listens on a TCP port of this machine, for the error of one that cannot. Linux only, and only as far
//! as `/proc` may be read: root sees every process, others their own.

use std::{fs, net::SocketAddr, path::Path};

/// The state of a listening socket in `/proc/net/tcp`.
const LISTENING: &str = "0A";

/// `; NAME (process PID) listens there`, or nothing if that cannot be told.
pub fn listener_of(address: SocketAddr) -> String {
    let sockets: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| sockets_that_listen(&table, address.port()))
        .collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut holders = processes.filter_map(|process| {
        let path = process.path();
        let pid: u32 = path.file_name()?.to_str()?.parse().ok()?;
        holds_any(&path, &sockets).then(|| {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            format!("; {} (process {pid}) listens there", name.trim())
        })
    });
    if sockets.is_empty() { String::new() } else { holders.next().unwrap_or_default() }
}

/// The sockets in a table of `/proc/net` that listen on this port, as links to them are called.
fn sockets_that_listen(table: &str, port: u16) -> Vec<String> {
    let port = format!(":{port:04X}");
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (address, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(INODE_FIELD)?);
        (address.ends_with(&port) && *state == LISTENING).then(|| format!("socket:[{inode}]"))
    };
    table.lines().filter_map(socket).collect()
}

/// Behind the state: queues, timer, retransmissions, user, timeout.
const INODE_FIELD: usize = 9;

fn holds_any(process: &Path, sockets: &[String]) -> bool {
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    descriptors
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .any(|target| sockets.iter().any(|socket| target.as_os_str() == socket.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_is_found_by_its_port() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1920 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0\n\
            1: 0100007F:1920 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0\n";
        assert_eq!(sockets_that_listen(table, 6432), ["socket:[4711]"]);
        assert!(sockets_that_listen(table, 6433).is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let words = listener_of(listener.local_addr().unwrap());
        assert!(words.contains(&format!("(process {}) listens there", std::process::id())), "{words}");
    }
}
