//! The host that a tenant moves away from.

use super::{
    names::{ident, literal, shell_word},
    operation::TenantLock,
    reown,
    roles::{self, Roles},
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    host_connection::{HostAdmin, HostSession},
    tenants::missing,
};

/// A tenant on its present host.
pub(super) struct Source {
    pub tenant_id: i64,
    pub admin: HostAdmin,
    /// A session of the administrator in its own database.
    pub session: HostSession,
    pub database: String,
    pub oid: u32,
    /// The read-only role's name is empty if there is none.
    pub roles: Roles,
    adopted: bool,
    /// Its roles may not log in.
    pub suspended: bool,
    /// Options for `CREATE DATABASE`.
    locale: String,
}

/// Settings of the database and of the tenant's roles in it, as the end of an ALTER DATABASE or ALTER ROLE.
const SETTINGS: &str = r"
SELECT CASE WHEN r.rolname IS NULL THEN '' ELSE r.rolname::text END, split_part(s.setting, '=', 1),
       substr(s.setting, strpos(s.setting, '=') + 1)
FROM pg_db_role_setting c JOIN pg_database d ON d.oid = c.setdatabase AND d.datname = $1
LEFT JOIN pg_roles r ON r.oid = c.setrole, unnest(c.setconfig) AS s (setting)
WHERE c.setrole = 0 OR r.rolname IN ($2, $3)";

/// Parameters with a list of names, whose elements ALTER DATABASE takes one by one.
const LISTS: &str = "search_path temp_tablespaces session_preload_libraries local_preload_libraries
    shared_preload_libraries unix_socket_directories";

/// A list as PostgreSQL stores it, each element as a literal. The tenant wrote it, and an element without
/// quotes may be any text without space and comma, so it must be escaped.
fn list(kept: &str) -> String {
    let (mut elements, mut element, mut quoted) = (Vec::new(), String::new(), false);
    let mut letters = kept.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if quoted && letters.next_if_eq(&'"').is_some() => element.push('"'),
            '"' => quoted = !quoted,
            ',' if !quoted => elements.push(std::mem::take(&mut element)),
            letter if letter.is_whitespace() && !quoted => {}
            letter => element.push(letter),
        }
    }
    elements.push(element);
    elements.iter().map(|element| literal(element)).collect::<Vec<_>>().join(", ")
}

impl Source {
    /// Reads the central database and the host.
    pub async fn load(actor: &Actor, lock: &TenantLock) -> Result<Self, AdminError> {
        let sql = "SELECT id, status, host, database, username, ro_username, adopted FROM pglobby.tenants
                   WHERE name = $1 AND status <> 'dropped'";
        let Some(row) = lock.client.query_opt(sql, &[&lock.name]).await? else {
            return Err(missing(actor, &lock.client, &lock.name).await);
        };
        let status: String = row.get("status");
        if !matches!(status.as_str(), "active" | "suspended") {
            return Err(AdminError::Refused(format!(
                "tenant {:?} is {status}; only one that is active or suspended can move",
                lock.name
            )));
        }
        let admin = HostAdmin::load(actor, &lock.client, row.get("host")).await?;
        let session = admin.connect().await?;
        let database: String = row.get("database");
        let sql = "SELECT oid, pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text FROM pg_database
                   WHERE datname = $1";
        let found = session.query("looking at the database", sql, &[&database]).await?;
        let Some(found) = found.first() else {
            return Err(AdminError::Refused(format!(
                "there is no database {database:?} on host {:?}; see `pglobby doctor`",
                admin.name
            )));
        };
        let locale = format!(
            "ENCODING {} LC_COLLATE {} LC_CTYPE {}",
            literal(found.get(1)),
            literal(found.get(2)),
            literal(found.get(3))
        );
        Ok(Self {
            tenant_id: row.get("id"),
            oid: found.get(0),
            roles: Roles {
                read_write: row.get("username"),
                read_only: row.get::<_, Option<String>>("ro_username").unwrap_or_default(),
            },
            adopted: row.get("adopted"),
            suspended: status == "suspended",
            admin,
            session,
            database,
            locale,
        })
    }

    /// Refuses tenants that cannot be moved, and targets that cannot take them.
    ///
    /// # Errors
    /// [`AdminError::Refused`] or [`AdminError::Exists`], before anything is made.
    pub async fn refuse_unmovable(
        &self,
        lock: &TenantLock,
        target: &HostSession,
        host: &str,
    ) -> Result<(), AdminError> {
        if self.adopted {
            self.refuse_foreign(&lock.name).await?;
        }
        for role in [&self.roles.read_write, &self.roles.read_only] {
            if !role.is_empty() && !roles::ours(&self.session, role).await? {
                return Err(AdminError::Refused(format!(
                    "role {role:?} on host {:?} was not made by pglobby (its comment says so), so it is left alone",
                    self.admin.name
                )));
            }
        }
        let (here, there) = (
            self.session.rights().await?.server_version / 10_000,
            target.rights().await?.server_version / 10_000,
        );
        if there < here {
            return Err(AdminError::Refused(format!(
                "host {host:?} is PostgreSQL {there}, older than {here} where the tenant is now; a dump goes upwards only"
            )));
        }
        let sql = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = $1";
        let there = target.query("looking for the database", sql, &[&self.database]).await?;
        let claimed =
            "SELECT 1 FROM pglobby.tenants WHERE host = $1 AND database = $2 AND status <> 'dropped'";
        if there.is_empty() && lock.client.query(claimed, &[&host, &self.database]).await?.is_empty() {
            return Ok(());
        }
        Err(AdminError::Exists(format!(
            "there is a database {:?} on host {host:?} already; rename or drop that first",
            self.database
        )))
    }

