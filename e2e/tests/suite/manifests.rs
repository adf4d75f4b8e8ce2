//! Good manifests are accepted, bad ones refused with the field's name, and every pattern, enum, bound and rule of the
//! CRDs is hit by at least one bad manifest: the list of what must be hit is computed from the CRDs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use berth_e2e::cluster::Cluster;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::discovery::{ApiResource, Scope};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::scenario::{CONTROL_PLANE, Scenario};

/// One row of `refused.yaml`: a change to a good manifest that must be refused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Refused {
    from: String,
    path: String,
    #[serde(default)]
    value: Option<Value>,
    #[serde(default)]
    set: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    names: Option<String>,
    #[serde(default)]
    update: bool,
    #[serde(default)]
    status: bool,
    /// What the field holds before, for rules about changes.
    #[serde(default)]
    before: Option<Value>,
}

/// A constraint of a CRD: kind, path in the schema (`{}` and `[]` for any entry), and what it is.
type Constraint = (String, String, String);

/// The scenarios of this file.
pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("manifests::every_constraint_refuses", CONTROL_PLANE, || async {
            let dir = tempfile::tempdir()?;
            let cluster = Cluster::start(dir.path()).await?;
            cluster.install_crds(&repository().join("crds")).await?;
            every_constraint_refuses(cluster.admin()).await
        }),
        Scenario::new("manifests::states_change_only_as_their_tables_say", CONTROL_PLANE, || async {
            let dir = tempfile::tempdir()?;
            let cluster = Cluster::start(dir.path()).await?;
            cluster.install_crds(&repository().join("crds")).await?;
            let pairs = states_of(&cluster.admin(), "stagingreservation", "## Reservations").await?
                + states_of(&cluster.admin(), "templateimport", "## Imports").await?
                + states_of(&cluster.admin(), "imagetransfer", "## Transfers").await?
                + states_of(&cluster.admin(), "stagedimage", "## Staged images").await?;
            println!("states: {pairs} pairs tried");
            ensure!(pairs == 36 + 36 + 49 + 16, "{pairs} pairs");
            Ok(())
        }),
    ]
}

/// Tries to change the state of an object from each to each other, and compares with the documented table. Returns how many
/// were tried.
async fn states_of(client: &kube::Client, manifest: &str, heading: &str) -> anyhow::Result<usize> {
    let object = good(manifest)?;
    let api = api(client, &object)?;
    let table = documented(heading)?;
    let state = |state: &str| Patch::Merge(json!({"status": {"state": state}}));
    let mut tried = 0;
    for (from, followers) in &table {
        let created = api.create(&PostParams::default(), &serde_json::from_value(object.clone())?).await?;
        let name = created.metadata.name.context("an object without a name")?;
        api.patch_status(&name, &PatchParams::default(), &state(from)).await?;
        for to in table.keys() {
            let dry = PatchParams { dry_run: true, ..PatchParams::default() };
            let outcome = api.patch_status(&name, &dry, &state(to)).await;
            // To stay as it is is no change.
            match (outcome, from == to || followers.contains(to)) {
                (Ok(_), true) => {}
                (Err(kube::Error::Api(refusal)), false) if refusal.code == 422 => {}
                (Ok(_), false) => anyhow::bail!("{manifest}: {from} became {to}"),
                (Err(error), _) => return Err(error).with_context(|| format!("{manifest}: {from} to {to}")),
            }
            tried += 1;
        }
        api.delete(&name, &DeleteParams::default()).await?;
    }
    Ok(tried)
}

/// The states of the table in this part of the documentation, and those that may follow each. The API has no name for what
/// nothing has been said of.
fn documented(heading: &str) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let page = std::fs::read_to_string(repository().join("docs/semantics.md"))?;
    let part = page.split_once(heading).with_context(|| format!("no part {heading}"))?.1;
    let table = part
        .lines()
        .skip_while(|line| !line.starts_with("| state |") || line.contains("| means |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let cells = |line: &str| -> Vec<String> {
        line.split('|').map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).collect()
    };
    let rows = table.map(cells).filter_map(|row| {
        let (state, followers) = row.split_first()?;
        (state != "New").then(|| (state.clone(), followers.iter().cloned().collect()))
    });
    Ok(rows.collect())
}

/// The manifest of this name that is accepted.
pub fn good(name: &str) -> anyhow::Result<Value> {
    read(&folder().join(format!("good/{name}.yaml")))
}

