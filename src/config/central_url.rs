//! The URL of the central database, in libpq's two forms: `postgres://…` and `host=… user=…`.
//!
//! tokio-postgres parses both but does not support `sslmode=verify-full` and `sslrootcert`, so these are
//! removed first.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use secrecy::SecretString;
use tokio_postgres::config::Host;
use zeroize::Zeroizing;

use crate::config::{Central, CentralTls, TlsMode};

const PASSFILE_BYTES_MAX: u64 = 1024 * 1024;

/// Parses `[central] url` and finds the password: in the URL, in `PGLOBBY_CENTRAL_PASSWORD`, in
/// `PGPASSWORD`, in the passfile. `env` reads an environment variable.
///
/// # Errors
/// A sentence without the URL, which may contain a password.
pub fn parse(url: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Central, String> {
    let (rest, ours) = take_tls_options(url)?;
    let mut connection: tokio_postgres::Config =
        rest.parse().map_err(|error| format!("is not a PostgreSQL URL: {}", cause(&error)))?;
    let user = connection.get_user().ok_or("names no user (postgres://USER@HOST/DATABASE)")?.to_owned();
    if connection.get_hosts().is_empty() && connection.get_hostaddrs().is_empty() {
        return Err("names no host (postgres://USER@HOST/DATABASE)".to_owned());
    }
    if connection.get_dbname().is_none() {
        connection.dbname(&user);
    }
    let all_unix = !connection.get_hosts().is_empty()
        && connection.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)));
    let tls = CentralTls { mode: if all_unix { TlsMode::Disable } else { ours.mode }, root_ca: ours.root_ca };
    connection.ssl_mode(tls.mode.for_tokio_postgres());
    let password = find_password(&connection, env)?;
    let mut without_password = connection.clone();
    if connection.get_password().is_some() {
        without_password.password("");
    }
    Ok(Central { url: describe(&connection), password, connection: without_password, tls })
}

struct TlsOptions {
    mode: TlsMode,
    root_ca: Option<PathBuf>,
}

/// Removes `sslmode` and `sslrootcert`, and returns them and the rest for tokio-postgres.
fn take_tls_options(url: &str) -> Result<(Zeroizing<String>, TlsOptions), String> {
    let mut options = TlsOptions { mode: TlsMode::Prefer, root_ca: None };
    let mut ours = |key: &str, value: &str| -> Result<bool, String> {
        match key {
            "sslmode" => options.mode = tls_mode(value)?,
            "sslrootcert" => {
                options.root_ca = (value != "system" && !value.is_empty()).then(|| PathBuf::from(value));
            }
            _ => return Ok(false),
        }
        Ok(true)
    };
    let mut rest = Zeroizing::new(String::with_capacity(url.len() * 2));
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        rest.push_str(base);
        let mut separator = '?';
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !ours(key, &percent_decode(value))? {
                rest.push(separator);
                rest.push_str(pair);
                separator = '&';
            }
        }
    } else {
        for (key, value) in key_values(url)? {
            if !ours(&key, &value)? {
                let quoted = Zeroizing::new(value.replace('\\', "\\\\").replace('\'', "\\'"));
                for part in [key.as_str(), "='", &quoted, "' "] {
                    rest.push_str(part);
                }
            }
        }
    }
    Ok((rest, options))
}

fn tls_mode(value: &str) -> Result<TlsMode, String> {
    match value.parse() {
        // The connection tries TLS first for both.
        Ok(TlsMode::Allow) => Ok(TlsMode::Prefer),
        Ok(mode) => Ok(mode),
        Err(_) => Err(format!("has an unknown sslmode ({})", TlsMode::WORDS.join(", "))),
    }
}

