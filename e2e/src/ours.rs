//! The programs under test: built into the target folder that the test program itself came from.

use std::collections::BTreeMap;
use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Set by whoever has just built every program: what is there is then used as it is.
const USE_BUILT: &str = "BERTH_E2E_USE_BUILT";

/// Why a program under test is not there.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The test program lies in no target folder.
    #[error("no target folder around {path}")]
    NoTarget {
        /// The test program.
        path: PathBuf,
    },
    /// Cargo could not be started.
    #[error("failed to start cargo for {binary}")]
    Cargo {
        /// The program.
        binary: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It does not compile.
    #[error("{binary} does not build:\n{output}")]
    Failed {
        /// The program.
        binary: &'static str,
        /// What the compiler said.
        output: String,
    },
}

/// One of our programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ours {
    /// The package.
    pub package: &'static str,
    /// The binary.
    pub binary: &'static str,
    /// The feature that it needs, if any.
    pub feature: Option<&'static str>,
}

/// The operator.
pub const OPERATOR: Ours = Ours { package: "berth-operator", binary: "berth-operator", feature: None };

/// The node plugin.
pub const NODE: Ours = Ours { package: "berth-node", binary: "berth-node", feature: None };

/// The kubectl plugin.
pub const KUBECTL: Ours = Ours { package: "kubectl-berth", binary: "kubectl-berth", feature: None };

/// Shows a record.
pub const RECORD_DUMP: Ours = Ours { package: "berth-record", binary: "berth-record-dump", feature: None };

/// The S3 test server.
pub const TEST_S3: Ours = Ours { package: "berth-testkit", binary: "berth-test-s3", feature: None };

/// The HTTP file server for import sources.
pub const TEST_HTTP: Ours = Ours { package: "berth-testkit", binary: "berth-test-http", feature: None };

/// The operator with defects to choose by `BERTH_SABOTAGE`.
pub const OPERATOR_SABOTAGE: Ours =
    Ours { package: "berth-operator", binary: "berth-operator-sabotage", feature: Some("sabotage") };

/// The node plugin with defects to choose by `BERTH_SABOTAGE`.
pub const NODE_SABOTAGE: Ours =
    Ours { package: "berth-node", binary: "berth-node-sabotage", feature: Some("sabotage") };

/// One of our test programs that run on a machine of their own: in a guest.
#[derive(Debug, Clone, Copy)]
pub struct OurTest {
    /// The package.
    pub package: &'static str,
    /// The test.
    pub test: &'static str,
}

impl OurTest {
    /// The test program, built if it is not up to date. Cargo alone knows its name, so it is always asked.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn obtain(self) -> Result<PathBuf, BuildError> {
        let arguments =
            ["test", "--no-run", "--message-format=json", "--package", self.package, "--test", self.test];
        let output = run_cargo(self.test, &arguments)?;
        let artifacts =
            output.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut programs = artifacts.filter(|artifact| artifact["target"]["name"] == self.test);
        let path = programs.find_map(|artifact| Some(PathBuf::from(artifact["executable"].as_str()?)));
        path.ok_or(BuildError::Failed { binary: self.test, output })
    }
}

impl Ours {
    /// The program, built once per test program. Takes minutes when nothing of it was built before.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn obtain(self) -> Result<PathBuf, BuildError> {
        static BUILT: Mutex<BTreeMap<Ours, PathBuf>> = Mutex::new(BTreeMap::new());
        let mut built = BUILT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(path) = built.get(&self) {
            return Ok(path.clone());
        }
        let path = self.build()?;
        built.insert(self, path.clone());
        Ok(path)
    }

    fn build(self) -> Result<PathBuf, BuildError> {
        let built = profile_folder()?.join(self.binary);
        if env::var_os(USE_BUILT).is_some() && built.is_file() {
            return Ok(built);
        }
        let mut arguments = vec!["build", "--quiet", "--package", self.package, "--bin", self.binary];
        if let Some(feature) = self.feature {
            arguments.extend(["--features", feature]);
        }
        run_cargo(self.binary, &arguments).map(|_| built)
    }
}

/// `<target>/debug` of `<target>/debug/deps/suite-0123`.
fn profile_folder() -> Result<PathBuf, BuildError> {
    let exe = env::current_exe().unwrap_or_default();
    let profile = exe.ancestors().find(|path| path.file_name().is_some_and(|name| name == "debug"));
    profile.map(Path::to_owned).ok_or(BuildError::NoTarget { path: exe.clone() })
}

/// Runs cargo for `binary` in the target folder of this program; gives back what it printed.
fn run_cargo(binary: &'static str, arguments: &[&str]) -> Result<String, BuildError> {
    let profile = profile_folder()?;
    let target = profile.parent().unwrap_or(&profile).to_owned();
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(arguments).env("CARGO_TARGET_DIR", &target);
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let output = command.output().map_err(|source| BuildError::Cargo { binary, source })?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(BuildError::Failed { binary, output });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
