//! `pglobby api-key`, and what recognises the keys it makes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use pglobby::control_path::admin::api_keys::{self, Role};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use support::{admin::Admin, installation::Installation};

#[tokio::test]
async fn a_key_is_recognised_until_it_is_revoked_or_expires() {
    let admin = Admin::new().await;
    let central = admin.superuser("central").await;
    let (made, key) = api_keys::create(&admin.actor, "deploy", Role::Operator, None).await.unwrap();
    let (_, other) = api_keys::create(&admin.actor, "watch", Role::Viewer, None).await.unwrap();
    assert_ne!(key.expose_secret(), other.expose_secret());
    let recognise = async |key: &SecretString| {
        api_keys::authenticate(&**admin.actor.central.client().await.unwrap(), key).await.unwrap()
    };

    assert_eq!(recognise(&key).await, Some(made));
    assert_eq!(recognise(&other).await.unwrap().role, Role::Viewer);
    let text = key.expose_secret();
    let mut last = text.to_owned();
    let flipped = if last.pop() == Some('A') { 'E' } else { 'A' };
    for wrong in
        ["", "pglobby_", &text[1..], &format!("{text}x"), &format!("{last}{flipped}"), "%", &"x".repeat(51)]
    {
        assert_eq!(recognise(&SecretString::from(wrong.to_owned())).await, None, "{wrong}");
    }

    central.run("UPDATE pglobby.api_keys SET expires_at = now() WHERE name = 'watch'").await;
    assert_eq!(recognise(&other).await, None);
    api_keys::revoke(&admin.actor, "deploy").await.unwrap();
    assert_eq!(recognise(&key).await, None);
    let stored = central.ask("SELECT string_agg(k::text, ' ') FROM pglobby.api_keys k").await;
    assert!(!stored.contains(text));
}

#[tokio::test]
async fn keys_by_commands() {
    let installation = Installation::initialised().await;
    let json_of = |arguments: &[&str]| -> Value {
        let output = installation.run(arguments);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };

    let made =
        json_of(&["api-key", "create", "deploy", "--role", "admin", "--expires", "2090-01-31", "--json"]);

    assert_eq!((&made["name"], &made["role"]), (&json!("deploy"), &json!("admin")));
    assert_eq!(made["expires_at"], "2090-01-31T00:00:00Z");
    assert!(made["key"].as_str().unwrap().starts_with("pglobby_"));
    let revoked = json_of(&["api-key", "revoke", "deploy", "--json"]);
    assert!(revoked["revoked_at"].is_string());
    assert_eq!(json_of(&["api-key", "revoke", "deploy", "--json"]), revoked, "since the first time");
    let listed = json_of(&["api-key", "list", "--json"]);
    assert_eq!(listed, json!([revoked]));
    assert!(listed[0].get("key").is_none());
    for (arguments, says) in [
        (&["api-key", "create", "deploy", "--role", "viewer"][..], "already"),
        (&["api-key", "create", "late", "--role", "viewer", "--expires", "2020-01-01"], "is in the past"),
        (&["api-key", "create", "", "--role", "viewer"], "needs a name"),
        (&["api-key", "revoke", "deplyo"], "did you mean \"deploy\"?"),
    ] {
        let refused = installation.run(arguments);
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains(says), "{refused:?}");
    }
    assert_eq!(installation.run(&["api-key", "create", "x", "--role", "god"]).status.code(), Some(2));
}
