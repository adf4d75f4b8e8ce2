//! Sees the instant at which an import is said to be ready, and looks into the store's files at that instant.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_api::TemplateImport;
use berth_api::conditions::{self, ConditionType};
use berth_api::template_import::TemplateImportStatus;
use kube::{Api, Client, ResourceExt as _};
use tokio::task::JoinSet;

use super::store_files::StoreFiles;
use crate::race::follow::{Seen, follow};
use crate::site::BUCKET;

/// What is known of one import.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Its last status.
    pub status: TemplateImportStatus,
    /// What the store lacked when the import was first seen to be ready, or to name its image.
    pub lacked: Option<Vec<String>>,
    /// True once it is gone.
    pub gone: bool,
    /// Progress that was below an earlier one.
    pub fell: Option<(i32, i32)>,
}

/// The watching task; it ends when this is dropped.
pub struct ReadyWatch {
    known: Arc<Mutex<BTreeMap<String, Known>>>,
    _task: JoinSet<()>,
}

impl ReadyWatch {
    /// Begins to watch the imports of `namespace`, whose stores lie in the server's folder `data` below prefixes that
    /// are their names.
    pub fn start(client: &Client, namespace: &str, data: &Path) -> Self {
        let known = Arc::new(Mutex::new(BTreeMap::new()));
        let api: Api<TemplateImport> = Api::namespaced(client.clone(), namespace);
        let (into, data) = (known.clone(), data.to_owned());
        let mut task = JoinSet::new();
        task.spawn(async move {
            follow("TemplateImport", api, |seen| take(&into, &data, seen)).await;
        });
        Self { known, _task: task }
    }

    /// What is known of an import by now.
    pub fn known(&self, name: &str) -> Option<Known> {
        lock(&self.known).get(name).cloned()
    }
}

fn lock(known: &Mutex<BTreeMap<String, Known>>) -> MutexGuard<'_, BTreeMap<String, Known>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take(known: &Mutex<BTreeMap<String, Known>>, data: &Path, seen: Seen<TemplateImport>) {
    let (import, gone) = match seen {
        Seen::Now(import) => (import, false),
        Seen::Gone(import) => (import, true),
    };
    let (name, namespace) = (import.name_any(), import.namespace().unwrap_or_default());
    let status = import.status.clone().unwrap_or_default();
    let mut entry = lock(known).get(&name).cloned().unwrap_or_default();
    let percent =
        |status: &TemplateImportStatus| status.progress.as_ref().and_then(|progress| progress.percent);
    if let (Some(before), Some(now)) = (percent(&entry.status), percent(&status))
        && now < before
    {
        entry.fell = Some((before, now));
    }
    let said = conditions::is_true(&status.conditions, ConditionType::Ready)
        || conditions::is_true(&status.conditions, ConditionType::Durable)
        || status.durable.is_some();
    if said && entry.lacked.is_none() {
        let digest = status.durable.as_ref().map(|durable| durable.digest.clone()).unwrap_or_default();
        let lacking = match StoreFiles::read(data, BUCKET, &import.spec.store.name) {
            Ok(files) => files.lacks(&digest, &namespace, &name),
            Err(error) => vec![error.to_string()],
        };
        entry.lacked = Some(lacking);
    }
    (entry.status, entry.gone) = (status, gone);
    lock(known).insert(name, entry);
}
