//! Hints, and where an authenticated login may go.

use std::time::Duration;

use super::*;
use crate::data_path::tenant::Grant;

fn hints(option: &str, database: &str, user: &str, server_name: &str) -> Hints {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Hints {
        option: some(option),
        database: some(database),
        user: user.into(),
        server_name: some(server_name),
        is_maintenance: database == "postgres",
    }
}

fn tenant(hints: &Hints, split: bool) -> Result<Option<String>, ClientError> {
    hints.tenant(split, |name| name == "acme" || name == "globex")
}

#[test]
fn the_first_hint_that_speaks_names_the_tenant() {
    let of = |option, database, user, server_name, split| {
        tenant(&hints(option, database, user, server_name), split).map(Option::unwrap_or_default)
    };
    for (option, database, user, server_name, split, expected) in [
        ("acme", "", "alice", "", false, "acme"),
        ("", "acme", "alice", "", false, "acme"),
        ("", "", "alice@acme", "", true, "acme"),
        ("", "", "alice", "acme", false, "acme"),
        ("", "", "alice", "", false, ""),
        ("acme", "acme", "alice@acme", "acme", true, "acme"),
        // A database equal to the user name says nothing, unless it is a tenant.
        ("acme", "alice", "alice", "", false, "acme"),
        ("", "acme", "acme", "", false, "acme"),
        ("", "alice@acme", "alice@acme", "", true, "acme"),
        // An email address is a login, and no hint.
        ("", "acme", "bob@globex", "", false, "acme"),
    ] {
        assert_eq!(of(option, database, user, server_name, split), Ok(expected.to_owned()), "{user}");
    }
    assert_eq!(of("globex", "acme", "acme", "", false).unwrap_err().sqlstate(), "28000");
    assert!(of("", "acme", "bob@globex", "", true).is_err());
}

#[test]
fn hints_that_contradict_each_other_are_refused() {
    for hints in [
        hints("acme", "globex", "alice", ""),
        hints("", "acme", "alice", "globex"),
        hints("", "nowhere", "alice", "acme"),
    ] {
        assert!(matches!(tenant(&hints, false), Err(ClientError::ContradictingTenants { .. })), "{hints:?}");
    }
}

#[test]
fn a_server_name_counts_under_a_suffix_of_ours_only() {
    let suffixes = ["db.example.com".to_owned()];
    let of = |name: &str| Hints::tenant_of_server_name(name, &suffixes);
    assert_eq!(of("acme.db.example.com").as_deref(), Some("acme"));
    assert_eq!(of("acme.DB.example.com").as_deref(), Some("acme"));
    for name in ["db.example.com", "a.b.db.example.com", "acme.example.com", ".db.example.com", "acme"] {
        assert_eq!(of(name), None, "{name}");
    }
}

#[test]
fn a_user_name_is_split_at_its_last_at() {
    assert_eq!(hints("", "", "bob@mail.example@acme", "").split_user(), Some(("bob@mail.example", "acme")));
    assert_eq!(hints("", "", "@acme", "").split_user(), None);
    assert_eq!(hints("", "", "bob@", "").split_user(), None);
}

fn net(text: &str) -> ipnet::IpNet {
    text.parse().unwrap()
}

fn login(kind: LoginKind) -> Login {
    Login::for_tests("alice", kind)
}

fn employee() -> LoginKind {
    LoginKind::Employee { tenant_id: 1, tenant_name: "acme".to_owned(), access: Access::ReadWrite }
}

fn service(all_tenants: Option<Access>, granted: &[i64]) -> LoginKind {
    let grant = |id: &i64| Grant { tenant_id: *id, access: Access::ReadOnly, living: true };
    LoginKind::Service { all_tenants, granted: granted.iter().map(grant).collect() }
}

/// Judges `login` at a directory with the tenants acme (1) and globex (2), and what `change` makes of acme.
/// The answer in one word: a tenant and its access, the console, no tenant, or the logged reason.
fn routed(login: &Login, hints: &Hints, peer: Option<&str>, change: impl Fn(&mut Tenant)) -> String {
    let mut acme = Tenant::for_tests(1, "acme");
    change(&mut acme);
    let (acme, globex) = (Arc::new(acme), Arc::new(Tenant::for_tests(2, "globex")));
    let known = |name: &&str| {
        let known = match *name {
            "acme" => NameLookup::Tenant(acme.clone()),
            "globex" => NameLookup::Tenant(globex.clone()),
            "silence" => NameLookup::Unavailable,
            _ => NameLookup::NotFound,
        };
        ((*name).to_owned(), known)
    };
    let tenants: Vec<_> = hints.names().iter().map(known).collect();
    let request = RouteRequest {
        login,
        hints,
        split: false,
        tenants: &tenants,
        peer: peer.map(|peer| peer.parse().unwrap()),
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(1000),
        admin_allow_from: &[net("127.0.0.0/8")],
    };
    let route = request.target().and_then(|target| match target {
        Target::Console { read_only } => Ok(Route::Console { read_only }),
        Target::NoTenant => Ok(Route::NoTenant),
        Target::Tenant(tenant) => request.enter(Some(tenant)),
        Target::OnlyTenant(id) => request.enter([&acme, &globex].into_iter().find(|it| it.id == id).cloned()),
    });
    match route {
        Ok(Route::Tenant { tenant, access }) => format!("{} {access:?}", tenant.name),
        Ok(Route::NoTenant) => "no tenant".to_owned(),
        Ok(Route::Console { read_only }) => format!("console, read only: {read_only}"),
        Err(LoginError::Hidden(reason)) => format!("refused: {reason:?}"),
        Err(LoginError::NoDatabase { reason, database }) => format!("no {database}: {reason:?}"),
        Err(LoginError::Shown(error)) => error.sqlstate().to_owned(),
    }
}