/// The root of the tree.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// Sends every manifest of `e2e/manifests` to the API server.
async fn every_constraint_refuses(client: kube::Client) -> anyhow::Result<()> {
    let mut open = constraints();
    let all = open.len();
    for file in good_manifests()? {
        let object = read(&file)?;
        accept(&client, &object).await.with_context(|| format!("{} must be accepted", file.display()))?;
    }
    let rows: Vec<Refused> =
        serde_saphyr::from_str(&std::fs::read_to_string(folder().join("refused.yaml"))?)?;
    for row in &rows {
        let name = format!("{} {} {:?}{:?}", row.from, row.path, row.value, row.set);
        let name = name.chars().take(120).collect::<String>();
        let refusal = refuse(&client, row).await.with_context(|| name.clone())?;
        let expected = row.names.as_deref().unwrap_or(&row.path);
        let said = format!("{} {}", refusal.message, fields(&refusal).join(" "));
        ensure!(said.contains(expected), "{name}: the refusal does not name `{expected}`: {said}");
        let kind = kind_of(&good(&row.from)?);
        for hit in hits(&kind, &refusal) {
            open.remove(&hit);
        }
    }
    println!(
        "manifests: {} good, {} refused, {} of {all} constraints hit",
        good_manifests()?.len(),
        rows.len(),
        all - open.len()
    );
    ensure!(open.is_empty(), "no bad manifest hits: {open:#?}");
    Ok(())
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests")
}

fn good_manifests() -> anyhow::Result<Vec<PathBuf>> {
    let mut files: Vec<_> =
        std::fs::read_dir(folder().join("good"))?.filter_map(|e| Some(e.ok()?.path())).collect();
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Ok(serde_saphyr::from_str(&text)?)
}

fn kind_of(object: &Value) -> String {
    object["kind"].as_str().unwrap_or_default().to_owned()
}

fn api(client: &kube::Client, object: &Value) -> anyhow::Result<Api<DynamicObject>> {
    let kind = kind_of(object);
    let crd = berth_api::definitions()
        .into_iter()
        .find(|d| d.spec.names.kind == kind)
        .with_context(|| format!("no definition of {kind}"))?;
    let resource = ApiResource {
        group: crd.spec.group.clone(),
        version: "v1alpha1".into(),
        api_version: format!("{}/v1alpha1", crd.spec.group),
        kind,
        plural: crd.spec.names.plural.clone(),
    };
    let scope = if crd.spec.scope == "Namespaced" { Scope::Namespaced } else { Scope::Cluster };
    Ok(match scope {
        Scope::Namespaced => Api::namespaced_with(client.clone(), "default", &resource),
        Scope::Cluster => Api::all_with(client.clone(), &resource),
    })
}

/// Creates the object, and deletes it again.
async fn accept(client: &kube::Client, object: &Value) -> anyhow::Result<()> {
    let api = api(client, object)?;
    let created = api.create(&PostParams::default(), &serde_json::from_value(object.clone())?).await?;
    let name = created.metadata.name.context("an object without a name")?;
    api.delete(&name, &DeleteParams::default()).await?;
    Ok(())
}

/// Sends what a row describes, and returns the refusal; an acceptance is an error.
async fn refuse(client: &kube::Client, row: &Refused) -> anyhow::Result<kube::core::Status> {
    let good = good(&row.from)?;
    let api = api(client, &good)?;
    let dry = PostParams { dry_run: true, field_manager: None };
    let outcome = if row.status || row.update {
        let created = api.create(&PostParams::default(), &serde_json::from_value(good.clone())?).await?;
        let name = created.metadata.name.clone().context("an object without a name")?;
        if let Some(before) = &row.before {
            let mut patch = json!({});
            set(&mut patch, &row.path, before.clone());
            api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        }
        let outcome = if row.status {
            let mut patch = json!({});
            set(&mut patch, &row.path, changed(row));
            let params = PatchParams { dry_run: true, ..PatchParams::default() };
            api.patch_status(&name, &params, &Patch::Merge(&patch)).await
        } else {
            let mut object = serde_json::to_value(&created)?;
            change(&mut object, row);
            api.replace(&name, &dry, &serde_json::from_value(object)?).await
        };
        api.delete(&name, &DeleteParams::default()).await?;
        outcome
    } else {
        let mut object = good;
        change(&mut object, row);
        api.create(&dry, &serde_json::from_value(object)?).await
    };
    match outcome {
        Err(kube::Error::Api(status)) if status.code == 422 => Ok(*status),
        Err(other) => Err(other).context("refused in another way than as invalid"),
        Ok(_) => anyhow::bail!("accepted"),
    }
}

fn change(object: &mut Value, row: &Refused) {
    match &row.set {
        Some(fields) => {
            for (field, value) in fields {
                set(object, &format!("{}.{field}", row.path), value.clone());
            }
        }
        None => set(object, &row.path, changed(row)),
    }
}

