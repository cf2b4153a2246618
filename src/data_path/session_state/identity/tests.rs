//! SQL spellings that change roles or the database, and the decision for each.

use super::*;
use crate::data_path::tenant::LoginKind;

fn identity(access: Access) -> Identity {
    let kind = LoginKind::Employee { tenant_id: 7, tenant_name: "acme".into(), access };
    let tenant = Tenant::for_tests(7, "acme").into();
    Identity {
        login: Some(Login::for_tests("Alice", kind).into()),
        tenant_access: Some(TenantAccess { tenant, access }.into()),
    }
}

/// Returns `-` if the text goes to the server, the new password, or the error.
fn decided(access: Access, sql: &str) -> String {
    match identity(access).decide(sql.as_bytes(), Lexing::default()) {
        None => "-".into(),
        Some(IdentityDecision::Password(password)) => format!("password {}", password.expose()),
        Some(IdentityDecision::Refused(why)) => format!("{why:?}"),
    }
}

#[test]
fn every_spelling_of_an_own_password_change_applies_to_the_login() {
    for sql in [
        "ALTER ROLE CURRENT_USER PASSWORD 'new'",
        "alter user current_role with password 'new';",
        "ALTER USER session_user ENCRYPTED PASSWORD 'new' ;",
        "ALTER ROLE acme_rw WITH ENCRYPTED PASSWORD E'n\\x65w'",
        "/* who */ ALTER /* me */ USER \"acme_rw\" -- now\n PASSWORD $$new$$",
        "ALTER USER U&\"acme\\005frw\" PASSWORD 'n'\n'ew'",
        "ALTER ROLE \"Alice\" PASSWORD 'new'",
        "ALTER ROLE ACME_RW PASSWORD 'new'",
    ] {
        assert_eq!(decided(Access::ReadWrite, sql), "password new", "{sql}");
    }
    assert_eq!(decided(Access::ReadOnly, "ALTER USER acme_ro PASSWORD 'new'"), "password new");
}

#[test]
fn an_invalid_password_is_rejected() {
    for (sql, why) in [
        ("ALTER ROLE CURRENT_USER PASSWORD NULL", "PasswordMissing"),
        ("ALTER ROLE CURRENT_USER PASSWORD ''", "PasswordMissing"),
        ("ALTER ROLE CURRENT_USER PASSWORD 'md5d41d8cd98f00b204e9800998ecf8427e'", "PasswordMd5"),
        ("ALTER ROLE CURRENT_USER PASSWORD U&'n\\0065w'", "PasswordUnclear"),
        ("ALTER ROLE CURRENT_USER PASSWORD U&'n!0065w' UESCAPE '!'", "PasswordUnclear"),
        ("SELECT 1; ALTER ROLE CURRENT_USER PASSWORD 'new'", "PasswordNotAlone"),
        (
            "ALTER ROLE CURRENT_USER PASSWORD 'new'; ALTER ROLE CURRENT_USER PASSWORD 'new'",
            "PasswordNotAlone",
        ),
        ("ALTER ROLE CURRENT_USER PASSWORD 'new'; COMMIT", "PasswordNotAlone"),
    ] {
        assert_eq!(decided(Access::ReadWrite, sql), why, "{sql}");
    }
    let long = format!("ALTER ROLE CURRENT_USER PASSWORD '{}'", "x".repeat(1025));
    assert_eq!(decided(Access::ReadWrite, &long), "PasswordTooLong");
    assert_eq!(decided(Access::ReadWrite, "ALTER ROLE acme_ro PASSWORD 'new'"), "Role");
    assert_eq!(decided(Access::ReadOnly, "ALTER ROLE acme_rw PASSWORD 'new'"), "Role");
    assert_eq!(decided(Access::ReadWrite, "ALTER ROLE bob PASSWORD 'new'"), "-");
    assert_eq!(decided(Access::ReadWrite, "ALTER ROLE Alice PASSWORD 'new'"), "-", "folded, it is alice");
}

