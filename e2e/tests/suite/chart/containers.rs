//! Every container is started with what its program takes, and every pod has what its containers refer to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use berth_e2e::ours::{NODE, OPERATOR};
use serde_json::Value;

use super::SETS;
use super::helm::{Helm, items, text};

/// A flag that no program has: one that is asked for nothing else stops at it, after it has read all before it.
const END: &str = "--no-program-has-this-flag";

/// Sidecars by container: the image whose flags these are, and the flags, as its source has them.
const SIDECARS: [(&str, &str, &[&str]); 3] = [
    (
        "provisioner",
        "registry.k8s.io/sig-storage/csi-provisioner:v6.4.0",
        &[
            "csi-address",
            "node-deployment",
            "node-deployment-immediate-binding",
            "strict-topology",
            "immediate-topology",
            "enable-capacity",
            "capacity-ownerref-level",
            "capacity-poll-interval",
            "extra-create-metadata",
            "timeout",
            "worker-threads",
        ],
    ),
    (
        "registrar",
        "registry.k8s.io/sig-storage/csi-node-driver-registrar:v2.18.0",
        &["csi-address", "kubelet-registration-path", "plugin-registration-path", "timeout"],
    ),
    (
        "liveness-probe",
        "registry.k8s.io/sig-storage/livenessprobe:v2.20.0",
        &["csi-address", "http-endpoint", "probe-timeout"],
    ),
];

/// With each set of values: our programs read the command line and the variables of their containers; sidecars are given flags
/// that the pinned version has.
pub fn command_lines_are_what_the_programs_take() -> anyhow::Result<()> {
    let (helm, operator, node) = (Helm::new()?, OPERATOR.obtain()?, NODE.obtain()?);
    let mut read = 0;
    for set in SETS {
        let rendered = helm.set(set)?;
        for (pod, template) in rendered.pods() {
            for container in items(&template["spec"]["containers"]) {
                let (name, arguments) = (text(&container["name"]), arguments(container)?);
                let context = || format!("{set}: container {name} of {pod}");
                match name {
                    "operator" => is_read(&operator, &arguments, container).with_context(context)?,
                    "agent" | "supervise" => is_read(&node, &arguments, container).with_context(context)?,
                    sidecar => has_flags(sidecar, &arguments, container).with_context(context)?,
                }
                read += 1;
            }
        }
    }
    println!("chart: {read} command lines");
    // The check would see what is wrong.
    let wrong = ["agent".to_owned(), "--metrics-addr=nowhere".to_owned()];
    ensure!(said(&node, &wrong)?.contains("--metrics-addr"), "a wrong value is not seen");
    Ok(())
}

/// The arguments as kubelet gives them: `$(NAME)` is a variable of the container, whatever its value.
fn arguments(container: &Value) -> anyhow::Result<Vec<String>> {
    let variables: BTreeSet<&str> = items(&container["env"]).iter().map(|one| text(&one["name"])).collect();
    let mut words = Vec::new();
    for argument in items(&container["args"]) {
        let word = text(argument);
        let Some((before, (name, after))) =
            word.split_once("$(").and_then(|(before, rest)| Some((before, rest.split_once(')')?)))
        else {
            words.push(word.to_owned());
            continue;
        };
        ensure!(variables.contains(name), "{word}: there is no variable {name}");
        words.push(format!("{before}some-value{after}"));
    }
    ensure!(!words.is_empty(), "no arguments");
    Ok(words)
}

/// True if the program reads the arguments, and knows every variable that is named after it; their values are read as those of
/// the flags that they stand for.
fn is_read(program: &Path, arguments: &[String], container: &Value) -> anyhow::Result<()> {
    let command: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|word| !word.starts_with('-')).collect();
    let known = variables(program, &command)?;
    let mut words = arguments.to_vec();
    for variable in items(&container["env"]) {
        let name = text(&variable["name"]);
        if name.starts_with("BERTH_") {
            let flag = known.get(name).with_context(|| format!("no flag reads the variable {name}"))?;
            let value = variable["value"].as_str().unwrap_or("some-value");
            words.push(format!("{flag}={value}"));
        }
    }
    let said = said(program, &words)?;
    ensure!(said.contains(&format!("unexpected argument '{END}'")), "{words:?} is refused: {said}");
    Ok(())
}

