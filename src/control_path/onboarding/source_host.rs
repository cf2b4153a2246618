//! The host that a tenant moves away from.

use super::{
    carried_roles::recorded_locks,
    names::{ident, literal, shell_word},
    operation::{Operation, Passwords, TenantLock},
    reown,
    roles::{self, Roles},
};
use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        host_connection::{HostAdmin, HostSession},
        tenants::missing,
    },
    secrets::seal::SecretLocation,
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
    /// The operator chose its role (`tenant adopt --username`), which keeps its name.
    pub role_given: bool,
    /// Of the tenant's own role.
    sealed_password: Option<Vec<u8>>,
    /// pglobby did not make the tenant's role on this host.
    foreign_role: bool,
    /// Its roles may not log in.
    pub suspended: bool,
    /// Options for `CREATE DATABASE`.
    locale: String,
}

/// Settings of the database and of the tenant's roles in it, with the role that they act as everywhere; all of a role that
/// the operator chose (`$4`).
const SETTINGS: &str = r"
SELECT CASE WHEN r.rolname IS NULL THEN '' ELSE r.rolname::text END, split_part(s.setting, '=', 1),
       substr(s.setting, strpos(s.setting, '=') + 1), c.setdatabase <> 0
FROM pg_db_role_setting c LEFT JOIN pg_database d ON d.oid = c.setdatabase
LEFT JOIN pg_roles r ON r.oid = c.setrole, unnest(c.setconfig) AS s (setting)
WHERE (d.datname = $1 AND (c.setrole = 0 OR r.rolname IN ($2, $3)))
   OR (c.setdatabase = 0 AND (($4 AND r.rolname = $2) OR (r.rolname IN ($2, $3) AND s.setting LIKE 'role=%')))";

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
        let sql = "SELECT id, status, host, database, username, ro_username, adopted, role_given,
                          sealed_password FROM pglobby.tenants
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
        let (role_given, role): (bool, String) = (row.get("role_given"), row.get("username"));
        let foreign_role = role_given && !roles::ours(&session, &role).await?;
        Ok(Self {
            tenant_id: row.get("id"),
            oid: found.get(0),
            role_given,
            sealed_password: row.get("sealed_password"),
            foreign_role,
            roles: Roles {
                read_write: role,
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
        carried: &[&str],
    ) -> Result<(), AdminError> {
        if self.adopted {
            self.refuse_foreign(&lock.name, carried).await?;
        }
        for role in [&self.roles.read_write, &self.roles.read_only] {
            let chosen = self.role_given && *role == self.roles.read_write;
            if !role.is_empty() && !chosen && !roles::ours(&self.session, role).await? {
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

    /// Refuses an adopted database with objects of other owners than the tenant's role and the `carried` ones.
    async fn refuse_foreign(&self, name: &str, carried: &[&str]) -> Result<(), AdminError> {
        let inside = self.admin.connect_to(&self.database).await?;
        let mut owners = reown::foreign(&inside, &self.roles.read_write).await?;
        owners.retain(|object| !carried.contains(&object.owner.as_str()));
        let Some(object) = owners.first() else { return Ok(()) };
        Err(AdminError::Refused(format!(
            "tenant {name:?} was adopted, and role {:?}, which the tenant's role does not act as, owns one of {} objects that would \
             become the tenant's; pglobby tenant drop {} (the database stays), adopt it again with --ownership transfer, and move it then",
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
    pub async fn sessions(&self, operation: &Operation) -> Result<i64, AdminError> {
        let sql = "SELECT (SELECT count(*) FROM pg_catalog.pg_stat_activity
                           WHERE usename = ANY ($1) OR (usename = ANY ($3) AND datname = $2))
                     + (SELECT count(*) FROM pg_catalog.pg_prepared_xacts WHERE database = $2)";
        let roles = vec![&self.roles.read_write, &self.roles.read_only];
        let locked = recorded_locks(operation);
        let rows = self
            .session
            .query("counting the tenant's sessions", sql, &[&roles, &self.database, &locked])
            .await?;
        Ok(rows.first().map_or(0, |row| row.get(0)))
    }

    /// Statements that keep the tenant's roles out, and owners that may log in.
    pub fn keep_out(&self, operation: &Operation) -> String {
        let locked = recorded_locks(operation);
        self.own_roles().chain(locked).map(|role| format!("ALTER ROLE {} NOLOGIN;\n", ident(role))).collect()
    }

    /// Statements that let them in again; not the tenant's roles if it is suspended.
    pub fn let_in(&self, operation: &Operation) -> String {
        let own = if self.suspended { "NOLOGIN" } else { "LOGIN" };
        let own = self.own_roles().map(|role| (role, own));
        let locked = recorded_locks(operation).into_iter().map(|role| (role, "LOGIN"));
        own.chain(locked).map(|(role, login)| format!("ALTER ROLE {} {login};\n", ident(role))).collect()
    }

    /// Those of the tenant's roles that pglobby made.
    fn own_roles(&self) -> impl Iterator<Item = &str> {
        let read_write = Some(self.roles.read_write.as_str()).filter(|_| !self.foreign_role);
        read_write.into_iter().chain(Some(self.roles.read_only.as_str()).filter(|role| !role.is_empty()))
    }

    /// The name on the new host of one of the tenant's roles; any other name stays.
    pub fn on_new_host<'a>(&self, role: &'a str, new: &'a Roles) -> &'a str {
        match role {
            role if role == self.roles.read_write => &new.read_write,
            role if role == self.roles.read_only => &new.read_only,
            role => role,
        }
    }

    /// Passwords for the roles on the new host. A role that the operator chose keeps its own.
    pub fn passwords(&self, actor: &Actor) -> Result<Passwords, AdminError> {
        let mut passwords = Passwords::generate();
        if let (true, Some(sealed)) = (self.role_given, &self.sealed_password) {
            let row = self.tenant_id.to_string();
            let place = SecretLocation { table: "tenants", row: &row, column: "sealed_password" };
            passwords.read_write = actor.keyring.open(&place, sealed)?;
        }
        Ok(passwords)
    }

    /// Settings of the database and its roles, for the roles on the new host.
    /// Roles that they act as must be among the `carried` ones.
    pub async fn settings(&self, new: &Roles, carried: &[&str]) -> Result<Vec<String>, AdminError> {
        let rows = self
            .session
            .query(
                "looking at the database's settings",
                SETTINGS,
                &[&self.database, &self.roles.read_write, &self.roles.read_only, &self.role_given],
            )
            .await?;
        let statement = |row: &tokio_postgres::Row| {
            let (role, key, value): (String, String, String) = (row.get(0), row.get(1), row.get(2));
            if key == "role" && !role.is_empty() && !carried.contains(&value.as_str()) {
                return None; // It is no member of that role, so the setting does nothing.
            }
            let database = ident(&self.database);
            let target = match (role.is_empty(), row.get(3)) {
                (true, _) => format!("DATABASE {database}"),
                (false, true) => {
                    format!("ROLE {} IN DATABASE {database}", ident(self.on_new_host(&role, new)))
                }
                (false, false) => format!("ROLE {}", ident(self.on_new_host(&role, new))),
            };
            let is_list = LISTS.split_whitespace().any(|name| name == key);
            let value = if is_list { list(&value) } else { literal(&value) };
            let key: Vec<String> = key.split('.').map(ident).collect();
            Some(format!("ALTER {target} SET {} TO {value}", key.join(".")))
        };
        Ok(rows.iter().filter_map(statement).collect())
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
