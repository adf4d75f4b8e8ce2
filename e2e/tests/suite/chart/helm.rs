//! Helm, with a home of its own.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use berth_e2e::tools::Tool;
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

/// The oldest Kubernetes that the chart is for.
const KUBERNETES: &str = "1.33.0";

/// Helm, and nothing of what the user of this machine has configured.
pub struct Helm {
    program: PathBuf,
    home: TempDir,
}

/// What the chart renders with some values.
pub struct Rendered {
    /// As Helm prints it.
    pub text: String,
    /// Its objects.
    pub objects: Vec<Value>,
}

impl Helm {
    /// Finds it, or builds it.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self { program: Tool::Helm.obtain()?, home: tempfile::tempdir()? })
    }

    /// Runs it to its end, in the namespace that the chart is for.
    pub fn run(&self, words: &[&str], values: &str) -> anyhow::Result<Output> {
        self.run_in("berth-system", words, values)
    }

    /// The same in any namespace.
    pub fn run_in(&self, namespace: &str, words: &[&str], values: &str) -> anyhow::Result<Output> {
        let mut file = NamedTempFile::with_suffix(".yaml")?;
        file.write_all(values.as_bytes())?;
        let mut helm = Command::new(&self.program);
        helm.args(words).args(["--namespace", namespace]);
        if ["template", "lint", "install", "upgrade"].contains(&words[0]) {
            helm.arg("--values").arg(file.path());
        }
        if ["template", "lint"].contains(&words[0]) {
            // Without an API server, Helm guesses.
            helm.args(["--kube-version", KUBERNETES]);
        }
        if words[0] == "template" {
            helm.args(["--api-versions", "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"]);
        }
        for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            helm.env(name, self.home.path());
        }
        helm.output().context("running helm")
    }

    /// What is refused says why.
    pub fn template(&self, values: &str) -> anyhow::Result<Rendered> {
        let chart = chart();
        let output = self.run(&["template", "berth", &chart], values)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "helm template: {said}");
        let text = String::from_utf8(output.stdout)?;
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text)?;
        let objects = documents.into_iter().filter(|document| !document.is_null()).collect();
        Ok(Rendered { text, objects })
    }

    /// The set of values of this name.
    pub fn set(&self, name: &str) -> anyhow::Result<Rendered> {
        self.template(&set(name)?).with_context(|| format!("the values {name}"))
    }
}

impl Rendered {
    /// The objects of a kind.
    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    /// The pods of all workloads: the workload's name, and what makes its pods.
    pub fn pods(&self) -> impl Iterator<Item = (&str, &Value)> {
        let workloads = self.objects.iter().filter(|object| object["spec"]["template"].is_object());
        workloads.map(|object| (text(&object["metadata"]["name"]), &object["spec"]["template"]))
    }
}

/// Where the chart is.
pub fn chart() -> String {
    super::repository().join("charts/berth").display().to_string()
}

/// The set of values of this name.
pub fn set(name: &str) -> anyhow::Result<String> {
    if name == "defaults" {
        Ok("{}".to_owned())
    } else {
        super::read(&format!("e2e/manifests/chart/{name}.yaml"))
    }
}

/// A text, or an empty one.
pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The items of a list, if it is there.
pub fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}
