//! Whether the manifests fit each other and the program. Each check returns what is wrong.

use std::{path::PathBuf, time::Duration};

use clap::Parser as _;
use pglobby::{cli::Cli, config::Config};
use serde_json::Value;

use crate::manifests::{Manifests, Pod, list, secrets, selects, text};

/// The uid of the image.
fn image_user() -> u64 {
    let dockerfile = include_str!("../../docker/Dockerfile");
    let after = dockerfile.split_once("--uid ").unwrap().1;
    after.split(' ').next().unwrap().parse().unwrap()
}

/// What the end of the process may take when sessions have ended.
const END: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn need(&mut self, holds: bool, otherwise: &str) {
        if !holds {
            self.0.push(otherwise.to_owned());
        }
    }
}

/// Everything that does not fit.
pub fn problems(manifests: &Manifests) -> Vec<String> {
    let config = match manifests.config() {
        Ok(config) => config,
        Err(error) => return vec![error],
    };
    let mut found = Problems::default();
    names(&mut found, manifests);
    for (pod, arguments) in [(manifests.node(), "serve"), (manifests.init(), "init")] {
        command(&mut found, pod, arguments);
        rights(&mut found, pod);
        volumes(&mut found, pod);
        environment(&mut found, pod);
    }
    found.need(manifests.node().container["image"] == manifests.init().container["image"], "two images");
    files(&mut found, manifests, &config);
    selectors(&mut found, manifests);
    ports(&mut found, manifests, &config);
    waits(&mut found, manifests, &config);
    sizes(&mut found, manifests, &config);
    found.0
}

