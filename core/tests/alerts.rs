//! The alerting rules ask for metrics that are served, by labels that these have, and each leads to a section of the
//! runbook that exists.

use std::collections::BTreeSet;

use berth_core::metric::Metric;
use berth_core::reason::Reason;
use serde::Deserialize;

const RULES: &str = include_str!("../../charts/berth/files/alerts/berth.rules.yaml");
const OPERATIONS: &str = include_str!("../../docs/operations.md");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    name: String,
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    alert: String,
    expr: String,
    #[serde(default, rename = "for")]
    lasting: Option<String>,
    labels: Labels,
    annotations: Annotations,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    severity: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Annotations {
    summary: String,
    runbook: String,
}

fn rules() -> Vec<Rule> {
    let file: File = serde_saphyr::from_str(RULES).expect("a rule file");
    assert!(file.groups.iter().all(|group| group.name.starts_with("berth-") && !group.rules.is_empty()));
    file.groups.into_iter().flat_map(|group| group.rules).collect()
}

/// What may be part of a name.
fn is_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The metrics of Berth that an expression names.
fn metrics(expr: &str) -> Vec<Metric> {
    let names = expr.split(|c: char| !is_part(c)).filter(|word| word.starts_with("berth_"));
    let known = |name: &str| Metric::ALL.iter().find(|metric| metric.name() == name).copied();
    names.map(|name| known(name).unwrap_or_else(|| panic!("there is no metric {name}: {expr}"))).collect()
}

/// The labels in `by (…)`, `on (…)` and `{…}`.
fn labels(expr: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (open, close) in [("by (", ')'), ("on (", ')'), ("{", '}')] {
        for (_, after) in expr.match_indices(open).map(|(at, text)| expr.split_at(at + text.len())) {
            let inner = after.split(close).next().unwrap_or_default();
            let names = inner.split(',').filter_map(|part| part.trim().split(|c| !is_part(c)).next());
            found.extend(names.filter(|name| !name.is_empty()).map(str::to_owned));
        }
    }
    found
}

#[test]
fn every_metric_that_a_rule_names_is_served_with_the_labels_that_it_asks_for() {
    for Rule { alert, expr, .. } in rules() {
        let metrics = metrics(&expr);
        assert!(!metrics.is_empty(), "{alert} asks for no metric of Berth");
        // Prometheus adds `instance` to everything.
        let known: BTreeSet<&str> =
            metrics.iter().flat_map(|metric| metric.labels()).copied().chain(["instance"]).collect();
        for label in labels(&expr) {
            assert!(known.contains(label.as_str()), "{alert}: no metric in it has the label {label}");
        }
        let depth = |open, close| expr.matches(open).count() == expr.matches(close).count();
        assert!(depth('(', ')') && depth('{', '}') && depth('[', ']'), "{alert}: {expr}");
        for metric in &metrics {
            let is_counter = metric.name().ends_with("_total");
            let rated = expr.contains(&format!("increase({}", metric.name()));
            assert_eq!(
                is_counter,
                rated,
                "{alert}: a counter is asked by how much it rose, and nothing else is: {}",
                metric.name()
            );
        }
    }
}

#[test]
fn every_reason_that_a_rule_names_is_documented() {
    let mut named = 0;
    for Rule { alert, expr, .. } in rules() {
        for (_, after) in expr.match_indices("reason=~\"").map(|(at, text)| expr.split_at(at + text.len())) {
            for reason in after.split('"').next().unwrap_or_default().split('|') {
                assert!(Reason::from_name(reason).is_some(), "{alert}: there is no reason {reason}");
                named += 1;
            }
        }
    }
    assert!(named >= 4, "{named}");
}

#[test]
fn every_rule_leads_to_its_section_of_the_runbook_and_every_section_has_its_rule() {
    let rules = rules();
    let chapter = OPERATIONS.split("\n## Alerts\n").nth(1).expect("a chapter about alerts");
    let chapter = chapter.split("\n## ").next().unwrap_or_default();
    let sections: BTreeSet<&str> = chapter.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let alerts: BTreeSet<&str> = rules.iter().map(|rule| rule.alert.as_str()).collect();
    assert_eq!(alerts, sections);
    assert_eq!(alerts.len(), rules.len(), "two rules of one name");
    for Rule { alert, annotations, labels, lasting, .. } in &rules {
        assert_eq!(annotations.runbook, format!("docs/operations.md#{}", alert.to_lowercase()));
        assert!(annotations.summary.ends_with('.'), "{alert}");
        assert!(["warning", "critical"].contains(&labels.severity.as_str()), "{alert}: {}", labels.severity);
        // Only what can never be a passing state fires at once.
        assert!(lasting.is_some() || alert == "BerthSpaceDefect", "{alert}");
    }
}
