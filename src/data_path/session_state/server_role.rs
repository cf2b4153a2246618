//! The role that a server runs as: what it starts as, and what it may read of PostgreSQL's own catalogs. Pure.

use super::parameter_status::ReportedParameters;

bitflags::bitflags! {
    /// Tables and functions of PostgreSQL that the host hides from the role, as some hosts do so that tenants
    /// do not see each other. The proxy asks in another way there, or assumes that what it cannot see exists.
    /// It never needs a view whose function it may call (`pg_settings` is `pg_show_all_settings()`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct HiddenCatalogs: u16 {
        /// `pg_show_all_settings`.
        const SETTINGS = 1;
        /// `pg_roles`, `pg_has_role`.
        const ROLES = 1 << 1;
        /// `pg_lock_status`.
        const LOCKS = 1 << 2;
        /// `pg_cursor`.
        const CURSORS = 1 << 3;
        /// `pg_prepared_statement`.
        const PREPARED = 1 << 4;
        /// `pg_depend`.
        const DEPENDENCIES = 1 << 5;
        /// `pg_db_role_setting`.
        const ROLE_SETTINGS = 1 << 6;
        /// `pg_database`.
        const DATABASES = 1 << 7;
    }
}

impl HiddenCatalogs {
    /// Each catalog, its name, and a query that fails where it is hidden.
    pub const PROBES: [(Self, &'static str, &'static str); 9] = [
        (Self::SETTINGS, "pg_show_all_settings", "(SELECT FROM pg_catalog.pg_show_all_settings() LIMIT 0)"),
        (Self::ROLES, "pg_roles", "(SELECT FROM pg_catalog.pg_roles LIMIT 0)"),
        (
            Self::ROLES,
            "pg_has_role",
            "(SELECT WHERE pg_catalog.pg_has_role(session_user, session_user, 'MEMBER'))",
        ),
        (Self::LOCKS, "pg_lock_status", "(SELECT FROM pg_catalog.pg_lock_status() LIMIT 0)"),
        (Self::CURSORS, "pg_cursor", "(SELECT FROM pg_catalog.pg_cursor() LIMIT 0)"),
        (Self::PREPARED, "pg_prepared_statement", "(SELECT FROM pg_catalog.pg_prepared_statement() LIMIT 0)"),
        (Self::DEPENDENCIES, "pg_depend", "(SELECT FROM pg_catalog.pg_depend LIMIT 0)"),
        (Self::ROLE_SETTINGS, "pg_db_role_setting", "(SELECT FROM pg_catalog.pg_db_role_setting LIMIT 0)"),
        (Self::DATABASES, "pg_database", "(SELECT FROM pg_catalog.pg_database LIMIT 0)"),
    ];

    /// A query that fails where any of them is hidden.
    pub fn probe_all() -> String {
        Self::PROBES.map(|(_, _, probe)| probe).join(" UNION ALL ")
    }
}

/// The role that a server runs as.
#[derive(Debug, Clone)]
pub struct ServerRole {
    /// `session_authorization` when the server was opened: the login.
    login: Option<Box<[u8]>>,
    /// The parameter `role` of a session that has set nothing: `none`, or that of an `ALTER ROLE … SET role`.
    pub start: Box<str>,
    /// A session that has set nothing is a superuser.
    pub is_superuser: bool,
    /// What it may not read.
    pub hidden: HiddenCatalogs,
}

impl Default for ServerRole {
    fn default() -> Self {
        Self { login: None, start: "none".into(), is_superuser: false, hidden: HiddenCatalogs::default() }
    }
}

impl ServerRole {
    /// From the parameters that the server reported when it was opened.
    pub fn new(reported: &ReportedParameters) -> Self {
        Self {
            login: login_in(reported).map(Into::into),
            is_superuser: reported.text("is_superuser") == Some("on"),
            ..Self::default()
        }
    }

    /// Sets the role that the session began with; `None`: its login.
    pub fn begins_as(&mut self, role: Option<&str>) {
        self.start = role.unwrap_or("none").into();
    }

    /// Whether `session_authorization` is another than at the start.
    pub fn has_other_login(&self, reported: &ReportedParameters) -> bool {
        self.login.as_deref() != login_in(reported)
    }

    /// Whether this catalog is hidden.
    pub fn hides(&self, catalog: HiddenCatalogs) -> bool {
        self.hidden.intersects(catalog)
    }
}

fn login_in(reported: &ReportedParameters) -> Option<&[u8]> {
    reported.find("session_authorization").map(|(_, name)| name)
}
