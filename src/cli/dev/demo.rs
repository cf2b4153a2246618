//! The demo tenants and logins of `pglobby dev`, and the instructions that it prints.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use secrecy::{ExposeSecret as _, SecretString};

use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        logins::{self, NewLogin, NewLoginKind},
        tenants,
    },
    onboarding::create::{CreateTenant, create as create_tenant},
    secrets::scram_verifier::generate_password,
};

/// A login to try, and the database that it connects to.
#[derive(Debug)]
pub struct DemoLogin {
    /// Its name.
    pub name: &'static str,
    /// A tenant, or the console.
    pub database: &'static str,
    /// `None` after the run that created it: only a verifier is stored.
    pub password: Option<SecretString>,
}

/// Login and database; the last one is the administrator's.
const DEMO: [(&str, &str); 3] = [("alice", "acme"), ("bob", "globex"), ("admin", CONSOLE)];
const CONSOLE: &str = "pglobby";

/// Creates the demo tenants and logins that are missing. A tenant that was dropped stays dropped, with its
/// login.
pub async fn create(actor: &Actor) -> Result<Vec<DemoLogin>, AdminError> {
    let tenants = tenants::list(actor, true).await?;
    let logins = logins::list(actor, None).await?;
    let mut demo = Vec::new();
    for (name, database) in DEMO {
        let mut same_name = tenants.iter().filter(|tenant| tenant.name == database).peekable();
        let kind = match database {
            CONSOLE => NewLoginKind::Admin,
            _ => NewLoginKind::Employee { tenant: database.to_owned() },
        };
        if database != CONSOLE {
            if same_name.peek().is_none() {
                create_tenant(actor, &CreateTenant { name: database.to_owned(), ..CreateTenant::default() })
                    .await?;
            } else if same_name.all(|tenant| tenant.status != "active") {
                continue;
            }
        }
        let password = match logins.iter().any(|login| login.name == name) {
            true => None,
            false => Some(create_login(actor, name, kind).await?),
        };
        demo.push(DemoLogin { name, database, password });
    }
    Ok(demo)
}

async fn create_login(actor: &Actor, name: &str, kind: NewLoginKind) -> Result<SecretString, AdminError> {
    let password = generate_password();
    let login = NewLogin {
        name: name.to_owned(),
        kind,
        read_only: false,
        password: password.clone(),
        valid_until: None,
        allow_from: Vec::new(),
    };
    logins::create(actor, &login).await?;
    Ok(password)
}

/// Returns the text that `dev` prints when everything is running.
pub fn instructions(logins: &[DemoLogin], listen: SocketAddr, folder: &Path, has_socket: bool) -> String {
    let at = reachable(listen);
    let mut lines = vec!["Connect:".to_owned()];
    for DemoLogin { name, database, password } in logins {
        lines.push(match password {
            // Generated passwords have letters and digits only.
            Some(password) => {
                format!("  psql 'postgres://{name}:{}@{at}/{database}'", password.expose_secret())
            }
            None => format!("  psql 'postgres://{name}@{at}/{database}'"),
        });
    }
    if let Some(DemoLogin { name, database, .. }) = logins.first().filter(|_| has_socket) {
        lines.push("Or through a Unix socket, which needs less CPU:".to_owned());
        lines.push(format!("  psql -h '{}' -p {} -U {name} {database}", folder.display(), listen.port()));
    }
    lines.push(String::new());
    if logins.iter().any(|login| login.password.is_some()) {
        lines.push("Passwords are shown only now and are not stored. To set a new one:".to_owned());
    } else {
        lines.push("The first run printed the passwords; they are not stored. To set a new one:".to_owned());
    }
    lines.push("  pglobby login set-password alice --generate".to_owned());
    lines.push(String::new());
    lines.push("To create a tenant, in another terminal:".to_owned());
    lines.push("  pglobby tenant create initech && pglobby login create peter --tenant initech".to_owned());
    lines.push(format!(
        "In a folder with another proxy.toml, add: --config {}",
        folder.join("proxy.toml").display()
    ));
    lines.push(String::new());
    lines.push(format!("Ctrl-C stops everything; {} keeps the data.", folder.display()));
    lines.join("\n")
}

/// Returns an address that clients can connect to: 127.0.0.1 for 0.0.0.0.
fn reachable(listen: SocketAddr) -> SocketAddr {
    match listen {
        SocketAddr::V4(it) if it.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, it.port()).into(),
        SocketAddr::V6(it) if it.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, it.port()).into(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_in_the_line_to_paste_only_in_the_run_that_made_it() {
        let mut logins =
            [DemoLogin { name: "alice", database: "acme", password: Some(SecretString::from("s3cret")) }];
        let listen = "0.0.0.0:6432".parse().unwrap();
        let first = instructions(&logins, listen, Path::new("/d"), true);
        assert!(first.contains("psql -h '/d' -p 6432 -U alice acme"), "{first}");
        assert!(first.contains("psql 'postgres://alice:s3cret@127.0.0.1:6432/acme'"), "{first}");

        logins[0].password = None;
        let later = instructions(&logins, listen, Path::new("/d"), false);
        assert!(!later.contains("Unix socket"), "{later}");
        assert!(later.contains("psql 'postgres://alice@127.0.0.1:6432/acme'"), "{later}");
        assert!(later.contains("pglobby login set-password alice --generate"), "{later}");
    }
}
