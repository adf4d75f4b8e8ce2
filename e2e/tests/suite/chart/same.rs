//! What the chart renders beside what the repository says elsewhere: there is one truth of each thing.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::helm::{Helm, Rendered, chart, items, text};
use super::{SETS, read, repository};

/// Where sidecars and programs come from unless values say otherwise.
const IMAGES: &str = "charts/berth/images.txt";

/// The API groups of objects that the chart may make.
const GROUPS: [&str; 10] = [
    "admissionregistration.k8s.io/v1",
    "apiextensions.k8s.io/v1",
    "apps/v1",
    "monitoring.coreos.com/v1",
    "networking.k8s.io/v1",
    "policy/v1",
    "rbac.authorization.k8s.io/v1",
    "storage.k8s.io/v1",
    "v1",
    "",
];

/// Definitions, rights, alerts and images are those of the files that others use; the version is the programs'.
pub fn says_what_the_repository_says() -> anyhow::Result<()> {
    let helm = Helm::new()?;
    let mut images = BTreeSet::new();
    for set in SETS {
        let rendered = helm.set(set)?;
        for object in &rendered.objects {
            let group = text(&object["apiVersion"]);
            ensure!(!group.is_empty() && GROUPS.contains(&group), "{set}: an object of {group:?}");
            let labels = &object["metadata"]["labels"];
            ensure!(labels["app.kubernetes.io/name"] == "berth", "{set}: no labels: {}", object["metadata"]);
        }
        images.extend(used(&rendered));
        same_files(&rendered, "CustomResourceDefinition", &definitions()?).context(set)?;
        for kind in ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ServiceAccount"] {
            let files = ["rbac/operator", "rbac/node", "rbac/provisioner"];
            same_files(&rendered, kind, &of_kind(kind, &files)?).context(set)?;
        }
        for (part, file) in [("Mutating", "guard-reservations"), ("Validating", "nodes-write-their-own")] {
            for kind in [format!("{part}AdmissionPolicy"), format!("{part}AdmissionPolicyBinding")] {
                let files = of_kind(&kind, &[&format!("admission/{file}")])?;
                same_files(&rendered, &kind, &files).context(set)?;
            }
        }
        for definition in rendered.of("CustomResourceDefinition") {
            let policy = &definition["metadata"]["annotations"]["helm.sh/resource-policy"];
            ensure!(policy == "keep", "{set}: {} would go", definition["metadata"]["name"]);
        }
    }
    let listed: BTreeSet<String> = read(IMAGES)?.lines().map(str::to_owned).collect();
    ensure!(images == listed, "rendered {images:?}, {IMAGES} has {listed:?}");
    same_alerts(&helm.set("everything")?)?;
    let about: Value = serde_saphyr::from_str(&read("charts/berth/Chart.yaml")?)?;
    for version in ["version", "appVersion"] {
        ensure!(about[version] == env!("CARGO_PKG_VERSION"), "{version} is {}", about[version]);
    }
    let linted = helm.run(&["lint", "--strict", &chart()], "{}")?;
    ensure!(linted.status.success(), "helm lint: {}", String::from_utf8_lossy(&linted.stdout));
    Ok(())
}

/// The images of all containers.
fn used(rendered: &Rendered) -> impl Iterator<Item = String> + '_ {
    let containers = rendered.pods().flat_map(|(_, template)| items(&template["spec"]["containers"]));
    containers.map(|container| text(&container["image"]).to_owned())
}

/// The definitions of `crds/`, by name.
fn definitions() -> anyhow::Result<BTreeMap<String, Value>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(repository().join("crds"))? {
        let object: Value = serde_saphyr::from_str(&std::fs::read_to_string(entry?.path())?)?;
        found.insert(text(&object["metadata"]["name"]).to_owned(), object);
    }
    Ok(found)
}

/// The objects of one kind in files of the chart, by name.
fn of_kind(kind: &str, files: &[&str]) -> anyhow::Result<BTreeMap<String, Value>> {
    let mut found = BTreeMap::new();
    for file in files {
        let objects: Vec<Value> =
            serde_saphyr::from_multiple(&read(&format!("charts/berth/files/{file}.yaml"))?)?;
        for object in objects.into_iter().filter(|object| object["kind"] == kind) {
            let name = text(&object["metadata"]["name"]).to_owned();
            ensure!(found.insert(name.clone(), object).is_none(), "{kind} {name} is there twice");
        }
    }
    Ok(found)
}

