//! The manifests of `deploy/kubernetes/`: valid by Kubernetes' own schemas, fitting each other, and fitting the program.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

#[path = "kubernetes/agreement.rs"]
mod agreement;
#[path = "kubernetes/manifests.rs"]
mod manifests;
mod support;

use std::{fs, process::Command};

use agreement::problems;
use manifests::{Manifests, folder, text};
use pglobby::{config::Config, control_path::secrets::keyring::Keyring};
use serde_json::{Value, json};
use support::{Proxy, certificates::Authority};

const NONE: [&str; 0] = [];

#[test]
fn every_manifest_is_valid_and_fits_the_others_and_the_program() {
    let manifests = Manifests::read(&folder()).unwrap();
    assert_eq!(problems(&manifests), NONE);
}

/// A test that never fails proves nothing: each of these is a mistake that somebody makes.
#[test]
fn a_mistake_in_a_manifest_is_found() {
    let manifests = Manifests::read(&folder()).unwrap();
    let container = "/spec/template/spec/containers/0";
    for (kind, place, value) in [
        ("ConfigMap", "/data/proxy.toml", json!("listen_prot = 6432\n[central]\nurl = \"postgres://m@h/c\"")),
        ("ConfigMap", "/metadata/name", json!("proxy")),
        ("Service", "/spec/ports/0/targetPort", json!("postgresql")),
        ("Service", "/spec/selector", json!({ "app.kubernetes.io/name": "pglobby" })),
        ("PodDisruptionBudget", "/spec/selector/matchLabels", json!({ "app": "pglobby" })),
        ("HorizontalPodAutoscaler", "/spec/scaleTargetRef/name", json!("proxy")),
        ("NetworkPolicy", "/spec/ingress/0/ports/0/port", json!("sql")),
        ("ServiceAccount", "/metadata/name", json!("default")),
        ("Namespace", "/metadata/labels/pod-security.kubernetes.io~1enforce", json!("privileged")),
        ("Job", "/metadata/name", json!("init")),
        ("Deployment", "/spec/template/spec/terminationGracePeriodSeconds", json!(30)),
        ("Deployment", "/spec/template/spec/volumes/1/secret/secretName", json!("keys")),
        ("Deployment", "/spec/template/spec/volumes/1/secret/defaultMode", json!(0o444)),
        ("Deployment", "/spec/template/metadata/labels/app.kubernetes.io~1component", json!("proxy")),
        ("Deployment", &format!("{container}/ports/1/containerPort"), json!(8080)),
        ("Deployment", &format!("{container}/readinessProbe/httpGet/port"), json!("metrics")),
        ("Deployment", &format!("{container}/env/1/valueFrom/secretKeyRef/key"), json!("pass")),
        ("Deployment", &format!("{container}/env/2/name"), json!("PGLOBBY_NODE_NAMES")),
        ("Deployment", &format!("{container}/volumeMounts/1/mountPath"), json!("/key")),
        ("Deployment", &format!("{container}/startupProbe/failureThreshold"), json!(10)),
        ("Deployment", &format!("{container}/livenessProbe/httpGet/path"), json!("/readyz")),
        ("Deployment", &format!("{container}/volumeMounts/1/readOnly"), json!(false)),
        ("Deployment", &format!("{container}/securityContext/readOnlyRootFilesystem"), json!(false)),
        ("Deployment", &format!("{container}/image"), json!("pglobby:latest")),
        ("Job", &format!("{container}/args/0"), json!("initialise")),
    ] {
        let mut changed = manifests.clone();
        let old = changed.one_mut(kind).pointer_mut(place).unwrap_or_else(|| panic!("{kind} has no {place}"));
        *old = value;
        assert_ne!(problems(&changed), NONE, "{kind}{place}: not found");
    }
}

