//! csi-sanity, the conformance tests of the Container Storage Interface (`kubernetes-csi/csi-test`), run against the
//! plugin of a node, and what its report says.
//!
//! A test that csi-sanity skips counts as a failure unless it is explained: by a capability that the plugin does not
//! declare, and that is looked up, not believed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use crate::csi::{Capabilities, View};
use crate::process::Program;
use crate::site::{SiteError, SiteNode, Started};
use crate::wait::{self, Look, WaitError};

/// How long one run may take on a busy machine. On an idle one it takes 5 s.
const RUN_LIMIT: Duration = Duration::from_secs(240);

/// The size of its volumes. Unit: bytes.
const VOLUME_BYTES: u64 = 64 << 20;

/// The size that they grow to. What csi-sanity asks for by itself is more than the pool has. Unit: bytes.
const GROWN_BYTES: u64 = 96 << 20;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum SanityError {
    /// A file or folder of the run.
    #[error("failed to {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It could not be started.
    #[error(transparent)]
    Start(#[from] SiteError),
    /// It has not ended.
    #[error("csi-sanity does not end; end of its log:\n{log_tail}")]
    Late {
        /// The end of its log.
        log_tail: String,
        /// How long it was waited for.
        source: WaitError<io::Error>,
    },
    /// It ended without a report that is understood.
    #[error("report {path} is not understood; end of the log:\n{log_tail}")]
    Report {
        /// The report.
        path: PathBuf,
        /// The end of its log.
        log_tail: String,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// The capability for want of which csi-sanity skips a test, by its name in the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Of the plugin as a whole.
    Plugin(&'static str),
    /// Of the controller service.
    Controller(&'static str),
    /// Of the node service.
    Node(&'static str),
}

impl Needs {
    fn is_declared(self, declared: &Capabilities) -> bool {
        match self {
            Self::Plugin(name) => declared.plugin.contains(name),
            Self::Controller(name) => declared.controller.contains(name),
            Self::Node(name) => declared.node.contains(name),
        }
    }
}

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// As it should.
    Passed,
    /// In whatever other way.
    Failed,
    /// It was not run.
    Skipped,
}

/// One test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// Its name, with those of its groups before it.
    pub name: String,
    /// How it ended.
    pub ending: Ending,
    /// What csi-sanity says of that.
    pub message: String,
}

/// What one run has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Its tests, in the order of the report.
    pub tests: Vec<Test>,
    /// True if the run as a whole went well.
    pub succeeded: bool,
}

impl Report {
    /// How many tests ended so.
    pub fn count(&self, ending: Ending) -> usize {
        self.tests.iter().filter(|test| test.ending == ending).count()
    }

    /// All that is wrong: each test that failed; each that was skipped though no row of `explained` (the start of its
    /// name, and what it needs) says why, or though the plugin declares what it needs; and each row that explains nothing.
    pub fn problems(&self, explained: &[(&str, Needs)], declared: &Capabilities) -> Vec<String> {
        let mut problems: Vec<String> = self
            .tests
            .iter()
            .filter_map(|test| {
                let row = explained.iter().find(|(start, _)| test.name.starts_with(start));
                match (test.ending, row) {
                    (Ending::Passed, _) => None,
                    (Ending::Failed, _) => Some(format!("failed: {}: {}", test.name, test.message)),
                    (Ending::Skipped, Some((_, needs))) if !needs.is_declared(declared) => None,
                    (Ending::Skipped, Some((_, needs))) => Some(format!(
                        "skipped, though {needs:?} is declared: {}: {}",
                        test.name, test.message
                    )),
                    (Ending::Skipped, None) => Some(format!("skipped: {}: {}", test.name, test.message)),
                }
            })
            .collect();
        for (start, _) in explained {
            let used = |test: &Test| test.ending == Ending::Skipped && test.name.starts_with(start);
            if !self.tests.iter().any(used) {
                problems.push(format!("nothing was skipped that starts with `{start}`"));
            }
        }
        if self.count(Ending::Passed) == 0 {
            problems.push("nothing passed".to_owned());
        }
        if problems.is_empty() && !self.succeeded {
            problems.push("the run as a whole failed".to_owned());
        }
        problems
    }
}

/// Runs the program on `node` against its plugin, for volumes of a class with these parameters that are used as `view`.
/// All its files lie in `dir`, which is made: a folder that the node and this machine share.
///
/// # Errors
/// [`SanityError`]; tests that fail are in the report.
pub async fn run(
    program: &Path,
    node: &SiteNode,
    dir: &Path,
    view: View,
    parameters: &[(&str, &str)],
) -> Result<Report, SanityError> {
    let file = |action, path: &Path| {
        let path = path.to_owned();
        move |source| SanityError::File { action, path, source }
    };
    fs::create_dir_all(dir).map_err(file("make", dir))?;
    let (class, report) = (dir.join("class.yaml"), dir.join("report.json"));
    let parameters = parameters.iter().map(|(key, value)| ((*key).to_owned(), json!(value)));
    // JSON is YAML.
    let parameters = serde_json::Value::Object(parameters.collect()).to_string();
    fs::write(&class, parameters).map_err(file("write", &class))?;
    let flag = |name: &str, value: &Path| format!("--{name}={}", value.display());
    let access = if view == View::Block { "block" } else { "mount" };
    let sanity = Program::new("csi-sanity", program, &dir.join("log"))
        .args([format!("--csi.endpoint=unix://{}", node.csi_socket().display())])
        .args([flag("csi.mountdir", &dir.join("target")), flag("csi.stagingdir", &dir.join("staging"))])
        .args([flag("csi.testvolumeparameters", &class), format!("--csi.testvolumesize={VOLUME_BYTES}")])
        .args([format!("--csi.testvolumeexpandsize={GROWN_BYTES}")])
        .args([format!("--csi.testvolumeaccesstype={access}"), flag("ginkgo.json-report", &report)])
        .args(["--ginkgo.no-color"]);
    let started = node.start_program(&sanity)?;
    wait_for_end(&started).await?;
    let text = fs::read(&report).map_err(file("read", &report))?;
    parse(&text).map_err(|source| SanityError::Report { path: report, log_tail: started.log_tail(), source })
}

async fn wait_for_end(process: &Started) -> Result<(), SanityError> {
    let ended = wait::until("csi-sanity to end", RUN_LIMIT, || {
        std::future::ready(if process.is_running() {
            Look::NotYet("it runs".to_owned())
        } else {
            Look::Done(())
        })
    });
    ended.await.map_err(|source| SanityError::Late { log_tail: process.log_tail(), source })
}

/// A suite in the report of the test framework (Ginkgo 2, `types.Report`).
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    suite_succeeded: bool,
    spec_reports: Vec<Spec>,
}

/// A test or a step around tests in it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Failure {
    message: String,
}