#[test]
fn a_login_goes_where_it_belongs_and_nowhere_else() {
    let at = |database: &str| hints("", database, "alice", "");
    for (kind, database, expected) in [
        (employee(), "acme", "acme ReadWrite"),
        (employee(), "", "acme ReadWrite"),
        (employee(), "alice", "acme ReadWrite"),
        (employee(), "globex", "no globex: NotGranted"),
        (employee(), "nowhere", "no nowhere: UnknownTenant"),
        (employee(), "postgres", "acme ReadWrite"),
        (employee(), "silence", "57P03"),
        (employee(), "pglobby", "no pglobby: Console"),
        (service(None, &[2]), "globex", "globex ReadOnly"),
        (service(None, &[2]), "", "globex ReadOnly"),
        (service(None, &[2]), "acme", "no acme: NotGranted"),
        (service(None, &[2]), "postgres", "globex ReadOnly"),
        (service(None, &[1, 2]), "", "no tenant"),
        (service(None, &[1, 2]), "alice", "no tenant"),
        (service(None, &[2]), "pglobby", "no tenant"),
        (service(None, &[]), "", "no tenant"),
        (service(Some(Access::ReadWrite), &[]), "acme", "acme ReadWrite"),
        (service(Some(Access::ReadWrite), &[2]), "globex", "globex ReadOnly"),
        (service(Some(Access::ReadWrite), &[2]), "", "no tenant"),
        (service(Some(Access::ReadWrite), &[]), "pgbouncer", "no pgbouncer: Console"),
        (LoginKind::Admin { read_only: true }, "pgbouncer", "console, read only: true"),
        (LoginKind::Admin { read_only: false }, "pglobby", "console, read only: false"),
        (LoginKind::Admin { read_only: false }, "acme", "no acme: Console"),
        (LoginKind::Admin { read_only: false }, "", "no alice: Console"),
    ] {
        let login = login(kind);
        let routed = routed(&login, &at(database), Some("127.0.0.1"), |_| {});
        assert_eq!(routed, expected, "{:?} at {database:?}", login.kind);
    }
}

#[test]
fn while_the_directory_is_silent_an_employee_still_has_its_only_tenant() {
    // Its driver sent the user name as the database, and the directory does not say whether that is a tenant.
    let silent = hints("", "silence", "silence", "");
    let routed = |kind| routed(&login(kind), &silent, None, |_| {});
    assert_eq!(routed(employee()), "acme ReadWrite");
    assert_eq!(routed(service(None, &[2])), "57P03");
}

#[test]
fn every_reason_to_refuse_a_login_comes_before_what_only_a_good_one_may_know() {
    let contradiction = hints("globex", "acme", "alice", "");
    let bad = [
        ("refused: Disabled", Login { disabled: true, ..login(employee()) }),
        (
            "refused: Expired",
            Login {
                valid_until: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1000)),
                ..login(employee())
            },
        ),
        ("refused: Address", Login { allow_from: vec![net("10.0.0.0/8")], ..login(employee()) }),
    ];
    for (expected, login) in &bad {
        assert_eq!(routed(login, &contradiction, Some("127.0.0.1"), |_| {}), *expected);
    }
    let stays = Login {
        valid_until: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1001)),
        allow_from: vec![net("10.0.0.0/8")],
        ..login(employee())
    };
    assert_eq!(routed(&stays, &contradiction, Some("10.1.2.3"), |_| {}), "28000");
    // The tenant's own list comes before its state.
    let suspended = |tenant: &mut Tenant| {
        tenant.status = TenantStatus::Suspended;
        tenant.allow_from = vec![net("10.0.0.0/8")];
    };
    let here = hints("", "acme", "alice", "");
    assert_eq!(routed(&login(employee()), &here, Some("127.0.0.1"), suspended), "refused: Address");
    assert_eq!(routed(&login(employee()), &here, Some("10.1.2.3"), suspended), "57P03");
    assert_eq!(
        routed(&login(service(None, &[2])), &here, Some("10.1.2.3"), suspended),
        "no acme: NotGranted"
    );
}

#[test]
fn an_administrator_comes_from_this_machine_unless_others_are_named() {
    let admin = login(LoginKind::Admin { read_only: false });
    let console = hints("", "pglobby", "alice", "");
    for (peer, expected) in [
        (Some("127.0.0.1"), "console, read only: false"),
        (Some("192.0.2.1"), "refused: Address"),
        (None, "console, read only: false"),
    ] {
        assert_eq!(routed(&admin, &console, peer, |_| {}), expected, "{peer:?}");
    }
}

#[test]
fn a_closed_tenant_says_why_to_those_who_belong_to_it() {
    let here = hints("", "acme", "alice", "");
    for (status, sqlstate) in [
        (TenantStatus::Suspended, "57P03"),
        (TenantStatus::Provisioning, "57P03"),
        (TenantStatus::Dropping, "3D000"),
        (TenantStatus::Dropped, "3D000"),
    ] {
        assert_eq!(routed(&login(employee()), &here, None, |tenant| tenant.status = status), sqlstate);
    }
}
