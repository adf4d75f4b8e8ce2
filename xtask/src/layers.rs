//! The arrows between our crates, as `ARCHITECTURE.md` draws them; any other arrow fails the build.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

/// Which of our crates a crate may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    ("berth-core", &[]),
    ("berth-api", &["berth-core"]),
    ("berth-operator", &["berth-api", "berth-core"]),
    (
        "berth-node",
        &["berth-api", "berth-core", "berth-device", "berth-image", "berth-objectstore", "berth-record"],
    ),
    ("berth-record", &["berth-core"]),
    ("berth-device", &["berth-core"]),
    ("berth-image", &["berth-core"]),
    ("berth-objectstore", &["berth-core"]),
    ("berth-testkit", &["berth-core", "berth-device", "berth-objectstore"]),
    ("kubectl-berth", &["berth-api", "berth-core"]),
    ("berth-e2e", &["berth-api", "berth-testkit"]),
    ("xtask", &["berth-api", "berth-core"]),
];

/// Crates that may not depend on anything asynchronous or on Kubernetes, directly or not.
const SYNCHRONOUS: &[&str] = &["berth-core", "berth-record"];
const ASYNCHRONOUS: &[&str] = &["tokio", "kube", "async-std", "aws-sdk-s3"];

/// Only these may name the S3 SDK.
const S3_SDK: &[&str] = &["berth-objectstore"];

/// Reads cargo's metadata and fails on any edge that is not allowed.
pub fn run(root: &Path) -> anyhow::Result<()> {
    let metadata = metadata(root)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let mut problems = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(may) = allowed.get(name) else {
            problems.push(format!("{name} has no place in the layers"));
            continue;
        };
        for (dependency, kind) in edges(package) {
            let ours = allowed.contains_key(dependency.as_str());
            if ours && kind != "dev" && !may.contains(&dependency.as_str()) {
                problems.push(format!("{name} may not depend on {dependency}"));
            }
            if dependency == "berth-testkit" && kind != "dev" && name != "berth-e2e" {
                problems.push(format!("{name} may use berth-testkit in tests only"));
            }
            if SYNCHRONOUS.contains(&name) && kind != "dev" && ASYNCHRONOUS.contains(&dependency.as_str()) {
                problems.push(format!("{name} is synchronous and may not depend on {dependency}"));
            }
            if dependency == "aws-sdk-s3" && !S3_SDK.contains(&name) {
                problems.push(format!("{name} may not name the S3 SDK"));
            }
        }
    }
    if problems.is_empty() {
        println!("layers hold: {} crates", packages.len());
        return Ok(());
    }
    bail!("{}", problems.join("\n"))
}

fn metadata(root: &Path) -> anyhow::Result<Value> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .context("running cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The direct dependencies of a package, each with its kind: `normal`, `dev` or `build`.
fn edges(package: &Value) -> BTreeSet<(String, String)> {
    package["dependencies"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|d| {
            Some((d["name"].as_str()?.to_owned(), d["kind"].as_str().unwrap_or("normal").to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_hold() {
        run(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace"))
            .expect("layers");
    }
}
