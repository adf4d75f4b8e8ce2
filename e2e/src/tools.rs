//! The programs of others that the tests run, those of the control plane among them: found where `KUBEBUILDER_ASSETS`
//! or `PATH` has them, else built once with Go from the modules pinned in `e2e/tools/`.
//!
//! Built programs are kept in `${XDG_CACHE_HOME:-$HOME/.cache}/berth/tools/<sha256 of go.sum>/`, outside the tree,
//! so that a changed pin builds anew and everything else reuses them. A build goes to a temporary name and is renamed
//! when complete; a lock lets one process build while others wait for it.

use std::env;
use std::fmt::{self, Display, Formatter, Write as _};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

/// Time between two lines about a build that is still running.
const PROGRESS_EVERY: Duration = Duration::from_secs(30);

/// Longest time a build may take before it is given up. The API server takes 5 minutes on two idle cores.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// A program that the tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// `kube-apiserver`.
    KubeApiserver,
    /// `etcd`.
    Etcd,
    /// `minio`.
    Minio,
    /// `csi-sanity`.
    CsiSanity,
    /// `helm`.
    Helm,
    /// `csi-provisioner`.
    CsiProvisioner,
}

/// Why a program cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ToolUnavailable {
    /// It is installed nowhere and there is no Go to build it: a test that needs it is skipped.
    #[error("{0} is neither in KUBEBUILDER_ASSETS nor on PATH, and there is no Go to build it")]
    NoGo(Tool),
    /// Its pinned module or the folder of built programs cannot be read or written.
    #[error("failed to prepare the build of {tool} at {path}")]
    Prepare {
        /// The program.
        tool: Tool,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("no folder for a built {0}: neither XDG_CACHE_HOME nor HOME is set")]
    NoHome(Tool),
    /// `go` could not be run.
    #[error("failed to run go to build {tool}")]
    Run {
        /// The program.
        tool: Tool,
        /// What the system said.
        source: io::Error,
    },
    /// Go reported an error (printed above it), or took longer than an hour.
    #[error("go did not build {tool}: {outcome}")]
    Build {
        /// The program.
        tool: Tool,
        /// How it ended.
        outcome: String,
    },
}

impl ToolUnavailable {
    /// Whether the machine merely lacks a prerequisite: the tests are skipped then; anything else is a failure.
    pub fn is_missing_prerequisite(&self) -> bool {
        matches!(self, Self::NoGo(_) | Self::NoHome(_))
    }
}

/// Where a program comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    Ready(PathBuf),
    ToBuild { module: PathBuf, target: PathBuf },
}

impl Tool {
    /// All of them, in the order in which they are built.
    pub const ALL: [Self; 6] =
        [Self::CsiSanity, Self::Etcd, Self::Minio, Self::Helm, Self::CsiProvisioner, Self::KubeApiserver];