    /// Refuses an adopted database of which the tenant's role is not the owner of everything.
    async fn refuse_foreign(&self, name: &str) -> Result<(), AdminError> {
        let inside = self.admin.connect_to(&self.database).await?;
        let owners = reown::foreign(&inside, &self.roles.read_write).await?;
        let Some(object) = owners.first() else { return Ok(()) };
        Err(AdminError::Refused(format!(
            "tenant {name:?} was adopted, and role {:?}, which the other host does not know, owns {} objects in its database; \
             pglobby tenant drop {} (the database stays), adopt it again with --ownership transfer, and move it then",
            object.owner,
            owners.len(),
            shell_word(name)
        )))
    }

    /// Statements for an empty database with the same locale, open to connections. From template0, because
    /// the copy already contains what template1 added.
    pub fn create_database(&self, roles: &Roles) -> Vec<String> {
        let (database, owner) = (ident(&self.database), ident(&roles.read_write));
        vec![
            format!(
                "CREATE DATABASE {database} OWNER {owner} TEMPLATE template0 {} ALLOW_CONNECTIONS false",
                self.locale
            ),
            format!("REVOKE ALL ON DATABASE {database} FROM PUBLIC"),
            format!("ALTER DATABASE {database} ALLOW_CONNECTIONS true"),
        ]
    }

    /// Number of sessions and prepared transactions of the tenant's roles on the old host. A copy would
    /// lose them.
    pub async fn sessions(&self) -> Result<i64, AdminError> {
        let sql = "SELECT (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE usename = ANY ($1))
                     + (SELECT count(*) FROM pg_catalog.pg_prepared_xacts WHERE database = $2)";
        let roles = vec![&self.roles.read_write, &self.roles.read_only];
        let rows =
            self.session.query("counting the tenant's sessions", sql, &[&roles, &self.database]).await?;
        Ok(rows.first().map_or(0, |row| row.get(0)))
    }

    /// Statements that allow or forbid both roles to log in.
    pub fn login_allowed(&self, allowed: bool) -> String {
        let login = if allowed { "LOGIN" } else { "NOLOGIN" };
        let roles = [&self.roles.read_write, &self.roles.read_only];
        let present = roles.into_iter().filter(|role| !role.is_empty());
        present.map(|role| format!("ALTER ROLE {} {login};\n", ident(role))).collect()
    }

    /// Settings of the database and its roles, for the roles on the new host.
    pub async fn settings(&self, new: &Roles) -> Result<Vec<String>, AdminError> {
        let rows = self
            .session
            .query(
                "looking at the database's settings",
                SETTINGS,
                &[&self.database, &self.roles.read_write, &self.roles.read_only],
            )
            .await?;
        let statement = |row: &tokio_postgres::Row| {
            let (role, key, value): (String, String, String) = (row.get(0), row.get(1), row.get(2));
            let database = ident(&self.database);
            let target = match role {
                role if role.is_empty() => format!("DATABASE {database}"),
                role if role == self.roles.read_write => {
                    format!("ROLE {} IN DATABASE {database}", ident(&new.read_write))
                }
                _ => format!("ROLE {} IN DATABASE {database}", ident(&new.read_only)),
            };
            let is_list = LISTS.split_whitespace().any(|name| name == key);
            let value = if is_list { list(&value) } else { literal(&value) };
            let key: Vec<String> = key.split('.').map(ident).collect();
            format!("ALTER {target} SET {} TO {value}", key.join("."))
        };
        Ok(rows.iter().map(statement).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::list;

    #[test]
    fn every_element_of_a_kept_list_is_a_literal() {
        for (kept, written) in [
            ("hr, public", "'hr', 'public'"),
            (r#""$user", "odd, ""one""",x"#, r#"'$user', 'odd, "one"', 'x'"#),
            (r#""""#, "''"),
            ("a;ALTER/**/ROLE/**/x/**/SUPERUSER;--", "'a;ALTER/**/ROLE/**/x/**/SUPERUSER;--'"),
            ("a';--", "'a'';--'"),
        ] {
            assert_eq!(list(kept), written, "{kept}");
        }
    }
}
