//! `kubectl berth doctor`: what keeps Berth from working, what that means, and what to do about it.

mod cluster;
mod examine;
mod finding;
mod leases;
mod nodes;
mod stores;

use std::process::ExitCode;

use kube::Client;
use serde_json::{Value, json};

use crate::args::{DoctorArgs, Output};
use crate::observe::{Scope, Seen};
use crate::text::{count, wrapped};
use examine::{Examined, chain, examine};
use finding::{Finding, Level};

/// Looks, prints the findings, and says by its code whether something is broken.
///
/// # Errors
/// None: an API server that does not answer is a finding too.
pub async fn run(client: &Client, scope: &Scope, args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let findings = match examine(client, scope).await {
        Ok(examined) => judge(&examined, args.node.as_deref()),
        Err(error) => vec![Finding::fail(
            "api-server",
            None,
            chain(&error),
            "Nothing else can be looked at.",
            "See whether `kubectl version` works with the same kubeconfig and context.",
        )],
    };
    match args.output {
        Output::Table => print!("{}", as_text(&findings, args.all)),
        Output::Json => println!("{:#}", as_json(&findings)),
    }
    let broken = findings.iter().any(|finding| finding.level == Level::Fail);
    Ok(if broken { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// Everything there is to say, in the order in which one thing needs another.
fn judge(examined: &Examined, only: Option<&str>) -> Vec<Finding> {
    let mut findings = cluster::server(examined);
    findings.extend(cluster::definitions(&examined.definitions));
    findings.push(cluster::namespace(&examined.system_namespace, &examined.namespace));
    match &examined.seen {
        Err(why) => findings.push(Finding::fail(
            "objects",
            None,
            why,
            "Nodes, pools, ledgers and stores were not looked at.",
            "Install the definitions, or ask as somebody who may read all kinds of staging.berth.dev.",
        )),
        Ok(seen) => findings.extend(of_objects(seen, examined, only)),
    }
    findings
}

fn of_objects(seen: &Seen, examined: &Examined, only: Option<&str>) -> Vec<Finding> {
    let view = seen.view();
    let mut findings = vec![cluster::operator(seen, examined)];
    findings.extend(nodes::nodes(seen, &view, only, examined.server.now));
    findings.extend(stores::stores(seen, only));
    findings.extend(seen.unreadable.iter().map(|bad| {
        Finding::fail(
            "objects",
            Some(format!("{} {}", bad.kind, bad.name)),
            format!("it cannot be read: {}", bad.problem),
            "Berth does nothing with it.",
            "Repair or delete it.",
        )
    }));
    findings
}

fn as_text(findings: &[Finding], all: bool) -> String {
    let mut text = String::new();
    for finding in findings.iter().filter(|finding| all || finding.level > Level::Ok) {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let object = finding.object.as_ref().map(|object| format!("{object}: ")).unwrap_or_default();
        let head = format!("{level:<5}{:<13}", finding.check);
        text.push_str(&wrapped(&head, &format!("{object}{}", finding.found)));
        let indent = " ".repeat(head.len());
        if !finding.means.is_empty() {
            text.push_str(&wrapped(&indent, &finding.means));
        }
        if !finding.fix.is_empty() {
            text.push_str(&wrapped(&format!("{indent}-> "), &finding.fix));
        }
    }
    let of = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (ok, warn, fail) = (of(Level::Ok), of(Level::Warn), of(Level::Fail));
    text + &format!("{} in order, {}, {fail} broken\n", count(ok, "check"), count(warn, "warning"))
}

fn as_json(findings: &[Finding]) -> Value {
    let broken = findings.iter().any(|finding| finding.level == Level::Fail);
    json!({"ok": !broken, "findings": findings})
}

#[cfg(test)]
mod tests;
