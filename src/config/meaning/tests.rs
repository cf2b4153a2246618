//! Valid and invalid keys and values.

use std::path::PathBuf;

use secrecy::ExposeSecret as _;

use super::*;

const CENTRAL: &str = "[central]\nurl = \"postgres://master@127.0.0.1/central\"\n";
const SHIPPED: &str = include_str!("../../../proxy.toml");

fn read_with(text: &str, variables: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let environment =
        |name: &str| variables.iter().find_map(|(key, value)| (*key == name).then(|| (*value).to_owned()));
    read(text, Some(Path::new("/etc/pglobby/proxy.toml")), &environment)
}

fn problems(text: &str) -> Vec<String> {
    read_with(text, &[]).unwrap_err()
}

#[test]
fn the_smallest_file_has_every_default() {
    let config = read_with(CENTRAL, &[]).unwrap();
    assert_eq!(config.listen, ["127.0.0.1:6432".parse().unwrap()]);
    assert_eq!(config.pool.default_pool_size, 20);
    assert_eq!(config.timeouts.query, None);
    assert!(config.worker_threads >= 1);
    assert_eq!(config.central.url, "postgres://master@127.0.0.1:5432/central");
}

#[test]
fn the_snapshot_is_in_the_folder_of_the_service_unless_another_place_is_given() {
    let place = |text: &str, variables: &[(&str, &str)]| {
        read_with(&format!("{text}\n{CENTRAL}"), variables).unwrap().directory_snapshot
    };
    let of_service = [("STATE_DIRECTORY", "/var/lib/pglobby:/var/lib/other")];
    assert_eq!(place("", &[]), None);
    assert_eq!(place("", &of_service), Some(PathBuf::from("/var/lib/pglobby/directory.snapshot")));
    let given = "directory_snapshot = \"here/it.is\"";
    assert_eq!(place(given, &of_service), Some(PathBuf::from("/etc/pglobby/here/it.is")));
    assert_eq!(place("directory_snapshot = \"off\"", &of_service), None);
}

#[test]
fn every_problem_is_said_at_once_with_its_line() {
    let text = format!(
        "query_wait_timeout = 30\nstatement_inspect_max = 256\nlisten_prot = 6432\ndefault_pool_size = 0\n\
         pool_mode = \"statement\"\nquery_timeout = true\nclient_tls_cert_file = \"a.pem\"\n{CENTRAL}"
    );
    assert_eq!(
        problems(&text),
        [
            "line 5: pool_mode must be one of transaction, session",
            "line 4: default_pool_size must be 1 or more",
            "line 2: statement_inspect_max needs a unit: 256B, 256kB, 256MB or 256GB",
            "line 1: query_wait_timeout needs a unit: 30ms, 30s, 30min, 30h or 30d",
            "line 6: query_timeout must be a duration, as \"30s\", not true or false",
            "client_tls_cert_file is given without client_tls_key_file",
            "line 3: listen_prot is not a known key; did you mean listen_port?",
        ]
    );
}

#[test]
fn contradictions_are_refused() {
    for (text, part) in [
        ("client_tls_sslmode = \"require\"", "needs client_tls_cert_file"),
        ("client_tls_key_file = \"k\"", "without client_tls_cert_file"),
        ("server_tls_key_file = \"k\"", "without server_tls_cert_file"),
        ("min_pool_size = 21", "larger than default_pool_size"),
        ("tcp_user_timeout = \"20s\"", "tcp_user_timeout must be 60s or longer"),
        ("tcp_keepidle = \"31s\"\ntcp_user_timeout = \"60s\"", "tcp_user_timeout must be 61s or longer"),
        ("server_tcp_user_timeout = \"19999ms\"", "server_tcp_user_timeout must be 20s or longer"),
        ("server_tcp_keepintvl = \"100ms\"", "server_tcp_keepintvl must be whole seconds"),
        ("directory_fresh = \"1h\"", "directory_stale is shorter"),
        ("listen_addr = \"none\"", "no client could connect"),
        ("listen_port = 9432", "the same address and port"),
        ("listen_port = 65536", "is too large"),
        ("listen_addr = \"not an address\"", "not an address"),
        ("admin_allow_from = \"everywhere\"", "not a network"),
    ] {
        let said = problems(&format!("{text}\n{CENTRAL}"));
        assert!(said.len() == 1 && said[0].contains(part), "{text}: {said:?}");
    }
}

#[test]
fn a_section_misspelt_is_found_too_and_a_missing_central_database_is_named() {
    let said = problems("[centrl]\nurl = \"postgres://a@b/c\"\n");
    assert!(said[0].starts_with("central.url is missing"), "{said:?}");
    assert_eq!(said[1], "line 2: centrl.url is not a known key; did you mean central.url?");
}

#[test]
fn variables_override_the_file_and_are_named_when_wrong() {
    let variables = [
        ("PGLOBBY_LISTEN_PORT", "0"),
        ("PGLOBBY_CENTRAL_URL", "host=/run/pg user=boss dbname=hub password='it''s'"),
        ("PGLOBBY_LOG_CONNECTIONS", "off"),
        ("PGLOBBY_TENANT_HOST_SUFFIXES", ".DB.example.com, db.example.org"),
        ("PGLOBBY_KEYS", "ring"),
    ];
    let config = read_with(&format!("listen_port = 7000\n{CENTRAL}"), &variables[..1]).unwrap();
    assert_eq!(config.listen_port, 0);
    let said = read_with(CENTRAL, &[("PGLOBBY_QUERY_TIMEOUT", "5")]).unwrap_err();
    assert!(said[0].starts_with("PGLOBBY_QUERY_TIMEOUT needs a unit"), "{said:?}");

    let config = read_with(CENTRAL, &variables[2..]).unwrap();
    assert!(!config.log.connections);
    assert_eq!(config.tenant_host_suffixes, ["db.example.com", "db.example.org"]);
    assert_eq!(config.keys_text.unwrap().expose_secret(), "ring");
}