/// The value of a row; `{repeat, times}`, `{items, times}` and `{entries}` stand for long ones.
fn changed(row: &Refused) -> Value {
    let value = row.value.clone().unwrap_or_default();
    let times = || usize::try_from(value["times"].as_u64().unwrap_or_default()).unwrap_or_default();
    if let Some(text) = value["repeat"].as_str() {
        return json!(text.repeat(times()));
    }
    if let Some(item) = value.get("items") {
        return json!(vec![item; times()]);
    }
    if let Some(count) = value["entries"].as_u64() {
        let promise = json!({"holder": {"kind": "StagedImage", "name": "i"}, "class": "Images",
            "dataBytes": 1, "metadataBytes": 0, "generation": 1});
        return (0..count)
            .map(|n| (format!("uid-{n}"), promise.clone()))
            .collect::<serde_json::Map<_, _>>()
            .into();
    }
    value
}

/// Sets the field at a path such as `spec.allowedNamespaces[0]`.
fn set(object: &mut Value, path: &str, value: Value) {
    let mut place = object;
    for step in path.split('.') {
        let (name, index) = match step.split_once('[') {
            Some((name, rest)) => (name, rest.trim_end_matches(']').parse::<usize>().ok()),
            None => (step, None),
        };
        place = &mut place[name];
        if let Some(index) = index {
            place = &mut place[index];
        }
    }
    *place = value;
}

fn fields(status: &kube::core::Status) -> Vec<String> {
    status.details.iter().flat_map(|d| &d.causes).map(|c| c.field.clone()).collect()
}

/// Which constraints a refusal shows to be in force.
fn hits(kind: &str, status: &kube::core::Status) -> BTreeSet<Constraint> {
    let causes = status.details.iter().flat_map(|d| &d.causes);
    causes
        .filter_map(|cause| {
            let path = generic(&cause.field);
            let constraint = match cause.message.as_str() {
                m if m.contains("should match '") => "pattern".to_owned(),
                m if m.contains("Unsupported value") => "enum".to_owned(),
                m if m.contains("greater than or equal to") => "minimum".to_owned(),
                m if m.contains("less than or equal to") => "maximum".to_owned(),
                m if m.contains("chars long") && m.contains("at least") => "minLength".to_owned(),
                m if m.contains("Too long") => "maxLength".to_owned(),
                m if m.contains("Too many") => "maxCount".to_owned(),
                m => rule_of(kind, &path, m)?,
            };
            Some((kind.to_owned(), path, constraint))
        })
        .collect()
}

fn rule_of(kind: &str, path: &str, message: &str) -> Option<String> {
    constraints()
        .into_iter()
        .filter(|(k, p, c)| k == kind && p == path && c.starts_with("rule "))
        .map(|(_, _, c)| c)
        .find(|c| message.contains(&c["rule ".len()..]))
}

/// `spec.allowedNamespaces[0]` as `spec.allowedNamespaces[]`, a ledger's `spec.promises.uid-1` as `spec.promises{}`.
fn generic(field: &str) -> String {
    let mut path = field.trim_matches(|c| c == '<' || c == '>').replace("[0]", "[]");
    for entry in [".uid-1", "[uid-1]"] {
        path = path.replace(entry, "{}");
    }
    if path == "nil" { String::new() } else { path }
}

/// Every pattern, enum, bound and rule of the CRDs.
fn constraints() -> BTreeSet<Constraint> {
    let mut found = BTreeSet::new();
    for crd in berth_api::definitions() {
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap_or_default();
        walk(&crd.spec.names.kind, "", &schema["openAPIV3Schema"], &mut found);
    }
    found
}

fn walk(kind: &str, path: &str, schema: &Value, found: &mut BTreeSet<Constraint>) {
    let mut add = |what: &str| {
        found.insert((kind.to_owned(), path.to_owned(), what.to_owned()));
    };
    for keyword in ["pattern", "enum", "minimum", "maximum", "minLength", "maxLength"] {
        if schema.get(keyword).is_some() {
            add(keyword);
        }
    }
    for keyword in ["maxItems", "maxProperties"] {
        if schema.get(keyword).is_some() {
            add("maxCount");
        }
    }
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        add(&format!("rule {}", rule["message"].as_str().unwrap_or_default()));
    }
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        walk(kind, &below, child, found);
    }
    if schema["items"].is_object() {
        walk(kind, &format!("{path}[]"), &schema["items"], found);
    }
    if schema["additionalProperties"].is_object() {
        walk(kind, &format!("{path}{{}}"), &schema["additionalProperties"], found);
    }
}