fn names(found: &mut Problems, manifests: &Manifests) {
    let namespace = &manifests.one("Namespace")["metadata"]["name"];
    for object in manifests.0.iter().filter(|object| object["kind"] != "Namespace") {
        found.need(&object["metadata"]["namespace"] == namespace, "an object in another namespace");
    }
    let guard = &manifests.one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
    found.need(guard == "restricted", "the cluster lets privileged pods in");
    let readme = include_str!("../../deploy/kubernetes/README.md");
    for (kind, command) in [("Job", "job/"), ("Deployment", "deployment/"), ("Namespace", "kubectl -n ")] {
        let named = format!("{command}{} ", text(&manifests.one(kind)["metadata"]["name"]));
        found.need(
            readme.replace(['\n', '`'], " ").contains(&named),
            &format!("README.md does not say {named}"),
        );
    }
    let account = manifests.one("ServiceAccount");
    found.need(account["automountServiceAccountToken"] == false, "the account has a token");
    for pod in [manifests.node(), manifests.init()] {
        found.need(pod.spec["serviceAccountName"] == account["metadata"]["name"], "another account");
    }
    let (target, node) =
        (&manifests.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"], manifests.one("Deployment"));
    let is_node = target["kind"] == node["kind"]
        && target["apiVersion"] == node["apiVersion"]
        && target["name"] == node["metadata"]["name"];
    found.need(is_node, "the autoscaler scales something else");
    found.need(node["spec"]["replicas"].is_null(), "apply undoes what the autoscaler did");
}

fn command(found: &mut Problems, pod: Pod<'_>, wanted: &str) {
    let arguments: Vec<&str> = list(&pod.container["args"]).iter().map(text).collect();
    found.need(arguments.first() == Some(&wanted), "another command");
    let known = Cli::try_parse_from(["pglobby"].into_iter().chain(arguments));
    found.need(known.is_ok(), "the program does not know the command");
    found.need(pod.container["command"].is_null(), "the image's entry point is replaced");
    let version = text(&pod.container["image"]).rsplit(':').next();
    found.need(version == Some(env!("CARGO_PKG_VERSION")), "the image has another version");
}

fn rights(found: &mut Problems, pod: Pod<'_>) {
    let (of_pod, of_container) = (&pod.spec["securityContext"], &pod.container["securityContext"]);
    for (holds, otherwise) in [
        (pod.spec["automountServiceAccountToken"] == false, "the pod has a token"),
        (pod.spec["enableServiceLinks"] == false, "variables of Services"),
        (of_pod["runAsNonRoot"] == true, "may be root"),
        (of_pod["runAsUser"] == image_user(), "another user than the image's"),
        (of_pod["fsGroup"] == of_pod["runAsGroup"] && of_pod["fsGroup"].is_u64(), "cannot read secrets"),
        (of_pod["seccompProfile"]["type"] == "RuntimeDefault", "all system calls"),
        (of_container["allowPrivilegeEscalation"] == false, "may gain privileges"),
        (of_container["readOnlyRootFilesystem"] == true, "may write files"),
        (of_container["capabilities"]["drop"][0] == "ALL", "capabilities"),
        (of_container["privileged"].is_null() && of_pod["hostNetwork"].is_null(), "privileges"),
        (pod.container["resources"]["requests"]["cpu"].is_string(), "no CPU requested"),
        (pod.container["resources"]["requests"]["memory"].is_string(), "no memory requested"),
        (pod.container["resources"]["limits"]["memory"].is_string(), "no limit of memory"),
        (list(&pod.spec["containers"]).len() == 1, "a second container"),
    ] {
        found.need(holds, otherwise);
    }
}

fn volumes(found: &mut Problems, pod: Pod<'_>) {
    let names = |place: &Value| {
        let mut names: Vec<String> = list(place).iter().map(|one| text(&one["name"]).to_owned()).collect();
        names.sort();
        names
    };
    let same = names(&pod.spec["volumes"]) == names(&pod.container["volumeMounts"]);
    found.need(same, "volumes and mounts differ");
    for volume in list(&pod.spec["volumes"]) {
        let secret = &volume["secret"];
        if let Some(name) = secret["secretName"].as_str() {
            let keys = secrets().remove(name);
            found.need(keys.is_some(), &format!("README.md makes no Secret {name}"));
            let known = |item: &Value| keys.as_ref().is_some_and(|keys| keys.contains(text(&item["key"])));
            found.need(list(&secret["items"]).iter().all(known), "an item that the Secret lacks");
            // The key ring is refused if others than a group may read it.
            found.need(secret["defaultMode"] == 0o440, "another mode of a secret");
        }
    }
    let is_fixed = |mount: &&Value| mount["name"] == "tmp" || mount["readOnly"] == true;
    found.need(list(&pod.container["volumeMounts"]).iter().all(|mount| is_fixed(&mount)), "a mount to write");
    let whole = list(&pod.container["volumeMounts"]).iter().all(|mount| mount["subPath"].is_null());
    found.need(whole, "a file that never changes");
}

fn environment(found: &mut Problems, pod: Pod<'_>) {
    let keys: Vec<String> = include_str!("../../proxy.toml")
        .lines()
        .filter_map(|line| line.trim_start_matches('#').split_once(" = "))
        .map(|(key, _)| format!("PGLOBBY_{}", key.to_uppercase()))
        .chain(["PGLOBBY_CONFIG", "PGLOBBY_CENTRAL_PASSWORD"].map(str::to_owned))
        .collect();
    let mut seen: Vec<&str> = Vec::new();
    for variable in list(&pod.container["env"]) {
        let name = text(&variable["name"]);
        found.need(
            !name.starts_with("PGLOBBY_") || keys.iter().any(|key| key == name),
            &format!("{name} is no key"),
        );
        let reference = &variable["valueFrom"]["secretKeyRef"];
        if let Some(secret) = reference["name"].as_str() {
            let keys = secrets().remove(secret).unwrap_or_default();
            found.need(keys.contains(text(&reference["key"])), &format!("Secret {secret} lacks a key"));
        }
        for used in text(&variable["value"]).split("$(").skip(1) {
            let used = used.split(')').next().unwrap();
            found.need(seen.contains(&used), "a variable that is not set before");
        }
        seen.push(name);
    }
    found.need(seen.contains(&"PGLOBBY_CENTRAL_PASSWORD"), "no password of the central database");
    for (name, field) in [("PGLOBBY_NODE_NAME", "metadata.name"), ("POD_IP", "status.podIP")] {
        let variable = list(&pod.container["env"]).iter().find(|variable| variable["name"] == name);
        let is_right = |variable: &Value| variable["valueFrom"]["fieldRef"]["fieldPath"] == field;
        found.need(variable.is_none_or(is_right), &format!("{name} is something else"));
    }
}

/// Every file that the configuration names is mounted, from the Secret that has it.
fn files(found: &mut Problems, manifests: &Manifests, config: &Config) {
    let map = text(&manifests.one("ConfigMap")["metadata"]["name"]);
    let named = |path: &Option<PathBuf>, from: &str| path.clone().map(|path| (path, from.to_owned()));
    let for_both = [
        config.path.clone().map(|path| (path, format!("configMap/{map}/proxy.toml"))),
        named(&config.keys_file, "secret/pglobby-keys/keyring.toml"),
        named(&config.central.tls.root_ca, "secret/pglobby-central/ca.crt"),
    ];
    let for_nodes = [
        named(&config.client_tls.cert_file, "secret/pglobby-tls/tls.crt"),
        named(&config.client_tls.key_file, "secret/pglobby-tls/tls.key"),
        named(&config.server_tls.ca_file, "secret/pglobby-central/ca.crt"),
    ];
    for (pod, needed) in [(manifests.node(), &for_nodes[..]), (manifests.init(), &[])] {
        let mounted = pod.files();
        for file in for_both.iter().chain(needed) {
            let is_there = file.as_ref().is_some_and(|(path, from)| mounted.get(path) == Some(from));
            found.need(is_there, &format!("{file:?} is not among {mounted:?}"));
        }
    }
    for pod in [manifests.node(), manifests.init()] {
        let path = pod.literals().get("PGLOBBY_CONFIG").map(PathBuf::from);
        found.need(path == config.path, "two places of proxy.toml");
    }
    found.need(config.keys_text.is_none() && config.central.password.is_none(), "a secret in the manifests");
}

fn selectors(found: &mut Problems, manifests: &Manifests) {
    let (node, init) = (manifests.node(), manifests.init());
    let (nodes, others) = (&node.template["metadata"]["labels"], &init.template["metadata"]["labels"]);
    let mut only_nodes = vec![
        ("Deployment", &manifests.one("Deployment")["spec"]["selector"]["matchLabels"]),
        ("Service", &manifests.one("Service")["spec"]["selector"]),
        ("PodDisruptionBudget", &manifests.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]),
    ];
    let spread = list(&node.spec["topologySpreadConstraints"]);
    let over: Vec<&str> = spread.iter().map(|one| text(&one["topologyKey"])).collect();
    let places = ["topology.kubernetes.io/zone", "kubernetes.io/hostname"];
    found.need(over == places, "nodes are not spread over zones and machines");
    only_nodes.extend(spread.iter().map(|one| ("spread", &one["labelSelector"]["matchLabels"])));
    for (of, selector) in only_nodes {
        found.need(selects(selector, nodes) && !selects(selector, others), &format!("{of} selects others"));
    }
    let policy = &manifests.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"];
    found.need(selects(policy, nodes) && selects(policy, others), "pods without a NetworkPolicy");
}