#[test]
fn paths_are_relative_to_the_file_they_are_written_in() {
    let text = format!("{CENTRAL}[keys]\nfile = \"keyring.toml\"\n");
    let config = read_with(&text, &[]).unwrap();
    assert_eq!(config.keys_file, Some(PathBuf::from("/etc/pglobby/keyring.toml")));
    let config = read_with(&text, &[("PGLOBBY_KEYS_FILE", "ring.toml")]).unwrap();
    assert_eq!(config.keys_file, Some(PathBuf::from("ring.toml")));
}

#[test]
fn a_user_timeout_is_as_long_as_all_probes_unless_it_is_given() {
    let ms = |text: &str| {
        let config = read_with(&format!("{text}\n{CENTRAL}"), &[]).unwrap();
        let sides = [config.timeouts.client_keepalive, config.timeouts.server_keepalive];
        sides.map(|side| side.user_timeout.map(|timeout| timeout.as_millis()))
    };
    assert_eq!(ms(""), [Some(60_000), Some(20_000)]);
    assert_eq!(ms("tcp_keepidle = \"2min\"\nserver_tcp_keepintvl = \"1s\""), [Some(150_000), Some(11_000)]);
    assert_eq!(ms("tcp_user_timeout = \"off\"\nserver_tcp_user_timeout = \"1min\""), [None, Some(60_000)]);
}

#[test]
fn a_socket_that_is_accepted_has_the_keepalive_of_the_one_that_listens() {
    let keepalive = read_with(CENTRAL, &[]).unwrap().timeouts.client_keepalive;
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    keepalive.apply(&socket2::SockRef::from(&listener)).unwrap();
    let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let socket = socket2::SockRef::from(&socket);
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), keepalive.idle);
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), keepalive.interval);
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), Keepalive::PROBES);
    assert_eq!(socket.tcp_user_timeout().unwrap(), keepalive.user_timeout);
}

#[test]
fn zero_and_off_disable_a_timeout() {
    for off in ["\"off\"", "0", "\"0\"", "false", "\"0s\""] {
        let config = read_with(&format!("query_timeout = {off}\n{CENTRAL}"), &[]).unwrap();
        assert_eq!(config.timeouts.query, None, "{off}");
    }
}

#[test]
fn no_problem_quotes_a_password() {
    for text in [
        "central = \"postgres://a:hunter2@b/c\"",
        "[central]\nurl = postgres://a:hunter2@b/c",
        "[central]\nurl = \"postgres://a:hunter2@b:notaport/c\"",
        "[central]\nurl = \"user=a password='hunter2\"",
        "[central]\nurl = \"host=b password=hunter2\"",
    ] {
        let said = problems(text);
        assert!(!said.is_empty() && !said.concat().contains("hunter2"), "{said:?}");
    }
    let config = read_with("[central]\nurl = \"postgres://a:hunter2@b/c\"", &[]).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    assert_eq!(config.central.password.unwrap().expose_secret(), "hunter2");
}

#[test]
fn a_process_is_taken_over_at_a_place_that_its_configuration_gives() {
    let place = |text: &str| read_with(&format!("{text}\n{CENTRAL}"), &[]).unwrap().takeover_socket;
    let default = |path: &str| TakeoverSocket::Default(path.into());
    assert_eq!(place(""), default("/etc/pglobby/.proxy.6432.takeover"));
    let in_folder = "unix_socket_dir = \"/run/pglobby\"\nlisten_port = 5432";
    assert_eq!(place(in_folder), default("/run/pglobby/.pglobby.5432.takeover"));
    assert_eq!(place("takeover_socket = \"off\""), TakeoverSocket::Off);
    assert_eq!(place("takeover_socket = \"/run/t\""), TakeoverSocket::Path("/run/t".into()));
    let long = format!("takeover_socket = \"/{}\"", "x".repeat(UNIX_SOCKET_PATH_BYTES_MAX));
    assert!(problems(&format!("{long}\n{CENTRAL}"))[0].contains("takeover_socket is too long"));
    let deep = format!("unix_socket_dir = \"/{}\"", "x".repeat(85));
    assert_eq!(place(&deep), TakeoverSocket::Off);
}

/// `#key = value`, without a space, is a default; `# text` is prose.
fn with_defaults_uncommented() -> String {
    let is_default = |line: &str| {
        line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_lowercase()))
    };
    let uncomment = |line: &'static str| if is_default(line) { &line[1..] } else { line };
    SHIPPED.lines().map(uncomment).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_shipped_file_says_every_key_and_its_commented_defaults_are_the_real_ones() {
    let shipped = read_with(SHIPPED, &[]).unwrap();
    let uncommented = read_with(&with_defaults_uncommented(), &[]).unwrap();
    assert_eq!(format!("{shipped:?}"), format!("{uncommented:?}"));

    let mut written = Written::parse("", None, &|_| None);
    everything(&mut written, None, &|_| None);
    let (known, _) = written.finish();
    assert!(known.len() > 50, "{known:?}");
    let mut section = String::new();
    let mut said = std::collections::HashSet::new();
    for line in SHIPPED.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
        } else if let Some((key, _)) = line.trim_start_matches('#').split_once(" = ") {
            said.insert(format!("{section}{key}"));
        }
    }
    for key in known {
        assert!(said.contains(key), "proxy.toml does not say {key}");
    }
}