/// Compares all objects of a kind, apart from what the chart adds to every object.
fn same_files(rendered: &Rendered, kind: &str, wanted: &BTreeMap<String, Value>) -> anyhow::Result<()> {
    let mut found = BTreeMap::new();
    // The guard against uninstalling stands in the chart alone.
    for object in rendered.of(kind).filter(|object| object["metadata"]["name"] != "berth-uninstall") {
        let mut object = object.clone();
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("labels");
            metadata.remove("annotations");
        }
        found.insert(text(&object["metadata"]["name"]).to_owned(), object);
    }
    let names = |all: &BTreeMap<String, Value>| all.keys().cloned().collect::<Vec<_>>();
    ensure!(names(&found) == names(wanted), "{kind}: {:?} instead of {:?}", names(&found), names(wanted));
    for (name, object) in &found {
        ensure!(Some(object) == wanted.get(name), "{kind} {name} is not what its file says");
    }
    Ok(())
}

/// The rules are those of the rule file, and each leads to a section of the documentation.
fn same_alerts(rendered: &Rendered) -> anyhow::Result<()> {
    let rule = rendered.of("PrometheusRule").next().context("no PrometheusRule")?;
    let mut file: Value = serde_saphyr::from_str(&read("charts/berth/files/alerts/berth.rules.yaml")?)?;
    let groups = file["groups"].as_array_mut().context("no groups")?;
    for one in groups.iter_mut().filter_map(|group| group["rules"].as_array_mut()).flatten() {
        let annotations = one["annotations"].as_object_mut().context("no annotations")?;
        let runbook = annotations.remove("runbook").context("no runbook")?;
        annotations.insert("runbook_url".to_owned(), runbook);
    }
    ensure!(rule["spec"] == file, "the rules are not those of their file: {:#}", rule["spec"]);
    let page = read("docs/operations.md")?.to_lowercase();
    for one in items(&rule["spec"]["groups"]).iter().flat_map(|group| items(&group["rules"])) {
        let url = text(&one["annotations"]["runbook_url"]);
        let section = url.split_once('#').map(|(_, section)| format!("\n### {section}\n"));
        ensure!(section.is_some_and(|section| page.contains(&section)), "{url} leads nowhere");
    }
    Ok(())
}

/// Every panel asks for metrics that are served, by labels that these have.
pub fn the_dashboard_shows_metrics_that_exist() -> anyhow::Result<()> {
    let table = read("docs/metrics.md")?;
    let row = |line: &str| -> Option<(String, BTreeSet<String>)> {
        let cells: Vec<&str> = line.strip_prefix("| `")?.split('|').collect();
        let labels = cells.get(3)?.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        Some((cells.first()?.trim().trim_end_matches('`').to_owned(), labels))
    };
    let known: BTreeMap<_, _> = table.lines().filter_map(row).collect();
    let board: Value = serde_json::from_str(&read("charts/berth/files/dashboards/berth.json")?)?;
    let (mut ids, mut asked) = (BTreeSet::new(), 0);
    for panel in items(&board["panels"]) {
        let title = text(&panel["title"]);
        ensure!(ids.insert(panel["id"].to_string()), "{title}: its id is there twice");
        ensure!(panel["type"] == "row" || !items(&panel["targets"]).is_empty(), "{title} asks for nothing");
        for target in items(&panel["targets"]) {
            asked += metrics_exist(text(&target["expr"]), &known).with_context(|| title.to_owned())?;
        }
    }
    for variable in items(&board["templating"]["list"]) {
        if variable["type"] == "query" {
            asked += metrics_exist(text(&variable["query"]), &known)?;
        }
    }
    println!("dashboard: {} panels, {asked} uses of metrics", ids.len());
    ensure!(asked > ids.len(), "only {asked} metrics");
    Ok(())
}

/// How many metrics an expression asks for, all of which are known and have the labels that are asked of them.
fn metrics_exist(expr: &str, known: &BTreeMap<String, BTreeSet<String>>) -> anyhow::Result<usize> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names: Vec<&str> = expr.split(|c| !is_part(c)).filter(|word| word.starts_with("berth_")).collect();
    ensure!(!names.is_empty(), "no metric of Berth in {expr}");
    let mut labels = BTreeSet::from(["instance".to_owned()]);
    for name in &names {
        labels
            .extend(known.get(*name).with_context(|| format!("there is no metric {name}"))?.iter().cloned());
    }
    for (open, close) in [("by (", ')'), ("{", '}')] {
        for part in expr.split(open).skip(1) {
            for label in part.split(close).next().unwrap_or_default().split(',') {
                let label = label.trim().split(|c| !is_part(c)).next().unwrap_or_default();
                ensure!(labels.contains(label), "no metric of {expr} has a label {label:?}");
            }
        }
    }
    Ok(names.len())
}
