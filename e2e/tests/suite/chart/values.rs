//! Every value is documented, known to the schema, and does something; other values are refused.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::helm::{Helm, chart};
use super::read;

/// A row of `shown.yaml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shown {
    run: u32,
    path: String,
    value: Value,
    #[serde(default)]
    shows: Option<String>,
    #[serde(default)]
    hides: Option<String>,
}

/// A row of `refused.yaml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Refused {
    values: Value,
    names: String,
}

/// Each value of `values.yaml` has a comment and a row of `shown.yaml`, and what the row says comes true.
pub fn every_value_is_documented_and_does_something() -> anyhow::Result<()> {
    let page = read("charts/berth/values.yaml")?;
    let values: Value = serde_saphyr::from_str(&page)?;
    let rows: Vec<Shown> = serde_saphyr::from_str(&read("e2e/manifests/chart/shown.yaml")?)?;
    let mut leaves = Vec::new();
    collect(&values, "", &mut leaves);
    for leaf in &leaves {
        let within = |row: &Shown| leaf == &row.path || leaf.starts_with(&format!("{}.", row.path));
        ensure!(rows.iter().any(within), "no row of shown.yaml is about {leaf}");
    }
    documented(&page)?;
    let helm = Helm::new()?;
    let defaults = helm.template("{}")?.text;
    let mut runs: BTreeMap<u32, Value> = BTreeMap::new();
    for row in &rows {
        set(runs.entry(row.run).or_insert_with(|| json!({})), &row.path, row.value.clone());
    }
    for (run, values) in &runs {
        let changed =
            helm.template(&serde_json::to_string(values)?).with_context(|| format!("run {run}"))?.text;
        for row in rows.iter().filter(|row| row.run == *run) {
            for (wanted, has, lacks) in [(&row.shows, &changed, &defaults), (&row.hides, &defaults, &changed)]
            {
                let Some(wanted) = wanted else { continue };
                ensure!(has.contains(wanted), "{}: `{wanted}` is not there", row.path);
                ensure!(!lacks.contains(wanted), "{}: `{wanted}` is there in any case", row.path);
            }
            ensure!(row.shows.is_some() != row.hides.is_some(), "{}: either shows or hides", row.path);
        }
    }
    println!("values: {} leaves, {} rows", leaves.len(), rows.len());
    Ok(())
}

/// The paths of all values that are no groups of values; what may hold anything is one value.
fn collect(value: &Value, path: &str, leaves: &mut Vec<String>) {
    match value.as_object().filter(|fields| !fields.is_empty() && !path.ends_with("esources")) {
        Some(fields) => {
            for (name, inner) in fields {
                let inner_path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect(inner, &inner_path, leaves);
            }
        }
        None => leaves.push(path.to_owned()),
    }
}

/// In front of each value, or of the first of some that stand together, is a comment; groups of values need none.
fn documented(page: &str) -> anyhow::Result<()> {
    let mut before = "";
    for line in page.lines() {
        let comment = |text: &str| text.trim_start().starts_with('#');
        let group = line.trim_end().ends_with(':') || line.trim_start().starts_with("requests:");
        let below = before.trim_end().ends_with(':') && !group;
        let item = line.trim_start().starts_with("- ") || line.trim_start().starts_with("limits:");
        let together = !line.is_empty() && !before.is_empty() && !comment(before) && !below;
        ensure!(
            comment(line) || comment(before) || line.is_empty() || group || item || together,
            "no comment says what this is: {line}"
        );
        before = line;
    }
    Ok(())
}

/// Sets the value at a path.
fn set(values: &mut Value, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            if let Some(fields) = values.as_object_mut() {
                fields.insert(path.to_owned(), value);
            }
        }
        Some((first, rest)) => {
            let fields = values
                .as_object_mut()
                .map(|fields| fields.entry(first).or_insert_with(|| Value::Object(Map::new())));
            if let Some(inner) = fields {
                set(inner, rest, value);
            }
        }
    }
}

/// Every row of `refused.yaml` is refused with the value's name, and so is another namespace.
pub fn wrong_values_are_refused() -> anyhow::Result<()> {
    let helm = Helm::new()?;
    let rows: Vec<Refused> = serde_saphyr::from_str(&read("e2e/manifests/chart/refused.yaml")?)?;
    for row in &rows {
        let Err(refusal) = helm.template(&serde_json::to_string(&row.values)?) else {
            anyhow::bail!("{} was taken", row.values);
        };
        let said = refusal.to_string();
        ensure!(said.contains("schema") && said.contains(&row.names), "{}: {said}", row.values);
    }
    let elsewhere = helm.run_in("elsewhere", &["template", "berth", &chart()], "{}")?;
    let said = String::from_utf8_lossy(&elsewhere.stderr);
    ensure!(!elsewhere.status.success() && said.contains("berth-system"), "another namespace: {said}");
    println!("values: {} refused", rows.len());
    Ok(())
}
