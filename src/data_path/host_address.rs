//! Where a host listens, and how a user writes it: as libpq writes lists of hosts, `pg1,pg2:5433`.

use std::{fmt, path::PathBuf};

/// Most addresses of one host.
pub const ADDRESSES_MAX: usize = 16;

/// PostgreSQL's port, where none is written.
pub const DEFAULT_PORT: u16 = 5432;

/// One address that a host listens on. `Display` is what [`HostAddress::parse`] reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostAddress {
    /// TCP; `name` is a DNS name or an address literal.
    Tcp {
        /// DNS name or address literal.
        name: String,
        /// TCP port.
        port: u16,
    },
    /// Unix socket: the directory, as libpq has it; the file is `.s.PGSQL.<port>` in it.
    Unix {
        /// The folder of the socket.
        directory: PathBuf,
        /// Part of the socket's file name.
        port: u16,
    },
}

impl HostAddress {
    /// A DNS name, an address literal, or the folder of a Unix socket, with a port.
    pub fn of(place: &str, port: u16) -> Self {
        match place.starts_with('/') {
            true => Self::Unix { directory: place.into(), port },
            false => Self::Tcp { name: place.to_owned(), port },
        }
    }

    /// One entry of a list: `name`, `name:port`, `[IPv6 address]:port`, `/folder` or `/folder:port`. An IPv6
    /// address without brackets has no port.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no address as \"pg1\", \"pg1:5433\", \"[2001:db8::1]:5433\" or \"/run/postgresql\""
            )
        };
        let bracketed =
            text.strip_prefix('[').map(|rest| rest.split_once(']').ok_or_else(wrong)).transpose()?;
        let (place, port) = match bracketed {
            Some((place, "")) => (place, None),
            Some((place, rest)) => (place, Some(rest.strip_prefix(':').ok_or_else(wrong)?)),
            None => match text.rsplit_once(':') {
                Some((place, _)) if place.contains(':') && !place.starts_with('/') => (text, None),
                // A folder's name may have a colon.
                Some((place, port)) if place.starts_with('/') && port.parse::<u16>().is_err() => (text, None),
                Some((place, port)) => (place, Some(port)),
                None => (text, None),
            },
        };
        let port = match port {
            Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?,
            None => default_port,
        };
        let is_odd = |character: char| character.is_control() || character.is_whitespace();
        match place.is_empty() || place.contains(is_odd) && !place.starts_with('/') {
            true => Err(wrong()),
            false => Ok(Self::of(place, port)),
        }
    }

    /// A list as a user writes it, separated by commas: at least one address, at most [`ADDRESSES_MAX`], none
    /// twice.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse_list(text: &str, default_port: u16) -> Result<Vec<Self>, String> {
        let mut addresses = Vec::new();
        for entry in text.split(',') {
            let address = Self::parse(entry.trim(), default_port)?;
            if addresses.contains(&address) {
                return Err(format!("{address} is there twice"));
            }
            addresses.push(address);
        }
        match addresses.len() > ADDRESSES_MAX {
            true => Err(format!("a host has at most {ADDRESSES_MAX} addresses")),
            false => Ok(addresses),
        }
    }

    /// DNS name, address literal, or folder.
    pub fn place(&self) -> String {
        match self {
            Self::Tcp { name, .. } => name.clone(),
            Self::Unix { directory, .. } => directory.display().to_string(),
        }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Tcp { port, .. } | Self::Unix { port, .. } => *port,
        }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { name, port } if name.contains(':') => write!(f, "[{name}]:{port}"),
            _ => write!(f, "{}:{}", self.place(), self.port()),
        }
    }
}

/// A list, as [`HostAddress::parse_list`] reads it.
pub fn written(addresses: &[HostAddress]) -> String {
    addresses.iter().map(HostAddress::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_written_as_libpq_writes_it() {
        for (text, read) in [
            ("pg1", "pg1:5432"),
            ("pg1, pg2:5433", "pg1:5432,pg2:5433"),
            (
                "10.0.0.1:6000,2001:db8::1,[2001:db8::2]:5433,[::1]",
                "10.0.0.1:6000,[2001:db8::1]:5432,[2001:db8::2]:5433,[::1]:5432",
            ),
            (
                "/run/postgresql,/tmp/a folder:5433,/tmp/a:b",
                "/run/postgresql:5432,/tmp/a folder:5433,/tmp/a:b:5432",
            ),
        ] {
            let addresses = HostAddress::parse_list(text, 5432).unwrap();
            assert_eq!(written(&addresses), read);
            assert_eq!(HostAddress::parse_list(read, 1).unwrap(), addresses, "it reads what it writes");
        }
        let many = (0..17).map(|number| format!("pg{number}")).collect::<Vec<_>>().join(",");
        for wrong in [
            "",
            "pg1,",
            ",",
            "pg1:0",
            "pg1:70000",
            "pg1:x",
            "[::1",
            "[::1]5433",
            ":5432",
            "pg 1",
            "pg1,pg1:5432",
            &many,
        ] {
            assert!(HostAddress::parse_list(wrong, 5432).is_err(), "{wrong}");
        }
    }
}
