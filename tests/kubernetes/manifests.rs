//! The manifests as JSON, and what is looked up in them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use pglobby::config::Config;
use serde_json::Value;

use crate::support::cluster::target_folder;

/// Versions of Kubernetes whose schemas the manifests keep: the first one with all fields, and the last one known.
const KUBERNETES: [&str; 2] = ["1.30", "1.37"];

/// All objects of `deploy/kubernetes/`, in no order.
#[derive(Clone)]
pub struct Manifests(pub Vec<Value>);

pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes")
}

/// The Secrets that README.md makes, and their keys.
pub fn secrets() -> BTreeMap<String, BTreeSet<String>> {
    let readme = std::fs::read_to_string(folder().join("README.md")).unwrap();
    let mut secrets = BTreeMap::new();
    for command in readme.split("create secret ").skip(1).map(|rest| rest.lines().next().unwrap()) {
        let mut words = command.split_whitespace();
        let (kind, name) = (words.next().unwrap(), words.next().unwrap());
        let mut keys: BTreeSet<String> = words
            .filter_map(|word| word.strip_prefix("--from-file="))
            .map(|file| file.split('=').next().unwrap().to_owned())
            .collect();
        if kind == "tls" {
            keys.extend(["tls.crt", "tls.key"].map(str::to_owned));
        }
        secrets.insert(name.to_owned(), keys);
    }
    secrets
}

impl Manifests {
    /// Reads and validates the manifests of a folder; the error of the first that is invalid.
    pub fn read(folder: &Path) -> Result<Self, String> {
        let python = target_folder().join("drivers/python/bin/python");
        assert!(
            python.exists(),
            "{python:?} is missing: run scripts/test, which installs what the tests need"
        );
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kubernetes/validate.py");
        let output = Command::new(python).arg(program).arg(folder).args(KUBERNETES).output().unwrap();
        match output.status.success() {
            true => Ok(Self(serde_json::from_slice(&output.stdout).unwrap())),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// The only object of this kind; null if there is none.
    pub fn one(&self, kind: &str) -> &Value {
        let mut of_kind = self.0.iter().filter(|object| object["kind"] == kind);
        let found = of_kind.next().unwrap_or(&Value::Null);
        assert!(of_kind.next().is_none(), "two of {kind}");
        found
    }

    pub fn one_mut(&mut self, kind: &str) -> &mut Value {
        self.0.iter_mut().find(|object| object["kind"] == kind).unwrap()
    }

    pub fn node(&self) -> Pod<'_> {
        Pod::of(self.one("Deployment"))
    }

    pub fn init(&self) -> Pod<'_> {
        Pod::of(self.one("Job"))
    }

    pub fn proxy_toml(&self) -> &str {
        text(&self.one("ConfigMap")["data"]["proxy.toml"])
    }

    /// The configuration of a node, read by the program from the file and the environment of its container.
    pub fn config(&self) -> Result<Config, String> {
        let variables = self.node().literals();
        let path = variables.get("PGLOBBY_CONFIG").copied().unwrap_or_default();
        let environment = |name: &str| variables.get(name).map(|value| (*value).to_owned());
        Config::read(self.proxy_toml(), Some(Path::new(path)), &environment)
            .map_err(|error| error.to_string())
    }
}

/// A pod template and its only container.
#[derive(Clone, Copy)]
pub struct Pod<'m> {
    pub template: &'m Value,
    pub spec: &'m Value,
    pub container: &'m Value,
}

impl<'m> Pod<'m> {
    fn of(owner: &'m Value) -> Self {
        let template = &owner["spec"]["template"];
        let spec = &template["spec"];
        Self { template, spec, container: &spec["containers"][0] }
    }

    /// Variables of the environment with a value in the manifest. `$(NAME)` stays.
    pub fn literals(&self) -> BTreeMap<&'m str, &'m str> {
        let variables = list(&self.container["env"]).iter();
        variables.filter_map(|one| Some((one["name"].as_str()?, one["value"].as_str()?))).collect()
    }

    /// The port of this name; a number is itself.
    pub fn port(&self, name: &Value) -> Option<u64> {
        name.as_u64().or_else(|| {
            let ports = list(&self.container["ports"]).iter();
            ports.filter(|port| port["name"] == *name).find_map(|port| port["containerPort"].as_u64())
        })
    }

    /// The files that are mounted: path and, as `kind/name/key`, where they come from.
    pub fn files(&self) -> BTreeMap<PathBuf, String> {
        let mut files = BTreeMap::new();
        for mount in list(&self.container["volumeMounts"]) {
            let volumes = list(&self.spec["volumes"]).iter();
            let Some(volume) = volumes.clone().find(|volume| volume["name"] == mount["name"]) else {
                continue;
            };
            let (kind, name, source) = match (&volume["secret"], &volume["configMap"]) {
                (Value::Null, map) => ("configMap", text(&map["name"]), map),
                (secret, _) => ("secret", text(&secret["secretName"]), secret),
            };
            let all: Vec<String> = match kind {
                "secret" => secrets().remove(name).unwrap_or_default().into_iter().collect(),
                _ => vec!["proxy.toml".to_owned()],
            };
            let named = list(&source["items"]).iter().map(|item| (text(&item["path"]), text(&item["key"])));
            let named: Vec<_> = match source["items"].is_null() {
                true => all.iter().map(|key| (key.as_str(), key.as_str())).collect(),
                false => named.filter(|(_, key)| all.iter().any(|known| known == key)).collect(),
            };
            for (path, key) in named {
                files.insert(Path::new(text(&mount["mountPath"])).join(path), format!("{kind}/{name}/{key}"));
            }
        }
        files
    }
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Whether a label selector selects these labels. One that is empty selects everything, which is never meant.
pub fn selects(selector: &Value, labels: &Value) -> bool {
    selector
        .as_object()
        .is_some_and(|wanted| !wanted.is_empty() && wanted.iter().all(|(name, value)| labels[name] == *value))
}
