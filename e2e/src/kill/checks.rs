//! What must hold after an import, and after all of them.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use berth_api::template_import::ImportState;
use berth_api::{ImageStore, StagingLedger, StagingReservation};
use berth_testkit::s3::log::RequestLog;
use kube::Api;
use kube::api::ListParams;
use sha2::{Digest as _, Sha256};
use tokio::time::sleep;

use super::store_files::StoreFiles;
use super::{FRAME, IN_FLIGHT, KillError, LOSE, NAMESPACE, POOL, Plan, Run, WINDOW};
use crate::image;
use crate::leaks;
use crate::site::BUCKET;

/// How long releases and the counting of a store may take.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// What the probe of a source, and headers that came twice, may add to the bytes of a source.
const PROBE: u64 = 4 << 20;
/// The same of a VHDX, which keeps its size up to 8 MiB from its start and is looked at twice.
const LONG_PROBE: u64 = 20 << 20;

impl Run<'_> {
    /// The import is ready, right, and was durable when it said so; nothing was fetched again that was recorded.
    pub(super) fn check_outcome(
        &mut self,
        plan: &Plan<'_>,
        kills: u64,
        node_kills: u64,
        took: Duration,
    ) -> Result<(), KillError> {
        let name = &plan.name;
        let known = self.ready.known(name).unwrap_or_default();
        if known.status.state != Some(ImportState::Ready) {
            let error = serde_json::to_string(&known.status.last_error).unwrap_or_default();
            self.violated(format!("import {name} is not ready: {:?}, {error}", known.status.state));
            return Ok(());
        }
        if let Some(lacked) = known.lacked.filter(|lacked| !lacked.is_empty()) {
            let first: Vec<_> = lacked.iter().take(3).collect();
            self.violated(format!(
                "import {name} was ready while the store lacked {}: {first:?}",
                lacked.len()
            ));
        }
        if let Some((before, now)) = known.fell {
            self.violated(format!("progress of import {name} fell from {before} to {now} %"));
        }
        let Some(durable) = known.status.durable else {
            self.violated(format!("import {name} is ready and names no image"));
            return Ok(());
        };
        let expected = self.digest.get_or_insert_with(|| durable.digest.clone()).clone();
        if durable.digest != expected {
            self.violated(format!("import {name} came to {}, not to {expected}", durable.digest));
        }
        let sum =
            sum_of(plan.file).map_err(|source| KillError::File { path: plan.file.to_owned(), source })?;
        if durable.source_digest != sum {
            self.violated(format!("import {name}: source digest {}, not {sum}", durable.source_digest));
        }
        let sent = self.sent_of(name)?;
        let size = fs::metadata(plan.file).map_or(0, |meta| meta.len());
        // Nobody else's death lets a source be read again.
        let probe = if plan.file.extension().is_some_and(|kind| kind == "vhdx") { LONG_PROBE } else { PROBE };
        let allowed = size + probe + node_kills * (WINDOW + IN_FLIGHT);
        if sent > allowed {
            self.violated(format!(
                "import {name}: {sent} bytes of the source were sent, {allowed} are allowed"
            ));
        }
        let attempts = known.status.attempts.unwrap_or_default();
        let line = format!(
            "{name}: {} s, {kills} kills, {attempts} attempts, source {} MiB sent of {} MiB",
            took.as_secs(),
            sent >> 20,
            size >> 20
        );
        eprintln!("{line}");
        self.report.imports.push(line);
        Ok(())
    }

    /// Bytes of an import's source that the file server has sent.
    fn sent_of(&self, name: &str) -> Result<u64, KillError> {
        let log = RequestLog::read(&self.site.dir().join("logs/http-requests.log"))?;
        Ok(log.entries().iter().filter(|entry| entry.key.ends_with(name)).map(|entry| entry.sent).sum())
    }

    /// The store holds the image and its names, and beside them only chunks, which it counts.
    pub(super) async fn check_store(&mut self, store: &str) -> Result<(), KillError> {
        let Some((kills, names)) = self.stores.get(store).cloned() else { return Ok(()) };
        let data = self.site.dir().join("s3");
        let files = StoreFiles::read(&data, BUCKET, store)?;
        for folder in ["sessions/", "tombstones/"] {
            let left: Vec<_> = files.left_in(folder).collect();
            if !left.is_empty() {
                self.violated(format!("store {store}: left in {folder}: {left:?}"));
            }
        }
        let expected = self.digest.clone().unwrap_or_default();
        let images: BTreeSet<_> = files.keys("images/").collect();
        let wanted = format!("images/{}.caibx", expected.trim_start_matches("sha256:"));
        if images != BTreeSet::from([wanted.as_str()]) {
            self.violated(format!("store {store}: indexes {images:?}, not {wanted}"));
        }
        let manifests: BTreeSet<_> = files.keys("manifests/").map(str::to_owned).collect();
        let wanted: BTreeSet<_> =
            names.iter().map(|name| format!("manifests/{NAMESPACE}/{name}.json")).collect();
        if manifests != wanted {
            self.violated(format!("store {store}: manifests {manifests:?}, not {wanted:?}"));
        }
        self.check_log(store, kills)?;
        match files.unreferenced() {
            Ok(bytes) => self.check_unreferenced(store, bytes).await,
            Err(why) => {
                self.violated(format!("store {store}: {why}"));
                Ok(())
            }
        }
    }

    /// What the store was sent again, and how much it was sent at all.
    fn check_log(&mut self, store: &str, kills: u64) -> Result<(), KillError> {
        let log = RequestLog::read(&self.site.dir().join("s3/requests.jsonl"))?;
        let prefix = format!("{store}/chunks/");
        let again: u64 = log
            .repeated_puts()
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix))
            .map(|(_, one)| one.bytes)
            .sum();
        let is_lost =
            |key: &str, fault: &Option<String>| key.starts_with(&prefix) && fault.as_deref() == Some(LOSE);
        let lost = log.entries().iter().filter(|one| is_lost(&one.key, &one.fault)).count() as u64;
        self.report.lost += lost;
        // What was lost had to come again.
        let allowed = kills * WINDOW + lost * FRAME;
        if again > allowed {
            self.violated(format!(
                "store {store}: {again} bytes came again, {allowed} are allowed for {kills} kills"
            ));
        }
        let puts: u64 = log
            .put_bytes_by_key()
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix))
            .map(|(_, bytes)| bytes)
            .sum();
        self.report.windows = self.report.windows.max(puts / WINDOW);
        let open = log.open_uploads();
        if !open.is_empty() {
            self.violated(format!("store {store}: open uploads {open:?}"));
        }
        self.report.imports.push(format!(
            "store {store}: {} MiB of chunks received, {} MiB of them again, {lost} lost, {kills} kills",
            puts >> 20,
            again >> 20
        ));
        Ok(())
    }

    /// The `ImageStore` says how many bytes no index names.
    async fn check_unreferenced(&mut self, store: &str, bytes: u64) -> Result<(), KillError> {
        let stores: Api<ImageStore> = Api::namespaced(self.site.client(), NAMESPACE);
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let found = stores.get(store).await;
            let found =
                found.map_err(|source| KillError::Request { action: "read an image store", source })?;
            let said = found.status.and_then(|status| status.unreferenced_bytes);
            if said.is_some_and(|said| u64::try_from(said) == Ok(bytes)) {
                self.report
                    .imports
                    .push(format!("store {store}: {bytes} bytes that no index names, counted"));
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.violated(format!(
                    "store {store}: {bytes} bytes are named by no index, status says {said:?}"
                ));
                return Ok(());
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// No reservation, promise, file, process or device of the imports is left.
    pub(super) async fn check_node(&mut self) -> Result<(), KillError> {
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let left = self.left_behind().await?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.violated(format!("left behind: {}", left.join(", ")));
                return Ok(());
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    async fn left_behind(&self) -> Result<Vec<String>, KillError> {
        let client = self.site.client();
        let reservations: Api<StagingReservation> = Api::all(client.clone());
        let ledgers: Api<StagingLedger> = Api::all(client);
        let failed = |source| KillError::Request { action: "list what is promised", source };
        let mut left = Vec::new();
        for one in reservations.list(&ListParams::default()).await.map_err(failed)? {
            left.push(format!("reservation {}", one.metadata.name.unwrap_or_default()));
        }
        for ledger in ledgers.list(&ListParams::default()).await.map_err(failed)? {
            left.extend(ledger.spec.promises.keys().map(|uid| format!("promise to {uid}")));
        }
        let node = &self.site.nodes()[0];
        let pool = node.pool_root(POOL);
        for folder in ["staging", "images", "volumes"] {
            match node.names(&pool.join(folder)) {
                Ok(names) => left.extend(names.iter().map(|name| format!("{folder}/{name}"))),
                Err(error) => left.push(format!("{folder}, which cannot be looked into: {error}")),
            }
        }
        let now = leaks::Snapshot::below(self.site.dir());
        for thing in self.before.added(&now) {
            // Restarted programs have other numbers.
            match thing {
                leaks::Thing::Process(_, command) if !command.contains("qemu-img") => {}
                other => left.push(other.to_string()),
            }
        }
        Ok(left)
    }

    /// Debian's casync restores the image from the store's files, byte for byte.
    pub(super) async fn check_content(&mut self, store: &str) -> Result<(), KillError> {
        let (data, digest) = (self.site.dir().join("s3"), self.digest.clone().unwrap_or_default());
        let (dir, raw) = (self.options.dir.join("restored"), self.images.raw.clone());
        let store = store.to_owned();
        let compared = tokio::task::spawn_blocking(move || -> Result<(), KillError> {
            let index = StoreFiles::read(&data, BUCKET, &store)?.lay_out(&digest, &dir)?;
            let restored = dir.join("image.raw");
            let mut casync = Command::new("casync");
            casync.arg("extract").arg(format!("--store={}", dir.join("chunks").display()));
            image::run(casync.args([&index, &restored]))?;
            image::run(Command::new("cmp").args([&restored, &raw]))?;
            Ok(())
        });
        match compared.await.expect("comparing does not panic") {
            Ok(()) => self.report.imports.push("casync restores the image byte for byte".to_owned()),
            Err(KillError::Image(error)) => self.violated(format!("the restored image differs: {error}")),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// `sha256:` of a file.
pub(crate) fn sum_of(path: &Path) -> std::io::Result<String> {
    let (mut hash, mut file) = (Sha256::new(), fs::File::open(path)?);
    let mut piece = vec![0_u8; 1 << 20];
    loop {
        let len = file.read(&mut piece)?;
        if len == 0 {
            break;
        }
        hash.update(&piece[..len]);
    }
    let sum: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{sum}"))
}
