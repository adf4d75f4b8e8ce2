//! Where our own programs are: beside the program that runs, as cargo puts them.

use std::env;
use std::path::{Path, PathBuf};

use super::Saboteur;

/// Why a program of ours cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProgramsError {
    /// It was not built.
    #[error("{binary} is not in {dir}; build it with: cargo build -p {package}{features} --bin {binary}")]
    NotBuilt {
        /// The binary.
        binary: &'static str,
        /// Where it was looked for.
        dir: PathBuf,
        /// Its package.
        package: &'static str,
        /// The flags for its features.
        features: &'static str,
    },
}

/// The programs that a site runs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `berth-operator`, or the one with defects.
    pub operator: PathBuf,
    /// `berth-node`, or the one with defects.
    pub node: PathBuf,
    /// `berth-test-s3`.
    pub s3: PathBuf,
    /// `berth-test-http`.
    pub http: PathBuf,
}

impl Programs {
    /// The programs in the folder of the running one, or the one above `deps`.
    ///
    /// # Errors
    /// [`ProgramsError`], with the command that builds what is missing.
    pub fn beside_this(saboteur: Option<Saboteur>) -> Result<Self, ProgramsError> {
        let here = env::current_exe().unwrap_or_default();
        let dir = here.parent().unwrap_or(Path::new("."));
        let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
        let find = |binary: &'static str, package: &'static str, features: &'static str| {
            let path = dir.join(binary);
            let missing = || ProgramsError::NotBuilt { binary, dir: dir.to_owned(), package, features };
            path.is_file().then_some(path).ok_or_else(missing)
        };
        let with = " --features sabotage";
        Ok(Self {
            operator: match saboteur {
                Some(Saboteur::Operator) => find("berth-operator-sabotage", "berth-operator", with)?,
                _ => find("berth-operator", "berth-operator", "")?,
            },
            node: match saboteur {
                Some(Saboteur::Node) => find("berth-node-sabotage", "berth-node", with)?,
                _ => find("berth-node", "berth-node", "")?,
            },
            s3: find("berth-test-s3", "berth-testkit", "")?,
            http: find("berth-test-http", "berth-testkit", "")?,
        })
    }
}
