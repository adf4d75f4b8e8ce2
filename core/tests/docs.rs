//! The documentation says what the code does: its table of states is the code's, every test that it names exists, every
//! link leads somewhere, and the words are the right ones.

#![allow(clippy::disallowed_methods)] // no decision: a test that reads the repository

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use berth_core::image::StagedState;
use berth_core::states::{Machine, table};
use berth_core::transfer::TransferKind;
use berth_core::view::{ReservationState, TransferState};

const SEMANTICS: &str = include_str!("../../docs/semantics.md");
const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// A link of a page: what it says, and where it leads.
struct Link {
    page: PathBuf,
    text: String,
    target: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate of the workspace").to_owned()
}

/// Every file below `dir` with this extension, in order.
fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).expect("a folder of the repository").flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn pages() -> Vec<PathBuf> {
    let top =
        ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md"].map(|name| root().join(name));
    top.into_iter().chain(files(&root().join("docs"), "md")).collect()
}

/// The links of a page, `[text](target)` and `[text][label]`, outside of code blocks.
fn links(page: &Path) -> Vec<Link> {
    let text = read(page);
    let mut fenced = false;
    let prose: Vec<&str> = text
        .lines()
        .filter(|line| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fenced && !fence
        })
        .collect();
    let label = |line: &&str| {
        let (label, target) = line.strip_prefix('[')?.split_once("]: ")?;
        Some((label.to_owned(), target.trim().to_owned()))
    };
    let labels: BTreeMap<String, String> = prose.iter().filter_map(label).collect();
    prose.iter().filter(|line| label(line).is_none()).flat_map(|line| links_in(page, line, &labels)).collect()
}

fn links_in(page: &Path, line: &str, labels: &BTreeMap<String, String>) -> Vec<Link> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some((text, after)) = rest.split_once('[').and_then(|(_, inner)| inner.split_once(']')) {
        rest = after;
        let target =
            if let Some((target, _)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
                target.to_owned()
            } else if let Some((label, _)) = after.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
                let target = labels.get(label);
                target.unwrap_or_else(|| panic!("{}: no target for [{label}]", page.display())).clone()
            } else {
                continue;
            };
        found.push(Link { page: page.to_owned(), text: text.to_owned(), target });
    }
    found
}

impl Link {
    /// The file that it leads to, if it leads to one.
    fn file(&self) -> Option<PathBuf> {
        let path = self.target.split('#').next().unwrap_or_default();
        let outside = self.target.contains("://") || path.is_empty();
        (!outside).then(|| self.page.parent().expect("a page lies in a folder").join(path))
    }

    fn at(&self) -> String {
        format!("{}: [{}]({})", self.page.display(), self.text, self.target)
    }
}

#[test]
fn the_table_of_states_is_the_codes() {
    has_table(&table::<ReservationState>(), "## Reservations");
    has_table(&TransferKind::Import.table(), "## Imports");
    has_table(&TransferKind::Transfer.table(), "## Transfers");
    has_table(&table::<StagedState>(), "## Staged images");
}

/// The part of the page that begins with this heading has the table of these states, and no other of the same states.
fn has_table(table: &str, heading: &str) {
    let part = SEMANTICS.split(heading).nth(1).and_then(|rest| rest.split("\n## ").next());
    let part = part.unwrap_or_else(|| panic!("no part {heading}"));
    assert!(part.contains(table), "{heading} of docs/semantics.md lacks:\n{table}");
    assert_eq!(
        part.matches("| state | ").count(),
        1 + part.matches("| state | means |").count(),
        "{heading}"
    );
}

#[test]
fn every_state_of_an_import_and_of_a_transfer_is_explained() {
    for (kind, heading) in [(TransferKind::Import, "## Imports"), (TransferKind::Transfer, "## Transfers")] {
        let part = SEMANTICS.split(heading).nth(1).expect("it has a part of its own");
        for name in TransferState::STATES.iter().filter_map(|state| kind.name_of(*state)) {
            assert!(part.contains(&format!("\n| `{name}` | ")), "{name}");
        }
    }
}

#[test]
fn every_link_leads_to_a_file() {
    let mut checked = 0;
    for link in pages().iter().flat_map(|page| links(page)) {
        let Some(file) = link.file() else { continue };
        assert!(file.exists(), "{}", link.at());
        checked += 1;
    }
    assert!(checked > 100, "only {checked} links were found");
}

#[test]
fn every_test_that_is_named_exists() {
    let mut checked = 0;
    for link in pages().iter().flat_map(|page| links(page)) {
        let (Some((_, name)), Some(file)) = (link.text.rsplit_once("::"), link.file()) else { continue };
        let code = read(&file);
        let scenario = file.components().any(|part| part.as_os_str() == "suite");
        let there = if scenario {
            let flat: String = code.split_whitespace().collect();
            ["Scenario::new", "scenario"]
                .iter()
                .any(|make| flat.contains(&format!("{make}(\"{}\",", link.text)))
        } else {
            let tests = ["#[test]", "#[tokio::test", "proptest!"].iter().any(|mark| code.contains(mark));
            tests && code.contains(&format!("fn {name}("))
        };
        assert!(there, "no such test: {}", link.at());
        checked += 1;
    }
    assert!(checked > 100, "only {checked} tests are named");
}

