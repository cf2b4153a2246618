//! Ports that no other test takes.
//!
//! Asking the system for a free port and binding it later loses a race now and then. These lie below the range
//! that outgoing connections are given, and a lock on a file holds each of them while its owner lives.

use std::{
    fs::File,
    net::{Ipv4Addr, TcpListener},
};

/// Free on 127.0.0.1, and ours while this lives.
#[derive(Debug)]
pub struct ReservedPort {
    pub number: u16,
    _lock: File,
}

impl ReservedPort {
    pub fn take() -> Self {
        Self::take_from(FIRST, COUNT)
    }

    /// One of the `count` ports from `first` on.
    pub fn take_from(first: u16, count: u32) -> Self {
        let user = rustix::process::geteuid().as_raw();
        let folder = std::env::temp_dir().join(format!("pglobby-test-ports-{user}"));
        std::fs::create_dir_all(&folder).unwrap();
        // Starting where other processes do not: they search from their own number.
        let start = std::process::id().wrapping_mul(7919) % count;
        (0..count)
            .map(|step| first + u16::try_from((start + step) % count).unwrap())
            .find_map(|number| {
                let lock = File::create(folder.join(number.to_string())).ok()?;
                lock.try_lock().ok()?;
                TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
                Some(Self { number, _lock: lock })
            })
            .expect("a free port")
    }
}

const FIRST: u16 = 20_000;
const COUNT: u32 = 10_000;
