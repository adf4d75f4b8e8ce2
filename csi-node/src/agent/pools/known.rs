//! The pools that were open on this node: so that they are opened again without the API server, and never made anew.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_core::ids::{PoolName, Uid};
use berth_device::files;
use serde::{Deserialize, Serialize};

use super::error::PoolError;
use crate::area::Backend;

/// What is needed to open a pool again without the API server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolSpec {
    /// The UID of the `StagingPool`.
    pub uid: Uid,
    /// The UID of the pool that the area was made for, where that was another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub area: Option<Uid>,
    /// What it is made of.
    #[serde(flatten)]
    pub backend: Backend,
}

impl PoolSpec {
    /// A pool with an area of its own.
    pub fn new(uid: Uid, backend: Backend) -> Self {
        Self { uid, area: None, backend }
    }

    /// What everything on its disk is named after.
    pub fn area(&self) -> &Uid {
        self.area.as_ref().unwrap_or(&self.uid)
    }

    /// For messages.
    pub(super) fn told(&self) -> String {
        format!("as {} with {}", self.uid, self.backend.told())
    }
}

/// A pool that was open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Known {
    #[serde(flatten)]
    pub spec: PoolSpec,
    /// No cluster asked for it, and none decides about it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub local: bool,
    /// Its deletion has begun, and cannot be taken back.
    #[serde(default, skip_serializing_if = "is_false")]
    pub destroying: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// The file that lists them.
pub(super) struct KnownPools {
    file: PathBuf,
    directories: PathBuf,
}

impl KnownPools {
    /// In this directory.
    pub fn in_dir(dir: &Path) -> Self {
        Self { file: dir.join("pools.json"), directories: dir.join("directories.json") }
    }

    /// All of them.
    pub fn read(&self) -> Result<BTreeMap<PoolName, Known>, PoolError> {
        read(&self.file)
    }

    /// One of them.
    pub fn get(&self, name: &PoolName) -> Result<Option<Known>, PoolError> {
        Ok(self.read()?.remove(name))
    }

    /// Adds or changes one.
    pub fn put(&self, name: &PoolName, known: Known) -> Result<(), PoolError> {
        if let Backend::Filesystem { path, .. } = &known.spec.backend {
            self.remember(path.clone())?;
        }
        let mut all = self.read()?;
        if all.get(name) == Some(&known) {
            return Ok(());
        }
        all.insert(name.clone(), known);
        write(&self.file, &all)
    }

    /// Takes one away.
    pub fn remove(&self, name: &PoolName) -> Result<(), PoolError> {
        let mut all = self.read()?;
        match all.remove(name) {
            Some(_) => write(&self.file, &all),
            None => Ok(()),
        }
    }

    /// The directories that ever held an area of this node: one of them may hold an area that was forgotten.
    pub fn directories(&self) -> Result<Vec<PathBuf>, PoolError> {
        read(&self.directories)
    }

    fn remember(&self, dir: PathBuf) -> Result<(), PoolError> {
        let mut all = self.directories()?;
        if all.contains(&dir) {
            return Ok(());
        }
        all.push(dir);
        write(&self.directories, &all)
    }
}

fn write(file: &Path, value: &impl Serialize) -> Result<(), PoolError> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|e| PoolError::Unreadable { path: file.to_owned(), reason: e.to_string() })?;
    Ok(files::write_durably(file, &text)?)
}

fn read<T: Default + for<'de> Deserialize<'de>>(file: &Path) -> Result<T, PoolError> {
    let unreadable = |reason: String| PoolError::Unreadable { path: file.to_owned(), reason };
    match fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).map_err(|e| unreadable(e.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use berth_core::units::Bytes;

    use super::*;
    use crate::area::{ThinGroup, ThinSpec};

    #[test]
    fn what_was_written_of_a_pool_is_read_again() {
        let filesystem = Backend::Filesystem { path: "/srv/pool".into(), size: Bytes(512) };
        let thin = |group| Backend::Thin(ThinSpec { group, block: Bytes::kib(64) });
        let devices = vec![PathBuf::from("/dev/sdb")];
        let own = thin(ThinGroup::Exclusive { devices, wipe: true });
        let shared = thin(ThinGroup::Shared { name: "vg".to_owned(), size: Bytes::gib(1) });
        let mut texts = BTreeSet::new();
        for backend in [filesystem, own, shared] {
            let spec = PoolSpec::new("u".into(), backend);
            let text = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<PoolSpec>(&text).unwrap(), spec, "{text}");
            texts.insert(text);
        }
        assert!(texts.contains(r#"{"uid":"u","path":"/srv/pool","size":512}"#), "{texts:?}");
    }

    #[test]
    fn what_an_older_program_wrote_is_read_and_what_is_new_is_kept() {
        let old = r#"{"fast": {"uid": "u", "path": "/srv/pool", "size": 512}}"#;
        let read: BTreeMap<PoolName, Known> = serde_json::from_str(old).unwrap();
        let known = &read[&PoolName::from("fast")];
        assert_eq!((known.spec.area(), known.local, known.destroying), (&"u".into(), false, false));
        let spec = PoolSpec { area: Some("a".into()), ..known.spec.clone() };
        let known = Known { spec, local: true, destroying: true };
        let text = serde_json::to_string(&known).unwrap();
        assert_eq!(serde_json::from_str::<Known>(&text).unwrap(), known, "{text}");
        assert_eq!(known.spec.area(), &"a".into());
    }
}
