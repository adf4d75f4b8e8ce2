//! What the images of the Dockerfile are made of, as far as that can be seen without Docker: the entry points are the programs,
//! and a Debian with the packages of the node's image has every program that a node runs.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use berth_e2e::ours::NODE;
use serde_json::Value;

use super::helm::{items, text};
use super::read;

/// What `berth-node` and the device library run beside what a preflight looks for.
const RUN: [&str; 8] =
    ["dd", "lvm", "qemu-nbd", "resize2fs", "thin_delta", "thin_dump", "umount", "xfs_growfs"];

/// Each target that the chart starts is there, last in its stage is the program, and containers name no other.
pub fn entry_points_are_the_programs() -> anyhow::Result<()> {
    let file = read("Dockerfile")?;
    for (target, program) in [("operator", "berth-operator"), ("node", "berth-node")] {
        let stage = stage(&file, target)?;
        let entry = format!(r#"ENTRYPOINT ["/usr/bin/{program}"]"#);
        ensure!(stage.trim_end().ends_with(&entry), "{target} does not start {program}");
        ensure!(stage.contains(&format!("/src/target/release/{program} /usr/bin/{program}")), "{target}");
    }
    ensure!(stage(&file, "operator")?.contains("USER 65532:65532"), "the operator's image is root's");
    let toolchain = read("rust-toolchain.toml")?;
    let built_by = file.lines().find_map(|line| line.strip_prefix("FROM rust:")?.split('-').next());
    let version = built_by.context("no stage that builds")?;
    ensure!(toolchain.contains(&format!("channel = \"{version}.")), "built by Rust {version}: {toolchain}");
    Ok(())
}

/// What follows `FROM … AS <target>`, up to the next stage.
fn stage<'a>(file: &'a str, target: &str) -> anyhow::Result<&'a str> {
    let (_, rest) =
        file.split_once(&format!(" AS {target}\n")).with_context(|| format!("no stage {target}"))?;
    let end = rest.find("\n\n#").unwrap_or(rest.len());
    Ok(&rest[..end])
}

/// Makes a Debian with the packages of the node's image, and looks in it for all that a node runs.
pub fn the_node_image_has_what_a_node_runs() -> anyhow::Result<()> {
    let file = read("Dockerfile")?;
    let suite = file.lines().find_map(|line| line.strip_prefix("FROM debian:")?.split_once("-slim AS node"));
    let suite = suite.context("the node's image is no Debian")?.0;
    let packages: Vec<&str> = stage(&file, "node")?
        .lines()
        .filter_map(|line| line.strip_prefix("      ")?.strip_suffix(" \\"))
        .collect();
    ensure!(packages.len() > 5, "packages {packages:?}");
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("root");
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=minbase", "--mode=root"])
        .arg(format!("--include={}", packages.join(",")));
    good(&make.arg(suite).arg(&root).output()?).context("mmdebstrap")?;
    std::fs::copy(NODE.obtain()?, root.join("usr/bin/berth-node"))?;
    for program in RUN {
        good(&inside(&root, &["sh", "-c", &format!("command -v {program}")])?).context(program)?;
    }
    let preflight = inside(&root, &["berth-node", "preflight", "-o", "json"])?;
    let preflight: Value = serde_json::from_slice(&preflight.stdout).context("the preflight says nothing")?;
    let checks = items(&preflight["checks"]);
    for name in ["mkfs.xfs", "mkfs.ext4", "qemu-img"] {
        let check = checks.iter().find(|check| check["name"] == name).context(name)?;
        ensure!(check["ok"] == true, "{check}");
    }
    for check in checks {
        ensure!(!text(&check["detail"]).contains("is not installed"), "{check}");
    }
    println!("image: {suite} with {} packages", packages.len());
    Ok(())
}

fn inside(root: &Path, words: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new("chroot");
    command.arg(root).args(words).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.output().context("chroot")
}

fn good(output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}