#[test]
fn changes_of_the_tenants_roles_and_database_are_rejected_anywhere_in_a_text() {
    for (sql, why) in [
        ("ALTER ROLE acme_rw SET statement_timeout = 1", "Role"),
        ("ALTER ROLE CURRENT_USER SET local_preload_libraries = 'nosuch'", "Role"),
        ("ALTER ROLE acme_ro RESET ALL", "Role"),
        ("ALTER ROLE \"acme_ro\" IN DATABASE acme SET search_path = x", "Role"),
        ("ALTER USER acme_rw RENAME TO acme", "Role"),
        ("ALTER USER acme_rw NOLOGIN", "Role"),
        ("ALTER USER acme_rw CONNECTION LIMIT 0 PASSWORD 'x'", "Role"),
        ("ALTER USER acme_rw PASSWORD 'x' VALID UNTIL 'yesterday'", "Role"),
        ("ALTER USER U&\"acme!005frw\" UESCAPE '!' NOLOGIN", "Role"),
        ("ALTER GROUP acme_rw ADD USER bob", "Role"),
        ("ALTER GROUP bobs ADD USER CURRENT_USER", "Role"),
        ("DROP ROLE IF EXISTS bob, acme_ro", "Role"),
        ("DROP USER acme_rw", "Role"),
        ("SELECT 1; SELECT ';'; drop user \"acme_rw\"; SELECT 2", "Role"),
        ("GRANT acme_rw TO bob", "Membership"),
        ("GRANT pg_write_all_data TO acme_ro WITH ADMIN OPTION", "Membership"),
        ("REVOKE ADMIN OPTION FOR acme_rw FROM bob", "Membership"),
        ("REASSIGN OWNED BY acme_rw TO bob", "Owned"),
        ("DROP OWNED BY bob, CURRENT_USER CASCADE", "Owned"),
        ("ALTER DATABASE acme CONNECTION LIMIT 0", "Database"),
        ("ALTER DATABASE acme WITH ALLOW_CONNECTIONS false", "Database"),
        ("ALTER DATABASE \"acme\" RENAME TO other", "Database"),
        ("ALTER DATABASE acme OWNER TO bob", "Database"),
        ("ALTER DATABASE acme SET TABLESPACE other", "Database"),
        ("DROP DATABASE IF EXISTS acme WITH (FORCE)", "Database"),
        ("ALTER DATABASE acme SET role = acme_ro", "DatabaseSetting"),
        ("ALTER DATABASE acme SET ROLE acme_ro", "DatabaseSetting"),
        ("ALTER DATABASE acme SET SESSION AUTHORIZATION bob", "DatabaseSetting"),
        ("ALTER DATABASE acme SET \"Local_Preload_Libraries\" TO nosuch, other", "DatabaseSetting"),
        ("ALTER ROLE ALL IN DATABASE acme SET session_preload_libraries FROM CURRENT", "DatabaseSetting"),
        ("REVOKE CONNECT ON DATABASE acme FROM acme_ro", "DatabaseAccess"),
        ("GRANT CREATE, TEMP ON DATABASE other, acme TO PUBLIC", "DatabaseAccess"),
        ("GRANT ALL PRIVILEGES ON DATABASE acme TO acme_ro", "DatabaseAccess"),
    ] {
        assert_eq!(decided(Access::ReadWrite, sql), why, "{sql}");
        assert_eq!(decided(Access::ReadOnly, sql), why, "{sql}");
    }
}

#[test]
fn other_changes_by_the_owner_go_to_the_server() {
    for sql in [
        "ALTER DATABASE acme SET work_mem = '5MB'",
        "ALTER DATABASE acme RESET ALL",
        "ALTER DATABASE acme SET TIME ZONE 'UTC'",
        "ALTER DATABASE acme REFRESH COLLATION VERSION",
        "ALTER DATABASE other RENAME TO acme",
        "ALTER ROLE bob NOLOGIN",
        "ALTER USER MAPPING FOR acme_rw SERVER s OPTIONS (SET password 'x')",
        "DROP USER MAPPING FOR CURRENT_USER SERVER s",
        "ALTER GROUP bobs ADD USER bob",
        "ALTER ROLE ALL RESET ALL",
        "GRANT SELECT ON acme TO acme_ro",
        "GRANT SELECT (a, b), UPDATE (c) ON TABLE t TO acme_ro",
        "REVOKE ALL ON SCHEMA s FROM PUBLIC",
        "REVOKE ALL ON DATABASE acme FROM PUBLIC",
        "GRANT ALL ON DATABASE acme TO CURRENT_USER",
        "GRANT bobs TO bob",
        "REASSIGN OWNED BY bob TO acme_rw",
        "ALTER TABLE t OWNER TO acme_rw",
        "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO acme_ro",
        "COMMENT ON ROLE acme_rw IS 'x'",
        "SELECT 'ALTER ROLE acme_rw NOLOGIN'; SELECT $$DROP OWNED BY acme_rw$$",
        "-- ALTER ROLE acme_rw NOLOGIN\nDELETE FROM t",
    ] {
        assert_eq!(decided(Access::ReadWrite, sql), "-", "{sql}");
    }
}