fn ports(found: &mut Problems, manifests: &Manifests, config: &Config) {
    let node = manifests.node();
    let port = |name: &str| node.port(&name.into());
    let http = config.http_listen.map(|http| u64::from(http.port()));
    found.need(port("postgres") == Some(u64::from(config.listen_port)), "clients' port");
    found.need(port("http").is_some() && port("http") == http, "HTTP's port");
    let is_open = |address: &std::net::SocketAddr| address.ip().is_unspecified();
    found.need(config.listen.iter().any(is_open), "clients cannot reach the node");
    found.need(config.http_listen.as_ref().is_some_and(is_open), "probes cannot reach the node");

    let service = &manifests.one("Service")["spec"]["ports"][0];
    found.need(service["port"] == config.listen_port, "README.md names another port");
    found.need(node.port(&service["targetPort"]) == port("postgres"), "the Service's port");
    found.need(
        node.literals()["PGLOBBY_NODE_ADDRESS"] == format!("$(POD_IP):{}", config.listen_port),
        "its address",
    );
    for (probe, path) in
        [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")]
    {
        found.need(node.container[probe]["httpGet"]["path"] == path, "a probe of something else");
        found.need(node.port(&node.container[probe]["httpGet"]["port"]) == http, "a probe's port");
    }
    let annotations = &node.template["metadata"]["annotations"];
    found.need(annotations["prometheus.io/scrape"] == "true", "no metrics");
    found.need(text(&annotations["prometheus.io/port"]).parse().ok() == http, "port of metrics");

    let policy = &manifests.one("NetworkPolicy")["spec"];
    found.need(policy["policyTypes"] == serde_json::json!(["Ingress", "Egress"]), "one direction only");
    let of_rules = |rules: &Value| -> Vec<u64> {
        let ports = list(rules).iter().flat_map(|rule| list(&rule["ports"]));
        ports.filter_map(|port| node.port(&port["port"])).collect()
    };
    let inward: Vec<Option<u64>> = of_rules(&policy["ingress"]).into_iter().map(Some).collect();
    found.need(inward == [port("postgres"), port("http")], "ports that may be reached");
    found.need(list(&policy["ingress"]).iter().all(|rule| !list(&rule["from"]).is_empty()), "open to all");
    let outward = of_rules(&policy["egress"]);
    let central = config.central.connection.get_ports().iter().map(|port| u64::from(*port));
    found.need(central.chain([53]).all(|port| outward.contains(&port)), "ports that nodes may reach");
}

fn waits(found: &mut Problems, manifests: &Manifests, config: &Config) {
    let node = manifests.node();
    let seconds = |value: &Value| Duration::from_secs(value.as_u64().unwrap_or_default());
    let grace = seconds(&node.spec["terminationGracePeriodSeconds"]);
    let before = seconds(&node.container["lifecycle"]["preStop"]["sleep"]["seconds"]);
    found.need(before >= Duration::from_secs(5), "clients are sent to a node that listens no more");
    found.need(grace >= before + config.timeouts.shutdown + END, "the node is killed while it drains");
    let until = |probe: &str| {
        let probe = &node.container[probe];
        let failures = u32::try_from(probe["failureThreshold"].as_u64().unwrap_or(3)).unwrap();
        seconds(&probe["periodSeconds"]) * failures
    };
    let started = until("startupProbe");
    found.need(started >= config.timeouts.central_start + END, "the node is killed while it starts");
    found.need(until("livenessProbe") >= Duration::from_secs(30), "a slow node is killed");
    found.need(until("readinessProbe") <= before, "an unready node gets clients for long");
    let rolling = &manifests.one("Deployment")["spec"]["strategy"]["rollingUpdate"];
    found.need(rolling["maxUnavailable"] == 0, "fewer nodes while they are replaced");
    found.need(
        manifests.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1,
        "several nodes leave at once",
    );
}

fn sizes(found: &mut Problems, manifests: &Manifests, config: &Config) {
    let node = manifests.node();
    let cpus = text(&node.container["resources"]["requests"]["cpu"]).parse();
    found.need(cpus == Ok(config.worker_threads), "worker threads and CPUs");
    let autoscaler = &manifests.one("HorizontalPodAutoscaler")["spec"];
    let (least, most) = (autoscaler["minReplicas"].as_u64(), autoscaler["maxReplicas"].as_u64());
    found.need(least >= Some(2) && most > least, "nodes");
}