fn parse(text: &[u8]) -> Result<Report, serde_json::Error> {
    let suites: Vec<Suite> = serde_json::from_slice(text)?;
    let succeeded = !suites.is_empty() && suites.iter().all(|suite| suite.suite_succeeded);
    let specs = suites.into_iter().flat_map(|suite| suite.spec_reports);
    let tests = specs.filter_map(|spec| {
        let ending = match spec.state.as_str() {
            "passed" => Ending::Passed,
            "skipped" | "pending" => Ending::Skipped,
            _ => Ending::Failed,
        };
        // What goes wrong around tests counts too.
        let counts = spec.leaf_node_type == "It" || ending == Ending::Failed;
        let name = [spec.container_hierarchy_texts.unwrap_or_default(), vec![spec.leaf_node_text]]
            .concat()
            .join(" ");
        counts.then_some(Test { name, ending, message: spec.failure.message })
    });
    Ok(Report { tests: tests.collect(), succeeded })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the framework writes it, without the fields that are not read.
    const REPORT: &str = r#"[{"SuiteSucceeded": true, "SpecReports": [
        {"ContainerHierarchyTexts": null, "LeafNodeType": "BeforeSuite", "LeafNodeText": "", "State": "passed"},
        {"ContainerHierarchyTexts": ["Node", "Stage"], "LeafNodeType": "It", "LeafNodeText": "works", "State": "passed"},
        {"ContainerHierarchyTexts": ["Node", "Expand"], "LeafNodeType": "It", "LeafNodeText": "works",
            "State": "skipped", "Failure": {"Message": "NodeExpandVolume not supported"}},
        {"ContainerHierarchyTexts": ["Node", "Expand"], "LeafNodeType": "It", "LeafNodeText": "pages", "State": "pending"}
    ]}]"#;
    const EXPLAINED: &[(&str, Needs)] = &[("Node Expand ", Needs::Node("EXPAND_VOLUME"))];

    fn report(edit: impl Fn(&str) -> String) -> Report {
        parse(edit(REPORT).as_bytes()).unwrap()
    }

    fn problems(report: &Report, explained: &[(&str, Needs)]) -> String {
        report.problems(explained, &Capabilities::default()).join("; ")
    }

    #[test]
    fn what_is_explained_is_no_problem() {
        let report = report(str::to_owned);
        let counts = [Ending::Passed, Ending::Failed, Ending::Skipped].map(|ending| report.count(ending));
        assert_eq!(counts, [1, 0, 2]);
        assert_eq!(problems(&report, EXPLAINED), "");
    }

    #[test]
    fn a_failure_of_a_test_or_around_one_is() {
        for state in ["failed", "panicked", "timedout", "aborted", "interrupted", "new"] {
            let failed = report(|text| text.replacen("\"passed\"", &format!("\"{state}\""), 1));
            assert_eq!(failed.count(Ending::Failed), 1, "{state}");
            assert!(problems(&failed, EXPLAINED).contains("failed"), "{state}");
        }
        let whole = report(|text| text.replace("true", "false"));
        assert_eq!(problems(&whole, EXPLAINED), "the run as a whole failed");
        assert!(problems(&parse(b"[]").unwrap(), &[]).contains("nothing passed"));
        assert!(parse(b"").is_err());
    }

    #[test]
    fn a_skip_that_is_not_explained_is_and_an_explanation_of_nothing() {
        let report = report(str::to_owned);
        assert!(
            problems(&report, &[]).contains("skipped: Node Expand works: NodeExpandVolume not supported")
        );
        let declared = Capabilities { node: ["EXPAND_VOLUME"].into(), ..Capabilities::default() };
        let found = report.problems(EXPLAINED, &declared);
        assert!(found.len() == 2 && found[0].contains("is declared"), "{found:?}");
        let more = [EXPLAINED, &[("Node Stage ", Needs::Plugin("X"))]].concat();
        assert_eq!(problems(&report, &more), "nothing was skipped that starts with `Node Stage `");
    }
}
