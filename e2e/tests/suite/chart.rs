//! The Helm chart: what it renders is what the programs take, what the repository says elsewhere, and what an API server accepts.

mod containers;
mod helm;
mod image;
mod installed;
mod provisioner;
mod same;
mod values;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use berth_e2e::ours::{NODE, OPERATOR};
use berth_e2e::tools::Tool;

use crate::scenario::{CONTROL_PLANE, Need, Scenario};

/// Sets of values that lead through every branch of the templates.
const SETS: [&str; 3] = ["defaults", "everything", "alone"];

/// Dozens of refusals, each by a process of its own.
const LIMIT: Duration = Duration::from_secs(600);

/// The scenarios of this file.
pub fn scenarios() -> Vec<Scenario> {
    let helm = [Need::Tool(Tool::Helm)];
    let programs = [helm.as_slice(), &[Need::Program(OPERATOR), Need::Program(NODE)]].concat();
    let cluster = [helm.as_slice(), CONTROL_PLANE].concat();
    let site = [Need::SITE, helm.as_slice(), &[Need::Tool(Tool::CsiProvisioner)]].concat();
    let image =
        [Need::Long, Need::Site, Need::Command("mmdebstrap"), Need::Command("chroot"), Need::Program(NODE)];
    vec![
        Scenario::new("chart::command_lines_are_what_the_programs_take", &programs, || async {
            containers::command_lines_are_what_the_programs_take()
        }),
        Scenario::new("chart::pods_are_whole", &helm, || async { containers::pods_are_whole() }),
        Scenario::new("chart::says_what_the_repository_says", &helm, || async {
            same::says_what_the_repository_says()
        }),
        Scenario::new("chart::the_dashboard_shows_metrics_that_exist", &[], || async {
            same::the_dashboard_shows_metrics_that_exist()
        }),
        Scenario::new("chart::every_value_is_documented_and_does_something", &helm, || async {
            values::every_value_is_documented_and_does_something()
        })
        .limited(LIMIT),
        Scenario::new("chart::wrong_values_are_refused", &helm, || async {
            values::wrong_values_are_refused()
        })
        .limited(LIMIT),
        Scenario::new(
            "chart::installed_upgraded_and_guarded",
            &cluster,
            installed::installed_upgraded_and_guarded,
        )
        .limited(LIMIT),
        Scenario::new(
            "chart::pods_pass_the_levels_of_pod_security",
            &cluster,
            installed::pods_pass_their_level,
        )
        .limited(LIMIT),
        Scenario::new("chart::claims_become_volumes_by_its_sidecar_and_its_rights", &site, || async {
            provisioner::claims_become_volumes().await
        })
        .limited(LIMIT),
        Scenario::new("chart::entry_points_are_the_programs", &[], || async {
            image::entry_points_are_the_programs()
        }),
        Scenario::new("chart::the_node_image_has_what_a_node_runs", &image, || async {
            image::the_node_image_has_what_a_node_runs()
        })
        .limited(LIMIT),
    ]
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

fn read(path: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(repository().join(path)).with_context(|| format!("reading {path}"))
}