#[test]
fn every_row_of_the_requirements_names_a_test_or_what_is_missing() {
    let text = read(&root().join("docs/requirements.md"));
    let (works, missing) = text.split_once("## Not yet").expect("both parts are there");
    let rows = |part: &str| -> Vec<String> {
        part.lines()
            .filter(|line| line.starts_with("| A") || line.starts_with("| B") || line.starts_with("| D"))
            .map(str::to_owned)
            .collect()
    };
    for row in rows(works) {
        assert!(row.contains("::"), "no test in: {row}");
    }
    assert!(!rows(works).is_empty());
    for row in rows(missing) {
        assert!(
            row.split('|').nth(3).is_some_and(|cell| cell.trim().len() > 10),
            "nothing is said to be missing in: {row}"
        );
    }
}

/// Concerns about bounded staging that this version answers.
const ANSWERED: &[u32] = &[43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 56, 57, 60, 61, 63];

#[test]
fn every_concern_that_is_answered_has_a_test_that_is_named_after_it() {
    let page = root().join("docs/requirements.md");
    let text = read(&page);
    for number in ANSWERED {
        let row = text.lines().find(|line| line.starts_with(&format!("| A{number} |")));
        let row = row.unwrap_or_else(|| panic!("no row of A{number}"));
        assert!(row.contains(&format!("::a{number}_")), "no test is named after it: {row}");
    }
}

#[test]
fn every_setting_is_documented_and_no_other() {
    let settings = |text: &str| -> Vec<String> {
        let words = text.split(|c: char| !(c.is_ascii_uppercase() || c == '_'));
        let mut found: Vec<String> =
            words.filter(|word| word.starts_with("BERTH_")).map(str::to_owned).collect();
        found.sort();
        found.dedup();
        found
    };
    let commands =
        ["object_store.rs", "template/import.rs"].map(|file| format!("csi-node/src/commands/{file}"));
    let files =
        ["operator/src/args.rs", "csi-node/src/args.rs"].map(str::to_owned).into_iter().chain(commands);
    let code: String = files.map(|file| read(&root().join(file))).collect();
    let known: Vec<String> = settings(&code).into_iter().filter(|name| name != "BERTH_SABOTAGE").collect();
    assert!(known.len() > 8, "{known:?}");
    assert_eq!(settings(OPERATIONS), known);
}

#[test]
fn a_pool_is_never_called_what_it_is_not() {
    // What tools keep in the user's folder has that name; nothing of ours has.
    let foreign = ["~/.cache", "XDG_CACHE_HOME"];
    let word = ["ca", "che"].concat();
    let mut texts = pages();
    for (folder, extension) in [("crds", "yaml"), ("api", "rs"), ("examples", "yaml")] {
        texts.extend(files(&root().join(folder), extension));
    }
    for path in texts {
        let mut text = read(&path);
        for name in foreign {
            text = text.replace(name, "");
        }
        let line = text.lines().find(|line| line.to_lowercase().contains(&word));
        assert_eq!(line, None, "{}", path.display());
    }
}

#[test]
fn kinds_have_names_that_nobody_else_has() {
    const TAKEN: &[&str] = &[
        "PersistentVolume",
        "PersistentVolumeClaim",
        "Volume",
        "VolumeSnapshot",
        "VolumeSnapshotContent",
        "VolumeAttachment",
        "StorageClass",
        "Image",
        "ImageStream",
        "ImageVolume",
        "DataVolume",
        "DataSource",
        "DataImportCron",
        "StorageProfile",
        "VirtualMachine",
        "VirtualMachineSnapshot",
        "VirtualMachineExport",
        "VirtualDisk",
        "Snapshot",
        "Backup",
        "pv",
        "pvc",
        "vol",
        "vs",
        "vsc",
        "sc",
        "dv",
        "das",
        "dic",
        "vm",
        "vmi",
        "vms",
        "no",
        "po",
    ];
    let mut kinds = 0;
    for path in files(&root().join("crds"), "yaml") {
        let text = read(&path);
        let mut lines = text.lines().map(str::trim);
        let kind = lines
            .by_ref()
            .find_map(|line| line.strip_prefix("kind: ").filter(|kind| *kind != "CustomResourceDefinition"));
        let short = lines
            .skip_while(|line| !line.starts_with("shortNames:"))
            .nth(1)
            .and_then(|line| line.strip_prefix("- "));
        let (kind, short) = (kind.expect("a kind"), short.expect("a short name"));
        assert!(!TAKEN.contains(&kind) && !TAKEN.contains(&short), "{}: {kind} {short}", path.display());
        kinds += 1;
    }
    assert_eq!(kinds, 8);
}
