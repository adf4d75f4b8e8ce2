//! The programs that are measured.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::Profile;

/// Programs of others, and the Debian packages that have them.
const NEEDED: &[(&str, &str)] = &[
    ("casync", "casync"),
    ("cmp", "diffutils"),
    ("curl", "curl"),
    ("qemu-img", "qemu-utils"),
    (TIME, "time"),
    ("timeout", "coreutils"),
    ("zstd", "zstd"),
];

/// GNU time: the shell's own tells no memory.
pub const TIME: &str = "/usr/bin/time";

/// Our programs.
pub struct Ours {
    /// `berth-node`.
    pub node: PathBuf,
    /// The S3 test server.
    pub s3: PathBuf,
}

/// Names everything that is missing, at once.
pub fn check() -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing = missing(NEEDED, &std::env::split_paths(&path).collect::<Vec<_>>());
    ensure!(
        missing.is_empty(),
        "not measured, because programs are missing: apt-get install {}",
        missing.join(" ")
    );
    Ok(())
}

fn missing(needed: &[(&str, &'static str)], path: &[PathBuf]) -> Vec<&'static str> {
    // Joining an absolute path gives that path.
    let present = |program: &str| path.iter().any(|dir| dir.join(program).is_file());
    needed.iter().filter(|(program, _)| !present(program)).map(|(_, package)| *package).collect()
}

/// Builds `berth-node` and the test server.
pub fn build(root: &Path, profile: Profile) -> anyhow::Result<Ours> {
    let status = cargo(root)
        .args(["build", "--profile", profile.cargo_name()])
        .args(["--package", "berth-node", "--bin", "berth-node"])
        .args(["--package", "berth-testkit", "--bin", "berth-test-s3"])
        .status()
        .context("running cargo build")?;
    if !status.success() {
        bail!("berth-node and its test server do not build: {status}");
    }
    let folder = target(root)?.join(profile.folder());
    Ok(Ours { node: folder.join("berth-node"), s3: folder.join("berth-test-s3") })
}

pub fn target(root: &Path) -> anyhow::Result<PathBuf> {
    let args = ["metadata", "--format-version", "1", "--no-deps"];
    let output = cargo(root).args(args).output().context("running cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("reading cargo's metadata")?;
    Ok(metadata["target_directory"].as_str().context("cargo names no target directory")?.into())
}

pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_missing_programs_are_named() {
        let path = ["/nowhere".into(), "/bin".into(), "/usr/bin".into()];
        let needed =
            [("sh", "dash"), ("no-such-program", "some-package"), ("/no/such/file", "other-package")];
        assert_eq!(missing(&needed, &path), ["some-package", "other-package"]);
    }
}