    /// The name of its file.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::KubeApiserver => "kube-apiserver",
            Self::Etcd => "etcd",
            Self::Minio => "minio",
            Self::CsiSanity => "csi-sanity",
            Self::Helm => "helm",
            Self::CsiProvisioner => "csi-provisioner",
        }
    }

    /// The Go package to build.
    fn package(self) -> &'static str {
        match self {
            Self::KubeApiserver => "k8s.io/kubernetes/cmd/kube-apiserver",
            Self::Etcd => "go.etcd.io/etcd/server/v3",
            Self::Minio => "github.com/minio/minio",
            Self::CsiSanity => "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
            Self::Helm => "helm.sh/helm/v4/cmd/helm",
            Self::CsiProvisioner => "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
        }
    }

    /// The folder below `e2e/tools/` that pins it.
    fn module(self) -> &'static str {
        match self {
            Self::KubeApiserver => "apiserver",
            Self::Etcd => "etcd",
            Self::Minio => "minio",
            Self::CsiSanity => "csi-sanity",
            Self::Helm => "helm",
            Self::CsiProvisioner => "csi-provisioner",
        }
    }

    /// Linker flags: smaller files, and the versions that programs report.
    fn ldflags(self) -> &'static str {
        match self {
            Self::KubeApiserver => {
                "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3 \
                 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36 \
                 -X k8s.io/component-base/version.gitTreeState=clean"
            }
            Self::CsiProvisioner => "-s -w -X main.version=v6.4.0",
            Self::Helm => "-s -w -X helm.sh/helm/v4/internal/version.version=v4.3.1",
            Self::Etcd | Self::Minio | Self::CsiSanity => "-s -w",
        }
    }

    /// Returns the path of the program, building it first if need be: that takes minutes, once, with a line of
    /// progress every 30 s on standard error.
    ///
    /// # Errors
    /// [`ToolUnavailable`]; see [`ToolUnavailable::is_missing_prerequisite`] for what to skip.
    pub fn obtain(self) -> Result<PathBuf, ToolUnavailable> {
        match self.find(&Surroundings::from_env())? {
            Origin::Ready(path) => Ok(path),
            Origin::ToBuild { module, target } => build(self, &module, target),
        }
    }

    /// Looks for the program, in the order of the module's documentation.
    fn find(self, around: &Surroundings) -> Result<Origin, ToolUnavailable> {
        if let Some(path) = around.assets.iter().chain(&around.path).find_map(|dir| self.in_dir(dir)) {
            return Ok(Origin::Ready(path));
        }
        let module = around.pins.join(self.module());
        let sum = module.join("go.sum");
        let pins =
            fs::read(&sum).map_err(|source| ToolUnavailable::Prepare { tool: self, path: sum, source })?;
        let kept = around.kept.as_ref().ok_or(ToolUnavailable::NoHome(self))?;
        let target = kept.join(hex(&Sha256::digest(pins))).join(self.file_name());
        if target.is_file() {
            return Ok(Origin::Ready(target));
        }
        if !around.path.iter().any(|dir| dir.join("go").is_file()) {
            return Err(ToolUnavailable::NoGo(self));
        }
        Ok(Origin::ToBuild { module, target })
    }

    fn in_dir(self, dir: &Path) -> Option<PathBuf> {
        let path = dir.join(self.file_name());
        path.is_file().then_some(path)
    }
}

impl Display for Tool {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.file_name())
    }
}

/// Everything of the machine that decides where a program is found.
struct Surroundings {
    /// `KUBEBUILDER_ASSETS`.
    assets: Option<PathBuf>,
    /// The folders of `PATH`.
    path: Vec<PathBuf>,
    /// Where built programs are kept.
    kept: Option<PathBuf>,
    /// `e2e/tools`.
    pins: PathBuf,
}