/// libpq's `key = value` form. Values may be in single quotes; a backslash escapes.
fn key_values(text: &str) -> Result<Vec<(String, Zeroizing<String>)>, String> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=').ok_or("is neither postgres://… nor key=value pairs")?;
        let mut value = Zeroizing::new(String::with_capacity(after.len()));
        let mut letters = after.trim_start().char_indices().peekable();
        let quoted = letters.next_if(|(_, letter)| *letter == '\'').is_some();
        let mut closed = !quoted;
        while let Some((_, letter)) = letters.next() {
            match letter {
                '\\' => value.extend(letters.next().map(|(_, escaped)| escaped)),
                '\'' if quoted => {
                    closed = true;
                    break;
                }
                letter if !quoted && letter.is_whitespace() => break,
                letter => value.push(letter),
            }
        }
        if !closed {
            return Err("has a quotation that does not end".to_owned());
        }
        pairs.push((key.trim().to_owned(), value));
        let used = letters.peek().map_or(after.trim_start().len(), |(at, _)| *at);
        rest = after.trim_start().get(used..).unwrap_or("").trim_start();
    }
    Ok(pairs)
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| byte == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `user@host:port/database`, as errors and `pglobby check` show it.
fn describe(connection: &tokio_postgres::Config) -> String {
    let hosts = host_ports(connection).into_iter().map(|(host, port)| match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    });
    let (user, database) = (connection.get_user().unwrap_or(""), connection.get_dbname().unwrap_or(""));
    let hosts: Vec<_> = hosts.collect();
    match hosts.as_slice() {
        [only] if only.starts_with('/') => {
            let (folder, port) = only.rsplit_once(':').unwrap_or((only, "5432"));
            format!("postgres://{user}@/{database}?host={folder}&port={port}")
        }
        _ => format!("postgres://{user}@{}/{database}", hosts.join(",")),
    }
}

fn host_ports(connection: &tokio_postgres::Config) -> Vec<(String, u16)> {
    let ports = connection.get_ports();
    let port = |at: usize| ports.get(at).or(ports.first()).copied().unwrap_or(5432);
    let names: Vec<String> = if connection.get_hosts().is_empty() {
        connection.get_hostaddrs().iter().map(ToString::to_string).collect()
    } else {
        let name = |host: &Host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        };
        connection.get_hosts().iter().map(name).collect()
    };
    names.into_iter().enumerate().map(|(at, name)| (name, port(at))).collect()
}

fn find_password(
    connection: &tokio_postgres::Config,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<SecretString>, String> {
    if let Some(password) = connection.get_password().filter(|password| !password.is_empty()) {
        let text = std::str::from_utf8(password).map_err(|_| "has a password that is not UTF-8")?;
        return Ok(Some(SecretString::from(text)));
    }
    if let Some(password) = env("PGLOBBY_CENTRAL_PASSWORD").or_else(|| env("PGPASSWORD")) {
        return Ok(Some(SecretString::from(password)));
    }
    let named = env("PGPASSFILE").map(PathBuf::from);
    let path = named.clone().or_else(|| env("HOME").map(|home| Path::new(&home).join(".pgpass")));
    match path {
        Some(path) if named.is_some() || path.exists() => search_passfile(connection, &path),
        _ => Ok(None),
    }
}

/// libpq's `host:port:database:user:password` lines; `*` matches anything, backslash escapes.
fn search_passfile(connection: &tokio_postgres::Config, path: &Path) -> Result<Option<SecretString>, String> {
    let unreadable =
        |error: std::io::Error| format!("needs a password, and passfile {}: {error}", path.display());
    let file = File::open(path).map_err(unreadable)?;
    if file.metadata().map_err(unreadable)?.permissions().mode() & 0o077 != 0 {
        return Err(format!(
            "needs a password, and others may read passfile {0}; run: chmod 600 {0}",
            path.display()
        ));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(PASSFILE_BYTES_MAX).read_to_string(&mut text).map_err(unreadable)?;
    let (user, database) = (connection.get_user().unwrap_or(""), connection.get_dbname().unwrap_or(""));
    let hosts = host_ports(connection);
    let found = text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let [host, port, line_database, line_user, password] = passfile_fields(line)?;
        let is = |field: &str, value: &str| field == "*" || field == value;
        let host_matches = hosts.iter().any(|(name, number)| {
            // libpq looks up "localhost" for a Unix socket.
            (is(&host, name) || (name.starts_with('/') && host.as_str() == "localhost"))
                && is(&port, &number.to_string())
        });
        (host_matches && is(&line_database, database) && is(&line_user, user))
            .then(|| SecretString::from(password.as_str()))
    });
    Ok(found)
}

