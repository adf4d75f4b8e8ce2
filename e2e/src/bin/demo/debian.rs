//! The image of the demonstration: a small Debian made of packages, as a compressed qcow2 with one ext4 partition.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use berth_e2e::image;

use crate::screen::{Screen, size};

/// The size of the disk. Unit: bytes.
const DISK_BYTES: u64 = 1 << 30;

/// What is left out of the packages.
const LEFT_OUT: [&str; 4] = ["doc", "info", "locale", "man"];

/// Returns the image, built first if `kept` has none: that takes a minute, once.
pub fn obtain(screen: &Screen, kept: &Path) -> anyhow::Result<PathBuf> {
    let suite = suite();
    let image = kept.join(format!("{suite}.qcow2"));
    if image.is_file() {
        screen.line(&format!(
            "  {} was built before ({})",
            image.display(),
            size(fs::metadata(&image)?.len())
        ));
        return Ok(image);
    }
    fs::create_dir_all(kept).with_context(|| format!("failed to make {}", kept.display()))?;
    // Below the folder of results, so that the end is a rename; gone however this ends, except by SIGKILL.
    let work = tempfile::Builder::new().prefix(".building-").tempdir_in(kept)?;
    let tree = work.path().join("tree");
    install_packages(screen, &suite, &tree, &work.path().join("log"))?;
    let step = screen.step("a disk with one partition of it, as compressed qcow2");
    let (raw, qcow2) = (work.path().join("disk.raw"), work.path().join("disk.qcow2"));
    step.says("partition table and ext4");
    image::make_disk(&raw, DISK_BYTES, &tree)?;
    step.says("qemu-img convert -c");
    image::to_qcow2(&raw, &qcow2)?;
    fs::rename(&qcow2, &image)?;
    step.done(&format!("{} in {}", size(fs::metadata(&image)?.len()), image.display()));
    Ok(image)
}

/// The release of this machine where it is one that the tool knows, else Debian 12.
fn suite() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    let known = matches!(value("ID").as_deref(), Some("debian" | "ubuntu"));
    value("VERSION_CODENAME")
        .filter(|name| known && !name.is_empty())
        .unwrap_or_else(|| "bookworm".to_owned())
}

fn install_packages(screen: &Screen, suite: &str, tree: &Path, log: &Path) -> anyhow::Result<()> {
    let step = screen.step(&format!("a minimal {suite} system from packages (once)"));
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--mode=root"]);
    command.args(LEFT_OUT.map(|part| format!("--dpkgopt=path-exclude=/usr/share/{part}/*")));
    command.arg(suite).arg(tree).stdin(Stdio::null()).stdout(File::create(log)?).stderr(Stdio::piped());
    let mut child = command.spawn().context("failed to run mmdebstrap (package mmdebstrap)")?;
    let mut last = Vec::new();
    for line in BufReader::new(child.stderr.take().context("mmdebstrap has no output")?).lines() {
        let line = line?;
        step.says(line.trim_start_matches("I: "));
        last.push(line);
    }
    let status = child.wait()?;
    let tail = last[last.len().saturating_sub(10)..].join("\n");
    let advice = "DEMO_IMAGE=PATH or DEMO_IMAGE=URL takes another image";
    ensure!(status.success(), "mmdebstrap failed ({status}); {advice}:\n{tail}");
    step.done("");
    Ok(())
}