impl Surroundings {
    fn from_env() -> Self {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let home = || set("HOME").map(|home| PathBuf::from(home).join(".cache"));
        Self {
            assets: set("KUBEBUILDER_ASSETS").map(PathBuf::from),
            path: set("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default(),
            kept: set("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|dir| dir.join("berth/tools")),
            pins: Path::new(env!("CARGO_MANIFEST_DIR")).join("tools"),
        }
    }
}

/// Builds `tool` from `module` into `target`, unless another process does so meanwhile.
fn build(tool: Tool, module: &Path, target: PathBuf) -> Result<PathBuf, ToolUnavailable> {
    let dir = target.parent().expect("a target lies in the folder of its pins");
    let prepare = |path: &Path, source| ToolUnavailable::Prepare { tool, path: path.to_owned(), source };
    fs::create_dir_all(dir).map_err(|source| prepare(dir, source))?;
    let lock_path = dir.join("lock");
    let lock = File::create(&lock_path).map_err(|source| prepare(&lock_path, source))?;
    lock.lock().map_err(|source| prepare(&lock_path, source))?;
    if target.is_file() {
        return Ok(target);
    }
    let unfinished = dir.join(format!(".{tool}.unfinished"));
    let run_error = |source| ToolUnavailable::Run { tool, source };
    let started = Instant::now();
    eprintln!("building {tool} from {} (once; some minutes)", module.display());
    let mut go = Command::new("go");
    go.current_dir(module).env("CGO_ENABLED", "0").env("GOFLAGS", "-buildvcs=false -mod=readonly");
    go.args(["build", "-ldflags", tool.ldflags(), "-o"]).arg(&unfinished).arg(tool.package());
    let mut child = go.stdin(Stdio::null()).spawn().map_err(run_error)?;
    let mut told = started;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(run_error)? {
            break status;
        }
        if started.elapsed() > BUILD_LIMIT {
            child.kill().map_err(run_error)?;
            eprintln!("{tool} is not built after {BUILD_LIMIT:?}, giving up");
        }
        if told.elapsed() > PROGRESS_EVERY {
            told = Instant::now();
            eprintln!("still building {tool} ({} s)", started.elapsed().as_secs());
        }
        thread::sleep(Duration::from_millis(200));
    };
    if !status.success() {
        return Err(ToolUnavailable::Build { tool, outcome: status.to_string() });
    }
    fs::rename(&unfinished, &target).map_err(|source| prepare(&target, source))?;
    eprintln!("built {tool} in {} s", started.elapsed().as_secs());
    Ok(target)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string never fails");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Folders `assets`, `path` and `kept` below a temporary one, and the real pins.
    fn surroundings(dir: &Path) -> Surroundings {
        for name in ["assets", "path", "kept"] {
            fs::create_dir(dir.join(name)).unwrap();
        }
        Surroundings {
            assets: Some(dir.join("assets")),
            path: vec![dir.join("path")],
            kept: Some(dir.join("kept")),
            pins: Surroundings::from_env().pins,
        }
    }

    #[test]
    fn assets_come_before_path_and_both_before_a_build() {
        let dir = tempfile::tempdir().unwrap();
        let around = surroundings(dir.path());
        let origin = Tool::Etcd.find(&around);
        assert!(matches!(origin, Err(ToolUnavailable::NoGo(Tool::Etcd))), "{origin:?}");
        fs::write(dir.path().join("path/go"), "").unwrap();
        let Ok(Origin::ToBuild { target, .. }) = Tool::Etcd.find(&around) else {
            panic!("go is there, so etcd can be built")
        };
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        for place in [target, dir.path().join("path/etcd"), dir.path().join("assets/etcd")] {
            fs::write(&place, "").unwrap();
            assert_eq!(Tool::Etcd.find(&around).unwrap(), Origin::Ready(place));
        }
    }

    #[test]
    fn only_what_the_machine_lacks_is_a_reason_to_skip() {
        assert!(ToolUnavailable::NoGo(Tool::Minio).is_missing_prerequisite());
        let failed = ToolUnavailable::Build { tool: Tool::Minio, outcome: "exit status: 1".to_owned() };
        assert!(!failed.is_missing_prerequisite());
    }

    #[test]
    fn the_stamped_version_is_the_pinned_one() {
        for tool in Tool::ALL {
            let pins = Surroundings::from_env().pins.join(tool.module());
            let module = fs::read_to_string(pins.join("go.mod")).unwrap();
            assert!(
                module.contains(&format!("tool {}\n", tool.package())),
                "{tool} is no tool of its module"
            );
        }
        for (tool, required, stamp) in [
            (Tool::KubeApiserver, "k8s.io/kubernetes ", "gitVersion="),
            (Tool::Helm, "helm.sh/helm/v4 ", "version.version="),
            (Tool::CsiProvisioner, "github.com/kubernetes-csi/external-provisioner/v6 ", "main.version="),
        ] {
            let module = Surroundings::from_env().pins.join(tool.module()).join("go.mod");
            let module = fs::read_to_string(module).unwrap();
            let words = |line: &str| line.trim_start().trim_start_matches("require ").to_owned();
            let mut lines = module.lines().map(words);
            let pinned = lines.find_map(|line| line.strip_prefix(required).map(str::to_owned)).unwrap();
            assert!(format!("{} ", tool.ldflags()).contains(&format!("{stamp}{pinned} ")), "{pinned}");
        }
    }
}