fn passfile_fields(line: &str) -> Option<[Zeroizing<String>; 5]> {
    let mut fields = vec![Zeroizing::new(String::with_capacity(line.len()))];
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            // The password is the rest of the line, colons included.
            ':' if fields.len() < 5 => fields.push(Zeroizing::new(String::with_capacity(line.len()))),
            '\\' => fields.last_mut()?.push(letters.next()?),
            letter => fields.last_mut()?.push(letter),
        }
    }
    fields.try_into().ok()
}

/// The `Display` of tokio-postgres leaves the cause out.
fn cause(error: &tokio_postgres::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};

    use secrecy::ExposeSecret as _;

    use super::*;

    fn parse_with(url: &str, variables: &[(&str, &str)]) -> Result<Central, String> {
        parse(url, &|name| {
            variables.iter().find_map(|(key, value)| (*key == name).then(|| (*value).to_owned()))
        })
    }

    #[test]
    fn both_spellings_mean_the_same() {
        let url = "postgres://boss:p%40ss%27w@db.example.com:5433/hub?sslmode=verify-full&sslrootcert=%2Fetc%2Fca.pem";
        let pairs = r"host=db.example.com port = 5433 user=boss dbname=hub password='p@ss\'w' sslmode=verify-full sslrootcert=/etc/ca.pem";
        for text in [url, pairs] {
            let central = parse_with(text, &[]).unwrap();
            assert_eq!(central.url, "postgres://boss@db.example.com:5433/hub");
            assert_eq!(central.password.unwrap().expose_secret(), "p@ss'w");
            let tls = CentralTls { mode: TlsMode::VerifyFull, root_ca: Some("/etc/ca.pem".into()) };
            assert_eq!(central.tls, tls);
            assert_eq!(central.connection.get_ssl_mode(), tokio_postgres::config::SslMode::Require);
            assert!(central.connection.get_password().is_none_or(<[u8]>::is_empty));
        }
    }

    #[test]
    fn a_unix_socket_is_never_encrypted() {
        for text in ["postgres://boss@/hub?host=/run/pg&sslmode=require", "host=/run/pg user=boss dbname=hub"]
        {
            let central = parse_with(text, &[]).unwrap();
            assert_eq!(central.tls.mode, TlsMode::Disable);
            assert!(central.url.starts_with("postgres://boss@/hub?host=/run/pg&port="), "{}", central.url);
        }
    }

    #[test]
    fn what_is_missing_or_unknown_is_said() {
        for (text, part) in [
            ("postgres://db.example.com/hub", "names no user"),
            ("user=boss", "names no host"),
            ("postgres://boss@db/hub?sslmode=maybe", "unknown sslmode"),
            ("postgres://boss@db/hub?speed=high", "unknown option `speed`"),
            ("host='db user=boss", "quotation that does not end"),
            ("nonsense", "neither"),
        ] {
            let error = parse_with(text, &[]).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_password_comes_from_the_first_place_that_has_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pgpass");
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
        writeln!(file, "# ours\nother:*:*:*:wrong\ndb:5432:hub:boss:from\\:the file").unwrap();
        let passfile = ("PGPASSFILE", path.to_str().unwrap());
        let found = |url: &str, variables: &[(&str, &str)]| {
            parse_with(url, variables).unwrap().password.map(|password| password.expose_secret().to_owned())
        };

        let all = [passfile, ("PGPASSWORD", "from libpq's"), ("PGLOBBY_CENTRAL_PASSWORD", "from ours")];
        assert_eq!(found("postgres://boss:url@db/hub", &all).unwrap(), "url");
        assert_eq!(found("postgres://boss@db/hub", &all).unwrap(), "from ours");
        assert_eq!(found("postgres://boss@db/hub", &all[..2]).unwrap(), "from libpq's");
        assert_eq!(found("postgres://boss@db/hub", &all[..1]).unwrap(), "from:the file");
        assert_eq!(found("postgres://boss@db/elsewhere", &all[..1]), None);

        let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(&path, open).unwrap();
        assert!(parse_with("postgres://boss@db/hub", &all[..1]).unwrap_err().contains("chmod 600"));
    }
}