/// What a program says of these arguments, followed by one that it does not know.
fn said(program: &Path, words: &[String]) -> anyhow::Result<String> {
    let output = Command::new(program).args(words).arg(END).env_clear().output()?;
    ensure!(output.status.code() == Some(2), "{words:?} {END} was taken: {:?}", output.status);
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The variables that a command reads, with the flags that they stand for.
fn variables(program: &Path, command: &[&str]) -> anyhow::Result<BTreeMap<String, String>> {
    let output = Command::new(program).args(command).arg("--help").env_clear().output()?;
    ensure!(output.status.success(), "{command:?} --help: {:?}", output.status);
    let (mut found, mut flag) = (BTreeMap::new(), String::new());
    for line in String::from_utf8(output.stdout)?.lines() {
        let name = line.split_whitespace().find(|word| word.starts_with("--"));
        if let Some(name) = name.filter(|_| line.trim_start().starts_with('-')) {
            name.trim_end_matches(',').clone_into(&mut flag);
        }
        if let Some((_, rest)) = line.split_once("[env: ") {
            let name = rest.split(['=', ']']).next().unwrap_or_default();
            found.insert(name.to_owned(), flag.clone());
        }
    }
    ensure!(!found.is_empty(), "{command:?} --help names no variable");
    Ok(found)
}

/// True if the sidecar is of the version that we know, and has these flags.
fn has_flags(container: &str, arguments: &[String], rendered: &Value) -> anyhow::Result<()> {
    let Some((_, image, flags)) = SIDECARS.iter().find(|(name, ..)| *name == container) else {
        bail!("no sidecar is called {container}");
    };
    ensure!(rendered["image"] == *image, "the flags are those of {image}: {}", rendered["image"]);
    for argument in arguments {
        let name = argument.strip_prefix("--").and_then(|rest| rest.split('=').next()).unwrap_or(argument);
        ensure!(flags.contains(&name), "{image} has no flag {argument}");
    }
    Ok(())
}

/// With each set of values: nothing is named twice, mounts have their volumes, volumes are used, probes their ports, and the
/// operator's pod is as restricted as it can be.
pub fn pods_are_whole() -> anyhow::Result<()> {
    let helm = Helm::new()?;
    for set in SETS {
        let rendered = helm.set(set)?;
        let mut seen = BTreeSet::new();
        for (name, template) in rendered.pods() {
            pod_is_whole(template).with_context(|| format!("{set}: {name}"))?;
            seen.insert(name.to_owned());
        }
        let wanted = ["berth-data-plane", "berth-node", "berth-operator"];
        ensure!(seen.iter().eq(wanted.iter()), "{set}: {seen:?}");
        let operator = rendered.of("Deployment").next().context("no operator")?;
        ensure!(operator["spec"]["replicas"] == 2, "{set}: {}", operator["spec"]["replicas"]);
        let plane = rendered.of("DaemonSet").find(|one| one["metadata"]["name"] == "berth-data-plane");
        let strategy = &plane.context("no data plane")?["spec"]["updateStrategy"]["type"];
        ensure!(strategy == "OnDelete", "{set}: an upgrade would restart the data plane: {strategy}");
    }
    Ok(())
}

fn pod_is_whole(template: &Value) -> anyhow::Result<()> {
    let spec = &template["spec"];
    let volumes = once(items(&spec["volumes"]), "name")?;
    let mut used = BTreeSet::new();
    once(items(&spec["containers"]), "name")?;
    for container in items(&spec["containers"]) {
        let of = text(&container["name"]);
        once(items(&container["env"]), "name").with_context(|| of.to_owned())?;
        once(items(&container["volumeMounts"]), "mountPath").with_context(|| of.to_owned())?;
        used.extend(items(&container["volumeMounts"]).iter().map(|mount| text(&mount["name"]).to_owned()));
        let ports = once(items(&container["ports"]), "name")?;
        for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
            if let Some(port) = container[probe]["httpGet"]["port"].as_str() {
                ensure!(ports.contains(port), "{of}: {probe} asks port {port}");
            }
        }
        let security = &container["securityContext"];
        let privileged = security["privileged"] == true;
        ensure!(privileged == ["agent", "supervise"].contains(&of), "{of}: privileged is {privileged}");
        if !privileged {
            ensure!(security["allowPrivilegeEscalation"] == false, "{of} may gain privileges");
            ensure!(security["readOnlyRootFilesystem"] == true, "{of} may write");
            ensure!(security["capabilities"]["drop"][0] == "ALL", "{of} keeps capabilities");
        }
    }
    ensure!(volumes == used, "volumes {volumes:?}, mounted {used:?}");
    Ok(())
}

/// The names in a list, each of them once.
fn once(list: &[Value], key: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for one in list {
        let name = text(&one[key]).to_owned();
        ensure!(!name.is_empty() && names.insert(name.clone()), "{key} {name:?} is missing or there twice");
    }
    Ok(names)
}