#[test]
fn a_field_that_kubernetes_does_not_know_is_found() {
    let place = tempfile::tempdir().unwrap();
    for (file, right, wrong) in [
        ("deployment.yaml", "terminationGracePeriodSeconds", "terminationGracePeriod"),
        ("deployment.yaml", "containerPort: 6432", "containerPort: postgres"),
        ("service.yaml", "kind: Service", "kind: Balancer"),
        ("service.yaml", "  name: pglobby", "  name: pglobby\n  name: pglobby"),
    ] {
        let text = fs::read_to_string(folder().join(file)).unwrap();
        assert!(text.contains(right), "{file}: {right}");
        fs::write(place.path().join("changed.yaml"), text.replace(right, wrong)).unwrap();
        assert!(Manifests::read(place.path()).is_err(), "{file}: {wrong}");
    }
}

/// The keys of `proxy.toml` as tests give them, but for what differs on this machine: ports, files and the central database.
fn portable_keys(proxy_toml: &str) -> Vec<(String, String)> {
    let here =
        ["listen_addr", "listen_port", "http.listen", "central.url", "keys.file", "server_tls_sslmode"];
    let table: toml::Table = proxy_toml.parse().unwrap();
    let mut keys = Vec::new();
    for (name, value) in table {
        match value {
            toml::Value::Table(section) => {
                keys.extend(
                    section.into_iter().map(|(key, value)| (format!("{name}.{key}"), value.to_string())),
                );
            }
            value => keys.push((name, value.to_string())),
        }
    }
    keys.retain(|(key, _)| !here.contains(&&**key) && !key.ends_with("_file"));
    assert!(keys.len() >= 5, "{keys:?}");
    keys
}

#[tokio::test]
async fn a_node_with_this_configuration_serves_and_answers_its_probes() {
    let manifests = Manifests::read(&folder()).unwrap();
    let certificates = tempfile::tempdir().unwrap();
    Authority::new().write_server_files(certificates.path(), &["localhost"]);
    let file = |name: &str| format!("{:?}", certificates.path().join(name));
    let mut proxy = Proxy::with_tenant("acme")
        .config("client_tls_cert_file", &file("server.crt"))
        .config("client_tls_key_file", &file("server.key"));
    for (key, value) in portable_keys(manifests.proxy_toml()) {
        proxy = proxy.config(&key, &value);
    }
    for (name, value) in manifests.node().literals() {
        if name != "PGLOBBY_CONFIG" {
            proxy = proxy.environment(name, &value.replace("$(POD_IP)", "10.1.2.3"));
        }
    }
    let proxy = proxy.environment("PGLOBBY_NODE_NAME", "pglobby-5d9c7b9f6d-x7q2p").start().await;
    let node = manifests.node();
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let path = text(&node.container[probe]["httpGet"]["path"]);
        assert_eq!(proxy.http_get(path).await.0, 200, "{probe}");
    }
    let metrics = text(&node.template["metadata"]["annotations"]["prometheus.io/path"]);
    assert!(proxy.http_get(metrics).await.1.contains("pglobby_clients"), "{metrics}");
    // The node asks for TLS, and its log is JSON.
    assert_eq!(proxy.client("acme").refusal().await, "28000");
    let log = proxy.log();
    assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
}

/// README.md makes the ring without pglobby, because nothing in a pod can write a Secret.
#[test]
fn the_key_ring_that_the_readme_makes_is_one() {
    let readme = fs::read_to_string(folder().join("README.md")).unwrap();
    let command = readme.lines().find(|line| line.starts_with("printf 'writing")).unwrap();
    let place = tempfile::tempdir().unwrap();
    let mut shell = Command::new("sh");
    let made =
        shell.args(["-c", &format!("umask 077; {command}")]).current_dir(place.path()).status().unwrap();
    assert!(made.success());
    let text = "[central]\nurl = \"postgres://m@h/c\"\n[keys]\nfile = \"keyring.toml\"\n";
    let config = Config::read(text, Some(&place.path().join("proxy.toml")), &|_| None).unwrap();
    assert_eq!(Keyring::load(&config).unwrap().writing_key(), "k1");
}
